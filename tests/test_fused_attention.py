"""The kernel computes what `attend` does, on one device, on a mesh, and without storing scores on a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from simvlg_jax.forecast import forecast, hlo
from simvlg_jax.forecast.chips import parse_topology
from simvlg_jax.forecast.hlo_flops import matrix_flops
from simvlg_jax.models.attention import attend
from simvlg_jax.models.fused_attention import attend_fused, run_kernel
from simvlg_jax.parallel import mesh as meshes

SIZES = ConfigDict(dict(preset="", data=-1, fsdp=2, tensor=2))


def random_inputs(dtype, shape=(8, 65, 4, 24)) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [2 * jax.random.normal(key, shape).astype(dtype) for key in keys]


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_the_kernel_computes_attention(dtype, error):
    inputs = random_inputs(dtype, (2, 65, 3, 88))
    found = run_kernel(*inputs, interpret=True)
    assert found.dtype == dtype
    expected = np.asarray(attend(*inputs), np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=error * np.abs(expected).max())


@pytest.mark.parametrize("heads", [4, 3])  # three heads cannot be split over two devices
def test_on_a_mesh_values_and_gradients_are_those_of_attention(heads):
    inputs = random_inputs(jnp.float32, (8, 65, heads, 24))
    mesh = meshes.make_mesh(SIZES)

    def loss(function, inputs):
        with meshes.activation_shardings(mesh):
            return jnp.sum(jnp.sin(function(*inputs)))

    placed = jax.device_put(inputs, meshes.batch_sharding(mesh))
    found = jax.jit(jax.value_and_grad(lambda inputs: loss(attend_fused, inputs)))(placed)
    expected = jax.jit(jax.value_and_grad(lambda inputs: loss(attend, inputs)))(inputs)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_a_tpu_stores_no_scores_and_moves_nothing_between_chips(tmp_path):
    batch, tokens, heads, width = 32, 257, 16, 88  # of ViT-g; a chip of this mesh has 8 pictures and 8 heads
    mesh = forecast.topology_mesh(ConfigDict({"mesh": SIZES}), parse_topology("v5e:2x4"), 1)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    argument = jax.ShapeDtypeStruct((batch, tokens, heads, width), jnp.bfloat16, sharding=sharding)

    def run(*inputs):
        with meshes.activation_shardings(mesh):
            return attend_fused(*inputs)

    lowered = jax.jit(run, out_shardings=sharding).lower(*[argument] * 3)
    with forecast.compiler_settings("O0"):
        lowered.compile(compiler_options={"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    program = hlo.parse(forecast.optimized_text(tmp_path))
    sizes = [hlo.array_bytes(each.type) for body in program.computations.values() for each in body.values()]
    assert max(sizes) == 8 * tokens * 8 * width * 2 < 8 * 8 * tokens**2 * 2
    assert not hlo.collectives(program, mesh.size)
    assert matrix_flops(program) == (2 * 2 * 8 * 8 * tokens**2 * width, 0)
