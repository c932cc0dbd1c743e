"""The example: captions OpenMoji pictures with a frozen SmolLM2-135M, on two CPU cores. All data come from PyPI.

There are two runs, since PyPI has no pre-trained vision encoder. The first trains a small ViT to match pictures and
names (contrastive, with frozen MiniLM sentence embeddings). The second freezes it and runs SimVLG's one stage.

    python -m simvlg_jax.data.prepare
    python -m simvlg_jax.train --config configs/openmoji.py:vit --workdir runs/openmoji/vit
    python -m simvlg_jax.train --config configs/openmoji.py --workdir runs/openmoji
    python -m simvlg_jax.evaluate --workdir runs/openmoji

`launch/local.sh` runs these commands with a time limit.

`:questions` trains the captioning example on questions about the same pictures (docs/questions.md):

    python -m simvlg_jax.data.openmoji.questions
    python -m simvlg_jax.train --config configs/openmoji.py:questions --workdir runs/questions
    python -m simvlg_jax.evaluate --workdir runs/questions

`:clips` trains it on videos of moving pictures, whose captions need the order of the frames (docs/video.md):

    python -m simvlg_jax.data.openmoji.clips
    python -m simvlg_jax.train --config configs/openmoji.py:clips --workdir runs/clips
    python -m simvlg_jax.evaluate --workdir runs/clips

`:scst` goes on with the captioning example by self-critical sequence training (docs/scst.md):

    python -m simvlg_jax.train --config configs/openmoji.py:scst --workdir runs/scst
    python -m simvlg_jax.evaluate --workdir runs/scst
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
    # The loss falls much faster with the start token first: 4.48 after 90 steps, and 5.27 with the soft prompt first.
    config.llm.start_first = True
    config.llm.max_text_tokens = 20  # the longest name has 19
    config.data.name = "openmoji"
    config.data.crop_scale = (0.7, 1.0)
    config.data.flip = False  # names mention left and right
    config.data.pack = -1
    config.data.pack_window = 32
    config.train.batch_size = 16
    config.train.steps = 2500
    config.evals.val.every = 500
    config.train.save_every = 100
    config.optimizer.lr = 3e-4
    config.optimizer.min_lr = 1e-5
    config.optimizer.warmup_steps = 20
    # With one learning rate the prefix became constant: after 400 steps only 0.3 % of its power differed between
    # pictures. A fast projection learns the constant part first, and a slow connector keeps its visual information.
    config.optimizer.lr_multipliers.connector = 0.1
    config.optimizer.lr_multipliers.llm_proj = 10.0
    config.optimizer.clip_norm = 1.0  # gradients of such small batches have outliers
    config.evaluate.max_new_tokens = 20
    config.evaluate.min_new_tokens = 1  # of pictures unlike any emoji (noise, a thin line) the captions were empty
    if mode == "vit":
        config.task = "contrastive"
        config.vit.weights = ""
        config.data.pack = 0
        config.data.pack_window = 1
        config.train.batch_size = 128
        config.train.steps = 900
        config.evals.val.every = 150
        config.train.save_every = 150
        config.optimizer.lr = 1e-3
        config.optimizer.clip_norm = 0.0
        config.optimizer.warmup_steps = 50
    elif mode == "questions":
        config.vit.weights = config.connector.weights = ""
        config.train.init_from = "example"  # or an exported run of yours: exported/weights.safetensors
        config.data.name = "prepared"
        config.data.path = "data/openmoji_questions"
        config.data.pack = 0
        config.data.pack_window = 1
        config.data.pad_multiple = 0  # all questions are about equally long, so one program is compiled instead of two
        config.llm.max_text_tokens = 18  # the longest question and answer have 17
        config.train.batch_size = 8
        config.train.steps = 500
        config.optimizer.lr = 2e-4  # of the projection 2e-3, of the connector 2e-5
        answers = dict(type="questions", metric="exact", decoding=ConfigDict(dict(num_beams=1, max_new_tokens=6)))
        config.evals.val.update(**answers, every=250, max_examples=96)
        for split in ("test", "novel"):
            config.evals[split] = defaults.get_eval()
            config.evals[split].update(**answers, split=split, every=0)
    elif mode == "clips":
        config.vit.weights = config.connector.weights = ""
        config.train.init_from = "example"
        config.data.frames = 4
        config.video.max_frames = 4  # what comes first and last
        config.connector.position_norm = 9.0  # where things are, for left and right (docs/video.md)
        config.data.name = "prepared"
        config.data.path = "data/openmoji_clips"
        config.data.crop_scale = (0.9, 1.0)  # a smaller crop would cut off things at the edges
        config.data.pad_multiple = 0  # one length, so one program is compiled
        config.llm.max_text_tokens = 24  # the longest caption has 20
        config.train.batch_size = 8
        config.train.steps = 1500
        config.optimizer.lr = 1e-3
        config.optimizer.lr_multipliers.vit = 10.0  # the weights of the frames
        config.evals.val.update(type="order", every=250)
        for name, split, kind in (
            ("test", "test", "order"),
            ("unseen", "unseen", "order"),
            ("test_captions", "test", "captioning"),
            ("unseen_captions", "unseen", "captioning"),
        ):
            config.evals[name] = defaults.get_eval()
            config.evals[name].update(type=kind, split=split, every=0)
    elif mode == "scst":
        config.task = "scst"
        config.vit.weights = config.connector.weights = ""
        config.train.init_from = "example"
        config.data.pack = 0
        config.data.pack_window = 1
        config.data.pad_multiple = 0  # one program is compiled for all lengths
        config.llm.max_text_tokens = 21  # the start and the longest caption that is written
        config.train.batch_size = 8
        config.train.steps = 250
        config.train.log_every = 5
        config.evals.val.every = 50
        config.train.save_every = 50
        config.optimizer.lr = 1e-5  # of the projection 1e-4, of the connector 1e-6
        config.optimizer.min_lr = 1e-6
    elif mode:
        raise ValueError(f"configs/openmoji.py takes 'vit', 'questions', 'clips' and 'scst', not {mode!r}")
    return config.lock()
