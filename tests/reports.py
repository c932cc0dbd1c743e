"""Small made-up results, the reports of them, and a parser of pages."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
from PIL import Image

EVIL = "<script>alert(\"x\")</script> & 'quote' <img src=x onerror=y> \u202e 🙂"
SCORES = {"BLEU-1": 0.5, "BLEU-2": 0.4, "BLEU-3": 0.3, "BLEU-4": 0.2, "ROUGE-L": 0.45, "CIDEr": 0.831}


def png() -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_run(workdir, caption="a dog", split="test"):
    (workdir / "eval").mkdir(parents=True)
    (workdir / "vit").mkdir()
    source_map = [0, *[1 + i % 5 for i in range(16)]]
    examples = [
        {
            "id": "a",
            "references": ["a dog"],
            "caption": caption,
            "cider": 2.5,
            "image": png(),
            "source_map": source_map,
        },
        {"id": "b", "references": ["a cat", EVIL], "caption": "", "cider": 0.0},
    ]
    results = {
        "split": split,
        "step": 200,
        "num_examples": 2,
        "loss": 1.25,
        "scores": SCORES,
        "shuffled": {**SCORES, "CIDEr": 0.2},
        "exact_match": 0.5,
        "config": "",
        "examples": examples,
    }
    (workdir / "eval" / f"{split}.json").write_text(json.dumps(results))
    train = [
        {"step": s, "kind": "train", "loss": 5 / s, "lr": 1e-4, "images_per_second": 9.0} for s in range(10, 210, 10)
    ]
    val = [
        {"step": s, "kind": "eval", "split": "val", "loss": 2.0, "CIDEr": 0.4, "CIDEr_shuffled": 0.1}
        for s in (100, 200)
    ]
    lines = [json.dumps(record) for record in [*train, *val, {"step": 205, "kind": "train", "loss": float("nan")}]]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 210, "ki')
    vit = [{"step": 10, "kind": "train", "loss": 3.0}, {"step": 10, "kind": "eval", "R@1": 0.25, "R@5": 0.5}]
    (workdir / "vit" / "metrics.jsonl").write_text("\n".join(map(json.dumps, vit)))
    (workdir / "config.json").write_text(json.dumps({"data": {"name": "openmoji"}, "vit.size": "tiny", "seed": 1}))


class Page(HTMLParser):
    """Parses a page into tags with attributes and text; the page must be well nested."""

    VOID = frozenset(["meta", "img", "input", "br", "link"])

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def write_results(folder, split="test", /, **results):
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "eval" / f"{split}.json").write_text(json.dumps({"split": split, **results}))


def example(number, **values):
    return {"index": number, "id": str(number), "references": ["a dog"], "caption": "a cat", "loss": 1.0} | values
