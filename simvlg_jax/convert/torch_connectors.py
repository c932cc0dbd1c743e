"""The table of connectors in PyTorch: the names of their weights, and what config.json of an exported folder says."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from simvlg_jax.convert import bert, weight_map
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.mlp import MlpConnector
from simvlg_jax.models.connectors.perceiver import Perceiver
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.utils.errors import UserError


class TorchForm(NamedTuple):
    """Attributes:
    name: of its class, a key of `CONNECTORS` in huggingface/modeling_simvlg.py.
    rows: the module -> the rows of its parameters, without `vl_proj`.
    fields: of the module, for config.json.
    """

    name: str
    rows: Callable[[nn.Module], list[Row]]
    fields: tuple[str, ...]


def perceiver_rows(perceiver: Perceiver) -> list[Row]:
    layer, torch = "layer_{i}", "layers.{i}"
    norms = [
        row
        for name in ("visual_norm", "latent_norm", "mlp_norm")
        for row in weight_map.layer_norm(f"{layer}/{name}", f"{torch}.{name}")
    ]
    attention = [
        row
        for name in ("query", "key", "value")
        for row in weight_map.query_key_value(f"{layer}/{name}", f"{torch}.attention.{name}")
    ]
    rows = [
        *norms,
        *attention,
        *weight_map.merge_heads(f"{layer}/attention_out", f"{torch}.attention_out"),
        *weight_map.linear(f"{layer}/mlp/fc1", f"{torch}.fc1"),
        *weight_map.linear(f"{layer}/mlp/fc2", f"{torch}.fc2"),
    ]
    return [
        Row("latents", "latents"),
        *weight_map.layer_norm("norm", "norm"),
        *weight_map.numbered(rows, perceiver.depth),
    ]


FORMS = {
    TomeFormer: TorchForm(
        "tomeformer",
        lambda connector: bert.encoder_rows(connector.depth),
        ("width", "depth", "num_heads", "dropout", "merges"),
    ),
    MlpConnector: TorchForm("mlp", lambda connector: [], ("width", "cells")),
    Perceiver: TorchForm("perceiver", perceiver_rows, ("width", "depth", "num_heads", "queries", "dropout")),
}


def of_model(connector: nn.Module) -> TorchForm:
    """Returns the entry of a connector. Raises UserError if there is none."""
    if type(connector) not in FORMS:
        raise UserError(f"a {type(connector).__name__} has no PyTorch form: simvlg_jax.export writes our own files")
    return FORMS[type(connector)]
