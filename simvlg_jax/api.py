"""Loads a trained model and captions pictures: `load("runs/openmoji").caption("picture.png")`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.config.load import fill, load_config, override
from simvlg_jax.config.saved import EXAMPLE, read_config
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.training import restore


def load(
    name: str | Path,
    config: ConfigDict | str | None = None,
    checkpoint: str = "best",
    overrides: Sequence[str] = (),
) -> CaptionModel:
    """Loads a model from a run's workdir, an exported folder, "example" or a published checkpoint.

    Args:
      name: a folder or "example". With a config: an EVLGen checkpoint, as a file or a name on the Hugging Face Hub.
      config: only for a published checkpoint: the config of its training ("configs/X.py" or a ConfigDict). It names the
        weights of the vision encoder and of the language model, and the mesh.
      checkpoint: only for a workdir: "best" by validation score, "latest", a step such as "2000", or several
        such as "1900,2000", whose mean is taken.
      overrides: changes to the config, such as "--config.evaluate.max_new_tokens=40".

    Raises:
      UserError: the folder holds no model, or weights that it needs are missing.
    """
    return read_weights(find(name, config, checkpoint, overrides), overrides)


def find(
    name: str | Path, config: ConfigDict | str | None, checkpoint: str, overrides: Sequence[str] = ()
) -> restore.Run:
    """Returns the model that `load` loads, before its weights are read. Raises UserError as `load`."""
    if config is not None:
        config = override(load_config(config) if isinstance(config, str) else fill(config), overrides)
        with config.unlocked():
            config.train.init_from, config.connector.weights = str(name), ""
            config.connector.position_norm = 0.0
        return restore.assemble(config)
    folder = EXAMPLE if name == "example" else Path(name)
    return restore.restore_run(override(read_config(folder), overrides), folder, checkpoint, captions=True)


def read_weights(
    run: restore.Run,
    overrides: Sequence[str],
    batch_size: int = 0,
    prompt: str | None = None,
    question: str | None = None,
) -> CaptionModel:
    """Returns the model that `load` loads.

    Args:
      batch_size: while the weights are read, a thread compiles what writes about batches of this size, with this prompt
        or question; 0: it is compiled at its first use.

    Raises:
      UserError: as `load`.
    """
    chosen = {given.removeprefix("--config.evaluate.").partition("=")[0] for given in overrides}
    model = CaptionModel(run.config, run.task, {}, chosen)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(model.prepare(run.shapes(), batch_size, prompt, question)) if batch_size else None
        model.params = run.params
        if compiled:
            compiled.result()
    return model
