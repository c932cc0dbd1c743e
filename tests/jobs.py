"""Does several training runs in one set of processes, which join once and then do the runs in turn.

First it checks that each process puts its rows of a batch in the right place if its devices are not neighbours.

python tests/jobs.py '[{"overrides": ["--config.train.steps=4"], "workdir": "DIR"}, ...]'
python tests/jobs.py wait
"""

import json
import multiprocessing
import sys
import time
from pathlib import Path

import jax
import numpy as np

from simvlg_jax.config.load import load_config
from simvlg_jax.parallel import collectives, processes
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.training import loop


def main() -> None:
    if sys.argv[1] == "wait":
        processes.run(wait, together=True)
    jobs = json.loads(sys.argv[1])

    def work() -> int:
        check_scattered_rows()
        return max(loop.train(load_config("configs/tiny.py", job["overrides"]), Path(job["workdir"])) for job in jobs)

    processes.run(work, together=True, preemptible=True)


def wait() -> int:
    """Prints the process id of a data worker and waits for ten minutes."""
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    print(worker.pid, file=sys.stderr, flush=True)
    time.sleep(600)
    return 0


def check_scattered_rows() -> None:
    devices = jax.devices()
    order = [*devices[::2], *devices[1::2][::-1]]
    mesh = jax.sharding.Mesh(np.array(order).reshape(-1, 1, 1), meshes.AXES)
    batch = np.arange(24).reshape(8, 3)
    placed = meshes.put_batch({"x": batch[list(meshes.local_rows(mesh, 8))]}, mesh)["x"]
    np.testing.assert_array_equal(collectives.gather(placed), batch)


if __name__ == "__main__":
    main()
