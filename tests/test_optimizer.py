"""Schedules and decay equal the published formulas, which are computed here."""

import math

import numpy as np
import optax
import pytest
import torch
from flax import traverse_util

from simvlg_jax.config.load import load_config
from simvlg_jax.tasks.caption import caption_rules
from simvlg_jax.tasks.params import check_rules, find_rule, frozen, trained
from simvlg_jax.training.optimizer import learning_rate, make_optimizer
from simvlg_jax.utils.errors import UserError


def optimizer(**fields):
    values = {"lr": 1e-4, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 50, "inner_epoch_steps": 100, **fields}
    return load_config("configs/tiny.py", [f"--config.optimizer.{k}={v}" for k, v in values.items()]).optimizer


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (25, 1e-6 + (1e-4 - 1e-6) * 25 / 50),
        (50, 1e-4),
        (99, 1e-4),  # warm-up is over, and the cosine has not moved yet
        (100, 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * 1 / 10))),
        (199, 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * 1 / 10))),
        (999, 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * 9 / 10))),
    ],
)
def test_staircase_is_the_published_schedule(step, expected):
    assert float(learning_rate(optimizer(schedule="staircase"), 1000)(step)) == pytest.approx(expected, rel=1e-5)


def test_staircase_cuts_a_warm_up_longer_than_the_inner_epoch():
    schedule = learning_rate(optimizer(schedule="staircase", warmup_steps=1000), 1000)
    assert float(schedule(99)) < 2e-5
    assert float(schedule(100)) > 9e-5


@pytest.mark.parametrize(("step", "expected"), [(0, 1e-6), (50, 1e-4), (525, 5.5e-5), (1000, 1e-5)])
def test_cosine_is_smooth_to_the_last_step(step, expected):
    assert float(learning_rate(optimizer(), 1000)(step)) == pytest.approx(expected, rel=1e-5)


def test_decay_spares_biases_scales_and_the_temperature_but_not_tables():
    config = load_config("configs/tiny.py", ["--config.train.beta=0.5"])
    rules = caption_rules(config)
    decays = {
        "connector/layer_0/query/kernel": True,
        "connector/layer_0/query/bias": False,
        "ln_vision/scale": False,
        "ln_vision/bias": False,
        "connector/embeddings/position": True,
        "connector/embeddings/token_type": True,
        "temperature": False,
    }
    for name, decay in decays.items():
        rule = find_rule(rules, tuple(name.split("/")))
        assert rule.trained and rule.decay == decay, name


def test_every_parameter_matches_one_rule_or_both_lists_are_shown():
    rules = (*trained("connector"), *frozen("connector/layer_0/.*"))
    paths = ["connector/layer_0/query/kernel", "connector/layer_1/query/kernel", "connector/gate", "adapter/kernel"]
    with pytest.raises(UserError) as raised:
        check_rules(rules, [tuple(path.split("/")) for path in paths])
    message = str(raised.value)
    assert "no rule matches (2): connector/gate, adapter/kernel" in message
    assert "several rules match (1): connector/layer_0/query/kernel (" in message and "layer_1" not in message


class TwoLayers(torch.nn.Module):
    """A module with parameters of a tiny connector and projection, under our names."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.ParameterDict({name: torch.from_numpy(x.copy()) for name, x in values.items()})


def test_steps_equal_torchs_adamw_with_clipping_decay_groups_and_learning_rate_factors():
    """torch.optim.AdamW has three groups: decayed, not decayed, and a module with a factor on its learning rate."""
    rng = np.random.default_rng(0)
    shapes = {"connector.kernel": (4, 3), "connector.bias": (3,), "llm_proj.kernel": (3, 5), "llm_proj.bias": (5,)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [{n: 3 * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(6)]
    config = optimizer(warmup_steps=2, weight_decay=0.1, clip_norm=1.0, lr=1e-2, min_lr=1e-3)
    schedule = learning_rate(config, 6)
    factors = {"connector": 0.1, "llm_proj": 10.0}

    theirs = TwoLayers({name.replace(".", "/"): x for name, x in values.items()}).values
    groups = [
        {"params": [theirs[f"{module}/{leaf}"]], "weight_decay": decay, "factor": factor}
        for module, factor in factors.items()
        for leaf, decay in (("kernel", 0.1), ("bias", 0.0))
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=config.eps)
    rules = tuple(rule for module, factor in factors.items() for rule in trained(module, factor))
    ours = traverse_util.unflatten_dict({tuple(name.split(".")): x for name, x in values.items()})
    adamw = make_optimizer(config, 6, lambda path: find_rule(rules, path))
    state = adamw.init(ours)
    for step, gradient in enumerate(gradients):
        for name, g in gradient.items():
            theirs[name.replace(".", "/")].grad = torch.from_numpy(g.copy())
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(schedule(step)) * group["factor"]
        torch_optimizer.step()
        updates, state = adamw.update(
            traverse_util.unflatten_dict({tuple(n.split(".")): g for n, g in gradient.items()}), state, ours
        )
        ours = optax.apply_updates(ours, updates)
    for name, x in traverse_util.flatten_dict(ours, sep="/").items():
        np.testing.assert_allclose(x, theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6, err_msg=name)
        assert np.abs(x - values[name.replace("/", ".")]).max() > 1e-4
