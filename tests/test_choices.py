"""Multiple choice by likelihood: equal to the loss and to PyTorch, and the evaluation chooses the likeliest."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from preparing import run as run_prepare
from preparing import write_json

from simvlg_jax.config import defaults
from simvlg_jax.config.load import load_config
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.batching import pad
from simvlg_jax.data.pictures import read_picture
from simvlg_jax.data.sources import RecordInfo
from simvlg_jax.data.text import IGNORE
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.choices import RANKINGS, common_choices
from simvlg_jax.evaluation.evaluators import make_evaluator
from simvlg_jax.evaluation.likelihood import Likelihood, Likely, Query, likelihood_of, loglikelihood
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError

QUERIES = [
    Query(picture, prompt, text)
    for picture in range(3)
    for prompt in ("what is it?", "", "Question: what colour is this picture? Short answer:")
    for text in ("cat", "a red circle")
]


def build(*flags):
    """A tiny task with random weights, which are so large that likelihoods of pictures differ."""
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in ("llm.max_text_tokens=40", *flags)])
    task = build_task(config)
    rng = np.random.default_rng(0)
    abstract = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    params = {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in abstract.items()}
    return config, task, traverse_util.unflatten_dict(params)


@pytest.fixture(scope="module", params=["start_first=False", "start_first=True"])
def built(request):
    return build(f"llm.{request.param}")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def rows(encoder, queries, end=True):
    """Ids, mask and targets (N, 40) as a training batch has them."""
    encoded = [encoder(query.text, query.prompt) for query in queries]
    ids, targets = ([row[part] for row in encoded] for part in (0, 1))
    targets = [[IGNORE, *row[1:]] for row in targets]  # the start token, a target without a prompt
    if not end:
        targets = [
            [*row[:-1], IGNORE] if own[-1] == encoder.end else row for row, own in zip(targets, ids, strict=True)
        ]
    return pad(ids, 40, 0), pad([[1] * len(row) for row in ids], 40, 0), pad(targets, 40, IGNORE)


@pytest.mark.parametrize("end", [True, False])
def test_likelihood_is_the_loss_of_the_same_rows(built, images, end):
    _, task, params = built
    encoder = task.batch.texts["caption"].encoder
    ids, mask, targets = rows(encoder, QUERIES, end)
    own = images[[query.picture for query in QUERIES]]
    arguments = ({"params": params}, own, ids, mask)
    losses, counts = task.model.apply(*arguments, targets, method="caption_losses")
    hidden = task.model.apply(*arguments).hidden[:, -41:-1]
    best = np.argmax(task.model.bind({"params": params}).llm.logits(hidden), -1)
    likelihood = Likelihood(task.model, encoder, batch_size=4, end=end)
    found = likelihood(params, likelihood.encode(params, images), QUERIES)
    np.testing.assert_allclose([likely.nats for likely in found], -losses, rtol=1e-5)
    assert [likely.tokens for likely in found] == counts.tolist()
    assert [likely.greedy for likely in found] == ((best == targets) | (targets == IGNORE)).all(1).tolist()
    assert len({round(likely.nats, 3) for likely in found}) == len(found)  # pictures, prompts and texts matter


def test_what_the_model_writes_is_greedy(built, images):
    _, task, params = built
    encoder = task.batch.texts["caption"].encoder
    captioner = Captioner(task.model, encoder, Decoding(max_new_tokens=5))
    ids = np.asarray(captioner(params, images).ids)
    written = [text for (text,) in captioner.decode(ids)]
    # Those that did not end before their fifth token, and lost no space.
    whole = [place for place, text in enumerate(written) if encoder(text)[0][1:-1] == ids[place, 0].tolist()]
    assert whole
    changed = [f"{text[:3]}{'b' if text[3:4] == 'a' else 'a'}{text[4:]}" for text in written]
    for texts, expected in ((written, True), (changed, False)):
        requests = [(images[place], "", texts[place]) for place in whole]
        assert [greedy for _, greedy in loglikelihood(task, params, requests)] == [expected] * len(whole)


def test_each_picture_is_encoded_once(built, images, monkeypatch):
    _, task, params = built
    likelihood = likelihood_of(task.model, task.batch.texts["caption"].encoder, 2, end=False)
    encode, seen = likelihood.encode, []
    monkeypatch.setattr(likelihood, "encode", lambda params, images: seen.append(images) or encode(params, images))
    requests = [(images[query.picture].copy(), query.prompt, query.text) for query in QUERIES]
    found = loglikelihood(task, params, requests, batch_size=2)
    np.testing.assert_array_equal(np.concatenate(seen)[:3], images)
    assert [len(batch) for batch in seen] == [2, 2] and not seen[1][1].any()
    turned = loglikelihood(task, params, requests[::-1], batch_size=32)[::-1]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in turned]
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in turned], rtol=1e-5)


def test_the_space_before_a_text_separates_it_from_its_prompt(built, images):
    _, task, params = built
    one, other, bare = loglikelihood(task, params, [(images[0], "is it", t) for t in ("so", " so", "  so")])
    assert one == other != bare


def test_likelihood_is_that_of_pytorch(tmp_path, images):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    from simvlg_jax.huggingface import export

    config, task, params = build("llm.start_first=True")
    encoder = task.batch.texts["caption"].encoder
    export.write_hf(tmp_path, task.model, params, encoder, config)
    exported = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    ids, mask, targets = rows(encoder, QUERIES, end=False)
    own = images[[query.picture for query in QUERIES]]
    pixels = torch.from_numpy(np.array(task.model.vit.normalize(own)).transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits = exported(pixels, torch.from_numpy(ids), torch.from_numpy(mask)).logits[:, -41:-1]
    each = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(targets).clamp(min=0).long()[..., None])[..., 0]
    expected = np.where(targets == IGNORE, 0, each.numpy()).sum(1)
    requests = [(images[query.picture], query.prompt, query.text) for query in QUERIES]
    found = loglikelihood(task, params, requests)
    np.testing.assert_allclose([nats for nats, _ in found], expected, rtol=1e-5)
    best = logits.argmax(-1).numpy()
    assert [greedy for _, greedy in found] == ((best == targets) | (targets == IGNORE)).all(1).tolist()


def test_a_text_that_does_not_fit_is_refused(built, images):
    _, task, params = built
    encoder = task.batch.texts["caption"].encoder
    likelihood = Likelihood(task.model, encoder, 4)
    prefixes = likelihood.encode(params, images)
    with pytest.raises(UserError, match=r"has more tokens than llm\.max_text_tokens=40 leaves for it"):
        likelihood(params, prefixes, [Query(0, "a", "b" * 39)])


def test_rankings():
    short, long = Likely(-3.0, 1, False), Likely(-4.0, 4, False)
    assert max((short, long), key=RANKINGS["sum"]) is short
    assert max((short, long), key=RANKINGS["mean"]) is long


class Records:
    """The infos of records with these answers."""

    def __init__(self, *answers):
        self._answers = answers

    def infos(self):
        return [RecordInfo(str(number), list(answers)) for number, answers in enumerate(self._answers)]


def test_choices_of_all_records():
    data = Records(["cat", "dog"], [], ["dog", "emu"])
    assert common_choices("val", "answers", data) == ["cat", "dog", "emu"]
    assert common_choices("val", "yes| no ", data) == ["yes", "no"]
    for choices, message in (
        ("", "the record '0' has fewer than two choices"),
        ("yes", "are 1 choices"),
        ("|", "are 0 choices"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            common_choices("val", choices, data)
        assert raised.value.status == 2


def test_evaluation_chooses_the_likeliest(tmp_path):
    texts = [["red", "blue", "a green one"], ["yes", "no"], ["1", "2", "3", "4"]]
    rows = []
    for n in range(10):
        row = {"image": f"{n % 4}.png", "question": f"Which, {n}?", "question_id": n, "choices": texts[n % 3]}
        rows.append(row | {"correct": n % 2, "answer": texts[n % 3][n % 2]})
    run_prepare(tmp_path / "data", write_json(tmp_path / "list", rows, 4), split="val")
    config, task, params = build("data.name=prepared", f"data.path={tmp_path / 'data'}")
    pictures = [read_picture(tmp_path / "list" / f"{n % 4}.png", Pictures(32)) for n in range(10)]
    likelihood = Likelihood(task.model, task.batch.texts["caption"].encoder, 64)

    def nats(pictures, ask):
        queries = [Query(n, f"Question: Which, {n}? Short answer:", t) for n, row in enumerate(rows) for t in ask(row)]
        found = iter(likelihood(params, likelihood.encode(params, np.stack(pictures)), queries))
        return [[next(found).nats for _ in ask(row)] for row in rows]

    def evaluated(**keys):
        entry = defaults.get_eval()
        entry.update(type="choices", **keys)
        mesh = make_mesh(config.mesh)
        return make_evaluator("val", entry, task, config, mesh)(jax.device_put(params, meshes.replicated(mesh)))

    results = evaluated().details()
    expected = nats(pictures, lambda row: row["choices"])
    picks = [int(np.argmax(row)) for row in expected]
    for example, row, values, pick in zip(results["examples"], rows, expected, picks, strict=True):
        assert (example["id"], example["question"]) == (str(row["question_id"]), row["question"])
        assert (example["caption"], example["references"]) == (row["choices"][pick], [row["answer"]])
        assert example["score"] == float(pick == row["correct"])
        assert [text for text, _, _ in example["choices"]] == [row["choices"][i] for i in np.argsort(values)[::-1]]
        np.testing.assert_allclose([value for _, value, _ in example["choices"]], sorted(values)[::-1], rtol=1e-4)
    assert results["scores"]["accuracy"] == np.mean([example["score"] for example in results["examples"]])
    assert results["scores"]["chance"] == pytest.approx(np.mean([1 / len(row["choices"]) for row in rows]))
    # The control has the picture of the next record of the batch; batches are of 8.
    others = nats([pictures[n] for n in (1, 2, 3, 4, 5, 6, 7, 0, 9, 8)], lambda row: row["choices"])
    shuffled = [np.argmax(row) == question["correct"] for row, question in zip(others, rows, strict=True)]
    assert results["shuffled"]["accuracy"] == np.mean(shuffled)

    answers = list(dict.fromkeys(row["answer"] for row in rows))
    picks = [answers[int(np.argmax(row))] for row in nats(pictures, lambda row: answers)]
    assert evaluated(choices="answers", metric="vqa").files == {
        ".vqa.json": [{"question_id": n, "answer": pick} for n, pick in enumerate(picks)]
    }
    with pytest.raises(UserError, match=r"evals.val.ranking is 'longest'; it takes 'sum', 'mean'"):
        evaluated(ranking="longest")
