"""The whole system in seconds on a CPU, offline: random weights, drawn shapes, characters as tokens.

    python -m simvlg_jax.train --config configs/tiny.py --workdir runs/tiny
    python -m simvlg_jax.evaluate --workdir runs/tiny

`:overfit` learns one batch by heart, the first thing to try after changing a model: its loss must go to near zero.
`:vit` runs the contrastive task. There is no score to expect: the weights are random and stay small.
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
        config.vit.train = config.llm.train = True  # a frozen random model has nothing to say
        config.connector.dropout = 0.0
        config.train.overfit_one_batch = True
        config.train.steps = 300
        config.evals.val.every = config.train.save_every = 300
    elif mode == "vit":
        config.task = "contrastive"
    elif mode:
        raise ValueError(f"configs/tiny.py knows 'overfit' and 'vit', not {mode!r}")
    return config.lock()
