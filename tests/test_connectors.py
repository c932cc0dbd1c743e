"""The connectors beside the TomeFormer: the numbers of their papers, and what each does in the rest of the program."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import traverse_util
from PIL import Image
from verbs import call

from simvlg_jax import evaluate, report, train
from simvlg_jax.config.load import load_config
from simvlg_jax.convert import own_files
from simvlg_jax.demo import views
from simvlg_jax.demo.looks import Looks
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.evaluation.report.merge_map import merge_map
from simvlg_jax.models.connectors.mlp import pooling, rectangle
from simvlg_jax.models.connectors.perceiver import Perceiver
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import UserError

MLP, POOL = ["connector.type=mlp"], ["connector.type=pool", "connector.tokens=6"]
PERCEIVER = ["connector.type=perceiver", "connector.queries=5"]
VITS = [[], ["vit.tokens=11"], ["vit.size=siglip_tiny"], ["vit.size=siglip_tiny", "vit.tokens=11"]]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def config_of(*flags):
    own = ["mesh.data=1", "connector.dropout=0.0", "evaluate.max_new_tokens=6"]
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in (*own, *flags)])


def random_params(task, seed=0):
    rng = np.random.default_rng(seed)
    shapes = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    return traverse_util.unflatten_dict(
        {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in shapes.items()}
    )


def soft_prompt(*flags):
    """Returns the task, random parameters, the connector's input (B, T, C), its source map, and what comes out."""
    task = build_task(config_of(*flags))
    model, params = task.model, random_params(task)
    seen, out = jax.jit(
        lambda params: (
            model.vit.apply({"params": params["vit"]}, model.vit.normalize(IMAGES), method="encode"),
            model.apply({"params": params}, IMAGES, method="encode_image"),
        )
    )(params)
    normed = F.layer_norm(torch.tensor(np.array(seen.tokens)), (32,), eps=1e-5).numpy()
    visual = normed * params["ln_vision"]["scale"] + params["ln_vision"]["bias"]
    return task, params, visual, seen.source_map, out


def mlp_of(params, x):
    """LLaVA's MLP in NumPy and in PyTorch."""
    (first, bias), (second, last) = (
        (linear["kernel"], linear["bias"]) for linear in (params["connector"]["vl_proj"], params["llm_proj"])
    )
    hidden = x @ first + bias
    by_hand = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) @ second + last
    layers = torch.nn.Linear(*first.shape), torch.nn.GELU(), torch.nn.Linear(*second.shape)
    with torch.no_grad():
        for layer, *weights in ((layers[0], first, bias), (layers[2], second, last)):
            layer.weight.copy_(torch.tensor(weights[0].T))
            layer.bias.copy_(torch.tensor(weights[1]))
        return by_hand, torch.nn.Sequential(*layers)(torch.tensor(x)).numpy()


@pytest.mark.parametrize("vit", VITS)
def test_the_mlp_is_llavas_on_every_token_but_the_class_token(vit):
    task, params, visual, source_map, out = soft_prompt(*MLP, "connector.width=24", *vit)
    dropped = int(task.model.vit.class_token)
    for wanted in mlp_of(params, visual[:, dropped:]):
        np.testing.assert_allclose(out.prefix, wanted, rtol=1e-4, atol=1e-4)
    before = np.broadcast_to(np.arange(visual.shape[1]), visual.shape[:2]) if source_map is None else source_map
    np.testing.assert_array_equal(out.source_map, before - dropped)  # the class token becomes part of no token: -1
    assert len(out.layers) == 1 and out.source_map.shape == (3, 16 + dropped)


@pytest.mark.parametrize("vit", VITS)
def test_pooling_averages_the_grid_as_torch_does(vit):
    task, params, visual, source_map, out = soft_prompt(*POOL, *vit)
    dropped = int(task.model.vit.class_token)
    patches = visual if source_map is None else np.take_along_axis(visual, np.array(source_map)[..., None], 1)
    grid = torch.tensor(patches[:, dropped:]).mT.unflatten(2, (4, 4))
    pooled = F.adaptive_avg_pool2d(grid, (2, 3)).flatten(2).mT.numpy()
    for wanted in mlp_of(params, pooled):
        np.testing.assert_allclose(out.prefix, wanted, rtol=1e-4, atol=1e-4)
    # Of 4 columns, the second is in the first two cells, and the third in the last two: their centres decide.
    cells = np.array([[0, 1, 1, 2]] * 2 + [[3, 4, 4, 5]] * 2).reshape(-1)
    np.testing.assert_array_equal(out.source_map, [[-1] * dropped + cells.tolist()] * 3)


