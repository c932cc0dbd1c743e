"""The command line: output and exit status of each verb, and one clear message for wrong input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from verbs import call

import simvlg_jax
from simvlg_jax import caption, evaluate, export, train
from simvlg_jax.config.check import flat_keys
from simvlg_jax.config.saved import EXAMPLE, read_config
from simvlg_jax.data.sources import check_unique_ids, load_source
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.evaluation.scores import captions as scoring
from simvlg_jax.utils import errors

TINY = ["--config", "configs/tiny.py", "--config.mesh.data=1"]
OPENMOJI = ["--config", "configs/openmoji.py", "--config.mesh.data=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the workdir of a finished run of configs/tiny.py."""
    workdir = tmp_path_factory.mktemp("run")
    assert call(train, *TINY, "--config.train.steps=4", "--workdir", workdir) == 0
    return workdir


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([*TINY, "--config.train.stepz=3"], 2, "unknown config key 'train.stepz'; did you mean train.steps"),
        ([*TINY, "--config.steps=3"], 2, "did you mean train.steps"),
        ([*TINY, "--config.train.eval_every=3"], 2, "the config key 'train.eval_every' is now 'evals.val.every'"),
        ([*TINY, "--config.train.steps=many"], 2, "train.steps=many"),
        ([*TINY, "--config.train.steps=0"], 2, "train.steps is 0; it must be at least 1"),
        ([*TINY, "--steps=3"], 2, "overrides look like --config.train.steps=100"),
        (["--config", "configs/tony.py"], 2, "no config file configs/tony.py; the package has configs/blip2.py"),
        (["--config", "configs/tiny.py:huge"], 2, "'overfit'"),
        ([*TINY, "--config.vit.size=giant"], 2, "vit.size is 'giant'; it takes 'eva_g'"),
        ([*TINY, "--config.mesh.data=64"], 2, "needs 64 devices and 8 are here"),
        ([*TINY, "--config.train.accumulate=3"], 2, "multiple of train.accumulate"),
        ([*TINY, "--config.connector.merges=(1,2,3)"], 2, "does not fit 2 layers"),
        ([*TINY, "--config.data.name=folder", "--config.data.path=/nowhere"], 1, "/nowhere"),
        ([*OPENMOJI, "--config.data.dir=/nowhere", "--config.vit.weights="], 1, "python -m simvlg_jax.data.prepare"),
        ([*TINY, "--config.vit.weights=/nowhere/vit.safetensors"], 1, "no weights at /nowhere/vit.safetensors"),
    ],
)
def test_wrong_input_gives_one_message(tmp_path, capsys, arguments, status, message):
    assert call(train, *arguments, "--workdir", tmp_path / "run") == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1 and "Traceback" not in error


def test_weights_of_another_architecture_are_listed(tmp_path, capsys, run):
    assert call(train, "--config", "configs/tiny.py:vit", "--config.mesh.data=1", "--config.train.steps=1",
                "--workdir", tmp_path / "vit") == 0  # fmt: skip
    weights = tmp_path / "vit" / "vit.safetensors"
    override = f"--config.vit.weights={weights}"
    assert call(train, *TINY, override, "--config.train.steps=1", "--workdir", tmp_path / "fits") == 0
    capsys.readouterr()
    assert call(train, *TINY, override, "--config.vit.size=small_64px", "--workdir", tmp_path / "not") == 1
    assert "position: model (1, 65, 128), weights (1, 17, 32)" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:1000])
    assert call(train, *TINY, override, "--workdir", tmp_path / "torn") == 1
    assert f"cannot read weights from {weights}" in capsys.readouterr().err


