"""Attention equals its definition, and its scores are never rounded to the compute dtype."""

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from simvlg_jax.models import bert
from simvlg_jax.models.attention import attend, softmax
from simvlg_jax.models.encoders import temporal_merge, vit
from simvlg_jax.models.llms import llama, opt


def random_inputs(num_heads=6, kv_heads=2, value_dim=5):
    """Returns query (2, 4, N, 8), key (2, 7, K, 8) and value (2, 7, K, V)."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, num_heads, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, value_dim)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_loops(query, key, value, mask, bias, scale):
    """Computes the definition for one query of one head at a time, in float64."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    group = query.shape[2] // key.shape[2]
    for b, s, n in np.ndindex(query.shape[:3]):
        scores = key[b, :, n // group].astype(float) @ query[b, s, n] * scale + bias[b, s]
        weights = np.where(mask[b, s], np.exp(scores), 0)
        out[b, s, n] = weights / weights.sum() @ value[b, :, n // group]
    return out


@pytest.mark.parametrize("scale", [None, 0.9])
def test_equals_the_definition(scale):
    query, key, value = random_inputs()
    rng = np.random.default_rng(1)
    mask, bias = rng.random((2, 4, 7)) < 0.6, rng.normal(size=(2, 4, 7)).astype(np.float32)
    mask[..., 0] = True
    ours = attend(query, key, value, mask=mask, bias=bias, scale=scale)
    np.testing.assert_allclose(ours, by_loops(query, key, value, mask, bias, scale or 8**-0.5), rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_takes_the_mean():
    query, key, value = random_inputs(2, 2)
    ours = attend(query, key, value, mask=np.zeros((2, 1, 7), bool))
    np.testing.assert_allclose(ours, np.broadcast_to(value.mean(1, keepdims=True), ours.shape), rtol=1e-5, atol=1e-6)


def test_dropout_acts_on_the_weights():
    query, key, value = random_inputs(2, 2)
    ours = attend(query, key, value, dropout=lambda weights: weights.at[..., 1:].set(0))
    first = attend(query, key, np.where(np.arange(7)[:, None, None] == 0, value, 0))
    np.testing.assert_allclose(ours, first, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs_are_attended_to_with_float32_scores():
    """The scores are about 50 and differ by less than bfloat16 resolves there (0.25)."""
    rng = np.random.default_rng(0)
    key = 4 + 0.1 * rng.normal(size=(1, 9, 1, 16))
    query, key, value = (
        jnp.asarray(x, jnp.bfloat16) for x in (np.full((1, 3, 1, 16), 3.3), key, rng.normal(size=(1, 9, 1, 4)))
    )
    ours = np.asarray(attend(query, key, value), np.float32)
    exact = attend(*(x.astype(jnp.float32) for x in (query, key, value)))
    np.testing.assert_allclose(ours, exact, atol=2**-8 * np.abs(value).max())


def test_softmax_has_the_gradient_of_jax_and_keeps_only_its_result():
    scores, slopes = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(f(x) * slopes))(scores)
        for f in (lambda x: softmax(x, jnp.float32), jax.nn.softmax)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    _, back = jax.vjp(lambda x: softmax(x, jnp.bfloat16), scores)
    assert {x.dtype for x in jax.tree.leaves(back)} == {jnp.dtype("bfloat16")}


X = jax.ShapeDtypeStruct((2, 5, 32), jnp.bfloat16)
TEXT = (X, *[jax.ShapeDtypeStruct((2, 5), jnp.int32)] * 2)
MODULES = {
    "vit": (vit.ViT(**vit.VIT_SIZES["tiny_32px"], dtype=jnp.bfloat16), jax.ShapeDtypeStruct((2, 32, 32, 3), X.dtype)),
    "bert": (bert.BertLayer(2, merge_r=1, dtype=jnp.bfloat16), X),
    "temporal": (temporal_merge.TemporalMerge(dtype=jnp.bfloat16), jax.ShapeDtypeStruct((2, 3, 5, 32), jnp.bfloat16)),
    "llama": (llama.Llama(**llama.LLAMA_SIZES["tiny"], dtype=jnp.bfloat16), *TEXT),
    "opt": (opt.Opt(**opt.OPT_SIZES["opt_tiny"], dtype=jnp.bfloat16), *TEXT),
}


def products_of_heads(jaxpr):
    """Returns dtypes of a jaxpr's matrix products with two batch axes, also in scans: scores, then weighted values."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and len(equation.params["dimension_numbers"][1][0]) == 2:
            yield str(equation.outvars[0].aval.dtype)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products_of_heads(inner)


@pytest.mark.parametrize("name", MODULES)
def test_every_models_scores_are_float32(name):
    module, *inputs = MODULES[name]
    params = nn.unbox(jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs))
    jaxpr = jax.make_jaxpr(module.apply)(params, *inputs).jaxpr
    assert list(products_of_heads(jaxpr)) == ["float32", "bfloat16"]
