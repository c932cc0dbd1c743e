"""One-stage pre-training on pictures and captions: the published recipes, and variants of them.

    python -m simvlg_jax.train_compile --config configs/pretrain_image.py:llm=opt2.7b --topology v5e:4x4
    python -m simvlg_jax.train --config configs/pretrain_image.py:llm=opt2.7b --workdir runs/opt2.7b \
      --config.vit.weights=eva_vit_g.pth

LAVIS publishes ViT-g: https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth

The data are the published mixture. For OPT, of twenty pairs fifteen are of laion115M, four of ccs14M and one of coco;
for Vicuna, of fifty 45 are of ccs14M and five of coco. `python -m simvlg_jax.data.prepare` writes each to its folder
below data/. A folder elsewhere is named by `--config.data.mixture.coco.path=FOLDER`. Validation is on coco's split val.
With `data=own` the data are one folder of yours instead: `:llm=opt2.7b,data=own --config.data.path=FOLDER`.

The argument also chooses `llm` (opt2.7b, opt6.7b, vicuna7b, vicuna13b) and `vit` (eva_g, clip_l):
llm=vicuna7b,vit=clip_l. `frozen=int8` stores the frozen weights as int8, and `frozen=int8_compute` also multiplies them
in int8 (docs/performance.md).

Scores reported by the paper (arXiv 2310.03291, as quoted in public; we ran none of these):

| argument | reported, zero-shot |
|---|---|
| llm=opt2.7b | 104M pairs: VQAv2 48.4, GQA 30.9, OK-VQA 27.2, COCO CIDEr 139.1; 133 h on 8 A100-80G |
| llm=opt2.7b, train.steps=150000 | 104M pairs: VQAv2 46.9, GQA 30.8, OK-VQA 24.8, COCO 137.0; 80 h on 8 A100-80G |
| llm=vicuna7b | NoCaps CIDEr 119.0 |
| llm=opt6.7b, llm=vicuna13b, any llm with vit=clip_l | no published result |

As published: batch 1600 (OPT) and 160 (Vicuna), steps, warm-up, the staircase of the learning rate, weight decay, r,
seed, the weights of the mixture, OPT's start token as a target, captions cleaned by BLIP-2's processor
("blip_caption"), validation by 5 beams and 8 to 30 tokens. Not as published: bfloat16 instead of float16, OPT's own
dropout off (`llm.dropout=0.1` turns it on). The mesh and the micro-batches are sized for 16 chips of TPU v5e with 16 GB
each. They do not change the result.
"""

from ml_collections import ConfigDict

from simvlg_jax.config import defaults

VITS = {
    "eva_g": "shared/eva_vit_g.pth",
    "clip_l": "openai/clip-vit-large-patch14",
}
# Micro-batches, and the number of chips that heads, MLPs and vocabulary of the frozen weights are sharded over. This
# moves activations between chips. Gathering the weights instead (fsdp) moves ten times as much at these batch sizes.
LLMS = {
    "opt2.7b": dict(size="opt_2.7b", weights="facebook/opt-2.7b", accumulate=5, tensor=1),
    "opt6.7b": dict(size="opt_6.7b", weights="facebook/opt-6.7b", accumulate=10, tensor=2),
    "vicuna7b": dict(size="vicuna_7b", weights="lmsys/vicuna-7b-v1.3", accumulate=2, tensor=2),
    "vicuna13b": dict(size="vicuna_13b", weights="lmsys/vicuna-13b-v1.3", accumulate=4, tensor=4),
}
# The same for frozen weights in int8.
INT8 = {
    "opt2.7b": dict(accumulate=2, tensor=1),
    "opt6.7b": dict(accumulate=5, tensor=1),
    "vicuna7b": dict(accumulate=1, tensor=1),
    "vicuna13b": dict(accumulate=1, tensor=2),
}
FROZEN = {"bfloat16": ("bfloat16", ""), "int8": ("int8", ""), "int8_compute": ("int8", "int8")}
MIXTURES = {  # examples of each of the published data sets
    "opt": dict(laion115M=15, ccs14M=4, coco=1),
    "vicuna": dict(ccs14M=45, coco=5),
}


def get_config(argument: str = "") -> ConfigDict:
    choices = dict(llm=LLMS, vit=VITS, data=("published", "own"), frozen=FROZEN)
    llm, vit, data, frozen = defaults.choose(argument, **choices)
    sizes = LLMS[llm] if frozen == "bfloat16" else INT8[llm]
    published_vicuna = llm.startswith("vicuna")
    config = defaults.get_config()
    config.dtype = "bfloat16"
    config.frozen_dtype, config.frozen_compute = FROZEN[frozen]
    config.vit.size = vit
    config.vit.weights = VITS[vit]
    config.connector.size = "base"
    config.connector.weights = "google-bert/bert-base-uncased"
    config.connector.merges = ()
    config.connector.r = 19  # 257 -> 29 tokens
    config.llm.size = LLMS[llm]["size"]
    config.llm.weights = LLMS[llm]["weights"]
    config.llm.start_is_target = not published_vicuna
    config.llm.max_text_tokens = 32
    if data == "published":
        weights = MIXTURES["vicuna" if published_vicuna else "opt"]
        config.data.mixture = ConfigDict(
            {name: dict(weight=weight, name="prepared", path=f"data/{name}") for name, weight in weights.items()}
        )
        config.evals.val.data = ConfigDict(dict(name="prepared", path="data/coco"))
    else:
        config.data.name = "folder"
    config.data.clean = "blip_caption"
    config.data.pack = -1
    config.data.pack_window = 8 if published_vicuna else 1  # a chip of 16 has 10 examples, or 100
    config.data.workers = 8
    config.data.read_threads = 16
    config.train.batch_size = 160 if published_vicuna else 1600
    config.train.accumulate = sizes["accumulate"]
    config.train.steps = 60_000 if published_vicuna else 250_000
    config.train.log_every = 50
    config.evals.val.every = 5000
    config.train.save_every = 1000
    config.optimizer.warmup_steps = 2000 if published_vicuna else 5000
    config.optimizer.schedule = "staircase"
    config.optimizer.inner_epoch_steps = 5000
    config.mesh.tensor = sizes["tensor"]
    config.mesh.split_trained = False  # 90 million parameters: replicated they take 1 GB and need no gathering
    config.evaluate.num_beams = 5
    config.evaluate.min_new_tokens = 8
    config.evals.val.max_examples = 1024
    return config.lock()
