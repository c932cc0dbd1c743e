"""Elastic merging: a run that draws one of several numbers of visual tokens for each step."""

import functools

import jax
import numpy as np
import pytest

from simvlg_jax.config.load import load_config, override
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.elastic import drawn
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.training.plan import Plan
from simvlg_jax.training.trainer import Trainer
from simvlg_jax.utils.errors import UserError

BUDGETS, STEPS = (9, 5), 3  # in any order


def config_of(*flags, budgets=BUDGETS):
    own = ["mesh.fsdp=1", "train.steps=4", f"connector.budgets={budgets}"]
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in (*own, *flags)])


def test_budgets_are_drawn_from_seed_and_step_alone_and_equally_often():
    draws = [drawn(42, number, 3) for number in range(3000)]
    assert draws == [drawn(42, number, 3) for number in range(3000)]
    assert draws[:50] != [drawn(43, number, 3) for number in range(50)]
    assert np.bincount(draws) == pytest.approx([1000] * 3, abs=100)
    assert {drawn(42, number, 1) for number in range(9)} == {0}


def test_a_step_is_that_of_the_model_with_the_budget_drawn_for_it_also_after_resuming(tmp_path):
    config = config_of("data.pack=2", "mesh.data=2")
    trainer, checkpoints = Trainer(config, tmp_path), Checkpoints(tmp_path)
    assert len(trainer._programs) == 2  # both were compiled while the weights were initialised

    @functools.cache
    def plain(tokens):
        alone = override(config, ["--config.connector.budgets=()", f"--config.connector.tokens={tokens}"])
        return Plan(build_task(alone), alone, trainer.mesh)

    taken, losses = [], []
    for number in range(STEPS):
        taken.append(sorted(BUDGETS)[drawn(config.seed, number, 2)])
        batch = meshes.put_batch(trainer.next_batch(), trainer.mesh)
        before = jax.tree.map(lambda x: x.copy(), trainer.state)
        wanted, metrics = plain(taken[-1]).step(before, trainer.frozen, batch)
        losses.append(float(trainer.run_step(batch)["loss"]))
        assert losses[-1] == float(metrics["loss"])
        assert fingerprint(trainer.state.params) == fingerprint(wanted.params)
        if number == 0:
            checkpoints.save(1, trainer.state, trainer.position)
    assert set(taken) == set(BUDGETS) and len(trainer._programs) == 2

    resumed = Trainer(config, tmp_path, checkpoints)
    checkpoints.close()
    for loss in losses[1:]:
        batch = meshes.put_batch(resumed.next_batch(), resumed.mesh)
        assert float(resumed.run_step(batch)["loss"]) == loss
    assert fingerprint(resumed.state) == fingerprint(trainer.state)


@pytest.mark.parametrize(("flags", "tokens"), [([], 9), (["connector.tokens=7"], 7)])
def test_all_but_training_takes_the_largest_budget_or_tokens(flags, tokens):
    config = config_of(*flags)
    plan = Plan(build_task(config), config, meshes.make_mesh(config.mesh))
    left = [17 - sum(task.model.connector.merges) for task in (plan.task, *plan.tasks)]
    assert left == [tokens, 5, 9] and plan.step is plan.steps[1]


def test_another_schedule_replaces_the_budgets():
    config = config_of()
    model = CaptionModel(config, build_task(config), {})
    for schedule, merges in ((dict(tokens=5), (8, 4)), (dict(r=3), (3, 3))):
        task = model.with_merging(**schedule).task
        assert task.model.connector.merges == merges and not task.elastic


@pytest.mark.parametrize(
    ("flags", "budgets", "message"),
    [
        ([], (4, 4), r"connector\.budgets is \(4, 4\); it takes different numbers"),
        ([], (0, 4), "different numbers of tokens, such as"),
        (["connector.r=2"], BUDGETS, r"connector\.r and connector\.budgets both set the merges"),
        ([], (1, 9), r"connector\.tokens: 17 tokens cannot become 1"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(flags, budgets, message):
    with pytest.raises(UserError, match=message):
        build_task(config_of(*flags, budgets=budgets))
