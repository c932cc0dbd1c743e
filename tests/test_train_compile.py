"""Compiles for TPU slices that are not attached, with the real TPU compiler, and reads the compiled programs."""

import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from verbs import call

from simvlg_jax import train_compile
from simvlg_jax.config.load import load_config
from simvlg_jax.forecast import forecast as ahead
from simvlg_jax.forecast import hlo
from simvlg_jax.forecast.chips import parse_topology
from simvlg_jax.forecast.forecast import Forecast, forecast, largest_batch
from simvlg_jax.forecast.hlo_flops import matrix_flops
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError

REDUCED = ["--config.dtype=bfloat16", "--config.frozen_dtype=bfloat16", "--config.train.batch_size=64"]
KEYS = {
    *("config", "topology", "slices", "chips", "global_batch", "argument_bytes", "temp_bytes", "peak_bytes"),
    *("hbm_bytes", "fits", "tflop_per_step", "roofline_step_s", "images_per_s", "collectives", "compile_s"),
}
# Bytes a chip may need for the reduced recipe; it needs 13 to 17 MB.
BOUND = 25e6


def reduced(topology, *flags, slices=1, effort="O1"):
    return forecast("tiny", load_config("configs/tiny.py", [*REDUCED, *flags]), topology, slices, effort)


@pytest.fixture(scope="module")
def replicated():
    return {topology: reduced(topology) for topology in ("v5e:4x4", "v5p:2x2x4")}


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
def test_reduced_recipe_fits_and_only_gradients_travel(replicated, topology):
    result = replicated[topology]
    assert result.chips == 16 and result.mesh == {"data": 16, "fsdp": 1, "tensor": 1}
    assert result.fits and 0 < result.temp_bytes < result.peak_bytes < BOUND
    assert {c["op"] for c in result.collectives} == {"all-reduce"}
    trained = 44_096  # parameters; their gradients are bfloat16 or float32, and of tables only the rows used travel
    assert trained < sum(c["bytes"] for c in result.collectives) < 4.5 * trained


def test_merge_adds_no_collective(replicated):
    plain = reduced("v5e:4x4", "--config.connector.merges=(0,0)")
    merged = replicated["v5e:4x4"]
    assert [(c["op"], c["group"]) for c in merged.collectives] == [(c["op"], c["group"]) for c in plain.collectives]
    assert merged.collectives[0]["bytes"] == plain.collectives[0]["bytes"]


def test_work_is_the_models_and_what_chips_share_is_counted_on_each(replicated):
    config = load_config("configs/tiny.py", REDUCED)
    plan = Plan(build_task(config), config, meshes.make_mesh(config.mesh))
    traced = plan.step.trace(*plan.abstract, plan.abstract_batch(config.train.batch_size))
    work = replicated["v5e:4x4"].tflop_per_step
    assert work == pytest.approx(count_flops(traced.jaxpr) / 16e12, rel=1e-12)
    assert work < reduced("v5e:4x4", "--config.mesh.tensor=2", effort="O0").tflop_per_step < 2 * work


def test_fsdp_gathers_weights_and_no_activations(replicated):
    """At full effort, the compiler overlaps gathering with other work and merges it into that work."""
    result = reduced("v5e:4x4", "--config.mesh.preset=fsdp", effort="")
    bytes_of = {c["op"]: c["bytes"] for c in result.collectives}
    weights = 44_096 + 45_504
    # Weights go forth in bfloat16 once or twice; the ids of the batch, 64 x 24 int32 and their mask, go with them.
    assert 0 < bytes_of["all-gather"] < 2 * 2 * weights + 8 * 64 * 24 * 4
    assert result.argument_bytes < replicated["v5e:4x4"].argument_bytes
    assert result.collectives == reduced("v5e:4x4", "--config.mesh.preset=fsdp", effort="O0").collectives


def test_slices_put_data_across_and_only_gradients_between_them():
    result = reduced("v5e:4x4", "--config.mesh.preset=fsdp", slices=2)
    assert result.mesh == {"data": 2, "fsdp": 16, "tensor": 1} and result.chips == 32
    between = next(c for c in result.collectives if c["op"] == "send")
    assert 0 < between["bytes"] < 4.5 * 44_096


