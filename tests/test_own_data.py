"""From a user's own files to a trained model: prepare, train, evaluate and caption, by the commands a user types."""

import json

import jax
import numpy as np
import pytest
from preparing import caption, run, write_files, write_json, write_tars, write_videos
from verbs import call

from simvlg_jax import caption as caption_verb
from simvlg_jax import evaluate, inspect_data, prepare, train
from simvlg_jax.config.load import load_config
from simvlg_jax.data import pipeline, statistics
from simvlg_jax.data.mixture import load_training
from simvlg_jax.data.sources import load_source
from simvlg_jax.evaluation.scores.answers import vqa_accuracy
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.files import read_metrics

TRAIN = ("train.steps=2", "train.save_every=2", "train.log_every=1", "evals.val.every=2", "mesh.data=1")


def flags(*settings: str) -> list[str]:
    return [f"--config.{setting}" for setting in settings]


def data_of(output, *more: str) -> list[str]:
    return flags("data.name=prepared", f"data.path={output}", *more)


def prepare_both(source, output, *more) -> None:
    for split in ("train", "val"):
        assert call(prepare, "--source", source, "--output", output, "--split", split, "--workers", 1, *more) == 0


def test_a_folder_of_pictures_is_trained_on_and_captioned(tmp_path, capsys):
    source, output, workdir = write_files(tmp_path / "mine", 9), tmp_path / "prepared", tmp_path / "run"
    prepare_both(source, output)
    assert call(train, "--config", "configs/tiny.py", "--workdir", workdir, *data_of(output), *flags(*TRAIN)) == 0
    lines = read_metrics(workdir / "metrics.jsonl")
    logged = next(line for line in lines if "data_wait" in line)
    assert {"read_ms", "decode_ms", "queue_depth", "images_per_second"} <= set(logged) and "unreadable" not in logged
    assert call(evaluate, "--workdir", workdir, "--split", "val") == 0
    capsys.readouterr()
    picture = source / "00000" / "000000003.jpg"
    beams = flags("evaluate.num_beams=3", "evaluate.num_captions=2")
    assert call(caption_verb, "--workdir", workdir, *beams, picture) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["image"] == str(picture) and said["caption"] == said["captions"][0] and len(said["captions"]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_in_place_give_the_batches_of_the_copy(tmp_path, workers):
    write_tars(tmp_path / "tars", 7, tars=3)
    (tmp_path / "tars" / "00001.tar").write_bytes((tmp_path / "tars" / "00001.tar").read_bytes()[:5000])  # truncated
    batches = []
    for index_only in (True, False):
        output = tmp_path / str(index_only)
        run(output, tmp_path / "tars", index_only=index_only)
        config = load_config("configs/tiny.py", [*data_of(output), *flags(f"data.workers={workers}")])
        source = load_training(config.data)
        iterator = pipeline.make_train_iterator(config.data, source, build_task(config).batch, batch_size=8, seed=1)
        with pipeline.workers.signals_blocked():
            batches.append([next(iterator) for _ in range(4)])
        iterator.close()
    for ours, theirs in zip(*batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_questions_are_prompts_and_answers_are_learned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "SECONDS", 0)
    rows = [
        {"question": f"What is this, {n}?", "question_id": n, "image": f"{n % 3}.png", "answer": ["yes", "no", "no"]}
        for n in range(9)
    ]
    source, output = write_json(tmp_path / "vqa", rows, 3), tmp_path / "prepared"
    prepare_both(source, output)
    limits = ("llm.max_text_tokens=60", "data.clean=blip_caption")
    config = load_config("configs/tiny.py", [*data_of(output, *limits)])
    validation = load_source(config.data, "val")
    assert len(validation) == 9
    assert validation[4]["prompt"] == "Question: what is this, 4? Short answer:"
    assert (validation[4]["caption"], validation[4]["references"]) == ("no", ["yes", "no", "no"])
    drawn = set()
    spec = build_task(config).batch
    iterator = pipeline.make_train_iterator(config.data, load_training(config.data), spec, batch_size=8, seed=0)
    for _ in range(3):
        batch = next(iterator)
        text = spec.texts["caption"].encoder.tokenizer
        for ids, targets in zip(batch["caption_ids"], batch["caption_targets"], strict=True):
            answer = text.decode(targets[targets >= 0].tolist(), skip_special_tokens=True)
            whole = text.decode(ids.tolist(), skip_special_tokens=True)
            assert whole.startswith("Question: what is this, ") and whole.endswith(f"Short answer:{answer}")
            drawn.add(answer)
    assert drawn == {" yes", " no"}
    out = tmp_path / "page"
    arguments = ["--config", "configs/tiny.py", "--out", out, *data_of(output, *limits)]
    assert call(inspect_data, *arguments) == 0
    assert "records with a question" in (out / "train.html").read_text()
    workdir = tmp_path / "run"
    arguments = ["--config", "configs/tiny.py", "--workdir", workdir, *data_of(output, *limits), *flags(*TRAIN)]
    assert call(train, *arguments) == 0
    assert call(evaluate, "--workdir", workdir, "--split", "val", "--type", "questions") == 0
    results = json.loads((workdir / "eval" / "val.json").read_text())
    assert (results["type"], results["num_examples"]) == ("questions", 9)
    for example in results["examples"]:
        assert example["question"].startswith("What is this, ") and example["references"] == ["yes", "no", "no"]
        assert example["score"] == vqa_accuracy(example["caption"], ["yes", "no", "no"])
        assert len(example["caption"]) <= 10  # tokens are characters
    assert results["scores"]["accuracy"] == np.mean([example["score"] for example in results["examples"]])
    assert "What is this, 4?" in (workdir / "report.html").read_text()


def test_a_questions_evaluation_of_captions_is_refused(tmp_path, capsys):
    arguments = ["--config", "configs/tiny.py", "--workdir", tmp_path, *flags(*TRAIN)]
    assert call(train, *arguments, *flags("evals.val.type=questions")) == 2
    assert "these records have no questions" in capsys.readouterr().err
    assert call(train, *arguments, *flags("evals.val.type=questions", "evals.val.metric=cider")) == 2
    assert "evals.val.metric is 'cider'; it takes" in capsys.readouterr().err


def test_videos_are_trained_on_and_evaluated(tmp_path):
    source, output, workdir = write_videos(tmp_path / "clips", 9), tmp_path / "prepared", tmp_path / "run"
    (source / "9.mp4").write_bytes(b"no video")
    (source / "9.txt").write_text(caption(9))
    prepare_both(source, output)
    arguments = ["--config", "configs/tiny.py", "--workdir", workdir, *data_of(output), *flags(*TRAIN)]
    assert call(train, *arguments) == 2  # says that these are videos
    clips = flags("data.frames=3", "vit.temporal=True", "vit.max_frames=3")
    assert call(train, *arguments, *clips) == 0
    assert call(evaluate, "--workdir", workdir, "--split", "val") == 0
    results = json.loads(next(workdir.rglob("*val*.json")).read_text())
    assert results["num_examples"] == 9


def test_a_mixture_of_kinds_is_inspected_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "SECONDS", 0)
    for name, kind in (("files", write_files), ("tars", write_tars)):
        run(tmp_path / f"{name}-prepared", kind(tmp_path / name, 9), index_only=name == "tars")
    run(tmp_path / "files-prepared", tmp_path / "files", split="val")
    recipe = tmp_path / "mixed.py"
    recipe.write_text(
        "from simvlg_jax.recipes import tiny\n\n\n"
        "def get_config():\n"
        "    config = tiny.get_config().copy_and_resolve_references().unlock()\n"
        f"    config.data.mixture.a = dict(weight=3, name='prepared', path={str(tmp_path / 'files-prepared')!r})\n"
        f"    config.data.mixture.b = dict(weight=1, name='prepared', path={str(tmp_path / 'tars-prepared')!r})\n"
        "    return config.lock()\n"
    )
    assert call(inspect_data, "--config", recipe, "--out", tmp_path / "page") == 0
    assert "18" in (tmp_path / "page" / "train.html").read_text()
    validation = flags("data.name=prepared", f"data.path={tmp_path / 'files-prepared'}")
    assert call(train, "--config", recipe, "--workdir", tmp_path / "run", *validation, *flags(*TRAIN)) == 0


def test_pictures_are_no_clips(tmp_path):
    run(tmp_path / "o", write_files(tmp_path / "mine", 3))
    arguments = data_of(tmp_path / "o", "data.frames=2", "vit.temporal=True")
    assert call(train, "--config", "configs/tiny.py", "--workdir", tmp_path / "run", *arguments) == 2
