"""Dropout by hashing drops the right share, independently of the sharding, of neighbours and of other keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simvlg_jax.models.dropout import Dropout, hashed_bits

SHAPE = (64, 12, 33, 31)


def bits(seed, shape=SHAPE):
    return np.asarray(hashed_bits(jax.random.key(seed), shape))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_is_dropped_and_the_rest_scaled(rate):
    x = jnp.ones(SHAPE)
    out = np.asarray(Dropout(rate).apply({}, x, rngs={"dropout": jax.random.key(0)}))
    kept = out != 0
    np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / out.size)
    assert abs((1 - kept.mean()) - rate) < 4 * deviation
    # Along every axis too: a hash of places could favour some.
    for axis in range(4):
        shares = 1 - kept.mean(tuple(a for a in range(4) if a != axis))
        assert (np.abs(shares - rate) < 5 * deviation * np.sqrt(SHAPE[axis])).all()


def test_without_rng_or_rate_nothing_changes():
    x = jax.random.normal(jax.random.key(1), (4, 5))
    assert (Dropout(0.5).apply({}, x) == x).all()
    assert (Dropout(0.0).apply({}, x, rngs={"dropout": jax.random.key(0)}) == x).all()
    out = Dropout(0.5).apply({}, x.astype(jnp.bfloat16), rngs={"dropout": jax.random.key(0)})
    assert out.dtype == jnp.bfloat16 and set(np.unique(np.asarray(out / x.astype(jnp.bfloat16), float))) == {0, 2}


def test_every_bit_is_fair_and_neighbours_and_keys_are_independent():
    first, second = bits(0).ravel(), bits(1).ravel()
    size = first.size

    def correlation(a, b):
        a, b = ((x >= 2**31).astype(float) - 0.5 for x in (a, b))
        return abs((a * b).mean()) * 4

    limit = 4.5 / np.sqrt(size)
    for bit in range(32):
        assert abs(((first >> np.uint32(bit)) & 1).mean() - 0.5) < limit
    assert correlation(first, second) < limit
    for distance in (1, 2, 31, 33 * 31, 12 * 33 * 31):
        assert correlation(first[distance:], first[:-distance]) < limit
        assert correlation(second[distance:], first[:-distance]) < limit
    assert len(np.unique(first)) > 0.999 * size * (1 - size / 2**33)


def test_mask_does_not_depend_on_sharding_or_jit():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    make = jax.jit(lambda key: hashed_bits(key, SHAPE), out_shardings=NamedSharding(mesh, PartitionSpec("a", "b")))
    np.testing.assert_array_equal(make(jax.random.key(0)), bits(0))


def test_gradient_passes_where_the_value_did():
    x = jax.random.normal(jax.random.key(2), (50, 20))

    def total(x):
        return Dropout(0.3).apply({}, x, rngs={"dropout": jax.random.key(3)}).sum()

    grads = jax.grad(total)(x)
    out = Dropout(0.3).apply({}, x, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_allclose(grads, jnp.where(out != 0, 1 / 0.7, 0), rtol=1e-6)
