"""Several examples' tokens in one row without padding: [prefix 1 ... prefix b; text 1 ... text b].

Linear maps, norms and losses work on packed tokens. Attention alone needs each example in a row of its own, so its
queries, keys and values are moved there and back. Moving is a gather in both directions and in both passes: the
gradient of one is the other, since every token has one place.

G packs of b examples each: P prefix tokens for every example, C text tokens for every pack, T = b P + C tokens; in rows
of their own the examples have S = P + L places, L being the longest text.
"""

import jax
import jax.numpy as jnp
from flax import struct

from simvlg_jax.models.attention import attend


@struct.dataclass
class Packing:
    """Where the tokens of packs are.

    Attributes:
      slots: (G, b S) int32, which packed token is at each place of the examples' own rows; T where there is none.
      places: (G, T) int32, at which of the b S places each packed token is; b S for padding.
      positions: (G, T) int32, its position in its example.
      before: (G, C) int32, the packed token before each text token; 0 if there is none.
      visible: (G b, S, S) bool, which places of its row each place sees: tokens that are not later than itself.
    """

    slots: jax.Array
    places: jax.Array
    positions: jax.Array
    before: jax.Array
    visible: jax.Array

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Returns the attention of packed queries (G, T, N, H) to their examples' keys and values (G, T, K, H)."""
        return self.pack(attend(*map(self.unpack, (query, key, value)), mask=self.visible))

    def unpack(self, x: jax.Array) -> jax.Array:
        """Returns packed x (G, T, ...) in rows of the examples: (G b, S, ...), any token where there is none."""
        return _move(x, self.slots, self.places).reshape(*self.visible.shape[:2], *x.shape[2:])

    def pack(self, x: jax.Array) -> jax.Array:
        """Returns x (G b, S, ...) packed: (G, T, ...), anything for padding."""
        rows = x.reshape(*self.slots.shape, *x.shape[2:])
        return _move(rows, self.places, self.slots)

    def before_text(self, x: jax.Array) -> jax.Array:
        """Returns x (G, T, D) at the tokens before the text tokens: (G, C, D)."""
        return jnp.take_along_axis(x, self.before[..., None], 1)


def make_packing(lengths: jax.Array, tokens: int, prefix: int, longest: int, start_first: bool) -> Packing:
    """Returns the packing of texts that follow each other.

    Args:
      lengths: (G, b) int32, of the texts in tokens, at most `longest`; their sum over b is at most `tokens`.
      tokens: C, room for text in each pack.
      prefix: P, prefix tokens of each example.
      longest: L, tokens of the longest text.
      start_first: whether a text's first token comes before the prefix.
    """
    packs, examples = lengths.shape
    row_size, size = prefix + longest, examples * prefix + tokens
    ends = jnp.cumsum(lengths, 1)  # (G, b)
    starts = ends - lengths
    # The packed token at each place of an example's row.
    place = jnp.arange(row_size)
    nth = place - prefix  # of the text; negative for the prefix
    nth_prefix = place
    if start_first:
        nth = jnp.where(place == 0, 0, jnp.where(place <= prefix, -1, nth))
        nth_prefix = place - 1
    of_prefix = jnp.arange(examples)[:, None] * prefix + nth_prefix  # (b, S)
    of_text = examples * prefix + starts[..., None] + nth  # (G, b, S)
    filled = (nth < 0) | (nth < lengths[..., None])  # (G, b, S)
    slots = jnp.where(filled, jnp.where(nth < 0, of_prefix, of_text), size)
    # The place of each packed token.
    text = jnp.arange(tokens)
    example = jnp.minimum(jnp.sum(text[:, None] >= ends[:, None], -1), examples - 1)  # (G, C)
    nth_text = text - jnp.take_along_axis(starts, example, 1)
    position = jnp.where(start_first & (nth_text == 0), 0, prefix + nth_text)
    real = text < ends[:, -1:]
    places_of_text = jnp.where(real, example * row_size + position, examples * row_size)
    first = jnp.arange(prefix) + start_first
    places_of_prefix = (jnp.arange(examples)[:, None] * row_size + first).reshape(-1)
    everywhere = jnp.broadcast_to(places_of_prefix, (packs, examples * prefix))
    places = jnp.concatenate([everywhere, places_of_text], 1)  # (G, T)
    slots = slots.reshape(packs, -1)
    before = jnp.take_along_axis(slots, jnp.where(real & (position > 0), places_of_text - 1, 0), 1)
    return Packing(
        slots=slots,
        places=places,
        positions=jnp.where(places < examples * row_size, places % row_size, 0),
        before=before,
        visible=(place <= place[:, None]) & filled.reshape(-1, 1, row_size),
    )


@jax.custom_vjp
def _move(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns x (G, M, ...) at index (G, N): (G, N, ...), any row where the index is M. `inverse` (G, M) undoes it."""
    del inverse
    return jnp.take_along_axis(x, _wide(index, x), 1, mode="clip")


def _move_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _move(x, index, inverse), inverse


def _move_backward(inverse: jax.Array, slopes: jax.Array) -> tuple[jax.Array, None, None]:
    # What was moved nowhere has no gradient.
    return jnp.take_along_axis(slopes, _wide(inverse, slopes), 1, mode="fill", fill_value=0), None, None


def _wide(index: jax.Array, x: jax.Array) -> jax.Array:
    return index.reshape(*index.shape, *[1] * (x.ndim - 2))


_move.defvjp(_move_forward, _move_backward)
