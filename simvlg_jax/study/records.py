"""The record of a run: one small JSON file with all that the comparison's page needs.

Records can be kept without the runs: what has a record is not trained again.
"""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

import flax.linen as nn
import jax

from simvlg_jax.evaluation.cost import visual_tokens
from simvlg_jax.study.costs import Point
from simvlg_jax.study.plan import Arm, Study
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import write_json

KEPT = ("headline", "scores", "shuffled", "interval", "loss", "num_examples", "visual_tokens")  # of eval/SPLIT.json


def is_record_of(path: Path, study: Study, arm: Arm) -> bool:
    """Returns whether a run has been recorded.

    Raises:
      UserError (status 2): it has been, with other settings.
    """
    if not path.exists():
        return False
    if (found := read_record(path)["plan"]) != (wanted := _plan(study, arm)):
        keys = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise UserError(f"{path} is of another comparison ({keys} differ): delete it, or take another --workdir", 2)
    return True


def read_record(path: Path) -> dict:
    """Returns a record. Raises UserError if the file is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"plan": record["plan"], "curve": [Point(**point) for point in record["curve"]]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no record of a run ({error}): delete it, and the run is made again") from error


def write_record(
    path: Path,
    study: Study,
    arm: Arm,
    seed: int,
    chosen: list[float | None],
    ends: list[Point],
    curve: list[Point],
    scores: dict[str, Path],
) -> None:
    """Writes the record of a finished run.

    Args:
      chosen: of each stage, the value of the searched key; None if nothing is searched.
      ends: the end of each stage, with the cost of the stages before it.
      curve: the evaluations of the last stage.
      scores: name -> results file.
    """
    task = build_task(study.config(arm, len(arm.stages) - 1))
    params = jax.eval_shape(lambda: nn.unbox(task.init(jax.random.key(0))))
    trained = [leaf.size for path, leaf in jax.tree.leaves_with_path(params) if task.is_trained(_names(path))]
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in scores.items()}
    write_json(
        path,
        {
            "plan": _plan(study, arm),
            "arm": arm.name,
            "seed": seed,
            "chosen": chosen,
            "trained_parameters": sum(trained),
            "visual_tokens": visual_tokens(task, params),
            "stages": [point._asdict() for point in ends],
            "curve": [point._asdict() for point in curve],
            "scores": {name: {key: result.get(key) for key in KEPT} for name, result in results.items()},
            "device": _device(),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax")},
        },
    )


def _plan(study: Study, arm: Arm) -> dict:
    """What makes two runs with the same seed equal."""
    return {
        "base": study.base,
        "settings": list(study.settings),
        "stages": [list(stage) for stage in arm.stages],
        "tokens": list(arm.tokens),
        "search": asdict(study.search) | {"values": list(study.search.values)},
        "splits": list(study.splits),
    }


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path)


@cache
def _device() -> str:
    """Asks another process, since this one must not hold the accelerator that the runs need."""
    script = "import jax; print(jax.device_count(), jax.devices()[0].device_kind)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
