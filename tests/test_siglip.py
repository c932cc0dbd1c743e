"""SigLIP's vision encoder equals transformers'; its weights in and out; SimVLG without a class token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from transformers import SiglipVisionConfig, SiglipVisionModel

from simvlg_jax.config.load import load_config
from simvlg_jax.convert import siglip, stacking
from simvlg_jax.models.connectors.tomeformer import TomeFormer, build_tomeformer
from simvlg_jax.models.contrastive import unit
from simvlg_jax.models.encoders.frames import Frames
from simvlg_jax.models.encoders.siglip import SIGLIP_SIZES, Siglip
from simvlg_jax.models.llms.llama import LLAMA_SIZES, Llama
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.tasks import build
from simvlg_jax.training import loop
from simvlg_jax.utils.errors import UserError

# Pictures of 30 pixels hold 4 x 4 patches of 7 and an edge that is not seen.
SIZE = dict(image_size=30, patch_size=7, width=24, depth=2, num_heads=3, mlp_dim=40)
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def tower() -> SiglipVisionModel:
    """Returns a tower of three layers, one more than ours. All parameters are random, so that each matters."""
    config = SiglipVisionConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=30,
        patch_size=7,
        attn_implementation="eager",
    )
    model, generator = SiglipVisionModel(config).eval(), torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        torch.nn.init.normal_(x, float(x.ndim == 1 and name.endswith("weight")), 0.2, generator=generator)
    return model


def tensors_of(tower: SiglipVisionModel) -> dict[str, np.ndarray]:
    return {f"vision_model.{name}": x.detach().numpy() for name, x in tower.state_dict().items()}


def as_torch(pictures: np.ndarray) -> torch.Tensor:
    """Maps uint8 (B, H, W, 3) to (B, 3, H, W) in -1..1, as SigLIP's image processor does."""
    return torch.from_numpy(pictures.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1)


def distance(ours, theirs: torch.Tensor) -> float:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("scan", [True, False])
def test_output_and_gradients_equal_transformers(tower, scan):
    vit = Siglip(**SIZE, scan=scan)
    params = siglip.from_torch(vit, tensors_of(tower))
    params = params if scan else stacking.unstack_layers(params)
    slopes = np.random.default_rng(1).normal(size=(2, 16, 24)).astype(np.float32)

    def product(params, pixels):
        tokens = vit.apply({"params": params}, pixels)
        return jnp.sum(tokens * slopes), tokens

    grad = jax.jit(jax.value_and_grad(product, argnums=(0, 1), has_aux=True))
    (_, tokens), (by_params, by_pixels) = grad(params, vit.normalize(PICTURES))
    pixels = as_torch(PICTURES).requires_grad_()
    theirs = tower(pixels, output_hidden_states=True).hidden_states[-2]
    (theirs * torch.from_numpy(slopes)).sum().backward()
    assert distance(tokens, theirs) < 1e-5
    assert distance(by_pixels.transpose(0, 3, 1, 2), pixels.grad) < 1e-5
    positions = tower.get_parameter("embeddings.position_embedding.weight")
    assert distance(by_params["position"][0], positions.grad) < 1e-5
    tower.zero_grad()


def test_weights_go_out_as_they_came_in(tower):
    """From a vision tower, with or without a text tower, and back. Only last layer and pooling head are lost."""
    vit, tensors = Siglip(**SIZE), tensors_of(tower)
    params = siglip.from_torch(vit, tensors)
    bare = {name.removeprefix("vision_model."): x for name, x in tensors.items()}
    text = {"text_model.embeddings.position_embedding.weight": np.ones((4, 24)), "logit_scale": np.ones(1)}
    for same in (bare, tensors | text, siglip.to_torch(vit, params)):
        jax.tree.map(np.testing.assert_array_equal, siglip.from_torch(vit, same), params)
    out = siglip.to_torch(vit, params)
    left = {name for name in tensors if not any(part in name for part in ("head.", "post_layernorm", "layers.2."))}
    assert set(out) == left
    assert all(np.array_equal(out[name], tensors[name]) for name in left)


