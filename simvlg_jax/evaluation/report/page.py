"""Writes report.html: the training curves, scores and captions of a run.

The report is one self-contained file, including pictures and curves. It is made from config.json, metrics.jsonl and
eval/SPLIT.json in the workdir, and from vit/metrics.jsonl if a vision encoder was trained first. It names the parts
that are missing.
"""

import json
import platform
from importlib import metadata
from pathlib import Path

import jinja2

from simvlg_jax.config.defaults import get_config
from simvlg_jax.evaluation.report import charts
from simvlg_jax.evaluation.report.curves import curves
from simvlg_jax.evaluation.report.pictures import data_url
from simvlg_jax.evaluation.report.results import flat, read_config, read_splits, score_text
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError

_PACKAGES = ("simvlg_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers")


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html atomically and returns its path.

    Raises:
      UserError: there is no such workdir, or a results file in it is not valid JSON.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no run at {workdir}: --workdir takes the folder of a simvlg_jax.train run")
    config = read_config(workdir)
    splits = read_splits(workdir)
    content = render(
        "page.html.j2",
        name=workdir.resolve().name,
        config=config,
        splits=splits,
        changed=_changed(config),
        tops=tops_of(splits),
        curves=curves(workdir, config.get("train.best_by", "val")),
        vit_curves=curves(workdir / "vit", "val"),
        versions=_versions(),
    )
    return write_page(workdir / "report.html", content)


def render(template: str, **values: object) -> str:
    """Returns a page made from a template of this folder; text in the values is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simvlg_jax.evaluation.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"chart": charts, "data_url": data_url, "score_text": score_text}
    return environment.get_template(template).render(**values)


def write_page(path: Path, content: str) -> Path:
    """Writes a page atomically and returns its path."""
    with files.atomic_write(path) as partial:
        partial.write_text(content, encoding="utf-8")
    return path


def tops_of(splits: list[dict]) -> dict[str, float]:
    """Returns {headline: the value that a full bar stands for}: 1 for shares, the highest for other scores."""
    tops: dict[str, float] = {}
    for split in splits:
        if split["score"] is not None:
            name = split["headline"]
            values = [split["score"], split["control"] or 0.0, *(split["interval"] or ())]
            tops[name] = 1.0 if score_text(name, 0).endswith("%") else max(tops.get(name, 1e-9), *values)
    return tops


def default_config() -> dict[str, object]:
    """Returns {"a.b": default} of every key."""
    return flat(json.loads(get_config().to_json()))


def _changed(config: dict[str, object]) -> list[tuple[str, object, object]]:
    """Returns (key, value, default) of each key of a flat config that is not at its default."""
    usual = default_config()
    return [(key, value, usual.get(key, "none")) for key, value in config.items() if value != usual.get(key)]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
