"""Published vision encoders and BERTs of every format equal torch's; files that do not fit are refused."""

import json
import pickle
from fnmatch import fnmatch

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel, Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

from simvlg_jax.convert import bert
from simvlg_jax.convert import vit as vision
from simvlg_jax.convert.encoders import ENCODERS
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.models.encoders.clip import Clip
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.utils.errors import UserError

SIZE = dict(image_size=28, patch_size=7, width=24, depth=2, num_heads=3, mlp_dim=40)
EVA, CLIP = ViT(**SIZE), Clip(**SIZE)
IMAGES = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter random values, also norms and biases, so that each matters."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        centre = 1.0 if x.ndim == 1 and name.endswith("weight") else 0.0
        torch.nn.init.normal_(x, centre, 0.2, generator=generator)
    return model.eval()


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def common(**more) -> dict:
    """Returns the sizes of a model with three layers. SimVLG takes the output of the second."""
    return dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=28,
        patch_size=7,
        attn_implementation="eager",
        **more,
    )


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModel:
    return shaken(CLIPVisionModel(CLIPVisionConfig(**common())))


@pytest.fixture(scope="module")
def blip2() -> Blip2VisionModel:
    model = shaken(Blip2VisionModel(Blip2VisionConfig(**common(layer_norm_eps=1e-6))))
    for name, x in model.named_parameters():
        if name.endswith("qkv.bias"):
            x.data[24:48] = 0  # EVA's keys have no bias
    return model


