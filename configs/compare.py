"""One stage against two, and the TomeFormer against other connectors, under one trainer (docs/comparison.md).

    python -m simvlg_jax.compare --config configs/compare.py --workdir runs/compare
    python -m simvlg_jax.compare --config configs/compare.py:tiny --workdir runs/compare_tiny

All methods see the same pictures, captions and frozen parts, in the same order, for as many steps with the language
model. They give it 8 tokens of each picture, except for `mlp` and `unmerged`, which give it all. `two_stages` is
BLIP-2: its first stage trains the Q-Former without the language model before that.

The argument `tokens` trains the TomeFormer with several numbers of tokens and, as `elastic`, one model for all of them;
`tenth` trains three methods with a tenth of the pictures, and `signal` the TomeFormer with other means of the loss and
with averaged weights. `tiny` takes random weights and drawn shapes, to try the program in minutes; its scores mean
nothing.

Other data: `--config.settings="('data.name=prepared', 'data.path=DIR', ...)"` replaces all common settings. Some of the
methods or seeds alone: `--config.only="('tomeformer', 'two_stages')"`, `--config.seeds="(0,)"`.
"""

from ml_collections import ConfigDict

from simvlg_jax.study.plan import get_arm
from simvlg_jax.study.plan import get_config as defaults

RANDOM = ("connector.weights=",)
QFORMER = ("connector.type=qformer", "connector.queries=8")
UNPACKED = ("data.pack=0", "data.pack_window=1", "data.pad_multiple=0")


def get_config(argument: str = "") -> ConfigDict:
    if argument not in ("", "tokens", "tenth", "signal", "tiny"):
        raise ValueError(f"configs/compare.py takes 'tokens', 'tenth', 'signal' and 'tiny', not {argument!r}")
    config, tiny = defaults(), argument == "tiny"
    config.base = "configs/tiny.py" if tiny else "configs/openmoji.py"
    config.settings = ("train.steps=400", "train.save_every=100", "evals.val.every=50", "evals.val.max_examples=128")
    config.settings += ("vit.weights=example",)
    if tiny:
        config.settings = ("train.steps=10", "train.log_every=5", "evals.val.every=5")
    config.splits = ("test",) if tiny else ("test", "novel")
    config.seeds = (0, 1, 2)
    # Connectors differ most in how fast they may change: some start from MiniLM, others from random weights.
    rates = (0.1, 1.0) if tiny else (0.03, 0.1, 0.3, 1.0, 3.0)
    config.search.update(key="optimizer.lr_multipliers.connector", values=rates, steps=5 if tiny else 100)
    if argument == "tokens":
        for tokens in (4, 8, 16, 32):
            config.arms[f"tokens_{tokens}"] = get_arm((f"connector.tokens={tokens}",))
        config.arms.elastic = get_arm(("connector.budgets=(4, 8, 16, 32)",), tokens=(4, 8, 16))
        return config.lock()
    if argument == "signal":
        config.arms.tomeformer = get_arm(("connector.tokens=8",))
        config.arms.unguessed = get_arm(("connector.tokens=8", "train.unguessed=1"))
        config.arms.mean_over_captions = get_arm(("connector.tokens=8", "train.mean_over=captions"))
        config.arms.average = get_arm(("connector.tokens=8", "train.ema=0.98"))
        return config.lock()
    first = ("task=blip2_stage1", *QFORMER, *UNPACKED)
    config.arms.tomeformer = get_arm(("connector.tokens=8",))
    config.baseline = "two_stages"
    config.arms.qformer = get_arm(QFORMER)
    second = (*QFORMER, "connector.weights={previous}/qformer.safetensors")
    config.arms.two_stages = get_arm(first, second)
    if argument == "tenth":
        config.settings += ("data.share=0.1",)
        return config.lock()
    prompts = ("pformer.size=minilm_l6", "pformer.queries=8", "pformer.tokenizer=minilm")
    config.arms.pformer = get_arm(
        ("task=pformer", "pformer.weights=minilm", *prompts, *UNPACKED),
        (*first, *prompts, "train.align=10", "pformer.weights={previous}/pformer.safetensors"),
        (
            *QFORMER,
            *prompts,
            "train.align=100",
            "connector.weights={previous}/qformer.safetensors",
            "pformer.weights={previous}/../stage_1/pformer.safetensors",
        ),
    )
    config.arms.long_first_stage = get_arm(
        (*first, "train.steps=1200"), second
    )  # three times the second's, as published
    config.arms.unmerged = get_arm(("connector.merges=()",))
    config.arms.mlp = get_arm(("connector.type=mlp", *RANDOM))
    config.arms.pool = get_arm(("connector.type=pool", "connector.tokens=8", *RANDOM))
    config.arms.perceiver = get_arm(("connector.type=perceiver", "connector.queries=8", *RANDOM))
    return config.lock()
