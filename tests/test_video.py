"""Video: the temporal merge equals its definition; what it distinguishes before and after training; what is trained."""

from pathlib import Path

import flax.linen as nn
import golden_numbers
import jax
import numpy as np
import pytest
from first_step import first_step

from simvlg_jax.config.load import load_config
from simvlg_jax.convert import evlgen
from simvlg_jax.evaluation.cost import visual_tokens
from simvlg_jax.evaluation.gallery import explainer
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.encoders import temporal_merge
from simvlg_jax.models.encoders.temporal_merge import TemporalMerge
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.models.llms.opt import OPT_SIZES, POSITION_OFFSET
from simvlg_jax.recipes import finetune_video
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.training import loop
from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.utils.errors import UserError

SIZE = VIT_SIZES["tiny_32px"]
CLIPS = np.random.default_rng(0).normal(size=(2, 4, 32, 32, 3)).astype(np.float32)


def random_params(module: nn.Module, *inputs, seed: int = 0) -> dict:
    """Returns random parameters that are larger than at initialisation, so that every part matters."""
    abstract = nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)


def apply(module: nn.Module, params: dict, *inputs) -> jax.Array:
    return module.apply({"params": params}, *inputs)


def test_merge_is_attention_over_frames_by_loops():
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 16)).astype(np.float32)  # (B, F, N, D)
    module = TemporalMerge(width=8, num_heads=2)
    params = random_params(module, x)
    ours = apply(module, params, x)
    query, key = (x @ params[n]["kernel"] + params[n]["bias"] for n in ("query", "key"))
    for clip, token, head in np.ndindex(2, 4, 2):
        q, k = (t[clip, :, token, 4 * head : 4 * head + 4] for t in (query, key))  # (F, 4)
        values = x[clip, :, token, 8 * head : 8 * head + 8]  # (F, 8)
        scores = np.exp(q @ k.T / np.sqrt(8))
        merged = params["alpha"] * scores / scores.sum(1, keepdims=True) @ values
        np.testing.assert_allclose(ours[clip, :, token, 8 * head : 8 * head + 8], merged, rtol=1e-4, atol=1e-6)


def test_one_frame_is_scaled_by_alpha_and_frames_keep_their_order():
    x = np.random.default_rng(1).normal(size=(2, 5, 4, 16)).astype(np.float32)
    module = TemporalMerge(width=8, num_heads=2)
    params = random_params(module, x)
    single = apply(module, params, x[:, :1])
    np.testing.assert_allclose(single, params["alpha"] * x[:, :1], rtol=1e-5, atol=1e-6)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(
        apply(module, params, x[:, order]), apply(module, params, x)[:, order], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("scan", [True, False])
def test_untrained_video_model_is_the_image_model(scan):
    video = ViT(**SIZE, temporal=True, max_frames=4, scan=scan)
    params = nn.unbox(video.init(jax.random.key(0), CLIPS))["params"]
    image, temporal = partition.split(params, lambda path: partition.TEMPORAL.isdisjoint(path))
    assert temporal
    frames = apply(ViT(**SIZE, scan=scan), image, CLIPS.reshape(8, 32, 32, 3))
    clips = apply(video, params, CLIPS)
    np.testing.assert_allclose(clips.reshape(frames.shape), frames, rtol=1e-5, atol=1e-5)


def test_published_model_cannot_tell_a_clip_from_its_reverse_and_temporal_positions_can():
    reverse = CLIPS[:, ::-1]
    published = ViT(**SIZE, temporal=True)
    params = random_params(published, CLIPS)
    forth, back = (apply(published, params, clip).mean(1) for clip in (CLIPS, reverse))
    np.testing.assert_allclose(forth, back, rtol=1e-4, atol=1e-4)
    ours = ViT(**SIZE, temporal=True, max_frames=4)
    params = random_params(ours, CLIPS)
    forth, back = (apply(ours, params, clip).mean(1) for clip in (CLIPS, reverse))
    assert np.abs(forth - back).max() > 0.1


def test_published_video_model_trains_what_was_published():
    counts = {}
    for temporal in (False, True):
        config = load_config("configs/pretrain_image.py:llm=opt2.7b", [f"--config.vit.temporal={temporal}"])
        task = build_task(config)
        trained, _ = partition.split(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))), task.is_trained)
        counts[temporal] = sum(x.size for x in jax.tree.leaves(trained))
    assert counts == {False: 88_504_320, True: 116_639_271}


@pytest.mark.parametrize("frames", finetune_video.FRAMES)
def test_recipes_of_clips_give_the_language_model_the_tokens_of_a_picture(frames):
    config = load_config(f"configs/finetune_video.py:data=msvd,frames={frames}", [])
    task = build_task(config)
    params = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    assert visual_tokens(task, params) == 29 and task.batch.pictures.frames == (16 if frames == "merged" else 4)
    trained = sum(x.size for x in jax.tree.leaves(partition.split(params, task.is_trained)[0]))
    assert trained == 88_504_320 + {"temporal": 39 * 721_409, "merged": 16 * 1408}.get(frames, 0)
    questions = load_config(f"configs/finetune_video.py:data=msrvtt_qa,frames={frames}", [])
    assert (questions.evals.test.type, config.evals.test.type, questions.data.path) == (
        "questions",
        "",
        "data/msrvtt_qa",
    )


