"""Evaluates order accuracy in processes that share eight devices; the first writes the results.

python tests/order_processes.py FOLDER_OF_THE_DATA RESULTS
"""

import json
import sys
from pathlib import Path

import jax
from test_order import build, evaluator_of

from simvlg_jax.parallel import processes


def work() -> int:
    evaluator, params = evaluator_of(build(Path(sys.argv[1]), "vit.max_frames=4"))
    details = evaluator(params).details()
    if jax.process_index() == 0:
        Path(sys.argv[2]).write_text(json.dumps(details))
    return 0


if __name__ == "__main__":
    processes.run(work, together=True)
