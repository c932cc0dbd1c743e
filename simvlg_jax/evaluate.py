"""Scores a checkpoint on held-out pictures and writes results and the report.

    python -m simvlg_jax.evaluate --workdir runs/openmoji [--split test,novel] [--config.evaluate.batch_size=64]
    python -m simvlg_jax.evaluate --example [--output runs/example]
    python -m simvlg_jax.evaluate --workdir runs/openmoji --output runs/mine --config.data.name=folder \\
      --config.data.path=FOLDER

The config is the run's own, with the given overrides. --config replaces it by another file for the same model. The
config in the run's folder does not change. To evaluate on data other than the run's, or with other merges, give
--output, a folder for the results:

    python -m simvlg_jax.evaluate --example --output runs/25 --config.connector.tokens=25

Without --split, this scores the test splits of the data and every entry of the config's `evals` that does not run
during training. It writes eval/NAME.json with every caption for each, and report.html for all of them, to the workdir
or to --output. Unreadable pictures are listed there and not scored. An interrupted evaluation goes on at the first
unfinished batch.
Captions are also scored against the references of other pictures (the shuffled control). A model that ignores the
pictures scores the same on both.

Answers to questions are scored by their accuracy:

    python -m simvlg_jax.evaluate --workdir runs/openmoji --output runs/vqa --split val --type questions \\
      --config.data.name=prepared --config.data.path=data/vqav2

--type choices takes the likeliest of the choices of each record, or of --choices, as the answer. --type order asks of
clips and of their reverses which of the two captions is likelier (docs/video.md); without a sense of order the accuracy
is one half.
"""

import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.config import defaults
from simvlg_jax.config.arguments import (
    add_cache_argument,
    add_checkpoint_argument,
    add_model_arguments,
    add_process_argument,
    config_parser,
    model_folder,
)
from simvlg_jax.config.check import flat_keys
from simvlg_jax.config.load import load_config, override
from simvlg_jax.config.saved import MERGING, differences, is_of_model, read_config, save_config
from simvlg_jax.utils.errors import UserError, run_verb
from simvlg_jax.utils.files import write_json

WHICH_DATA = ("data.name", "data.dir", "data.path", "data.synthetic_size")  # keys that choose the pictures


def main() -> int:
    parser = config_parser(__doc__, required=False, prog="python -m simvlg_jax.evaluate")
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, help="folder for the results; default: the workdir, or runs/example")
    parser.add_argument("--split", default="", help="comma-separated; default: the test splits of the data")
    add = parser.add_argument_group("the evaluation of each split, keys of an entry of config.evals").add_argument
    add("--type", default="", help="captioning, questions, choices, order or retrieval; default: that of the task")
    add("--metric", default="", help="of answers: vqa, gqa, gqa_published or exact; default: vqa, of choices exact")
    add("--scores", dest="extra_scores", default="", help="of captions, besides the others: meteor, spice; need Java")
    add("--lemmatise", action="store_true", help="answers by the base forms of nouns and verbs, as OK-VQA; needs spaCy")
    add("--choices", default="", help='such as "yes|no", or "answers" for all of the split; default: the records\' own')
    add("--ranking", default="sum", help="of choices: by the sum of log-likelihoods or by their mean")
    add_checkpoint_argument(parser)
    add_cache_argument(parser)
    add_process_argument(parser)
    arguments, overrides = parser.parse_known_args()
    workdir = model_folder(arguments)
    output = arguments.output or (Path("runs/example") if arguments.example else workdir)
    own = read_config(workdir)
    config = load_config(arguments.config, overrides) if arguments.config else override(own, overrides)
    if changed := differences(own, config, is_of_model):
        raise UserError(f"the model in {workdir} differs from this config:\n  " + "\n  ".join(changed), 2)
    elsewhere = output.resolve() != workdir.resolve()
    if elsewhere and (output / "checkpoints").exists():
        raise UserError(f"--output {output} holds another run; name another folder", 2)
    changed = differences(own, config, lambda key: key.startswith(WHICH_DATA) or key in MERGING)
    if changed and not elsewhere:
        raise UserError(
            "the data or merges differ from the run's; name a folder for their results with --output:\n  "
            + "\n  ".join(changed),
            2,
        )
    from simvlg_jax.parallel import processes
    from simvlg_jax.parallel.compile_cache import keep_compiled

    keep_compiled(not arguments.no_cache)
    splits = arguments.split.split(",") if arguments.split else []
    keys = ("type", "metric", "extra_scores", "lemmatise", "choices", "ranking")
    kind = {key: getattr(arguments, key) for key in keys}
    return processes.run(
        lambda: evaluate(config, workdir, output, arguments.checkpoint, evaluations(config, splits, kind)),
        arguments.distributed,
    )


