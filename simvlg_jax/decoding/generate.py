"""Decoding with a frozen language model, from a visual prefix and a prompt: greedy, sampling, beam search."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from simvlg_jax.decoding import processors
from simvlg_jax.decoding.beam_search import search
from simvlg_jax.decoding.frontier import Frontier, advance, prefill, repeat
from simvlg_jax.decoding.settings import Decoding


def generate(
    llm: nn.Module,
    llm_params: dict,
    prefix_embeddings: jax.Array,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    settings: Decoding,
    *,
    eos_id: int | jax.Array,
    pad_id: int,
    bos_id: int = -1,
    key: jax.Array | None = None,
) -> jax.Array:
    """Decodes texts, with one pass over prefix and prompt. Call it under `jax.jit`.

    Args:
      llm: a language model, see `models.language_model`.
      llm_params: its parameters.
      prefix_embeddings: (B, P, D) the soft prompt; P may be 0.
      prompt_ids: (B, Q) int32, Q >= 1, starting with the start token.
      prompt_mask: (B, Q), 1 for real tokens; padding may be on either side.
      eos_id: the end token.
      pad_id: fills a row after its end token.
      bos_id: the start token that `settings.count_bos` counts.
      key: of the draws, if `settings.do_sample`.

    Returns:
      (B, N, T) int32 without the prompt: the N texts of each picture, the best first with beams, T the maximum length.
    """
    frontier = prefill(llm, llm_params, prefix_embeddings, prompt_ids, prompt_mask, settings.max_tokens)

    def process(logits: jax.Array, ids: jax.Array, step: jax.Array) -> jax.Array:
        if settings.count_bos:
            ids, count = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=bos_id), step + 1
        else:
            count = step
        logits = processors.penalise_repetition(logits, ids, count, settings.repetition_penalty)
        return processors.forbid(logits, eos_id, step < settings.min_tokens)

    step = partial(advance, llm, llm_params)
    if settings.num_beams > 1:
        return search(step, repeat(frontier, settings.num_beams), process, settings, eos_id, pad_id)
    batch = len(prompt_ids)
    ids = _one_by_one(step, repeat(frontier, settings.num_captions), process, settings, eos_id, pad_id, key)
    return ids.reshape(batch, settings.num_captions, -1)


def _one_by_one(step, frontier: Frontier, process, settings: Decoding, eos_id, pad_id, key) -> jax.Array:
    """Chooses or draws a token of every row at a time until all rows have ended: (B, T)."""

    def choose(frontier: Frontier, count: jax.Array, finished: jax.Array, ids: jax.Array) -> tuple:
        logits = process(frontier.logits, ids, count)
        if settings.do_sample:
            logits = processors.keep_top_k(logits / settings.temperature, settings.top_k)
            logits = processors.keep_top_p(logits, settings.top_p)
            logits += jax.random.gumbel(jax.random.fold_in(key, count), logits.shape)
        tokens = jnp.where(finished, pad_id, jnp.argmax(logits, -1)).astype(jnp.int32)
        return ids.at[:, count].set(tokens), finished | (tokens == eos_id)

    def unfinished(state: tuple) -> jax.Array:
        count, _, finished, _ = state
        return (count < settings.max_tokens) & ~jnp.all(finished)

    def body(state: tuple) -> tuple:
        count, ids, finished, frontier = state
        frontier = step(frontier, ids[:, count - 1])
        return count + 1, *choose(frontier, count, finished, ids), frontier

    rows = len(frontier.logits)
    ids = jnp.full((rows, settings.max_tokens), pad_id, jnp.int32)
    ids, finished = choose(frontier, jnp.int32(0), jnp.zeros(rows, bool), ids)
    return jax.lax.while_loop(unfinished, body, (jnp.int32(1), ids, finished, frontier))[1]
