"""int8 weights: how far they are from floats, what they compile to, how they load, and whole runs with them."""

import re
import signal
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_training
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from test_training import losses, tiny
from verbs import call

from simvlg_jax import evaluate, export, to_torch
from simvlg_jax.api import load
from simvlg_jax.config.load import load_config
from simvlg_jax.convert import own_files
from simvlg_jax.forecast import hlo
from simvlg_jax.forecast.hlo_flops import matrix_flops
from simvlg_jax.models import int8, layers
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.models.llms.llama import LLAMA_SIZES, Llama
from simvlg_jax.models.llms.opt import OPT_SIZES, Opt
from simvlg_jax.models.llms.qwen import QWEN2_SIZES, QWEN3_SIZES, Qwen2, Qwen3
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.lazy import Lazy, LazyStack
from simvlg_jax.tasks import build_task
from simvlg_jax.training import loop, storage, trainer
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError

LLMS = {
    "opt": partial(Opt, **OPT_SIZES["opt_tiny"]),
    "llama": partial(Llama, **LLAMA_SIZES["tiny"]),
    "qwen2.5": partial(Qwen2, **QWEN2_SIZES["qwen2.5_tiny"]),
    "qwen3": partial(Qwen3, **QWEN3_SIZES["qwen3_tiny"]),
}
COMPUTE = dict(frozen_dtype="int8", frozen_compute="int8")
EQUATIONS = [  # of x and matrix, their shapes, and the axes of the matrix that are summed over
    ("...D,DF->...F", (2, 3, 16), (16, 6), (-2,)),
    ("BSD,DNH->BSNH", (2, 3, 16), (16, 4, 5), (-3,)),
    ("BSNH,NHD->BSD", (2, 3, 4, 5), (4, 5, 16), (-3, -2)),
    ("BSD,VD->BSV", (2, 3, 16), (10, 16), (-1,)),
]


def quantize(matrix, summed, int8_compute=False, shards=(1, 1), by=int8.quantize):
    shapes = (jax.ShapeDtypeStruct(shape, np.int8) for shape in (matrix.shape, int8.scale_shape(matrix.shape, summed)))
    return by(matrix, int8.Int8.of(*shapes, int8_compute, shards))


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def parameters(model, *inputs):
    """Returns a model's parameters as floats, as int8, and as int8 that is multiplied in int8."""
    boxed = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]

    def form(make):
        def of(box):  # the matrices are made larger, so that the blocks change their input
            return make(2 * box.value, box.summed) if isinstance(box, layers.Matrix) else nn.unbox(box)

        return jax.tree.map(of, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))

    makers = (lambda x, _: x, quantize, partial(quantize, int8_compute=True))
    return [form(make) for make in makers]