def test_evaluate_writes_results_and_report(run, capsys):
    assert call(evaluate, "--workdir", run, "--split", "test,val") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["split"] for line in lines] == ["test", "val"]
    results = json.loads((run / "eval" / "test.json").read_text())
    assert results["num_examples"] == len(results["examples"]) == 16
    assert results["examples"][0]["references"] == load_source(read_config(run).data, "test")[0]["references"]
    for example in results["examples"]:
        assert sorted(set(example["source_map"])) == list(range(7))
        assert len(example["layers"]) == 2
        assert example["layers"][-1] == example["source_map"]
        # Patches that are one token stay one token.
        assert len(set(zip(*example["layers"], strict=True))) == len(set(example["layers"][0]))
        texts, nats = zip(*example["tokens"], strict=True)
        assert example["references"][0] in "".join(texts)
        assert np.mean(nats) == pytest.approx(example["loss"], rel=1e-3)
    assert "<html" in (run / "report.html").read_text()

    assert call(evaluate, "--workdir", run, "--split", "trial") == 2
    assert 'no split "trial"' in capsys.readouterr().err
    assert call(evaluate, "--workdir", run / "nothing") == 1
    assert "holds no run" in capsys.readouterr().err


def folder_of(path, lines):
    """Makes a data folder with (picture, captions) as test lines, and one picture each for train and val."""
    path.mkdir()
    fields = [{"image": image, "caption": captions, "split": "test"} for image, captions in lines]
    fields += [{"image": f"{split}.png", "caption": "x", "split": split} for split in ("train", "val")]
    for number, name in enumerate(sorted({line["image"] for line in fields})):
        Image.new("RGB", (32, 32), (40 * number, 90, 200 - 30 * number)).save(path / name)
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, fields)))
    return [f"--config.data.{key}={value}" for key, value in (("name", "folder"), ("path", path))]


CAPTIONS = {"a.png": ["a red circle", "one red circle", "red"], "b.png": ["a blue square"], "c.png": ["a cross", "x"]}


def test_lines_of_one_picture_score_as_one_picture(run, tmp_path, capsys):
    """A picture may have a line for each caption, in any order, as in COCO, or one line with all captions."""
    single = [(image, caption) for image, captions in CAPTIONS.items() for caption in captions]
    mixed = [single[i] for i in (5, 0, 3, 4, 1, 2)]
    results = []
    for name, lines in (("joined", CAPTIONS.items()), ("lines", single), ("mixed", mixed)):
        data = folder_of(tmp_path / name, lines)
        assert call(evaluate, "--workdir", run, "--output", tmp_path / f"{name} scores", *data) == 0
        results.append(json.loads((tmp_path / f"{name} scores" / "eval" / "test.json").read_text()))
    assert [r["num_examples"] for r in results] == [3, 3, 3]
    assert {e["id"]: sorted(e["references"]) for e in results[2]["examples"]} == {
        image: sorted(captions) for image, captions in CAPTIONS.items()
    }
    assert results[1]["scores"] == results[0]["scores"]
    assert results[2]["scores"] == pytest.approx(results[0]["scores"], abs=1e-12)


def test_two_pictures_of_one_id_are_an_error():
    with pytest.raises(simvlg_jax.UserError, match=r"two pictures of this split have the id"):
        check_unique_ids(["a", "b", "a"])


def test_unreadable_pictures_are_left_out_of_scores_and_named(run, tmp_path, capsys):
    data = folder_of(tmp_path / "data", CAPTIONS.items())
    (tmp_path / "data" / "b.png").write_bytes(b"junk")
    assert call(evaluate, "--workdir", run, "--output", tmp_path / "scores", *data) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["unreadable"] == 1
    assert "warning: 1 of 3 pictures cannot be read and are left out of the score: b.png" in output.err
    results = json.loads((tmp_path / "scores" / "eval" / "test.json").read_text())
    assert results["num_examples"] == 2 and results["unreadable"] == ["b.png"]
    assert [e["id"] for e in results["examples"]] == ["a.png", "c.png"]
    assert "1 more unreadable" in (tmp_path / "scores" / "report.html").read_text()
    for name in ("a.png", "c.png"):
        (tmp_path / "data" / name).write_bytes(b"junk")
    assert call(evaluate, "--workdir", run, "--output", tmp_path / "scores", *data) == 1
    assert "none of the 3 pictures can be read" in capsys.readouterr().err


