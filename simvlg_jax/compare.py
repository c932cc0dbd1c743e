"""Compares runs on one page: runs that were evaluated, or methods that it trains and evaluates itself.

    python -m simvlg_jax.compare RUN RUN... [--output compare.html]
    python -m simvlg_jax.compare --config configs/compare.py --workdir runs/compare [--config.seeds="(0,)"]

A RUN is a folder with the results of simvlg_jax.evaluate: a workdir, or what --output named. The first one is compared
with each other one: scores, settings, curves, and the texts that changed most. The runs need a split in common. If they
differ in their number of visual tokens, the page also shows score and time against it.

With --config it trains every method (arm) of a config such as configs/compare.py with several seeds, one run after the
other, and writes compare.html, its charts as SVG and compare.json: score against time, FLOPs and examples, and the cost
up to the score of a baseline. The same command goes on where it was interrupted. What has a record in WORKDIR/records
is not trained again.
"""

import argparse
import sys
from pathlib import Path

from simvlg_jax.evaluation.report.compare import write_comparison
from simvlg_jax.utils.errors import UserError, run_verb


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders with results of simvlg_jax.evaluate")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page; default: compare.html")
    parser.add_argument("--config", help="configs/X.py of a comparison that is trained")
    parser.add_argument("--workdir", type=Path, help="with --config: gets the runs, their records and the page")
    arguments, overrides = parser.parse_known_args()
    if arguments.config is not None:
        return train_and_compare(arguments, overrides)
    if overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    if not arguments.runs:
        parser.error("name two runs or more, or --config and --workdir")
    if arguments.output.suffix != ".html":
        raise UserError(f"--output {arguments.output} is no page; name a file that ends in .html", 2)
    print(write_comparison(arguments.runs, arguments.output))
    return 0


def train_and_compare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.workdir is None or arguments.runs:
        raise UserError("--config needs --workdir and trains its own runs: leave out the folders of others", 2)
    from simvlg_jax.study.page import write_results
    from simvlg_jax.study.plan import read_study
    from simvlg_jax.study.runs import Runs, run_command

    study = read_study(arguments.config, overrides)
    runs = Runs(study, arguments.workdir, run_command, lambda message: print(message, file=sys.stderr, flush=True))
    runs.all(after_each=lambda: write_results(study, arguments.workdir))
    print(write_results(study, arguments.workdir))
    return 0


if __name__ == "__main__":
    run_verb(main)
