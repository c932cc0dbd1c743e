"""The whole training step: time, compilation, FLOPs, memory and a trace."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from simvlg_jax.benchmark.setting import Setting
from simvlg_jax.benchmark.timing import median_seconds
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.metrics_log import memory_gb
from simvlg_jax.utils.errors import UserError

TRACED = 3  # steps


@dataclass
class Step:
    """The compiled step of a setting. Each call takes the next step on the same batch.

    Attributes:
      flops: of its matrix products, over all devices.
      compile_seconds: of tracing and compiling.
    """

    setting: Setting
    batch: dict[str, jax.Array]
    program: Callable
    flops: int
    compile_seconds: float

    def __call__(self) -> tuple:
        """Starts a step and returns its arrays, which may not be computed yet."""
        setting = self.setting
        setting.state, metrics = self.program(setting.state, setting.frozen, self.batch)
        return setting.state, metrics

    def seconds(self, repeats: int) -> float:
        return median_seconds(self, repeats)


def compile_step(setting: Setting, batch: dict[str, jax.Array]) -> Step:
    start = time.perf_counter()
    traced = setting.plan.step.trace(setting.state, setting.frozen, batch)
    program = traced.lower().compile()
    return Step(setting, batch, program, count_flops(traced.jaxpr), time.perf_counter() - start)


def memory() -> tuple[float, str]:
    """Returns the peak memory so far in GB, and of what: a device, or on a CPU the process."""
    of_device = "peak_bytes_in_use" in (jax.local_devices()[0].memory_stats() or {})
    return memory_gb(), "device" if of_device else "process"


def check_folder(folder: Path) -> None:
    """Makes the folder of a trace. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trace cannot write to {folder}: {error.strerror}; name another folder", 2) from error


def write_trace(step: Step, folder: Path) -> None:
    """Writes a profile of TRACED steps."""
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        for number in range(TRACED):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                jax.block_until_ready(step())


def how_to_open(folder: Path) -> str:
    files = sorted(folder.glob("plugins/profile/*/perfetto_trace.json.gz"))
    return (
        f"trace of {TRACED} steps in {folder}. Open {files[-1] if files else 'perfetto_trace.json.gz'} on "
        f"https://ui.perfetto.dev, or: pip install tensorboard xprof; tensorboard --logdir {folder}"
    )
