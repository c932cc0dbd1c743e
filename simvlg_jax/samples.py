"""Prints a table of captions and references of a seeded random sample.

python -m simvlg_jax.samples --workdir runs/openmoji [--split test] [--count 10]
"""

import argparse
import json
from pathlib import Path

import numpy as np

from simvlg_jax.utils.errors import UserError, run_verb


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simvlg_jax.samples", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    path = arguments.workdir / "eval" / f"{arguments.split}.json"
    if not path.exists():
        raise UserError(f"no results at {path}; run simvlg_jax.evaluate first")
    results = json.loads(path.read_text())
    examples = results["examples"]
    chosen = np.random.default_rng(0).permutation(len(examples))[: arguments.count]
    print(f"{'reference':45} caption ({arguments.split}, step {results['step']})")
    for i in chosen:
        caption = " ".join(examples[i]["caption"].split())  # an untrained model writes whole paragraphs
        print(f"{examples[i]['references'][0][:44]:45} {caption}")


if __name__ == "__main__":
    run_verb(main)
