"""Training with the tiny config: what resuming, sharding, accumulating and freezing must not change."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simvlg_jax import evaluate
from simvlg_jax.config import defaults
from simvlg_jax.config.load import load_config
from simvlg_jax.evaluation.captioning import Captioning
from simvlg_jax.evaluation.evaluator import Result
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.training import checkpoint, loop, restore
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.training.frozen import check_frozen
from simvlg_jax.training.step import TrainState
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import read_metrics


def tiny(mode="", mesh=(1, 1, 1), **overrides):
    """Returns configs/tiny.py on a mesh (data, fsdp, tensor); `train__steps=3` sets train.steps."""
    overrides = {"train__log_every": 1, "evals__val__max_examples": 4, **overrides}
    overrides |= dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return load_config(f"configs/tiny.py{':' + mode if mode else ''}", flags)


def logged(workdir, kind="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["kind"] == kind}


def losses(workdir):
    return {step: line["loss"] for step, line in logged(workdir).items()}


def final_params(config, workdir):
    run = restore.restore_run(config, workdir, "latest")
    return jax.device_get(run.params)


def moments_of(trainer):
    """Returns AdamW's first moments, a tree like the trained parameters."""
    return optax.tree.get(trainer.state.opt_state, "mu")


def interrupt_at(monkeypatch, step):
    """Sends SIGTERM to this process during its `step`th step."""
    run_step, taken = loop.Trainer.run_step, []

    def run_and_interrupt(trainer, batch):
        taken.append(batch)
        if len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(trainer, batch)

    monkeypatch.setattr(loop.Trainer, "run_step", run_and_interrupt)


@pytest.mark.parametrize("mode", ["", "vit"])
def test_interrupted_and_resumed_run_is_bit_equal(tmp_path, monkeypatch, mode):
    config = tiny(mode, train__steps=9, evals__val__every=9, train__save_every=9)
    assert loop.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert loop.train(config, tmp_path / "parts") == 128 + signal.SIGTERM
    assert max(losses(tmp_path / "parts")) == 4
    assert loop.train(config, tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (final_params(config, tmp_path / name) for name in ("whole", "parts"))
    assert fingerprint(whole) == fingerprint(parts)
    assert logged(tmp_path / "parts", "eval")[9]["loss"] == logged(tmp_path / "whole", "eval")[9]["loss"]


def test_only_trained_parameters_change_and_only_they_are_optimised(tmp_path):
    config = tiny(train__steps=3)
    trainer = loop.Trainer(config, tmp_path)
    before_frozen = fingerprint(trainer.frozen)
    before = jax.device_get(trainer.state.params)
    for _ in range(3):
        trainer.run_step(meshes.put_batch(next(trainer.iterator), trainer.mesh))
    assert set(trainer.frozen) == {"vit", "llm"}
    assert set(before) == {"ln_vision", "connector", "llm_proj"}
    assert fingerprint(trainer.frozen) == before_frozen
    moments = moments_of(trainer)
    assert jax.tree.structure(moments) == jax.tree.structure(before)
    unchanged = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(trainer.state.params), strict=True
        )
        if np.array_equal(old, new)
    ]
    key_biases = [f"['connector']['layer_{i}']['key']['bias']" for i in range(2)]  # softmax takes them out
    assert unchanged == key_biases


def test_every_evaluation_of_the_config_runs_when_it_is_due_and_one_chooses_the_best(tmp_path):
    config = tiny(train__steps=4, evals__val__every=2)
    with config.unlocked():
        config.evals.seen = defaults.get_eval()
        config.evals.seen.update(split="train", every=4, max_examples=3)
        config.evals.verb = defaults.get_eval()
        config.evals.verb.update(split="test", every=0)
        config.train.best_by = "verb"
    with pytest.raises(UserError, match=r"train\.best_by is 'verb'; it takes 'seen', 'val'"):
        loop.train(config, tmp_path)
    with config.unlocked():
        config.train.best_by = "val"
    assert loop.train(config, tmp_path) == 0
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "eval"]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "val"), (4, "seen"), (4, "val")]
    assert list(evaluate.evaluations(config, [], {})) == ["test", "verb"]
    assert list(evaluate.evaluations(config, ["train"], {})) == ["train"]


def test_losses_do_not_depend_on_the_mesh(tmp_path):
    """One process uses all axes at once. test_processes.py tests each preset in several processes, with validation."""
    for name, mesh in (("one", (1, 1, 1)), ("many", (2, 2, 2))):
        loop.train(tiny(mesh=mesh, train__steps=4, evals__val__every=0), tmp_path / name)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-5)


def test_parameters_and_moments_are_really_split(tmp_path):
    trainer = loop.Trainer(tiny(mesh=(2, 2, 2)), tmp_path)
    kernel = trainer.state.params["connector"]["layer_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    moment = moments_of(trainer)["connector"]["layer_0"]["mlp"]["fc1"]["kernel"]
    assert moment.sharding == kernel.sharding
    embedding = trainer.frozen["llm"]["embedding"]
    assert embedding.addressable_shards[0].data.size * 4 == embedding.size


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    params = []
    for accumulate in (1, 4):
        config = tiny(train__accumulate=accumulate, connector__dropout=0.0)
        trainer = loop.Trainer(config, tmp_path)
        trainer.run_step(meshes.put_batch(next(trainer.iterator), trainer.mesh))
        params.append(jax.device_get(moments_of(trainer)))
    flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in params]
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-5 * np.linalg.norm(flat[0])


