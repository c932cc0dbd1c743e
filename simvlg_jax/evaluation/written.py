"""What a model wrote for the records of an evaluation, and the results that need no score."""

from collections.abc import Mapping
from typing import NamedTuple

from simvlg_jax.evaluation.evaluator import Result, unreadable_metric


class Written(NamedTuple):
    """What a model wrote for the readable records, the same on every process.

    Attributes:
      loss: mean nats per target token, over all records; None if no record has a reference.
      examples: of each record, in the order of the source: what `described` says of it, caption (what the model wrote
        first), captions (all, if several) and loss (mean nats per target token, None without targets).
      unreadable: ids of the other records.
    """

    loss: float | None
    examples: list[dict]
    unreadable: list[str]

    def texts(self) -> list[tuple[str, str]]:
        """Id and text of every record, with an empty text for those that cannot be read."""
        return [(one["id"], one["caption"]) for one in self.examples] + [(name, "") for name in self.unreadable]

    def labelled(self) -> list[dict]:
        """The examples that have references, which are those that can be scored."""
        return [example for example in self.examples if example["references"]]

    def numbers(self) -> dict[str, float]:
        """Loss, if there is one, and the number of unreadable records, if any, for the log."""
        return ({} if self.loss is None else {"loss": self.loss}) | unreadable_metric(self.unreadable)

    def details(self, scores: Mapping[str, float], shown: Mapping[int, dict]) -> dict:
        """The part of eval/NAME.json that is the same for captions and answers.

        It counts the examples, and those without references ("unlabelled") if there are any.

        Args:
          scores: id -> score of each example with references.
          shown: record -> what the report shows of it.
        """
        bare = len(self.examples) - len(self.labelled())
        return {
            "num_examples": len(self.examples),
            **({"unlabelled": bare} if bare else {}),
            "unreadable": self.unreadable,
            "loss": self.loss,
            "examples": [
                {**example, "score": scores.get(example["id"]), **shown.get(example["index"], {})}
                for example in self.examples
            ],
        }

    def unscored(self, kind: str, shown: Mapping[int, dict]) -> Result:
        """The result where no record has a reference: the texts without a score.

        Args:
          kind: type of the evaluation.
        """
        return Result(None, self.numbers(), lambda: {"type": kind, "scores": {}, **self.details({}, shown)})
