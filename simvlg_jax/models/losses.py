"""The loss of a language model's predictions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


@jax.named_scope("head_and_loss")
def token_cross_entropy(
    hidden: jax.Array, logits: Callable[[jax.Array], jax.Array], targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each example's cross-entropy summed over its targets, and how many targets it has.

    Callers pass states instead of logits, so that the logits of all tokens need not exist at the same time.

    Args:
      hidden: (B, S, D), the language model's states.
      logits: maps states (B, S, D) to logits (B, S, V) float32.
      targets: (B, S) int32, the token that each state should predict; negative where no loss is taken.

    Returns:
      ((B,) nats, (B,) counts), float32.
    """
    return jnp.sum(token_losses(hidden, logits, targets), 1), jnp.sum(targets >= 0, 1, dtype=jnp.float32)


def token_losses(hidden: jax.Array, logits: Callable[[jax.Array], jax.Array], targets: jax.Array) -> jax.Array:
    """Returns the nats (B, S) of each target, float32, 0 where no loss is taken; arguments as `token_cross_entropy`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(hidden), jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, losses, 0.0)
