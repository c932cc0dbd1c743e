"""The MLP of LLaVA-1.5 (arXiv 2310.03744, section 3.2) on every patch, or on means of neighbouring patches."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from simvlg_jax.models import layers, token_merging
from simvlg_jax.models.bert import size_of
from simvlg_jax.models.connectors.connector import ConnectorOutput
from simvlg_jax.models.encoders.frames import VisualTokens


class MlpConnector(nn.Module):
    """A linear map and GELU on every patch. The model's `llm_proj` is the second linear map of the MLP.

    The class token is left out, as in LLaVA. With `cells`, the grid of patches is first averaged within so many
    rectangles. A patch that the vision encoder has merged counts as the token that it became part of.

    Attributes:
      width: between the two linear maps.
      dropped: number of first tokens that are left out: 1 if there is a class token.
      cells: rows and columns of rectangles; () to keep every token.
    """

    width: int
    dropped: int = 0
    cells: tuple[int, ...] = ()
    dtype: DTypeLike = jnp.float32

    merges, class_token = (), False  # no layer merges, and no class token comes out

    @nn.compact
    def __call__(self, visual: jax.Array, source_map: jax.Array | None = None) -> ConnectorOutput:
        """Returns the output, see `Connector`: as many tokens as cells, else all but the class token."""
        places = (token_merging.unmerged(visual) if source_map is None else source_map)[:, self.dropped :]
        if self.cells:
            patches = visual[:, self.dropped :]
            if source_map is not None:
                patches = jnp.take_along_axis(visual, places[..., None], 1)  # (B, patches, C)
            weights, owners = pooling(math.isqrt(places.shape[1]), *self.cells)
            exact = dict(precision="highest", preferred_element_type=jnp.float32)
            x = jnp.einsum("PN,BNC->BPC", weights, patches, **exact).astype(visual.dtype)
            places = jnp.broadcast_to(owners, places.shape)
        else:
            x, places = visual[:, self.dropped :], places - self.dropped
        axes = ("mlp", "embed")
        x = layers.torch_dense(visual.shape[-1], self.width, axes, dtype=self.dtype, name="vl_proj")(x)
        source_map = jnp.pad(places, ((0, 0), (self.dropped, 0)), constant_values=-1)  # (B, N)
        return ConnectorOutput(layers.split_batch(layers.gelu(x)), source_map, (source_map,))


def pooling(grid: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides grid * grid patches into rows * columns cells, as PyTorch's adaptive_avg_pool2d does.

    Where `rows` or `columns` does not divide `grid`, cells overlap by a row or a column of patches.

    Returns:
      (P, N) float32, the share of each patch in the mean of each cell; (N,) int32, the cell in which the centre of each
      patch is.
    """

    def along(parts: int) -> tuple[np.ndarray, np.ndarray]:
        place, part = np.arange(grid), np.arange(parts)[:, None]
        inside = (part * grid // parts <= place) & (place < -(-(part + 1) * grid // parts))
        return inside / inside.sum(1, keepdims=True), (2 * place + 1) * parts // (2 * grid)

    (down, row), (across, column) = along(rows), along(columns)
    owners = row[:, None] * columns + column
    return np.kron(down, across).astype(np.float32), owners.reshape(-1).astype(np.int32)


def rectangle(tokens: int, grid: int) -> tuple[int, int] | None:
    """Returns the rows and columns of so many cells that are closest to a square; None if none fits into the grid."""
    pairs = [(rows, tokens // rows) for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0]
    return next((pair for pair in reversed(pairs) if pair[1] <= grid), None)


def build_mlp(connector: Mapping, seen: VisualTokens, dtype: DTypeLike) -> MlpConnector:
    """Returns the MLP of a config's `connector` on every patch. Raises ValueError for an unknown size."""
    width = connector.width or size_of(connector)["width"]
    return MlpConnector(width, dropped=int(seen.class_token), dtype=dtype)


def build_pool(connector: Mapping, seen: VisualTokens, dtype: DTypeLike) -> MlpConnector:
    """Returns the MLP on means of neighbouring patches.

    Raises:
      ValueError: an unknown size, a number of tokens that no rectangle of cells has, or clips whose tokens are no grid.
    """
    grid = seen.grid
    if not grid:
        raise ValueError("connector.type='pool' averages the patches of one picture: set video.frames_as='mean'")
    if not connector.tokens:
        raise ValueError("connector.type='pool' needs connector.tokens, the number of tokens that are left")
    cells = rectangle(connector.tokens, grid)
    if cells is None:
        fits = [tokens for tokens in range(1, grid * grid + 1) if rectangle(tokens, grid)]
        near = sorted(sorted(fits, key=lambda tokens: abs(tokens - connector.tokens))[:2])
        raise ValueError(
            f"connector.tokens={connector.tokens} is no rectangle of cells in {grid} x {grid} patches; "
            f"near ones are {' and '.join(map(str, near))}"
        )
    return build_mlp(connector, seen, dtype).clone(cells=cells)
