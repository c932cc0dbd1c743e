"""How the frames of a clip become one sequence of visual tokens, between the vision encoder and the connector.

A way is a function and a line in WAYS. In each of them the class tokens of the frames become one, their mean, since
connectors know one class token. It stays the first token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from simvlg_jax.models.encoders.merge_frames import is_power_of_two, merge_frames
from simvlg_jax.models.encoders.vit import ViT


class Joined(NamedTuple):
    """The tokens of a clip as one sequence.

    Attributes:
      tokens: (B, M, D).
      shares: (B or 1, M, F) float32, the share of each frame in each token.
      source_map: (B, F * P) int32, the token that each patch became part of, frame by frame. None if token i is patch
        i, or if the tokens are no groups of patches.
    """

    tokens: jax.Array
    shares: jax.Array
    source_map: jax.Array | None = None


def _mean(patches: jax.Array, wanted: int) -> Joined:
    """The mean of the frames at each place (published, after temporal merging; without it, "simple")."""
    _, frames, places, _ = patches.shape
    return Joined(patches.mean(1), jnp.full((1, places, frames), 1 / frames))


def _joined(patches: jax.Array, wanted: int) -> Joined:
    """All patches, frame after frame."""
    _, frames, places, _ = patches.shape
    return Joined(jnp.concatenate(jnp.unstack(patches, axis=1), 1), jnp.repeat(jnp.eye(frames), places, 0)[None])


def _pooled(patches: jax.Array, wanted: int) -> Joined:
    """The mean over time of each place, then the mean over space of each frame (arXiv 2306.05424, section 3.1)."""
    in_time, frames = _mean(patches, wanted), patches.shape[1]
    tokens = jnp.concatenate([in_time.tokens, patches.mean(2)], 1)
    return Joined(tokens, jnp.concatenate([in_time.shares, jnp.eye(frames)[None]], 1))


def _merged(patches: jax.Array, wanted: int) -> Joined:
    """Similar patches of neighbouring frames merged, until `wanted` are left; see `merge_frames`."""
    _, frames, places, _ = patches.shape
    tokens, source_map = merge_frames(patches, wanted or places)
    made_of = jax.nn.one_hot(source_map, tokens.shape[1], dtype=jnp.float32)  # (B, F * P, M)
    counts = made_of.reshape(len(patches), frames, places, -1).sum(2).swapaxes(1, 2)  # (B, M, F)
    return Joined(tokens, counts / counts.sum(-1, keepdims=True), source_map)


class Way(NamedTuple):
    """One way to join frames.

    Attributes:
      join: (patches (B, F, P, D), number of tokens to leave) -> `Joined`.
      count: (F, P, number of tokens to leave) -> M.
      ordered: whether tokens are of single frames, so that learned positions can tell the order of the frames. Of a
        mean over all of them, learned weights can.
      grouped: whether each token is a group of patches of the clip, so that a source map can speak of them.
      grid: whether token i stands for place i of the picture.
    """

    join: Callable[[jax.Array, int], Joined]
    count: Callable[[int, int, int], int]
    ordered: bool
    grouped: bool
    grid: bool


WAYS = {  # values of config.video.frames_as
    "mean": Way(_mean, lambda frames, places, wanted: places, ordered=False, grouped=False, grid=True),
    "joined": Way(_joined, lambda frames, places, wanted: frames * places, ordered=True, grouped=True, grid=False),
    "pooled": Way(_pooled, lambda frames, places, wanted: places + frames, ordered=True, grouped=False, grid=False),
    "merged": Way(_merged, lambda frames, places, wanted: wanted or places, ordered=True, grouped=True, grid=False),
}


@dataclass(frozen=True)
class VisualTokens:
    """What a connector is built for.

    Attributes:
      num_tokens: how many tokens there are before merges inside the vision encoder, by which merges are planned.
      num_output_tokens: T, how many the connector gets.
      class_token: whether the first is a class token.
      grid: rows and columns of the patches that the tokens are of; 0 if they are not of one picture's patches.
      places: P, the patches of a frame, if the source map goes through the frames of a clip; else 0.
    """

    num_tokens: int
    num_output_tokens: int
    class_token: bool
    grid: int
    places: int = 0


@dataclass(frozen=True)
class Frames:
    """How frames are joined.

    Attributes:
      count: F, the frames of a clip; 0 for a model of pictures.
      way: a key of WAYS.
      wanted: number of patch tokens that "merged" leaves; 0: as many as a frame has.
    """

    count: int = 0
    way: str = "mean"
    wanted: int = 0

    @property
    def traced(self) -> bool:
        """Whether source maps can speak of patches."""
        return WAYS[self.way].grid or WAYS[self.way].grouped

    def seen(self, vit: ViT) -> VisualTokens:
        """Returns what a connector gets of a vision encoder.

        Raises:
          ValueError: frames cannot be merged to so many tokens. The message gives the fix.
        """
        way, places = WAYS[self.way], vit.num_tokens - vit.class_token
        grid = math.isqrt(places)
        if way.grid or not self.count:
            return VisualTokens(vit.num_tokens, vit.num_output_tokens, vit.class_token, grid)
        if way.join is _merged:
            if not is_power_of_two(self.count):
                raise ValueError(f"video.frames_as='merged' takes 2, 4, 8, ... frames, and data.frames={self.count}")
            if self.wanted and not places <= self.wanted <= self.count * places:
                raise ValueError(
                    f"video.tokens is {self.wanted}; it must be between {places}, the patches of a frame, and "
                    f"{self.count * places}, those of {self.count} frames"
                )
        count = vit.class_token + way.count(self.count, places, self.wanted)
        return VisualTokens(count, count, vit.class_token, 0, places if way.grouped else 0)

    def through(self, source_map: jax.Array, class_token: bool) -> jax.Array:
        """Returns a source map (B, N) as one of the patches of all frames: places of the mean are places of each."""
        if not self.count or not WAYS[self.way].grid:
            return source_map
        first = int(class_token)
        return jnp.concatenate([source_map[:, :first], jnp.tile(source_map[:, first:], (1, self.count))], 1)

    def join(self, tokens: jax.Array, class_token: bool) -> Joined:
        """Joins the frames of clips, with their class tokens.

        Args:
          tokens: (B, F, T, D) of the vision encoder. A class token is the first of T.
          class_token: whether there is one.
        """
        first, frames = int(class_token), tokens.shape[1]
        patches = WAYS[self.way].join(tokens[:, :, first:], self.wanted)
        source_map = patches.source_map
        if source_map is not None:
            source_map = jnp.pad(source_map + first, ((0, 0), (first, 0)))  # the class token stays in slot 0
        return Joined(
            jnp.concatenate([tokens[:, :, :first].mean(1), patches.tokens], 1),
            jnp.pad(patches.shares, ((0, 0), (first, 0), (0, 0)), constant_values=1 / frames),
            source_map,
        )


def weigh(tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighs the frames of each channel, so that a mean over them depends on their order.

    The weights of a channel are shifted to the mean 1, so the tokens of a clip that stands still keep their mean.

    Args:
      tokens: (B, F, T, D).
      weights: (F', D), learned, of F' >= F frames.
    """
    weights = weights[: tokens.shape[1]]
    return tokens * (1 + weights - weights.mean(0))[:, None].astype(tokens.dtype)


def add_positions(tokens: jax.Array, shares: jax.Array, positions: jax.Array) -> jax.Array:
    """Adds to each token the mean position of the frames that it is made of.

    Args:
      tokens: (B, M, D).
      shares: (B or 1, M, F) float32, of each frame in each token; see `Joined`.
      positions: (F', D), learned, of F' >= F frames.
    """
    added = jnp.einsum("BMF,FD->BMD", shares, positions[: shares.shape[-1]], precision="highest")
    return tokens + added.astype(tokens.dtype)