@pytest.mark.parametrize(
    ("topology", "slices"), [("v5e:4x4", 1), ("v5e:4x4", 2), ("v6e:4x4", 1), ("v4:2x2x4", 1), ("v5p:2x2x2", 1)]
)
@pytest.mark.parametrize("sizes", [(-1, 1, 1), (1, -1, 1), (1, -1, 2), (-1, 1, 4), (2, -1, 2)])
def test_every_host_of_a_slice_reads_the_rows_that_its_chips_hold(monkeypatch, topology, slices, sizes):
    """The chips of a host are not adjacent in the mesh, which follows the links between chips."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in zip(meshes.AXES, sizes, strict=True)]
    mesh = ahead.topology_mesh(load_config("configs/tiny.py", flags), parse_topology(topology), slices)
    assert mesh.size == slices * parse_topology(topology).num_chips == len(set(mesh.devices.flat))
    places = meshes.batch_sharding(mesh).devices_indices_map((64,))
    for host in {device.process_index for device in mesh.devices.flat}:
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        held = {row for device, (rows,) in places.items() if device.process_index == host for row in range(64)[rows]}
        assert meshes.local_rows(mesh, 64) == tuple(sorted(held))


def test_micro_batches_count_as_often_as_they_run():
    once, twice = reduced("v5e:4x4"), reduced("v5e:4x4", "--config.train.accumulate=2", "--config.train.batch_size=128")
    assert twice.tflop_per_step == pytest.approx(2 * once.tflop_per_step, rel=1e-6)
    assert twice.memory_s == pytest.approx(2 * once.memory_s, rel=0.25)
    assert twice.roofline_step_s == max(twice.compute_s, twice.memory_s, twice.communication_s)
    assert twice.images_per_s == pytest.approx(128 / twice.roofline_step_s)


def test_json_is_one_object_on_standard_output(capsys):
    flags = ["--config", "configs/tiny.py", "--topology", "v5e:4x4", "--effort", "O0", "--json", *REDUCED]
    assert call(train_compile, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= KEYS
    assert {"op", "count", "bytes"} <= result["collectives"][0].keys()
    assert (result["topology"], result["global_batch"], result["fits"]) == ("v5e:4x4", 64, True)


def test_step_that_does_not_fit_says_so_with_status_3(capsys):
    flags = ["--config", "configs/tiny.py", "--topology", "v5e:4x4", "--config.train.batch_size=33554432"]
    assert call(train_compile, *flags, "--effort", "O0", "--json") == 3
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["fits"] is False
    assert all(result[key] is None for key in ("peak_bytes", "tflop_per_step", "images_per_s", "collectives"))
    assert "of memory for temporaries, and 15.75G are available" in output.err
    assert "fits: no" in train_compile.describe(Forecast(**result))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e"], "v5e slices have 2 sides"),
        (["--topology", "v9:2x2"], "unknown TPU 'v9'"),
        (["--topology", "v5p:4x4"], "v5p slices have 3 sides"),
        (["--topology", "v5e:3x5"], "the compiler does not support topology v5e:3x5"),
        (["--topology", "v5e:4x4", "--slices", "0"], "--slices must be at least 1"),
        (["--topology", "v5e:4x4", "--config.train.batch_size=24"], "does not divide over 16 devices"),
        (["--topology", "v5e:4x4", "--config.train.batch=24"], "did you mean train.batch_size"),
        (["--topology", "v5e:4x4", "--config.mesh.data=2"], "leaves out some of 16 devices"),
        (["--topology", "v5e:4x4", "--slices", "2", "--config.mesh.data=2"], "leaves out some of 16 devices"),
    ],
)
def test_wrong_requests_are_named_with_status_2(capsys, flags, message):
    assert call(train_compile, "--config", "configs/tiny.py", *flags) == 2
    assert message in capsys.readouterr().err


def test_compiler_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    assert call(train_compile, "--config", "configs/tiny.py", "--topology", "v5e:4x4") == 1
    assert "pip install libtpu" in capsys.readouterr().err


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(UserError, match=r"llm=opt3 is unknown; there are llm=opt2\.7b\|opt6\.7b"):
        load_config("configs/pretrain_image.py:llm=opt3")


@given(st.integers(1, 40), st.integers(0, 5000), st.integers(1, 3000))
def test_search_finds_the_largest_batch_that_fits(unit, limit, start):
    tried = []

    def fake(batch):
        tried.append(batch)
        known = dict.fromkeys(Forecast.__dataclass_fields__)
        return Forecast(**known | {"global_batch": batch, "fits": batch <= limit})

    found = largest_batch(fake, unit, start)
    assert found.global_batch == max(limit // unit, 1) * unit and found.fits == (limit >= unit)
    assert all(batch % unit == 0 and batch > 0 for batch in tried) and len(tried) == len(set(tried))


def test_search_through_the_command_line(monkeypatch, capsys):
    def fake(name, config, topology, slices, effort, say, text_tokens):
        known = dict.fromkeys(Forecast.__dataclass_fields__, 1)
        batch = config.train.batch_size
        return Forecast(**known | {"global_batch": batch, "fits": batch <= 100})

    monkeypatch.setattr(ahead, "forecast", fake)
    flags = ["--config", "configs/tiny.py", "--topology", "v5e:4x4", "--search", "batch", "--json"]
    assert call(train_compile, *flags) == 0
    assert json.loads(capsys.readouterr().out)["global_batch"] == 96
    assert call(train_compile, *flags, "--config.train.accumulate=8", "--config.train.batch_size=128") == 3
    assert json.loads(capsys.readouterr().out)["fits"] is False


def compiled_text(function, *shapes_and_specs):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in shapes_and_specs
    ]
    out = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text()


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    def function(x, w):  # x is split along what is summed: each product ends in an all-reduce
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = compiled_text(function, ((256, 512), (None, "x")), ((6, 512, 512), (None, "x", None)))
    program = hlo.parse(text)
    reduced = [c for c in hlo.collectives(program, 4) if c.op in ("all-reduce", "reduce-scatter", "all-gather")]
    assert reduced and all(c.group == 4 for c in reduced)
    assert sum(c.count for c in reduced) >= 6
    weights = 6 * 512 * 512 // 4 * 2
    assert hlo.hbm_traffic(program) < 8 * (weights + 6 * 256 * 512 * 2)


def test_traffic_of_a_scan_reads_each_layer_once():
    text = compiled_text(
        lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], ((8, 2048), ()), ((16, 2048, 2048), ())
    )
    weights = 16 * 2048 * 2048 * 2
    assert weights <= hlo.hbm_traffic(hlo.parse(text)) < 1.1 * weights


HLO = """HloModule m

