"""Merging inside the ViT: equal to the paper's words in NumPy, exact for equal patches, traced back to patches."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import erf

from simvlg_jax.config.load import load_config
from simvlg_jax.convert import stacking
from simvlg_jax.models.bert import BertEmbeddings
from simvlg_jax.models.encoders.siglip import Siglip
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError

SIZE = dict(image_size=32, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=32)  # 16 patches
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def random_params(module: nn.Module, *inputs, seed: int = 0, method: str | None = None) -> dict:
    """Returns parameters far from their initial values."""
    rng = np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, method=method)))["params"]
    flat = traverse_util.flatten_dict(shapes)
    flat = {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in flat.items()}
    return traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=0)
def encode(vit: ViT, params: dict, images: np.ndarray):
    return vit.apply({"params": params}, images, method="encode")


# A ViT with merging for one picture, in float64, by loops, from section 3 of the paper.


def layer_norm(x: np.ndarray, weights: dict) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weights["scale"] + weights["bias"]


def reference_block(x: np.ndarray, groups: list[set[int]], weights: dict, r: int, class_token: bool, activation):
    """Returns the tokens (T - r, D) and the patches of each, of tokens (T, D) made of the patches `groups`."""
    y = layer_norm(x, weights["norm1"])
    project = {}
    for name in ("query", "key", "value"):
        project[name] = np.einsum("td,dnh->nth", y, weights[name]["kernel"])
        if "bias" in weights[name]:
            project[name] += weights[name]["bias"][:, None]
    sizes = np.array([len(group) for group in groups])
    contexts = []
    for query, key, value in zip(*project.values(), strict=True):  # heads
        share = np.exp(query @ key.T / np.sqrt(query.shape[-1])) * sizes  # softmax(q k / sqrt(d) + log s)
        contexts.append(share / share.sum(-1, keepdims=True) @ value)
    x = x + np.einsum("nth,nhd->td", contexts, weights["out"]["kernel"]) + weights["out"]["bias"]

    metric = project["key"].mean(0)
    metric /= np.linalg.norm(metric, axis=-1, keepdims=True)
    first, second = range(2 if class_token else 0, len(x), 2), range(1, len(x), 2)
    edges = [max((float(metric[a] @ metric[b]), a, b) for b in second) for a in first]
    chosen = {a: b for _, a, b in sorted(edges, reverse=True)[:r]}
    tokens, merged = [], []
    for place in [*range(0, len(x), 2), *second] if r else range(len(x)):
        if place not in chosen:
            parts = [place, *(a for a, b in chosen.items() if b == place)]
            tokens.append(np.average(x[parts], axis=0, weights=sizes[parts]))
            merged.append(set().union(*(groups[part] for part in parts)))
    x = np.array(tokens)
    y = layer_norm(x, weights["norm2"])
    hidden = activation(y @ weights["mlp"]["fc1"]["kernel"] + weights["mlp"]["fc1"]["bias"])
    return x + hidden @ weights["mlp"]["fc2"]["kernel"] + weights["mlp"]["fc2"]["bias"], merged


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def reference(vit: ViT, params: dict, image: np.ndarray, activation):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    patches = [image[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].ravel() for i, j in itertools.product(range(4), repeat=2)]
    x = np.array(patches) @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
    if vit.class_token:
        x = np.concatenate([params["cls"][0], x])
    x, groups = x + params["position"][0], [{place} for place in range(len(x))]
    for number, r in enumerate(vit.merges):
        weights = jax.tree.map(lambda w, number=number: w[number], params["blocks"])
        x, groups = reference_block(x, groups, weights, r, vit.class_token, activation)
    return x, groups


@pytest.mark.parametrize(("kind", "activation"), [(ViT, exact_gelu), (Siglip, tanh_gelu)])
def test_equals_the_paper_in_numpy(kind, activation):
    vit = kind(**SIZE, merges=(5, 0, 4))
    params = random_params(vit, IMAGES)
    out = encode(vit, params, IMAGES)
    for row, image in enumerate(IMAGES):
        tokens, groups = reference(vit, params, image, activation)
        np.testing.assert_allclose(out.tokens[row], tokens, rtol=1e-4, atol=1e-4)
        assert [set(np.flatnonzero(out.source_map[row] == slot)) for slot in range(len(groups))] == groups


def test_without_merging_the_program_is_the_same():
    params = random_params(ViT(**SIZE), IMAGES)
    programs = {
        str(jax.make_jaxpr(lambda p, x, vit=vit: vit.apply({"params": p}, x))(params, IMAGES))
        for vit in (ViT(**SIZE), ViT(**SIZE, merges=(0, 0, 0)))
    }
    assert len(programs) == 1
    assert "log" not in programs.pop(), "without merging, attention has no sizes"
    assert encode(ViT(**SIZE), params, IMAGES).source_map is None


@settings(deadline=None, max_examples=8)
@given(
    merges=st.sampled_from([(3, 2, 1), (8, 8, 8), (100, 1, 0), (0, 0, 7)]),
    kind=st.sampled_from([ViT, Siglip]),
    seed=st.integers(0, 2**16),
)
def test_every_patch_is_in_one_token_and_the_class_token_alone(merges, kind, seed):
    vit = kind(**SIZE, merges=merges)
    out = encode(vit, random_params(vit, IMAGES, seed=seed), IMAGES)
    assert out.tokens.shape == (2, vit.num_output_tokens, 16) and out.source_map.shape == (2, vit.num_tokens)
    for places in np.asarray(out.source_map):
        counts = np.bincount(places)
        assert len(counts) == vit.num_output_tokens and counts.min() > 0 and counts.sum() == vit.num_tokens
        if vit.class_token:
            assert places[0] == 0 and counts[0] == 1


def repeated(times: int) -> np.ndarray:
    """Returns a picture whose patches are equal in runs of `times`."""
    patches = np.random.default_rng(1).normal(size=(16 // times, 8, 8, 3)).repeat(times, 0).astype(np.float32)
    return patches.reshape(1, 4, 4, 8, 8, 3).swapaxes(2, 3).reshape(1, 32, 32, 3)


def without_positions(params: dict) -> dict:
    return {**params, "position": jnp.zeros_like(params["position"])}


# Equal tokens that are merged, weighted by their number, are the same function of the weights as the unmerged ones.
EQUAL = [(16, (8, 4, 2)), (4, (8, 4, 0)), (2, (8, 0, 0))]  # after these merges one token is left of each run


@pytest.mark.parametrize(("times", "merges"), EQUAL)
def test_merging_equal_patches_changes_nothing(times, merges):
    vit, picture = ViT(**SIZE, merges=merges), repeated(times)
    params = without_positions(random_params(vit, picture))
    out, whole = encode(vit, params, picture), encode(ViT(**SIZE), params, picture)
    assert out.tokens.shape[1] < 17
    np.testing.assert_allclose(out.tokens[:, out.source_map[0]], whole.tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_through_the_merge_are_those_of_the_unmerged_function(remat):
    picture = repeated(2)
    vit = ViT(**SIZE, merges=(8, 0, 0), remat=remat)
    params = without_positions(random_params(vit, picture))

    def loss(params, vit):
        out = vit.apply({"params": params}, picture, method="encode")
        tokens = out.tokens if out.source_map is None else out.tokens[:, out.source_map[0]]
        return jnp.sum(jnp.sin(tokens) ** 2)

    merged, whole = (jax.jit(jax.grad(loss), static_argnums=1)(params, each) for each in (vit, ViT(**SIZE)))
    assert min(np.abs(x).max() for path, x in traverse_util.flatten_dict(whole).items() if path[-2:] != ("key", "bias"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), merged, whole)


def test_stacked_and_unrolled_parameters_give_the_same_tokens():
    merges = (4, 0, 3)
    stacked, unrolled = (ViT(**SIZE, merges=merges, scan=scan) for scan in (True, False))
    params = random_params(stacked, IMAGES)
    one, other = encode(stacked, params, IMAGES), encode(unrolled, stacking.unstack_layers(params), IMAGES)
    np.testing.assert_allclose(one.tokens, other.tokens, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(one.source_map, other.source_map)


@pytest.mark.parametrize("scan", [True, False])
def test_merging_changes_no_parameter(scan):
    plain, merging = (
        jax.jit(ViT(**SIZE, merges=merges, scan=scan).init)(jax.random.key(0), IMAGES) for merges in ((), (4, 0, 3))
    )
    assert jax.tree.structure(plain) == jax.tree.structure(merging)  # the boxes with the names of axes are part of it
    jax.tree.map(np.testing.assert_array_equal, plain, merging)


def task_of(*flags: str):
    task = build_task(load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags]))
    abstract = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    rng, flat = np.random.default_rng(0), traverse_util.flatten_dict(abstract)
    params = {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in flat.items()}
    return task, traverse_util.unflatten_dict(params)


def encode_image(task, params: dict, images: np.ndarray):
    return jax.jit(lambda p, x: task.model.apply({"params": p}, x, method="encode_image"))(params, images)


def test_the_map_of_the_connector_speaks_of_patches():
    task, params = task_of("vit.tokens=11", "connector.merges=(8,4)")
    vit, connector = task.model.vit, task.model.connector
    assert (vit.merges, vit.num_tokens, vit.num_output_tokens, connector.merges) == ((3, 3), 17, 11, (2, 4))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    visual = encode_image(task, params, images)
    seen = encode(vit, params["vit"], vit.normalize(images))
    assert visual.prefix.shape[1] == 5 and visual.source_map.shape == (3, 17)
    np.testing.assert_array_equal(visual.layers[-1], visual.source_map)
    for finer, coarser, count in zip([seen.source_map, *visual.layers], visual.layers, (9, 5), strict=False):
        assert [len(set(row)) for row in np.asarray(coarser)] == [count] * 3
        for before, after in zip(np.asarray(finer), np.asarray(coarser), strict=True):
            assert len(set(zip(before, after, strict=True))) == len(set(before)), "what is one token stays one token"


def test_the_connector_goes_on_with_the_sizes_of_the_vit():
    """With weighted means and proportional attention, the prefix of equal patches does not depend on the merging."""
    flags = ("connector.weighted_mean=True", "connector.proportional_attention=True", "connector.merges=(0,0)")
    (merging, params), (plain, _) = task_of("vit.r=8", *flags), task_of(*flags)
    assert merging.model.vit.num_output_tokens == 5
    params["vit"] = without_positions(params["vit"])
    params["connector"]["embeddings"] = without_positions(params["connector"]["embeddings"])
    picture = repeated(4)
    one, other = (encode_image(task, params, picture) for task in (merging, plain))
    assert one.prefix.shape[1] == 5
    np.testing.assert_allclose(one.prefix[:, one.source_map[0]], other.prefix, rtol=1e-4, atol=1e-4)


def test_merged_tokens_have_the_mean_position_of_their_patches():
    places, x = jnp.array([[0, 2, 1, 2, 2], [1, 0, 2, 1, 1]]), jnp.zeros((2, 3, 4))
    module = BertEmbeddings(max_positions=7)
    params = random_params(module, x)
    out = module.apply({"params": params}, x, places)
    rows = params["position"]
    parts = [[[0], [2], [1, 3, 4]], [[1], [0, 3, 4], [2]]]
    mean = np.array([[rows[group].mean(0) for group in picture] for picture in parts]) + params["token_type"][0]
    normal = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(out, normal * params["norm"]["scale"] + params["norm"]["bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "merges"),
    [
        (["connector.merges=(5,5)"], (0, 4)),  # 17 -> 12 -> 7, and 11 -> 11 -> 7
        (["connector.r=7"], (1, 4)),  # 17 -> 10 -> 6
        (["connector.r=2"], (0, 0)),  # 17 -> 13, and 11 tokens are all there are
        (["connector.tokens=5"], (2, 4)),  # 17 -> 9 -> 5
    ],
)
def test_each_layer_leaves_as_many_tokens_as_without_merging(flags, merges):
    flags = [f"--config.{flag}" for flag in ["vit.r=3", *flags]]
    assert build_task(load_config("configs/tiny.py", flags)).model.connector.merges == merges


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vit.r=1", "vit.tokens=13"], "vit.r and vit.tokens both set the merges"),
        (["vit.tokens=3"], "vit.tokens: 17 tokens cannot become 3 in 2 layers; 5 is the least"),
        (["vit.tokens=18"], "vit.tokens: 17 tokens cannot become 18"),
        (["vit.r=1", "vit.temporal=True"], "vit.r is for pictures"),
        (["vit.tokens=13", "task=contrastive"], "vit.tokens is for the tasks caption and scst"),
        (["vit.r=-1"], "vit.r is -1; it must be at least 0"),
    ],
)
def test_what_does_not_fit_is_an_error(flags, message):
    with pytest.raises(UserError, match=message) as error:
        build_task(load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags]))
    assert error.value.status == 2


def test_a_sharded_batch_needs_no_collectives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    vit, images = ViT(**SIZE, merges=(4, 0, 3)), jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    params = random_params(vit, IMAGES)

    def function(params, images):
        return vit.apply({"params": params}, images, method="encode")

    program = jax.jit(function, in_shardings=(everywhere, rows), out_shardings=rows).lower(params, images).compile()
    assert "dot" in program.as_text()
    for operation in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert operation not in program.as_text()
