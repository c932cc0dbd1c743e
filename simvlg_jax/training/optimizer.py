"""AdamW with the published groups and schedules, over the trained parameters alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from simvlg_jax.tasks.params import Rule


def learning_rate(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    "cosine": linear warm-up from warmup_lr to lr over warmup_steps, then a cosine to min_lr at `total_steps`.
    "staircase": as the published code stepped it. With E = step // inner_epoch_steps and M = total_steps //
    inner_epoch_steps, warm-up lives within E = 0 and the cosine changes only with E (never reaching E = M).
    """
    o = optimizer
    if o.schedule == "cosine":
        warmup = optax.linear_schedule(o.warmup_lr, o.lr, max(o.warmup_steps, 1))
        decay = optax.cosine_decay_schedule(o.lr, max(total_steps - o.warmup_steps, 1), o.min_lr / o.lr)
        return optax.join_schedules([warmup, decay], [o.warmup_steps])

    inner_epochs = max(total_steps // o.inner_epoch_steps, 1)

    def staircase(step: jax.Array) -> jax.Array:
        epoch, inside = step // o.inner_epoch_steps, step % o.inner_epoch_steps
        rising = o.warmup_lr + (o.lr - o.warmup_lr) * inside / max(o.warmup_steps, 1)
        falling = o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + jnp.cos(jnp.pi * epoch / inner_epochs))
        return jnp.where(epoch == 0, jnp.minimum(o.lr, rising), falling)

    return staircase


def make_optimizer(
    optimizer: ConfigDict, total_steps: int, rule: Callable[[tuple[str, ...]], Rule]
) -> optax.GradientTransformation:
    """AdamW on the schedule, clipped if asked for.

    Args:
      rule: path of a parameter -> whether it is decayed, and the factor on its learning rate.
    """

    def decayed(params: dict) -> dict:
        return traverse_util.path_aware_map(lambda path, _: rule(path).decay, params)

    def scale(updates: dict, params: dict | None = None) -> dict:
        del params
        return traverse_util.path_aware_map(lambda path, update: update * rule(path).lr, updates)

    adamw = optax.adamw(
        learning_rate(optimizer, total_steps),
        optimizer.b1,
        optimizer.b2,
        optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decayed,
    )
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return optax.chain(clip, adamw, optax.stateless(scale))
