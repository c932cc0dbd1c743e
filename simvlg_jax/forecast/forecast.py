"""Compiling the training step for TPU chips that are not there, and what the result says about a run on them.

The environment must hold `forecast.chips.COMPILE_ONLY` before jax is imported.
"""

import importlib.util
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.forecast import hlo
from simvlg_jax.forecast.chips import Topology, parse_topology
from simvlg_jax.forecast.hlo_flops import matrix_flops
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError


@dataclass(frozen=True)
class Forecast:
    """What one step would take. Bytes, TFLOP and seconds are those of one chip; None where it is not known.

    Attributes:
      peak_bytes: arguments, temporaries, results that reuse neither, and the program itself.
      hbm_bytes: what the compiler may use of the chip's memory.
      fits: peak_bytes is within hbm_bytes.
      tflop_per_step: of the compiled matrix products, with what is computed again and what several chips each compute.
      compute_s, memory_s, communication_s: the step's TFLOP, its traffic to memory and its collectives at the chip's
        full speed; see `forecast.chips`.
      roofline_step_s: the longest of these three: no run is faster.
      images_per_s: of all chips, at the roofline.
      collectives: op, count, bytes and chips in a group.
    """

    config: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    global_batch: int
    micro_batches: int
    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    hbm_bytes: int
    fits: bool
    tflop_per_step: float | None
    compute_s: float | None
    memory_s: float | None
    communication_s: float | None
    roofline_step_s: float | None
    images_per_s: float | None
    collectives: list[dict] | None
    compile_s: float

    def as_dict(self) -> dict:
        return asdict(self)


def topology_mesh(config: ConfigDict, topology: Topology, slices: int) -> Mesh:
    """The config's mesh over the chips of a topology, of which not one needs to be here.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install libtpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler knows no topology {topology.name}: {str(error).splitlines()[0]}", 2) from error
    return meshes.make_mesh(config.mesh, found.devices)


def forecast(
    name: str, config: ConfigDict, topology_name: str, slices: int = 1, effort: str = "", say: Callable = lambda _: None
) -> Forecast:
    """Compiles the step that training would run, for the longest texts.

    Args:
      name: the config's, for the result.
      topology_name: such as "v5e:4x4".
      effort: XLA's optimisation level, "O0" to "O3"; "" is what training uses. "O0" compiles many times faster.
      say: takes lines on how far it is.
    """
    topology = parse_topology(topology_name)
    chip = topology.chip
    mesh = topology_mesh(config, topology, slices)
    plan = Plan(build_task(config), config, mesh)
    lowered = plan.step.lower(*plan.abstract, plan.abstract_batch(config.train.batch_size))
    known = dict(
        config=name,
        topology=topology_name,
        slices=slices,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        global_batch=config.train.batch_size,
        micro_batches=config.train.accumulate,
        hbm_bytes=chip.usable_bytes,
    )
    started = time.monotonic()
    try:
        with ticking(say), tempfile.TemporaryDirectory() as dump, compiler_settings(effort):
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
            program = hlo.parse(optimized_text(Path(dump)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if found := re.search(r"\(([\d.]+\w*)\) exceeds available HBM \(([\d.]+\w*)\)", str(error)):
            say(f"the compiler needs {found[1]} of memory for temporaries, and {found[2]} are there")
        unknown = ("argument_bytes", "temp_bytes", "peak_bytes", "tflop_per_step", "compute_s", "memory_s")
        unknown += ("communication_s", "roofline_step_s", "images_per_s", "collectives")
        return Forecast(**known, **dict.fromkeys(unknown), fits=False, compile_s=time.monotonic() - started)
    compile_s = time.monotonic() - started
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh + memory.generated_code_size_in_bytes
    found = hlo.collectives(program, mesh.size)
    communication = sum(
        c.wire_bytes / (chip.dcn_bandwidth if c.op == "send" else topology.ici_bandwidth(c.group)) for c in found
    )
    flops, traffic = matrix_flops(program), hlo.hbm_traffic(program) / chip.hbm_bandwidth
    step = max(flops / chip.flops, traffic, communication)
    return Forecast(
        **known,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        fits=peak <= chip.usable_bytes,
        tflop_per_step=flops / 1e12,
        compute_s=flops / chip.flops,
        memory_s=traffic,
        communication_s=communication,
        roofline_step_s=step,
        images_per_s=config.train.batch_size / step,
        collectives=[asdict(c) for c in found],
        compile_s=compile_s,
    )


@contextmanager
def compiler_settings(effort: str) -> Iterator[None]:
    """The optimisation level, and no cache: what is cached for chips that are not here cannot be read back."""
    wanted = {"jax_enable_compilation_cache": False} | ({"jax_optimization_level": effort} if effort else {})
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it asks only once whether it is wanted
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def optimized_text(dump: Path) -> str:
    """The compiled program from what the compiler left in a folder.

    `jax.stages.Compiled.as_text` reads it through jaxlib, which fails on what a newer libtpu writes.
    """
    return next(dump.glob("*.after_optimizations.txt")).read_text()


def largest_batch(forecast_of: Callable[[int], Forecast], unit: int, start: int) -> Forecast:
    """The forecast with the largest batch that fits, by doubling and halving; of one unit if not even that fits.

    Args:
      forecast_of: global batch -> its forecast.
      unit: the least batch, one example for each micro-batch of each device that the batch is split over.
      start: where to begin.
    """
    count, low, too_many, best = max(1, start // unit), 0, None, None
    while True:
        tried = forecast_of(count * unit)
        if tried.fits:
            best, low = tried, count
        else:
            too_many = count
        if too_many == 1:
            return tried
        if too_many == low + 1:
            return best
        count = 2 * low if too_many is None else (low + too_many) // 2


@contextmanager
def ticking(say: Callable[[str], None], seconds: float = 30.0) -> Iterator[None]:
    """Says every so often how long it has been compiling: the compiler itself is silent."""
    finished, started = threading.Event(), time.monotonic()

    def tick() -> None:
        while not finished.wait(seconds):
            say(f"compiling for {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
