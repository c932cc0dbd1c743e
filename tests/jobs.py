"""Several training runs by one set of processes: each process joins the others once and then runs them in turn.

python tests/jobs.py '[{"overrides": ["--config.train.steps=4"], "workdir": "DIR"}, ...]'
"""

import json
import sys
from pathlib import Path

from simvlg_jax.config import load_config
from simvlg_jax.parallel import processes
from simvlg_jax.training import loop


def main() -> None:
    jobs = json.loads(sys.argv[1])

    def work() -> int:
        return max(loop.train(load_config("configs/tiny.py", job["overrides"]), Path(job["workdir"])) for job in jobs)

    processes.run(work, distributed=True)


if __name__ == "__main__":
    main()
