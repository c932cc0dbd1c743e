"""The caption loss and its gradient equal torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from simvlg_jax.models.losses import token_cross_entropy, token_losses


def test_equals_torch():
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (8, 11)))
    targets = rng.integers(0, 11, (3, 5))
    targets[0, 2:] = targets[1] = -100

    def total(hidden):
        losses, counts = token_cross_entropy(hidden, lambda x: x @ kernel, jnp.asarray(targets))
        return losses.sum(), (losses, counts)

    (_, (losses, counts)), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(hidden))
    theirs = torch.from_numpy(hidden).requires_grad_()
    logits = (theirs @ torch.from_numpy(kernel)).transpose(1, 2)
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="none").sum(1)
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
