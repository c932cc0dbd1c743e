"""Prepares the example data: `python -m simvlg_jax.data.prepare [--data_dir data]`.

Renders the OpenMoji pictures of the installed packages and writes them with their English names to ArrayRecord files.
It downloads nothing, and does nothing if the data are already prepared.
"""

import argparse

from simvlg_jax.data.openmoji.prepare import prepare_openmoji
from simvlg_jax.utils.errors import run_verb


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simvlg_jax.data.prepare", description=__doc__)
    parser.add_argument("--data_dir", default="data", help="output folder (default: data)")
    sizes = prepare_openmoji(parser.parse_args().data_dir)

    from simvlg_jax.data.openmoji.openmoji_dataset_builder import ATTRIBUTION, LICENCE

    print("OpenMoji:", ", ".join(f"{count} {split}" for split, count in sizes.items()), "pictures")
    print(f"{ATTRIBUTION} ({LICENCE})")


if __name__ == "__main__":
    run_verb(main)
