"""SCST: the loss and its gradient, whose captions are scored against what, and what must not change a run."""

import json
import os
import signal
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_processes import run_jobs

from simvlg_jax.config.load import load_config, override
from simvlg_jax.convert import own_files
from simvlg_jax.data.text import IGNORE
from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.scores.captions import score_captions
from simvlg_jax.evaluation.scores.cider import Cider
from simvlg_jax.tasks import build_task
from simvlg_jax.training import loop, restore, rollout
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.training.trainer import Trainer
from simvlg_jax.utils.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "caption_metrics.json").read_text())
BEAMS, STEPS = 4, 8
MODEL = ("llm.train=True", "vit.train=True", "train.batch_size=16", "data.crop_scale=(1.0,1.0)")
SCST = (
    *("task=scst", f"train.beams={BEAMS}", "evaluate.max_new_tokens=20", "data.synthetic_size.train=16"),
    *("optimizer.lr=1e-4", "optimizer.min_lr=1e-4", "optimizer.warmup_steps=0"),
    *(f"train.steps={STEPS}", "train.log_every=1", "evals.val.max_examples=4"),
)


def config_of(*flags):
    return load_config("configs/tiny.py", flags_of("mesh.data=1", *flags))


def flags_of(*flags):
    return [f"--config.{flag}" for flag in (*MODEL, *flags)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of a model that writes words, mostly the wrong ones, after some steps on captions."""
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    trainer = Trainer(config_of("train.steps=150", "connector.dropout=0.0", "data.pack=-1", "evals.val.every=0"), path)
    for _ in range(150):
        trainer.run_step(trainer.put(trainer.next_batch()))
    own_files.write_tree(path, jax.device_get(trainer.params))
    return path


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The workdir of a run on the same 16 pictures in each step, in another order."""
    workdir = tmp_path_factory.mktemp("whole")
    assert loop.train(run_config(start), workdir) == 0
    return workdir


def run_config(start, *flags):
    return config_of(*SCST, f"train.init_from={start}", "evals.val.every=8", "data.pad_multiple=0", *flags)


def logged(workdir, kind="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def values(workdir):
    return [{name: line[name] for name in ("loss", "reward", "reward_spread", "grad_norm")} for line in logged(workdir)]


def final_params(workdir, start):
    return jax.device_get(restore.restore_run(run_config(start), workdir, "latest").params)


def test_loss_and_gradient_are_those_of_the_formula():
    """The formula caption by caption, without padding, and the gradient of the logits by hand."""
    task = build_task(config_of("task=scst", "train.beams=3"))
    rng = np.random.default_rng(0)
    lengths = np.array([[3, 5, 5], [5, 3, 3], [6, 6, 6]])  # with the start token, which is not a target
    ids = rng.integers(3, 90, (3, 3, 6)).astype(np.int32)
    there = np.arange(6) < lengths[..., None]
    rewards = np.array([[0.2, 1.5, 0.0], [3.0, 0.5, 0.7], [0, 0, 0]], np.float32)  # the last picture is a blank one
    batch = {
        "image": rng.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8),
        "caption_ids": np.where(there, ids, 0),
        "caption_mask": there.astype(np.int32),
        "caption_targets": np.where(there & (np.arange(6) > 0), ids, IGNORE).astype(np.int32),
        "reward": rewards,
        "weight": np.array([1, 1, 0], np.float32),
    }
    shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)

    def ours(params):
        losses, counts = task.losses(params, batch, jax.random.key(0)).values, task.counts(batch, True)
        return {name: loss.sum() / counts[name].sum() for name, loss in losses.items()}

    @jax.jit
    def by_hand(params, image, text, above):
        """The loss of one text, and its gradient from that of the logits: chances minus what was written."""

        def logits_of(params):  # (T, V), of the tokens after the start
            ones = jnp.ones((1, len(text)), jnp.int32)
            hidden = task.model.apply({"params": params}, image[None], text[None], ones).hidden
            return task.model.llm.apply({"params": params["llm"]}, hidden[:, -len(text) : -1], method="logits")[0]

        logits, pull_back = jax.vjp(logits_of, params)
        chances, written = jax.nn.softmax(logits), jax.nn.one_hot(text[1:], logits.shape[1])
        return -jnp.log((chances * written).sum(1)).sum() * above, pull_back((chances - written) * above)[0]

    loss, wanted = 0.0, jax.tree.map(np.zeros_like, params)
    for picture, beam in np.ndindex(2, 3):
        text = ids[picture, beam, : lengths[picture, beam]]
        above = (rewards[picture, beam] - rewards[picture].mean()) / (len(text) - 1) / 6
        one = jax.device_get(by_hand(params, batch["image"][picture], text, above))
        loss, wanted = loss + one[0], jax.tree.map(np.add, wanted, one[1])
    values, gradient = jax.jit(lambda params: (ours(params), jax.grad(lambda p: ours(p)["scst"])(params)))(params)
    assert values["scst"] == pytest.approx(loss, rel=1e-5)
    assert values["reward"] == pytest.approx(rewards[:2].mean(), rel=1e-6)
    assert values["reward_spread"] == pytest.approx(rewards[:2].std(1).mean(), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, wanted)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(gradient["connector"])) > 1e-3