def test_positions_are_resized_as_transformers_does(tower):
    """The file has a grid of 4 x 4, and the pictures have 6 x 6 patches. No row belongs to a class token."""
    larger = Siglip(**SIZE | dict(image_size=42))
    pictures = np.random.default_rng(2).integers(0, 256, (1, 42, 42, 3), np.uint8)
    params = siglip.from_torch(larger, tensors_of(tower))
    with torch.no_grad():
        out = tower(as_torch(pictures), output_hidden_states=True, interpolate_pos_encoding=True)
    assert distance(larger.apply({"params": params}, larger.normalize(pictures)), out.hidden_states[-2]) < 1e-5


def test_foreign_files_say_what_does_not_fit(tower):
    tensors, vit = tensors_of(tower), Siglip(**SIZE)
    for foreign in ({"cls_token": np.ones(3)}, {"cls_token": np.ones(3), "patch_embed.proj.weight": np.ones(3)}):
        with pytest.raises(UserError, match="no SigLIP weights here"):
            siglip.from_torch(vit, foreign)
    tensors["vision_model.extra"] = tensors.pop("vision_model.encoder.layers.1.mlp.fc1.bias")
    with pytest.raises(UserError, match=r"missing.*layers\.1\.mlp\.fc1\.bias\n.*not known.*extra"):
        siglip.from_torch(vit, tensors)


def test_soft_prompt_is_made_of_transformers_tokens(tower):
    """SimVLG on uint8 pictures gives the same as its connector on transformers' tokens."""
    vit, llm = Siglip(**SIZE), Llama(**LLAMA_SIZES["tiny"])
    model = SimVLG(vit, TomeFormer(24, 2, 3, (5, 5), class_token=False), llm)
    token = jnp.ones((2, 1), jnp.int32)
    init = lambda: model.init(jax.random.key(0), PICTURES, token, token, token, method="caption_losses")  # noqa: E731
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: rng.normal(x.ndim == 1, 0.2, x.shape).astype(np.float32), nn.unbox(jax.eval_shape(init))["params"]
    )
    params["vit"] = siglip.from_torch(vit, tensors_of(tower))
    visual = model.apply({"params": params}, PICTURES, method="encode_image")
    with torch.no_grad():
        theirs = tower(as_torch(PICTURES), output_hidden_states=True).hidden_states[-2]
    mean, variance = theirs.mean(-1, keepdim=True), theirs.var(-1, keepdim=True, unbiased=False)
    normed = ((theirs - mean) / (variance + 1e-5).sqrt()).numpy() * params["ln_vision"]["scale"]
    merged = model.connector.apply({"params": params["connector"]}, normed + params["ln_vision"]["bias"])
    wanted = merged.tokens @ params["llm_proj"]["kernel"] + params["llm_proj"]["bias"]
    assert visual.prefix.shape == (2, 6, 32)
    np.testing.assert_array_equal(visual.source_map, merged.source_map)
    np.testing.assert_allclose(visual.prefix, wanted, rtol=1e-4, atol=1e-4)


def test_contrast_takes_the_mean_token_and_training_runs_from_the_config(tmp_path):
    flags = ["vit.size=siglip_tiny", "train.beta=0.5", "connector.dropout=0.0", "mesh.data=1"]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    trainer = loop.Trainer(config, tmp_path)
    model, params = trainer.task.model, trainer.params
    assert isinstance(model.vit, Siglip) and not model.connector.class_token
    batch = next(trainer.iterator)
    inputs = [batch["image"], batch["sentence_ids"], batch["sentence_mask"]]
    pair = model.apply({"params": params}, *inputs, method="embed_pair")
    tokens = model.apply({"params": params}, batch["image"], method="encode_image").connector
    head = params["vision_proj"]
    np.testing.assert_allclose(pair.picture, unit(tokens.mean(1) @ head["kernel"] + head["bias"]), rtol=1e-4, atol=1e-5)
    metrics = trainer.run_step(trainer.put(batch))
    assert np.isfinite(float(metrics["loss"]))


def test_what_cannot_be_built_says_so():
    config = load_config("configs/tiny.py", ["--config.vit.size=siglip_tiny"])
    with pytest.raises(ValueError, match="512 tokens at most, and the vision encoder gives 729"):
        vit = Siglip(**SIGLIP_SIZES["siglip_so400m14_384"])
        build_tomeformer(config.connector, Frames().seen(vit), jnp.float32)
    config = ConfigDict({"vit": {"size": "siglip_b16"}, "dtype": "float32"})
    with pytest.raises(UserError, match=r"vit\.size is 'siglip_b16'; it takes .*'clip_l'.*'siglip_b16_224'"):
        build.build_vit(config)