def penultimate(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        pixels = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
        return model(pixels, output_hidden_states=True).hidden_states[-2].numpy()


def close(ours: jax.Array, theirs: np.ndarray) -> bool:
    return bool(np.linalg.norm(np.asarray(ours) - theirs) < 1e-5 * np.linalg.norm(theirs))


def lavis_clip(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the same weights under the names of LAVIS's clip_vit_L.pth."""
    tensors = {name[name.index("embeddings") :] if "embeddings" in name else name: x for name, x in tensors.items()}
    tensors = {name.removeprefix("vision_model."): x for name, x in tensors.items()}
    out = {
        "class_embedding": tensors["embeddings.class_embedding"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "conv1.weight": tensors["embeddings.patch_embedding.weight"],
        "ln_post.weight": np.ones(24, np.float32),
        "ln_post.bias": np.ones(24, np.float32),
        "proj": np.ones((24, 8), np.float32),
    }
    for kind in ("weight", "bias"):
        out[f"ln_pre.{kind}"] = tensors[f"pre_layrnorm.{kind}"]
        for i in range(3):
            theirs, ours = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = [tensors[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"{ours}.attn.in_proj_{kind}"] = np.concatenate(parts)
            for new, old in (
                ("attn.out_proj", "self_attn.out_proj"),
                *(("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")),
            ):
                out[f"{ours}.{new}.{kind}"] = tensors[f"{theirs}.{old}.{kind}"]
    return out


def test_clip_equals_transformers_in_both_formats(clip):
    params = vision.from_torch(CLIP, state(clip))
    for scan in (True, False):
        tree = params if scan else vision.stacking.unstack_layers(params)
        ours = Clip(**SIZE, scan=scan).apply({"params": tree}, IMAGES)
        assert close(ours, penultimate(clip))
    jax.tree.map(np.testing.assert_array_equal, vision.from_torch(CLIP, lavis_clip(state(clip))), params)


def test_clip_inside_a_whole_clip_is_found(clip):
    whole = {f"vision_model.{n.removeprefix('vision_model.')}": x for n, x in state(clip).items()}
    whole |= {"text_model.embeddings.token_embedding.weight": np.ones(3), "logit_scale": np.ones(())}
    params = vision.from_torch(CLIP, state(clip))
    jax.tree.map(np.testing.assert_array_equal, vision.from_torch(CLIP, whole), params)


def test_blip2_tower_equals_transformers_and_goes_out_as_eva(blip2):
    tensors = state(blip2)
    params = vision.from_torch(EVA, tensors)
    whole = {f"vision_model.{name}": x for name, x in tensors.items()} | {"qformer.layernorm.weight": np.ones(3)}
    jax.tree.map(np.testing.assert_array_equal, vision.from_torch(EVA, whole), params)
    assert close(EVA.apply({"params": params}, IMAGES), penultimate(blip2))
    eva = vision.to_torch(EVA, params)
    assert eva["blocks.1.attn.qkv.weight"].shape == (72, 24) and "blocks.1.attn.k_bias" not in eva
    jax.tree.map(np.testing.assert_array_equal, vision.from_torch(EVA, eva), params)
    deeper = eva | {f"blocks.2.{n}": np.ones(1) for n in ("norm1.weight", "attn.q_bias")} | {"head.weight": np.ones(1)}
    jax.tree.map(np.testing.assert_array_equal, vision.from_torch(EVA, deeper), params)
    biased = next(name for name in tensors if name.endswith("qkv.bias"))
    with pytest.raises(UserError, match="has a bias for the keys"):
        vision.from_torch(EVA, tensors | {biased: np.ones(72, np.float32)})


def test_clip_goes_out_and_comes_back(clip):
    params = vision.from_torch(CLIP, state(clip))
    jax.tree.map(np.testing.assert_array_equal, vision.from_torch(CLIP, vision.to_torch(CLIP, params)), params)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (4, 4), (16, 26)])
def test_positions_are_resized_as_torch_does(old, new, align_corners):
    position = np.random.default_rng(0).normal(size=(1, 1 + old * old, 5)).astype(np.float32)
    grid = torch.from_numpy(position[:, 1:]).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=align_corners)
    ours = vision.resize_positions(position, 1 + new * new, align_corners)
    np.testing.assert_array_equal(ours[:, 0], position[:, 0])
    assert close(ours[:, 1:], wanted.permute(0, 2, 3, 1).reshape(1, -1, 5).numpy())


def test_positions_of_a_file_are_resized_to_the_model(tmp_path, clip):
    """The file has CLIP's grid of 4 x 4, and the pictures have 7 x 7 patches. Everything else is unchanged."""
    save_file({name: np.array(x) for name, x in state(clip).items()}, tmp_path / "model.safetensors")
    larger = Clip(**SIZE | dict(image_size=49))
    params, lazy = vision.from_torch(CLIP, state(clip)), ENCODERS["clip"].from_torch(larger, open_tensors(tmp_path))
    params["position"] = vision.resize_positions(params["position"], 50, align_corners=True)
    assert params["position"].shape == (1, 50, 24)
    jax.tree.map(np.testing.assert_array_equal, lazy, params)


def test_foreign_vision_files_say_what_does_not_fit(clip):
    tensors = lavis_clip(state(clip))
    with pytest.raises(UserError, match="no known vision encoder here"):
        vision.from_torch(CLIP, {"layer1.0.conv1.weight": np.ones(3)})
    with pytest.raises(UserError, match="without a class token"):
        vision.from_torch(EVA, {"patch_embed.proj.weight": np.ones(3), "pos_embed": np.ones((1, 25, 24))})
    for name, message in (
        ("conv1.weight", r"missing.*: patch_embed\.proj\.weight\n"),
        ("positional_embedding", r"missing.*: pos_embed\n"),
    ):
        with pytest.raises(UserError, match=message):
            vision.from_torch(CLIP, {n: x for n, x in tensors.items() if n != name})
    with pytest.raises(UserError, match=r"missing.*norm_pre\.bias, norm_pre\.weight\n.*not known.*: none"):
        vision.from_torch(CLIP, {name: x for name, x in tensors.items() if not name.startswith("ln_pre")})
    del tensors["transformer.resblocks.1.mlp.c_fc.bias"]
    tensors["extra.weight"] = np.ones(2)
    with pytest.raises(UserError, match=r"missing.*blocks\.1\.mlp\.fc1\.bias\n.*not known.*extra\.weight"):
        vision.from_torch(CLIP, tensors)


@pytest.mark.parametrize("old_names", [False, True])
def test_bert_without_merging_equals_transformers(tmp_path, old_names):
    config = BertConfig(vocab_size=30, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)
    model = shaken(BertModel(config))
    tensors = state(model)
    if old_names:
        tensors = {
            "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
            for name, x in tensors.items()
        }
        tensors |= {"cls.predictions.bias": np.ones(3, np.float32)}
    save_file({name: np.array(x) for name, x in tensors.items()}, tmp_path / "model.safetensors")
    x = np.random.default_rng(0).normal(size=(2, 9, 24)).astype(np.float32)
    with torch.no_grad():
        theirs = model(inputs_embeds=torch.from_numpy(x), output_hidden_states=True).hidden_states[2].numpy()
    params = jax.tree.map(np.asarray, bert.load_bert(tmp_path, 2, 3, words=False))
    params["vl_proj"] = {"kernel": np.eye(24, dtype=np.float32), "bias": np.zeros(24, np.float32)}
    ours = TomeFormer(24, 2, 3, (0, 0)).apply({"params": params}, x)
    assert close(ours.tokens, theirs)


TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float32)}


def as_torch() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x) for name, x in TENSORS.items()}


def sharded(folder, save, suffix, index):
    save({"a.weight": TENSORS["a.weight"]}, folder / f"1{suffix}")
    save({"b": TENSORS["b"]}, folder / f"2{suffix}")
    (folder / index).write_text(json.dumps({"weight_map": {"a.weight": f"1{suffix}", "b": f"2{suffix}"}}))


