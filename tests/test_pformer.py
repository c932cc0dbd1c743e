"""The P-Former learns from captions alone.

`test_golden.py` compares its losses and gradients with the published code.
"""

import flax.linen as nn
import golden_blip2
import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from first_step import first_step
from flax import traverse_util
from safetensors.numpy import save_file
from test_blip2_stage1 import random_params, texts_of
from test_golden import GOLDEN
from transformers import BertConfig, BertModel

from simvlg_jax.config.load import load_config
from simvlg_jax.convert import pformer
from simvlg_jax.models import pformer as models
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.llms.opt import Opt
from simvlg_jax.models.pformer import MASKED, PromptLearner
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError


def config_of(*flags: str):
    own = ("task=pformer", "pformer.size=tiny", "pformer.queries=3", "pformer.dropout=0.0", "mesh.data=1", *flags)
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in own])


def batch_of(task, size: int, dead: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    weight = np.isin(np.arange(size), dead, invert=True).astype(np.float32)
    (ids, mask), (caption, real) = (texts_of(size, 10, 90, seed) for seed in (0, 1))
    targets = np.where((real > 0) & (weight[:, None] > 0), caption, -100).astype(np.int32)
    sentence = {"sentence_ids": ids, "sentence_mask": mask, "weight": weight}
    return sentence | {"caption_ids": caption, "caption_mask": real, "caption_targets": targets}


@pytest.fixture(scope="module")
def task():
    return build_task(config_of())


def learner(vocabulary: int = 23) -> tuple[PromptLearner, dict]:
    own = models.PFormer(**BERT_SIZES["tiny"], prompt_width=8, queries=3, vocab_size=90)
    model = PromptLearner(own, Opt(8, 1, 2, 16, vocabulary, 40), mask_id=89)
    embedding = np.random.default_rng(0).normal(size=(vocabulary, 8)).astype(np.float32)
    llm = {"embedding": jnp.asarray(embedding), "position": jnp.zeros((42, 8))}  # what `nearest` needs of it
    return model, {"llm": llm, "temperature": jnp.float32(0.07)}


@pytest.mark.parametrize("block", [5, 23, 4096])
def test_nearest_word_does_not_depend_on_the_blocks(monkeypatch, block):
    monkeypatch.setattr(models, "BLOCK", block)
    model, params = learner()
    prompts = np.random.default_rng(1).normal(0, 2, (4, 3, 8)).astype(np.float32)
    embedding = np.asarray(params["llm"]["embedding"])
    prompts[0, 0] = embedding[-1]
    found = model.apply({"params": params}, prompts, method="nearest")
    distance = np.square(prompts[:, :, None] - embedding).sum(-1)
    np.testing.assert_array_equal(found, distance.argmin(-1))


def test_mask_takes_words_but_never_the_class_token_or_padding(task):
    ids, mask = texts_of(400, 10, 90)
    model, _ = learner()
    all_drawn = np.asarray(model.masked(ids, mask, np.ones(ids.shape, bool)))
    np.testing.assert_array_equal(all_drawn[:, 1:], np.where(mask > 0, 89, ids)[:, 1:])
    np.testing.assert_array_equal(all_drawn[:, 0], ids[:, 0])
    drawn = jax.random.bernoulli(jax.random.key(0), MASKED, ids.shape)
    some = np.asarray(model.masked(ids, mask, drawn))[:, 1:]
    assert (some == 89)[mask[:, 1:] > 0].mean() == pytest.approx(0.25, abs=0.03)


def test_rows_of_weight_0_change_nothing(task):
    params, batch = jax.tree.map(jnp.asarray, random_params(task)), batch_of(task, 6, dead=(1, 4))
    real = np.flatnonzero(batch["weight"])
    drawn = np.random.default_rng(0).random((6, 10)) < 0.3

    def losses(batch: dict, drawn: np.ndarray) -> dict:
        texts = models.Texts(*(batch[f"caption_{name}"] for name in ("ids", "mask", "targets")))
        arrays = batch["sentence_ids"], batch["sentence_mask"]
        values, own = task.model.apply({"params": params}, *arrays, drawn, texts, method="losses")
        return values | {"contrastive": task.contrast.losses(params, own, own, batch["weight"])}

    found = jax.jit(losses)(batch, drawn)
    wanted = jax.jit(losses)({name: x[real] for name, x in batch.items()}, drawn[real])
    for name, values in wanted.items():
        np.testing.assert_allclose(np.asarray(found[name])[real], values, rtol=1e-4, atol=1e-6)
    assert not np.any(np.asarray(found["contrastive"])[[1, 4]]) and not np.any(np.asarray(found["lm"])[[1, 4]])
    assert not np.any(np.asarray(task.losses(params, batch, None).values["vq"])[[1, 4]])


def test_step_on_four_devices_is_that_on_one(monkeypatch):
    monkeypatch.setitem(BERT_SIZES, "shallow", BERT_SIZES["tiny"] | dict(depth=1))
    flags = ("train.batch_size=16", "train.accumulate=2", "pformer.size=shallow")
    params = random_params(build_task(config_of(*flags)))
    given = {name: x for name, x in params.items() if name != "llm"}, {"llm": params["llm"]}
    outcomes = [
        first_step(config_of(*flags, f"mesh.data={data}", f"mesh.fsdp={fsdp}"), lambda t: batch_of(t, 16, (3,)), given)
        for data, fsdp in ((1, 1), (2, 2))
    ]
    (loss, moments, _), (other, others, _) = outcomes
    assert other == pytest.approx(loss, rel=1e-5)
    scale = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moments)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6 * scale), moments, others)
    still = {path for path, x in traverse_util.flatten_dict(moments).items() if not np.any(x)}
    assert {path[-2:] for path in still} == {("key", "bias")}


