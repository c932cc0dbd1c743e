"""What changes the logits of the next token before one is chosen. Each function takes and returns logits (B, V)."""

import jax
import jax.numpy as jnp


def penalise_repetition(logits: jax.Array, ids: jax.Array, count: jax.Array, penalty: float) -> jax.Array:
    """Divides logits of the first `count` tokens of `ids` (B, T) by the penalty if positive, else multiplies them."""
    if penalty == 1.0:
        return logits
    rows, length = ids.shape
    generated = jnp.where(jnp.arange(length) < count, ids, logits.shape[1])  # V is dropped below
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], generated].set(True, mode="drop")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid(logits: jax.Array, token: int | jax.Array, forbidden: jax.Array) -> jax.Array:
    """Gives one token the probability 0 where `forbidden`, a scalar, is true."""
    return logits.at[:, token].set(jnp.where(forbidden, -jnp.inf, logits[:, token]))


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Gives all but the k most likely tokens, and those as likely as the k-th, the probability 0. 0 keeps all."""
    if not 0 < k < logits.shape[1]:
        return logits
    return jnp.where(logits < jax.lax.top_k(logits, k)[0][:, -1:], -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest most likely tokens with at least the probability p together (arXiv 1904.09751)."""
    if p >= 1:
        return logits
    order = jnp.argsort(logits, 1, stable=True)  # ascending
    sorted_logits = jnp.take_along_axis(logits, order, 1)
    below = jnp.cumsum(jax.nn.softmax(sorted_logits, 1), 1) <= 1 - p  # the tail that is cut off
    below = below.at[:, -1].set(False)
    cut = jnp.zeros_like(below).at[jnp.arange(len(logits))[:, None], order].set(below)
    return jnp.where(cut, -jnp.inf, logits)
