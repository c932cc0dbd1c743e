"""The verb `caption` with a file for its lines, and with a question."""

import json

import numpy as np
import pytest
from PIL import Image
from verbs import call

import simvlg_jax
from simvlg_jax import caption, train
from simvlg_jax.evaluation.caption_model import CaptionModel

DRAWN = ["--config.evaluate.do_sample=True", "--config.evaluate.num_captions=2", "--config.evaluate.max_new_tokens=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    flags = ["mesh.data=1", "train.steps=1", "evals.val.every=0", "llm.max_text_tokens=60"]
    arguments = ["--config", "configs/tiny.py", *(f"--config.{flag}" for flag in flags)]
    assert call(train, *arguments, "--workdir", workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"not a picture")
    return folder


def test_interrupted_captions_go_on_and_become_those_of_an_uninterrupted_command(
    run, pictures, tmp_path, monkeypatch, capsys
):
    arguments = ["--workdir", run, "--batch_size", 2, *DRAWN, pictures]
    assert call(caption, *arguments, pictures / "0.png") == 0
    printed = capsys.readouterr().out.splitlines()
    several, batches = CaptionModel.several, []

    def fail_at_the_third(self, images, *rest):
        batches.append(len(images))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return several(self, images, *rest)

    output = tmp_path / "new" / "captions.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(CaptionModel, "several", fail_at_the_third)
        assert call(caption, *arguments, pictures / "0.png", "--output", output) == 130
    assert batches == [2, 1, 2] and output.read_text().splitlines() == printed[:4]
    output.write_text("".join(f"{line}\n" for line in printed[:5]) + '{"image": "')
    capsys.readouterr()
    assert call(caption, *arguments, "--output", output) == 0
    said = capsys.readouterr()
    assert f"4 pictures are in {output}, 3 are left" in said.err and "1 of 7 pictures could not be read" in said.err
    assert output.read_text().splitlines() == printed[:7] and not said.out  # each picture once
    lines = list(map(json.loads, printed))
    assert [line["image"] for line in lines] == [*(str(pictures / f"{i}.png") for i in range(7)), lines[0]["image"]]
    assert "error" in lines[2] and all(len(line["captions"]) == 2 for line in lines if line is not lines[2])
    assert lines[7]["captions"] != lines[0]["captions"]  # each batch draws anew

    monkeypatch.delattr(CaptionModel, "several")  # finished: the model is not needed
    assert call(caption, *arguments, "--output", output) == 0
    for changed in (["--prompt", "a"], ["--config.evaluate.top_k=5"], ["--question", "what?"]):
        assert call(caption, *arguments, *changed, "--output", output) == 2
        assert f"{output} was written with other settings" in capsys.readouterr().err
    assert output.read_text().splitlines() == printed[:7]


def test_question_is_answered_for_each_picture(run, pictures, capsys):
    names = [pictures / "0.png", pictures / "1.png", pictures / "2.png"]
    flags = ["--config.evaluate.num_beams=2", "--config.evaluate.num_captions=2"]
    assert call(caption, "--workdir", run, *flags, "--question", "is it red?", *names) == 0
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    answers = simvlg_jax.load(run, overrides=flags).several_answers(names[:2], "is it red?", 3)
    for line, name, texts in zip(lines, names, answers, strict=False):
        assert line == {"image": str(name), "question": "is it red?", "answer": texts[0], "answers": texts}
        assert len(texts) == 2 and all(len(text) <= 10 for text in texts)
    assert list(lines[2]) == ["image", "error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", " "], "--question is empty"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--question", "a", "--prompt", "b"], "not allowed with"),
        (["--output", "."], "cannot write .: Is a directory"),
    ],
)
def test_wrong_arguments_give_one_message(run, pictures, capsys, arguments, message):
    assert call(caption, "--workdir", run, *arguments, pictures / "0.png") == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and not said.out
