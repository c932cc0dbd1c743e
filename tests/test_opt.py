"""The OPT decoder equals transformers', also with 350m's shape; scan, cache and padding do not change it."""

import functools

import jax
import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from simvlg_jax.convert import opt as hf_opt
from simvlg_jax.convert import stacking
from simvlg_jax.models.llms.opt import Opt
from simvlg_jax.utils.errors import UserError

TINY = dict(width=24, depth=2, num_heads=4, ffn=40, vocab_size=50, max_positions=30)
SHAPES = [TINY, TINY | dict(embed_width=12, pre_norm=False)]


@functools.cache
def torch_opt(embed_width: int | None = None, pre_norm: bool = True) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=TINY["width"],
        num_hidden_layers=TINY["depth"],
        num_attention_heads=TINY["num_heads"],
        ffn_dim=TINY["ffn"],
        vocab_size=TINY["vocab_size"],
        max_position_embeddings=TINY["max_positions"],
        word_embed_proj_dim=embed_width or TINY["width"],
        do_layer_norm_before=pre_norm,
        init_std=0.2,
        attn_implementation="eager",
    )
    model = OPTForCausalLM(config).eval()
    for name, x in model.named_parameters():  # biases and norms start constant: make them matter
        if x.ndim == 1:
            torch.nn.init.normal_(x, float("norm.weight" in name), 0.2)
    return model


def state(model: OPTForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def model_and_params(size: dict, **options) -> tuple[OPTForCausalLM, Opt, dict]:
    model = torch_opt(size.get("embed_width"), size.get("pre_norm", True))
    tensors = {name: x for name, x in state(model).items() if name != hf_opt.HEAD}
    llm = Opt(**size, **options)
    return model, llm, hf_opt.from_hf(llm, tensors)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("size", SHAPES, ids=["pre-norm", "350m"])
def test_equals_transformers(size, scan):
    model, llm, params = model_and_params(size, scan=scan, remat=scan)
    params = params if scan else stacking.unstack_layers(params)
    ids = np.random.default_rng(1).integers(0, 50, (3, 7)).astype(np.int32)
    mask = np.arange(7) >= np.array([[0], [3], [6]])  # padded on the left: positions count real tokens only
    positions = np.maximum(mask.cumsum(1) - 1, 0)

    @jax.jit
    def logits(params):
        hidden = llm.apply({"params": params}, llm.apply({"params": params}, ids, method="embed"), mask, positions)
        return llm.apply({"params": params}, hidden.hidden, method="logits")

    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()).logits.numpy()
    ours = np.asarray(logits(params))
    assert np.linalg.norm((ours - theirs)[mask]) < 1e-5 * np.linalg.norm(theirs[mask])


@pytest.mark.parametrize("size", SHAPES, ids=["pre-norm", "350m"])
def test_cached_steps_equal_one_pass(size):
    _, llm, params = model_and_params(size)
    variables = {"params": params}
    x = np.random.default_rng(0).normal(size=(2, 6, TINY["width"])).astype(np.float32)
    mask = np.ones((2, 6), np.int32)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    whole = llm.apply(variables, x, mask, positions).hidden
    cache, parts = llm.init_cache(2, 8), []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        rows = slice(None), slice(start, stop)
        out = llm.apply(variables, x[rows], mask[rows], positions[rows], cache)
        cache, parts = out.cache, [*parts, out.hidden]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", SHAPES, ids=["pre-norm", "350m"])
def test_weights_go_out_as_they_came_in(size):
    model, llm, params = model_and_params(size)
    theirs, ours = state(model), hf_opt.to_hf(llm, params)
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    bare = {name.removeprefix("model."): x for name, x in theirs.items() if name != hf_opt.HEAD}
    jax.tree.map(np.testing.assert_array_equal, hf_opt.from_hf(llm, bare), params)


def test_foreign_weights_list_what_does_not_fit():
    llm, tensors = Opt(**TINY), state(torch_opt())
    with pytest.raises(UserError, match="no OPT here"):
        hf_opt.from_hf(llm, {"model.embed_tokens.weight": np.zeros(3)})
    tensors["model.decoder.layers.0.extra"] = tensors.pop("model.decoder.layers.0.fc1.bias")
    with pytest.raises(UserError, match=r"missing.*layers\.0\.fc1\.bias\n.*not known.*layers\.0\.extra"):
        hf_opt.from_hf(llm, tensors)


def test_dropout_acts_only_where_an_rng_is_given():
    _, llm, params = model_and_params(TINY, dropout=0.1)
    x = np.random.default_rng(0).normal(size=(2, 5, TINY["width"])).astype(np.float32)
    mask, positions = np.ones((2, 5), np.int32), np.broadcast_to(np.arange(5), (2, 5))
    plain = llm.apply({"params": params}, x, mask, positions).hidden
    same = Opt(**TINY).apply({"params": params}, x, mask, positions, rngs={"dropout": jax.random.key(0)}).hidden
    np.testing.assert_array_equal(plain, same)
    dropped = [
        llm.apply({"params": params}, x, mask, positions, rngs={"dropout": jax.random.key(seed)}).hidden
        for seed in (0, 1)
    ]
    assert not np.allclose(dropped[0], plain) and not np.allclose(*dropped)
