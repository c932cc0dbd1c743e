"""Compares evaluated runs on one page: scores, settings, curves, and the texts that changed most.

    python -m simvlg_jax.compare RUN RUN... [--output compare.html]

A RUN is a folder with the results of simvlg_jax.evaluate: a workdir, or what --output named. The first one is compared
with each other one. The runs need a split in common. If they differ in their number of visual tokens, the page also
shows score and time against it.
"""

import argparse
from pathlib import Path

from simvlg_jax.evaluation.report.compare import write_comparison
from simvlg_jax.utils.errors import UserError, run_verb


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders with results of simvlg_jax.evaluate")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page; default: compare.html")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".html":
        raise UserError(f"--output {arguments.output} is no page; name a file that ends in .html", 2)
    print(write_comparison(arguments.runs, arguments.output))


if __name__ == "__main__":
    run_verb(main)
