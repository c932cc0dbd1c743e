"""Goes through the batches of an evaluation, and goes on where an interrupted one stopped."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from simvlg_jax.data.sources import RecordInfo, check_unique_ids
from simvlg_jax.evaluation.evaluator import EvalData
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.utils.bar import Progress
from simvlg_jax.utils.progress import Announcer


class Found(NamedTuple):
    """What the batches gave, the same on every process.

    Attributes:
      batches: JSON of each.
      examples: of the readable records, in the order of the source.
      unreadable: ids of the other records.
    """

    batches: list[dict]
    examples: list[dict]
    unreadable: list[str]


def through_batches(
    name: str,
    data: EvalData,
    announce: Announcer,
    partial: Partial | None,
    make: Callable[[dict[str, jax.Array], int], dict],
) -> Found:
    """Makes JSON of every batch.

    Args:
      name: of the evaluation.
      partial: keeps finished batches, and holds those of an interrupted evaluation. With it a bar is shown.
      make: arrays and number of a batch -> its JSON: "examples", each with its "index" and "id", and "skipped", [index,
        code] of each record that cannot be read.

    Raises:
      UserError: no record can be read, or two have one id.
    """
    batches = list(partial.batches) if partial else []
    shown = partial is not None and jax.process_index() == 0
    before = sum(len(batch["examples"]) + len(batch["skipped"]) for batch in batches)
    progress = Progress(f"scoring {name}", len(data), before, "pictures", "pictures", shown)
    try:
        count = 0
        for number, arrays in data.batches(start=len(batches)):
            length = arrays["caption_ids"].shape[1]
            with announce.first("compiling the evaluation", f"for texts of {length} tokens"):
                batch = make(arrays, number)
            batches.append(batch)
            if partial:
                partial.add(batch)
            count += len(batch["examples"]) + len(batch["skipped"])
            progress.update(count, count)
    finally:
        progress.close()
    skipped = {index: code for batch in batches for index, code in batch["skipped"]}
    examples = [example for batch in batches for example in batch["examples"]]
    unreadable = data.report_unreadable(skipped)
    check_unique_ids([example["id"] for example in examples])
    return Found(batches, sorted(examples, key=lambda example: example["index"]), unreadable)


def described(index: int, info: RecordInfo) -> dict:
    """What an example says of its record: index, id, references, and question and group if it has them."""
    optional = {"question": info.question, "group": info.extras.group}
    example = {"index": index, "id": info.id, "references": list(info.references)}
    return example | {key: value for key, value in optional.items() if value is not None}


def skipped_of(indices: list[int], codes: list[int]) -> list[list[int]]:
    """[index, code] of the records of a batch that cannot be read."""
    return [[index, code] for index, code in zip(indices, codes, strict=True) if index >= 0 and code]
