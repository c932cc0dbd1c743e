"""Where prepare works: processes that are killed, Beam, and buckets."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dying
import fsspec
import numpy as np
import preparing
import pytest
import tensorflow_datasets as tfds
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image
from preparing import (
    caption,
    contents,
    records,
    rows,
    run,
    write_files,
    write_jsonl,
    write_lavis,
    write_parquet,
    write_tars,
)

from simvlg_jax.data.index import Index, Row, write_index
from simvlg_jax.data.preparing import local
from simvlg_jax.utils.errors import UserError


def start(source: Path, output: Path, *more: str) -> subprocess.Popen:
    """In a process group of its own, as a terminal would, and with SIGINT as usual: a background job ignores it."""
    # Reset here, since exec keeps what is ignored.
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-m", "simvlg_jax.data.prepare", "--source", source, "--output", output, *more]
    return subprocess.Popen(
        [sys.executable, "-c", program, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def many_tars(tmp_path_factory):
    """Tars that take two workers some seconds, and what they are prepared into."""
    folder = tmp_path_factory.mktemp("many")
    source = folder / "data"
    source.mkdir()
    rng = np.random.default_rng(0)
    big = Image.fromarray(rng.integers(0, 255, (1200, 1200, 3), np.uint8))
    big.save(folder / "big.png", compress_level=1)
    with preparing.webdataset.TarWriter(str(source / "0.tar")) as writer:
        for number in range(8):
            writer.write({"__key__": str(number), "png": (folder / "big.png").read_bytes(), "txt": caption(number)})
    for number in range(1, 3):
        os.link(source / "0.tar", source / f"{number}.tar")
    run(folder / "whole", source)
    return source, folder / "whole"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("victim", ["worker", "parent", "Ctrl-C"])
def test_killed_processes(tmp_path, many_tars, victim):
    source, whole = many_tars
    output = tmp_path / "whole"
    process = start(source, output, "--workers", "2")
    wait_for(lambda: len(list(output.glob(".prepare-train/attempt-*/records"))) == 2)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    if victim == "worker":
        os.kill(workers[0], signal.SIGKILL)
    elif victim == "parent":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {"worker": 0, "parent": -signal.SIGKILL, "Ctrl-C": 130}[victim], errors
    wait_for(lambda: not any(Path(f"/proc/{worker}/cwd").exists() for worker in workers))
    assert "Traceback" not in errors
    if victim == "worker":
        assert "a worker process was killed" in errors
    else:
        assert not (output / "dataset_info.json").exists()
        run(output, source)
    ours, theirs = contents(output), contents(whole)
    assert ours == theirs


def test_a_shard_that_kills_its_worker_ends_the_run(tmp_path, monkeypatch, capsys):
    source = write_tars(tmp_path / "data", 1, tars=3)
    monkeypatch.setattr(local, "_work", dying.work)
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=r"killed 3 times during shard .*1.* run again"):
        run(tmp_path / "o", source, workers=2)
    monkeypatch.undo()
    assert capsys.readouterr().err.count("a worker process was killed") == 2
    run(tmp_path / "o", source)
    assert len(records(tmp_path / "o")) == 3
    wait_for(lambda: set(multiprocessing.active_children()) <= before)


class Bucket(MemoryFileSystem):
    """A bucket in memory."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    def __init__(self, *args, finalize_on_close=False, **options):
        super().__init__(*args, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs:/").removeprefix("gcs:/"))


@pytest.fixture
def bucket(monkeypatch):
    known = dict(_registry)
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.store.clear()
    yield Bucket()
    for name in Bucket.protocol:
        _registry.pop(name)
        if name in known:
            fsspec.register_implementation(name, known[name])


def test_an_index_that_is_written_anew_in_a_bucket_is_read_anew(bucket):
    path = epath.Path("gs://b/index.arrow")
    for text in ("one", "two"):  # files of the same size
        write_index(path, [Row("a", (text,))])
        assert Index(path)[0].texts == [text]


@pytest.mark.parametrize("write", [write_files, write_tars, write_lavis, write_jsonl, write_parquet])
def test_buckets(tmp_path, bucket, write):
    write(tmp_path / "data", 7)
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            bucket.pipe(f"gs://b/in/{path.relative_to(tmp_path / 'data')}", path.read_bytes())
    run(tmp_path / "local", tmp_path / "data")
    for output in ("gs://b/out", "gs://b/out"):
        summary = preparing.prepare(preparing.Settings(["gs://b/in"], output, workers=1))
    assert summary.seconds is None and summary.written == 7
    for path in bucket.find("gs://b/out"):
        target = tmp_path / "copied" / path.removeprefix("/b/out/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bucket.cat(path))
    assert rows(tmp_path / "copied") == rows(tmp_path / "local")
    copied, there = (
        [record["image"] for record in tfds.builder_from_directory(tmp_path / name).as_data_source("train")]
        for name in ("copied", "local")
    )
    assert len(copied) == 7 and all(map(np.array_equal, copied, there))
    assert not [name for name in bucket.find("gs://b/out") if ".prepare" in name]


def test_beam_writes_the_same(tmp_path, small_shards):
    pytest.importorskip("apache_beam")
    source = write_files(tmp_path / "data", 12)
    (source / "00000" / "000000003.jpg").write_bytes(b"x")
    run(tmp_path / "local" / "o", source)
    run(tmp_path / "beam" / "o", source, engine="beam", beam_options="--direct_num_workers=1")
    assert contents(tmp_path / "local" / "o") == contents(tmp_path / "beam" / "o")


def test_beam_refuses_options(tmp_path):
    source = write_files(tmp_path / "data", 1)
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'simvlg_jax\[beam\]'"):
            run(tmp_path / "o", source, engine="beam")
        return
    with pytest.raises(UserError, match="Beam refuses"):
        run(tmp_path / "o", source, engine="beam", beam_options="--runner=NoSuchRunner")
