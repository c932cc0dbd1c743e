"""The values that the report shows of a results file, eval/NAME.json. Files of older versions have fewer keys."""

import json
import math
from collections import Counter
from pathlib import Path

from simvlg_jax.evaluation.report.merge_map import merge_map, sheet_layout
from simvlg_jax.evaluation.submissions import SUFFIXES
from simvlg_jax.utils.errors import UserError

_SPLITS = ("test", "novel", "val", "train")  # in the order of the report; other splits follow
_HEAT = 4.0  # nats of a token that is coloured most


def results_files(workdir: Path) -> list[Path]:
    """Returns the results files of a run, in the order of the report."""
    order = {split: rank for rank, split in enumerate(_SPLITS)}
    paths = (path for path in (workdir / "eval").glob("*.json") if not path.name.endswith(SUFFIXES))
    return sorted(paths, key=lambda path: (order.get(path.stem, len(order)), path.stem))


def read_splits(workdir: Path) -> list[dict]:
    """Returns the values of each results file of a run, in the order of the report."""
    return [_split(path) for path in results_files(workdir)]


def read_json(path: Path) -> dict | None:
    """Returns the content of a file of a run, or None if there is no such file.

    Raises:
      UserError: the file is not a JSON object.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run simvlg_jax.evaluate again") from error
    return content


def read_config(workdir: Path) -> dict[str, object]:
    """Returns the config of a run as {"a.b": value}, or {} without one."""
    return flat(read_json(workdir / "config.json") or {})


def flat(config: dict, prefix: str = "") -> dict[str, object]:
    """Flattens {"a": {"b": 1}} to {"a.b": 1}."""
    found = {}
    for key, value in config.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def score_text(name: str, value: float, digits: int = 1, sign: str = "") -> str:
    """Returns a score times 100 as text: "83.1" for CIDEr, which can exceed 100, and "83.1 %" for shares.

    With the sign "+", positive numbers have one.
    """
    number = f"{100 * value:{sign}.{digits}f}".replace("-", "\u2212")
    return number + ("" if name.startswith(("CIDEr", "BLEU", "ROUGE")) else " %")


def _split(path: Path) -> dict:
    results = read_json(path)
    # Results of older versions have no "headline", and those of a retrieval have no "scores".
    scores = results.get("scores") or {key: results[key] for key in ("R@1", "R@5") if key in results}
    scores = {key: value for key, value in scores.items() if key != "loss"}
    headline = results.get("headline") or next((key for key in ("CIDEr", "R@1") if key in scores), None)
    shuffled, examples = results.get("shuffled") or {}, results.get("examples", [])
    score, control = scores.get(headline), shuffled.get(headline)
    kind = results.get("type") or ("retrieval" if headline == "R@1" else "captioning")
    return {
        "name": results.get("split", path.stem),
        "type": kind,
        "seen": "clip" if any(example.get("frames") for example in examples) else "picture",
        "answers": kind in ("questions", "choices"),
        "step": results.get("step"),
        "averaged": results.get("averaged", []),
        "count": results.get("num_examples", len(examples)),
        "unreadable": len(results.get("unreadable", ())),
        "loss": results.get("loss"),
        "exact": results.get("exact_match"),
        "tokens": results.get("visual_tokens"),
        "seconds": results.get("seconds_per_picture"),
        "headline": headline,
        "score": score,
        "control": control,
        "interval": results.get("interval"),
        "ratio": score / control if score is not None and control else None,
        "scores": scores,
        "shuffled": shuffled,
        # (name, number of examples, headline score) of each
        "groups": [(name, own["num_examples"], own[headline]) for name, own in results.get("groups", {}).items()],
        "beside": [key for key in scores if key in ("BLEU-4", "ROUGE-L") or (kind != "captioning" and key != headline)],
        "gallery": [
            _card(example, headline, place) for place, example in enumerate(e for e in examples if "image" in e)
        ],
        "examples": [_row(example, headline) for example in examples],
    }


def _row(example: dict, headline: str | None) -> dict:
    """Returns the values of a row of the table of all examples."""
    score = example.get("score", example.get("cider"))  # results of older versions have "cider"
    references, caption = example["references"], example["caption"]
    if headline in (None, "CIDEr"):
        exact = caption in references
        # A CIDEr of 3 is a close match. An exact caption is always green, since a short one cannot reach a high CIDEr.
        merit = 1.0 if exact else min((score or 0.0) / 3.0, 1.0) * 0.85
    else:
        merit = min(score or 0.0, 1.0)
        exact = merit == 1.0
    return {
        "index": example.get("index"),
        "id": str(example.get("id", "")),
        "question": example.get("question"),
        "caption": caption,
        "references": references,
        "answers": Counter(references).most_common(),
        "score": score,
        "loss": example.get("loss"),
        "exact": exact,
        "hue": round(4 + 130 * math.sqrt(merit)),
        "words": " ".join([str(example.get("id", "")), example.get("question") or "", caption, *references]).lower(),
        "chip": None if score is None else f"{headline or 'CIDEr'} {score_text(headline or 'CIDEr', score, 0)}",
    }


def _card(example: dict, headline: str | None, place: int) -> dict:
    """Returns the values of a gallery card: those of `_row`, the picture, its merge map and the loss of each token."""
    row = _row(example, headline)
    source_map, frames = example.get("source_map"), example.get("frames", 0)
    rows, columns = sheet_layout(frames or 1)
    return {
        **row,
        "place": place,
        "image": example["image"],
        "frames": frames,
        "rows": rows,
        "columns": columns,
        "video": example.get("video"),
        "attention": example.get("attention"),
        "map": merge_map(example.get("layers") or [source_map], frames or 1) if source_map else None,
        # (text, nats, share of the most intense colour in %)
        "tokens": [(text, nats, _heat(nats)) for text, nats in example.get("tokens", ())],
    }


def _heat(nats: float) -> int:
    return round(100 * min(nats / _HEAT, 1)) if math.isfinite(nats) else 100
