"""Weights of the TomeFormer, under the names of published EVLGen checkpoints or of a BERT."""

import numpy as np

from simvlg_jax.convert import bert, weight_map
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.packages import minilm_folder

PREFIX = "VLconnector."  # of the published names


def rows(connector: TomeFormer) -> list[Row]:
    """Returns a row for every parameter, with its name in a published checkpoint."""
    return [*weight_map.linear("vl_proj", "VL_proj"), *bert.encoder_rows(connector.depth, PREFIX)]


def load(name: str, connector: TomeFormer) -> dict:
    """Returns {"connector": the parameters that a BERT has}, from a file of ours or a published one."""
    path = minilm_folder() if name == "minilm" else resolve(name)
    tree = own_tree(open_tensors(path), "connector") or bert.load_bert(
        path, connector.depth, connector.num_heads, words=False
    )
    return {"connector": tree}


def with_position_norm(connector: dict, norm: float) -> dict:
    """Returns a connector whose positions are scaled to deviate from their mean by `norm` (root mean square).

    Args:
      connector: its parameters; embeddings/position is (512, D).

    Raises:
      UserError (status 2): it holds no positions, or all of them are equal.
    """
    embeddings = connector.get("embeddings", {})
    if "position" not in embeddings:
        raise UserError(
            "connector.position_norm scales positions that are read, and none are: name weights with a TomeFormer or a "
            "BERT (connector.weights, train.init_from), or leave it at 0",
            2,
        )
    position = np.asarray(embeddings["position"]).astype(np.float32)  # (512, D)
    deviation = np.sqrt(np.square(position - position.mean(0)).sum(1).mean())
    if not deviation:
        raise UserError(
            "connector.position_norm scales positions, and those of the weights are all equal: set it to 0", 2
        )
    return {**connector, "embeddings": {**embeddings, "position": position * (np.float32(norm) / deviation)}}
