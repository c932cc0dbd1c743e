"""The table of connectors: how to build each, its published names, and how to load its first weights."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from jax.typing import DTypeLike

from simvlg_jax.convert import qformer, simple_connectors, tomeformer
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.models.connectors.mlp import MlpConnector, build_mlp, build_pool
from simvlg_jax.models.connectors.perceiver import Perceiver, build_perceiver
from simvlg_jax.models.connectors.qformer import QFormer, build_qformer
from simvlg_jax.models.connectors.tomeformer import TomeFormer, build_tomeformer
from simvlg_jax.models.encoders.frames import VisualTokens


class ConnectorKind(NamedTuple):
    """One line of the table.

    Attributes:
      module: its Linen module. Entries of one module have the same rows.
      build: (a config's `connector`, the tokens that it gets, compute dtype) -> the module. Raises ValueError if the
        config does not fit.
      rows: module -> a row for each parameter, with its name in a published checkpoint of the whole model.
      load: (`connector.weights`, the module) -> {"connector": its first parameters}, and other modules that the file
        has.
      absent: parts of the connector that a BERT lacks, so that they may start from random numbers.
      keys: which of the keys of `connector` that are off by default (0, False or empty) it has. The others are refused.
    """

    module: type[Connector]
    build: Callable[[Mapping, VisualTokens, DTypeLike], Connector]
    rows: Callable[[Connector], list[Row]]
    load: Callable[[str, Connector], dict]
    absent: Collection[str] = ()
    keys: Collection[str] = ()


MERGING = ("r", "inflect", "tokens", "budgets", "weighted_mean", "proportional_attention")
POOLING = ("width", "tokens", "budgets")
MLP = simple_connectors.mlp_rows, simple_connectors.load
CROSS = ("cross_query", "cross_key", "cross_value", "cross_attention_out", "cross_attention_norm")
NEW = ("query_tokens", "query_mlp", "query_mlp_norm", *CROSS)  # in a Q-Former that starts from a BERT
CONNECTORS = {
    "tomeformer": ConnectorKind(
        TomeFormer,
        build_tomeformer,
        tomeformer.rows,
        tomeformer.load,
        ("vl_proj",),
        (*MERGING, "remat", "position_norm"),
    ),
    "qformer": ConnectorKind(QFormer, build_qformer, qformer.rows, qformer.load, NEW, ("tokenizer", "remat")),
    "mlp": ConnectorKind(MlpConnector, build_mlp, *MLP, keys=("width",)),
    "pool": ConnectorKind(MlpConnector, build_pool, *MLP, keys=POOLING),
    "perceiver": ConnectorKind(Perceiver, build_perceiver, simple_connectors.perceiver_rows, simple_connectors.load),
}


def of_model(connector: Connector) -> ConnectorKind:
    """Returns the line of a connector."""
    return next(kind for kind in CONNECTORS.values() if kind.module is type(connector))