def test_the_recipe_of_scst_learns_from_captions_of_clips_as_long_as_those_that_evaluations_write():
    config = load_config("configs/finetune_video.py:data=msrvtt,loss=scst", [])
    task = build_task(config)
    assert task.batch.beams == 5 and task.batch.pictures.frames == 4
    assert task.batch.texts["caption"].max_tokens == 1 + config.evaluate.max_new_tokens
    webvid = load_config("configs/finetune_video.py:data=webvid,loss=scst", [])
    assert webvid.evals.val.every < webvid.train.steps
    with pytest.raises(UserError, match="msvd_qa has questions"):
        load_config("configs/finetune_video.py:data=msvd_qa,loss=scst", [])


def test_only_the_temporal_part_of_a_frozen_vit_is_trained(tmp_path):
    overrides = ["vit.temporal=True", "vit.max_frames=2", "llm.size=opt_tiny", "llm.start_is_target=True"]
    config = load_config("configs/tiny.py", [f"--config.{o}" for o in (*overrides, "mesh.data=1", "train.steps=2")])
    trainer = loop.Trainer(config, tmp_path)
    before, frozen = jax.device_get(trainer.state.params), fingerprint(trainer.frozen)
    assert set(before["vit"]) == {"blocks", "temporal_position"} and set(before["vit"]["blocks"]) == {"temporal_merge"}
    for _ in range(2):
        batch = next(trainer.iterator)
        clips = np.repeat(batch["image"][:, None], 2, 1)
        clips[:, 1] = 255 - clips[:, 1]  # (B, 2, H, W, 3): the second frame is the negative
        trainer.run_step(trainer.put({**batch, "image": clips}))
    after = jax.device_get(trainer.state.params)
    assert fingerprint(trainer.frozen) == frozen
    assert (after["vit"]["blocks"]["temporal_merge"]["alpha"] != 0).all()
    assert (after["vit"]["temporal_position"] != 0).any()


def test_a_training_step_takes_the_published_loss_and_gradients(monkeypatch):
    """The golden numbers through everything that training uses: weights read by name, the task, the compiled step."""
    golden = Path(__file__).parent / "golden"
    sizes, tensors, arrays = golden_numbers.read_model(golden, "video_opt")
    table = tensors["opt_model.model.decoder.embed_positions.weight"]
    v, c, lm = sizes["vit"], sizes["connector"], sizes["lm"]
    hidden = int(v["dim"] * v["mlp"])
    vit = dict(image_size=v["img"], patch_size=v["patch"], width=v["dim"], num_heads=v["heads"], mlp_dim=hidden)
    monkeypatch.setitem(VIT_SIZES, "golden", vit | dict(depth=v["depth"]))
    monkeypatch.setitem(BERT_SIZES, "golden", dict(width=c["dim"], depth=c["layers"], num_heads=c["heads"]))
    llm = dict(width=lm["dim"], depth=lm["layers"], num_heads=lm["heads"], ffn=4 * lm["dim"], vocab_size=lm["vocab"])
    monkeypatch.setitem(OPT_SIZES, "opt_golden", llm | dict(max_positions=len(table) - POSITION_OFFSET))
    flags = ["vit.size=golden", "vit.temporal=True", "vit.remat=True", "data.frames=4", "connector.size=golden"]
    flags += ["connector.merges=()", f"connector.r={c['r']}", "connector.dropout=0.0", "llm.size=opt_golden"]
    flags += ["mesh.data=1", "train.batch_size=2", f"train.init_from={golden}/video_opt.safetensors"]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    task = build_task(config)
    loaded = task.load_pretrained(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    params = partition.split(jax.tree.map(np.asarray, loaded), task.is_trained)

    def batch(task) -> dict:
        text = {f"caption_{name}": arrays[name].astype(np.int32) for name in ("ids", "mask", "targets")}
        return {"image": np.moveaxis(arrays["image"], 1, -1), "weight": np.ones(2, np.float32), **text}

    loss, moments, _ = first_step(config, batch, params)
    assert loss == pytest.approx(float(arrays["loss"]), rel=1e-5)
    gradients = evlgen.to_evlgen(task.model, jax.tree.map(lambda x: x / (1 - config.optimizer.b1), moments))
    expected = {name.removeprefix("grad/"): x for name, x in arrays.items() if name.startswith("grad/")}
    assert sum("temporal_merge" in name for name in expected) == 3 * 5
    for name, x in gradients.items():
        if not name.endswith("key.bias"):  # exactly zero here, rounding noise in PyTorch
            assert golden_numbers.relative(x, expected[name]) < 1e-4, name
    assert set(gradients) == set(expected)


@pytest.mark.parametrize("scan", [True, False])
def test_frames_share_the_attention_and_those_of_a_still_clip_equally(scan):
    flags = ["vit.temporal=True", "data.frames=4", f"vit.scan={scan}"]
    task = build_task(load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags]))
    texts = (np.ones((2, 3), np.int32),) * 3
    params = random_params(task.model, CLIPS, *texts[:2])
    clips = np.random.default_rng(1).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    drawn = explainer(task.model)(params, clips, *texts)[2]
    assert drawn.shape == (2, 4)
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-5)
    assert drawn.std() > 1e-3
    still = explainer(task.model)(params, clips[:, :1].repeat(4, 1), *texts)[2]
    np.testing.assert_allclose(still, 0.25, rtol=1e-4)


def test_drawn_attention_by_loops():
    query, key = np.random.default_rng(2).normal(size=(2, 3, 4, 2, 5)).astype(np.float32)  # (X, F, N, H)
    shares = np.zeros((3, 4))
    for place, asking, head in np.ndindex(3, 4, 2):
        scores = np.exp([0.3 * query[place, asking, head] @ key[place, frame, head] for frame in range(4)])
        shares[place] += scores / scores.sum() / 8
    np.testing.assert_allclose(temporal_merge.drawn(query, key, 0.3), shares, rtol=1e-5)
