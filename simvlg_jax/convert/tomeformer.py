"""Weights of the TomeFormer, under the names of published EVLGen checkpoints or of a BERT."""

from simvlg_jax.convert import bert, weight_map
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.tomeformer import TomeFormer
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