def evaluations(config: ConfigDict, splits: list[str], kind: dict[str, str | bool]) -> dict[str, ConfigDict]:
    """Returns {name: entry} of the evaluations.

    They are those of `splits`, or by default those of the test splits of the data and of the entries in `config.evals`
    that do not run during training. The one that chooses the best checkpoint is not among them, since `every=0` turns
    it off.

    Args:
      kind: keys of the evaluations of splits.
    """
    from simvlg_jax.data.sources import test_splits

    off = config.train.best_by
    own = {} if splits else {name: entry for name, entry in config.evals.items() if not entry.every and name != off}
    entries = {}
    for split in splits or test_splits(config.data):
        entries[split] = defaults.get_eval()
        entries[split].update(split=split, **kind)
    return entries | own


def identity(config: ConfigDict, run, entry: ConfigDict, evaluator) -> dict:
    """Returns what determines the results of an evaluation: an interrupted one goes on where all of it is equal."""
    keys = {key: repr(value) for key, value in flat_keys(config).items() if not key.startswith(("mesh.", "train."))}
    size = {"examples": len(evaluator.data), "batch_size": evaluator.data.batch_size}
    return {
        **run.origin,
        **size,
        **keys,
        **{f"entry.{key}": repr(value) for key, value in flat_keys(entry).items()},
    }


def evaluate(config: ConfigDict, workdir: Path, output: Path, checkpoint: str, entries: dict[str, ConfigDict]) -> int:
    import jax

    from simvlg_jax.evaluation.cost import cost
    from simvlg_jax.evaluation.evaluators import make_evaluator
    from simvlg_jax.evaluation.partial import Partial
    from simvlg_jax.evaluation.report.page import write_report
    from simvlg_jax.evaluation.submissions import SUFFIXES
    from simvlg_jax.training.restore import restore_run
    from simvlg_jax.utils.progress import Announcer

    def say(message: str) -> None:
        if jax.process_index() == 0:
            print(message, file=sys.stderr, flush=True)

    run, announce = restore_run(config, workdir, checkpoint), Announcer(say)
    # The evaluators come before the weights are read, so that a wrong split name fails at once.
    evaluators = [make_evaluator(name, entry, run.task, config, run.mesh) for name, entry in entries.items()]
    for evaluator in evaluators:
        say(f"scoring {len(evaluator.data)} pictures of {evaluator.name} at step {run.step}")
        partial = Partial(
            output / "eval" / f"{evaluator.name}.partial.jsonl",
            identity(config, run, entries[evaluator.name], evaluator),
        )
        if partial.batches:
            say(f"going on after {len(partial.batches)} batches that an interrupted evaluation finished")
        result = evaluator(run.params, announce, partial)
        if jax.process_index() == 0:
            spent = cost(run.task, run.params, partial.batches)
            results = {"split": evaluator.name, **run.origin, **spent, **result.details()}
            write_json(output / "eval" / f"{evaluator.name}.json", results)
            for suffix in SUFFIXES:
                path = output / "eval" / f"{evaluator.name}{suffix}"
                path.unlink(missing_ok=True)  # of an evaluation of another type
                if suffix in result.files:
                    write_json(path, result.files[suffix])
            print(json.dumps({"split": evaluator.name, **result.metrics}), flush=True)
        partial.remove()
    if jax.process_index() == 0:
        if output.resolve() != workdir.resolve():
            save_config(config, output)
        print(f"report: {write_report(output)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_verb(main)
