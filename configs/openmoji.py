"""The example: name OpenMoji pictures with a frozen SmolLM2-135M, everything from PyPI, on two CPU cores.

Two runs, because no pre-trained vision encoder is on PyPI: a small ViT first learns which name goes with which
picture (locked-text contrastive, MiniLM sentence embeddings), then it is frozen and SimVLG's one stage begins.

    python -m simvlg_jax.data.prepare
    python -m simvlg_jax.train --config configs/openmoji.py:vit --workdir runs/openmoji/vit
    python -m simvlg_jax.train --config configs/openmoji.py --workdir runs/openmoji
    python -m simvlg_jax.evaluate --workdir runs/openmoji

`launch/local.sh` does just this within a time limit.
"""

from ml_collections import ConfigDict

from simvlg_jax.config import defaults


def get_config(mode: str = "") -> ConfigDict:
    config = defaults.get_config()
    config.vit.size = "small_64px"
    config.vit.weights = "runs/openmoji/vit/vit.safetensors"
    config.vit.scan = False
    config.connector.weights = "minilm"
    config.connector.merges = (10, 10, 10, 10, 10, 10)  # 65 -> 55 -> 45 -> 35 -> 25 -> 15 -> 8
    config.llm.weights = "smollm2"
    # Behind a soft prompt SmolLM2 learns far slower: after 90 steps the loss was 5.27, and 4.48 with the start first.
    config.llm.start_first = True
    config.llm.max_text_tokens = 20  # the longest name takes 19
    config.data.name = "openmoji"
    config.data.crop_scale = (0.7, 1.0)
    config.data.flip = False  # names speak of left and right
    config.data.length_window = 8
    config.train.batch_size = 16
    config.train.steps = 2500
    config.evals.val.every = 500
    config.train.save_every = 100
    config.optimizer.lr = 3e-4
    config.optimizer.min_lr = 1e-5
    config.optimizer.warmup_steps = 20
    # With one learning rate the quickest way down is a constant prefix: after 400 steps 0.3 % of its power differed
    # between pictures. A fast projection finds that constant before the connector forgets what it saw.
    config.optimizer.lr_multipliers.connector = 0.1
    config.optimizer.lr_multipliers.llm_proj = 10.0
    config.optimizer.clip_norm = 1.0  # batches this small have outliers
    config.evaluate.max_new_tokens = 20
    if mode == "vit":
        config.task = "contrastive"
        config.vit.weights = ""
        config.data.length_window = 1  # the contrast wants a fair choice of sentences in each batch
        config.train.batch_size = 128
        config.train.steps = 900
        config.evals.val.every = 150
        config.train.save_every = 150
        config.optimizer.lr = 1e-3
        config.optimizer.clip_norm = 0.0
        config.optimizer.warmup_steps = 50
    elif mode:
        raise ValueError(f"configs/openmoji.py knows 'vit', not {mode!r}")
    return config.lock()
