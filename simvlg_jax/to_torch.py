"""Writes a trained model for PyTorch.

    python -m simvlg_jax.convert.to_torch --workdir runs/openmoji --format evlgen --output simvlg.pth
    python -m simvlg_jax.convert.to_torch --example --format hf --output simvlg_hf

evlgen: a state dict with the names of the published checkpoint (of a Q-Former: LAVIS's of BLIP-2), as {"model": ...}
for the published code (.pth) or as plain safetensors (.safetensors). It holds the trained weights, or all weights with
--all. hf: a folder for `AutoModel.from_pretrained(DIR, trust_remote_code=True)` of transformers; its
`generate(pixel_values)` writes captions. With a Q-Former it is transformers' own `Blip2ForConditionalGeneration`.
Frozen weights that the run has as int8 (config.frozen_dtype) are read anew and written unquantised.
"""

import argparse
import sys
from pathlib import Path

from simvlg_jax.config.arguments import add_checkpoint_argument, add_model_arguments, model_folder
from simvlg_jax.config.saved import read_config
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError, run_verb


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.convert.to_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_checkpoint_argument(parser)
    parser.add_argument("--format", choices=("evlgen", "hf"), required=True)
    parser.add_argument("--all", action="store_true", help="evlgen: the frozen weights too (hf always holds all)")
    parser.add_argument("--output", type=Path, required=True, help="evlgen: a .pth or .safetensors file; hf: a folder")
    arguments = parser.parse_args()
    if arguments.format == "evlgen" and arguments.output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--output {arguments.output}: the evlgen format is a .pth or a .safetensors file", 2)
    workdir = model_folder(arguments)
    config = read_config(workdir)

    import jax

    from simvlg_jax.convert import evlgen, stacking
    from simvlg_jax.huggingface.writers import WRITERS
    from simvlg_jax.tasks import params as partition
    from simvlg_jax.training.restore import restore_run

    run = restore_run(config, workdir, arguments.checkpoint, captions=True, unquantized=True)
    params = stacking.stack_all(jax.device_get(run.params))
    if arguments.format == "hf":
        text = run.task.batch.texts["caption"].encoder
        WRITERS[config.connector.type](arguments.output, run.task.model, params, text, config)
    else:
        chosen = params if arguments.all else partition.split(params, run.task.is_trained)[0]
        write_state_dict(arguments.output, evlgen.to_evlgen(run.task.model, chosen))
    print(f"step {run.step} written to {arguments.output}", file=sys.stderr)


def write_state_dict(path: Path, tensors: dict) -> None:
    """Writes {"model": tensors} by torch.save, or safetensors, atomically."""
    import numpy as np

    from simvlg_jax.convert import own_files

    if path.suffix == ".safetensors":
        own_files.write_arrays(path, tensors)
        return
    try:
        import torch
    except ImportError as error:
        raise UserError("writing .pth needs PyTorch (pip install torch); .safetensors does not") from error
    with files.atomic_write(path) as partial:
        torch.save({"model": {name: to_tensor(np.array(x, order="C")) for name, x in tensors.items()}}, partial)


def to_tensor(x):
    """Returns a torch tensor that shares memory with a host array. Torch reads NumPy's bfloat16 by way of int16."""
    import torch

    return torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)


if __name__ == "__main__":
    run_verb(main)
