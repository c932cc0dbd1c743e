"""METEOR and SPICE: METEOR equals pycocoevalcap's, and whatever is missing is one line before the model runs."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from simvlg_jax.evaluation.captioning import score
from simvlg_jax.evaluation.scores import java
from simvlg_jax.evaluation.scores.captions import tokenized
from simvlg_jax.evaluation.scores.java import JavaScore
from simvlg_jax.evaluation.written import Written
from simvlg_jax.utils.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "caption_metrics.json").read_text())
KEY = "evals.test.extra_scores"


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Returns a function that puts a program named java, a shell script, in the place of all others."""
    java._check.cache_clear()

    def install(version: str, script: str = "exit 1") -> None:
        program = tmp_path / "bin" / "java"
        program.parent.mkdir()
        # The paths of the shell's commands, since PATH holds nothing else.
        body = f'#!/bin/sh\nif [ "$1" = -version ]; then\n{version}\nexit $?\nfi\n{script}\n'
        program.write_text(body)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))

    yield install
    java._check.cache_clear()


def says(version: str) -> str:
    return f"echo 'openjdk version \"{version}\" 2025-04-15' >&2"


def the_error(names: str) -> str:
    with pytest.raises(UserError) as raised:
        java.open_scores(KEY, names)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_meteor_is_that_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="install requirements-scores.txt to compare METEOR")
    if shutil.which("java") is None:
        pytest.skip("no Java on this machine: install it to compare METEOR")
    references = {str(number): texts for number, texts in enumerate(GOLDEN["references"])}
    captions = {str(number): text for number, text in enumerate(GOLDEN["hypotheses"])}
    found = java.meteor(*tokenized(references, captions))
    assert found == pytest.approx(GOLDEN["scores"]["METEOR"], abs=1e-6)


def test_names_are_looked_up():
    assert java.open_scores(KEY, "") == []
    assert "evals.test.extra_scores is 'bleurt'; it takes 'meteor', 'spice'" in the_error("bleurt")


def test_package_that_is_missing(fake_java, monkeypatch):
    fake_java(says("17.0.15"))
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    message = the_error("meteor")
    assert "pip install 'simvlg_jax[scores]'" in message and f"leave METEOR out of {KEY}" in message


@pytest.mark.parametrize("name", ["meteor", "spice"])
def test_java_that_is_missing_or_does_not_run(fake_java, monkeypatch, tmp_path, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no java in PATH" in the_error(name)
    fake_java("echo; echo 'Error: no space for the heap' >&2; false")
    assert "java does not run (Error: no space for the heap)" in the_error(name)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Error: Unable to access jarfile meteor-1.5.jar' >&2; exit 1", "Unable to access jarfile"),
        ("while read -r line; do echo; done; exit 1", "could not convert string to float"),
        ("exit 0", ""),
    ],
)
def test_meteor_that_does_not_run(fake_java, script, reason):
    pytest.importorskip("pycocoevalcap")
    fake_java(says("1.8.0_392"), script)
    message = the_error("meteor")
    assert message.startswith("METEOR does not run: ") and "(Java 8)" in message and reason in message


def test_meteor_that_hangs_is_ended(fake_java, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    fake_java(says("11.0.1"), "while read -r line; do :; done")
    monkeypatch.setattr(java, "TRIAL_SECONDS", 0.2)
    monkeypatch.setattr(java, "_java", lambda name: 11)
    assert the_error("meteor").startswith("METEOR does not run: ")


def test_meteor_that_scores_something_else(fake_java):
    pytest.importorskip("pycocoevalcap")
    answer = 'case "$line" in EVAL*) echo 0.25; echo 0.25;; *) echo 1;; esac'
    fake_java(says("11.0.1"), f"while read -r line; do {answer}; done")
    assert "METEOR is 0.25 for a caption that is its own reference" in the_error("meteor")


def test_what_spice_needs(fake_java, monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "spice" / "lib").mkdir(parents=True)
    monkeypatch.setattr(java, "_package", lambda name: package)
    fake_java(says("17.0.15"))
    assert "SPICE runs on Java 8 to 11, and java is 17" in the_error("spice")
    monkeypatch.setattr(java, "_java", lambda name: 8)
    (package / "spice" / "lib" / java.SPICE_MODELS[0]).touch()
    message = the_error("spice")
    assert f"SPICE needs {java.SPICE_MODELS[1]} of Stanford CoreNLP" in message
    assert "python get_stanford_models.py" in message
    (package / "spice" / "lib" / java.SPICE_MODELS[1]).touch()
    assert [one.name for one in java.open_scores(KEY, "spice")] == ["SPICE"]


def test_spice_reads_what_its_program_writes(monkeypatch):
    """A stand-in for the program writes the results, in SPICE's format."""
    spice = pytest.importorskip("pycocoevalcap.spice.spice")
    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)

    def program(command, cwd):
        values = dict(itertools.pairwise(command))
        rows = json.loads(Path(command[4]).read_text())
        assert [row["test"] for row in rows] == ["a dog", "two cats"] and rows[1]["refs"] == ["cats", "two cats"]
        results = [
            {"image_id": row["image_id"], "scores": {"All": {"f": f}}} for row, f in zip(rows, (0.5, 0.25), strict=True)
        ]
        Path(values["-out"]).write_text(json.dumps(results))

    monkeypatch.setattr(spice.subprocess, "check_call", program)
    assert java.spice({"a": ["a dog"], "b": ["cats", "two cats"]}, {"a": "a dog", "b": "two cats"}) == 0.375

    def failing(command, cwd):
        raise java.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(spice.subprocess, "check_call", failing)
    with pytest.raises(UserError, match="SPICE does not run: CalledProcessError"):
        java.spice({"a": ["a dog"]}, {"a": "a dog"})


def examples_of(count: int, groups=()) -> list[dict]:
    return [
        {
            "index": n,
            "id": str(n),
            "references": GOLDEN["references"][n],
            "caption": GOLDEN["hypotheses"][n],
            "loss": 1.0,
        }
        | ({"group": groups[n % len(groups)]} if groups else {})
        for n in range(count)
    ]


def test_extra_scores_stand_beside_the_others():
    """The program gets the tokens, as in pycocoevalcap's evaluation."""
    seen = []
    extra = JavaScore("METEOR", lambda *_: None, lambda *texts: seen.append(texts) or 0.5)
    examples = examples_of(6)
    result = score(Written(1.0, examples, []), {}, 0, [extra])
    assert result.metrics["METEOR"] == result.details()["scores"]["METEOR"] == 0.5
    assert "METEOR" not in result.details()["shuffled"]
    references, captions = seen[0]
    assert list(captions.values()) == GOLDEN["tokenized_hypotheses"][:6]
    assert list(references.values()) == GOLDEN["tokenized_references"][:6]
    plain = score(Written(1.0, examples, []), {}, 0)
    assert {**plain.metrics, "METEOR": 0.5} == result.metrics
    assert np.isfinite(list(result.metrics.values())).all()
