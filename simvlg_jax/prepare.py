"""Prepares data for training: `python -m simvlg_jax.data.prepare --source PATH --output DIR`.

Reads pictures or videos with captions, or questions with answers, and writes a data set that TFDS opens as it is, an
index of its texts, and a list of what was skipped (docs/data.md). A run that was interrupted goes on when it is started
again. Without --source it renders the OpenMoji example into --data_dir.
"""

import argparse

from simvlg_jax.data.openmoji.prepare import prepare_openmoji
from simvlg_jax.data.readers import READERS
from simvlg_jax.utils.errors import UserError, run_verb

EXAMPLE = "--data_dir"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", nargs="+", metavar="PATH", help="folders, files or patterns such as 'gs://b/{00000..00012}.tar'")
    add("--output", metavar="DIR", help="folder of the prepared data; each split is a run of its own")
    add("--format", choices=("auto", *READERS), default="auto", help="of the source (default: recognised)")
    add("--split", default="train", help="name of the split that is written (default: train)")
    add("--images", default="", metavar="DIR", help="folder that paths in lists are relative to (default: the list's)")
    add(
        "--max_side", type=int, default=0, metavar="N", help="makes larger pictures JPEGs with this longer side, pixels"
    )
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one for each core)")
    add("--index_only", action="store_true", help="only index WebDataset tars, which training then reads in place")
    add("--engine", choices=("local", "beam"), default="local", help="what runs the work (default: local)")
    add("--beam_options", default="", metavar="OPTIONS", help="of the Beam pipeline, such as '--runner=DataflowRunner'")
    add("--max_skipped", type=float, default=0.5, metavar="SHARE", help="fails if more is skipped (default: 0.5)")
    add("--unlabelled", action="store_true", help="keep rows of lists without captions or answers, as in test splits")
    add(EXAMPLE, default=None, help="without --source: folder of the example (default: data)")
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> None:
    """Raises UserError (status 2) if arguments do not fit each other."""
    problem = None
    if not given.output:
        problem = "--source needs --output, the folder for the prepared data"
    elif given.data_dir is not None:
        problem = f"{EXAMPLE} is for the example, which has no --source"
    elif not given.split.isidentifier() or len(given.split) > 100 or not given.split.isascii():
        problem = f"--split {given.split!r} must be a name of letters, digits and _"
    elif given.split == "all":
        problem = '--split "all" has another meaning in TFDS'
    elif given.max_side < 0 or given.workers < 0:
        problem = "--max_side and --workers must not be negative"
    elif not 0 <= given.max_skipped <= 1:
        problem = "--max_skipped is a share from 0 to 1"
    elif given.index_only and given.max_side:
        problem = "--max_side writes new pictures, and --index_only writes none: leave out one of them"
    elif given.beam_options and given.engine != "beam":
        problem = "--beam_options needs --engine beam"
    if problem:
        raise UserError(problem, status=2)


def main() -> None:
    given = parse()
    if given.source:
        prepare_sources(given)
    elif given.output:
        raise UserError("--output needs --source, the data to prepare", status=2)
    else:
        prepare_example(given.data_dir or "data")


def prepare_sources(given: argparse.Namespace) -> None:
    check(given)
    # Late: the example does not need it.
    from simvlg_jax.data.preparing.run import Settings, prepare

    options = vars(given).copy()
    del options["data_dir"]
    summary = prepare(Settings(sources=options.pop("source"), **options))
    if summary.seconds is None:
        print(f"{given.output} already holds the split {given.split}: nothing to do")
    print(f"{given.split}: {summary}")
    if summary.skipped:
        print(f"what was skipped, and why: {given.output.rstrip('/')}/skipped-{given.split}.jsonl")


def prepare_example(data_dir: str) -> None:
    sizes = prepare_openmoji(data_dir)

    from simvlg_jax.data.openmoji.openmoji_dataset_builder import ATTRIBUTION, LICENCE

    print("OpenMoji:", ", ".join(f"{count} {split}" for split, count in sizes.items()), "pictures")
    print(f"{ATTRIBUTION} ({LICENCE})")


if __name__ == "__main__":
    run_verb(main)
