"""Ways to see a clip, under one trainer: how frames become tokens, and what tells their order (docs/video.md).

    python -m simvlg_jax.data.openmoji.clips
    python -m simvlg_jax.compare --config configs/compare_clips.py --workdir runs/compare_clips

All ways start from the captioning example, and see the same clips and captions in the same order. The language model
gets 8 tokens of each clip. `published` is the paper's temporal merging, which knows no order of frames, with positions
as they are read. All others have `connector.position_norm`. Each way is scored by the order accuracy and by its
captions, on clips of known and of unseen combinations.

Other numbers of steps: `--config.settings="('train.steps=1500',)"`. Some ways or more seeds:
`--config.only="('weights', 'published')"`, `--config.seeds="(0, 1, 2)"`.
"""

from ml_collections import ConfigDict

from simvlg_jax.study.plan import get_arm
from simvlg_jax.study.plan import get_config as defaults

NO_ORDER = "video.max_frames=0"
TEMPORAL = ("vit.temporal=True", NO_ORDER, "optimizer.lr_multipliers.vit=1.0")
EIGHT = ("connector.merges=()", "connector.tokens=8")  # of the language model, whatever the connector gets


def get_config() -> ConfigDict:
    config = defaults()
    config.base = "configs/openmoji.py:clips"
    config.settings = ("train.steps=500",)
    config.splits = ()
    config.seeds = (0,)
    config.arms.weights = get_arm(())
    config.arms.mean = get_arm((NO_ORDER,))
    config.arms.published = get_arm((*TEMPORAL, "connector.position_norm=0.0"))
    config.arms.temporal_positions = get_arm((*TEMPORAL, "vit.max_frames=4"))
    config.arms.joined = get_arm(("video.frames_as=joined", *EIGHT))
    config.arms.pooled = get_arm(("video.frames_as=pooled", *EIGHT))
    config.arms.merged = get_arm(("video.frames_as=merged",))
    sixteen = ("data.frames=16", "video.max_frames=16")
    config.arms.weights_of_16 = get_arm(sixteen)
    config.arms.merged_of_16 = get_arm((*sixteen, "video.frames_as=merged"))
    return config.lock()
