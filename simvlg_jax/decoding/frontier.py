"""Runs a language model with a key-value cache, between the choices of a decoding method."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from simvlg_jax.models.llms.language_model import Cache


@struct.dataclass
class Frontier:
    """The state of the model after some tokens.

    Attributes:
      logits: (B, V) float32, of the next token.
      positions: (B,) int32, of the next token.
      cache: the language model's key-value cache of all tokens before it.
    """

    logits: jax.Array
    positions: jax.Array
    cache: Cache


def prefill(
    llm: nn.Module,
    llm_params: dict,
    prefix_embeddings: jax.Array,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    max_new_tokens: int,
) -> Frontier:
    """Runs [prefix, prompt] in one pass, with a cache for max_new_tokens more. Arguments: see `generate`."""
    variables = {"params": llm_params}
    batch, prefix_length, _ = prefix_embeddings.shape
    prompt = llm.apply(variables, prompt_ids, method="embed")
    embeddings = jnp.concatenate([prefix_embeddings.astype(prompt.dtype), prompt], 1)  # (B, P + Q, D)
    seen = jnp.ones((batch, prefix_length), jnp.int32)
    mask = jnp.concatenate([seen, prompt_mask.astype(jnp.int32)], 1)
    length = mask.shape[1]
    # A masked token has the position of the last real token before it. No query attends to it.
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    cache = llm.init_cache(batch, length + max_new_tokens)
    out = llm.apply(variables, embeddings, mask, positions, cache)
    last = jnp.max(jnp.where(mask > 0, jnp.arange(length), 0), 1)  # (B,), the last real token
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], 1)  # (B, 1, D)
    logits = llm.apply(variables, hidden, method="logits")[:, 0]
    return Frontier(logits, mask.sum(1), out.cache)


def advance(llm: nn.Module, llm_params: dict, frontier: Frontier, tokens: jax.Array) -> Frontier:
    """Appends one chosen token (B,) to each row."""
    variables = {"params": llm_params}
    embeddings = llm.apply(variables, tokens[:, None], method="embed")  # (B, 1, D)
    mask = jnp.ones((tokens.shape[0], 1), jnp.int32)
    out = llm.apply(variables, embeddings, mask, frontier.positions[:, None], frontier.cache)
    logits = llm.apply(variables, out.hidden, method="logits")[:, 0]
    return Frontier(logits, frontier.positions + 1, out.cache)


def repeat(frontier: Frontier, times: int) -> Frontier:
    """Each row `times` times, next to each other: B rows -> B * times."""
    if times == 1:
        return frontier
    cache = frontier.cache
    cache = cache | {name: jnp.repeat(cache[name], times, axis=1) for name in ("key", "value")}
    cache["mask"] = jnp.repeat(cache["mask"], times, axis=0)
    return Frontier(jnp.repeat(frontier.logits, times, 0), jnp.repeat(frontier.positions, times, 0), cache)


def reorder(frontier: Frontier, rows: jax.Array) -> Frontier:
    """Replaces each picture's rows by those of its rows that `rows` (B, K) numbers from 0 to K - 1.

    Only the cache is moved: the logits are computed anew before they are read, and a picture's rows have the same
    positions and mask.
    """
    batch, beams = rows.shape

    def take(stack: jax.Array) -> jax.Array:  # (L, B * K, T, ...)
        split = stack.reshape(stack.shape[0], batch, beams, *stack.shape[2:])
        index = rows.reshape(1, batch, beams, *[1] * (stack.ndim - 2))
        return jnp.take_along_axis(split, index, 2).reshape(stack.shape)

    return frontier.replace(cache=frontier.cache | {name: take(frontier.cache[name]) for name in ("key", "value")})
