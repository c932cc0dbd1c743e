"""Writes report.html again from the files in a run's folder.

python -m simvlg_jax.report --workdir runs/openmoji
"""

import argparse
from pathlib import Path

from simvlg_jax.evaluation.report.page import write_report
from simvlg_jax.utils.errors import run_verb


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a run of simvlg_jax.train")
    print(write_report(parser.parse_args().workdir))


if __name__ == "__main__":
    run_verb(main)
