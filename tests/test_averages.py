"""Averages of trained parameters: over the steps of a run, and over several checkpoints."""

import signal

import jax
import numpy as np
import pytest
from test_training import final_params, interrupt_at, logged, tiny

from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.training import loop, restore
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.fingerprints import fingerprint

DECAY = 0.4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the config and the workdir of a run with an average, which was interrupted and resumed."""
    workdir = tmp_path_factory.mktemp("averaged")
    config = tiny(train__steps=6, train__ema=DECAY, evals__val__every=2, train__save_every=2, train__keep_last=9)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 3)
        assert loop.train(config, workdir) == 128 + signal.SIGTERM
    assert loop.train(config, workdir) == 0
    return config, workdir


def test_the_average_is_evaluated_and_restored_and_resuming_goes_on_with_it(run, tmp_path):
    config, workdir = run
    trainer = loop.Trainer(config, tmp_path)
    average = jax.device_get(trainer.state.params)
    for step in range(6):
        trainer.run_step(meshes.put_batch(trainer.next_batch(), trainer.mesh))
        kept = min(DECAY, (1 + step) / (10 + step))
        after = jax.device_get(trainer.state.params)
        average = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * new, average, after)
    restored = {name: tree for name, tree in final_params(config, workdir).items() if name in average}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7), restored, average)
    assert fingerprint(restored) == fingerprint(trainer.state.average) != fingerprint(trainer.state.params)
    assert fingerprint({n: trainer.params[n] for n in average}) == fingerprint(trainer.state.average)
    loss = trainer.evaluators[0](trainer.params).metrics["loss"]
    assert logged(workdir, "eval")[6]["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_mean_of_checkpoints_is_the_mean_of_their_parameters(run):
    config, workdir = run
    of = {which: restore.restore_run(config, workdir, which) for which in ("2", "4", "6", "2, 6,4", "4,4")}
    one, two, three, mean, same = (jax.device_get(each.params) for each in of.values())
    jax.tree.map(lambda x, *others: np.testing.assert_allclose(x, sum(others) / 3, atol=1e-7), mean, one, two, three)
    assert fingerprint(same) == fingerprint(two) and fingerprint(mean["llm"]) == fingerprint(one["llm"])
    assert of["2, 6,4"].origin == {"step": 6, "averaged": [2, 4, 6]} and of["4,4"].origin == {"step": 4}


def test_a_run_without_an_average_has_none_in_its_checkpoints(tmp_path):
    config = tiny(train__steps=1, evals__val__every=0)
    loop.train(config, tmp_path)
    trainer = loop.Trainer(config, tmp_path)
    assert trainer.state.average is None
    paths = Checkpoints(tmp_path, read_only=True)._saved_paths(1)
    assert {path[0] for path in paths} == {"step", "params", "opt_state"}


def test_the_average_is_the_same_on_any_mesh(tmp_path):
    states = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        trainer = loop.Trainer(tiny(mesh=mesh, train__ema=DECAY), tmp_path)
        for _ in range(2):
            trainer.run_step(meshes.put_batch(trainer.next_batch(), trainer.mesh))
        kernel = trainer.state.average["connector"]["layer_0"]["mlp"]["fc1"]["kernel"]
        assert kernel.sharding == trainer.state.params["connector"]["layer_0"]["mlp"]["fc1"]["kernel"].sharding
        states.append(jax.device_get(trainer.state.average))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), *states)
