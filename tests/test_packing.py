"""Packed captions: the same losses, gradients and training as padded ones, without the padding."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from simvlg_jax.config.load import load_config
from simvlg_jax.models import losses
from simvlg_jax.models.packing import make_packing
from simvlg_jax.tasks import build_task
from simvlg_jax.training import loop

LENGTHS = np.array([[24, 2, 9, 5], [11, 16, 3, 8]])  # of the captions of two packs


def batches(task, start_is_target: bool) -> tuple[dict, dict]:
    """The same examples padded and packed, with two places of padding in the longer pack."""
    rng = np.random.default_rng(0)
    side, longest, room = task.batch.pictures.side, LENGTHS.max(), LENGTHS.sum(1).max() + 2
    images = rng.integers(0, 256, (LENGTHS.size, side, side, 3), dtype=np.uint8)
    ids = rng.integers(3, 98, (LENGTHS.size, longest)).astype(np.int32)
    mask = (np.arange(longest) < LENGTHS.reshape(-1, 1)).astype(np.int32)
    targets = np.where(mask == 1, ids, -100)
    targets[:, 0] = ids[:, 0] if start_is_target else -100
    padded = {"image": images, "caption_ids": ids, "caption_mask": mask, "caption_targets": targets}

    def packed(rows, blank):
        pairs = zip(rows, mask, strict=True)
        texts = [row[real == 1] for row, real in pairs]
        joined = [np.concatenate(texts[at : at + 4]) for at in (0, 4)]
        return np.stack([np.pad(row, (0, room - len(row)), constant_values=blank) for row in joined])

    blanks = {"caption_ids": 0, "caption_mask": 0, "caption_targets": -100}
    packs = {name: packed(padded[name], blank) for name, blank in blanks.items()}
    return padded, {"image": images, **packs, "caption_lengths": LENGTHS.astype(np.int32)}


@pytest.mark.parametrize(
    ("flags", "most_logits"),
    [
        (["llm.size=opt_tiny", "llm.scan=False", "llm.train=True"], 2**24),
        (["llm.size=tiny", "llm.start_first=True", "llm.remat=True"], 2**24),
        (["llm.size=qwen3_tiny"], 2000),  # in chunks: ten tokens of two packs, two of eight captions
        (["llm.size=opt_tiny", "llm.train=True"], 2000),
    ],
    ids=["trained OPT", "start first", "Qwen in chunks", "trained OPT in chunks"],
)
def test_losses_and_gradients_of_packs_are_those_of_padded_captions(flags, most_logits, monkeypatch):
    monkeypatch.setattr(losses, "MOST_LOGITS", most_logits)
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    task = build_task(config)
    params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)
    trained = {name: tree for name, tree in params.items() if name not in ("vit", "llm") or config[name].train}

    def loss(trained, batch):
        values = task.losses(params | trained, batch, None).values["caption"]
        return values.sum(), values

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    padded, packed = batches(task, start_is_target=not config.llm.start_first)
    (_, expected), gradients = step(trained, padded)
    (_, values), others = step(trained, packed)
    np.testing.assert_allclose(values, expected.reshape(2, 4).sum(1), rtol=1e-6)
    assert (
        task.counts(packed, True)["caption"].tolist()
        == task.counts(padded, True)["caption"].reshape(2, 4).sum(1).tolist()
    )
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("start_first", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_token_has_one_place_and_comes_back_and_nothing_else_has_a_gradient(seed, start_first):
    packs, examples, prefix, longest, tokens = 2, 3, 2, 4, 14
    lengths = np.random.default_rng(seed).integers(1, longest + 1, (packs, examples))
    packing = jax.jit(make_packing, static_argnums=(1, 2, 3, 4))(lengths, tokens, prefix, longest, start_first)
    x = np.arange(1, packs * (examples * prefix + tokens) + 1, dtype=np.float32).reshape(packs, -1, 1)
    rows = np.asarray(packing.unpack(x))[..., 0].reshape(packs, examples, -1)
    back, pull_back = jax.vjp(packing.pack, packing.unpack(x))
    row, slopes_of_rows = prefix + longest, np.asarray(pull_back(np.ones_like(x))[0]).reshape(rows.shape)
    slopes = np.asarray(jax.vjp(packing.unpack, x)[1](np.ones_like(rows).reshape(packs * examples, row, 1))[0])[..., 0]
    for pack, at in zip(range(packs), [examples * prefix] * packs, strict=True):
        for example, length in enumerate(lengths[pack]):
            visual = x[pack, example * prefix : (example + 1) * prefix, 0].tolist()
            text = x[pack, at : at + length, 0].tolist()
            expected = text[:1] + visual + text[1:] if start_first else visual + text
            assert rows[pack, example, : len(expected)].tolist() == expected
            assert slopes_of_rows[pack, example].tolist() == [1.0] * len(expected) + [0.0] * (row - len(expected))
            for number, token in enumerate(text, start=at):
                place = expected.index(token)
                assert packing.positions[pack, number] == place
                if place:
                    assert x[pack, packing.before[pack, number - examples * prefix], 0] == expected[place - 1]
            at += length
        assert back[pack, :at].tolist() == x[pack, :at].tolist()
        assert slopes[pack].tolist() == [1.0] * at + [0.0] * (len(slopes[pack]) - at)


def tiny(**flags):
    given = [f"--config.{key.replace('__', '.')}={value}" for key, value in flags.items()]
    return load_config("configs/tiny.py", [*given, "--config.connector.dropout=0.0", "--config.train.batch_size=16"])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_packed_run_on_four_devices_with_micro_batches_learns_the_same(beta, tmp_path):
    def trained(folder, **flags):
        trainer = loop.Trainer(tiny(train__beta=beta, **flags), tmp_path / folder)
        assert len(trainer._programs) == ("data__pack" in flags)  # compiled while the weights were initialised
        metrics = [trainer.run_step(trainer.put(trainer.next_batch())) for _ in range(3)]
        return [float(each["loss"]) for each in metrics], jax.device_get(trainer.state.params), trainer

    losses_padded, params, _ = trained("padded", mesh__data=1)
    losses_packed, others, trainer = trained("packed", mesh__data=4, data__pack=-1, train__accumulate=2)
    assert trainer.packing.pack.examples == 2 and len(trainer._programs) == 1
    np.testing.assert_allclose(losses_packed, losses_padded, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)
