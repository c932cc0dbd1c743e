"""Locked-text contrastive training of a ViT against a frozen sentence encoder.

The loss is the auxiliary image-text contrastive loss of the published code (temperature learned, label
smoothing 0.1, 256 shared dimensions), taken over the global batch, with the mean of the ViT's tokens as the picture.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers

SMOOTHING = 0.1  # of the labels
LEFT_OUT = -1e9  # similarity to a row that does not count; minus infinity would give NaN where no row counts


class Pair(NamedTuple):
    """picture, text: (B, S) float32 unit vectors, row i of the one belonging to row i of the other."""

    picture: jax.Array
    text: jax.Array


class ContrastiveViT(nn.Module):
    """A trained ViT beside a frozen `SentenceEncoder`. Parameters: vit, head_norm, vision_proj, text_proj, ...

    Attributes:
      vit: a `ViT`.
      sentence_encoder: a `SentenceEncoder`.
      shared_width: width of the space both are compared in.
    """

    vit: nn.Module
    sentence_encoder: nn.Module
    shared_width: int = 256
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.head_norm = layers.LayerNorm(1e-5)
        self.vision_proj = layers.torch_dense(self.vit.width, self.shared_width, ("embed", "mlp"), dtype=self.dtype)
        width = self.sentence_encoder.width
        self.text_proj = layers.torch_dense(width, self.shared_width, ("embed", "mlp"), dtype=self.dtype)
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(jnp.log(0.07)), ())

    def __call__(self, images: jax.Array, ids: jax.Array, mask: jax.Array) -> Pair:
        """images (B, H, W, 3) uint8, ids and mask (B, L)."""
        tokens = self.vit(self.vit.normalize(images))
        picture = self.vision_proj(self.head_norm(tokens).mean(1))
        sentence = jax.lax.stop_gradient(self.sentence_encoder(ids, mask))
        text = self.text_proj(sentence)
        return Pair(unit(picture), unit(text))

    def contrastive_losses(self, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        """`matching_losses` at the learned temperature: (B,)."""
        return matching_losses(picture, text, jnp.exp(self.log_temperature), weight)


def matching_losses(
    picture: jax.Array, text: jax.Array, temperature: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
    """Which text belongs to which picture, and the reverse: the mean of both cross-entropies of each row, (B,) nats.

    Rows of weight 0 have a loss of 0, and no other row is compared with them.

    Args:
      picture, text: (B, S), a `Pair`. B is the global batch.
      temperature: () divides the similarities; held within 0.001 and 0.5, as published.
      weight: (B,) float32, 1 or 0; default: all 1.
    """
    size = picture.shape[0]
    weight = jnp.ones(size) if weight is None else weight
    temperature = jnp.clip(temperature, 0.001, 0.5)
    similarity = jnp.einsum("IS,JS->IJ", picture, text, precision="highest") / temperature
    counts = (weight[:, None] * weight[None, :]) > 0

    def cross_entropy(axis: int) -> jax.Array:
        total = jax.nn.logsumexp(jnp.where(counts, similarity, LEFT_OUT), axis)
        mean = jnp.sum(jnp.where(counts, similarity, 0.0), axis) / jnp.maximum(weight.sum(), 1.0)
        return total - (1 - SMOOTHING) * jnp.diagonal(similarity) - SMOOTHING * mean

    return jnp.where(weight > 0, (cross_entropy(1) + cross_entropy(0)) / 2, 0.0)


def unit(x: jax.Array) -> jax.Array:
    """(B, S) -> float32 rows of unit length."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
