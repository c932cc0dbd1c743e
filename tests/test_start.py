"""A run that will fail does so before the first step, and leaves nothing that refuses the corrected command."""

import json

import pytest
from PIL import Image
from verbs import call

from simvlg_jax import train
from simvlg_jax.training import loop
from simvlg_jax.utils.errors import UserError

TINY = ["--config", "configs/tiny.py", "--config.mesh.data=1", "--config.train.steps=1", "--config.evals.val.every=1"]
FOLDER = [*TINY, "--config.data.name=folder"]


@pytest.fixture
def folder(tmp_path):
    """Makes 12 pictures: 8 for training, 2 each for val and test."""
    path = tmp_path / "pictures"
    path.mkdir()
    lines = []
    for number in range(12):
        split = "train" if number < 8 else ("val", "test")[number % 2]
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(path / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": f"number {number}", "split": split})
    write(path, lines)
    return path


def write(path, lines):
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read(path):
    return [json.loads(line) for line in (path / "captions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "wrong",
    [["--config.data.path=/typo"], ["--config.vit.size=nope"], ["--config.vit.weights=/typo"], ["--config.seed=7"]],
)
def test_failed_start_does_not_refuse_the_corrected_command(tmp_path, capsys, folder, wrong, monkeypatch):
    arguments = [*FOLDER, f"--config.data.path={folder}", "--workdir", tmp_path / "run"]
    with monkeypatch.context() as patch:
        if "seed" in wrong[0]:  # nothing is wrong with it, but the first step fails

            def fail(*_):
                raise UserError("no memory")

            patch.setattr(loop.Trainer, "run_step", fail)
        assert call(train, *arguments, *wrong) in (1, 2)
    assert call(train, *arguments) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 42


def test_missing_validation_data_is_found_before_the_first_step(tmp_path, capsys, folder, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "run_step", lambda *_: pytest.fail("a step was taken"))
    write(folder, [line for line in read(folder) if line["split"] != "val"])
    assert call(train, *FOLDER, f"--config.data.path={folder}", "--workdir", tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert 'is in the split "val"' in message and "--config.evals.val.every=0" in message
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000], ids=["torn", "list", "deep"])
def test_damaged_config_of_a_run_is_named(tmp_path, capsys, text):
    assert call(train, *TINY, "--workdir", tmp_path) == 0
    (tmp_path / "config.json").write_text(text)
    assert call(train, *TINY, "--workdir", tmp_path) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'config.json'} is damaged" in error and "Traceback" not in error


def test_missing_config_of_a_run_is_a_warning(tmp_path, capsys):
    assert call(train, *TINY, "--workdir", tmp_path) == 0
    (tmp_path / "config.json").unlink()
    assert call(train, *TINY, "--workdir", tmp_path) == 0
    assert "config.json is missing, so this config cannot be compared" in capsys.readouterr().err


def test_exported_model_is_not_trained_over(tmp_path, capsys):
    (tmp_path / "weights.safetensors").touch()
    assert call(train, *TINY, "--workdir", tmp_path) == 1
    assert "holds an exported model" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_workdir_that_cannot_be_made(tmp_path, capsys, where):
    (tmp_path / "file").touch()
    assert call(train, *TINY, "--workdir", tmp_path / where) == 1
    error = capsys.readouterr().err
    assert f"error: cannot use {tmp_path / where}" in error and "Traceback" not in error
