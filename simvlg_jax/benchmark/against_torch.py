"""Compares our step with PyTorch's: first loss and gradients, then the speed in turns."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.benchmark.setting import Setting
from simvlg_jax.benchmark.step import Step
from simvlg_jax.benchmark.timing import ratios
from simvlg_jax.convert import connectors, evlgen, stacking
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import UserError

if TYPE_CHECKING:
    from simvlg_jax.benchmark.torch_step import TorchStep

# The greatest relative difference of the losses, by dtype. One bfloat16 rounding is off by up to 0.4 %.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def check(config: ConfigDict) -> None:
    """Raises UserError if the comparison is impossible: a library is missing, or PyTorch's step is another one."""
    if config.train.beta or config.train.accumulate > 1 or config.train.mean_over != "tokens":
        raise UserError(
            "--against torch compares the mean loss over the tokens of a whole batch: set --config.train.beta=0, "
            "--config.train.accumulate=1 and --config.train.mean_over=tokens",
            2,
        )
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--against torch needs {' and '.join(missing)}: pip install {' '.join(missing)}", 2)


def against_torch(step: Step, *, steps: int, rounds: int, compiled: bool, say: Callable[[str], None]) -> dict:
    """Returns what is printed of the comparison.

    Args:
      steps: that each side takes in a round, in turns.
      compiled: whether to try torch.compile.
      say: is told what is done next.

    Raises:
      UserError: the model has no PyTorch form, or the two losses differ.
    """
    import torch

    from simvlg_jax.benchmark.torch_step import TorchStep

    with tempfile.TemporaryDirectory() as folder:
        theirs = TorchStep(step.setting, Path(folder))
    agreement = compare(step, theirs)
    if theirs.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX's default
    failure = ""
    if compiled:
        say("torch.compile, which may take minutes")
        failure = theirs.compile()
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
        **agreement,
        "text_places": {"ours": int(step.batch["caption_ids"].size), "torch": theirs.tokens},
        "images_per_s": speeds,
        "ratio": {"median": middle, "least": least, "greatest": greatest},
    }


def compare(step: Step, theirs: "TorchStep") -> dict:
    """Returns both losses without dropout, and how far the gradients are apart. Raises UserError if the losses are."""
    setting = step.setting
    with jax.default_matmul_precision("highest"):
        loss, gradients = our_gradients(setting, step.batch)
    their_loss, their_gradients = theirs.gradients()
    difference, tolerance = abs(loss - their_loss) / abs(their_loss), TOLERANCE[setting.config.dtype]
    if not difference <= tolerance:
        raise UserError(
            f"the losses differ, so their times mean nothing: ours {loss:.6f}, PyTorch {their_loss:.6f}, "
            f"relative difference {difference:.1e}, allowed {tolerance:.0e}"
        )
    named = evlgen.to_evlgen(setting.task.model, stacking.stack_all(jax.device_get(gradients)))
    connector = setting.task.model.connector
    rows = connectors.of_model(connector).rows(connector)
    return {
        "loss": {"ours": loss, "torch": their_loss, "relative_difference": difference},
        "connector_gradient_difference": relative_difference(
            {row.torch: named[row.torch] for row in rows if row.torch in named}, their_gradients
        ),
        "gradient_difference": relative_difference(named, their_gradients),
    }


def our_gradients(setting: Setting, batch: dict[str, jax.Array]) -> tuple[float, dict]:
    """Returns the loss without dropout, and the gradients of the trained parameters."""
    task = setting.task

    def loss(trained: dict, frozen: dict, batch: dict) -> jax.Array:
        values = task.losses(partition.join(frozen, trained), batch, None).values["caption"]
        return values.sum() / jnp.maximum(task.counts(batch, True)["caption"].sum(), 1.0)

    value, gradients = jax.jit(jax.value_and_grad(loss))(setting.state.params, setting.frozen, batch)
    return float(value), gradients


def relative_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Returns |ours - theirs| / |theirs| over all arrays of `ours`."""
    difference = sum(float(np.square(np.asarray(ours[n], np.float32) - theirs[n]).sum()) for n in ours)
    return (difference / sum(float(np.square(theirs[n]).sum()) for n in ours)) ** 0.5


def _speed(run: Callable[[], object], wait: Callable[[], object], step: Step, steps: int) -> float:
    """Returns images per second over some steps."""
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return steps * step.setting.images / (time.perf_counter() - start)
