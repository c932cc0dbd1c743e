"""Locked-text contrastive training of a ViT against a frozen sentence encoder.

The loss is the auxiliary image-text contrastive loss of the published code: learned temperature, label smoothing 0.1,
256 shared dimensions. It is taken over the global batch. The mean of the ViT's tokens represents a picture.
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
    """The embeddings that the loss compares: picture and text, (B, S) float32 unit vectors, example i in row i."""

    picture: jax.Array
    text: jax.Array


class ContrastiveViT(nn.Module):
    """A trained ViT beside a frozen `SentenceEncoder`.

    Parameters: vit, sentence_encoder, head_norm, vision_proj, text_proj, log_temperature.

    Attributes:
      vit: a `ViT`.
      sentence_encoder: a `SentenceEncoder`.
      shared_width: S, the width of both embeddings.
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
        """Returns the pair of images (B, H, W, 3) uint8 and of texts with ids and mask (B, L) int32."""
        tokens = self.vit(self.vit.normalize(images))
        picture = self.vision_proj(self.head_norm(tokens).mean(1))
        sentence = jax.lax.stop_gradient(self.sentence_encoder(ids, mask))
        text = self.text_proj(sentence)
        return Pair(unit(picture), unit(text))

    def contrastive_losses(self, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns `matching_losses` at the learned temperature: (B,) float32."""
        return matching_losses(picture, text, jnp.exp(self.log_temperature), weight)


def matching_losses(
    picture: jax.Array, text: jax.Array, temperature: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
    """Returns each example's contrastive loss, (B,) float32 nats.

    It is the mean of two cross-entropies: finding the text of the picture, and the picture of the text.

    Rows of weight 0 have a loss of 0, and no other row is compared with them.

    Args:
      picture, text: (B, S), a `Pair`. B is the global batch.
      temperature: (), divides the similarities. It is clipped to 0.001..0.5, as published.
      weight: (B,) float32, 1 or 0; default: all 1.
    """
    weight = jnp.ones(picture.shape[0]) if weight is None else weight
    temperature = jnp.clip(temperature, 0.001, 0.5)
    similarity = jnp.einsum("IS,JS->IJ", picture, text, precision="highest") / temperature
    return jnp.where(weight > 0, (cross_entropies(similarity, weight) + cross_entropies(similarity.T, weight)) / 2, 0.0)


def cross_entropies(similarity: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns how surprising it is that each row's own column is its match, (B,) float32 nats, with label smoothing.

    Args:
      similarity: (B, B) logits, row b's match in column b.
      weight: (B,) float32, 1 or 0. Columns of weight 0 are not compared with; rows of weight 0 have any value.
    """
    counts = (weight[:, None] * weight[None, :]) > 0
    total = jax.nn.logsumexp(jnp.where(counts, similarity, LEFT_OUT), 1)
    mean = jnp.sum(jnp.where(counts, similarity, 0.0), 1) / jnp.maximum(weight.sum(), 1.0)
    return total - (1 - SMOOTHING) * jnp.diagonal(similarity) - SMOOTHING * mean


def unit(x: jax.Array) -> jax.Array:
    """Returns the rows of (B, S) in float32, scaled to unit length."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