def test_one_batch_is_learnt_by_heart(tmp_path):
    loop.train(tiny("overfit", train__log_every=50), tmp_path)
    assert list(losses(tmp_path).values())[-1] < 0.05


def test_loss_that_is_not_finite_stops_with_the_step_and_saves_nothing_bad(tmp_path):
    config = tiny(optimizer__lr=1e38, optimizer__warmup_lr=1e38, train__steps=8, train__save_every=4)
    with pytest.raises(UserError, match=r"not finite at step [234]\b"):
        loop.train(config, tmp_path)
    assert Checkpoints(tmp_path, read_only=True).latest() is None


def test_best_checkpoint_survives_and_is_the_one_used(tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    monkeypatch.setattr(Captioning, "__call__", lambda *_: Result(next(scores), {"loss": 1.0}, dict))
    config = tiny(train__steps=5, evals__val__every=1, train__save_every=1, train__keep_last=2)
    loop.train(config, tmp_path)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [2, 4, 5]
    assert restore.restore_run(config, tmp_path, "best").step == 2


def test_checkpoint_without_its_last_file_does_not_count_and_is_written_anew(tmp_path):
    def save(step):
        checkpoints = Checkpoints(tmp_path, keep_last=2)
        checkpoints.save(step, TrainState(jnp.int32(step), {"x": jnp.full(3, step)}, {}), {"step": step})
        checkpoints.close()

    save(1)
    save(2)
    (tmp_path / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert Checkpoints(tmp_path, read_only=True).latest() == 1
    save(2)
    restored = Checkpoints(tmp_path).restore_newest(TrainState(jnp.int32(0), {"x": jnp.zeros(3, jnp.int32)}, {}))
    np.testing.assert_array_equal(restored.state.params["x"], 2)
    assert restored.step == 2 and restored.position == {"step": 2}


def test_workdir_of_another_config_is_refused(tmp_path):
    loop.train(tiny(train__steps=1), tmp_path)
    with pytest.raises(UserError, match=r"another config(.|\n)*optimizer\.lr: 0\.003 there, 0\.5 now"):
        loop.train(tiny(train__steps=1, optimizer__lr=0.5), tmp_path)


def test_changed_frozen_weights_are_refused(tmp_path):
    loop.train(tiny(train__steps=1), tmp_path)
    known = json.loads((tmp_path / "frozen.json").read_text())
    known["llm"]["fingerprint"] = "0" * 64
    (tmp_path / "frozen.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"frozen llm .* is not the one this run was started with"):
        loop.train(tiny(train__steps=1), tmp_path)


@pytest.mark.parametrize(("text", "trouble"), [(None, "is missing"), ("{", "is damaged"), ("[1]", "is damaged")])
def test_frozen_weights_that_cannot_be_checked_are_a_warning(tmp_path, capsys, text, trouble):
    entries = {"llm": {"source": "random", "fingerprint": "1"}}
    if text is not None:
        (tmp_path / "frozen.json").write_text(text)
    check_frozen(tmp_path, entries)
    assert f"frozen.json {trouble}" in capsys.readouterr().err


def test_step_that_was_saved_but_not_evaluated_is_evaluated_when_it_is_resumed(tmp_path, monkeypatch):
    """A run saves before it evaluates, so it loses no step if it ends while it evaluates."""
    config = tiny(train__steps=4, evals__val__every=2, train__save_every=2)
    loop.train(config, tmp_path / "whole")

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Captioning, "__call__", fail)
        with pytest.raises(MemoryError):
            loop.train(config, tmp_path / "parts")
    assert Checkpoints(tmp_path / "parts", read_only=True).latest() == 2
    loop.train(config, tmp_path / "parts")

    def lines(name):
        timings = (
            *("seconds", "images_per_second", "tflops", "memory_gb"),
            *("data_wait", "queue_depth", "read_ms", "decode_ms"),
        )
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key not in timings} for record in records]

    assert lines("parts") == lines("whole")
    assert [record["step"] for record in lines("whole") if record["kind"] == "eval"] == [2, 4]


def test_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not divide over 8 devices"):
        loop.Trainer(tiny(mesh=(8, 1, 1), train__batch_size=12), tmp_path)


def test_time_limit_stops_saved_and_resumable(tmp_path):
    config = tiny(train__max_minutes=1e-6)
    assert loop.train(config, tmp_path) == 0
    assert Checkpoints(tmp_path, read_only=True).latest() == 1


def test_run_of_an_older_version_that_grouped_captions_by_length_is_not_resumed(tmp_path):
    trainer = loop.Trainer(tiny(mesh=(2, 1, 1)), tmp_path)
    position = trainer.position
    trainer.move_to(position)
    with pytest.raises(UserError, match="this run grouped 4 batches by the length of their captions"):
        trainer.move_to(position | {"window": 4})


def test_full_disk_stops_before_writing_and_keeps_what_was_saved(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    free = iter([10**9, 100_000])
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    config = tiny(train__steps=4, train__save_every=2)
    with pytest.raises(UserError, match=r"it takes 0\.5 MB and 0\.1 MB are free"):
        loop.train(config, tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert Checkpoints(tmp_path, read_only=True).latest() == 2
