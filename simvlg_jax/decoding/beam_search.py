"""Beam search with the rules of transformers' `generate` (early_stopping=False), which the published results follow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from simvlg_jax.decoding.frontier import Frontier, reorder
from simvlg_jax.decoding.settings import Decoding

NEVER = -1e9  # added to the scores of what must not be chosen, and the score of a place that is still empty


@struct.dataclass
class Beams:
    """K texts of each picture.

    Attributes:
      ids: (B, K, T) int32.
      scores: (B, K) float32: log probabilities of running texts; divided by length ** length_penalty of ended ones.
    """

    ids: jax.Array
    scores: jax.Array

    def take(self, places: jax.Array) -> "Beams":
        """The texts at places (B, K)."""
        ids = jnp.take_along_axis(self.ids, places[:, :, None], 1)
        return Beams(ids, jnp.take_along_axis(self.scores, places, 1))


@struct.dataclass
class State:
    """Attributes:
    count: number of chosen tokens.
    running: texts that go on, the best first.
    ended: texts that have ended, the best first.
    full: (B,) bool, whether all K places of `ended` are taken.
    open: (B,) bool, whether a running text may still become better than the worst that has ended.
    stuck: () bool, whether no text of any picture goes on.
    """

    count: jax.Array
    running: Beams
    ended: Beams
    full: jax.Array
    open: jax.Array
    stuck: jax.Array
    frontier: Frontier


def search(
    advance: Callable[[Frontier, jax.Array], Frontier],
    frontier: Frontier,
    process: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    settings: Decoding,
    eos_id: int | jax.Array,
    pad_id: int,
) -> jax.Array:
    """Searches the most likely texts of each picture.

    Args:
      advance: appends a token to each row of a frontier.
      frontier: of B * K rows, the K rows of a picture next to each other and equal.
      process: (log probabilities (B * K, V), ids (B * K, T), number of ids) -> changed log probabilities.

    Returns:
      (B, settings.num_captions, T) int32, the best first.
    """
    beams, length, penalty = settings.num_beams, settings.max_tokens, settings.length_penalty
    rows, vocabulary = frontier.logits.shape
    batch = rows // beams
    extra = int(settings.count_bos)  # tokens that transformers 4.31 counted besides

    def choose(state: State) -> State:
        count = state.count
        scores = jax.nn.log_softmax(state.frontier.logits.astype(jnp.float32))
        scores = process(scores, state.running.ids.reshape(rows, length), count)
        scores = (scores.reshape(batch, beams, -1) + state.running.scores[:, :, None]).reshape(batch, -1)
        # 2 K candidates: at least K of them do not end, since each running text has one end token.
        best, places = jax.lax.top_k(scores, 2 * beams)
        parents, tokens = places // vocabulary, (places % vocabulary).astype(jnp.int32)
        candidates = Beams(state.running.ids, state.running.scores).take(parents)
        candidates = Beams(candidates.ids.at[:, :, count].set(tokens), best)  # (B, 2 K, T)
        ends, last = tokens == eos_id, count + 1 >= length
        stops = ends | last

        running_scores, kept = jax.lax.top_k(best + NEVER * stops, beams)
        running = candidates.take(kept).replace(scores=running_scores)

        # Only the best K candidates may end.
        among_best = jnp.broadcast_to(jnp.arange(2 * beams) < beams, ends.shape)
        if settings.count_bos:  # at the last token, transformers 4.31 ends the best K candidates without an end token
            among_best = jnp.where(ends, among_best, jnp.cumsum(~ends, 1) <= beams)
        ending = stops & among_best
        tokens_of = count + 1 + extra * ~ends  # 4.31 did not count the end token, but the start token
        normalised = best / tokens_of.astype(jnp.float32) ** penalty
        normalised += NEVER * ~ending + NEVER * ~state.open[:, None]
        merged = Beams(
            jnp.concatenate([state.ended.ids, candidates.ids], 1),
            jnp.concatenate([state.ended.scores, normalised], 1),
        )
        ended_scores, taken = jax.lax.top_k(merged.scores, beams)
        ended = merged.take(taken)
        full = (ended_scores > NEVER / 2).all(1)

        hope = best[:, 0] if settings.count_bos else running.scores[:, 0]
        hope /= (count + 1 + extra).astype(jnp.float32) ** penalty
        still_open = state.open & (~full | (hope > ended.scores[:, -1]))
        frontier = reorder(state.frontier, jnp.take_along_axis(parents, kept, 1))
        return State(count + 1, running, ended, full, still_open, stops.all(), frontier)

    def body(state: State) -> State:
        tokens = jax.lax.dynamic_index_in_dim(state.running.ids, state.count - 1, 2, keepdims=False)
        return choose(state.replace(frontier=advance(state.frontier, tokens.reshape(rows))))

    empty = jnp.full((batch, beams, length), pad_id, jnp.int32)
    first_only = jnp.where(jnp.arange(beams) == 0, 0.0, NEVER)  # the rows are still equal
    state = State(
        jnp.int32(0),
        Beams(empty, jnp.broadcast_to(first_only, (batch, beams))),
        Beams(empty, jnp.full((batch, beams), NEVER)),
        jnp.zeros(batch, bool),
        jnp.ones(batch, bool),
        jnp.bool_(False),
        frontier,
    )
    state = jax.lax.while_loop(lambda state: state.open.any() & ~state.stuck, body, choose(state))
    return state.ended.ids[:, : settings.num_captions]
