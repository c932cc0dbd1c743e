"""An evaluation that is interrupted goes on at the first unfinished batch and gives the undisturbed results."""

import json

import pytest
from verbs import call

from simvlg_jax import evaluate, train
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.writer import Writer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    flags = ["train.steps=2", "evals.val.every=0", "evaluate.batch_size=8", "data.synthetic_size.test=20"]
    flags = [f"--config.{flag}" for flag in flags]
    assert call(train, "--config", "configs/tiny.py", "--workdir", workdir, *flags) == 0
    return workdir


def score(run, folder) -> dict:
    assert call(evaluate, "--workdir", run, "--output", folder) == 0
    results = json.loads((folder / "eval" / "test.json").read_text())
    assert results.pop("seconds_per_picture") > 0
    return results


def test_interrupted_evaluation_gives_the_undisturbed_results(run, tmp_path, monkeypatch, capsys):
    whole = score(run, tmp_path / "whole")
    assert len(whole["examples"]) == 20
    assert whole["visual_tokens"] == 1 + max(whole["examples"][0]["source_map"])
    drawn, batch = [], Writer._batch

    def fail_at_the_third(self, params, arrays, seed):
        drawn.append(seed)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return batch(self, params, arrays, seed)

    monkeypatch.setattr(Writer, "_batch", fail_at_the_third)
    assert call(evaluate, "--workdir", run, "--output", tmp_path / "parts") == 130
    kept = tmp_path / "parts" / "eval" / "test.partial.jsonl"
    assert len(kept.read_text().splitlines()) == 3  # the identity and two batches
    batches = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    assert [batch["seconds"] is None for batch in batches] == [True, False]  # the first one compiles
    kept.write_text(kept.read_text() + '{"examples": [{"index"')  # and one that was being written
    capsys.readouterr()
    assert score(run, tmp_path / "parts") == whole
    assert len(drawn) == 4 and drawn[3] == drawn[2]
    assert "going on after 2 batches" in capsys.readouterr().err
    assert not kept.exists()


def test_batches_of_other_settings_are_dropped(tmp_path):
    path = tmp_path / "eval" / "test.partial.jsonl"
    partial = Partial(path, {"step": 1, "evaluate.num_beams": "1"})
    partial.add({"examples": []})
    assert Partial(path, {"step": 1, "evaluate.num_beams": "1"}).batches == [{"examples": []}]
    assert Partial(path, {"step": 1, "evaluate.num_beams": "5"}).batches == []
    assert Partial(path, {"step": 1, "evaluate.num_beams": "1"}).batches == []