def relative_error(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("summed", [(-2,), (-1,), (-3, -2)])
def test_values_are_within_half_a_step_and_the_host_computes_the_same(summed):
    matrix = normal(0, (2, 5, 6, 7)).at[1, 2].set(0.0).at[0, 0, 0].set(3e-30)
    found = quantize(matrix, summed, False)
    assert found.qvalue.dtype == jnp.int8 and found.scale.dtype == jnp.float32 and found.summed == summed
    assert found.scale.shape == int8.scale_shape(matrix.shape, summed)
    assert np.all(np.abs(found.qvalue * found.scale - matrix) <= 0.50002 * found.scale)
    largest = np.abs(found.qvalue.astype(np.int32)).max(summed)
    assert np.all((largest == 127) | (np.abs(matrix).max(summed) < 1e-15))  # the whole range is used
    on_host = quantize(np.asarray(matrix), summed, by=int8.quantize_on_host)
    assert jax.tree.structure(on_host) == jax.tree.structure(found)
    assert jax.tree.map(lambda x: x.dtype, on_host) == jax.tree.map(lambda x: x.dtype, found)
    np.testing.assert_array_equal(on_host.qvalue, found.qvalue)
    np.testing.assert_allclose(on_host.scale, found.scale, rtol=2e-7)


@pytest.mark.parametrize(("equation", "x", "matrix", "summed"), EQUATIONS)
def test_product_is_that_of_the_dequantised_matrix(equation, x, matrix, summed):
    x, matrix = normal(1, x), quantize(normal(2, matrix), summed, False)
    plain = matrix.qvalue * matrix.scale

    def run(kernel):
        return jax.vjp(lambda x: layers.linear(equation, x, kernel, jnp.float32), x)

    (found, back), (wanted, plain_back) = run(matrix), run(plain)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    slopes = normal(3, wanted.shape)
    np.testing.assert_allclose(back(slopes)[0], plain_back(slopes)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shards", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("equation", "x", "matrix", "summed"), EQUATIONS)
def test_int8_product_rounds_each_row_of_x_and_of_the_gradient(equation, x, matrix, summed, shards):
    x, matrix = normal(1, x), quantize(normal(2, matrix), summed, True, shards)

    def rounded(x, axes):
        rows = quantize(x, axes, by=int8.quantize_on_host)
        return rows.qvalue * rows.scale

    out, back = jax.vjp(lambda x: layers.linear(equation, x, matrix, jnp.float32), x)
    inputs, (letters, result) = equation.split(",")[0], equation.split(",")[1].split("->")
    row = tuple(range(-len(summed), 0))
    plain = np.asarray(matrix.qvalue * matrix.scale)
    np.testing.assert_allclose(out, np.einsum(equation, rounded(x, row), plain), rtol=1e-5, atol=1e-5)
    slopes = normal(3, out.shape)
    channels = matrix.scale.squeeze(summed)
    row = tuple(range(-channels.ndim, 0))
    wanted = np.einsum(f"{result},{letters}->{inputs}", rounded(slopes * channels, row), matrix.qvalue)
    np.testing.assert_allclose(back(slopes)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("family", LLMS)
def test_language_model_is_near_the_float_one(family, scan):
    """Hidden states, logits and the gradient of the prompt: 3 % away with int8 weights, 4 % with int8 compute.

    Wide models are nearer: this one is 32 wide, and its weights are random.
    """
    llm = LLMS[family](scan=scan, remat=scan)
    ids, prompt = jnp.arange(12).reshape(2, 6) * 7, normal(1, (2, 4, 32))
    mask, positions = jnp.ones((2, 10), jnp.int32), jnp.broadcast_to(jnp.arange(10), (2, 10))
    slopes = normal(2, (2, 10, 98))

    def run(llm, prompt):
        hidden = llm(jnp.concatenate([prompt, llm.embed(ids)], 1), mask, positions).hidden
        return hidden, llm.logits(hidden)

    def results(params):
        def loss(prompt):
            hidden, logits = llm.apply({"params": params}, prompt, method=run)
            return jnp.sum(logits * slopes), (hidden, logits)

        return jax.jit(jax.grad(loss, has_aux=True))(prompt)

    init = partial(llm.init, method=run)
    exact, weights, compute = map(results, parameters(type("Init", (), {"init": staticmethod(init)}), prompt))
    for found, bound in ((weights, 0.03), (compute, 0.04)):
        errors = [relative_error(*pair) for pair in zip(*map(jax.tree.leaves, (found, exact)), strict=True)]
        assert min(errors) > 0 and max(errors) < bound, errors


def test_vision_encoder_is_near_the_float_one():
    vit, images = ViT(**VIT_SIZES["tiny_32px"]), normal(1, (2, 32, 32, 3))
    exact, weights, compute = (vit.apply({"params": p}, images) for p in parameters(vit, images))
    assert 0 < relative_error(weights, exact) < 0.03
    assert relative_error(weights, exact) < relative_error(compute, exact) < 0.04


def test_int8_compute_multiplies_int8_in_both_directions_and_keeps_no_float_weights():
    prompt, mask = normal(1, (2, 4, 32)), jnp.ones((2, 4), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))

    def run(llm, prompt):
        return llm.logits(llm(prompt, mask, positions).hidden).sum()

    def lowered(scan, form):
        llm = LLMS["opt"](scan=scan)
        model = type("Init", (), {"init": staticmethod(partial(llm.init, method=run))})
        params = parameters(model, prompt)[form]
        function = jax.grad(lambda prompt, params: llm.apply({"params": params}, prompt, method=run))
        return jax.jit(function).lower(prompt, params).as_text()

    products = r"dot_general .* : \(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>"
    matrices = 2 * 6 + 1  # of two blocks, and the vocabulary
    assert len(re.findall(products, lowered(False, 2))) == 2 * matrices - 1  # the last product forward is not needed
    assert not re.findall(products, lowered(False, 1))
    for form in (1, 2):
        text = lowered(True, form)
        assert "tensor<2x32x64xi8>" in text and "tensor<2x32x64xf32>" not in text


def test_lazy_stack_is_quantised_layer_by_layer():
    stack, reads = np.asarray(normal(0, (3, 16, 8)), np.float32), []

    def read(layer):
        reads.append(layer)
        return stack[layer]

    mesh = meshes.make_mesh(ConfigDict(dict(preset="", data=2, fsdp=2, tensor=2)))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    wanted = int8.Int8.of(
        jax.ShapeDtypeStruct(stack.shape, jnp.int8, sharding=sharding),
        jax.ShapeDtypeStruct((3, 1, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, None, "tensor"))),
        True,
    )
    lazy = LazyStack([Lazy((16, 8), np.float32, partial(read, layer)) for layer in range(3)])
    found, whole = storage.put(lazy, wanted), quantize(stack, (-2,), True, by=int8.quantize_on_host)
    assert reads == [0, 1, 2]
    assert jax.tree.map(lambda x: x.sharding, found) == storage.shardings(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    jax.tree.map(np.testing.assert_array_equal, storage.put(stack, wanted), whole)


def test_mesh_changes_neither_weights_nor_losses(tmp_path):
    fingerprints, found = [], []
    for name, mesh in (("one", (1, 1, 1)), ("many", (2, 2, 2))):
        config = tiny(mesh=mesh, train__steps=2, evals__val__every=0, **COMPUTE)
        assert loop.train(config, tmp_path / name) == 0
        frozen = Plan(build_task(config), config, meshes.make_mesh(config.mesh)).init_params()[1]
        fingerprints.append(fingerprint(frozen))
        found.append(list(losses(tmp_path / name).values()))
        gate = frozen["llm"]["blocks"]["gate"]["kernel"]
    assert (gate.qvalue.sharding.spec, gate.scale.sharding.spec) == (
        PartitionSpec(None, "fsdp", "tensor"),
        PartitionSpec(None, None, "tensor"),
    )
    assert fingerprints[0] == fingerprints[1]
    # An activation close to the border of two steps may be rounded to the other one.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_run_is_resumed_evaluated_exported_and_described(tmp_path, monkeypatch, capsys):
    config = tiny(train__steps=6, train__save_every=6, evals__val__every=6, **COMPUTE)
    assert loop.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        test_training.interrupt_at(patch, 4)
        assert loop.train(config, tmp_path / "run") == 128 + signal.SIGTERM
    with pytest.raises(UserError, match=r"frozen_dtype: 'int8' there, 'float32' now"):
        loop.train(tiny(train__steps=6), tmp_path / "run")
    assert loop.train(config, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    def scored(*arguments):
        assert call(evaluate, "--split", "val", *arguments) == 0
        return float(re.search(r'"loss": ([\d.]+)', capsys.readouterr().out)[1])

    loss = scored("--workdir", tmp_path / "run")
    assert loss == pytest.approx(test_training.logged(tmp_path / "run", "eval")[6]["loss"], rel=0.02)
    assert (
        call(evaluate, "--workdir", tmp_path / "run", "--config.frozen_dtype=float32", "--config.frozen_compute=") == 1
    )
    assert "restore the old weights and config.frozen_dtype" in capsys.readouterr().err

    assert call(export, "--workdir", tmp_path / "run", "--output", tmp_path / "exported") == 0
    floats = tiny(train__steps=6)
    frozen = Plan(build_task(floats), floats, meshes.make_mesh(floats.mesh)).init_params()[1]
    written = own_files.read_flat(tmp_path / "exported" / "weights.safetensors")
    for name, x in traverse_util.flatten_dict(frozen, sep="/").items():
        np.testing.assert_array_equal(written[name], np.asarray(x).astype(written[name].dtype), err_msg=name)
    assert scored("--workdir", tmp_path / "exported", "--output", tmp_path / "scores") == pytest.approx(loss, rel=1e-2)
    model = load(tmp_path / "exported")
    assert isinstance(model.params["llm"]["embedding"], int8.Int8)
    assert isinstance(model.caption(np.zeros((32, 32, 3), np.uint8)), str)

    outputs = []
    for folder in ("run", "exported"):
        path = tmp_path / f"{folder}.safetensors"
        flags = ("--format", "evlgen", "--all", "--output", path)
        assert call(to_torch, "--workdir", tmp_path / folder, *flags) == 0
        tensors = own_files.read_flat(path)
        assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
        outputs.append(tensors)
    for name, x in outputs[0].items():  # an exported model holds bfloat16
        np.testing.assert_allclose(outputs[1][name], x, rtol=2**-8, err_msg=name)

    described = [trainer.describe(trainer.Trainer(each, tmp_path), 0) for each in (config, floats)]
    assert described[0] == described[1]


def test_what_is_trained_and_what_is_no_matrix_is_never_quantised():
    def of(*flags):
        config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in ("frozen_dtype=int8", *flags)])
        shapes = traverse_util.flatten_dict(Plan(build_task(config), config, meshes.make_mesh(config.mesh)).shapes)
        quantised = {path for path, x in shapes.items() if isinstance(x, int8.Int8)}
        return quantised, {"/".join(path): x.dtype for path, x in shapes.items() if path not in quantised}

    quantised, rest = of("vit.temporal=True", "data.frames=2", "dtype=bfloat16")
    assert {path[0] for path in quantised} == {"vit", "llm"} and {path[-1] for path in quantised} == {
        "kernel",
        "embedding",
    }
    assert rest["vit/blocks/temporal_merge/query/kernel"] == rest["connector/layer_0/query/kernel"] == jnp.float32
    assert rest["vit/blocks/norm1/scale"] == rest["vit/blocks/query/bias"] == rest["llm/norm/scale"] == jnp.bfloat16
    quantised, rest = of("llm.train=True")
    assert {path[0] for path in quantised} == {"vit"}
    assert rest["llm/embedding"] == rest["vit/position"] == jnp.float32


def test_int8_compute_is_of_kernels_and_not_of_logits():
    config = tiny(**COMPUTE)
    shapes = Plan(build_task(config), config, meshes.make_mesh(config.mesh)).shapes
    assert (
        shapes["llm"]["blocks"]["gate"]["kernel"].int8_compute and shapes["vit"]["patch_embed"]["kernel"].int8_compute
    )
    assert not shapes["llm"]["embedding"].int8_compute


def test_int8_compute_needs_int8_weights():
    with pytest.raises(UserError, match="set frozen_dtype=int8 too"):
        load_config("configs/tiny.py", ["--config.frozen_compute=int8"])


def test_forecast_counts_int8_products_apart():
    lines = ["%a = s8[4,8]{1,0} parameter(0)", "%b = s8[8,5]{1,0} parameter(1)", "%c = bf16[8,5]{1,0} convert(%b)"]
    products = (("%i", "s32", "%a", "%b"), ("%f", "bf16", "%a", "%c"), ("ROOT %g", "bf16", "%a", "%c"))
    for name, dtype, left, right in products:
        dims = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
        lines.append(f"{name} = {dtype}[4,5]{{1,0}} dot({left}, {right}), {dims}")
    text = "\n".join(["ENTRY %main (a: s8[4,8], b: s8[8,5]) -> bf16[4,5] {", *(f"  {line}" for line in lines), "}"])
    assert matrix_flops(hlo.parse(text)) == (2 * 2 * 4 * 5 * 8, 2 * 4 * 5 * 8)


def test_forecast_reads_what_the_compiler_writes_for_int8():
    """A layer of a stack is read through a new tiling of the stack; the mesh of a sum has its own order of devices."""
    text = """
%retile (s: s8[32,64,128]) -> s8[32,64,128] {
  %s = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy = s8[32,64,128]{2,1,0:T(8,128)(4,1)} copy(%s)
}
%layer (s: s8[32,64,128], i: s32[]) -> s8[1,64,128] {
  %s = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %tiled = s8[32,64,128]{2,1,0} fusion(%s), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  ROOT %one = s8[1,64,128]{2,1,0} dynamic-slice(%tiled, %i, %i, %i), dynamic_slice_sizes={1,64,128}
}
ENTRY %main (s: s8[32,64,128], i: s32[]) -> s8[1,64,128] {
  %s = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %f = s8[1,64,128]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%layer
  ROOT %r = s8[1,64,128]{2,1,0} all-reduce(%f), replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}
}
"""
    program, layer = hlo.parse(text), 64 * 128
    assert hlo.hbm_traffic(program) == pytest.approx(2 * layer + 2 * layer, rel=0.01)  # of the fusion and of the sum
    assert [(c.op, c.group) for c in hlo.collectives(program, 16)] == [("all-reduce", 2)]


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [("bfloat16", ("bfloat16", "", 2)), ("int8", ("int8", "", 1)), ("int8_compute", ("int8", "int8", 1))],
)
def test_recipes_say_how_frozen_weights_are_kept(frozen, expected):
    config = load_config(f"configs/pretrain_image.py:llm=vicuna7b,frozen={frozen}")
    assert (config.frozen_dtype, config.frozen_compute, config.mesh.tensor) == expected
