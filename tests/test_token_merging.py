"""Matching and merging equal the published numbers and a brute-force reference, and keep their invariants."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simvlg_jax.models import bert, token_merging

GOLDEN = Path(__file__).parent / "golden"
match = jax.jit(token_merging.match, static_argnums=(1, 2))


def brute_force_groups(metric: np.ndarray, r: int, class_token: bool) -> list[list[int]]:
    """Returns one picture's output tokens as lists of input tokens, by loops and Python's stable sort."""
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    even, odd = range(0, len(unit), 2), range(1, len(unit), 2)
    r = min(r, (len(unit) - class_token) // 2)
    best = {i: max((float(unit[i] @ unit[j]), -j) for j in odd) for i in even if i > 0 or not class_token}
    sources = sorted(best, key=lambda i: -best[i][0])[:r]
    groups = [[i] for i in even if i not in sources]
    return groups + [[j] + [i for i in sources if -best[i][1] == j] for j in odd]


def test_merge_equals_published_code():
    golden = np.load(GOLDEN / "tome.npz")
    cases = sorted({name.split("/")[0] for name in golden}, key=int)
    assert cases
    for case in cases:
        metric, x, r = golden[f"{case}/metric"], golden[f"{case}/x"], int(golden[f"{case}/r"])
        slots = token_merging.match(jnp.asarray(metric), r)
        num_slots = x.shape[1] - token_merging.mergeable(x.shape[1], r)
        merged = token_merging.merge(jnp.asarray(x), slots, num_slots)
        np.testing.assert_allclose(merged, golden[f"{case}/mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_tokens_that_resemble_each_other_merge_as_exact_cosines_say(spread):
    """Flat patches have cosines that differ by less than float32 can show: a rounding error must not decide."""
    rng = np.random.default_rng(0)
    metric = (rng.normal(size=(16, 1, 32)) + spread * rng.normal(size=(16, 49, 32))).astype(np.float32)
    slots = np.asarray(match(jnp.asarray(metric), 12, True))
    for picture in range(len(metric)):
        groups = brute_force_groups(metric[picture].astype(np.float64), 12, True)
        expected = np.empty(49, int)
        for slot, group in enumerate(groups):
            expected[group] = slot
        np.testing.assert_array_equal(slots[picture], expected)


def test_schedules_equal_published_code():
    cases = json.loads((GOLDEN / "schedules.json").read_text())
    assert [list(token_merging.merge_schedule(depth, r)) for depth, r, _ in cases] == [c[2] for c in cases]


def test_without_a_class_token_half_of_all_can_go():
    metric = jax.random.normal(jax.random.key(0), (1, 8, 3))
    assert token_merging.token_counts(8, [9, 9, 9, 9], class_token=False) == [8, 4, 2, 1, 1]
    assert token_merging.schedule_down_to(2, 16, 4, class_token=False) == (8, 4)
    slots = token_merging.match(metric, 9, class_token=False)
    assert slots[0, 1::2].tolist() == [0, 1, 2, 3] and set(slots[0].tolist()) == {0, 1, 2, 3}


def test_published_token_counts():
    counts = token_merging.token_counts(257, token_merging.merge_schedule(12, 19))
    assert counts == [257, 238, 219, 200, 181, 162, 143, 124, 105, 86, 67, 48, 29]


@pytest.mark.parametrize("r", [[1, 2, 3], [-1]])
def test_unusable_schedules_raise(r):
    with pytest.raises(ValueError, match="does not fit 2 layers"):
        token_merging.merge_schedule(2, r)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.sampled_from([1, 2, 3, 6, 17, 48]),
    r=st.sampled_from([0, 1, 5, 19, 100]),
    levels=st.sampled_from([2, 1000]),  # two levels make ties certain
    class_token=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_matching_equals_brute_force(tokens, r, levels, class_token, seed):
    rng = np.random.default_rng(seed)
    # Entries 1 or 1..levels keep the norms exact enough that equal pairs tie in both computations.
    metric = rng.integers(1, levels, (2, tokens, 3), endpoint=True).astype(np.float32)
    if levels == 1000:
        metric += rng.random(metric.shape, np.float32)
    slots = np.asarray(match(jnp.asarray(metric), r, class_token))
    num_slots = tokens - token_merging.mergeable(tokens, r, class_token)
    for picture in range(2):
        groups = [sorted(np.flatnonzero(slots[picture] == s)) for s in range(num_slots)]
        assert groups[0] == [0] or not class_token, "the class token stays alone and first"
        assert sum(map(len, groups)) == tokens
        if levels == 1000 and num_slots < tokens:
            assert groups == [sorted(g) for g in brute_force_groups(metric[picture], r, class_token)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def merge_three_times(key, tokens, r):
    """Returns random tokens, the same after three merges, their sizes, and the same merged once by the source map."""
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (2, tokens, 4))
    source_map = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
    merged = x
    for key in jax.random.split(keys[1], 3):
        count = merged.shape[1]
        slots = token_merging.match(jax.random.normal(key, (2, count, 5)), r)
        sizes = token_merging.slot_sizes(source_map, count)
        merged = token_merging.merge(merged, slots, count - token_merging.mergeable(count, r), sizes)
        source_map = token_merging.compose(source_map, slots)
    sizes = token_merging.slot_sizes(source_map, merged.shape[1])
    return x, merged, sizes, token_merging.merge(x, source_map, merged.shape[1])


@settings(deadline=None, max_examples=20)
@given(tokens=st.sampled_from([2, 9, 40]), r=st.sampled_from([0, 1, 7, 40]), seed=st.integers(0, 2**16))
def test_sum_is_preserved_and_source_maps_compose(tokens, r, seed):
    x, merged, sizes, direct = merge_three_times(jax.random.key(seed), tokens, r)
    np.testing.assert_allclose((merged * sizes[..., None]).sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(merged, direct, rtol=1e-4, atol=1e-4)


def test_gradient_flows_through_values_not_through_matching():
    x = jax.random.normal(jax.random.key(0), (1, 9, 4))

    def merged_sum(values, metric):
        slots = token_merging.match(metric, 3)
        return jnp.sum(token_merging.merge(values, slots, 6) ** 2)

    by_values, by_metric = jax.grad(merged_sum, (0, 1))(x, x)
    assert np.abs(by_values).min() > 0
    assert np.abs(by_metric).max() == 0


@pytest.mark.parametrize(
    ("layers", "tokens", "wanted", "schedule"),
    [
        (12, 257, 29, [19] * 12),
        (6, 65, 8, [10, 10, 10, 10, 10, 7]),
        (6, 65, 12, [9, 9, 9, 9, 9, 8]),
        (3, 17, 17, [0, 0, 0]),
        (2, 9, 3, [4, 2]),
        (3, 65, 9, [32, 16, 8]),
        (4, 50, 20, [8, 8, 7, 7]),
    ],
)
def test_schedule_down_to_so_many_tokens(layers, tokens, wanted, schedule):
    assert list(token_merging.schedule_down_to(layers, tokens, wanted)) == schedule
    assert token_merging.token_counts(tokens, schedule)[-1] == wanted


@pytest.mark.parametrize(("layers", "tokens", "wanted"), [(2, 65, 8), (3, 17, 0), (3, 17, 18)])
def test_what_cannot_be_merged_down_to_raises(layers, tokens, wanted):
    with pytest.raises(ValueError, match="cannot become"):
        token_merging.schedule_down_to(layers, tokens, wanted)


def test_weighted_means_are_means_over_all_inputs():
    x = jax.random.normal(jax.random.key(0), (2, 21, 5))
    tokens, source_map = x, jnp.broadcast_to(jnp.arange(21), (2, 21))
    for r in (6, 5, 3):
        slots = token_merging.match(tokens, r)
        sizes = token_merging.slot_sizes(source_map, tokens.shape[1])
        tokens = token_merging.merge(tokens, slots, tokens.shape[1] - r, sizes=sizes)
        source_map = token_merging.compose(source_map, slots)
    np.testing.assert_allclose(tokens, token_merging.merge(x, source_map, 7), rtol=1e-5, atol=1e-6)
    assert token_merging.slot_sizes(source_map, 7).sum(1).tolist() == [21, 21]


def test_proportional_attention_sees_a_token_of_size_k_as_k_tokens():
    layer = bert.BertLayer(num_heads=2, dropout=0.0, proportional_attention=True)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = layer.init(jax.random.key(1), x, sizes=jnp.ones((2, 5)))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), params)
    copies = jnp.array([1, 3, 1, 2, 1])
    together = layer.apply(params, x, sizes=jnp.broadcast_to(copies, (2, 5)).astype(jnp.float32)).tokens
    apart = layer.apply(params, jnp.repeat(x, copies, axis=1, total_repeat_length=8), sizes=jnp.ones((2, 8))).tokens
    np.testing.assert_allclose(together, apart[:, jnp.array([0, 1, 4, 5, 7])], rtol=1e-4, atol=1e-5)
