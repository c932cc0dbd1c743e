"""The tasks by name. A new one is a file with a function of a config, and a line here."""

from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.tasks.blip2_stage1 import blip2_stage1_task
from simvlg_jax.tasks.caption import caption_task
from simvlg_jax.tasks.contrastive import contrastive_task
from simvlg_jax.tasks.pformer import pformer_task
from simvlg_jax.tasks.scst import scst_task
from simvlg_jax.tasks.task import Task

TASKS = {
    "caption": caption_task,
    "scst": scst_task,
    "contrastive": contrastive_task,
    "blip2_stage1": blip2_stage1_task,
    "pformer": pformer_task,
}


def build_task(config: ConfigDict) -> Task:
    """The task that `config.task` names.

    Raises:
      UserError (status 2): no such task, or a config that it cannot be built from.
    """
    return lookup(TASKS, "task", config.task)(config)
