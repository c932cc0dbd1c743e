"""Makes questions with answers about the OpenMoji pictures, and prepares them for training (docs/questions.md).

    python -m simvlg_jax.data.openmoji.questions --output data/openmoji_questions

The folder DIR/source gets what a user's data would be: pictures, and a list of questions for each split in the format
of LAVIS. DIR gets what `python -m simvlg_jax.data.prepare --source DIR/source/train.json --output DIR` makes of them.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.data.openmoji.answers import QUESTIONS, ask
from simvlg_jax.data.openmoji.prepare import prepare_openmoji
from simvlg_jax.data.openmoji.splits import SPLITS, fraction
from simvlg_jax.utils.errors import run_verb
from simvlg_jax.utils.files import atomic_write

# About so many questions of one kind are kept, and of each answer at most its even share, so that no answer is common.
MOST = {"train": 300, "val": 100, "test": 100, "novel": 100}

Row = dict[str, str]


def questions_of(pictures: Iterable[tuple[str, str]], most: int) -> list[Row]:
    """Returns rows with image, question, answer and question_id, in an order that mixes the kinds.

    Which are kept and their order depend on hashes of their ids only.

    Args:
      pictures: (id, caption) of a split.
      most: questions of one kind, divided evenly among the answers to it.
    """
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for name, caption in pictures:
        for kind, answer in ask(name.upper().split("-"), caption).items():
            row = {"image": f"pictures/{name}.png", "question": QUESTIONS[kind], "answer": answer}
            found[kind][answer].append(row | {"question_id": f"{kind}-{name}"})
    kept = []
    for answers in found.values():
        for rows in answers.values():
            kept += sorted(rows, key=_place)[: -(-most // len(answers))]
    return sorted(kept, key=_place)


def _place(row: Row) -> float:
    return fraction(row["question_id"])


def write_source(data_dir: str, folder: Path) -> Iterator[str]:
    """Writes pictures and a list of each split below `folder`, and yields the name of the split."""
    # Late: the sources import TFDS.
    from simvlg_jax.data.sources import load_source

    prepare_openmoji(data_dir)
    for split in SPLITS:
        source = load_source(ConfigDict({"name": "openmoji", "dir": data_dir}), split)
        records = [source[index] for index in range(len(source))]
        rows = questions_of([(record["id"], record["caption"]) for record in records], MOST[split])
        asked = {row["image"] for row in rows}
        for record in records:
            if (image := f"pictures/{record['id']}.png") in asked:
                _write(folder / image, record["image"])
        _write(folder / f"{split}.json", json.dumps(rows, indent=1).encode())
        yield split


def _write(path: Path, content: bytes) -> None:
    """Leaves a file with this content as it is."""
    if not path.exists() or path.read_bytes() != content:
        with atomic_write(path) as partial:
            partial.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.data.openmoji.questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="data/openmoji_questions", metavar="DIR", help="folder of the data")
    parser.add_argument("--data_dir", default="data", help="folder of the pictures, rendered if absent (default: data)")
    given = parser.parse_args()
    from simvlg_jax.data.preparing.run import Settings, prepare

    folder = Path(given.output) / "source"
    for split in write_source(given.data_dir, folder):
        summary = prepare(Settings([str(folder / f"{split}.json")], given.output, "lavis", split))
        print(f"{split}: {summary}")


if __name__ == "__main__":
    run_verb(main)
