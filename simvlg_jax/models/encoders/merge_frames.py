"""Merging across time: similar patches of neighbouring frames become one token, without parameters.

It is ToMe's bipartite matching (arXiv 2210.09461, section 3) between frames instead of within a picture, since most of
a clip is what the frame before has shown. It comes after the vision encoder: its attention is within a frame, so tokens
of several frames cannot merge inside it. From here on, 16 frames cost what one does.
"""

import einops
import jax
import jax.numpy as jnp

from simvlg_jax.models import token_merging


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def group_sizes(frames: int, places: int, wanted: int) -> list[int]:
    """Returns how many tokens are left of each group of 2, 4, 8, ... neighbouring frames; the last is the whole clip.

    They grow evenly, by the same factor, from P of a frame to `wanted` of the clip. So each merge removes at most the
    tokens of the earlier half, and at least none.

    Args:
      frames: F, a power of two.
      places: P, tokens of a frame.
      wanted: at least P. More than F * P counts as F * P.
    """
    levels = frames.bit_length() - 1
    growth = min(wanted, frames * places) / places
    return [round(places * growth ** (level / levels)) for level in range(1, levels + 1)]


@jax.named_scope("merge_frames")
def merge_frames(patches: jax.Array, wanted: int) -> tuple[jax.Array, jax.Array]:
    """Merges neighbouring frames, then neighbouring pairs of frames, and so on.

    A token of the earlier half goes into the most similar one of the later half, wherever that is; the most similar
    pairs merge. A token is the mean of all its patches. Similar are tokens whose deviations from the mean of the clip
    have a high cosine, since some channels of a ViT are large in every token. Nothing is learned, and the decisions
    depend on the vision encoder alone.

    Args:
      patches: (B, F, P, D), F a power of two.
      wanted: number of tokens to leave, at least P.

    Returns:
      (tokens (B, M, D), M the smaller of `wanted` and F * P; the source map (B, F * P) int32, frame by frame). With
      M = P they are in the order of the last frame's patches.
    """
    frames, places = patches.shape[1:3]
    x = einops.rearrange(patches, "B F P D -> (B F) P D")
    centre = jnp.repeat(patches.astype(jnp.float32).mean((1, 2)), frames, 0)[:, None]  # (B F, 1, D)
    source_map = token_merging.unmerged(x)  # of each group, (groups, its patches)
    for left in group_sizes(frames, places, wanted):
        # Tokens of the two halves alternate, since `match` lets even places seek among odd ones.
        x = einops.rearrange(x, "(G half) S D -> G (S half) D", half=2)
        halves = einops.rearrange(source_map, "(G half) N -> G half N", half=2)
        source_map = einops.rearrange(2 * halves + jnp.arange(2)[:, None], "G half N -> G (half N)")
        centre = centre[::2]
        if left < x.shape[1]:
            slots = token_merging.match(x - centre, x.shape[1] - left, class_token=False)
            x = token_merging.merge(x, slots, left, token_merging.slot_sizes(source_map, x.shape[1]))
            source_map = token_merging.compose(source_map, slots)
    return x, source_map.astype(jnp.int32)