%cond (c: (s32[], f32[2])) -> pred[] {
  %c = (s32[], f32[2]{0}) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[2])) -> (s32[], f32[2]) {
  %b = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%b), index=1
  %ag = (f32[2]{0:T(128)S(1)}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[8]{0} all-gather-done(%ag)
  %rs = f32[4]{0} reduce-scatter(%agd), replica_groups={{0,1},{2,3}}, to_apply=%add
  %begun = f32[8]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion
  %ended = f32[8]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %t = (s32[], f32[2]{0}) tuple(%x, %x)
}

%async_collective_fusion (p.1: f32[2]) -> f32[8] {
  %p.1 = f32[2]{0} parameter(0)
  ROOT %ag.1 = f32[8]{0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.1 (p.2: f32[2]) -> f32[8] {
  %p.2 = f32[2]{0} parameter(0)
  ROOT %ag.2 = f32[8]{0} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %w = (s32[], f32[2]{0}) while(%p), condition=%cond, body=%body
  %ar = f32[8]{0} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %r = f32[2]{0} get-tuple-element(%w), index=1
}
"""


def test_groups_bytes_and_counts_are_read_in_every_spelling():
    found = {c.op: c for c in hlo.collectives(hlo.parse(HLO), 8)}
    assert (found["all-gather"].count, found["all-gather"].bytes, found["all-gather"].group) == (10, 10 * 32, 4)
    assert (found["reduce-scatter"].count, found["reduce-scatter"].bytes, found["reduce-scatter"].group) == (5, 80, 2)
    assert (found["all-reduce"].count, found["all-reduce"].bytes, found["all-reduce"].group) == (1, 32, 4)
    assert found["all-reduce"].wire_bytes == pytest.approx(2 * 3 / 4 * 32)
    assert found["reduce-scatter"].wire_bytes == 80


@pytest.mark.parametrize(
    ("left", "right", "operation", "flops"),
    [
        ("4,8", "8,5", "f32[4,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 5 * 8),
        ("4,8", "8,5", "f32[4,5]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 4 * 5 * 8),
        # Three products (4, 8) x (8, 5): the batch is spatial, and of three places two lie between its examples.
        ("3,4,8", "3,8,5", "f32[3,4,5]{2,1,0} convolution(%a, %b), "
         "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf", 3 * 2 * 4 * 5 * 8),
        # A window of three with its edges padded: 3 x 6 places but the two outside.
        ("6,4,8", "3,8,5", "f32[6,4,5]{2,1,0} convolution(%a, %b), "
         "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 16 * 2 * 4 * 5 * 8),
    ],
)  # fmt: skip
def test_matrix_products_count_where_two_elements_meet(left, right, operation, flops):
    lines = [f"%a = f32[{left}]{{0}} parameter(0)", f"%b = f32[{right}]{{0}} parameter(1)", f"ROOT %c = {operation}"]
    text = "\n".join(["ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {", *(f"  {line}" for line in lines), "}"])
    assert matrix_flops(hlo.parse(text)) == (flops, 0)


def test_links_at_the_edge_of_a_slice_are_counted():
    link = parse_topology("v5e:4x4").chip.link_bandwidth
    assert parse_topology("v5e:4x4").ici_bandwidth(16) == 2 * link
    assert parse_topology("v5e:16x16").ici_bandwidth(256) == 4 * link
    assert parse_topology("v5e:16x16").ici_bandwidth(16) == link
    assert parse_topology("v5p:2x2x1").ici_bandwidth(4) == 2 * parse_topology("v5p:2x2x1").chip.link_bandwidth
    assert parse_topology("v5p:4x4x8").ici_bandwidth(128) == 6 * parse_topology("v5p:4x4x8").chip.link_bandwidth
