"""SimVLG in JAX: teach a frozen language model to see, in one stage."""

from typing import TYPE_CHECKING

from simvlg_jax.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ml_collections import ConfigDict

    from simvlg_jax.evaluation.caption_model import CaptionModel

__all__ = ["UserError", "load"]


def load(
    name: "str | Path",
    config: "ConfigDict | str | None" = None,
    checkpoint: str = "best",
    overrides: "Sequence[str]" = (),
) -> "CaptionModel":
    """Loads a model from a workdir, an exported folder, "example" or a published checkpoint: `simvlg_jax.api.load`."""
    from simvlg_jax.api import load as load_model  # here, since importing the package must not import jax

    return load_model(name, config, checkpoint, overrides)
