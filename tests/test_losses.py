"""The caption loss and its gradient equal torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from simvlg_jax.models import losses as losses_module
from simvlg_jax.models.losses import token_cross_entropy, token_losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("most_logits", [3 * 11 * 2, 2**24])  # two tokens at a time, or all
def test_equals_torch(smoothing, most_logits, monkeypatch):
    monkeypatch.setattr(losses_module, "MOST_LOGITS", most_logits)
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (8, 11)))
    targets = rng.integers(0, 11, (3, 5))
    targets[0, 2:] = targets[1] = -100

    def total(hidden):
        losses, counts = token_cross_entropy(hidden, lambda x: x @ kernel, jnp.asarray(targets), smoothing=smoothing)
        return losses.sum(), (losses, counts)

    (_, (losses, counts)), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(hidden))
    theirs = torch.from_numpy(hidden).requires_grad_()
    logits = (theirs @ torch.from_numpy(kernel)).transpose(1, 2)
    options = dict(reduction="none", label_smoothing=smoothing)
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), **options).sum(1)
    each.sum().backward()
    np.testing.assert_allclose(losses, each.detach(), rtol=1e-5)
    np.testing.assert_array_equal(counts, [2, 0, 5])
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-6)


def test_losses_of_tokens_are_those_of_the_softmax_and_zero_elsewhere():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    targets = np.array([[1, -100, 6], [-100, 0, 2]])
    losses = token_losses(jnp.asarray(logits), lambda x: x, jnp.asarray(targets))
    for row, place in np.ndindex(2, 3):
        target = targets[row, place]
        chances = np.exp(logits[row, place]) / np.exp(logits[row, place]).sum()
        np.testing.assert_allclose(losses[row, place], -np.log(chances[target]) if target >= 0 else 0, rtol=1e-5)


@pytest.mark.parametrize("trains_head", [False, True])
def test_chunks_keep_no_logits_and_their_memory_does_not_grow_with_the_vocabulary(trains_head):
    def compiled(vocab):
        def total(hidden, kernel):
            return token_losses(hidden, lambda x: x @ kernel, targets, trains_head=trains_head).sum()

        hidden = jax.ShapeDtypeStruct((4, 512, 16), jnp.float32)
        kernel = jax.ShapeDtypeStruct((16, vocab), jnp.float32)
        return jax.jit(jax.grad(total)).lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes

    targets = jnp.zeros((4, 512), jnp.int32)
    small, large = compiled(2**14), compiled(2**17)
    whole = 4 * 4 * 512 * 2**17  # bytes of all logits, a GB
    assert large < 1.3 * small < whole / 4
