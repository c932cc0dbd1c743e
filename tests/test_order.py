"""Order accuracy: equal to a computation by hand, one half without a sense of order, and resumed as if undisturbed."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from preparing import run as run_prepare
from preparing import write_json
from test_processes import finish, start

from simvlg_jax.config import defaults
from simvlg_jax.config.load import load_config
from simvlg_jax.data import clips
from simvlg_jax.data.batching import pad
from simvlg_jax.data.openmoji.clips import encode
from simvlg_jax.evaluation.evaluators import make_evaluator
from simvlg_jax.evaluation.likelihood import Likely
from simvlg_jax.evaluation.order import COARSE_NOISE, NOISE, Order, share_right
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT

BATCH = 8
STILL = 2  # the record whose reverse has the same caption, so none is known
BROKEN = 5  # the record whose video is cut
# The captions of each clip and of its reverse. The random model below tells some apart rightly, and others wrongly.
TEXTS = [tuple(pair) for pair in ("Oj", "Re", "Up", "Cj", "Tr", "Zp", "Or", "Ev", "Up", "Du", "Ml")]
COUNT = len(TEXTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of a prepared split "val" of different videos, and of "bare", none of which has a known reverse."""
    folder = tmp_path_factory.mktemp("order")
    (folder / "list").mkdir()
    rows = []
    for n, (own, reverse) in enumerate(TEXTS):
        frames = np.random.default_rng(n).integers(0, 256, (4, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        (folder / "list" / f"{n}.mp4").write_bytes(encode(frames))
        row = {"video": f"{n}.mp4", "video_id": str(n), "caption": own, "group": ["up", "down"][n % 2]}
        rows.append(row if n == STILL else row | {"reverse_caption": reverse})
    for split, own in (("val", rows), ("bare", [rows[STILL]])):
        run_prepare(folder / "data", write_json(folder / "list", own), split=split)
    return folder


def build(data, *flags):
    """A tiny video model with random weights, which are so large that clips and their order matter."""
    keys = ["data.name=prepared", f"data.path={data / 'data'}", "data.frames=4", "vit.temporal=True", *flags]
    keys += ["llm.max_text_tokens=20", f"evaluate.batch_size={BATCH}"]
    config = load_config("configs/tiny.py", [f"--config.{key}" for key in keys])
    task = build_task(config)
    rng = np.random.default_rng(0)
    abstract = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    params = {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in abstract.items()}
    for path in params.keys() & {("llm_proj", "kernel"), ("vit", "temporal_position")}:
        params[path] *= 5 if path[0] == "llm_proj" else 10
    return config, task, traverse_util.unflatten_dict(params)


def evaluator_of(built, **keys):
    """The evaluator, and parameters on its devices, of which there are eight."""
    config, task, params = built
    entry = defaults.get_eval()
    entry.update(type="order", **keys)
    mesh = make_mesh(config.mesh)
    assert mesh.size == 8
    return make_evaluator("val", entry, task, config, mesh), jax.device_put(params, meshes.replicated(mesh))


@pytest.fixture(scope="module")
def ordered(data):
    return build(data, "vit.max_frames=4")


@pytest.fixture(scope="module")
def by_hand(ordered, data):
    """[clip, whose captions] -> the margin for the clip and for its reverse, from the loss of single rows."""
    _, task, params = ordered
    encoder = task.batch.texts["caption"].encoder
    shown = [clips.decode((data / "list" / f"{n}.mp4").read_bytes(), 4, "uniform", 32) for n in range(COUNT)]
    losses = jax.jit(lambda *rows: task.model.apply({"params": params}, *rows, method="caption_losses")[0])

    def nats(clip, text):
        ids, targets = encoder(text)
        rows = pad([ids], 20, 0), pad([[1] * len(ids)], 20, 0), pad([[-100, *targets[1:]]], 20, -100)
        return -float(losses(clip[None], *rows)[0])

    def margins(clip, captions):
        own, reverse = TEXTS[captions]
        return tuple(nats(frames, own) - nats(frames, reverse) for frames in (shown[clip], shown[clip][::-1]))

    return margins


def right(forth: float, back: float) -> float:
    return ((forth > 0) + (back < 0)) / 2


def test_share_of_right_choices():
    cases = {(2, -2): 1, (-2, 2): 0, (2, 1): 0.5, (-2, -1): 0.5, (0, -1): 0.75, (0, 1): 0.25, (1, 0): 0.75, (0, 0): 0.5}
    for margins, expected in cases.items():
        assert share_right(*margins, NOISE) == expected
    # Equal but for rounding, on both sides of 0: as if equal.
    assert share_right(4e-4, -4e-4, NOISE) == share_right(-4e-4, 4e-4, NOISE) == 0.5
    assert share_right(6e-4, -6e-4, NOISE) == 1 and share_right(6e-4, -6e-4, COARSE_NOISE) == 0.5
    assert share_right(float("nan"), 1.0, NOISE) == 0


def test_order_accuracy_is_that_of_a_computation_by_hand(ordered, by_hand):
    evaluator, params = evaluator_of(ordered)
    result = evaluator(params)
    details = result.details()
    known = [n for n in range(COUNT) if n != STILL]
    expected = {n: by_hand(n, n) for n in known}
    assert min(abs(forth - back) for forth, back in expected.values()) > 2 * NOISE  # so the hand needs no rule for it
    scores = {n: right(*margins) for n, margins in expected.items()}
    assert set(scores.values()) == {0.0, 0.5, 1.0}
    for n, example in enumerate(details["examples"]):
        assert example["id"] == str(n)
        if n == STILL:
            assert example["score"] is None and example["references"] == []
            continue
        np.testing.assert_allclose(example["margins"], expected[n], rtol=1e-4, atol=1e-4)
        assert (example["score"], example["references"]) == (scores[n], [TEXTS[n][0]])
        assert example["caption"] == TEXTS[n][expected[n][0] <= 0]
    assert result.score == details["scores"]["accuracy"] == np.mean(list(scores.values()))
    assert (details["num_examples"], details["unlabelled"]) == (COUNT, 1)
    for group, parity in (("up", 0), ("down", 1)):
        own = [score for n, score in scores.items() if n % 2 == parity]
        assert details["groups"][group] == {"accuracy": np.mean(own), "num_examples": len(own)}
        assert result.metrics[f"accuracy_{group}"] == np.mean(own)
    # The control has the clip of the next record of the batch that has a reverse.
    batches = [[n for n in known if n // BATCH == number] for number in range(2)]
    others = [right(*by_hand(own[(k + 1) % len(own)], n)) for own in batches for k, n in enumerate(own)]
    assert details["shuffled"]["accuracy"] == np.mean(others)
    low, high = details["interval"]
    assert low <= result.score <= high


def test_a_model_without_order_is_right_exactly_half_the_time(data):
    """The frames are summed in another order, which changes last bits; each clip is one right and one wrong choice."""
    evaluator, params = evaluator_of(build(data))
    result = evaluator(params)
    examples = [example for example in result.details()["examples"] if example["margins"]]
    assert [example["score"] for example in examples] == [0.5] * (COUNT - 1)
    assert result.score == 0.5 and result.metrics["accuracy_shuffled"] == 0.5
    margins = np.array([example["margins"] for example in examples])
    # No margin is so small that rounding decides about it.
    assert np.abs(margins).min() > 2 * NOISE and np.abs(margins[:, 0] - margins[:, 1]).max() < NOISE / 5


def test_margins_on_both_sides_of_zero_by_rounding_are_no_knowledge(data, monkeypatch):
    evaluator, params = evaluator_of(build(data), max_examples=3)
    monkeypatch.setattr(evaluator, "_likelihood", Rounded())
    assert evaluator(params).score == 0.5
    monkeypatch.setattr(evaluator, "_noise", 0.0)
    assert evaluator(params).score == 1.0


class Rounded:
    """Likelihoods whose margin is 0 but for rounding, which favours what is right."""

    def __init__(self, asked=()):
        self._passes, self._asked = 0, asked

    def encode(self, params, images):
        self._passes += 1

    def __call__(self, params, prefixes, queries):
        if isinstance(self._asked, list):
            self._asked += queries
        noise = 1e-5 if self._passes % 2 else -1e-5
        return [Likely(-20 + noise * (place % 2 == 0), 5, False) for place in range(len(queries))]


def test_an_interrupted_evaluation_gives_the_undisturbed_results(ordered, tmp_path, monkeypatch):
    evaluator, params = evaluator_of(ordered)
    whole = evaluator(params, SILENT, Partial(tmp_path / "whole.jsonl", {})).details()
    assert sum("image" in example for example in whole["examples"]) == COUNT  # for the report
    made, batch = [], Order._batch

    def fail_at_the_second(self, params, arrays):
        made.append(arrays)
        if len(made) == 2:
            raise KeyboardInterrupt
        return batch(self, params, arrays)

    monkeypatch.setattr(Order, "_batch", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluator(params, SILENT, Partial(tmp_path / "parts.jsonl", {}))
    resumed = Partial(tmp_path / "parts.jsonl", {})
    assert len(resumed.batches) == 1
    details = evaluator(params, SILENT, resumed).details()
    assert len(made) == 3
    for example, other in zip(details["examples"], whole["examples"], strict=True):
        assert example | {"margins": None} == other | {"margins": None}
        assert list(example["margins"] or ()) == list(other["margins"] or ())
    del details["examples"], whole["examples"]
    assert details == whole


def test_a_video_that_cannot_be_read_is_listed_and_not_scored(ordered, monkeypatch, capsys):
    evaluator, params = evaluator_of(ordered)
    decode = clips.decode

    def broken(data, *arguments, **options):
        if data == lost:
            raise OSError("the video is cut off")
        return decode(data, *arguments, **options)

    lost = evaluator.data.source[BROKEN]["image"]
    monkeypatch.setattr(clips, "decode", broken)
    details = evaluator(params).details()
    assert details["unreadable"] == [str(BROKEN)] and "1 truncated" in capsys.readouterr().err
    assert [example["id"] for example in details["examples"]] == [str(n) for n in range(COUNT) if n != BROKEN]


def test_captions_are_cleaned_as_in_training(data, monkeypatch):
    evaluator, params = evaluator_of(build(data, "data.clean=blip_caption"), max_examples=1)
    asked = []
    monkeypatch.setattr(evaluator, "_likelihood", Rounded(asked))
    evaluator(params)
    assert [query.text for query in asked] == ["o", "j"] * 2


def test_what_cannot_be_scored_is_refused(data, ordered):
    with pytest.raises(UserError, match="order is for models that write captions of clips") as raised:
        evaluator_of((config := load_config("configs/tiny.py"), build_task(config), {}))
    assert raised.value.status == 2
    with pytest.raises(UserError, match="no record of this split has a caption of the reversed clip") as raised:
        evaluator_of(ordered, split="bare")
    assert raised.value.status == 2


def test_two_processes_give_the_results_of_one(ordered, data, tmp_path):
    evaluator, params = evaluator_of(ordered)
    one = evaluator(params).details()
    statuses, said = finish(start(2, 4, "tests/order_processes.py", str(data), str(tmp_path / "two.json")))
    assert statuses == [0, 0], said
    two = json.loads((tmp_path / "two.json").read_text())
    margins = [
        [margin for example in each["examples"] for margin in example.pop("margins") or ()] for each in (one, two)
    ]
    np.testing.assert_allclose(*margins, rtol=1e-4, atol=1e-4)
    assert two == json.loads(json.dumps(one))
