"""The table of evaluators. To add one, write a file with a class like `Captioning` and add a line here."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.config.defaults import get_eval
from simvlg_jax.evaluation.captioning import Captioning
from simvlg_jax.evaluation.choices import Choices
from simvlg_jax.evaluation.evaluator import Evaluator
from simvlg_jax.evaluation.order import Order
from simvlg_jax.evaluation.questions import Questions
from simvlg_jax.evaluation.retrieval import Retrieval
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError

EVALUATORS = {
    "captioning": Captioning,
    "choices": Choices,
    "order": Order,
    "questions": Questions,
    "retrieval": Retrieval,
}

# Key of an entry -> the one type that reads it.
TYPE_OF = dict(extra_scores="captioning", lemmatise="questions", choices="choices", ranking="choices")


def make_evaluator(name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh) -> Evaluator:
    """Returns the evaluator of an entry of `config.evals`.

    Raises:
      UserError: the type is unknown or does not fit the task or a key, or the data cannot be read.
    """
    type_name = entry.type or task.evaluator
    kind = lookup(EVALUATORS, f"evals.{name}.type", type_name)
    for key, only in TYPE_OF.items():
        if type_name != only and entry[key] != get_eval()[key]:
            raise UserError(f"evals.{name}.{key} is for the type {only}, and the type is {type_name}", 2)
    return kind(name, entry, task, config, mesh)


def make_evaluators(task: Task, config: ConfigDict, mesh: Mesh) -> list[Evaluator]:
    """Returns the evaluators of `config.evals` that run during training.

    Raises:
      UserError: as `make_evaluator`, or `train.best_by` names none of them.
    """
    due = {name: entry for name, entry in config.evals.items() if entry.every}
    if due:
        lookup(due, "train.best_by", config.train.best_by)
    try:
        evaluators = [make_evaluator(name, entry, task, config, mesh) for name, entry in due.items()]
        best = next((one for one in evaluators if one.name == config.train.best_by), None)
        if best is not None and not best.data.has_references:
            raise UserError(
                f"train.best_by is {best.name!r}, whose records have no captions or answers, so that it has no score", 2
            )
        return evaluators
    except UserError as error:
        off = " ".join(f"--config.evals.{name}.every=0" for name in due)
        raise UserError(f"{error}\nor train without evaluation: {off}", error.status) from error
