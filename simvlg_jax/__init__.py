"""SimVLG in JAX: teach a frozen language model to see, in one stage."""

from typing import TYPE_CHECKING

from simvlg_jax.errors import UserError

if TYPE_CHECKING:
    from simvlg_jax.model import CaptionModel

__all__ = ["UserError", "load"]


def load(name: str) -> "CaptionModel":
    """A trained model from a workdir, an exported folder, or "example"; see `simvlg_jax.model.load`."""
    from simvlg_jax.model import load as load_model  # late: importing the package must not start jax

    return load_model(name)
