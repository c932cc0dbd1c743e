"""Dropout whose mask is a hash of the index of each element, so it is the same on any mesh.

JAX's own generators were rejected:

* Threefry gives the same mask on any mesh too, but takes eleven times as long to draw and longer to compile for a TPU;
  `docs/architecture.md` has the measured numbers.
* `rbg` draws the whole array on every device. An XLA flag prevents that, but then the bits depend on the sharding. They
  also differ between kinds of device.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from simvlg_jax.utils.hashing import element_numbers


class Dropout(nn.Module):
    """Sets a share `rate` of the elements to zero and scales the others by 1 / (1 - rate).

    It acts only if an rng named "dropout" is given. This rng is what tells the whole model that it is training.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (...) -> (...)
        if not self.rate or not self.has_rng("dropout"):
            return x
        keep = hashed_bits(self.make_rng("dropout"), x.shape) >= jnp.uint32(self.rate * 2**32)
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns pseudo-random uint32 of a shape: two rounds of MurmurHash3's finaliser over the index of each element.

    The bits are good enough for dropout, not for other uses. In an array of more than 2^32 elements they repeat.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    return _avalanche(_avalanche(element_numbers(shape) ^ first) + second)


def _avalanche(x: jax.Array) -> jax.Array:  # uint32 (...) -> uint32 (...), every bit depending on every bit
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
