"""Locked-text contrastive training of a ViT against a frozen sentence encoder.

The loss is the auxiliary image-text contrastive loss of the published code: learned temperature, label smoothing 0.1,
256 shared dimensions. It is taken over the global batch. The mean of the ViT's tokens represents a picture.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from simvlg_jax.models import layers


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

    def contrastive_losses(self, picture: jax.Array, text: jax.Array) -> jax.Array:
        """Returns `matching_losses` at the learned temperature: (B,) float32."""
        return matching_losses(picture, text, jnp.exp(self.log_temperature))


def matching_losses(picture: jax.Array, text: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns each example's contrastive loss, (B,) float32 nats.

    It is the mean of two cross-entropies: finding the text of the picture, and the picture of the text.

    Args:
      picture, text: (B, S), a `Pair`. B is the global batch.
      temperature: (), divides the similarities. It is clipped to 0.001..0.5, as published.
    """
    temperature = jnp.clip(temperature, 0.001, 0.5)
    similarity = jnp.einsum("IS,JS->IJ", picture, text, precision="highest") / temperature
    targets = optax.smooth_labels(jnp.eye(similarity.shape[0]), 0.1)
    losses = optax.softmax_cross_entropy(similarity, targets) + optax.softmax_cross_entropy(similarity.T, targets)
    return losses / 2


def unit(x: jax.Array) -> jax.Array:
    """Returns the rows of (B, S) in float32, scaled to unit length."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