@pytest.mark.parametrize(("grid", "rows", "columns"), [(4, 2, 2), (5, 2, 3), (16, 5, 7), (7, 7, 7), (3, 1, 2)])
def test_each_patch_is_in_its_cell_and_no_cell_is_empty(grid, rows, columns):
    weights, owners = pooling(grid, rows, columns)
    x = torch.randn(2, 3, grid, grid, generator=torch.Generator().manual_seed(0))
    wanted = F.adaptive_avg_pool2d(x, (rows, columns)).flatten(2)
    np.testing.assert_allclose(np.einsum("pn,bcn->bcp", weights, x.flatten(2)), wanted, atol=1e-6)
    assert (weights[owners, np.arange(grid * grid)] > 0).all()
    assert set(owners) == set(range(rows * columns))


def test_cells_are_as_square_as_their_number_allows():
    assert [rectangle(tokens, 16) for tokens in (1, 6, 7, 36, 48, 256)] == [
        *((1, 1), (2, 3), (1, 7), (6, 6), (6, 8), (16, 16)),
    ]
    assert rectangle(17, 16) is rectangle(34, 16) is None


def test_the_perceiver_is_flamingos():
    task, params, visual, _, out = soft_prompt(*PERCEIVER)
    own, tensors = params["connector"], jax.tree.map(torch.tensor, params["connector"])

    def norm(x, name):
        return F.layer_norm(x, (32,), tensors_of[name]["scale"], tensors_of[name]["bias"], 1e-5)

    x = torch.tensor(visual) @ tensors["vl_proj"]["kernel"] + tensors["vl_proj"]["bias"]
    latents = tensors["latents"].expand(3, -1, -1)
    for i in range(task.model.connector.depth):
        tensors_of = tensors[f"layer_{i}"]
        asking = norm(latents, "latent_norm")
        keys = torch.cat([norm(x, "visual_norm"), asking], 1)
        attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        names = ("query", "key", "value")
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([tensors_of[n]["kernel"].reshape(32, 32).T for n in names]))
            attention.in_proj_bias.copy_(torch.cat([tensors_of[n]["bias"].reshape(32) for n in names]))
            attention.out_proj.weight.copy_(tensors_of["attention_out"]["kernel"].reshape(32, 32).T)
            attention.out_proj.bias.copy_(tensors_of["attention_out"]["bias"])
            latents = latents + attention(asking, keys, keys, need_weights=False)[0]
        mlp = tensors_of["mlp"]
        hidden = F.relu(norm(latents, "mlp_norm") @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]) ** 2
        latents = latents + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    tensors_of = tensors
    np.testing.assert_allclose(out.connector, norm(latents, "norm"), rtol=1e-4, atol=1e-4)
    assert own["latents"].shape == (5, 32) and out.source_map is None and out.layers == ()


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize(("flags", "tokens"), [(MLP, None), (POOL, 6), (PERCEIVER, 5)])
def test_shapes_and_rules_with_each_vision_encoder(flags, tokens, vit):
    task = build_task(config_of(*flags, *vit, "train.beta=0.5"))
    shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    partition.check_rules(task.rules, traverse_util.flatten_dict(shapes))
    trained = partition.split(shapes, task.is_trained)[0]
    assert jax.tree.structure(trained["connector"]) == jax.tree.structure(shapes["connector"])
    images = jax.ShapeDtypeStruct(IMAGES.shape, np.uint8)
    visual = jax.eval_shape(lambda p, i: task.model.apply({"params": p}, i, method="encode_image"), shapes, images)
    assert visual.prefix.shape == (3, tokens or (task.model.vit.num_output_tokens - task.model.vit.class_token), 32)


@pytest.mark.parametrize("flags", [MLP, POOL, PERCEIVER])
def test_every_parameter_gets_a_gradient(flags):
    task = build_task(config_of(*flags, "train.beta=0.5"))
    trained, frozen = partition.split(random_params(task), task.is_trained)
    shapes = task.batch.shapes(4)
    rng = np.random.default_rng(1)
    batch = {name: jnp.asarray(rng.integers(1, 5, shape), dtype) for name, (shape, dtype) in shapes.items()}
    batch["image"] = jnp.asarray(rng.integers(0, 256, shapes["image"][0]), jnp.uint8)

    def loss(trained):
        values, pair = task.losses(partition.join(frozen, trained), batch, jax.random.key(0))
        return values["caption"].sum() + pair.picture[:, 0].sum()

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(trained)["connector"])
    without = {path for path, gradient in gradients.items() if not np.abs(gradient).max() > 0}
    assert without == {path for path in gradients if path[-2:] == ("key", "bias")}


