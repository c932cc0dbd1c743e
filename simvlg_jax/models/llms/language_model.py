"""What the frozen language models share: their output, their key-value cache, and which keys a query sees.

A language model here is a Linen module fed with embeddings. It has `width`, `embed(ids)`,
`__call__(embeddings, mask, positions, cache=None) -> LlmOutput`, `logits(hidden)` and `init_cache(batch, max_length)`;
see `llama.Llama` and `opt.Opt`. Its blocks take `((x, cached key, cached value), layer number, visible, cache index,
*what all blocks share)`.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import layers

# key, value (L, B, T, K, H); mask (B, T) int32, 1 for slots that hold a real token; index () int32, the next free slot.
Cache = dict[str, jax.Array]


@struct.dataclass
class LlmOutput:
    """hidden: (B, S, D) after the final norm; cache: the one given with S tokens more in it, None if none was given."""

    hidden: jax.Array
    cache: Cache | None = None


def make_blocks(block: type[nn.Module], fields: Sequence, depth: int, scan: bool, remat: bool, shared: int):
    """`depth` blocks for a `setup`: one scanned block with stacked parameters, or a list of blocks.

    Args:
      fields: the block's own.
      shared: how many more arguments its call takes that are the same for all blocks.
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
    blocks: Callable | Sequence[Callable], depth: int, x: jax.Array, mask: jax.Array, cache: Cache | None, *shared
) -> tuple[jax.Array, Cache | None]:
    """x (B, S, D) with mask (B, S) through `make_blocks`'s blocks, and the cache with its keys and values in it."""
    x = layers.split_batch(x)
    visible, key_mask = visible_keys(mask, cache)
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
    """Room for `max_length` tokens in each row; the caller writes no more than that."""
    shape = (depth, batch, max_length, num_kv_heads, head_dim)
    return {
        "key": jnp.zeros(shape, dtype),
        "value": jnp.zeros(shape, dtype),
        "mask": jnp.zeros((batch, max_length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def visible_keys(mask: jax.Array, cache: Cache | None) -> tuple[jax.Array, jax.Array]:
    """Which keys each of S new queries sees: real ones, none later than itself.

    Args:
      mask: (B, S), 1 for real tokens.
      cache: where the new keys go, or None to attend to the S tokens alone (then T = S).

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


def write_layer(stack: jax.Array, new: jax.Array, layer: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts `new` (B, S, K, H) into `stack` (L, B, T, K, H) from slot `index` on.

    The whole stack travels through the scan over layers, so that XLA updates it in place and copies no layer.

    Returns:
      (the new stack, its layer (B, T, K, H)).
    """
    stack = jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), (layer, 0, index, 0, 0))
    return stack, jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
