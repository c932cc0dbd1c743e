"""Exports a checkpoint of a run to a small folder that `load` and `simvlg_jax.caption --workdir` take.

    python -m simvlg_jax.export --workdir runs/openmoji --output exported

The folder holds config.json and weights.safetensors (bfloat16), without the LLM if the config names its weights. Frozen
weights that the run has as int8 (config.frozen_dtype) are read anew and written unquantised; who loads the model
quantises them.
"""

import argparse
import sys
from pathlib import Path

from simvlg_jax.config.arguments import add_checkpoint_argument
from simvlg_jax.config.saved import read_config, save_config
from simvlg_jax.utils.errors import UserError, run_verb


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a run of simvlg_jax.train")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    add_checkpoint_argument(parser)
    arguments = parser.parse_args()

    import jax
    import ml_dtypes

    from simvlg_jax.convert import own_files, stacking
    from simvlg_jax.training.restore import WEIGHTS, restore_run

    config = read_config(arguments.workdir)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"--output {arguments.output} is a file; name a folder")
    if arguments.output.resolve() == arguments.workdir.resolve():
        raise UserError("--output must be another folder than the run's")
    run = restore_run(config, arguments.workdir, arguments.checkpoint, captions=True, unquantized=True)
    params = jax.device_get(
        {n: p for n, p in run.params.items() if n != "llm" or config.llm.train or not config.llm.weights}
    )
    if not config.vit.scan:
        params["vit"] = stacking.stack_layers(params["vit"])
    path = arguments.output / WEIGHTS
    own_files.write_tree(path, params, ml_dtypes.bfloat16, {"step": str(run.step)})
    save_config(run.config, arguments.output)
    print(f"step {run.step}: {path.stat().st_size / 1e6:.1f} MB in {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_verb(main)
