"""Weights of the MLP and of the perceiver: their names in PyTorch, which are ours, and reading them from our files."""

from simvlg_jax.convert import weight_map
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.convert.tomeformer import PREFIX
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.models.connectors.mlp import MlpConnector
from simvlg_jax.models.connectors.perceiver import Perceiver
from simvlg_jax.utils.errors import UserError

VL_PROJ = weight_map.linear("vl_proj", "VL_proj")


def mlp_rows(mlp: MlpConnector) -> list[Row]:
    return VL_PROJ


def perceiver_rows(perceiver: Perceiver) -> list[Row]:
    ours, torch = "layer_{i}", PREFIX + "layers.{i}"
    layer = [
        *weight_map.merge_heads(f"{ours}/attention_out", f"{torch}.attention_out"),
        *weight_map.linear(f"{ours}/mlp/fc1", f"{torch}.fc1"),
        *weight_map.linear(f"{ours}/mlp/fc2", f"{torch}.fc2"),
    ]
    for name in ("visual_norm", "latent_norm", "mlp_norm"):
        layer += weight_map.layer_norm(f"{ours}/{name}", f"{torch}.{name}")
    for name in ("query", "key", "value"):
        layer += weight_map.query_key_value(f"{ours}/{name}", f"{torch}.attention.{name}")
    ends = [Row("latents", f"{PREFIX}latents"), *weight_map.layer_norm("norm", f"{PREFIX}norm")]
    return [*VL_PROJ, *ends, *weight_map.numbered(layer, perceiver.depth)]


def load(name: str, connector: Connector) -> dict:
    """Returns {"connector": its parameters}, from a file of a connector alone or of an exported model.

    Raises:
      UserError: the file is not ours.
    """
    tree = own_tree(open_tensors(resolve(name)), "connector")
    if tree is None:
        raise UserError(
            f'connector.weights={name}: this connector starts from a file of ours or from random weights (""); '
            "a BERT is for the TomeFormer"
        )
    return {"connector": tree}
