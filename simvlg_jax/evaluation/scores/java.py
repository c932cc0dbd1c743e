"""METEOR and SPICE of captions: Java programs with their own dictionaries, which the package pycocoevalcap starts.

`open_scores` finds what is missing before the model runs: the package, Java, its version, the models of SPICE.

Scale: fractions. "METEOR 30.6" in papers is 0.306 here.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from simvlg_jax.config.check import lookup
from simvlg_jax.utils.errors import UserError, first_line

SPICE_VERSIONS = range(8, 12)  # of Java
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
TRIAL_SECONDS = 300  # after which a trial of METEOR has failed

References = Mapping[str, list[str]]
Captions = Mapping[str, str]


class JavaScore(NamedTuple):
    """A score that a Java program computes.

    Attributes:
      name: in tables.
      check: (version of Java, folder of pycocoevalcap) -> nothing; raises UserError if the program cannot run.
      compute: ({picture: references}, {picture: caption}), both tokenised -> score; raises UserError if it fails.
    """

    name: str
    check: Callable[[int, Path], None]
    compute: Callable[[References, Captions], float]


def open_scores(key: str, names: str) -> list[JavaScore]:
    """Returns the scores that a config value names, once they are found to run.

    Args:
      key: of the config, for messages.
      names: entries of SCORES with commas between them.

    Raises:
      UserError: a name is unknown (status 2), or its program cannot run.
    """
    chosen = [lookup(SCORES, key, name.strip()) for name in names.split(",") if name.strip()]
    for score in chosen:
        try:
            _check(score)
        except UserError as error:
            raise UserError(f"{error}; or leave {score.name} out of {key}", error.status) from error
    return chosen


@functools.cache
def _check(score: JavaScore) -> None:
    score.check(_java(score.name), _package(score.name))


def _package(name: str) -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None:
        raise UserError(f"{name} needs the package pycocoevalcap: pip install 'simvlg_jax[scores]'")
    return Path(next(iter(found.submodule_search_locations)))


def _java(name: str) -> int:
    """The version of Java: 8 for "1.8.0_392", 17 for "17.0.15"."""
    if shutil.which("java") is None:
        raise UserError(f"{name} is a Java program, and there is no java in PATH: install one, such as OpenJDK 11")
    try:
        run = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{name} is a Java program, and java does not run ({first_line(error)})") from error
    found = re.search(r'version "(?:1\.)?(\d+)', run.stdout + run.stderr)
    if run.returncode or not found:
        raise UserError(f"{name} is a Java program, and java does not run ({_first(run.stderr) or 'no version'})")
    return int(found[1])


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _check_meteor(version: int, package: Path) -> None:
    del package  # the trial shows whether its files are there
    try:
        found = meteor({"a": ["a dog runs", "the dog is running"]}, {"a": "the dog is running"}, TRIAL_SECONDS)
    except UserError as error:
        raise UserError(f"{error} (Java {version})") from error
    if not found > 0.9:
        raise UserError(f"METEOR is {found} for a caption that is its own reference (Java {version})")


def meteor(references: References, captions: Captions, seconds: float | None = None) -> float:
    """Returns METEOR 1.5 of tokenised captions, over the whole corpus (Denkowski and Lavie, 2014).

    Args:
      references: {picture: one or more captions}.
      captions: {picture: caption}, with the same keys.
      seconds: after which the program is ended.

    Raises:
      UserError: the program ends before its answer.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    timer = threading.Timer(seconds or threading.TIMEOUT_MAX, scorer.meteor_p.kill)
    timer.daemon = True
    timer.start()
    try:
        return scorer.compute_score(references, {key: [text] for key, text in captions.items()})[0]
    except (OSError, ValueError) as error:  # there is no answer, or none that is a number
        scorer.meteor_p.kill()
        reason = _first(scorer.meteor_p.stderr.read().decode(errors="replace"))
        raise UserError(f"METEOR does not run: {reason or first_line(error)}") from error
    finally:
        timer.cancel()
        if scorer.lock.locked():  # the end of the object would wait for it
            scorer.lock.release()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()


def _check_spice(version: int, package: Path) -> None:
    if version not in SPICE_VERSIONS:
        raise UserError(
            f"SPICE runs on Java {SPICE_VERSIONS[0]} to {SPICE_VERSIONS[-1]}, and java is {version}: put such a java "
            "first in PATH"
        )
    if absent := [name for name in SPICE_MODELS if not (package / "spice" / "lib" / name).exists()]:
        raise UserError(
            f"SPICE needs {' and '.join(absent)} of Stanford CoreNLP in {package / 'spice' / 'lib'}; fetch them with: "
            f"cd {package / 'spice'} && python get_stanford_models.py"
        )


@contextlib.contextmanager
def _output_to_errors() -> Iterator[None]:
    """Sends what subprocesses print to standard error: standard output is for results."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def spice(references: References, captions: Captions) -> float:
    """Returns the mean SPICE of tokenised captions (Anderson et al., 2016); arguments and errors as `meteor`."""
    from pycocoevalcap.spice.spice import Spice

    try:
        with _output_to_errors():
            score, _ = Spice().compute_score(references, {key: [text] for key, text in captions.items()})
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"SPICE does not run: {first_line(error)}") from error
    return float(score)


SCORES = {"meteor": JavaScore("METEOR", _check_meteor, meteor), "spice": JavaScore("SPICE", _check_spice, spice)}
