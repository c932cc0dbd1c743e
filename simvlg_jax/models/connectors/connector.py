"""The interface of connectors, the trained modules between the vision encoder and the language model."""

from typing import Protocol

import jax
from flax import struct


@struct.dataclass
class ConnectorOutput:
    """What a connector returns.

    Attributes:
      tokens: (B, P, D).
      source_map: (B, N) int32, the output token that each of the vision encoder's patches, and its class token, became
        part of (for clips see `Frames.join`), -1 if it was left out; None for a connector that mixes them.
      layers: of each layer, the source map (B, N) after it; the last one is `source_map`. Empty if that is None.
    """

    tokens: jax.Array
    source_map: jax.Array | None = None
    layers: tuple[jax.Array, ...] = ()


class Connector(Protocol):
    """A Linen module.

    Attributes:
      width: D, the width of its tokens.
      merges: tokens that each layer merges away; () for a connector that mixes them.
      class_token: whether the first of its tokens is the vision encoder's class token.
    """

    width: int
    merges: tuple[int, ...]
    class_token: bool

    def __call__(self, visual: jax.Array, source_map: jax.Array | None = None) -> ConnectorOutput:
        """Returns the connector's output.

        Args:
          visual: (B, T, C), the vision encoder's tokens after LayerNorm.
          source_map: (B, N) int32, of a vision encoder that merges: which of these tokens each of its N patches, and
            its class token, became part of; None: N = T, and token i is patch i.
        """
        ...
