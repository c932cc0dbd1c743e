"""Ahead-of-time (AOT) compilation of the training step for TPU slices, and a forecast of memory and speed from it.

The environment must contain `forecast.chips.COMPILE_ONLY` before jax is imported.
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

from simvlg_jax.data import packing
from simvlg_jax.data.batch import Pack
from simvlg_jax.evaluation import cost
from simvlg_jax.forecast import hlo
from simvlg_jax.forecast.chips import Topology, parse_topology
from simvlg_jax.forecast.hlo_flops import matrix_flops
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError

TEXT_TOKENS = 14.0  # of COCO's captions, which have 10.5 words on average, with start and end
DEVIATION = 0.2  # of caption lengths, as a share of their mean; COCO's


@dataclass(frozen=True)
class Forecast:
    """Resources of one step. Bytes, TFLOP and seconds are per chip. Unknown values are None.

    Attributes:
      text_tokens: assumed mean of a caption.
      padding: share of the language model's tokens that hold no token of such captions; None without captions.
      peak_bytes: memory of arguments, temporaries, results without a donated buffer, and the program.
      hbm_bytes: memory of the chip that the compiler may use.
      fits: whether peak_bytes is at most hbm_bytes.
      tflop_per_step: of the compiled matrix products, including recomputed ones and those replicated on several chips.
      int8_top_per_step: of the products of int8 and int8, in 10^12 operations. They are not in tflop_per_step.
      compute_s, memory_s, communication_s: time of the FLOPs, of the memory traffic and of the collectives at the peak
        speed of the chip; see `forecast.chips`.
      roofline_step_s: the longest of these three, a lower bound of the step time.
      images_per_s: over all chips, at the roofline.
      collectives: op, count, bytes and chips per group.
    """

    config: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    global_batch: int
    micro_batches: int
    text_tokens: float
    padding: float | None
    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    hbm_bytes: int
    fits: bool
    tflop_per_step: float | None
    int8_top_per_step: float | None
    compute_s: float | None
    memory_s: float | None
    communication_s: float | None
    roofline_step_s: float | None
    images_per_s: float | None
    collectives: list[dict] | None
    compile_s: float

    def as_dict(self) -> dict:
        return asdict(self)


def assumed_pack(config: ConfigDict, plan: Plan, text_tokens: float) -> Pack | None:
    """Returns the packs of a run whose captions have `text_tokens` tokens on average; None if it packs none."""
    micro = config.train.accumulate
    size = packing.pack_size(config.data, config.train.batch_size, meshes.batch_shards(plan.mesh), micro)
    assumed = packing.Lengths(text_tokens, DEVIATION * text_tokens, 0.0)
    return packing.plan(config.data, plan.task.batch, size, micro, lambda: assumed).pack if size else None


def padding(plan: Plan, pack: Pack | None, text_tokens: float) -> float | None:
    """Returns the share of the language model's tokens that hold nothing, if captions have `text_tokens` on average."""
    if not plan.task.captions:
        return None
    spec, visual = plan.task.batch, cost.visual_tokens(plan.tasks[-1], plan.shapes)
    room = pack.tokens / pack.examples if pack else spec.texts[spec.main_text].max_tokens
    return 1 - (visual + min(text_tokens, room)) / (visual + room)


def topology_mesh(config: ConfigDict, topology: Topology, slices: int) -> Mesh:
    """Returns the config's mesh over the chips of a topology. The chips need not be attached.

    Raises:
      UserError: libtpu is not installed or does not support the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install libtpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the compiler does not support topology {topology.name}: {str(error).splitlines()[0]}", 2
        ) from error
    return meshes.make_mesh(config.mesh, found.devices)


def forecast(
    name: str,
    config: ConfigDict,
    topology_name: str,
    slices: int = 1,
    effort: str = "",
    say: Callable = lambda _: None,
    text_tokens: float = TEXT_TOKENS,
) -> Forecast:
    """Compiles the training step, for packed captions or for the longest texts, and returns the forecast.

    Args:
      name: of the config, for the result.
      topology_name: such as "v5e:4x4".
      effort: XLA's optimisation level, "O0" to "O3"; "" is the level of training. "O0" compiles many times faster.
      say: is called with progress messages.
      text_tokens: mean of a caption, including start and end.
    """
    topology = parse_topology(topology_name)
    chip = topology.chip
    mesh = topology_mesh(config, topology, slices)
    plan = Plan(build_task(config), config, mesh)
    pack = assumed_pack(config, plan, text_tokens)
    lowered = plan.step.lower(*plan.abstract, plan.abstract_batch(config.train.batch_size, pack))
    known = dict(
        config=name,
        topology=topology_name,
        slices=slices,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        global_batch=config.train.batch_size,
        micro_batches=config.train.accumulate,
        text_tokens=text_tokens,
        padding=padding(plan, pack, text_tokens),
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
            say(f"the compiler needs {found[1]} of memory for temporaries, and {found[2]} are available")
        unknown = ("argument_bytes", "temp_bytes", "peak_bytes", "tflop_per_step", "int8_top_per_step")
        unknown += ("compute_s", "memory_s", "communication_s", "roofline_step_s", "images_per_s", "collectives")
        return Forecast(**known, **dict.fromkeys(unknown), fits=False, compile_s=time.monotonic() - started)
    compile_s = time.monotonic() - started
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh + memory.generated_code_size_in_bytes
    found = hlo.collectives(program, mesh.size)
    communication = sum(
        c.wire_bytes / (chip.dcn_bandwidth if c.op == "send" else topology.ici_bandwidth(c.group)) for c in found
    )
    (flops, int8_flops), traffic = matrix_flops(program), hlo.hbm_traffic(program) / chip.hbm_bandwidth
    compute = flops / chip.flops + int8_flops / chip.int8_flops
    step = max(compute, traffic, communication)
    return Forecast(
        **known,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        fits=peak <= chip.usable_bytes,
        tflop_per_step=flops / 1e12,
        int8_top_per_step=int8_flops / 1e12,
        compute_s=compute,
        memory_s=traffic,
        communication_s=communication,
        roofline_step_s=step,
        images_per_s=config.train.batch_size / step,
        collectives=[asdict(c) for c in found],
        compile_s=compile_s,
    )


@contextmanager
def compiler_settings(effort: str) -> Iterator[None]:
    """Sets the optimisation level and disables the compilation cache, which cannot reload AOT programs for TPUs."""
    settings = {"jax_enable_compilation_cache": False} | ({"jax_optimization_level": effort} if effort else {})
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # the cache reads its setting only once
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def optimized_text(dump: Path) -> str:
    """Returns the HLO text of the compiled program from the compiler's dump folder.

    `jax.stages.Compiled.as_text` would read it through jaxlib, which fails on the output of a newer libtpu.
    """
    return next(dump.glob("*.after_optimizations.txt")).read_text()


def largest_batch(forecast_of: Callable[[int], Forecast], unit: int, start: int) -> Forecast:
    """Searches for the largest batch that fits, by doubling and bisection.

    Args:
      forecast_of: global batch size -> forecast.
      unit: the smallest batch size: one example per micro-batch and batch shard.
      start: the first batch size to try.

    Returns:
      The forecast of the largest batch that fits, or of one unit if none fits.
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
    """Prints the time since the start of the compilation every `seconds`, since the compiler prints no progress."""
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