def test_evaluate_takes_overrides_and_leaves_the_runs_config_alone(run, tmp_path, capsys):
    before = (run / "config.json").read_text()
    short = ["--config.evaluate.max_new_tokens=3", "--output", tmp_path]
    assert call(evaluate, "--workdir", run, *short) == 0
    assert call(evaluate, "--workdir", run, "--config", "configs/tiny.py", *short) == 0
    assert max(len(e["caption"]) for e in json.loads((tmp_path / "eval" / "test.json").read_text())["examples"]) <= 3
    assert (run / "config.json").read_text() == before
    assert call(evaluate, "--workdir", run, "--output", tmp_path / "all", "--config.connector.merges=()") == 0
    unmerged = json.loads((tmp_path / "all" / "eval" / "test.json").read_text())["examples"]
    assert {max(e["source_map"]) + 1 for e in unmerged if "source_map" in e} == {17}
    assert call(evaluate, "--workdir", run, "--output", tmp_path / "inside", "--config.vit.r=2") == 0
    inside = json.loads((tmp_path / "inside" / "eval" / "test.json").read_text())
    assert inside["visual_tokens"] == 17 - 5 - 5
    counts = [[max(layer) + 1 for layer in e["layers"]] for e in inside["examples"] if "layers" in e]
    assert counts == [[12, 7]] * len(counts) and counts
    for wrong, status, message in (
        (["--config.evaluate.batchsize=4"], 2, "did you mean evaluate.batch_size"),
        (["--config.connector.size=base"], 2, "differs from this config"),
        (["--config.connector.merges=(4, 4)"], 2, "the data or merges differ"),
        (["--config.vit.tokens=13"], 2, "the data or merges differ"),
        (folder_of(tmp_path / "data", CAPTIONS.items()), 2, "name a folder for their results with --output"),
        (["--checkpoint", "7"], 1, "no checkpoint '7'"),
    ):
        assert call(evaluate, "--workdir", run, *wrong) == status
        assert message in capsys.readouterr().err


def test_run_that_is_older_than_a_key_has_its_default(run, tmp_path):
    written = json.loads((run / "config.json").read_text())
    del written["train"]["beta"], written["llm"]["prompt"], written["sentence_encoder"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    old, new = read_config(tmp_path), read_config(run)
    assert (old.train.beta, old.llm.prompt, old.sentence_encoder.pooling) == (0.0, "", "mean")
    assert flat_keys(old).keys() == flat_keys(new).keys() == flat_keys(read_config(EXAMPLE)).keys()


def test_caption_lines_keep_the_order_and_name_what_cannot_be_read(run, pictures, capsys):
    missing = pictures / "missing.png"
    assert call(caption, "--workdir", run, "--batch_size", 2, pictures, missing, pictures / "b.png") == 0
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    names = ["a.jpg", "b.png", "broken.png", "missing.png", "b.png"]
    assert [line["image"] for line in lines] == [str(pictures / name) for name in names]
    assert [sorted(line) for line in lines] == [
        ["caption", "image"], ["caption", "image"], ["error", "image"], ["error", "image"], ["caption", "image"],
    ]  # fmt: skip
    assert lines[1]["caption"] == lines[4]["caption"]
    assert "2 of 5 pictures could not be read" in output.err
    assert call(caption, "--workdir", run, pictures / "broken.png", missing) == 1
    (pictures / "empty").mkdir()
    assert call(caption, "--workdir", run, pictures / "empty") == 1
    capsys.readouterr()
    assert call(caption, "--workdir", run / "nothing", pictures / "absent") == 1  # the model is not looked for
    assert f"no such file or folder: {pictures / 'absent'}" in capsys.readouterr().err


def test_exported_model_captions_as_the_run_rounded_to_bfloat16(run, tmp_path, pictures):
    assert call(export, "--workdir", run, "--output", tmp_path / "exported") == 0
    whole, exported = simvlg_jax.load(run), simvlg_jax.load(tmp_path / "exported")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(x.dtype), whole.params)
    names = [pictures / "a.jpg", pictures / "b.png", np.zeros((9, 9, 3), np.uint8)]
    config = read_config(run)
    assert exported.captions(names) == CaptionModel(config, whole.task, rounded).captions(names)
    assert exported.caption(pictures / "b.png", prompt="a red") == exported.captions(names, "a red")[1]
    with pytest.raises(simvlg_jax.UserError, match="an exported model of one checkpoint"):
        simvlg_jax.load(tmp_path / "exported", checkpoint="4")


