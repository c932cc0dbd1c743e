"""Reads weights and tokenizers of SmolLM2 and other LLaMA models from GGUF files. Weights do not need PyTorch."""

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from simvlg_jax.convert import llama as hf_llama
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.parallel.lazy import Lazy
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.packages import INSTALL

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class SpecialIds:
    """The special ids of a tokenizer. bos_id is None if there is no start token; pad_id may equal eos_id."""

    bos_id: int | None
    eos_id: int
    pad_id: int


class _Reader(gguf.GGUFReader):
    """Parses a file of a large vocabulary ten times as fast, with the same fields."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if "_plain" not in self.__dict__:
            self._plain = np.asarray(self.data)  # whose slices cost less than those of numpy's memmap
        dtype, count = np.dtype(dtype), int(count)
        dtype = dtype.newbyteorder(self.byte_order if override_order is None else override_order)
        return self._plain[offset : offset + count * dtype.itemsize].view(dtype)[:count]

    def _get_field_parts(self, orig_offs, raw_type):
        """Reads a list in one loop, and a list of numbers as one part; a tokenizer has lists of 50,000."""
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, start = gguf.GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        if kind in self.gguf_scalar_to_np:
            items = [self._get(start, self.gguf_scalar_to_np[kind], count)]
            size = items[0].nbytes
        elif kind == gguf.GGUFValueType.STRING:
            items = list(_strings(memoryview(self._plain)[start:], count))
            size = sum(map(len, items)) + 8 * count
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return 12 + size, head + items, list(range(2, 2 + len(items))), [gguf.GGUFValueType.ARRAY, kind]


def _strings(data: memoryview, count: int) -> Iterator[memoryview]:
    """Yields strings that each follow their length. Raises ValueError if the data end before."""
    offset = 0
    for _ in range(count):
        if offset + 8 > len(data):
            raise ValueError("a list of strings is cut off")
        start = offset + 8
        offset = start + struct.unpack_from("=Q", data, offset)[0]
        yield data[start:offset]


@functools.lru_cache(maxsize=2)  # weights and tokenizer are in one file, which takes a while to parse
def _parsed(path: Path, modified: int) -> gguf.GGUFReader:
    del modified
    return _Reader(path)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(f"no GGUF file at {path}: {INSTALL}, or correct the path") from None
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(
            f"cannot read {path}: it is truncated or not a GGUF file ({error}); install or download it again"
        ) from error


def _field(reader: gguf.GGUFReader, path: Path, name: str):
    field = reader.get_field(name)
    if field is None:
        raise UserError(f"{path} has no {name!r}: it is not a complete LLaMA model; download it again")
    return field.contents()


def _half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows (N H, D) of q or k from GGUF's rotary pairs (2i, 2i + 1) to Hugging Face's (i, i + H / 2)."""
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _hf_name(name: str) -> str:
    """Returns Hugging Face's name of a GGUF tensor. An unknown tensor keeps its name and is refused later."""
    base, _, kind = name.rpartition(".")
    if base in TENSORS:
        return f"{TENSORS[base]}.{kind}"
    if base.startswith("blk."):
        _, layer, part = base.split(".", 2)
        if part in LAYER_TENSORS:
            return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{kind}"
    return name


def load_llama(path: str | Path, llm: Llama) -> dict:
    """Reads the weights of a LLaMA model from a GGUF file, in any quantisation that the package `gguf` reads.

    Returns:
      The parameters of a scanned `llm`, lazy float32 arrays.

    Raises:
      UserError: the file cannot be read, holds another architecture or size, or lacks tensors or has unknown ones.
    """
    path = Path(path)
    reader = _open(path)
    architecture = _field(reader, path, "general.architecture")
    if architecture != "llama":
        raise UserError(f"{path} holds a {architecture!r} model; only 'llama' can be read")

    # The shapes of the tensors do not show these.
    stated = dict(
        num_heads=_field(reader, path, "llama.attention.head_count"),
        num_kv_heads=_field(reader, path, "llama.attention.head_count_kv"),
        rope_theta=_field(reader, path, "llama.rope.freq_base"),
        # It is stored in float32; the shortest decimal that rounds to it is the number that was meant.
        norm_eps=float(str(np.float32(_field(reader, path, "llama.attention.layer_norm_rms_epsilon")))),
    )
    if wrong := [
        f"{name} {value}, not {getattr(llm, name)}" for name, value in stated.items() if value != getattr(llm, name)
    ]:
        raise UserError(f"{path} is not of this llm.size: it has {', '.join(wrong)}")
    tensors = {}
    for tensor in reader.tensors:
        heads = {"attn_q.weight": llm.num_heads, "attn_k.weight": llm.num_kv_heads}.get(tensor.name.split(".", 2)[-1])

        def read(tensor: gguf.ReaderTensor = tensor, heads: int | None = heads) -> np.ndarray:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            return _half_split(weight, heads) if heads else weight

        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[_hf_name(tensor.name)] = Lazy(shape, np.float32, read)
    try:
        return hf_llama.from_hf(llm, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_tokenizer(path: str | Path) -> tuple[Tokenizer, SpecialIds]:
    """Returns the tokenizer of a GGUF file and its special ids.

    SmolLM2's tokenizer is built here: byte-level BPE, every digit a token, control tokens kept whole. transformers
    reads all others, and needs PyTorch for that.

    Raises:
      UserError: the file cannot be read, or transformers does not know the tokenizer.
    """
    path = Path(path)
    reader = _open(path)
    pre = reader.get_field("tokenizer.ggml.pre")
    kind = (_field(reader, path, "tokenizer.ggml.model"), pre.contents() if pre else None)
    if kind != ("gpt2", "smollm"):
        return _tokenizer_by_transformers(path)
    tokens = _field(reader, path, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, path, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, path, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    bos = reader.get_field("tokenizer.ggml.bos_token_id")
    eos_id = _field(reader, path, "tokenizer.ggml.eos_token_id")
    pad = reader.get_field("tokenizer.ggml.padding_token_id")
    special = SpecialIds(
        bos_id=bos.contents() if bos else None, eos_id=eos_id, pad_id=pad.contents() if pad else eos_id
    )
    return tokenizer, special


def _tokenizer_by_transformers(path: Path) -> tuple[Tokenizer, SpecialIds]:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise UserError(f"reading the tokenizer in {path} needs PyTorch: pip install torch") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no tokenizer of a known kind in {path}: {reason}") from error
    return found.backend_tokenizer, special_ids(found, path)


def special_ids(tokenizer, path: Path) -> SpecialIds:
    """Returns the special ids of a tokenizer of transformers that was read from `path`.

    Raises:
      UserError: the tokenizer has no end token.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise UserError(f"the tokenizer in {path} names no eos_token, so captions would have no end")
    return SpecialIds(bos_id=bos, eos_id=eos, pad_id=eos if pad is None else pad)