@pytest.mark.parametrize("flags", [MLP, POOL, PERCEIVER])
def test_weights_of_a_connector_are_read_alone_and_from_an_exported_model(flags, tmp_path):
    params = random_params(build_task(config_of(*flags)))
    own_files.write_tree(tmp_path / "connector.safetensors", params["connector"])
    own_files.write_tree(tmp_path / "whole.safetensors", params)
    for name in ("connector", "whole"):
        task = build_task(config_of(*flags, f"connector.weights={tmp_path / name}.safetensors"))
        loaded = task.load_pretrained(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
        jax.tree.map(np.testing.assert_array_equal, loaded, {"connector": params["connector"]})


def test_a_bert_is_no_perceiver(tmp_path):
    own_files.write_arrays(tmp_path / "bert.safetensors", {"embeddings.position_embeddings.weight": np.ones((2, 2))})
    task = build_task(config_of(*PERCEIVER, f"connector.weights={tmp_path / 'bert.safetensors'}"))
    with pytest.raises(UserError, match="a BERT is for the TomeFormer"):
        task.load_pretrained({})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [*MLP, "connector.tokens=4"],
            "connector.tokens is for tomeformer, pool: leave it at 0 with connector.type='mlp'",
        ),
        ([*PERCEIVER, "connector.r=2"], "connector.r is for tomeformer: leave it at 0 with connector.type='perceiver'"),
        ([*PERCEIVER, "connector.budgets=(2,4)"], "connector.budgets is for tomeformer, pool: leave it at ()"),
        ([*POOL, "connector.weighted_mean=True"], "connector.weighted_mean is for tomeformer: leave it at False"),
        ([*POOL, "connector.position_norm=2.0"], "connector.position_norm is for tomeformer: leave it at 0.0 with"),
        (["connector.width=8"], "connector.width is for mlp, pool: leave it at 0 with connector.type='tomeformer'"),
        (["connector.type=pool"], "needs connector.tokens"),
        ([*POOL, "connector.tokens=7"], r"no rectangle of cells in 4 x 4 patches; near ones are 6 and 8"),
        ([*MLP, "connector.size=huge"], "connector.size is 'huge'"),
        (
            ["connector.type=cnn"],
            "connector.type is 'cnn'; it takes 'tomeformer', 'qformer', 'mlp', 'pool'",
        ),
    ],
)
def test_keys_that_a_connector_does_not_have_are_refused(flags, message):
    with pytest.raises(UserError, match=message) as raised:
        build_task(config_of(*flags))
    assert raised.value.status == 2


def test_other_numbers_of_tokens_if_the_connector_has_them():
    config = config_of(*POOL)
    task = build_task(config)
    model = CaptionModel(config, task, random_params(task))
    other = model.with_merging(tokens=4)
    assert other.explain(IMAGES[0], "red").layers[0].tolist() == [-1, *[0, 0, 1, 1] * 2, *[2, 2, 3, 3] * 2]
    config = config_of(*PERCEIVER)
    with pytest.raises(UserError, match=r"connector\.tokens is for tomeformer, pool"):
        CaptionModel(config, build_task(config), {}).with_merging(tokens=4)


def test_the_page_shows_a_connector_without_a_merge_map(tmp_path):
    config = config_of(*PERCEIVER)
    task = build_task(config)
    looks = Looks(CaptionModel(config, task, random_params(task)))
    assert (looks.least, looks.own, looks.most, looks.patches) == (5, 5, 5, 16)
    Image.fromarray(IMAGES[0]).save(tmp_path / "picture.png")
    html, tried = views.look(looks, str(tmp_path / "picture.png"), looks.own, {}, lambda share, text: None)
    assert "so there is no merge map" in html and [tokens for _, tokens in tried] == [5]
    assert "makes\n    5 tokens of them" in views.draw("head.html.j2", name="tiny", note="", looks=looks)


def test_a_run_without_a_merge_map_is_trained_scored_and_shown(tmp_path):
    own = ["mesh.data=1", "train.steps=1", "evals.val.every=0", "evals.val.max_examples=4", "evaluate.max_new_tokens=4"]
    given = [f"--config.{flag}" for flag in (*own, *PERCEIVER)]
    assert call(train, "--config", "configs/tiny.py", "--workdir", tmp_path, *given) == 0
    assert call(evaluate, "--workdir", tmp_path, "--split", "val") == 0
    results = json.loads((tmp_path / "eval" / "val.json").read_text())
    assert results["visual_tokens"] == 5
    assert all(example["source_map"] is None and example["layers"] == [] for example in results["examples"])
    assert call(report, "--workdir", tmp_path) == 0
    assert "patches →" not in (tmp_path / "report.html").read_text()


def test_the_report_draws_which_patches_were_averaged():
    layers = [[-1, *[0, 0, 1, 1] * 2, *[2, 2, 3, 3] * 2]]
    (layer,) = merge_map(layers).layers
    assert layer.tokens == len(layer.tints) == 4 and layer.dots == []


def test_latents_are_as_wide_as_the_size_says():
    model = build_task(config_of("connector.type=perceiver", "connector.size=minilm_l6")).model.connector
    assert model == Perceiver(width=384, depth=6, num_heads=12, queries=32, dropout=0.0)