def test_no_pictures_are_read(task):
    assert set(task.batch.shapes(2)) == set(batch_of(task, 2))


def test_what_a_run_leaves_is_read_again(task, tmp_path):
    trained = {name: tree for name, tree in random_params(task).items() if name != "llm"}
    task.after_run(trained, tmp_path)
    again = build_task(config_of(f"pformer.weights={tmp_path / 'pformer.safetensors'}", "pformer.tokenizer=minilm"))
    loaded = pformer.load(str(tmp_path / "pformer.safetensors"), again.model.pformer)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, loaded), trained)


def test_names_of_the_logged_runs_and_their_codebook_are_understood(tmp_path):
    sizes, tensors, _ = golden_numbers.read_model(GOLDEN, "pformer")
    model = golden_blip2.build_pformer(sizes)
    wanted = pformer.load(str(GOLDEN / "pformer.safetensors"), model)
    own = {n.replace("Pformer.", "Darkformer."): x for n, x in tensors.items() if n.startswith("Pformer.")}
    save_file(own | {"opt_vocab_embeddings": np.zeros((3, 2), np.float32)}, tmp_path / "old.safetensors")
    found = pformer.load(str(tmp_path / "old.safetensors"), model)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), found, wanted)


def test_bert_gives_the_encoder(task, tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    BertModel(BertConfig(**sizes, vocab_size=task.model.pformer.vocab_size)).save_pretrained(tmp_path)
    fresh = build_task(config_of(f"pformer.weights={tmp_path}"))
    loaded = pformer.load(str(tmp_path), fresh.model.pformer)
    abstract = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    shapes = jax.tree.map(jnp.shape, loaded["pformer"]["encoder"])
    assert shapes == jax.tree.map(jnp.shape, abstract["pformer"]["encoder"])
    assert set(loaded) == {"pformer"} and set(loaded["pformer"]) == {"encoder"}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("pformer.size=huge", "pformer.size is 'huge'; it takes"),
        ("llm.train=True", "llm.train is for the caption task"),
        ("data.pack=-1", "data.pack is for the caption task"),
        ("pformer.weights=x.pth", "set pformer.tokenizer to a BERT's folder"),
        ("pformer.queries=0", "pformer.queries is 0; it must be at least 1"),
    ],
)
def test_what_this_task_lacks_says_so(flag, message):
    with pytest.raises(UserError, match=message):
        build_task(config_of(flag))
