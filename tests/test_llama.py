"""The LLaMA decoder equals transformers', and scan, remat, cache and padding do not change it."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from simvlg_jax.convert import llama as hf_llama
from simvlg_jax.convert import stacking
from simvlg_jax.models.llms.language_model import LlmOutput
from simvlg_jax.models.llms.llama import LLAMA_SIZES, Llama, RopeScaling
from simvlg_jax.utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(width=24, depth=2, num_heads=6, num_kv_heads=2, ffn=40, vocab_size=50, norm_eps=1e-5)


def logits_of_ids(llm: Llama, ids: jax.Array) -> jax.Array:
    """Maps ids (B, S) to logits (B, S, V). It calls every method, so it can initialise all parameters."""
    hidden = llm(llm.embed(ids), jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)).hidden
    return llm.logits(hidden)


@functools.cache
def init(llm: Llama) -> dict:
    """Returns random parameters that are larger than usual, so that every part matters."""
    ids = jnp.zeros((1, 1), jnp.int32)
    abstract = jax.eval_shape(lambda: nn.unbox(llm.init(jax.random.key(0), ids, method=logits_of_ids))["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.2, x.shape).astype(np.float32), abstract)


@functools.partial(jax.jit, static_argnums=0)
def run(llm: Llama, params: dict, *args) -> LlmOutput:
    return llm.apply({"params": params}, *args)


def torch_llama(size: dict, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": size.get("rope_theta", 10000.0)}
    if scaling := size.get("rope_scaling"):
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    config = LlamaConfig(
        hidden_size=size["width"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_kv_heads"],
        intermediate_size=size["ffn"],
        vocab_size=size["vocab_size"],
        rms_norm_eps=size.get("norm_eps", 1e-6),
        rope_parameters=rope,
        tie_word_embeddings=size.get("tie_embeddings", False),
        head_dim=size.get("head_dim"),
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def params_of(model: LlamaForCausalLM, llm: Llama) -> dict:
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return hf_llama.from_hf(llm, tensors)


def inputs(batch: int, length: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns random embeddings (B, S, D) and positions (B, S)."""
    embeddings = np.random.default_rng(seed).normal(size=(batch, length, width)).astype(np.float32)
    return embeddings, np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))


