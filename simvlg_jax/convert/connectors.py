"""The connectors by name, each with how it is built and where its first weights come from."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.typing import DTypeLike

from simvlg_jax.convert import pretrained
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.models.connectors.tomeformer import build_tomeformer
from simvlg_jax.models.encoders.vit import ViT


class ConnectorKind(NamedTuple):
    """One line of the table.

    Attributes:
      build: (a config's `connector`, the vision encoder, compute dtype) -> the module; ValueError if it cannot be.
      load: (`connector.weights`, the module) -> parameters to start from.
    """

    build: Callable[[Mapping, ViT, DTypeLike], Connector]
    load: Callable[[str, Connector], dict]


CONNECTORS = {
    "tomeformer": ConnectorKind(build_tomeformer, pretrained.load_bert),
}
