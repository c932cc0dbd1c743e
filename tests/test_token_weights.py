"""Losses in which targets count differently: by what could be guessed without the picture, and by caption."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from test_packing import batches

from simvlg_jax.config.load import load_config
from simvlg_jax.models.token_weights import number_of_captions, shares, unguessed
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError

POWER = 1.5
FLAGS = {
    "OPT, whose start is a target": ["llm.size=opt_tiny"],
    "LLaMA, start first": ["llm.size=tiny", "llm.start_first=True"],
}


def config_of(*flags):
    common = ("connector.dropout=0", f"train.unguessed={POWER}", "train.mean_over=captions")
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in (*common, *flags)])


@pytest.fixture(scope="module", params=FLAGS.values(), ids=FLAGS)
def case(request):
    """Returns task, parameters that are not all small, and the same captions padded and packed."""
    config = config_of(*request.param)
    task = build_task(config)
    params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
    return task, params, *batches(task, start_is_target=not config.llm.start_first)


def chances_without_picture(task, params, batch) -> np.ndarray:
    """The probability (B, L) of each token after those before it, by the language model alone; 0 of the first one."""
    llm, own, ids = task.model.llm, {"params": params["llm"]}, batch["caption_ids"]
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    hidden = llm.apply(own, llm.apply(own, ids, method="embed"), batch["caption_mask"], positions).hidden
    chances = np.asarray(jax.nn.softmax(llm.apply(own, hidden, method="logits")))
    following = np.take_along_axis(chances[:, :-1], ids[:, 1:, None], 2)[..., 0]
    return np.pad(following, ((0, 0), (1, 0)))


def test_the_loss_is_the_weighted_sum_over_the_targets(case):
    task, params, padded, _ = case
    names = ("image", "caption_ids", "caption_mask", "caption_targets")
    _, nats = task.model.apply({"params": params}, *(padded[name] for name in names), method="explain")
    guessed, targets = chances_without_picture(task, params, padded), padded["caption_targets"] >= 0
    weights = np.where(targets, (1 - guessed) ** POWER / targets.sum(1, keepdims=True), 0)
    assert 0 < guessed[targets].max() < 1 and guessed[targets].std() > 1e-3  # the weights differ
    values = task.losses(params, padded, jax.random.key(2)).values["caption"]
    np.testing.assert_allclose(values, (weights * nats).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(task.counts(padded, True)["caption"], np.ones(8))


def test_packs_give_the_losses_and_gradients_of_padded_captions(case):
    task, params, padded, packed = case

    def loss(trained, batch):
        values = task.losses(params | trained, batch, jax.random.key(2)).values["caption"]
        return values.sum(), values

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    trained = {name: params[name] for name in ("ln_vision", "connector", "llm_proj")}
    (_, expected), gradients = step(trained, padded)
    (_, values), others = step(trained, packed)
    np.testing.assert_allclose(values, expected.reshape(2, 4).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(task.counts(packed, True)["caption"], [4, 4])
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_evaluations_and_the_default_weigh_nothing(case):
    task, params, padded, _ = case
    names = ("image", "caption_ids", "caption_mask", "caption_targets")
    _, nats = task.model.apply({"params": params}, *(padded[name] for name in names), method="explain")
    np.testing.assert_allclose(task.losses(params, padded, None).values["caption"], nats.sum(1), rtol=1e-5)
    counts = (padded["caption_targets"] >= 0).sum(1)
    np.testing.assert_array_equal(task.counts(padded, False)["caption"], counts)
    plain = build_task(load_config("configs/tiny.py", []))
    np.testing.assert_array_equal(plain.counts(padded, True)["caption"], counts)


def test_what_is_certain_counts_nothing_and_what_is_unthinkable_counts_whole():
    weights = unguessed(np.array([0.0, np.log(2), np.inf]), 2.0)
    np.testing.assert_allclose(weights, [0, 0.25, 1], rtol=1e-6)


def test_captions_without_a_target_count_nothing():
    targets = np.where(np.arange(9) < 7, 5, -100)[None].repeat(2, 0)
    targets[0, 2:5] = -100  # of the second caption none, of the third one the last two
    lengths = np.array([[2, 2, 3], [3, 4, 0]])
    third, fourth = 1 / 3, 1 / 4
    expected = [[0.5, 0.5, 0, 0, 0, 0.5, 0.5, 0, 0], [third] * 3 + [fourth] * 4 + [0, 0]]
    np.testing.assert_allclose(shares(targets, lengths), expected, rtol=1e-6)
    np.testing.assert_array_equal(number_of_captions(targets, lengths), [2, 2])
    np.testing.assert_array_equal(number_of_captions(np.full((3, 4), -100), None), [0, 0, 0])


@pytest.mark.parametrize("flag", ["train.unguessed=1", "train.mean_over=captions"])
def test_other_tasks_refuse_them(flag):
    with pytest.raises(UserError, match="are for the caption task") as error:
        load_config("configs/tiny.py:vit", [f"--config.{flag}"])
    assert error.value.status == 2
