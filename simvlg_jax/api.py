"""A trained model in one line: `load("runs/openmoji").caption("picture.png")`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from simvlg_jax.config.load import fill, load_config, override
from simvlg_jax.config.saved import EXAMPLE, read_config
from simvlg_jax.data import transforms
from simvlg_jax.decoding.generate import decoding_options
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.tasks.task import Task
from simvlg_jax.training import restore
from simvlg_jax.utils.errors import UserError

Picture = str | Path | Image.Image | np.ndarray


class CaptionModel:
    """Names pictures.

    Attributes:
      task: the module and its text encoder.
      params: all parameters, on the devices.
    """

    def __init__(self, config: ConfigDict, task: Task, params: dict):
        self.task, self.params = task, params
        self._captioner = Captioner(task.model, task.batch.texts["caption"].encoder, **decoding_options(config))

    def caption(self, picture: Picture, prompt: str | None = None) -> str:
        """One picture's caption. See `captions`."""
        return self.captions([picture], prompt, 1)[0]

    def captions(self, pictures: Sequence[Picture], prompt: str | None = None, batch_size: int = 16) -> list[str]:
        """Greedy captions.

        Args:
          pictures: file names, PIL images, or uint8 arrays (H, W, 3); any size, squashed to the model's square.
          prompt: words for the caption to go on from.
          batch_size: pictures at a time; the last batch is filled up, so one program serves all.

        Raises:
          UserError: a picture that cannot be read, with its name.
        """
        side, captions = self.task.batch.pictures.side, []
        for start in range(0, len(pictures), batch_size):
            images = np.stack([read_picture(p, side) for p in pictures[start : start + batch_size]])
            filled = np.concatenate([images, np.zeros((batch_size - len(images), side, side, 3), np.uint8)])
            output = self._captioner(self.params, filled, prompt)
            captions += self._captioner.decode(np.asarray(output.ids))[: len(images)]
        return captions


def read_picture(picture: Picture, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    if isinstance(picture, str | Path):
        try:
            picture = transforms.decode(transforms.read(Path(picture)))
        except transforms.UNREADABLE as error:
            raise UserError(f"cannot read the picture {picture}: {error}") from error
    elif isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    return np.asarray(transforms.squash(picture.convert("RGB"), side))


def load(
    name: str | Path,
    config: ConfigDict | str | None = None,
    checkpoint: str = "best",
    overrides: Sequence[str] = (),
) -> CaptionModel:
    """A model from a run's workdir, an exported folder, "example", or a published checkpoint.

    Args:
      name: folder, "example", or, with a config, an EVLGen checkpoint: a file, or a name on the Hugging Face Hub.
      config: for a published checkpoint: what it was trained with ("configs/X.py", or a config itself); names the
        vision encoder's and the language model's weights, and the mesh.
      checkpoint: of a workdir: "best" by validation score, "latest", or a step such as "2000".
      overrides: changes to the config, such as "--config.evaluate.max_new_tokens=40".

    Raises:
      UserError: no model there, or weights it needs are absent.
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
