"""What all language models share: their output, their key-value cache, and which keys a query sees.

A language model is a Linen module that takes embeddings instead of ids. It has `width`, `embed(ids)`,
`__call__(embeddings, mask, positions, cache=None) -> LlmOutput`, `logits(hidden)` and
`init_cache(batch, max_length)`; see `llama.Llama` and `opt.Opt`. A block takes `((x, cached key, cached value), layer
number, visible, cache index, *shared)`; the shared arguments are the same for all blocks. `visible` says which keys a
query sees: bool (B, S, T), or the `Packing` of packed x.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.attention import attend
from simvlg_jax.models.packing import Packing

# key, value (L, B, T, K, H); mask (B, T) int32, 1 for slots that hold a real token; index () int32, the next free slot.
Cache = dict[str, jax.Array]


@struct.dataclass
class LlmOutput:
    """What a language model returns.

    Attributes:
      hidden: (B, S, D), after the last norm.
      cache: the given cache with the S tokens added; None if none was given.
    """

    hidden: jax.Array
    cache: Cache | None = None


def make_blocks(block: type[nn.Module], fields: Sequence, depth: int, scan: bool, remat: bool, shared: int):
    """Returns the blocks of a language model, for its `setup`.

    Args:
      fields: the fields of a block.
      scan: whether to return one scanned block with stacked parameters; otherwise a list of `depth` blocks.
      remat: whether the backward pass recomputes each block's activations.
      shared: the number of arguments that are the same for all blocks.
    """
    block = nn.remat(block, prevent_cse=not scan) if remat else block
    if not scan:
        return [block(*fields) for _ in range(depth)]
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *[nn.broadcast] * (2 + shared)),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(*fields)


def run_blocks(
    blocks: Callable | Sequence[Callable],
    depth: int,
    x: jax.Array,
    mask: jax.Array | Packing,
    cache: Cache | None,
    *shared,
) -> tuple[jax.Array, Cache | None]:
    """Runs x (B, S, D) with mask (B, S) through the blocks; returns it and the cache with the new keys and values.

    Packed x (G, T, D) has its `Packing` for a mask, and no cache.
    """
    x = layers.split_batch(x)
    visible, key_mask = (mask, None) if isinstance(mask, Packing) else visible_keys(mask, cache)
    index = None if cache is None else cache["index"]
    carry = (x, None, None) if cache is None else (x, cache["key"], cache["value"])
    if isinstance(blocks, Sequence):
        for layer, block in enumerate(blocks):
            carry, _ = block(carry, layer, visible, index, *shared)
    else:
        carry, _ = blocks(carry, jnp.arange(depth), visible, index, *shared)
    x, key, value = carry
    if cache is not None:
        cache = {"key": key, "value": value, "mask": key_mask, "index": index + mask.shape[1]}
    return x, cache


def empty_cache(
    depth: int, batch: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Returns a cache for `max_length` tokens in each row. The caller must not write more."""
    shape = (depth, batch, max_length, num_kv_heads, head_dim)
    return {
        "key": jnp.zeros(shape, dtype),
        "value": jnp.zeros(shape, dtype),
        "mask": jnp.zeros((batch, max_length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def visible_keys(mask: jax.Array, cache: Cache | None) -> tuple[jax.Array, jax.Array]:
    """Returns which keys each of S new queries sees: real ones that are not later than itself.

    Args:
      mask: (B, S), 1 for real tokens.
      cache: where the new keys are written; None if there are only the S tokens (then T = S).

    Returns:
      (visible (B, S, T) bool, the mask of all keys (B, T) int32).
    """
    num_queries, first = mask.shape[1], 0
    mask = mask.astype(jnp.int32)
    if cache is not None:
        first = cache["index"]
        mask = jax.lax.dynamic_update_slice(cache["mask"], mask, (0, first))
    earlier = jnp.arange(mask.shape[1]) <= first + jnp.arange(num_queries)[:, None]  # (S, T)
    return earlier & (mask > 0)[:, None, :], mask


def attend_visible(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | Packing) -> jax.Array:
    """Returns the attention of queries (B, S, N, H) to those keys and values (B, T, K, H) that they see."""
    if isinstance(visible, Packing):
        return visible.attend(query, key, value)
    return attend(query, key, value, mask=visible)


def write_layer(stack: jax.Array, new: jax.Array, layer: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts `new` (B, S, K, H) into `stack` (L, B, T, K, H) from slot `index` on.

    The scan over layers carries the whole stack, so that XLA updates it in place and copies no layer.

    Returns:
      (the new stack, its layer (B, T, K, H)).
    """
    stack = jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), (layer, 0, index, 0, 0))
    return stack, jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
