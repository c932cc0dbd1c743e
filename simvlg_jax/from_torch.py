"""Converts the published weights that a config names to our own files, and checks that they fit.

    python -m simvlg_jax.convert.from_torch --config configs/openmoji.py --output weights \\
      --config.vit.size=eva_g --config.vit.weights=eva_vit_g.pth --config.llm.size=opt_2.7b \\
      --config.llm.weights=facebook/opt-2.7b --config.connector.size=base \\
      --config.connector.weights=google-bert/bert-base-uncased

Writes vit.safetensors, connector.safetensors and llm.safetensors to OUTPUT, and trained.safetensors from a published
SimVLG/EVLGen checkpoint (--config.train.init_from=...). Prints the config overrides that use these files.
Training can also read the published files directly. The converted ones need neither PyTorch nor a network.
"""

import sys
from pathlib import Path

from simvlg_jax.config.arguments import config_parser
from simvlg_jax.config.load import load_config
from simvlg_jax.utils.errors import UserError, run_verb


def main() -> None:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.convert.from_torch")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the files")
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)

    import flax.linen as nn
    import jax
    import ml_dtypes
    import numpy as np

    from simvlg_jax.convert import own_files, stacking
    from simvlg_jax.tasks import build_task

    with config.unlocked():
        config.connector.position_norm = 0.0  # the training that reads the files applies it
    task = build_task(config)
    loaded = task.load_pretrained(nn.unbox(jax.eval_shape(task.init, jax.random.key(config.seed))))
    if not loaded:
        raise UserError("this config names no weights: set vit.weights, connector.weights, llm.weights", 2)
    dtype = np.float32 if arguments.dtype == "float32" else ml_dtypes.bfloat16
    # The trained part of a published checkpoint goes into one file, as in the checkpoint. So does what a connector's
    # weights hold besides the connector: BLIP-2's have the norm before it, and in the first stage words and heads.
    frozen = ("vit", "llm", "sentence_encoder", "pformer")
    trained = {name: params for name, params in loaded.items() if name not in frozen}
    if set(trained) == {"connector"} and not config.train.init_from:
        trained = trained["connector"]
    files = {name: loaded[name] for name in ("vit", "llm") if name in loaded}
    if trained:
        files["trained" if config.train.init_from else "connector"] = trained
    for name, params in files.items():
        path = arguments.output / f"{name}.safetensors"
        own_files.write_tree(path, stacking.stack_layers(params) if "blocks_0" in params else params, dtype)
        count = sum(x.size for x in jax.tree.leaves(params))
        print(f"{name}: {count:,} parameters, {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
        print(f"--config.{'train.init_from' if name == 'trained' else name + '.weights'}={path}")
        if name == "llm":
            print(f"--config.llm.tokenizer={config.llm.tokenizer or config.llm.weights}")
        if "word" in params:
            print(f"--config.connector.tokenizer={config.connector.tokenizer or config.connector.weights}")


if __name__ == "__main__":
    run_verb(main)
