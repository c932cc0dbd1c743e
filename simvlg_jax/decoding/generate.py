"""Autoregressive decoding with a frozen language model, from a visual prefix and a prompt.

`prefill` and `advance` run the model. A decoding method such as `greedy_decode` chooses the tokens between them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from simvlg_jax.models.llms.language_model import Cache
from simvlg_jax.utils.errors import UserError


@struct.dataclass
class Frontier:
    """The decoding state of a batch.

    Attributes:
      logits: (B, V) float32, of the next token.
      positions: (B,) int32, of the next token.
      cache: the language model's key-value cache of all tokens before it.
    """

    logits: jax.Array
    positions: jax.Array
    cache: Cache


def decoding_options(config: ConfigDict) -> dict[str, float]:
    """Returns the options of `greedy_decode` from a config: lengths in new tokens, and the repetition penalty."""
    return {name: config.evaluate[name] for name in ("max_new_tokens", "min_new_tokens", "repetition_penalty")}


def prefill(
    llm: nn.Module,
    llm_params: dict,
    prefix_embeddings: jax.Array,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    max_new_tokens: int,
) -> Frontier:
    """Runs [prefix, prompt] in one pass, with a cache for max_new_tokens more. Arguments: see `greedy_decode`."""
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


def greedy_decode(
    llm: nn.Module,
    llm_params: dict,
    prefix_embeddings: jax.Array,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    *,
    eos_id: int | jax.Array,
    pad_id: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
) -> jax.Array:
    """Chooses the most likely token at each step until every row has ended. Call it under `jax.jit`.

    Lengths count only new tokens, neither prefix nor prompt.

    Args:
      llm: a language model, see `models.language_model`.
      llm_params: its parameters.
      prefix_embeddings: (B, P, D) the soft prompt; P may be 0.
      prompt_ids: (B, Q) int32, Q >= 1, starting with the start token.
      prompt_mask: (B, Q), 1 for real tokens; padding may be on either side.
      eos_id: the end token.
      pad_id: fills a row after its end token.
      max_new_tokens: maximum number of tokens to generate, including the end token.
      min_new_tokens: number of tokens before the end token may be chosen.
      repetition_penalty: logits of tokens already generated are divided by it if positive, multiplied if negative
        (CTRL, arXiv 1909.05858). Prefix and prompt do not count.

    Returns:
      (B, max_new_tokens) int32, without the prompt.

    Raises:
      UserError (status 2): max_new_tokens is below 1.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1: got {max_new_tokens}", 2)
    batch = prompt_ids.shape[0]

    def choose(frontier: Frontier, step: jax.Array, finished: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = frontier.logits  # (B, V)
        if repetition_penalty != 1.0:
            generated = jnp.where(jnp.arange(max_new_tokens) < step, ids, logits.shape[1])  # V is dropped below
            seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], generated].set(True, mode="drop")
            penalised = jnp.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = jnp.where(seen, penalised, logits)
        too_early = step < min_new_tokens
        logits = logits.at[:, eos_id].add(jnp.where(too_early, -jnp.inf, 0.0))
        tokens = jnp.where(finished, pad_id, jnp.argmax(logits, -1)).astype(jnp.int32)
        return tokens, finished | (tokens == eos_id)

    def unfinished(state: tuple) -> jax.Array:
        step, _, finished, _ = state
        return (step < max_new_tokens) & ~jnp.all(finished)

    def body(state: tuple) -> tuple:
        step, ids, finished, frontier = state
        frontier = advance(llm, llm_params, frontier, ids[:, step - 1])
        tokens, finished = choose(frontier, step, finished, ids)
        return step + 1, ids.at[:, step].set(tokens), finished, frontier

    frontier = prefill(llm, llm_params, prefix_embeddings, prompt_ids, prompt_mask, max_new_tokens)
    ids = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    tokens, finished = choose(frontier, jnp.int32(0), jnp.zeros(batch, bool), ids)
    ids = ids.at[:, 0].set(tokens)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(1), ids, finished, frontier))[1]
