"""What every connector is: a trained module between the vision encoder and the language model."""

from typing import Protocol

import jax
from flax import struct


@struct.dataclass
class ConnectorOutput:
    """What a connector makes of visual tokens.

    Attributes:
      tokens: (B, P, D).
      source_map: (B, N) int32, the output token that each visual token became part of; None if they mix.
    """

    tokens: jax.Array
    source_map: jax.Array | None = None


class Connector(Protocol):
    """A Linen module; `width` is D, the width of its tokens."""

    width: int

    def __call__(self, visual: jax.Array) -> ConnectorOutput:
        """visual: (B, N, C), the vision encoder's tokens after LayerNorm."""
        ...
