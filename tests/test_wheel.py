"""The wheel in a folder without the repository: the example captions and recipes train."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN_CONFIG = """
from simvlg_jax.config import defaults
from simvlg_jax.recipes import tiny


def get_config():
    config = tiny.get_config()
    config.train.steps = 2
    return config
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Returns a folder with the unpacked wheel, like site-packages."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("simvlg_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for path in (ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, target], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return target


def python(installed: Path, folder: Path, *arguments: str, **settings: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), **settings}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_example_captions(installed, tmp_path):
    program = (
        "import numpy, simvlg_jax; print(simvlg_jax.__file__); "
        "print('caption:', simvlg_jax.load('example').caption(numpy.zeros((64, 64, 3), numpy.uint8)))"
    )
    # Compiled as users compile it: this model is so large that the flags of the other tests make it slower.
    output = python(installed, tmp_path, "-c", program, XLA_FLAGS="")
    assert str(installed) in output and output.partition("caption: ")[2].strip()


def test_config_of_ones_own_trains_and_recipes_are_found(installed, tmp_path):
    (tmp_path / "mine.py").write_text(OWN_CONFIG)
    small = ["--config.evals.val.every=0", "--config.data.synthetic_size.train=8"]
    output = python(installed, tmp_path, "-m", "simvlg_jax.train", "--config", "mine.py", "--workdir", "run", *small)
    assert "done: 2 steps" in output
    program = "from simvlg_jax.config.load import load_config; print(load_config('configs/openmoji.py:vit').task)"
    assert python(installed, tmp_path, "-c", program) == "contrastive\n"
