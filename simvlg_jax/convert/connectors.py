"""The table of connectors: how to build each, its published names, and how to load its first weights."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from jax.typing import DTypeLike

from simvlg_jax.convert import qformer, tomeformer
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.models.connectors.qformer import QFormer, build_qformer
from simvlg_jax.models.connectors.tomeformer import TomeFormer, build_tomeformer
from simvlg_jax.models.encoders.vit import ViT


class ConnectorKind(NamedTuple):
    """One line of the table.

    Attributes:
      module: its Linen module. No other entry has it.
      build: (a config's `connector`, the vision encoder, compute dtype) -> the module. Raises ValueError if the config
        does not fit.
      rows: module -> a row for each parameter, with its name in a published checkpoint of the whole model.
      load: (`connector.weights`, the module) -> {"connector": its first parameters}, and other modules that the file
        has.
      absent: parts of the connector that a BERT lacks, so that they may start from random numbers.
    """

    module: type[Connector]
    build: Callable[[Mapping, ViT, DTypeLike], Connector]
    rows: Callable[[Connector], list[Row]]
    load: Callable[[str, Connector], dict]
    absent: Collection[str]


CROSS = ("cross_query", "cross_key", "cross_value", "cross_attention_out", "cross_attention_norm")
CONNECTORS = {
    "tomeformer": ConnectorKind(TomeFormer, build_tomeformer, tomeformer.rows, tomeformer.load, ("vl_proj",)),
    "qformer": ConnectorKind(
        QFormer, build_qformer, qformer.rows, qformer.load, ("query_tokens", "query_mlp", "query_mlp_norm", *CROSS)
    ),
}


def of_model(connector: Connector) -> ConnectorKind:
    """Returns the line of a connector."""
    return next(kind for kind in CONNECTORS.values() if kind.module is type(connector))
