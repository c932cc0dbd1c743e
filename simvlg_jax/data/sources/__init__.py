"""Data sources, interchangeable by `data.name`. A new one is a module here and a line in SOURCES."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.data import transforms
from simvlg_jax.data.captions import CLEANERS, CaptionError, Cleaner, well_formed
from simvlg_jax.data.sources.folder import FolderSource
from simvlg_jax.data.sources.openmoji import OpenMojiSource
from simvlg_jax.data.sources.prepared import PreparedSource
from simvlg_jax.data.sources.source import Record, RecordInfo, Source
from simvlg_jax.data.sources.synthetic import SyntheticSource
from simvlg_jax.data.sources.tfds import TfdsSource
from simvlg_jax.utils.errors import UserError

__all__ = ["SOURCES", "Record", "RecordInfo", "Source", "check_unique_ids", "load_source", "name_of", "test_splits"]

# Each class implements `Source`, is opened as CLASS(data_config, split, training), and names its SPLITS (empty if they
# differ from data set to data set, and the class checks them) and those that are scored by default, TEST_SPLITS.
SOURCES = {
    "openmoji": OpenMojiSource,
    "folder": FolderSource,
    "prepared": PreparedSource,
    "synthetic": SyntheticSource,
    "tfds": TfdsSource,
}


MAX_CHARACTERS = 10_000  # of a text; the rest is cut off, since some tokenizers take seconds for a huge one
QUESTION_PROMPT = "Question: {} Short answer:"  # published


@dataclass(frozen=True)
class TextSource:
    """Cleans the captions and questions of a source and adds the prompts; references of captions stay as they are.

    The answers to a question are its references and its choices. Its caption is the most frequent one, the first of
    equally frequent ones.

    Attributes:
      prompt: `data.prompt`.
      training: whether a record without a caption is an error.
    """

    source: Source
    clean: Cleaner
    prompt: str
    training: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """Raises one of `transforms.UNREADABLE`: those of the source, or CaptionError.

        Raises UserError (status 2) if the prompt is for records with questions and this one has none, or vice versa.
        """
        record = self.source[index]
        question = record.get("question")
        if self.prompt and ("{}" in self.prompt) != (question is not None):
            has, fix = ("no", "without") if question is None else ("a", "with one")
            raise UserError(
                f"data.prompt is {self.prompt!r}, and record {index} has {has} question: give a prompt {fix} {{}}, "
                "where the question is put",
                2,
            )
        if question is None:
            texts = record.get("choices", [record["caption"]])
            texts = [self.clean.caption(self._checked(text, "caption")) for text in texts]
            prompt = {"prompt": self.prompt} if self.prompt else {}
            choices = {"choices": texts} if "choices" in record else {}
            return {**record, "caption": texts[0], **choices, **prompt}
        question = self._checked(question, "question")
        answers = [self._checked(answer, "answer") for answer in record["references"]]
        if self.training and not answers:
            raise CaptionError("the question has no answer")
        caption = Counter(answers).most_common(1)[0][0] if answers else ""
        texts = {"references": answers, "choices": answers, "caption": caption}
        return {**record, **texts, "prompt": prompt_of(question, self.clean, self.prompt)}

    def _checked(self, text: str, what: str) -> str:
        if self.training and not text.strip():
            raise CaptionError(f"the {what} is empty")
        return _usable(text)

    def info(self, index: int) -> RecordInfo:
        info = self.source.info(index)
        prompt = self.prompt if info.question is None else prompt_of(info.question, self.clean, self.prompt)
        return info._replace(prompt=prompt)

    @property
    def prefetch(self):
        """The method of the source, or None."""
        return getattr(self.source, "prefetch", None)


def prompt_of(question: str, clean: Cleaner, prompt: str = "") -> str:
    """`prompt` (`data.prompt`), or the published one, with the cleaned question in the place of its {}."""
    return (prompt or QUESTION_PROMPT).replace("{}", clean.question(_usable(question)))


def _usable(text: str) -> str:
    return well_formed(text[:MAX_CHARACTERS])


def load_source(data_config: ConfigDict, split: str, training: bool = False) -> Source:
    """Opens one split of the data set `data_config.name`, cleaned by `data_config.clean`, with `data_config.prompt`.

    Args:
      training: gives one record for each caption, instead of one for each picture with all its captions as references.

    Raises:
      UserError: the data set, the split or the cleaning is unknown, or the data are absent or malformed.
    """
    clean = lookup(CLEANERS, "data.clean", data_config.get("clean", ""))
    kind = lookup(SOURCES, "data.name", data_config.name)
    if kind.SPLITS and split not in kind.SPLITS:
        raise UserError(
            f'the data set "{data_config.name}" has no split "{split}"; it has {", ".join(kind.SPLITS)}', status=2
        )
    return TextSource(kind(data_config, split, training), clean, data_config.get("prompt", ""), training)


def test_splits(data_config: ConfigDict) -> list[str]:
    """The splits of the data set that are scored by default."""
    return list(lookup(SOURCES, "data.name", data_config.name).TEST_SPLITS)


def name_of(source: Source, index: int) -> str | None:
    """The id of a record, or None if it cannot be read either."""
    try:
        return source.info(index).id
    except (AttributeError, *transforms.UNREADABLE):  # not every source has ids
        return None


def check_unique_ids(ids: Sequence[str]) -> None:
    """Raises UserError if two records share an id: scores go by id, so one record would hide the other."""
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        others = f", and {len(twice) - 1} more ids are shared" if len(twice) > 1 else ""
        raise UserError(
            f"two pictures of this split have the id {twice[0]!r}{others}; scores go by id, so give each picture its "
            "own id, and a picture with several captions one record with all of them as references"
        )
