"""What each target of a caption counts in the loss."""

import jax
import jax.numpy as jnp


def unguessed(nats: jax.Array, power: float) -> jax.Array:
    """Returns (1 - p) ** power, p = exp(-nats), for the nats (B, L) of targets in a model that sees no picture.

    Targets that it is sure of count nothing and the others at most 1, which is for power 1 the chance that a guess is
    wrong.
    """
    return jnp.maximum(-jnp.expm1(-nats), 0.0) ** power


def shares(targets: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns (B, L) float32, for each target 1 / the number of its caption's targets; 0 for other tokens.

    Args:
      targets: (B, L) int32, negative where no loss is taken; of packs (G, C).
      lengths: None, or of packs (G, b) int32 the tokens of each caption.
    """
    predicted = (targets >= 0).astype(jnp.float32)
    if lengths is None:
        own = predicted.sum(1, keepdims=True)  # (B, 1)
    else:
        own = _spread(_gathered(predicted, lengths), lengths, targets.shape[1])
    return predicted / jnp.maximum(own, 1.0)


def number_of_captions(targets: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns (B,) float32, how many captions of each row have a target; arguments as for `shares`."""
    predicted = (targets >= 0).astype(jnp.float32)
    own = predicted.sum(1, keepdims=True) if lengths is None else _gathered(predicted, lengths)
    return jnp.sum(own > 0, 1, dtype=jnp.float32)


def _is_of_caption(lengths: jax.Array, tokens: int) -> jax.Array:
    """Returns (G, C, b) bool, whether a token of a pack is one of a caption's."""
    ends = jnp.cumsum(lengths, 1)[:, None]  # (G, 1, b)
    place = jnp.arange(tokens)[:, None]
    return (place < ends) & (place >= ends - lengths[:, None])


def _gathered(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sums x (G, C) over the tokens of each caption: (G, b)."""
    return jnp.sum(jnp.where(_is_of_caption(lengths, x.shape[1]), x[..., None], 0.0), 1)


def _spread(x: jax.Array, lengths: jax.Array, tokens: int) -> jax.Array:
    """Returns x (G, b) at every token of its caption: (G, C)."""
    return jnp.sum(jnp.where(_is_of_caption(lengths, tokens), x[:, None], 0.0), 2)
