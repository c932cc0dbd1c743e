"""Compares our step with PyTorch's: first loss and gradients, then the speed in turns."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from simvlg_jax.benchmark.step import Step
from simvlg_jax.benchmark.timing import ratios
from simvlg_jax.convert import evlgen
from simvlg_jax.utils.errors import UserError

# The greatest relative difference of the losses, by dtype. One bfloat16 rounding is off by up to 0.4 %.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def check_installed() -> None:
    """Raises UserError if a library of the comparison is missing."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--against torch needs {' and '.join(missing)}: pip install {' '.join(missing)}", 2)


def against_torch(step: Step, *, steps: int, rounds: int, compiled: bool, say: Callable[[str], None]) -> dict:
    """Returns what is printed of the comparison.

    Args:
      steps: that each side takes in a round, in turns.
      compiled: whether to try torch.compile.
      say: is told each round.

    Raises:
      UserError: the model has no PyTorch form, or the two losses differ.
    """
    check_installed()
    import torch

    from simvlg_jax.benchmark import torch_step

    with tempfile.TemporaryDirectory() as folder:
        theirs = torch_step.TorchStep(step.setting, Path(folder))
    with jax.default_matmul_precision("highest"):
        our_loss, our_gradients = torch_step.our_gradients(step.setting, step.batch)
    their_loss, their_gradients = theirs.gradients()
    difference, tolerance = abs(our_loss - their_loss) / abs(their_loss), TOLERANCE[step.setting.config.dtype]
    if not difference <= tolerance:
        raise UserError(
            f"the losses differ, so their times mean nothing: ours {our_loss:.6f}, PyTorch {their_loss:.6f}, "
            f"relative difference {difference:.1e}, allowed {tolerance:.0e}"
        )
    torch.set_float32_matmul_precision("high")  # TF32 on an NVIDIA GPU, as JAX's default
    failure = theirs.compile() if compiled else ""
    apart = torch_step.relative_difference
    step(), theirs()
    speeds: dict[str, list[float]] = {"ours": [], "torch": []}
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        speeds["ours"].append(_speed(step, lambda: jax.block_until_ready(step.setting.state), step, steps))
        speeds["torch"].append(_speed(theirs, theirs.wait, step, steps))
    middle, least, greatest = ratios(speeds["ours"], speeds["torch"])
    return {
        "torch": torch.__version__,
        "device": str(theirs.device),
        "attention": theirs.attention,
        "compiled": compiled and not failure,
        "compile_error": failure,
        "loss": {"ours": our_loss, "torch": their_loss, "relative_difference": difference},
        "connector_gradient_difference": apart(our_gradients, their_gradients, evlgen.CONNECTOR),
        "gradient_difference": apart(our_gradients, their_gradients),
        "text_places": {"ours": int(step.batch["caption_ids"].size), "torch": theirs.tokens},
        "images_per_s": speeds,
        "ratio": {"median": middle, "least": least, "greatest": greatest},
    }


def _speed(run: Callable[[], object], wait: Callable[[], object], step: Step, steps: int) -> float:
    """Returns images per second over some steps."""
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return steps * step.setting.images / (time.perf_counter() - start)
