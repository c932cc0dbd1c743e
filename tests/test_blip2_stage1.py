"""BLIP-2's first stage: transformers gives the same numbers, negatives are others, and the second stage starts from it.

`test_golden.py` compares losses and gradients with the published code.
"""

import json

import flax.linen as nn
import golden_blip2
import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from first_step import first_step
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import GOLDEN
from test_qformer import PICTURES, QUERIES, pixels_of, randomize, with_our_epsilon
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
)
from verbs import call

from simvlg_jax import from_torch
from simvlg_jax.config.load import load_config
from simvlg_jax.convert import blip2, pretrained, qformer
from simvlg_jax.evaluation.retrieval import similarities
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.blip2 import Blip2, Negatives, draw_negatives, negative_logits
from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError

VOCABULARY = 41


def config_of(*flags: str):
    own = ("task=blip2_stage1", "connector.type=qformer", f"connector.queries={QUERIES}", "mesh.data=1", *flags)
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in own])


def random_params(task, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    abstract = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    drawn = {path: rng.normal(path[-1] == "scale", 0.1, x.shape).astype(np.float32) for path, x in abstract.items()}
    drawn["temperature",] = np.float32(0.07)
    return traverse_util.unflatten_dict(drawn)


def texts_of(count: int, length: int, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(3, length + 1, (count, 1))).astype(np.int32)
    return rng.integers(1, vocabulary, (count, length)).astype(np.int32) * mask, mask


def model_of() -> Blip2:
    connector = QFormer(32, 2, 2, QUERIES)
    return Blip2(ViT(**VIT_SIZES["tiny_32px"]), connector, VOCABULARY, max_positions=20, shared_width=16)


def test_retrieval_model_of_hugging_face_gives_the_same_numbers(tmp_path):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            vocab_size=VOCABULARY - 1,
            max_position_embeddings=20,
            use_qformer_text_input=True,
        ).to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    theirs = with_our_epsilon(randomize(Blip2ForImageTextRetrieval(config)))
    with torch.no_grad():
        for layer in theirs.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[32:64] = 0  # keys have no bias in the published model
    theirs.save_pretrained(tmp_path)
    model = model_of()
    params = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, blip2.load(str(tmp_path), model)))
    assert "lm_head" not in params and "temperature" not in params  # Hugging Face's model lacks them
    assert len(params["word"]) == VOCABULARY
    params |= {"vit": jax.tree.map(np.asarray, pretrained.load_vit(str(tmp_path), model.vit)), "temperature": 1.0}
    ids, mask = texts_of(len(PICTURES), 8, VOCABULARY - 1)
    others = np.roll(np.arange(len(PICTURES)), 1)

    def run(model: Blip2) -> tuple[jax.Array, jax.Array]:
        features = model.features(PICTURES, ids, mask)
        logits = model.match(features.visual, ids, mask, Negatives(others, others))
        return model.similarities(features.pair)[0], logits

    similarity, logits = jax.jit(lambda params: model.apply({"params": params}, method=run))(params)
    pixels = pixels_of(model, PICTURES)
    texts = [torch.from_numpy(x).long() for x in (ids, mask)]
    with torch.no_grad():
        found = theirs(pixels, *texts).logits_per_image
        assert golden_numbers.relative(similarity, found.numpy()) < 1e-5
        pairs = (pixels, *texts), (pixels[others], *texts), (pixels, *(x[others] for x in texts))
        for kind, pair in enumerate(pairs):
            wanted = theirs(*pair, use_image_text_matching_head=True).logits_per_image
            assert golden_numbers.relative(logits[:, kind], wanted.numpy()) < 1e-5


def test_bert_gives_the_text_branch_and_the_queries_a_copy_of_its_mlps(tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    bert = randomize(BertForMaskedLM(BertConfig(**sizes, vocab_size=VOCABULARY - 1, max_position_embeddings=20)))
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # BLIP-2 drops it
    bert.save_pretrained(tmp_path)
    model = model_of()
    params = jax.tree.map(np.asarray, blip2.load(str(tmp_path), model))
    layer = params["connector"]["layer_0"]
    for part in ("mlp", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, layer[f"query_{part}"], layer[part])
    assert "query_tokens" not in params["connector"] and "cross_query" not in layer
    assert params["word"].shape == (VOCABULARY, 32) and 0 < np.abs(params["word"][-1]).max() < 0.1
    ids, mask = texts_of(3, 8, VOCABULARY - 1)

    def run(model: Blip2) -> jax.Array:
        states = model.connector.read(text=model.embed_text(ids), mask=mask[:, None] > 0).tokens
        return model.logits(states)

    rest = {"query_tokens": np.zeros((1, QUERIES, 32), np.float32), "temperature": np.float32(1)}
    params["connector"]["query_tokens"] = rest["query_tokens"]
    found = model.apply({"params": params | {"temperature": rest["temperature"]}}, method=run)
    with torch.no_grad():
        wanted = bert(*(torch.from_numpy(x).long() for x in (ids, mask))).logits.numpy()
    assert golden_numbers.relative(np.asarray(found)[mask > 0][:, :-1], wanted[mask > 0]) < 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 30), st.booleans(), st.integers(2, 9))
