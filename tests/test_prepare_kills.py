"""Preparing is killed at 20 random moments, and the result equals that of an undisturbed run."""

import multiprocessing
import time

import numpy as np
import preparing_child
import pytest
from preparing import contents, write_files, write_tars

from simvlg_jax.data.preparing.run import Settings

SEED, KILLS = 20251125, 10  # of each source


@pytest.fixture(scope="module")
def context():
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["preparing_child"])
    return forks


@pytest.mark.parametrize(("write", "sizes"), [(write_files, (200,)), (write_tars, (8, 20))])
def test_kills_at_random_moments(tmp_path, context, write, sizes):
    source = write(tmp_path / "data", *sizes)
    for broken in sorted(source.rglob("*7.jpg"))[:3]:
        broken.write_bytes(b"x")

    def start(name: str):
        """Starts to prepare; returns the process when it begins to work."""
        settings = Settings([str(source)], str(tmp_path / name / "o"), workers=1)
        started = context.Event()
        process = context.Process(target=preparing_child.child, args=(settings, started))
        process.start()
        assert started.wait(60)
        return process

    def finish(name: str) -> float:
        process = start(name)
        begun = time.monotonic()
        process.join(60)
        assert process.exitcode == 0
        return time.monotonic() - begun

    seconds = min(finish("warm"), finish("whole"))
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "warm") == whole and len(whole) > 10
    rng = np.random.default_rng(SEED)
    kills = number = 0
    stages = set()
    while kills < KILLS:
        name = f"run-{number}"
        number += 1
        folder = tmp_path / name / "o"
        while kills < KILLS:
            process = start(name)
            process.join(rng.uniform(0, seconds))
            done = process.exitcode is not None
            process.kill()
            process.join()
            if done:
                break
            kills += 1
            stages.add(len(list(folder.glob(".prepare-train/report-*"))))
            assert not (folder / "dataset_info.json").exists() or (folder / "index-train.arrow").exists()
        finish(name)
        assert contents(tmp_path / name) == whole
    print(f"{kills} kills of {number} runs, after {sorted(stages)} shards")
    assert len(stages) > 1  # kills came at different moments of the work
