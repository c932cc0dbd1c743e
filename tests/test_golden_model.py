"""The whole image model with a LLaMA against the published PyTorch code: every stage, the loss, every gradient."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from simvlg_jax.convert import evlgen
from simvlg_jax.models.llama import Llama
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.models.tomeformer import TomeFormer
from simvlg_jax.models.vit import ViT

GOLDEN = Path(__file__).parent / "golden"
TRAINED = ("ln_vision", "vl_proj", "connector", "llm_proj")


def build(sizes: dict, **options) -> SimVLG:
    v, c, lm = sizes["vit"], sizes["connector"], sizes["lm"]
    mlp_dim = int(v["dim"] * v["mlp"])
    return SimVLG(
        ViT(v["img"], v["patch"], v["dim"], v["depth"], v["heads"], mlp_dim, **options),
        TomeFormer(c["dim"], c["layers"], c["heads"], (c["r"],) * c["layers"]),
        Llama(lm["dim"], lm["layers"], lm["heads"], lm.get("kv", lm["heads"]), lm["ffn"], lm["vocab"], **options),
    )


@pytest.fixture(scope="module")
def golden():
    sizes = json.loads((GOLDEN / "image_llama.json").read_text())
    tensors = load_file(GOLDEN / "image_llama.safetensors")
    arrays = dict(np.load(GOLDEN / "image_llama.npz"))
    params = jax.tree.map(jnp.asarray, evlgen.simvlg_from_torch(build(sizes), tensors))
    return sizes, params, arrays, tensors


def inputs(arrays):
    images = jnp.asarray(arrays["image"].transpose(0, 2, 3, 1))
    return images, jnp.asarray(arrays["ids"]), jnp.asarray(arrays["mask"])


def error(ours, theirs, floor=0.0):
    return float(np.linalg.norm(np.asarray(ours) - theirs) / max(np.linalg.norm(theirs), floor))


@pytest.mark.parametrize("remat", [False, True])
def test_every_stage_and_the_loss(golden, remat):
    sizes, params, arrays, _ = golden
    model = build(sizes, remat=remat)
    images, ids, mask = inputs(arrays)
    output = model.apply({"params": params}, images, ids, mask)
    for stage in ("frames", "ln", "connector", "prefix"):
        assert error(getattr(output.visual, stage), arrays[stage]) < 1e-5, stage
    logits = model.llm.apply({"params": params["llm"]}, output.hidden, method="logits")
    prefix = output.visual.prefix.shape[1]
    real = np.concatenate([np.ones((len(ids), prefix), bool), arrays["mask"] > 0], 1)
    assert error(np.asarray(logits)[real], arrays["logits"][real]) < 1e-5
    losses, counts = model.apply(
        {"params": params}, images, ids, mask, jnp.asarray(arrays["targets"]), method="caption_losses"
    )
    assert float(losses.sum() / counts.sum()) == pytest.approx(float(arrays["loss"]), rel=1e-5)


def test_every_gradient(golden):
    sizes, params, arrays, _ = golden
    model = build(sizes)
    frozen = {name: params[name] for name in ("vit", "llm")}

    def mean_loss(trained):
        batch = (*inputs(arrays), jnp.asarray(arrays["targets"]))
        losses, counts = model.apply({"params": {**frozen, **trained}}, *batch, method="caption_losses")
        return losses.sum() / counts.sum()

    gradients = jax.grad(mean_loss)({name: params[name] for name in TRAINED})
    ours = evlgen.trained_to_torch(gradients)
    theirs = {name.removeprefix("grad/"): x for name, x in arrays.items() if name.startswith("grad/")}
    assert set(ours) == set(theirs)
    floor = 1e-6 * np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in theirs.values()))
    worst = max(theirs, key=lambda name: error(ours[name], theirs[name], floor))
    assert error(ours[worst], theirs[worst], floor) < 1e-4, worst


def test_trained_names_round_trip(golden):
    _, params, _, tensors = golden
    exported = evlgen.trained_to_torch(params)
    assert all(np.array_equal(x, tensors[name]) for name, x in exported.items())


def test_unrolled_vit_equals_scanned(golden):
    sizes, params, arrays, _ = golden
    images = inputs(arrays)[0]
    from simvlg_jax.convert.stacking import unstack_layers

    unrolled = build(sizes, scan=False).vit
    ours = unrolled.apply({"params": unstack_layers(params["vit"])}, images)
    assert error(ours, arrays["frames"]) < 1e-5
