"""Scores a checkpoint on held-out pictures and writes results and the report.

    python -m simvlg_jax.evaluate --workdir runs/openmoji [--split test,novel] [--config.evaluate.batch_size=64]
    python -m simvlg_jax.evaluate --example [--output runs/example]
    python -m simvlg_jax.evaluate --workdir runs/openmoji --output runs/mine --config.data.name=folder \\
      --config.data.path=FOLDER

The run's own config is used, with the values that are overridden; --config names another file for the same model. The
run's folder keeps its config. Other data than the run's need --output, a folder for their results.

For each split: eval/SPLIT.json with every caption; for all of it report.html; both in the workdir or --output.
Pictures that cannot be read are named there and left out.
Captions are also scored against other pictures' references (the shuffled control): a model that does not look scores
the same on both.
"""

import base64
import io
import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.config.arguments import (
    add_checkpoint_argument,
    add_model_arguments,
    add_process_argument,
    config_parser,
    model_folder,
)
from simvlg_jax.config.load import load_config, override
from simvlg_jax.config.saved import differences, is_of_model, read_config, save_config
from simvlg_jax.utils.errors import UserError, run_verb
from simvlg_jax.utils.files import write_json

WHICH_DATA = ("data.name", "data.dir", "data.path", "data.synthetic_size")  # keys that choose the pictures
GALLERY = 24  # examples whose picture and merge map the report shows


def main() -> int:
    parser = config_parser(__doc__, required=False, prog="python -m simvlg_jax.evaluate")
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, help="folder for the results; default: the workdir, or runs/example")
    parser.add_argument("--split", default="", help="comma-separated; default: test, and novel where the data has it")
    add_checkpoint_argument(parser)
    add_process_argument(parser)
    arguments, overrides = parser.parse_known_args()
    workdir = model_folder(arguments)
    output = arguments.output or (Path("runs/example") if arguments.example else workdir)
    own = read_config(workdir)
    config = load_config(arguments.config, overrides) if arguments.config else override(own, overrides)
    if changed := differences(own, config, is_of_model):
        raise UserError(f"{workdir} holds another model than this config:\n  " + "\n  ".join(changed), 2)
    elsewhere = output.resolve() != workdir.resolve()
    if elsewhere and (output / "checkpoints").exists():
        raise UserError(f"--output {output} holds a run of its own; name another folder", 2)
    if not elsewhere and (changed := differences(own, config, lambda key: key.startswith(WHICH_DATA))):
        raise UserError(
            "these are other data than the run's; name a folder for their results with --output:\n  "
            + "\n  ".join(changed),
            2,
        )
    splits = arguments.split.split(",") if arguments.split else default_splits(config.data.name)
    from simvlg_jax.parallel import processes

    return processes.run(lambda: evaluate(config, workdir, output, arguments.checkpoint, splits), arguments.distributed)


def default_splits(name: str) -> list[str]:
    return ["test", "novel"] if name == "openmoji" else ["test"]


def evaluate(config: ConfigDict, workdir: Path, output: Path, checkpoint: str, splits: list[str]) -> int:
    import jax

    from simvlg_jax.data.sources import load_source
    from simvlg_jax.evaluation import validation
    from simvlg_jax.evaluation.report import write_report
    from simvlg_jax.training.restore import restore_run
    from simvlg_jax.utils.progress import Announcer

    def say(message: str) -> None:
        if jax.process_index() == 0:
            print(message, file=sys.stderr, flush=True)

    announce = Announcer(say)
    sources = {split: load_source(config.data, split) for split in splits}  # wrong names stop here
    run = restore_run(config, workdir, checkpoint)
    for split, source in sources.items():
        say(f"scoring {len(source)} pictures of {split} at step {run.step}")
        scored = (run.task, config, run.params, run.mesh, source, announce)
        if config.task == "contrastive":
            results = validation.retrieval(*scored)
            results = {"split": split, "step": run.step, **results}
            headline = {**results}
        else:
            captions = validation.caption_split(*scored)
            results = {"split": split, "step": run.step, **score(captions, config.seed)}
            headline = {
                "split": split,
                "CIDEr": results["scores"]["CIDEr"],
                "CIDEr_shuffled": results["shuffled"]["CIDEr"],
                "BLEU-4": results["scores"]["BLEU-4"],
                "ROUGE-L": results["scores"]["ROUGE-L"],
                "exact_match": results["exact_match"],
                "loss": results["loss"],
            }
            add_pictures(results["examples"], source, run.task.image_size, config.seed)
        headline.pop("unreadable", None)
        if results["unreadable"]:
            headline["unreadable"] = len(results["unreadable"])
        if jax.process_index() == 0:
            write_json(output / "eval" / f"{split}.json", results)
            print(json.dumps(headline))
    if jax.process_index() == 0:
        if output.resolve() != workdir.resolve():
            save_config(config, output)
        print(f"report: {write_report(output)}", file=sys.stderr)
    return 0


def score(captions: dict, seed: int) -> dict:
    """Scores of `validation.caption_split`'s output, of its shuffled control and of each example.

    Raises:
      UserError: two pictures share an id.
    """
    from simvlg_jax.evaluation import metrics, validation

    references, hypotheses = validation.by_id(captions["examples"])
    scores = metrics.score_captions(references, hypotheses)
    exact = [e["caption"] in e["references"] for e in captions["examples"]]
    return {
        "num_examples": len(captions["examples"]),
        "unreadable": captions["unreadable"],
        "loss": captions["loss"],
        "scores": scores.as_dict(),
        "shuffled": metrics.shuffled_control(references, hypotheses, seed),
        "exact_match": sum(exact) / len(exact),
        "examples": [{**e, "cider": scores.cider_per_example[e["id"]]} for e in captions["examples"]],
    }


def add_pictures(examples: list[dict], source, image_size: int, seed: int) -> None:
    """Gives a seeded choice of examples their picture (base64 PNG); the others lose their source map."""
    import numpy as np
    from PIL import Image

    from simvlg_jax.data import transforms

    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:GALLERY].tolist())
    for number, example in enumerate(examples):
        index = example.pop("index")
        if number in chosen:
            picture = transforms.squash(transforms.decode(source[index]["image"]), image_size)
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
            example["image"] = base64.b64encode(buffer.getvalue()).decode()
        else:
            del example["source_map"]


if __name__ == "__main__":
    run_verb(main)
