"""AdamW with the published groups and schedules, over the trained parameters alone."""

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

NO_DECAY = ("bias", "scale", "log_temperature", "temperature", "alpha")


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


def decay_mask(params: dict) -> dict:
    """True where weight decay applies: all but biases, LayerNorm scales, the contrastive temperature and video's alpha.

    The published code goes by the number of dimensions, which decays the two 0-D ones; ours are not decayed.
    """
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] not in NO_DECAY for path in flat})


def scale_by_module(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of top-level parameters by their own factor; 1 where none is given."""

    def update(updates: dict, state: optax.EmptyState, params: dict | None = None) -> tuple[dict, optax.EmptyState]:
        del params
        scaled = {n: jax.tree.map(lambda u, n=n: u * multipliers.get(n, 1.0), tree) for n, tree in updates.items()}
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(optimizer: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """AdamW on the schedule, clipped if asked for, with the learning rate of each module multiplied as asked for."""
    adamw = optax.adamw(
        learning_rate(optimizer, total_steps),
        optimizer.b1,
        optimizer.b2,
        optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return optax.chain(clip, adamw, scale_by_module(dict(optimizer.lr_multipliers)))
