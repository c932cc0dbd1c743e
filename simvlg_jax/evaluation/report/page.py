"""Writes report.html: the training curves, scores and captions of a run.

The report is one self-contained file, including pictures and curves. It is made from config.json, metrics.jsonl and
eval/SPLIT.json in the workdir, and from vit/metrics.jsonl if a vision encoder was trained first. It names the parts
that are missing.
"""

import base64
import io
import json
import math
import platform
from importlib import metadata
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from simvlg_jax.evaluation.report import charts
from simvlg_jax.evaluation.report.merge_map import merge_map
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError

_SPLITS = ("test", "novel", "val", "train")  # in the order of the report; other splits follow
_PACKAGES = ("simvlg_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers")


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html atomically and returns its path.

    Raises:
      UserError: there is no such workdir, or a results file in it is not valid JSON.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no run at {workdir}: --workdir takes the folder of a simvlg_jax.train run")
    config = _flat(_read_json(workdir / "config.json") or {})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simvlg_jax.evaluation.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    splits = [_split(path) for path in _result_files(workdir)]
    page = environment.get_template("page.html.j2").render(
        name=workdir.resolve().name,
        config=config,
        splits=splits,
        top_cider=max([1e-9, *(s[kind].get("CIDEr", 0.0) for s in splits for kind in ("scores", "shuffled"))]),
        curves=_curves(files.read_metrics(workdir / "metrics.jsonl"), config.get("train.best_by", "val")),
        vit_curves=_curves(files.read_metrics(workdir / "vit" / "metrics.jsonl"), "val"),
        versions=_versions(),
        chart=charts,
    )
    path = workdir / "report.html"
    with files.atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _curves(records: list[dict], best_by: str) -> list[charts.Chart]:
    """Returns the charts that the records of a captioning or contrastive run have values for.

    Args:
      best_by: name of the evaluation that is drawn.
    """
    records = [record for record in records if record.get("split", best_by) == best_by]

    def points(kind: str, key: str, scale: float = 1.0) -> list[tuple[int, float]]:
        chosen = [r for r in records if r.get("kind") == kind and isinstance(r.get(key), int | float)]
        return [(r["step"], r[key] * scale) for r in chosen]

    loss = points("train", "loss")
    made = [
        charts.line_chart(
            "Loss", {"each step": loss, "smoothed": charts.smoothed(loss), "validation": points("eval", "loss")}
        ),
        charts.line_chart(
            "Validation CIDEr",
            {"own picture": points("eval", "CIDEr", 100), "shuffled": points("eval", "CIDEr_shuffled", 100)},
            from_zero=True,
        ),
        charts.line_chart(
            "Retrieval on validation pictures, %",
            {"R@1": points("eval", "R@1", 100), "R@5": points("eval", "R@5", 100)},
            from_zero=True,
        ),
        charts.line_chart("Learning rate", {"learning rate": points("train", "lr")}, from_zero=True),
        charts.line_chart("Pictures per second", {"training": points("train", "images_per_second")}, from_zero=True),
    ]
    return [chart for chart in made if chart]


def _result_files(workdir: Path) -> list[Path]:
    order = {split: rank for rank, split in enumerate(_SPLITS)}
    files = (workdir / "eval").glob("*.json")
    return sorted(files, key=lambda path: (order.get(path.stem, len(order)), path.stem))


def _split(path: Path) -> dict:
    """Returns the values that the page shows of a results file."""
    results = _read_json(path)
    scores, shuffled = results.get("scores", {}), results.get("shuffled", {})
    cider, control = scores.get("CIDEr"), shuffled.get("CIDEr")
    examples = results.get("examples", [])
    return {
        "name": results.get("split", path.stem),
        "step": results.get("step"),
        "count": results.get("num_examples", len(examples)),
        "unreadable": len(results.get("unreadable", ())),
        "loss": results.get("loss"),
        "exact": results.get("exact_match"),
        "recall": {key: results[key] for key in ("R@1", "R@5") if key in results},
        "scores": scores,
        "shuffled": shuffled,
        "ratio": cider / control if cider is not None and control else None,
        "gallery": [_card(example) for example in examples if "image" in example],
        "examples": [_row(example) for example in examples],
    }


def _row(example: dict) -> dict:
    # Results of older versions have "cider".
    cider, references = example.get("score", example.get("cider")), example["references"]
    exact = example["caption"] in references
    # A CIDEr of 3 is a close match. An exact caption is always green, since a short one cannot reach a high CIDEr.
    merit = 1.0 if exact else min((cider or 0.0) / 3.0, 1.0) * 0.85
    return {
        "id": example.get("id", ""),
        "caption": example["caption"],
        "references": references,
        "cider": cider,
        "exact": exact,
        "hue": round(4 + 130 * math.sqrt(merit)),
    }


def _card(example: dict) -> dict:
    """Returns the values of a gallery card: those of `_row`, the picture, its merge map and the token counts."""
    card = {**_row(example), "image": example["image"], "merged": None}
    if example.get("source_map"):
        source_map = np.asarray(example["source_map"])  # (N,)
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(example["image"]))).convert("RGB"))
        buffer = io.BytesIO()
        # 128 colours are enough for flat tints and halve the size of the page.
        merge_map(picture, source_map).quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        card["merged"] = base64.b64encode(buffer.getvalue()).decode()
        card["patches"], card["tokens"] = math.isqrt(len(source_map)) ** 2, int(source_map.max()) + 1
    return card


def _read_json(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run simvlg_jax.evaluate again") from error


def _flat(config: dict, prefix: str = "") -> dict[str, object]:
    """Flattens {"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
