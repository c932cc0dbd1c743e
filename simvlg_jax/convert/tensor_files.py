"""Finds and opens files of published weights. Shapes and dtypes are known at once; tensors are read when used."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from simvlg_jax.parallel.lazy import Lazy
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.packages import example_weights

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]  # of the files that are needed of a model on the Hub
STARTS = (b"PK\x03\x04", b"\x80")  # of files of torch.save: a zip file, or a pickle (before PyTorch 1.6)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SUFFIXES = (".safetensors", ".gguf", ".bin", ".pth", ".pt")  # of files; a name on the Hub has none of them
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
DTYPES |= {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


def resolve(name: str) -> Path:
    """Returns the path of a local file or folder, or of a model on the Hugging Face Hub after downloading it.

    "example" is the trained example, a file of a whole model.

    Raises:
      UserError: there is no such file or folder, and the Hub does not give the model.
    """
    path = example_weights() if name == "example" else Path(name)
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(name) or name.endswith(SUFFIXES):
        raise UserError(f"no weights at {name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS))
        if not any(folder.glob("*.safetensors")):  # many models have both, and one is enough
            snapshot_download(name, allow_patterns=["*.bin", "*.bin.index.json"])
        return folder
    except Exception as error:  # the hub's client and the network raise many kinds
        raise UserError(
            f"there is no folder {name}, and the Hugging Face Hub does not give this model: {_reason(error)}"
        ) from error


def open_tensors(path: Path) -> dict[str, Lazy]:
    """Returns the tensors of a .safetensors, .bin, .pth or .pt file, or of a Hugging Face folder, sharded or not.

    A PyTorch file may hold its state dict under "model" or "state_dict". Only tensors are read from it.

    Raises:
      UserError: no file there, a shard is missing, or a file is damaged or holds Python objects.
    """
    if path.is_dir():
        for name in FILES:
            if (path / name).exists():
                return _sharded(path / name) if name.endswith(".json") else open_tensors(path / name)
        raise UserError(f"no weights in {path}: looked for {', '.join(FILES)}")
    if not path.exists():
        raise UserError(f"no weights at {path}")
    return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sharded(index: Path) -> dict[str, Lazy]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not an index of shards: {error}; download it again") from error
    if missing:
        raise UserError(f"{index} names shards that are missing: {', '.join(missing)}; download them again")
    entries: dict[str, Lazy] = {}
    for shard in shards:
        entries |= open_tensors(index.parent / shard)
    return entries


def _safetensors(path: Path) -> dict[str, Lazy]:
    def entry(name: str, header) -> Lazy:
        def read() -> np.ndarray:
            with safe_open(path, "np") as file:
                return file.get_tensor(name)

        if header.get_dtype() not in DTYPES:
            raise UserError(
                f"{path} holds {name} as {header.get_dtype()}, which is not supported: use an unquantised file"
            )
        return Lazy(tuple(header.get_shape()), np.dtype(DTYPES[header.get_dtype()]), read)

    try:
        with safe_open(path, "np") as file:
            return {name: entry(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights from {path}: {error}; download it again") from error


def _torch(path: Path) -> dict[str, Lazy]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} needs PyTorch: pip install torch") from error
    with path.open("rb") as file:
        start = file.read(4)
    if not start.startswith(STARTS):
        raise UserError(f"{path} is not a PyTorch file: is it an unfinished download, a web page or a Git LFS pointer?")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds Python objects besides tensors; it is not read, since they could run code"
        ) from error
    except Exception as error:  # torch raises many kinds on a damaged file
        raise UserError(f"cannot read weights from {path}: {_reason(error)}; download it again") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path} does not hold a state dict of tensors")

    def entry(name: str, tensor: torch.Tensor) -> Lazy:
        is_bfloat16 = tensor.dtype == torch.bfloat16
        try:
            dtype = ml_dtypes.bfloat16 if is_bfloat16 else torch.empty(0, dtype=tensor.dtype).numpy().dtype
        except TypeError as error:
            raise UserError(
                f"{path} holds {name} as {tensor.dtype}, which is not supported: use an unquantised file"
            ) from error

        def read() -> np.ndarray:
            if is_bfloat16:
                return tensor.contiguous().view(torch.int16).numpy().view(dtype)
            return tensor.numpy()

        return Lazy(tuple(tensor.shape), np.dtype(dtype), read)

    # detach, since an nn.Parameter cannot become a numpy array.
    return {name: entry(name, x.detach()) for name, x in state.items() if isinstance(x, torch.Tensor)}
