"""Bipartite soft matching and merging of tokens, as pure functions on arrays.

Source: ToMe (arXiv 2210.09461, section 3), for vision encoders; and as SimVLG uses it in its connector (arXiv
2310.03291, section 3.2): a class token is never merged, no proportional attention, plain mean of the merged tokens.
Written from the description of the method. A merge is one integer per input token: its slot, the place of the output
token that it becomes part of. The slots are all that is needed to merge tokens, to trace them back to patches and to
count token sizes.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def merge_schedule(num_layers: int, r: int | Sequence[int] | Mapping[str, float]) -> tuple[int, ...]:
    """Returns how many tokens each layer removes.

    Args:
      num_layers: number of layers L.
      r: one number for every layer (published: 19); or a list, padded with zeros to L; or `{"r": r, "inflect": i}`, a
        linear ramp that removes as many in total as r in every layer. i is between -1 (from 2 r down to 0) and 1 (from
        0 up to 2 r).

    Returns:
      L non-negative ints. Each layer caps its number at what it can remove, see `mergeable`.

    Raises:
      ValueError: a list longer than L, or a negative entry.
    """
    if isinstance(r, Mapping):
        first = int(r["r"] * (1.0 - r["inflect"]))
        step = (2 * r["r"] - 2 * first) / (num_layers - 1) if num_layers > 1 else 0.0
        schedule = [int(first + i * step) for i in range(num_layers)]
    elif isinstance(r, Sequence):
        schedule = [*r, *[0] * (num_layers - len(r))]
    else:
        schedule = [r] * num_layers
    if len(schedule) != num_layers or min(schedule, default=0) < 0:
        raise ValueError(f"merge schedule {r!r} does not fit {num_layers} layers of non-negative counts")
    return tuple(schedule)


def schedule_down_to(num_layers: int, num_tokens: int, wanted: int, class_token: bool = True) -> tuple[int, ...]:
    """Returns how many tokens each layer removes so that `wanted` of `num_tokens` are left.

    All layers remove the same number if possible. Of a remainder, the early layers remove one more each. A layer that
    cannot remove as many (half of its tokens at most) removes what it can.

    Raises:
      ValueError: `wanted` is less than one, more than `num_tokens`, or too few for so many layers.
    """
    for r in range(num_tokens):
        counts = token_counts(num_tokens, [r] * num_layers, class_token)
        if 0 < counts[-1] <= wanted <= num_tokens:
            schedule = [before - after for before, after in itertools.pairwise(counts)]
            full = [layer for layer, removed in enumerate(schedule) if removed == r]
            surplus = wanted - counts[-1]
            for layer in full[len(full) - surplus :]:
                schedule[layer] -= 1
            return tuple(schedule)
    nearest = token_counts(num_tokens, [num_tokens] * num_layers, class_token)[-1]
    raise ValueError(f"{num_tokens} tokens cannot become {wanted} in {num_layers} layers; {nearest} is the least")


def schedule_of(keys: Mapping, name: str, num_layers: int, num_tokens: int, class_token: bool) -> tuple[int, ...]:
    """Returns how many tokens each layer removes by a config's `connector` or `vit`.

    Args:
      keys: r (with inflect, if there is such a key) and tokens, of which one may be above 0; else merges count.
      name: of the keys, for messages.

    Raises:
      ValueError: the schedule does not fit. The message says which key to change.
    """
    if keys.r and keys.tokens:
        raise ValueError(f"{name}.r and {name}.tokens both set the merges: set one of them to 0")
    inflect = keys.get("inflect", 0.0)
    ramp = {"r": keys.r, "inflect": inflect} if inflect else keys.r
    try:
        if keys.tokens:
            return schedule_down_to(num_layers, num_tokens, keys.tokens, class_token)
        return merge_schedule(num_layers, ramp if keys.r else tuple(keys.get("merges", ())))
    except ValueError as error:
        raise ValueError(f"{name}.{'tokens' if keys.tokens else 'merges'}: {error}") from error


def mergeable(num_tokens: int, r: int, class_token: bool = True) -> int:
    """Returns r, or what one bipartite step can remove if that is less: half of the tokens without the class token."""
    return max(0, min(r, (num_tokens - class_token) // 2))


def token_counts(num_tokens: int, schedule: Sequence[int], class_token: bool = True) -> list[int]:
    """Returns the token counts before the first layer and after each one: 257, 238, ..., 29 as published."""
    counts = [num_tokens]
    for r in schedule:
        counts.append(counts[-1] - mergeable(counts[-1], r, class_token))
    return counts


def match(metric: jax.Array, r: int, class_token: bool = True) -> jax.Array:
    """Decides which tokens merge. Gradients do not pass.

    Every token with an even index (A) finds the most similar token with an odd index (B), by cosine. The r' =
    `mergeable(T, r, class_token)` most similar pairs merge. The output tokens are the unmerged A, then all B, both in
    their old order; with r' = 0 nothing moves. Ties go to the lower index.

    Cosines are compared by the distances of unit vectors, |a - b|^2 = 2 - 2 cos(a, b), which tell similar tokens apart
    where their cosines round to the same number.

    Args:
      metric: (B, T, C) features to compare, any float dtype; similarities are computed in float32.
      r: how many tokens to remove.
      class_token: whether the first token is a class token. A class token stays alone and first.

    Returns:
      The slot of each token: (B, T) int32 in [0, T - r').
    """
    num_tokens = metric.shape[1]
    r = mergeable(num_tokens, r, class_token)
    if r == 0:
        return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), metric.shape[:2])
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    norm = jnp.linalg.norm(metric, axis=-1, keepdims=True)
    metric = metric / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    # The order of cosines. Cosines of similar tokens all round to numbers close to 1, and rounding would then decide.
    similarity = -jnp.square(metric[:, ::2, None] - metric[:, None, 1::2]).sum(-1)  # (B, ceil(T/2), floor(T/2))
    if class_token:
        similarity = similarity.at[:, 0].set(-jnp.inf)
    best = similarity.max(-1)  # (B, A)
    partner = similarity.argmax(-1)  # (B, A)

    # Counting gives the ranks without a sort in the compiled program, and ties keep their order.
    ahead = best[:, None, :] > best[:, :, None]  # (B, A, A): is the last-axis token ahead?
    index = jnp.arange(best.shape[1])
    tied_before = (best[:, None, :] == best[:, :, None]) & (index[None, :] < index[:, None])
    is_source = jnp.sum(ahead | tied_before, -1) < r  # (B, A)

    num_unmerged = best.shape[1] - r
    a_slots = jnp.where(is_source, num_unmerged + partner, jnp.cumsum(~is_source, -1) - 1)
    b_slots = jnp.broadcast_to(num_unmerged + jnp.arange(num_tokens // 2), (metric.shape[0], num_tokens // 2))
    slots = jnp.zeros(metric.shape[:2], jnp.int32)
    return slots.at[:, ::2].set(a_slots.astype(jnp.int32)).at[:, 1::2].set(b_slots.astype(jnp.int32))


def merge(tokens: jax.Array, slots: jax.Array, num_slots: int, sizes: jax.Array | None = None) -> jax.Array:
    """Returns the mean of the tokens in each slot: (B, num_slots, D), the dtype of `tokens`.

    Args:
      tokens: (B, T, D).
      slots: (B, T) int32 from `match`; every slot is used at least once.
      num_slots: T - r'.
      sizes: (B, T), the weight of each token in its mean (ToMe: how many patches it is made of); None (published): 1.
    """
    weights = jax.nn.one_hot(slots, num_slots, dtype=jnp.float32 if sizes is not None else tokens.dtype)  # (B, T, S)
    if sizes is not None:
        weights = weights * sizes[..., None]
    # "highest", since the default matmul precision can be lower than that of the tokens, and the sum would lose bits.
    total = jnp.einsum("BTS,BTD->BSD", weights, tokens, precision="highest", preferred_element_type=jnp.float32)
    return (total / jnp.sum(weights, 1, dtype=jnp.float32)[..., None]).astype(tokens.dtype)


@jax.named_scope("merge")
def merge_by_keys(
    tokens: jax.Array, key: jax.Array, r: int, class_token: bool = True, sizes: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Merges the r tokens that are most similar by the keys of an attention, averaged over its heads.

    Args:
      tokens: (B, T, D).
      key: (B, T, N, H).
      r, class_token: as for `match`.
      sizes: as for `merge`.

    Returns:
      (the tokens (B, T - r', D); the slots (B, T) of `match`, None if r' is 0).
    """
    removed = mergeable(tokens.shape[1], r, class_token)
    if not removed:
        return tokens, None
    slots = match(key.mean(2), removed, class_token)
    return merge(tokens, slots, tokens.shape[1] - removed, sizes), slots


def unmerged(tokens: jax.Array) -> jax.Array:
    """Returns the source map (B, T) int32 of tokens (B, T, D) before any merge."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape[:2])


def slot_sizes(source_map: jax.Array, num_slots: int) -> jax.Array:
    """Returns how many input tokens are in each slot of `source_map` (B, N): (B, num_slots) float32."""
    return jax.nn.one_hot(source_map, num_slots, dtype=jnp.float32).sum(1)


def compose(source_map: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns a source map (B, N) int32 that includes one more merge.

    Args:
      source_map: (B, N) int32, the token that each input token became part of before this merge.
      slots: (B, T) int32, the slot of each of these tokens.
    """
    return jnp.take_along_axis(slots, source_map, axis=1)
