"""BLIP-2 (arXiv 2301.12597), the two-stage baseline of the published comparison, on the same data as pretrain_image.

    python -m simvlg_jax.train --config configs/blip2.py:stage=1 --workdir runs/blip2_stage1 \
      --config.vit.weights=eva_vit_g.pth
    python -m simvlg_jax.train --config configs/blip2.py:stage=2,llm=opt2.7b --workdir runs/blip2_opt2.7b \
      --config.vit.weights=eva_vit_g.pth --config.connector.weights=runs/blip2_stage1/qformer.safetensors

The first stage trains a Q-Former by three losses, without a language model. The second one trains it with a frozen
language model, as pretrain_image trains the TomeFormer. `data=own` takes a folder of yours, and `vit` is as there.

Published checkpoints also start it: `--config.connector.weights=FILE` takes LAVIS's first stage (with
`--config.connector.tokenizer=google-bert/bert-base-uncased` also for more of that stage), and
`--config.connector.weights= --config.train.init_from=FOLDER` a whole model of the second stage, LAVIS's or Hugging
Face's. `simvlg_jax.to_torch --format hf` writes a run for transformers' `Blip2ForConditionalGeneration`.

As published: batch 1680 and 1920, 250,000 and 80,000 steps, AdamW (0.9, 0.98), weight decay 0.05, a cosine from 1e-4
(of the second stage to 5e-5) after 2000 steps of warm-up, 32 queries, BERT-base, captions cleaned by its processor and
cut at 32 tokens, OPT's start token as a target. The older draw of negatives is presumed.

Not as published: the data (theirs are 129M pictures, of them 115M of LAION with two generated captions and the one of
the web drawn at random); bfloat16 instead of float16; OPT's own dropout off; the temperature is not decayed; the least
learning rate of the first stage is LAVIS's 1e-5. The published loss of tokens averages the processes' means. The mesh
and the micro-batches are for 16 chips of TPU v5e, of whose 16.9 GB the first stage needs 11.7 by the TPU's compiler
(`--effort O0`). More micro-batches would mean fewer negatives there.
"""

from ml_collections import ConfigDict

from simvlg_jax.config import defaults
from simvlg_jax.recipes import pretrain_image

ACCUMULATE = {"opt2.7b": 6, "opt6.7b": 12}  # of the second stage: 20 pictures a chip, as in pretrain_image


def get_config(argument: str = "") -> ConfigDict:
    choices = dict(stage=("1", "2"), llm=ACCUMULATE, vit=pretrain_image.VITS, data=("published", "own"))
    stage, llm, vit, data = defaults.choose(argument, **choices)
    config = pretrain_image.get_config(f"llm={llm},vit={vit},data={data}")
    config.unlock()
    config.connector.type = "qformer"
    config.connector.queries = 32
    config.connector.r = 0
    config.optimizer.b2 = 0.98
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2000
    if stage == "1":
        config.task = "blip2_stage1"
        config.connector.remat = True
        config.data.pack = 0
        config.data.pad_multiple = 0
        config.train.batch_size = 1680
        config.train.accumulate = 1
        config.train.steps = 250_000
        config.train.negatives = "floored_softmax"
    else:
        config.connector.weights = "shared/qformer.safetensors"
        config.train.batch_size = 1920
        config.train.accumulate = ACCUMULATE[llm]
        config.train.steps = 80_000
        config.optimizer.min_lr = 5e-5
    return config.lock()
