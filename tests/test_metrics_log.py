"""What a run prints and writes: metrics.jsonl, TensorBoard, progress bars, and messages about what takes long."""

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios

import pytest

from simvlg_jax.training.metrics_log import MetricsLog, read_scores, shows_bars
from simvlg_jax.utils import progress
from simvlg_jax.utils.progress import Announcer


def record(step, kind="train", **fields):
    return {"step": step, "kind": kind, **fields}


def test_resumed_run_drops_later_steps_and_what_is_no_record(tmp_path):
    lines = [
        record(2, loss=1.5),
        record(2, "eval", split="val", score=0.5),
        record(4, loss=1.25),
        record(4, "eval", split="val", score=0.75),
    ]
    lines.insert(2, record(3, "eval", split="coco", score=0.9))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f'null\n[3]\n{text}{{"step": 5, "lo')
    assert read_scores(tmp_path, "val") == {2: 0.5, 4: 0.75}
    assert read_scores(tmp_path, "coco") == {3: 0.9}
    log = MetricsLog(tmp_path, total=6, start=2)
    log.write(3, "train", {"loss": 1.0, "images_per_second": 2.0})
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept[:2] == lines[:2] and len(kept) == 3
    assert kept[2]["step"] == 3 and kept[2]["loss"] == 1.0 and kept[2]["seconds"] >= 0
    assert read_scores(tmp_path, "val") == {2: 0.5}


def test_run_that_has_logged_nothing_yet_has_its_file(tmp_path):
    """Otherwise its first checkpoint would look like one whose scores are lost."""
    MetricsLog(tmp_path, total=1, start=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_gets_the_numbers(tmp_path):
    log = MetricsLog(tmp_path, total=1, start=0)
    log.write(1, "eval", {"split": "val", "score": 0.5, "CIDEr": 0.25})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"val/CIDEr" in file.read_bytes()


@pytest.mark.parametrize(("columns", "shows"), [(100, True), (0, False)])
def test_bar_needs_a_terminal_that_has_a_width(monkeypatch, columns, shows):
    """A terminal of width 0, as in some CI systems, gets plain lines."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert shows_bars() == shows
        monkeypatch.undo()
    os.close(controller)


def test_no_bar_without_a_terminal():
    assert not shows_bars()  # pytest holds standard error


def test_long_work_is_announced_before_and_after_and_quick_work_is_not(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    announce = Announcer(said.append)

    def work(detail, seconds):
        with announce.first("compiling", detail):
            now[0] += seconds

    work("a", 7)  # unknown before: announced
    work("a", 9)  # done before: not compiled again
    work("b", 6)
    assert said == ["compiling a ...", "compiling a: 7.0 s", "compiling b ...", "compiling b: 6.0 s"]
    said.clear()
    work("c", 1)  # the last one was long
    work("d", 1)  # the last one was quick
    work("e", 8)  # quick by what is known, and yet long
    assert said == ["compiling c ...", "compiling c: 1.0 s", "compiling e: 8.0 s"]


def test_training_imports_no_pytorch(tmp_path):
    program = (
        "import pathlib, sys; from simvlg_jax.training import loop; "
        f"loop.MetricsLog(pathlib.Path({str(tmp_path)!r}), 1, 0).close(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list((tmp_path / "tensorboard").iterdir())