def test_output_that_cannot_be_a_folder_is_named(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert call(export, "--workdir", run, "--output", tmp_path / "file") == 1
    assert f"--output {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert call(export, "--workdir", run, "--output", run) == 1
    assert "another folder than the run's" in capsys.readouterr().err
    assert call(evaluate, "--workdir", run, "--output", tmp_path / "file") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_unreadable_picture_and_missing_model_raise_user_errors(run, pictures):
    with pytest.raises(simvlg_jax.UserError, match=r"broken\.png"):
        simvlg_jax.load(run).caption(pictures / "broken.png")
    with pytest.raises(simvlg_jax.UserError, match="holds no run"):
        simvlg_jax.load(pictures)


def noted(error):
    """Returns an error with the note that Grain adds to all errors."""
    error.add_note("--------------------\nFor simplicity, Grain has removed its internal frames")
    return error


@pytest.mark.parametrize(
    ("error", "status", "beginning", "last"),
    [
        (OSError(28, "No space left on device", "file"), 1, "error: no space left", None),
        (PermissionError(13, "Permission denied", "/file"), 1, "error: cannot use /file: Permission denied", None),
        (simvlg_jax.UserError("it is wrong", 2), 2, "error: it is wrong", None),
        # What is restarted, as it may not happen again.
        (RuntimeError("a bug"), errors.UNEXPECTED, "Traceback", "error: RuntimeError: a bug"),
        (noted(ValueError("the cause")), errors.UNEXPECTED, "Traceback", "error: ValueError: the cause"),
    ],
)
def test_errors_have_their_message_and_exit_status(capsys, error, status, beginning, last):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        errors.run_verb(fail)
    assert stop.value.code == status
    said = capsys.readouterr().err
    assert said.startswith(beginning)
    assert last is None or said.splitlines()[-1] == last


def test_terminated_process_saves_and_the_same_command_resumes(tmp_path):
    arguments = [*TINY, "--config.train.steps=100000", "--config.evals.val.every=100000", "--config.train.log_every=1"]
    command = [sys.executable, "-m", "simvlg_jax.train", *arguments, "--workdir", str(tmp_path / "run")]
    for resumed in (False, True):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step "):
                process.send_signal(signal.SIGTERM)
                break
        said += process.communicate(timeout=120)[1].splitlines()
        assert process.returncode == 128 + signal.SIGTERM, said
        assert "stopped by SIGTERM" in said[-1]
        assert any("resuming at step" in line for line in said) == resumed


def test_committed_example_names_held_out_pictures(openmoji_data, tmp_path):
    """On pictures that it has not seen, the example model beats its shuffled control by far.

    It runs in a process of its own without the flags of the tests: this model is so large that they make it slower.
    """
    source = load_source(openmoji_data, "test")
    records = {f"{i}.png": source[i] for i in range(0, len(source), 12)}
    for name, record in records.items():
        (tmp_path / name).write_bytes(record["image"])
    command = [sys.executable, "-m", "simvlg_jax.caption", "--example", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    hypotheses = {Path(line["image"]).name: line["caption"] for line in map(json.loads, done.stdout.splitlines())}
    references = {name: record["references"] for name, record in records.items()}
    right = scoring.score_captions(references, hypotheses).cider
    assert right > 0.8
    assert right > 4 * scoring.shuffled_control(references, hypotheses, 0)["CIDEr"]
