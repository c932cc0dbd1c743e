"""The table of connectors: how to build each, and how to load its first weights."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.typing import DTypeLike

from simvlg_jax.convert import pretrained
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.models.connectors.mlp import build_mlp, build_pool
from simvlg_jax.models.connectors.perceiver import build_perceiver
from simvlg_jax.models.connectors.tomeformer import build_tomeformer
from simvlg_jax.models.encoders.vit import ViT


class ConnectorKind(NamedTuple):
    """One line of the table.

    Attributes:
      build: (a config's `connector`, the vision encoder, compute dtype) -> the module. Raises ValueError if the config
        does not fit.
      load: (`connector.weights`, the module) -> its first parameters.
      keys: which of the keys of `connector` that are off by default (0, False or empty) it has. The others are refused.
    """

    build: Callable[[Mapping, ViT, DTypeLike], Connector]
    load: Callable[[str, Connector], dict]
    keys: tuple[str, ...] = ()


CONNECTORS = {
    "tomeformer": ConnectorKind(
        build_tomeformer,
        pretrained.load_bert,
        ("r", "inflect", "tokens", "budgets", "weighted_mean", "proportional_attention"),
    ),
    "mlp": ConnectorKind(build_mlp, pretrained.load_connector, ("width",)),
    "pool": ConnectorKind(build_pool, pretrained.load_connector, ("width", "tokens", "budgets")),
    "perceiver": ConnectorKind(build_perceiver, pretrained.load_connector),
}