def test_captions_are_the_evaluators_and_rewards_those_of_their_own_pictures(start):
    """With micro-batches and budgets of tokens, of which the model that the step takes must write."""
    flags = ("train.accumulate=2", "connector.budgets=(9,5)", "data.pad_multiple=5", "seed=1")
    trainer = Trainer(config_of(*SCST, f"train.init_from={start}", "evals.val.every=0", *flags), start.parent)
    local = trainer.next_batch()
    batch = jax.device_get(trainer.put(local))
    encoder = trainer.task.batch.texts["caption"].encoder
    settings = decoding_of(trainer.config, dict(num_beams=BEAMS, num_captions=BEAMS))
    task = trainer.plan.tasks[trainer._drawn]
    captioner = Captioner(task.model, encoder, settings)
    ids = np.asarray(captioner(trainer.params, local["image"]).ids)
    texts = captioner.decode(ids)
    longest = 0
    for picture, beam in np.ndindex(16, BEAMS):
        own = ids[picture, beam].tolist()
        own = own[: own.index(encoder.end) + 1] if encoder.end in own else own
        longest = max(longest, 1 + len(own))
        mask = batch["caption_mask"][picture, beam].astype(bool)
        assert batch["caption_ids"][picture, beam][mask].tolist() == [*encoder.prefix, *own]
        assert batch["caption_targets"][picture, beam][mask].tolist() == [IGNORE, *own]
        assert (batch["caption_targets"][picture, beam][~mask] == IGNORE).all()
    assert batch["caption_ids"].shape == (16, BEAMS, -(-longest // 5) * 5)

    references = {str(i): list(captions) for i, captions in enumerate(local["references"])}  # all training pictures
    for beam in range(BEAMS):
        scores = score_captions(references, {str(i): row[beam] for i, row in enumerate(texts)}).cider_per_example
        np.testing.assert_allclose(batch["reward"][:, beam], list(scores.values()), rtol=1e-6)
    assert batch["reward"].std() > 0.5


def test_rewards_are_ciders_of_the_published_code():
    cider = Cider([list(map(rollout.count, texts)) for texts in GOLDEN["references"]])
    pairs = zip(GOLDEN["hypotheses"], GOLDEN["references"], strict=True)
    np.testing.assert_allclose([rollout.reward(cider, *pair) for pair in pairs], GOLDEN["cider_each"], atol=1e-6)
    assert rollout.reward(cider, "a dog", ()) == 0


def test_reward_rises_and_the_run_is_evaluated_as_a_captioner(whole):
    rewards = [line["reward"] for line in values(whole)]
    assert np.mean(rewards[-3:]) > rewards[0] + 0.3, rewards
    assert all(line["reward_spread"] > 0.1 for line in values(whole))
    (line,) = logged(whole, "eval")
    assert line["step"] == STEPS and 0 < line["loss"] < 2 and line["CIDEr"] > 0


def test_interrupted_and_resumed_run_is_bit_equal(start, whole, tmp_path, monkeypatch):
    run_step, taken = Trainer.run_step, []

    def run_and_interrupt(trainer, batch):
        taken.append(batch)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(trainer, batch)

    monkeypatch.setattr(Trainer, "run_step", run_and_interrupt)
    assert loop.train(run_config(start), tmp_path) == 128 + signal.SIGTERM
    assert len(values(tmp_path)) == 3
    assert loop.train(run_config(start), tmp_path) == 0
    assert values(tmp_path) == values(whole)
    assert fingerprint(final_params(tmp_path, start)) == fingerprint(final_params(whole, start))


def test_run_does_not_depend_on_devices_processes_and_micro_batches(start, whole, tmp_path):
    """Four devices of two processes, which write and score in two micro-batches; padded to the longest caption."""
    own = flags_of(*SCST, f"train.init_from={start}", "evals.val.every=0", "train.accumulate=2", "mesh.fsdp=2")
    run_jobs(2, 2, [(own, tmp_path)])
    for ours, wanted in zip(values(tmp_path), values(whole), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        final_params(tmp_path, start),
        final_params(whole, start),
    )


def test_clips_have_captions_written_too(tmp_path):
    trainer = Trainer(config_of(*SCST, "vit.temporal=True", "evals.val.every=0", "train.beams=2"), tmp_path)
    local = trainer.next_batch()
    batch = trainer.put({**local, "image": np.repeat(local["image"][:, None], 2, 1)})
    assert batch["image"].shape[1] == 2 and batch["reward"].shape == (16, 2)
    _, metrics = jax.eval_shape(trainer.plan.step, trainer.state, trainer.frozen, batch)
    assert metrics.keys() == {"loss", "grad_norm", "lr", "reward", "reward_spread"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.pack=2"], r"data\.pack has no use in the task scst \(the captions are the model's own"),
        (["data.prompt=a"], r"data\.prompt has no use in the task scst"),
        (["train.beta=1"], r"train\.beta has no use in the task scst"),
        (["train.align=1"], r"train\.align is for the tasks"),
        (["train.beams=1"], r"train\.beams is 1"),
        (["evaluate.max_new_tokens=24"], "have up to 25 tokens .* set llm.max_text_tokens=25"),
        (["data.synthetic_size.train=1", "train.batch_size=1"], "at least two training pictures"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        Trainer(override(config_of(*SCST), [f"--config.{flag}" for flag in flags]), tmp_path)
