"""The models give the numbers of the published PyTorch code (`check_golden.py`), and that check notices errors."""

import json
import shutil
from pathlib import Path

import check_golden
import golden_numbers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simvlg_jax.convert import evlgen, stacking
from simvlg_jax.utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["image_llama", "image_opt", "qformer_llama", "qformer_opt", "video_opt"]


@pytest.fixture
def copy(tmp_path):
    for path in GOLDEN.glob("image_opt.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_every_golden_number(capsys):
    assert check_golden.main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("worst: ")
    keys = ("keys_blip2_opt2.7b", "keys_image_opt2.7b", "keys_video_opt2.7b")
    for name in (*MODELS, *keys, "qformer_stage1", "pformer", "tome.npz", "schedules.json"):
        assert any(line.startswith(name) for line in lines), name


def test_recomputed_and_unrolled_models_give_the_same_numbers(monkeypatch):
    assert all(error <= 1 for _, error in check_golden.check_model(GOLDEN, "video_opt", remat=True))
    stacked = evlgen.from_evlgen

    def unrolled(model, tensors):
        params = stacked(model, tensors)
        return {
            **params,
            "vit": stacking.unstack_layers(params["vit"]),
            "llm": stacking.unstack_layers(params["llm"]),
        }

    monkeypatch.setattr(check_golden.evlgen, "from_evlgen", unrolled)
    checks = check_golden.check_model(GOLDEN, "image_opt", scan=False)
    assert all(error <= 1 for _, error in checks)


@pytest.mark.parametrize("name", ["loss", "logits", "grad/VL_proj.weight", "gen/greedy"])
def test_a_wrong_number_is_noticed(copy, capsys, name):
    with np.load(copy / "image_opt.npz") as archive:
        arrays = dict(archive)
    arrays[name] = arrays[name] + 1 if "gen" in name else arrays[name] * 1.001
    np.savez(copy / "image_opt.npz", **arrays)
    assert check_golden.main([str(copy)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILS")]
    assert [line.split()[1] for line in failed] == [name]


def test_missing_and_unreadable_files_have_their_status(copy, capsys):
    (copy / "image_opt.npz").write_bytes((copy / "image_opt.npz").read_bytes()[:1000])
    assert check_golden.main([str(copy)]) == 2
    (copy / "image_opt.npz").unlink()
    assert check_golden.main([str(copy)]) == 1
    assert "the model image_opt lacks image_opt.npz" in capsys.readouterr().err
    for path in copy.iterdir():
        path.unlink()
    assert check_golden.main([str(copy)]) == 1
    (copy / "keys_image_opt2.7b.json").write_text(json.dumps({"parameters": {"a": [1]}, "trainable": ["a"]}))
    assert check_golden.main([str(copy)]) == 1
    assert check_golden.main([str(copy / "nowhere")]) == 2


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_out_as_they_came_in(name):
    sizes, tensors, _ = golden_numbers.read_model(GOLDEN, name)
    model = check_golden.build(sizes)
    out = evlgen.to_evlgen(model, evlgen.from_evlgen(model, tensors))
    assert set(out) - set(tensors) <= {"opt_model.lm_head.weight"}
    assert all(np.array_equal(out[key], tensors[key]) for key in tensors)


def test_published_files_hold_the_trained_part_and_leftovers(tmp_path):
    sizes, tensors, _ = golden_numbers.read_model(GOLDEN, "video_opt")
    model = check_golden.build(sizes)
    kept = {n: x for n, x in tensors.items() if not n.startswith(("visual_encoder.", "opt_model."))}
    kept |= {n: x for n, x in tensors.items() if "temporal_merge" in n}
    kept["opt_model.lm_head.weight"] = tensors["opt_model.model.decoder.embed_tokens.weight"]
    params = evlgen.from_evlgen(model, kept)
    assert set(params) == {"ln_vision", "connector", "llm_proj", "vit"}
    assert set(params["vit"]) == {"blocks"} and set(params["vit"]["blocks"]) == {"temporal_merge"}
    whole = evlgen.from_evlgen(model, tensors)
    jax.tree.map(np.testing.assert_array_equal, params["connector"], whole["connector"])


def test_files_of_another_model_are_refused_with_both_lists():
    sizes, tensors, _ = golden_numbers.read_model(GOLDEN, "image_llama")
    model = check_golden.build(sizes)
    with pytest.raises(UserError, match=r"missing.*opt_proj\.bias.*\n.*not known.*llm_proj\.bias"):
        evlgen.from_evlgen(check_golden.build(golden_numbers.read_model(GOLDEN, "image_opt")[0]), tensors)
    del tensors["VLconnector.encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError, match=r"missing.*layer\.1\.output\.dense\.bias"):
        evlgen.from_evlgen(model, tensors)
    video = load_file(GOLDEN / "video_opt.safetensors")
    sizes = golden_numbers.read_model(GOLDEN, "image_opt")[0]
    with pytest.raises(UserError, match=r"set vit\.temporal=True"):
        evlgen.from_evlgen(check_golden.build(sizes), video)


def test_video_model_starts_from_an_image_models_file(tmp_path):
    sizes, _, _ = golden_numbers.read_model(GOLDEN, "video_opt")
    tensors = load_file(GOLDEN / "image_opt.safetensors")
    save_file(tensors, tmp_path / "image.safetensors")
    params = evlgen.from_evlgen(check_golden.build(sizes), load_file(tmp_path / "image.safetensors"))
    assert "temporal_merge" not in params["vit"]["blocks"]
