"""Self-critical sequence training (SCST): the model learns from captions that it writes itself and that are scored."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simvlg_jax.tasks.caption import CAPTION, caption_task, with_budget
from simvlg_jax.tasks.task import Arrays, Losses, Params, Task
from simvlg_jax.utils.errors import UserError

REWARD, SPREAD = "reward", "reward_spread"


def scst_task(config: ConfigDict) -> Task:
    """The caption task's model, which learns to prefer those of its own captions that score high.

    Before each step the model writes `train.beams` captions of each picture by beam search, and each gets its CIDEr-D
    as reward R (`training.rollout`). With s, the mean log probability of a caption's tokens, the loss is

        -mean(s * (R - mean of R over the beams of the picture))

    over all captions of the global batch, as in the authors' example (github.com/yiren-jian/scst-example). SCST
    (arXiv 1612.00563) takes the reward of the greedy caption where this takes the mean over the beams.

    The tokens of a caption include its end token. One that reached the maximum length has none. There is no dropout:
    the model that learns is the one that wrote.
    """
    check(config)
    caption = caption_task(config)

    def losses(params: Params, batch: Arrays, key: jax.Array | None) -> Losses:
        if key is None:
            return caption.losses(params, batch, None)
        arrays = (batch[name] for name in ("image", *CAPTION))
        nats, tokens = caption.model.apply({"params": params}, *arrays, method="several_losses")
        reward = batch["reward"]
        score = -nats / jnp.maximum(tokens, 1.0)
        above = reward - reward.mean(1, keepdims=True)
        return Losses({"scst": -(score * above).mean(1), REWARD: reward.mean(1), SPREAD: reward.std(1)})

    def counts(batch: Arrays, training: bool) -> dict[str, jax.Array]:
        if not training:
            return caption.counts(batch, False)
        return dict.fromkeys(("scst", REWARD, SPREAD), batch["weight"])

    return dataclasses.replace(
        caption,
        batch=dataclasses.replace(caption.batch, beams=config.train.beams),
        losses=losses,
        counts=counts,
        weights={"scst": 1.0},
        elastic=[scst_task(with_budget(config, tokens)) for tokens in sorted(config.connector.budgets)],
    )


def check(config: ConfigDict) -> None:
    """Raises UserError (status 2) for what this task does not have."""
    for key, reason in {
        "data.pack": "the captions are the model's own and are not packed",
        "data.prompt": "the model writes without prompts of the data, though llm.prompt works",
        "train.beta": "the contrastive loss is for the caption task",
    }.items():
        group, name = key.split(".")
        if config[group][name]:
            raise UserError(f"{key} has no use in the task scst ({reason}): leave it at its default", 2)