def save_torch(tensors, path):
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.safetensors", lambda path: save_file(TENSORS, path)),
        ("x.pth", lambda path: torch.save(as_torch(), path)),
        ("x.bin", lambda path: torch.save({"model": as_torch(), "iters": 3, "config": {"run": "x"}}, path)),
        ("folder", lambda path: (path.mkdir(), save_file(TENSORS, path / "model.safetensors"))),
        ("old", lambda path: (path.mkdir(), save_torch(TENSORS, path / "pytorch_model.bin"))),
        (
            "shards",
            lambda path: (path.mkdir(), sharded(path, save_file, ".safetensors", "model.safetensors.index.json")),
        ),
        ("old_shards", lambda path: (path.mkdir(), sharded(path, save_torch, ".bin", "pytorch_model.bin.index.json"))),
    ],
)
def test_every_kind_of_file_gives_the_same_tensors(tmp_path, name, write):
    write(tmp_path / name)
    found = open_tensors(tmp_path / name)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {n: (x.shape, x.dtype) for n, x in TENSORS.items()}
    assert all(np.array_equal(found[n], x) for n, x in TENSORS.items())


def test_bfloat16_keeps_its_bits(tmp_path):
    torch.save({"a": torch.tensor([1.0, -2.5]).bfloat16()}, tmp_path / "x.pth")
    tensor = open_tensors(tmp_path / "x.pth")["a"]
    assert tensor.dtype == "bfloat16" and tensor.astype(np.float32).read().tolist() == [1.0, -2.5]


def test_parameters_are_read_as_tensors_are(tmp_path):
    torch.save({name: torch.nn.Parameter(x) for name, x in as_torch().items()}, tmp_path / "x.pth")
    found = open_tensors(tmp_path / "x.pth")
    assert all(np.array_equal(found[n], x) for n, x in TENSORS.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_unfinished_downloads_say_so_wherever_they_end(tmp_path, zipped):
    torch.save(as_torch(), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.pth").read_bytes()
    # A pickle that ends within the name of a class looks like one of an unknown class.
    message = "cannot read weights|is not a PyTorch file" + ("" if zipped else "|could run code")
    for end in range(0, len(whole), 37):
        (tmp_path / "cut.pth").write_bytes(whole[:end])
        with pytest.raises(UserError, match=message):
            open_tensors(tmp_path / "cut.pth")


def test_files_that_cannot_be_read_say_why(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"a": Bomb()}))
    torch.save({"a": Bomb()}, tmp_path / "zipped.pth")
    torch.save(as_torch(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert np.array_equal(open_tensors(tmp_path / "old.pth")["a.weight"], TENSORS["a.weight"])
    save_file(TENSORS, tmp_path / "cut.safetensors")
    torch.save(as_torch(), tmp_path / "cut.pth")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:90])
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "page.bin").write_text("<html>not found</html>")
    float8 = {"a": torch.ones(2).to(torch.float8_e4m3fn)}
    torch.save(float8, tmp_path / "float8.pth")
    safetensors.torch.save_file(float8, tmp_path / "float8.safetensors")
    for name, text in (
        ("shards", '{"weight_map": {"a": "gone.safetensors"}}'),
        ("list", "[]"),
        ("numbers", '{"weight_map": {"a": 1}}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors.index.json").write_text(text)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "bomb.pth": "could run code",
        "zipped.pth": "could run code",
        "cut.safetensors": "cannot read weights",
        "cut.pth": "cannot read weights",
        "list.pth": "does not hold a state dict",
        "page.bin": "not a PyTorch file",
        "float8.pth": "holds a as torch.float8_e4m3fn",
        "float8.safetensors": "holds a as F8_E4M3",
        "list": "not an index of shards",
        "numbers": "not an index of shards",
        "shards": r"shards that are missing: gone\.safetensors",
        "empty": r"looked for model\.safetensors",
        "nothing": "no weights at",
    }.items():
        with pytest.raises(UserError, match=message):
            open_tensors(tmp_path / name)


def test_names_of_the_hub_need_the_network(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no such file or folder"):
        resolve(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no folder facebook/opt-125m, and the Hugging Face Hub does not give"):
        resolve("facebook/opt-125m")


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        (["config.json", "pytorch_model.bin"], ["config.json", "pytorch_model.bin"]),
    ],
)
def test_model_of_the_hub_is_had_in_one_format(tmp_path, monkeypatch, there, wanted):
    def snapshot_download(name, allow_patterns):
        for file in there:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("facebook/opt-125m") == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted
