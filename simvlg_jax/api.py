"""Loads a trained model and captions pictures: `load("runs/openmoji").caption("picture.png")`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from simvlg_jax.config.load import fill, load_config, override
from simvlg_jax.config.saved import EXAMPLE, read_config
from simvlg_jax.data import transforms
from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.tasks.task import Task
from simvlg_jax.training import restore
from simvlg_jax.utils.errors import UserError

Picture = str | Path | Image.Image | np.ndarray


class CaptionModel:
    """A model that captions pictures.

    Attributes:
      task: the model and its text encoder.
      params: all parameters, on the devices.
    """

    def __init__(self, config: ConfigDict, task: Task, params: dict):
        self.task, self.params = task, params
        self._captioner = Captioner(task.model, task.batch.texts["caption"].encoder, decoding_of(config))

    def caption(self, picture: Picture, prompt: str | None = None) -> str:
        """Returns the caption of one picture. See `captions`."""
        return self.captions([picture], prompt, 1)[0]

    def captions(self, pictures: Sequence[Picture], prompt: str | None = None, batch_size: int = 16) -> list[str]:
        """Returns the caption of each picture, the first one of `several`."""
        return [captions[0] for captions in self.several(pictures, prompt, batch_size)]

    def several(self, pictures: Sequence[Picture], prompt: str | None = None, batch_size: int = 16) -> list[list[str]]:
        """Returns `evaluate.num_captions` captions of each picture, decoded by the settings of `config.evaluate`.

        Args:
          pictures: file names, PIL images or uint8 arrays (H, W, 3) of any size, squashed to the model's square.
          prompt: words that the captions continue.
          batch_size: pictures per batch. The last batch is padded, so that the model compiles once.

        Raises:
          UserError: a picture cannot be read. The message names it.
        """
        side, captions = self.task.batch.pictures.side, []
        for start in range(0, len(pictures), batch_size):
            images = np.stack([read_picture(p, side) for p in pictures[start : start + batch_size]])
            filled = np.concatenate([images, np.zeros((batch_size - len(images), side, side, 3), np.uint8)])
            output = self._captioner(self.params, filled, prompt, start)
            captions += self._captioner.decode(np.asarray(output.ids))[: len(images)]
        return captions


def read_picture(picture: Picture, side: int) -> np.ndarray:
    """Returns the picture as (side, side, 3) uint8."""
    if isinstance(picture, str | Path):
        try:
            picture = transforms.decode(transforms.read(Path(picture)))
        except transforms.UNREADABLE as error:
            raise UserError(f"cannot read the picture {picture}: {error}") from error
    elif isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    # The pixels of `transforms.squash`, without the time that loading its compiled loops takes.
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


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
      checkpoint: only for a workdir: "best" by validation score, "latest", or a step such as "2000".
      overrides: changes to the config, such as "--config.evaluate.max_new_tokens=40".

    Raises:
      UserError: the folder holds no model, or weights that it needs are missing.
    """
    if config is not None:
        config = override(load_config(config) if isinstance(config, str) else fill(config), overrides)
        with config.unlocked():
            config.train.init_from, config.connector.weights = str(name), ""
        run = restore.assemble(config)
    else:
        folder = EXAMPLE if name == "example" else Path(name)
        config = override(read_config(folder), overrides)
        run = restore.restore_run(config, folder, checkpoint, captions=True)
    return CaptionModel(config, run.task, run.params)