def test_negatives_are_other_rows_that_count(seed, spread, floor, alive):
    rng = np.random.default_rng(seed)
    weight = rng.permutation(np.arange(9) < alive).astype(np.float32)
    to_text, to_image = rng.normal(0, spread, (2, 9, 9)).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), 200)
    drawn = DRAW[floor](keys, to_text, to_image, weight)
    for rows in (np.asarray(drawn.image), np.asarray(drawn.text)):
        assert not (rows == np.arange(9))[:, weight > 0].any()
        assert (weight[rows[:, weight > 0]] == 1).all()


DRAW = {
    floor: jax.jit(jax.vmap(lambda *x, floor=floor: draw_negatives(*x, floor), (0, None, None, None)))
    for floor in (False, True)
}


def test_similar_rows_are_drawn_as_often_as_their_softmax_says():
    to_text, to_image = np.random.default_rng(0).normal(0, 1.5, (2, 6, 6)).astype(np.float32)
    weight = np.array([1, 1, 0, 1, 1, 1], np.float32)
    drawn = DRAW[False](jax.random.split(jax.random.key(0), 20_000), to_text, to_image, weight)
    for rows, similarity in ((drawn.image, to_image), (drawn.text, to_text)):
        found = (np.asarray(rows)[..., None] == np.arange(6)).mean(0)
        wanted = jax.nn.softmax(negative_logits(similarity, weight, False))
        np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.fixture(scope="module")
def task():
    return build_task(config_of("connector.dropout=0.0"))


def batch_of(task, size: int, dead: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids, mask = texts_of(size, 10, 98)
    image = rng.integers(0, 256, (size, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    weight = np.isin(np.arange(size), dead, invert=True).astype(np.float32)
    return {"image": image, "sentence_ids": ids, "sentence_mask": mask, "weight": weight}


def test_rows_of_weight_0_change_nothing(task):
    params, batch = random_params(task), batch_of(task, 6, dead=(1, 4))
    real = np.flatnonzero(batch["weight"])
    place = {old: new for new, old in enumerate(real)}  # in the batch without the dead rows
    image, text = np.array([3, 0, 0, 5, 0, 2]), np.array([2, 0, 5, 0, 0, 3])

    def losses(batch, *negatives):
        arrays = (batch[name] for name in ("image", "sentence_ids", "sentence_mask", "weight"))
        return task.model.apply({"params": params}, *arrays, jax.random.key(0), Negatives(*negatives), method="losses")

    run = jax.jit(losses)
    found = run(batch, image, text)
    small = {name: x[real] for name, x in batch.items()}
    wanted = run(small, *(np.array([place[i] for i in x[real]]) for x in (image, text)))
    for name, values in wanted.items():
        assert (np.asarray(values) > 0).all()
        np.testing.assert_allclose(np.asarray(found[name])[real], values, rtol=1e-4, atol=1e-5)
        assert (np.asarray(found[name])[[1, 4]] == 0).all()
    alone = run(batch | {"weight": np.eye(6, dtype=np.float32)[2]}, image, text)
    assert 0 < alone["itm"][2] < np.inf and np.isfinite(list(map(np.sum, alone.values()))).all()


def test_step_on_four_devices_is_that_on_one(monkeypatch):
    """Negatives are drawn among all rows of a micro-batch, whatever device holds them."""
    monkeypatch.setitem(BERT_SIZES, "shallow", BERT_SIZES["tiny"] | dict(depth=1))
    flags = ("train.batch_size=16", "train.accumulate=2", "connector.size=shallow")
    params = random_params(build_task(config_of(*flags)))
    given = {name: x for name, x in params.items() if name != "vit"}, {"vit": params["vit"]}
    outcomes = [
        first_step(config_of(*flags, f"mesh.data={data}", f"mesh.fsdp={fsdp}"), lambda t: batch_of(t, 16, (3,)), given)
        for data, fsdp in ((1, 1), (2, 2))
    ]
    (loss, moments, _), (other, others, _) = outcomes
    assert other == pytest.approx(loss, rel=1e-5)
    scale = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moments)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6 * scale), moments, others)
    still = {path for path, x in traverse_util.flatten_dict(moments).items() if not np.any(x)}
    assert {path[-2:] for path in still} == {("key", "bias"), ("cross_key", "bias")}  # their exact gradient is zero


