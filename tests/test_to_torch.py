"""Models in PyTorch: our PyTorch code gives the published numbers, and the same captions as JAX."""

import json
from pathlib import Path

import check_golden
import flax.linen as nn
import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from verbs import call

from simvlg_jax import to_torch
from simvlg_jax.config.load import load_config
from simvlg_jax.config.saved import save_config
from simvlg_jax.convert import evlgen, stacking
from simvlg_jax.data.text import CaptionText, character_tokenizer
from simvlg_jax.decoding.settings import Decoding, decoding_of
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.huggingface import export as hf_export
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.training import loop
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def load_exported(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("name", ["image_llama", "image_opt", "video_opt"])
def test_exported_model_gives_the_published_numbers(name, tmp_path):
    sizes, tensors, arrays = golden_numbers.read_model(GOLDEN, name)
    model = check_golden.build(sizes)
    special = (sizes["bos_token_id"], sizes["eos_token_id"], sizes["pad_token_id"])
    text = CaptionText(character_tokenizer(), *special, max_tokens=14, start_is_target=True)
    config = load_config("configs/tiny.py", ["--config.evaluate.max_new_tokens=13"])
    hf_export.write_hf(tmp_path, model, evlgen.from_evlgen(model, tensors), text, config)
    exported = load_exported(tmp_path)
    assert {n: x.shape for n, x in exported.named_parameters()}.items() >= {
        n: x.shape for n, x in tensors.items()
    }.items()

    inputs = {"image": torch.from_numpy(arrays["image"])}
    ids, mask, targets = (torch.from_numpy(arrays[n]).long() for n in ("ids", "mask", "targets"))
    with torch.no_grad():
        prefix = exported.soft_prompt(inputs["image"]).numpy()
        out = exported(inputs["image"], ids, mask, targets)
    assert golden_numbers.relative(prefix, arrays["prefix"]) < 1e-5
    real = np.concatenate([np.ones(prefix.shape[:2], bool), arrays["mask"] > 0], 1)
    assert golden_numbers.relative(out.logits.numpy()[real], arrays["logits"][real]) < 1e-5
    assert out.loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-5)
    generated = exported.generate(inputs["image"]).numpy()
    assert np.array_equal(generated, arrays["gen/greedy"][:, 1:])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Returns a workdir with a checkpoint of random weights, which are so large that captions of pictures differ."""
    workdir = tmp_path_factory.mktemp("run")
    flags = [
        "mesh.data=1",
        "llm.start_first=True",
        "vit.scan=False",
        "train.steps=1",
        "evaluate.max_new_tokens=12",
        "evaluate.num_beams=3",
    ]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    checkpoints = Checkpoints(workdir)
    save_config(config, workdir)
    trainer = loop.Trainer(config, workdir)
    params = jax.tree.map(lambda x: 3 * x, trainer.state.params)
    checkpoints.save(1, trainer.state.replace(params=params), trainer.position)
    checkpoints.close()
    return workdir, config, partition.join(trainer.frozen, params), trainer.task


def test_fifty_captions_are_the_same_strings(tiny_run, tmp_path):
    workdir, config, params, task = tiny_run
    assert call(to_torch, "--workdir", workdir, "--format", "hf", "--output", tmp_path / "hf") == 0
    exported = load_exported(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    captioner = Captioner(task.model, task.batch.texts["caption"].encoder, decoding_of(config))
    ours = [text for (text,) in captioner.decode(np.asarray(captioner(params, jnp.asarray(images)).ids))]
    pixels = torch.from_numpy(np.array(task.model.vit.normalize(images)).transpose(0, 3, 1, 2))
    theirs = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in exported.generate(pixels)]
    assert ours == theirs
    assert len(set(ours)) > 5
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    "flags",
    [
        ["llm.size=opt_tiny"],
        ["llm.size=qwen2.5_tiny"],
        ["llm.size=qwen3_tiny"],
        ["vit.tokens=11", "connector.tokens=5"],
        ["vit.size=siglip_tiny"],
        ["vit.size=siglip_tiny", "vit.tokens=11", "connector.tokens=5"],
        ["vit.size=siglip_tiny", "connector.type=pool", "connector.tokens=6"],
        ["connector.type=mlp"],
        ["connector.type=pool", "connector.tokens=6", "vit.tokens=11"],
        ["connector.type=perceiver", "connector.queries=5"],
    ],
)
def test_captions_are_the_same_whatever_the_parts(flags, tmp_path):
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in (*flags, "evaluate.max_new_tokens=12")])
    task = build_task(config)
    params = random_params(task)
    hf_export.write_hf(tmp_path, task.model, params, task.batch.texts["caption"].encoder, config)
    back = evlgen.from_evlgen(task.model, load_file(tmp_path / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert_same_captions(task, params, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ["vit.temporal=True", "vit.max_frames=5"],
        ["video.max_frames=5"],
        ["video.frames_as=joined", "video.max_frames=4", "connector.tokens=18"],
        ["video.frames_as=pooled", "video.max_frames=6"],
        ["video.frames_as=merged", "video.tokens=24", "video.max_frames=4"],
        ["video.frames_as=merged", "connector.type=perceiver", "connector.queries=5"],
        ["vit.size=siglip_tiny", "video.max_frames=4"],
        ["vit.size=siglip_tiny", "video.frames_as=merged", "video.tokens=24", "video.max_frames=4"],
    ],
)
def test_captions_of_clips_are_the_same_however_frames_are_joined(flags, tmp_path):
    flags = ["data.frames=4", "evaluate.max_new_tokens=12", *flags]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    task = build_task(config)
    params = random_params(task)
    hf_export.write_hf(tmp_path, task.model, params, task.batch.texts["caption"].encoder, config)
    assert_same_captions(task, params, tmp_path)


def test_the_preprocessor_scales_colours_as_the_encoder_wants(tmp_path):
    config = load_config("configs/tiny.py", ["--config.vit.size=siglip_tiny"])
    task = build_task(config)
    hf_export.write_hf(tmp_path, task.model, random_params(task), task.batch.texts["caption"].encoder, config)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    seen = AutoImageProcessor.from_pretrained(tmp_path)(pixels, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(seen.transpose(1, 2, 0), task.model.vit.normalize(pixels), atol=1e-6)


@pytest.mark.parametrize("way", ["mean", "pooled"])
def test_the_published_form_knows_no_order_of_frames(way):
    flags = ["data.frames=4", "video.max_frames=4", f"video.frames_as={way}"]
    task = build_task(load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags]))
    with pytest.raises(UserError, match=r"knows no order of frames \(video.max_frames\): use --format hf"):
        evlgen.to_evlgen(task.model, random_params(task))


def random_params(task) -> dict:
    rng = np.random.default_rng(0)
    abstract = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    params = {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in abstract.items()}
    return traverse_util.unflatten_dict(params)


def assert_same_captions(task, params: dict, folder: Path) -> None:
    """The exported model writes the captions of the model, of 20 random pictures or clips."""
    images = np.random.default_rng(1).integers(0, 256, task.batch.pictures.shape(20), dtype=np.uint8)
    captioner = Captioner(task.model, task.batch.texts["caption"].encoder, Decoding(max_new_tokens=12))
    ours = np.asarray(captioner(params, jnp.asarray(images)).ids)[:, 0]
    exported = load_exported(folder)
    pixels = torch.from_numpy(np.moveaxis(np.array(task.model.vit.normalize(images)), -1, 1))
    theirs = exported.generate(pixels).numpy()
    assert np.array_equal(ours[:, : theirs.shape[1]], theirs)
    assert len(np.unique(ours, axis=0)) > 5
    prefix = task.model.apply({"params": params}, images, method="encode_image").prefix
    with torch.no_grad():
        assert golden_numbers.relative(exported.soft_prompt(pixels).numpy(), prefix) < 1e-4


def test_start_before_the_prompt_gives_the_same_loss(tiny_run, tmp_path):
    workdir, _, params, task = tiny_run
    assert call(to_torch, "--workdir", workdir, "--format", "hf", "--output", tmp_path / "hf") == 0
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    ids, targets = (np.array([x] * 2) for x in task.batch.texts["caption"].encoder("red square"))
    losses, counts = task.model.apply(
        {"params": params}, images, ids, np.ones_like(ids), targets, method="caption_losses"
    )
    pixels = torch.from_numpy(np.array(task.model.vit.normalize(images)).transpose(0, 3, 1, 2))
    out = load_exported(tmp_path / "hf")(pixels, torch.from_numpy(ids), labels=torch.from_numpy(ids))
    assert out.loss.item() == pytest.approx(float(losses.sum() / counts.sum()), rel=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dict_comes_back_bit_equal(tiny_run, tmp_path, suffix):
    workdir, config, params, _ = tiny_run
    for everything in (False, True):
        path = tmp_path / f"weights{suffix}"
        assert (
            call(to_torch, "--workdir", workdir, "--format", "evlgen", "--output", path, *["--all"] * everything) == 0
        )
        if suffix == ".pth":
            tensors = {n: x.numpy() for n, x in torch.load(path, weights_only=True)["model"].items()}
        else:
            tensors = load_file(path)
        back = evlgen.from_evlgen(build_task(config).model, tensors)
        assert set(back) == (set(params) if everything else set(params) - {"vit", "llm"})
        wanted = jax.device_get({n: params[n] for n in back})
        if everything:
            wanted["vit"] = stacking.stack_layers(wanted["vit"])
        jax.tree.map(np.testing.assert_array_equal, back, wanted)


def test_wrong_requests_say_so(tiny_run, tmp_path, capsys):
    workdir = tiny_run[0]
    assert call(to_torch, "--workdir", workdir, "--format", "evlgen", "--output", tmp_path / "weights.bin") == 2
    assert "a .pth or a .safetensors file" in capsys.readouterr().err
    assert call(to_torch, "--workdir", tmp_path, "--format", "hf", "--output", tmp_path / "hf") == 1
    assert not (tmp_path / "hf").exists()
