"""The loss of a language model's predictions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from simvlg_jax.models import layers

Logits = Callable[[jax.Array], jax.Array]
MOST_LOGITS = 2**24  # of a device at a time: 64 MiB in float32


@jax.named_scope("head_and_loss")
def token_cross_entropy(
    hidden: jax.Array,
    logits: Logits,
    targets: jax.Array,
    *,
    trains_head: bool = True,
    smoothing: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's cross-entropy summed over its targets, and how many targets it has.

    Args:
      hidden: (B, S, D), the language model's states.
      logits: maps states (B, S, D) to logits (B, S, V) float32.
      targets: (B, S) int32, the token that each state should predict; negative where no loss is taken.
      trains_head, smoothing: see `token_losses`.
      weights: (B, S) float32, what each target's loss is multiplied by; None: 1. No gradient flows to them.

    Returns:
      ((B,) nats, (B,) counts), float32.
    """
    losses = token_losses(hidden, logits, targets, trains_head=trains_head, smoothing=smoothing)
    if weights is not None:
        losses *= jax.lax.stop_gradient(weights)
    return jnp.sum(losses, 1), jnp.sum(targets >= 0, 1, dtype=jnp.float32)


def token_losses(
    hidden: jax.Array, logits: Logits, targets: jax.Array, *, trains_head: bool = True, smoothing: float = 0.0
) -> jax.Array:
    """Returns the nats (B, S) of each target, float32, 0 where no loss is taken; arguments as `token_cross_entropy`.

    Logits exist for a chunk of S at a time, so that memory does not grow with S and V.

    Args:
      trains_head: whether the parameters inside `logits` need a gradient. If not, the gradient for the states is
        computed in the forward pass, so that no logits are kept or computed twice: a target's loss depends on its own
        state alone, and the backward pass only has to scale that gradient.
      smoothing: share of each target that is spread evenly over the vocabulary.
    """
    size = _chunk(hidden, logits, targets.shape)
    if size >= targets.shape[1]:
        return _losses(hidden, logits, targets, smoothing)
    lost = -targets.shape[1] % size
    states = _chunks(jnp.pad(hidden, ((0, 0), (0, lost), (0, 0))), size)
    wanted = _chunks(jnp.pad(targets, ((0, 0), (0, lost)), constant_values=-1), size)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _losses(layers.split_batch(chunk[0]), logits, chunk[1], smoothing)

    if trains_head:
        losses = jax.lax.map(jax.checkpoint(of_chunk), (states, wanted))
    else:
        losses = _frozen_head(of_chunk)(states, wanted)
    return losses.swapaxes(0, 1).reshape(len(targets), -1)[:, : targets.shape[1]]


def prompt_distances(prefix: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the mean squared difference (B,) float32 of soft prompts (B, P, E) and their references (B, Q, E).

    They are compared one by one in their order (BLIText, arXiv 2307.07063). If P and Q differ, only the first are. No
    gradient flows to the references.
    """
    count = min(prefix.shape[1], reference.shape[1])
    apart = prefix[:, :count].astype(jnp.float32) - jax.lax.stop_gradient(reference[:, :count]).astype(jnp.float32)
    return jnp.mean(jnp.square(apart), (1, 2))


def _losses(hidden: jax.Array, logits: Logits, targets: jax.Array, smoothing: float) -> jax.Array:
    scores, wanted = logits(hidden), jnp.maximum(targets, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, wanted)
    if smoothing:
        losses += smoothing * (jnp.take_along_axis(scores, wanted[..., None], -1)[..., 0] - scores.mean(-1))
    return jnp.where(targets >= 0, losses, 0.0)


def _frozen_head(of_chunk: Callable) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the map of `of_chunk` over chunks (K, B, S, D) and (K, B, S), with its gradient for the states."""

    @jax.custom_vjp
    def run(states: jax.Array, targets: jax.Array) -> jax.Array:
        return jax.lax.map(of_chunk, (states, targets))

    def forward(states: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_one(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            losses, pull_back = jax.vjp(lambda x: of_chunk((x, chunk[1])), chunk[0])
            return losses, pull_back(jnp.ones_like(losses))[0]

        return jax.lax.map(of_one, (states, targets))

    def backward(slopes: jax.Array, given: jax.Array) -> tuple[jax.Array, None]:
        return (slopes * given[..., None]).astype(slopes.dtype), None

    run.defvjp(forward, backward)
    return run


def _chunk(hidden: jax.Array, logits: Logits, shape: tuple[int, int]) -> int:
    """Returns the number of tokens of each row whose logits a device holds at a time."""
    vocab = jax.eval_shape(logits, hidden).shape[-1]
    mesh = jax.sharding.get_abstract_mesh()
    rows = -(-shape[0] // (1 if mesh.empty else mesh.size // mesh.shape.get("tensor", 1)))
    return max(1, MOST_LOGITS // (rows * vocab))


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """(B, K * size, ...) -> (K, B, size, ...)."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
