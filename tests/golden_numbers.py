"""What the checks of golden numbers share: reading them, comparing with them, and parts of the models."""

import json
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.models.encoders.vit import VisionOutput

TOLERANCE = 1e-4
Check = tuple[str, float]  # what was compared, and its error in units of its tolerance: above 1 it fails


def relative(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """Returns ||ours - theirs|| / ||theirs||; infinity if the shapes differ or ours is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    distance = np.linalg.norm(ours - theirs)
    return float(distance / max(np.linalg.norm(theirs), floor, 1e-30)) if distance else 0.0


def exact(equal: bool) -> float:
    return 0.0 if equal else float("inf")


class Frames(nn.Module):
    """Takes the place of the vision encoder where the golden inputs are its outputs (B, N, C)."""

    temporal = False
    class_token = True

    def encode(self, frames: jax.Array) -> VisionOutput:
        return VisionOutput(frames)


def build_qformer(sizes: dict) -> QFormer:
    q = sizes["qformer"]
    every = q["cross_attention_freq"]
    return QFormer(q["dim"], q["layers"], q["heads"], q["queries"], cross_every=every, hidden=q["ffn"])


def read_model(folder: Path, name: str) -> tuple[dict, dict, dict]:
    """Returns (sizes, tensors, arrays) from NAME.json, .safetensors and .npz."""
    sizes = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as archive:
        arrays = dict(archive)
    return sizes, load_file(folder / f"{name}.safetensors"), arrays


def compare_gradients(ours: dict, theirs: dict, of_qformer: bool) -> Iterator[Check]:
    """Compares gradients by name. In those of the Q-Former, key biases hold rounding noise below 1e-7 of the norm."""
    norm = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in theirs.values()))
    for key in sorted(set(ours) & set(theirs)):
        floor = 1e-7 / TOLERANCE if of_qformer and key.endswith("key.bias") else 1e-6
        yield key, relative(ours[key], theirs[key], floor * norm) / TOLERANCE


def is_query_layer(module: nn.Module) -> bool:
    """Returns whether a module is a layer of the Q-Former, or the norm before the first one."""
    return isinstance(module.parent, QFormer) and (module.name == "norm" or module.name.startswith("layer_"))


def layer_outputs(inner: dict, call: int = 0) -> jax.Array:
    """Returns what a call of the Q-Former gave after its norm and each layer, (1 + L, B, S, D)."""
    layers = (inner[f"layer_{i}"]["__call__"][call][0] for i in range(len(inner) - 1))
    return jnp.stack([inner["norm"]["__call__"][call], *layers])