@pytest.mark.parametrize(
    "size",
    [
        TINY,
        TINY | dict(num_kv_heads=6, tie_embeddings=True, norm_eps=1e-6, rope_theta=500.0),
        TINY | dict(num_kv_heads=1, head_dim=10, depth=3),
        TINY | dict(head_dim=16, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    ],
    ids=["grouped", "tied", "odd-head-dim", "scaled-rope"],
)
def test_equals_transformers(size):
    model, llm = torch_llama(size), Llama(**size)
    params = {"params": params_of(model, llm)}
    ids = np.random.default_rng(1).integers(0, size["vocab_size"], (3, 7)).astype(np.int32)
    mask = np.arange(7) < np.array([[7], [4], [1]])
    embeddings = llm.apply(params, ids, method="embed")
    positions = inputs(3, 7, 1)[1]
    hidden = run(llm, params["params"], embeddings, mask, positions).hidden
    ours = np.asarray(llm.apply(params, hidden, method="logits"))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()).logits.numpy()
    np.testing.assert_allclose(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_equals_the_published_model():
    """Compares logits over [prefix, caption] of the golden model like Vicuna, padded on the right."""
    sizes = json.loads((GOLDEN / "image_llama.json").read_text())["lm"]
    golden = np.load(GOLDEN / "image_llama.npz")
    llm = Llama(sizes["dim"], sizes["layers"], sizes["heads"], sizes["heads"], sizes["ffn"], sizes["vocab"])
    params = hf_llama.from_hf(llm, load_file(GOLDEN / "image_llama.safetensors"), "llm_model.")
    variables = {"params": params}
    text = llm.apply(variables, golden["ids"], method="embed")
    embeddings = np.concatenate([golden["prefix"], text], 1)
    mask = np.concatenate([np.ones(golden["prefix"].shape[:2], np.int64), golden["mask"]], 1)
    hidden = run(llm, params, embeddings, mask, inputs(*mask.shape, 1)[1]).hidden
    logits = np.asarray(llm.apply(variables, hidden, method="logits"))
    wanted = golden["logits"]
    assert np.abs(logits - wanted)[mask > 0].max() < 1e-5 * np.abs(wanted[mask > 0]).max()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_go_round(tied):
    llm = Llama(**TINY, tie_embeddings=tied)
    params = init(llm)
    tensors = hf_llama.to_hf(llm, params, "llm.")
    assert set(tensors) == {f"llm.{name}" for name in torch_llama(TINY | dict(tie_embeddings=tied)).state_dict()}
    assert tensors["llm.model.layers.1.self_attn.k_proj.weight"].shape == (8, 24)
    if tied:
        np.testing.assert_array_equal(tensors["llm.lm_head.weight"], params["embedding"])
    extra = {name: np.ones(1) for name in ("vit.x", "llm.model.layers.0.self_attn.rotary_emb.inv_freq")}
    for held in (tensors, {name: x for name, x in tensors.items() if not tied or "lm_head" not in name}):
        back = hf_llama.from_hf(llm, held | extra, "llm.")
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_weights_missing_or_left_over():
    llm = Llama(**TINY)
    tensors = hf_llama.to_hf(llm, init(llm))
    with pytest.raises(UserError, match=r"^lm_head\.weight differs from model\.embed_tokens\.weight, but .* ties them"):
        hf_llama.from_hf(Llama(**TINY, tie_embeddings=True), tensors)
    with pytest.raises(UserError, match=r"o_proj\.weight \(24, 24\) cannot be split into the model's 5 heads"):
        hf_llama.from_hf(Llama(**TINY | dict(num_heads=5)), tensors)
    tensors["model.layers.1.self_attn.q_proj.bias"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(
        UserError, match=r"(?s)missing.*\(1\): model\.layers\.0\.mlp\.up.*\(1\): model\.layers\.1.*bias"
    ):
        hf_llama.from_hf(llm, tensors)
    with pytest.raises(UserError, match="no Llama layers"):
        hf_llama.from_hf(llm, tensors, "other.")


@pytest.mark.parametrize("variant", [dict(scan=False), dict(remat=True)])
def test_scan_and_remat_change_nothing(variant):
    """Compares hidden states, and gradients for embeddings and parameters."""
    size = TINY | dict(qkv_bias=True, qk_norm=True)
    llm, other = Llama(**size), Llama(**size, **variant)
    params = init(llm)
    embeddings, positions = inputs(2, 5, 24)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def loss(llm, params, embeddings):
        hidden = llm.apply({"params": params}, embeddings, mask, positions).hidden
        return jnp.sum(jnp.sin(hidden) * mask[..., None])

    def value_and_grads(llm, params):
        return jax.jit(jax.value_and_grad(lambda *args: loss(llm, *args), argnums=(0, 1)))(params, embeddings)

    value, (grads, embedding_grads) = value_and_grads(llm, params)
    unrolled = "scan" in variant
    value2, (grads2, embedding_grads2) = value_and_grads(other, stacking.unstack_layers(params) if unrolled else params)
    np.testing.assert_allclose(value2, value, rtol=1e-5)
    np.testing.assert_allclose(embedding_grads2, embedding_grads, rtol=1e-4, atol=1e-5)
    grads2 = stacking.stack_layers(grads2) if unrolled else grads2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads2, grads)


@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.sampled_from([1, 4])), scan=st.booleans())
def test_cache_equals_no_cache(cuts, scan):
    """A sequence that is fed in pieces gives the states of the whole, also in a padded row."""
    llm, spare = Llama(**TINY, scan=scan), 0 if scan else 3
    params = init(llm)
    embeddings, _ = inputs(2, 7, 24)
    mask = np.array([[1] * 7, [1, 1, 0, 0, 1, 1, 1]])
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    whole = run(llm, params, embeddings, mask, positions)
    assert whole.cache is None
    cache, pieces = llm.init_cache(2, 7 + spare), []
    for piece in np.split(np.arange(7), sorted(cuts)):
        out = run(llm, params, embeddings[:, piece], mask[:, piece], positions[:, piece], cache)
        cache = out.cache
        pieces.append(out.hidden)
    together = np.concatenate(pieces, 1)
    np.testing.assert_allclose(together[mask > 0], whole.hidden[mask > 0], rtol=1e-4, atol=1e-5)
    assert cache["index"] == 7
    np.testing.assert_array_equal(cache["mask"], np.pad(mask, ((0, 0), (0, spare))))


@settings(max_examples=10, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=6, max_size=6), late=st.integers(1, 5))
def test_masked_and_later_tokens_are_never_seen(mask, late):
    llm = Llama(**LLAMA_SIZES["tiny"])
    params = init(llm)
    mask = np.array([mask])
    embeddings, positions = inputs(1, 6, 32)
    hidden = run(llm, params, embeddings, mask, positions).hidden
    assert np.isfinite(hidden).all()
    noise = np.where(mask[..., None], 0.0, 5.0).astype(np.float32)
    noise[:, late:] += 3.0
    other = run(llm, params, embeddings + noise, mask, positions).hidden
    kept = mask[0] & (np.arange(6) < late)
    np.testing.assert_array_equal(hidden[0, kept], other[0, kept])


def test_bfloat16_computes_in_bfloat16_and_stays_near():
    """Frozen weights may be held in bfloat16 too."""
    params = init(Llama(**TINY))
    embeddings, positions = inputs(2, 5, 24)
    mask = np.ones((2, 5), np.int32)
    exact = run(Llama(**TINY), params, embeddings, mask, positions).hidden
    llm = Llama(**TINY, dtype=jnp.bfloat16)
    for held in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda x, held=held: x.astype(held), params)
        out = run(llm, cast, embeddings, mask, positions, llm.init_cache(2, 5))
        assert out.hidden.dtype == out.cache["key"].dtype == jnp.bfloat16
        assert llm.apply({"params": cast}, out.hidden, method="logits").dtype == jnp.float32
        assert jnp.linalg.norm(out.hidden - exact) < 0.05 * jnp.linalg.norm(exact)
