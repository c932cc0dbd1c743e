"""The auxiliary contrastive loss (beta): its value against torch, what it adds to the loss, what it trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel

from simvlg_jax.config import load_config
from simvlg_jax.convert import bert, evlgen
from simvlg_jax.models.bert import SentenceEncoder
from simvlg_jax.models.contrastive import matching_losses, unit
from simvlg_jax.training import loop, tasks
from simvlg_jax.training.frozen import fingerprint


def tiny(*overrides: str):
    overrides = ("train.beta=0.5", "connector.dropout=0.0", "mesh.data=1", "train.steps=3", *overrides)
    return load_config("configs/tiny.py", [f"--config.{o}" for o in overrides])


def test_value_equals_torch():
    picture, text = (unit(x) for x in jax.random.normal(jax.random.key(0), (2, 6, 16)))
    features = [torch.from_numpy(np.array(x)) for x in (picture, text)]
    similarity = features[0] @ features[1].T / 0.07
    entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    targets = torch.arange(6)
    wanted = (entropy(similarity, targets) + entropy(similarity.T, targets)) / 2
    assert float(matching_losses(picture, text, 0.07).mean()) == pytest.approx(wanted.item(), rel=1e-5)
    held = matching_losses(picture, text, jnp.float32(3.0))
    np.testing.assert_allclose(held, matching_losses(picture, text, 0.5), rtol=1e-6)


def test_loss_is_the_captions_plus_beta_times_the_contrast(tmp_path):
    trainer = loop.Trainer(tiny(), tmp_path)
    batch = next(trainer.iterator)
    assert batch["sentence_ids"].shape == batch["sentence_mask"].shape == (8, 24)
    model, params = trainer.task.model, trainer.params
    inputs = [batch[name] for name in ("image", "ids", "mask", "targets")]
    losses, counts = model.apply({"params": params}, *inputs, method="caption_losses")
    visual = model.apply({"params": params}, batch["image"], method="encode_image")
    sentences = SentenceEncoder(32, 2, 2, 98).apply(
        {"params": params["sentence_encoder"]}, batch["sentence_ids"], batch["sentence_mask"]
    )

    def project(x: jax.Array, name: str) -> jax.Array:
        return unit(x @ params[name]["kernel"] + params[name]["bias"])

    matching = matching_losses(
        project(visual.connector[:, 0], "vision_proj"), project(sentences, "text_proj"), params["temperature"]
    )
    wanted = losses.sum() / counts.sum() + 0.5 * matching.mean()
    metrics = trainer.run_step(loop.meshes.put_batch(batch, trainer.mesh))
    assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-5)


def test_projections_and_temperature_are_trained_and_the_sentence_encoder_is_not(tmp_path):
    trainer = loop.Trainer(tiny(), tmp_path)
    assert set(trainer.frozen) == {"vit", "llm", "sentence_encoder"}
    before, frozen = jax.device_get(trainer.state.params), fingerprint(trainer.frozen)
    for _ in range(2):
        trainer.run_step(loop.meshes.put_batch(next(trainer.iterator), trainer.mesh))
    after = jax.device_get(trainer.state.params)
    assert fingerprint(trainer.frozen) == frozen
    assert after["temperature"] != before["temperature"] == pytest.approx(0.07)
    for name in ("vision_proj", "text_proj"):
        assert not np.array_equal(after[name]["kernel"], before[name]["kernel"])


def test_contrast_is_over_the_batch_of_all_devices(tmp_path):
    losses = []
    for name, mesh in (("one", ["mesh.data=1"]), ("eight", ["mesh.data=4", "mesh.fsdp=2"])):
        (tmp_path / name).mkdir()
        trainer = loop.Trainer(tiny(*mesh), tmp_path / name)
        batches = [next(trainer.iterator) for _ in range(3)]
        losses.append([float(trainer.run_step(loop.meshes.put_batch(b, trainer.mesh))["loss"]) for b in batches])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_published_names_of_the_contrastive_part():
    task = tasks.build_task(tiny("llm.size=opt_tiny"))
    params = jax.device_get(nn.unbox(jax.jit(task.init)(jax.random.key(0))))
    trained = {name: tree for name, tree in params.items() if name not in ("vit", "llm", "sentence_encoder")}
    named = evlgen.to_evlgen(task.model, trained)
    assert {"temp", "vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias"} <= set(named)
    assert named["temp"].shape == () and named["vision_proj.weight"].shape == (256, 32)
    back = evlgen.from_evlgen(task.model, named)
    jax.tree.map(np.testing.assert_array_equal, back, trained)


def test_simcse_pooler_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    model = BertModel(config).eval()
    save_file({name: x.numpy() for name, x in model.state_dict().items()}, tmp_path / "model.safetensors")
    params = jax.tree.map(np.asarray, bert.load_bert(tmp_path, 2, 3, words=True, pooler=True))
    ids = np.random.default_rng(0).integers(0, 30, (3, 7)).astype(np.int32)
    mask = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).pooler_output.numpy()
    ours = SentenceEncoder(24, 2, 3, 30, pooling="pooler").apply({"params": params}, ids, mask)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
