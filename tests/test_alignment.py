"""Soft prompts learn to resemble the P-Former's. `test_golden.py` compares both stages with the published code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from first_step import first_step
from flax import traverse_util
from test_blip2_stage1 import random_params, texts_of
from test_packing import batches

from simvlg_jax.config.load import load_config
from simvlg_jax.models.losses import prompt_distances
from simvlg_jax.tasks import build_task
from simvlg_jax.training import loop, restore
from simvlg_jax.utils.errors import UserError

FIRST = ("task=blip2_stage1", "connector.type=qformer", "connector.queries=3")


def config_of(*flags: str):
    own = ("pformer.size=tiny", "pformer.queries=3", "train.align=10.0", "connector.dropout=0.0", "mesh.data=1", *flags)
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in own])


def shapes_of(task) -> dict:
    return nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))


@pytest.mark.parametrize("prompts, references", [(3, 3), (2, 3), (5, 3)])
def test_first_prompts_are_compared_one_by_one_and_only_they_learn(prompts, references):
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(2, count, 4)).astype(np.float32) for count in (prompts, references))
    count = min(prompts, references)
    wanted = [np.mean((x[:count] - y[:count]) ** 2) for x, y in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose(prompt_distances(ours, theirs), wanted, rtol=1e-6)
    gradients = jax.grad(lambda *x: prompt_distances(*x).sum(), (0, 1))(jnp.asarray(ours), jnp.asarray(theirs))
    assert np.any(gradients[0][:, :count]) and not np.any(gradients[0][:, count:]) and not np.any(gradients[1])


def test_captioner_learns_from_the_whole_caption_and_examples_that_count():
    task = build_task(config_of())
    params = jax.tree.map(jnp.asarray, random_params_of(task))
    rng, weight = np.random.default_rng(0), np.array([1, 0, 1], np.float32)
    (ids, mask), (words, real) = texts_of(3, 8, 90), texts_of(3, 8, 90, 1)
    batch = {
        "image": rng.integers(0, 256, (3, 32, 32, 3), np.uint8),
        "caption_ids": ids,
        "caption_mask": mask,
        "caption_targets": np.where((mask > 0) & (weight[:, None] > 0), ids, -100),
        "pformer_ids": words,
        "pformer_mask": real,
        "weight": weight,
    }
    assert set(task.batch.shapes(3)) == set(batch)

    @jax.jit
    def run(params: dict) -> tuple[dict, jax.Array]:
        prefix = task.model.apply({"params": params}, batch["image"], method="encode_image").prefix
        reference = task.model.pformer.apply({"params": params["pformer"]}, words, real)
        return task.losses(params, batch, jax.random.key(0)).values, prompt_distances(prefix, reference)

    values, distances = run(params)
    np.testing.assert_allclose(values["align"], distances * weight, rtol=1e-5)
    assert task.weights == {"caption": 1.0, "align": 10.0}
    trained = {path[0] for path in traverse_util.flatten_dict(params) if task.is_trained(path)}
    assert trained == {"connector", "ln_vision", "llm_proj"}


def random_params_of(task) -> dict:
    params = random_params(task)
    return {name: tree for name, tree in params.items() if name != "temperature"}


def test_packs_in_micro_batches_learn_what_padded_captions_on_four_devices_do():
    def batch(task, packed: bool) -> dict:
        words, real = texts_of(8, 8, 90, 1)
        given = batches(task, start_is_target=True)[packed]
        return given | {"pformer_ids": words, "pformer_mask": real, "weight": np.ones(8, np.float32)}

    flags = ("train.batch_size=8", "mesh.fsdp=1")
    params = random_params_of(build_task(config_of(*flags)))
    trained = ("ln_vision", "connector", "llm_proj")
    given = {name: params.pop(name) for name in trained}, params
    padded = first_step(config_of(*flags, "mesh.data=4"), lambda task: batch(task, False), given)
    packed = first_step(config_of(*flags, "train.accumulate=2"), lambda task: batch(task, True), given)
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(padded[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * scale), padded[1], packed[1])


def test_captioner_is_read_without_the_pformer(tmp_path):
    config = config_of("train.steps=1", "evals.val.every=0", "mesh.fsdp=1")
    loop.train(config, tmp_path)
    run = restore.restore_run(config, tmp_path, "latest", captions=True)
    assert "pformer" not in run.params and run.config.train.align == 0


def test_projection_goes_from_the_first_stage_to_the_second(tmp_path):
    first = build_task(config_of(*FIRST))
    assert first.weights["align"] == 10 and {"pformer_ids", "pformer_mask"} <= set(first.batch.shapes(2))
    params = random_params(first)
    trained = {name: tree for name, tree in params.items() if name not in ("vit", "pformer")}
    assert set(trained) == {path[0] for path in traverse_util.flatten_dict(params) if first.is_trained(path)}
    first.after_run(trained, tmp_path)
    weights = f"connector.weights={tmp_path / 'qformer.safetensors'}"
    second = build_task(config_of("connector.type=qformer", "connector.queries=3", weights))
    loaded = second.load_pretrained(shapes_of(second))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, loaded["llm_proj"]), params["llm_proj"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["train.beta=0.5"], "train.align and train.beta cannot be combined"),
        (["task=contrastive"], "train.align is for the tasks caption and blip2_stage1"),
        (["train.align=-1.0"], "train.align is -1.0; it must be at least 0"),
        (["pformer.weights=x.pth"], "set pformer.tokenizer to a BERT's folder"),
    ],
)
def test_what_cannot_be_aligned_says_so(flags, message):
    with pytest.raises(UserError, match=message):
        build_task(config_of(*flags))