def test_second_stage_starts_from_the_first(task, tmp_path, capsys):
    params = random_params(task)
    trained = {name: tree for name, tree in params.items() if name != "vit"}
    task.after_run(trained, tmp_path)
    flags = [f"connector.queries={QUERIES}", f"connector.weights={tmp_path / 'qformer.safetensors'}"]
    second = build_task(load_config("configs/tiny.py", [f"--config.{f}" for f in ("connector.type=qformer", *flags)]))
    abstract = nn.unbox(jax.eval_shape(second.init, jax.random.key(0)))
    loaded = second.load_pretrained(abstract)
    assert set(loaded) == {"connector", "ln_vision"}
    assert jax.tree.structure(loaded["connector"]) == jax.tree.structure(abstract["connector"])
    for name, x in traverse_util.flatten_dict(loaded).items():
        np.testing.assert_array_equal(x, traverse_util.flatten_dict(params)[name])
    assert capsys.readouterr().err.count("the text branch of its Q-Former is left out") == 1

    arguments = ("--config", "configs/tiny.py", "--config.connector.type=qformer", *(f"--config.{f}" for f in flags))
    assert call(from_torch, *arguments, "--output", tmp_path / "ours") == 0
    assert capsys.readouterr().out.strip() == f"--config.connector.weights={tmp_path / 'ours/connector.safetensors'}"
    converted = qformer.load(str(tmp_path / "ours/connector.safetensors"), second.model.connector)
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, tree) for tree in (converted, loaded)))

    again = blip2.load(str(tmp_path / "qformer.safetensors"), task.model)  # another first stage takes all of it
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again), trained)


def test_first_stage_of_lavis_gives_the_connector_without_its_text_branch(capsys):
    path, sizes = GOLDEN / "qformer_stage1.safetensors", json.loads((GOLDEN / "qformer_stage1.json").read_text())
    model = golden_blip2.build_blip2(sizes)
    whole = jax.tree.map(np.asarray, blip2.load(str(path), model))
    loaded = jax.tree.map(np.asarray, qformer.load(str(path), model.connector))
    for layer, tree in loaded["connector"].items():
        wanted = whole["connector"][layer]
        if layer.startswith("layer_"):
            assert {"mlp", "mlp_norm"} == set(wanted) - set(tree)
            wanted = {name: wanted[name] for name in tree}
        jax.tree.map(np.testing.assert_array_equal, tree, wanted)
    assert "the text branch of its Q-Former is left out" in capsys.readouterr().err


def test_words_are_berts_with_one_more_that_starts_a_caption():
    task = build_task(config_of("connector.size=minilm_l6", "connector.weights=minilm"))
    ids, _ = task.batch.encode("Two cats")["sentence"]
    assert (ids[0], ids[-1]) == (101, 102) and len(ids) == 4
    assert task.model.vocab_size == 30523
    loaded = task.load_pretrained(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    assert loaded["word"].shape == (30523, 384) and "lm_head" not in loaded


@pytest.mark.parametrize("stage, trained", [("1", 186_705_470), ("2,llm=opt2.7b", 107_133_696)])
def test_recipe_trains_as_many_parameters_as_the_published_runs(stage, trained):
    task = build_task(load_config(f"configs/blip2.py:stage={stage}"))
    abstract = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    assert sum(x.size for path, x in abstract.items() if task.is_trained(path)) == trained


def test_nearest_of_a_pictures_embeddings_counts():
    picture, sentence = np.random.default_rng(0).normal(size=(2, 4, 3, 8))
    found = similarities(picture, sentence[:, 0])
    wanted = [[max(own @ text[0] for own in several) for text in sentence] for several in picture]
    np.testing.assert_allclose(found, wanted)
    np.testing.assert_allclose(similarities(picture[:, 0], sentence[:, 0]), picture[:, 0] @ sentence[:, 0].T)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("connector.type=tomeformer", "trains a Q-Former: set connector.type=qformer"),
        ("vit.train=True", "vit.train is for the caption task"),
        ("data.pack=-1", "data.pack is for the caption task"),
        ("connector.weights=x.pth", "set connector.tokenizer to a BERT's folder"),
        ("vit.tokens=9", "vit.tokens is for the tasks caption and scst"),
        ("train.negatives=hard", "train.negatives is 'hard'; it takes 'softmax', 'floored_softmax'"),
    ],
)
def test_what_this_stage_lacks_says_so(flag, message):
    with pytest.raises(UserError, match=message):
        build_task(config_of(flag))
