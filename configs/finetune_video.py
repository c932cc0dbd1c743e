"""From pictures to clips: an image model learns temporal merging, and how to caption clips or answer about them.

    python -m simvlg_jax.data.prepare --source cap_train.json --images msrvtt/videos --output data/msrvtt
    python -m simvlg_jax.train --config configs/finetune_video.py:data=msrvtt --workdir runs/msrvtt \
      --config.vit.weights=eva_vit_g.pth --config.train.init_from=IMAGE_MODEL

IMAGE_MODEL is an EVLGen checkpoint, or the weights.safetensors of an exported run of pretrain_image. The splits val and
test are prepared like train, with `--split`; `--config.data.path=FOLDER` names another folder than data/NAME.

`data`: msrvtt and msvd (captions), msrvtt_qa and msvd_qa (questions), webvid (captions, to pre-train on clips first:
the exported result is then the IMAGE_MODEL of the others). `llm` and `vit` are as in pretrain_image.

`loss`: caption, or scst, which goes on with a captioner of clips by self-critical sequence training (docs/scst.md):

    python -m simvlg_jax.export --workdir runs/msrvtt --output exported
    python -m simvlg_jax.train --config configs/finetune_video.py:data=msrvtt,loss=scst --workdir runs/msrvtt_scst \
      --config.vit.weights=eva_vit_g.pth --config.train.init_from=exported/weights.safetensors

Its settings are our own and untested at this size; the paper gives only the score.

`frames` says how a clip becomes the tokens of the connector. All but the first are baselines without a trained ViT:

| frames | |
|---|---|
| temporal | published: temporal attentive soft merging in every block of the ViT, then the mean of 4 frames |
| mean | the mean of 4 frames, each seen as a picture |
| joined | all tokens of 4 frames; the connector merges them to as many as those of a picture |
| pooled | the mean over time of each place and the mean over space of each of 4 frames |
| merged | 16 frames, merged across time to as many tokens as one has; learned positions tell their order |

Scores reported by the paper (arXiv 2310.03291, as quoted in public; we ran none of these), CIDEr on the test split:

| data | reported |
|---|---|
| msrvtt, from the image model | 69.8 |
| msrvtt, after webvid (2M clips), and then trained by reinforcement learning of CIDEr (SCST) | 74.0 |
| msvd, after webvid (2M clips), and then SCST | 158.2 |
| msrvtt_qa, msvd_qa, any other `frames` | no published result |

As published for msrvtt: batch 32, 50,000 steps, AdamW with learning rate 1e-5 to 1e-6 in a staircase after 1000 steps
of warm-up from 1e-8, weight decay 0.05, 4 frames (a random pair of each half in training, evenly spread ones in
evaluation), captions cleaned by BLIP-2's processor, OPT's start token as a target, 5 beams and 5 to 20 tokens. The
settings of the others are not published; they are the same here. Not as published: bfloat16 (theirs is a float16
language model and a float32 ViT), OPT's own dropout off. The blocks of the ViT are recomputed in the backward pass,
since gradients of the temporal merging go through all of them.
"""

from ml_collections import ConfigDict

from simvlg_jax.config import defaults
from simvlg_jax.recipes import pretrain_image

DATA = ("msrvtt", "msvd", "msrvtt_qa", "msvd_qa", "webvid")
FRAMES = ("temporal", "mean", "joined", "pooled", "merged")
LOSSES = ("caption", "scst")


def get_config(argument: str = "") -> ConfigDict:
    choices = dict(data=DATA, llm=pretrain_image.LLMS, vit=pretrain_image.VITS, frames=FRAMES, loss=LOSSES)
    data, llm, vit, frames, loss = defaults.choose(argument, **choices)
    config = pretrain_image.get_config(f"llm={llm},vit={vit},data=own")
    config.unlock()
    config.connector.weights = ""
    config.train.init_from = "shared/image_model.safetensors"
    config.data.name = "prepared"
    config.data.path = f"data/{data}"
    config.data.frames = 16 if frames == "merged" else 4
    config.data.pack_window = 4  # 128 captions
    if frames == "temporal":
        config.vit.temporal = True
        config.vit.remat = True
    else:
        config.video.frames_as = frames
    if frames in ("joined", "pooled"):
        config.connector.r = 0
        config.connector.tokens = 29  # as r = 19 leaves of a picture
    if frames == "merged":
        config.video.max_frames = 16
    config.train.batch_size = 32
    config.train.accumulate = 1
    config.train.steps = 50_000
    config.train.save_every = 1000
    config.optimizer.lr = 1e-5
    config.optimizer.min_lr = 1e-6
    config.optimizer.warmup_lr = 1e-8
    config.optimizer.warmup_steps = 1000
    config.optimizer.schedule = "staircase"
    config.optimizer.inner_epoch_steps = 1000
    config.evaluate.min_new_tokens = 5
    config.evaluate.max_new_tokens = 20
    config.evals.val.update(every=1000, max_examples=512)
    config.evals.test = defaults.get_eval()
    config.evals.test.update(split="test", every=0)
    if data.endswith("_qa"):
        config.data.pack = 0
        config.data.pack_window = 1
        config.llm.max_text_tokens = 40  # question and answer
        for entry in config.evals.values():
            entry.update(type="questions", metric="exact")
    if loss == "scst":
        if data.endswith("_qa"):
            raise ValueError(f"loss=scst is for captions, and {data} has questions")
        config.task = "scst"
        config.train.init_from = "shared/clip_captioner.safetensors"
        config.data.pack = 0
        config.data.pack_window = 1
        config.data.pad_multiple = 0  # one program is compiled
        config.llm.max_text_tokens = 21  # the start and the longest caption that is written
        config.train.accumulate = 4  # 8 clips and their 40 captions at a time
        config.train.steps = 4000  # about an epoch of MSR-VTT's captions
        config.train.save_every = 500
        config.optimizer.warmup_steps = 100
        config.optimizer.schedule = "cosine"
        config.optimizer.clip_norm = 1.0
        config.evals.val.every = 500
    if data == "webvid":
        del config.evals["test"]  # it has no test split
        config.evals.val.every *= 5
    return config.lock()
