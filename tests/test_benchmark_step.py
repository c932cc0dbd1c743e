"""`python -m simvlg_jax.benchmark`: parts add up to the step, PyTorch gives the same loss, wrong input is refused."""

import json

import jax
import numpy as np
import pytest
from verbs import call

from simvlg_jax.benchmark import __main__ as verb
from simvlg_jax.benchmark import measure, peaks, setting, step_parts, table, timing
from simvlg_jax.benchmark.torch_step import texts_of
from simvlg_jax.config.load import load_config
from simvlg_jax.training.flops import count_flops

TINY = ["--config", "configs/tiny.py", "--steps", 2, "--rounds", 2]
COSTS = {"ms", "tflop"}


def tiny(*overrides):
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in ("mesh.data=1", *overrides)])


@pytest.fixture(scope="module")
def chosen():
    return setting.prepare(tiny(), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def result(folder):
    options = measure.Options(steps=2, rounds=2, trace=folder, against=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peaks.KINDS, "cpu", 1e9)
        return json.loads(
            json.dumps(measure.measure(load_config("configs/tiny.py", ["--config.mesh.data=2"]), options))
        )


def test_says_what_was_measured(result):
    assert result["device"] == {
        "kind": "cpu",
        "platform": "cpu",
        "count": 2,
        "mesh": {"data": 2, "fsdp": 1, "tensor": 1},
        "jax": jax.__version__,
    }
    assert result["data"] == "synthetic" and result["frozen_weights"] == {"vit": "random", "llm": "random"}
    assert (result["dtype"], result["frozen_dtype"]) == ("float32", "float32")
    assert list(result["parts"]) == list(table.LABELS)
    assert all(set(cost) == COSTS for cost in [*result["parts"].values(), result["sum_of_parts"], result["rest"]])
    rest = {"images_per_s", "mfu", "peak_tflops", "memory_gb", "memory_of", "compile_s"}
    assert set(result["step"]) == COSTS | rest
    assert result["step"]["memory_of"] == "process" and 0.1 < result["step"]["memory_gb"] < 100
    assert result["step"]["images_per_s"] == pytest.approx(8 / (result["step"]["ms"] / 1e3))


def test_captions_are_timed_greedily_and_with_beams(chosen, monkeypatch):
    """The writer is a stand-in: one that tells by which settings it was asked, and how many pictures it got."""
    asked = []

    def writer(model, batch_size):
        asked.append((model.config.evaluate.num_beams, batch_size))
        return lambda images: [f"{len(images)} pictures"] * len(images)

    monkeypatch.setattr(measure.captioning, "our_writer", writer)
    speeds = measure.decode(chosen, rounds=1)
    assert list(speeds) == ["greedy", "5 beams"] and asked == [(1, 8), (5, 8)] and min(speeds.values()) > 0


def test_flops_of_the_parts_are_those_of_the_step(result):
    parts, batch = {name: cost["tflop"] * 1e12 for name, cost in result["parts"].items()}, result["batch"]
    assert sum(parts.values()) - parts["merge"] == pytest.approx(result["step"]["tflop"] * 1e12, rel=1e-12)
    assert result["rest"]["tflop"] == 0
    assert 0 < parts["merge"] < parts["connector"]
    images, places = batch["text_shape"]
    tokens = images * (batch["soft_prompt_tokens"] + places)  # of a LLaMA of width 32, 4 and 2 heads of 8, MLP 64
    layer = 2 * tokens * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    attention = 2 * 2 * 32 * tokens * tokens // images
    assert parts["LLM forward"] == pytest.approx(2 * (layer + attention), rel=1e-12)
    assert parts["LLM backward"] == pytest.approx(2 * (layer + 2 * attention), rel=1e-12)  # of activations alone
    assert parts["head and loss"] == pytest.approx(2 * 2 * images * places * 32 * 98, rel=1e-12)
    assert parts["optimizer"] == parts["host input"] == 0


def test_utilization_is_the_share_of_the_peak(result):
    whole = result["step"]
    assert whole["peak_tflops"] == pytest.approx(1e-3)
    assert whole["mfu"] == pytest.approx(whole["tflop"] * 1e12 / (whole["ms"] / 1e3) / (2 * 1e9))
    assert peaks.utilization(989e12, 2.0, 989e12, 4) == 1 / 8
    assert peaks.utilization(1e12, 1.0, None, 1) is None


def test_peaks_by_the_names_that_jax_gives():
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
    known |= {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12}
    assert {kind: peaks.peak_flops(kind) for kind in known} == known
    assert peaks.peak_flops("NVIDIA H100 PCIe") is None and peaks.peak_flops("cpu") is None


def test_pytorch_gives_the_same_loss_and_gradients(result):
    against = result["against"]
    assert against["loss"]["ours"] == pytest.approx(against["loss"]["torch"], rel=1e-5)
    assert against["loss"]["relative_difference"] < 1e-5
    assert 0 < against["connector_gradient_difference"] < 1e-4 and 0 < against["gradient_difference"] < 1e-4
    speeds = against["images_per_s"]
    assert len(speeds["ours"]) == len(speeds["torch"]) == 2
    assert against["ratio"]["least"] <= against["ratio"]["median"] <= against["ratio"]["greatest"]
    assert against["text_places"]["torch"] <= against["text_places"]["ours"]
    assert (against["attention"], against["compiled"], against["compile_error"]) == ("sdpa", False, "")


def test_trace_is_written_where_it_says(result, folder):
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert str(path) in result["trace"] and path.stat().st_size > 0


def test_table_names_every_number(result):
    text = table.describe("configs/tiny.py", result)
    assert "configs/tiny.py on 2 x cpu (cpu; data 2, fsdp 1, tensor 1)" in text
    for label, _ in table.LABELS.values():
        assert label in text
    assert f"MFU {result['step']['mfu']:.1%} of 0.001 bfloat16 TFLOP/s a device" in text
    result = result | {"step": result["step"] | {"mfu": None}}
    assert "no MFU, since no peak is known of 'cpu'" in table.describe("configs/tiny.py", result)


def test_parts_of_a_model_that_is_trained_whole_in_micro_batches_add_up_too(monkeypatch):
    monkeypatch.setattr(step_parts, "compiled_seconds", lambda *arguments: 0.0)
    everything = ["train.accumulate=2", "vit.train=True", "llm.train=True", "llm.remat=True", "llm.size=opt_tiny"]
    chosen = setting.prepare(tiny(*everything, "connector.merges=(5,0)"), 1)
    batch = setting.put(chosen)
    costs = step_parts.Parts(chosen, batch, 1).measure()
    whole = count_flops(chosen.plan.step.trace(chosen.state, chosen.frozen, batch).jaxpr)
    assert sum(cost.flops for name, cost in costs.items() if name != "merge") == whole


def test_padding_counts_soft_prompts_as_real():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    batches = [{"caption_mask": mask, "weight": np.ones(2)}, {"caption_mask": mask[:1], "weight": np.ones(1)}]
    assert setting.padding_share(batches, 6) == (1 + 3 + 1) / (3 * 4 + 3 * 6)


def test_the_measured_batch_has_the_median_length():
    batches = [{"caption_ids": np.zeros((2, length))} for length in (8, 20, 12)]
    chosen = setting.Setting(None, None, None, None, None, None, batches, 0.0)
    assert chosen.host_batch is batches[2]


def test_captions_without_padding_from_rows_of_one_and_of_several():
    ids, targets = np.array([[1, 7, 2], [1, 2, 0]]), np.array([[-100, 7, 2], [-100, 2, -100]])
    rows = {"caption_ids": ids, "caption_targets": targets, "caption_mask": np.array([[1, 1, 1], [1, 1, 0]])}
    expected = [([1, 7, 2], [-100, 7, 2]), ([1, 2], [-100, 2])]
    assert texts_of(rows) == expected
    row = {
        "caption_ids": np.array([[1, 7, 2, 1, 2, 0]]),
        "caption_targets": np.array([[-100, 7, 2, -100, 2, -100]]),
        "caption_mask": np.array([[1, 1, 1, 1, 1, 0]]),
        "caption_lengths": np.array([[3, 2]]),
    }
    assert texts_of(row) == expected


def test_ratios_are_of_the_same_round():
    assert timing.ratios([20.0, 90.0, 40.0], [10.0, 30.0, 10.0]) == (3.0, 2.0, 4.0)


def test_the_step_names_its_parts_in_a_trace(chosen):
    program = chosen.plan.step.lower(chosen.state, chosen.frozen, setting.put(chosen)).as_text(debug_info=True)
    for scope in ("/vit.encode/", "/connector/", "/merge/", "/llm/", "/head_and_loss/", "/optimizer/"):
        assert scope in program, scope


def test_wrong_input_is_refused(tmp_path, capsys):
    assert call(verb, *TINY, "--steps", 0) == 2
    assert "--steps and --rounds must be at least 1" in capsys.readouterr().err
    assert call(verb, *TINY, "--torch_compile") == 2
    assert "add it" in capsys.readouterr().err
    assert call(verb, "--config", "configs/tiny.py:vit") == 2
    assert "trains no captioner" in capsys.readouterr().err
    assert call(verb, *TINY, "--config.data.frames=2", "--config.vit.temporal=True", "--decode") == 2
    assert "the config's data are clips" in capsys.readouterr().err
    assert call(verb, *TINY, "--against", "torch", "--config.train.accumulate=2", "--config.mesh.data=1") == 2
    assert "--config.train.accumulate=1" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert call(verb, *TINY, "--trace", tmp_path / "file") == 2
    assert "--trace cannot write to" in capsys.readouterr().err


def test_one_json_object_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(measure, "measure", lambda config, options, say: {"steps": options.steps, "images": 8})
    assert call(verb, *TINY, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"config": "configs/tiny.py", "steps": 2, "images": 8}
