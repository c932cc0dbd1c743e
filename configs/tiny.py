"""Runs the whole system in seconds on a CPU, offline: random weights, drawn shapes, characters as tokens.

    python -m simvlg_jax.train --config configs/tiny.py --workdir runs/tiny
    python -m simvlg_jax.evaluate --workdir runs/tiny

`:overfit` trains on one batch only. Try it first after changing a model: the loss must approach zero.
`:vit` runs the contrastive task. No score is expected, since the models are small and start from random weights.
"""

from ml_collections import ConfigDict

from simvlg_jax.config import defaults


def get_config(mode: str = "") -> ConfigDict:
    config = defaults.get_config()
    config.vit.size = "tiny_32px"
    config.connector.size = "tiny"
    config.connector.merges = (5, 5)
    config.llm.size = "tiny"
    config.llm.max_text_tokens = 24
    config.sentence_encoder.weights = ""
    config.data.name = "synthetic"
    config.data.flip = False
    config.train.batch_size = 8
    config.train.steps = 20
    config.train.log_every = 5
    config.evals.val.every = 10
    config.train.save_every = 10
    config.optimizer.lr = 3e-3
    config.optimizer.min_lr = 3e-4
    config.optimizer.warmup_steps = 5
    config.evaluate.batch_size = 8
    config.evaluate.max_new_tokens = 16
    if mode == "overfit":
        config.vit.train = config.llm.train = True  # frozen random weights could not fit the batch
        config.connector.dropout = 0.0
        config.train.overfit_one_batch = True
        config.train.steps = 300
        config.evals.val.every = config.train.save_every = 300
    elif mode == "vit":
        config.task = "contrastive"
    elif mode:
        raise ValueError(f"configs/tiny.py takes 'overfit' and 'vit', not {mode!r}")
    return config.lock()
