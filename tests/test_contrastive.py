"""The contrastive losses: their value, what they train, and the batch that they compare.

Their value equals torch's. They compare the whole global batch on any mesh and with any number of micro-batches.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from first_step import first_step
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel

from simvlg_jax import tasks
from simvlg_jax.config.load import load_config
from simvlg_jax.convert import bert, evlgen
from simvlg_jax.evaluation.evaluators import make_evaluator
from simvlg_jax.models.contrastive import matching_losses, unit
from simvlg_jax.models.sentence_encoder import SentenceEncoder
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import params as partition
from simvlg_jax.training import loop
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.plan import Plan


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


def test_rows_of_weight_0_are_left_out_of_the_loss_and_its_gradient():
    picture, text = (unit(x) for x in jax.random.normal(jax.random.key(0), (2, 6, 16)))
    weight = np.array([1, 0, 1, 1, 0, 1], np.float32)
    real = np.flatnonzero(weight)
    found, gradients = jax.value_and_grad(lambda *pair: matching_losses(*pair, 0.07, weight).sum(), (0, 1))(
        picture, text
    )
    wanted, of_real = jax.value_and_grad(lambda *pair: matching_losses(*pair, 0.07).sum(), (0, 1))(
        picture[real], text[real]
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    for ours, theirs in zip(gradients, of_real, strict=True):
        np.testing.assert_allclose(ours[real], theirs, rtol=1e-4, atol=1e-6)
        assert (ours[weight == 0] == 0).all()


def test_batch_in_which_no_row_counts_has_neither_loss_nor_gradient():
    pair = [unit(x) for x in jax.random.normal(jax.random.key(0), (2, 6, 16))]
    loss = lambda *x: matching_losses(*x, np.zeros(6, np.float32)).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*pair, 0.07)
    assert value == 0 and all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_loss_is_the_captions_plus_beta_times_the_contrast(tmp_path):
    trainer = loop.Trainer(tiny(), tmp_path)
    batch = next(trainer.iterator)
    assert batch["sentence_ids"].shape == batch["sentence_mask"].shape == (8, 24)
    model, params = trainer.task.model, trainer.params
    inputs = [batch[name] for name in ("image", "caption_ids", "caption_mask", "caption_targets")]
    losses, counts = jax.jit(functools.partial(model.apply, method="caption_losses"))({"params": params}, *inputs)
    encode = jax.jit(functools.partial(model.apply, method="encode_image"))
    visual = encode({"params": params}, batch["image"])
    sentences = jax.jit(SentenceEncoder(32, 2, 2, 98).apply)(
        {"params": params["sentence_encoder"]}, batch["sentence_ids"], batch["sentence_mask"]
    )

    def project(x: jax.Array, name: str) -> jax.Array:
        return unit(x @ params[name]["kernel"] + params[name]["bias"])

    matching = matching_losses(
        project(visual.connector[:, 0], "vision_proj"), project(sentences, "text_proj"), params["temperature"]
    )
    wanted = losses.sum() / counts.sum() + 0.5 * matching.mean()
    metrics = trainer.run_step(trainer.put(batch))
    assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-5)


def test_projections_and_temperature_are_trained_and_the_sentence_encoder_is_not(tmp_path):
    trainer = loop.Trainer(tiny(), tmp_path)
    assert set(trainer.frozen) == {"vit", "llm", "sentence_encoder"}
    before, frozen = jax.device_get(trainer.state.params), fingerprint(trainer.frozen)
    for _ in range(2):
        trainer.run_step(trainer.put(next(trainer.iterator)))
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
        losses.append([float(trainer.run_step(trainer.put(b))["loss"]) for b in batches])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


CAPTION = ["train.beta=0.5", "connector.dropout=0.0"]
JOINT = [*CAPTION, "vit.train=True"]  # every path that the contrast's gradient takes
ENCODER = ["task=contrastive"]
EIGHT_DEVICES = (4, 2, 1)


def step_config(task, accumulate, mesh=(1, 1, 1)):
    axes = [f"mesh.{axis}={size}" for axis, size in zip(meshes.AXES, mesh, strict=True)]
    flags = ["train.batch_size=16", f"train.accumulate={accumulate}", *axes, *task]
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])


def drawn_batch(size=16, length=12):
    """Returns random pictures and texts. Each text has its own length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 98, (size, length)).astype(np.int32)
    mask = (np.arange(length) < rng.integers(2, length + 1, (size, 1))).astype(np.int32)
    image = rng.integers(0, 256, (size, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    caption = {"caption_ids": ids, "caption_mask": mask, "caption_targets": np.where(mask > 0, ids, -100)}
    sentence = {"sentence_ids": ids[:, ::-1].copy(), "sentence_mask": np.ones_like(mask)}
    return {"image": image, **caption, **sentence, "weight": np.ones(size, np.float32)}


def batch_of(task):
    """Returns the arrays of `drawn_batch` that a task takes."""
    batch = drawn_batch()
    return {name: batch[name] for name in task.batch.shapes(16)}


def step_gradients(config, params=None, change=lambda batch: batch):
    """Returns loss, {top-level name: flat gradient} and the parameters before the first step on `batch_of`, changed."""
    loss, moments, params = first_step(config, lambda task: change(batch_of(task)), params)
    return loss, flat(jax.tree.map(lambda x: x / (1 - config.optimizer.b1), moments)), params


def flat(tree):
    return {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)]) for name, part in tree.items()}


def assert_same(found, wanted, limit=1e-5):
    """Compares loss and gradients. In one module most of a gradient can cancel, so its limit is five times as high."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    whole = [np.concatenate([gradient[name] for name in wanted[1]]) for _, gradient in (found, wanted)]
    assert np.linalg.norm(whole[0] - whole[1]) < limit * np.linalg.norm(whole[1])
    for name, gradient in wanted[1].items():
        assert np.linalg.norm(gradient) > 0, name
        assert np.linalg.norm(found[1][name] - gradient) < 5 * limit * np.linalg.norm(gradient), name


@pytest.mark.parametrize(
    ("task", "layouts"),
    [(JOINT, [(4,), (2, EIGHT_DEVICES)]), (ENCODER, [(8,), (2, EIGHT_DEVICES)])],
    ids=["joint", "encoder"],
)
def test_contrast_is_over_the_global_batch_however_many_micro_batches(task, layouts):
    """A layout is (micro-batches, mesh)."""
    *one, params = step_gradients(step_config(task, 1))
    for layout in layouts:
        assert_same(step_gradients(step_config(task, *layout), params)[:2], one)


def blanked(batch):
    """The batch with every fourth row blank, as the pipeline makes it."""
    blank = np.arange(16) % 4 == 3
    batch = batch | {"weight": np.where(blank, 0, 1).astype(np.float32)}
    batch["image"] = np.where(blank[:, None, None, None], 0, batch["image"])
    if "caption_targets" in batch:
        batch["caption_targets"] = np.where(blank[:, None], -100, batch["caption_targets"])
    return batch


@pytest.mark.parametrize("task", [JOINT, ENCODER], ids=["joint", "encoder"])
def test_blank_rows_teach_nothing_in_one_pass_and_in_two(task):
    """A batch with four blank rows of sixteen gives the step of the twelve others."""
    config = step_config(task, 1)
    *found, params = step_gradients(config, change=blanked)
    real = np.arange(16) % 4 != 3
    with config.unlocked():
        config.train.batch_size = 12
    wanted = step_gradients(config, params, lambda batch: {name: x[real] for name, x in batch.items()})
    assert_same(found, wanted[:2])
    for layout in ((4,), (2, EIGHT_DEVICES)):
        assert_same(step_gradients(step_config(task, *layout), params, blanked)[:2], found)


def test_both_passes_over_micro_batches_draw_the_same_dropout():
    """The gradients of the step equal those of the loss that is written as one function of all micro-batches."""
    dropout = ["train.beta=0.5", "connector.dropout=0.1", "llm.size=opt_tiny", "llm.dropout=0.1", "vit.train=True"]
    config = step_config(dropout, 2)
    task, mesh = tasks.build_task(config), meshes.make_mesh(config.mesh)
    trained, frozen = Plan(task, config, mesh).init_params()
    step_key = jax.random.fold_in(jax.random.key(config.seed), 0)

    def loss(trained, batch):
        params = partition.join(frozen, trained)
        micro = [{name: x[i::2] for name, x in batch.items()} for i in range(2)]
        parts = [task.losses(params, rows, jax.random.fold_in(step_key, i)) for i, rows in enumerate(micro)]
        picture, text = (jnp.concatenate(x) for x in zip(*[part.pair for part in parts], strict=True))
        matching = matching_losses(picture, text, params["temperature"])
        captions = sum(part.values["caption"].sum() for part in parts) / task.counts(batch, True)["caption"].sum()
        return captions + 0.5 * matching.mean()

    wanted, gradient = jax.jit(jax.value_and_grad(loss))(trained, drawn_batch())
    start = jax.device_get((trained, frozen))
    assert_same(step_gradients(config, start)[:2], (float(wanted), flat(jax.device_get(gradient))), limit=5e-5)


def test_first_pass_over_micro_batches_leaves_the_language_model_out():
    """With micro-batches the work is that of one batch, plus embedding its pictures and sentences once more."""
    work = []
    for accumulate in (1, 2):
        config = step_config(CAPTION, accumulate, EIGHT_DEVICES)
        task, mesh = tasks.build_task(config), meshes.make_mesh(config.mesh)
        plan = Plan(task, config, mesh)
        batch = plan.abstract_batch(16)
        traced = plan.step.trace(*plan.abstract, batch)
        work.append(count_flops(traced.jaxpr))
    params = partition.join(plan.abstract[1], plan.abstract[0].params)
    del params["llm"], params["llm_proj"]
    embed = jax.make_jaxpr(task.contrast.embed)(params, batch, jax.random.key(0))
    assert work[1] == work[0] + count_flops(embed)


def test_validation_loss_is_of_each_example_once():
    """Eleven examples are in batches of eight. Repeats fill up the last batch and do not count."""
    flags = ["data.synthetic_size.val=11", "mesh.data=1"]
    config = load_config("configs/tiny.py:vit", [f"--config.{flag}" for flag in flags])
    task, mesh = tasks.build_task(config), meshes.make_mesh(config.mesh)
    params = partition.join(*Plan(task, config, mesh).init_params())
    retrieval = make_evaluator("val", config.evals.val, task, config, mesh)
    batches = list(retrieval.data)
    assert [len(batch["image"]) for batch in batches] == [8, 8]
    total = 0.0
    for batch, real in zip(batches, (8, 3), strict=True):
        pair = jax.jit(task.model.apply)(
            {"params": params}, *(batch[name][:real] for name in ("image", "sentence_ids", "sentence_mask"))
        )
        total += matching_losses(*pair, jnp.exp(params["log_temperature"])).sum()
    assert retrieval(params).metrics["loss"] == pytest.approx(float(total) / 11, rel=1e-5)


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
