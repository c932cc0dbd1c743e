"""Greedy decoding equals transformers' generate and the published model, and keeps its invariants."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from simvlg_jax.convert import llama as hf_llama
from simvlg_jax.decoding.generate import greedy_decode
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
SIZE = dict(width=32, depth=2, num_heads=4, num_kv_heads=2, ffn=48, vocab_size=60)
PAD = 59
NEW = 9  # new tokens

PREFIX = np.random.default_rng(0).normal(size=(4, 3, 32)).astype(np.float32)
PROMPTS = [[1, 5, 9, 4], [1, 7], [1], [1, 30, 31]]


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask (B, Q) of PROMPTS, padded on the right or on the left."""
    ids, mask = np.full((4, 4), PAD, np.int32), np.zeros((4, 4), np.int32)
    for row, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if side == "right" else slice(4 - len(prompt), 4)
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=60,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def params(theirs) -> dict:
    return hf_llama.from_hf(Llama(**SIZE), {name: x.detach().numpy() for name, x in theirs.state_dict().items()})


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "min_new_tokens", "penalty"))
def decode(params, prefix, ids, mask, eos_id, max_new_tokens=NEW, min_new_tokens=0, penalty=1.0) -> jax.Array:
    options = dict(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, repetition_penalty=penalty)
    return greedy_decode(Llama(**SIZE), params, prefix, ids, mask, eos_id=eos_id, pad_id=PAD, **options)


def reference(model: LlamaForCausalLM, eos_id: int, min_new_tokens: int = 0, penalty: float = 1.0) -> np.ndarray:
    """Returns the ids (B, NEW), padded, of transformers' greedy search from the same prefix and left-padded prompts."""
    ids, mask = padded("left")
    text = model.get_input_embeddings()(torch.tensor(ids))
    with torch.no_grad():
        out = model.generate(
            inputs_embeds=torch.cat([torch.tensor(PREFIX), text], 1),
            attention_mask=torch.tensor(np.pad(mask, ((0, 0), (3, 0)), constant_values=1)),
            max_new_tokens=NEW,
            min_new_tokens=min_new_tokens,
            repetition_penalty=penalty,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=PAD,
        ).numpy()
    return np.pad(out, ((0, 0), (0, NEW - out.shape[1])), constant_values=PAD)


@pytest.fixture(scope="module")
def eos_id(params) -> int:
    """Returns a token that ends some rows early and others not, so that the end token matters."""
    free = np.asarray(decode(params, PREFIX, *padded("left"), 0))
    early = [token for token in np.unique(free[:, 1:4]) if 0 < np.any(free == token, 1).sum() < 4]
    assert early
    return int(early[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("min_new_tokens", [0, 6])
def test_equals_transformers(theirs, params, eos_id, side, min_new_tokens):
    """The prompts may be padded on either side."""
    wanted = reference(theirs, eos_id, min_new_tokens)
    if min_new_tokens == 0:
        assert (wanted == PAD).any(), "no row ended: the test would not see the end token"
    ours = decode(params, PREFIX, *padded(side), eos_id, min_new_tokens=min_new_tokens)
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_penalty_on_repetition_equals_transformers(theirs, params, eos_id, penalty):
    wanted = reference(theirs, eos_id, 6, penalty)
    assert not np.array_equal(wanted, reference(theirs, eos_id, 6)), "the penalty changes nothing: nothing is tested"
    ours = decode(params, PREFIX, *padded("left"), eos_id, min_new_tokens=6, penalty=penalty)
    np.testing.assert_array_equal(ours, wanted)


def test_equals_the_published_model():
    """The published `max_length` of 14 counts the dummy start token in column 0, so 13 tokens are new."""
    meta = json.loads((GOLDEN / "image_llama.json").read_text())
    golden = np.load(GOLDEN / "image_llama.npz")
    lm = meta["lm"]
    llm = Llama(lm["dim"], lm["layers"], lm["heads"], lm["heads"], lm["ffn"], lm["vocab"])
    params = hf_llama.from_hf(llm, load_file(GOLDEN / "image_llama.safetensors"), "llm_model.")
    start = np.full((len(golden["prefix"]), 1), meta["bos_token_id"], np.int32)
    ids = jax.jit(
        lambda params, prefix: greedy_decode(
            llm,
            params,
            prefix,
            start,
            jnp.ones_like(start),
            eos_id=meta["eos_token_id"],
            pad_id=meta["pad_token_id"],
            max_new_tokens=meta["max_length"] - 1,
        )
    )(params, golden["prefix"])
    np.testing.assert_array_equal(ids, golden["gen/greedy"][:, 1:])


def test_rows_do_not_depend_on_each_other(params, eos_id):
    """A row alone and without padding gets the same tokens as in the batch."""
    together = np.asarray(decode(params, PREFIX, *padded("left"), eos_id))
    ids = np.array(PROMPTS[1:2], np.int32)
    alone = decode(params, PREFIX[1:2], ids, np.ones_like(ids), eos_id)
    np.testing.assert_array_equal(alone[0], together[1])


def test_fewer_tokens_are_a_beginning(params, eos_id):
    ids, mask = padded("right")
    long = np.asarray(decode(params, PREFIX, ids, mask, eos_id))
    for length in (1, 3):
        short = decode(params, PREFIX, ids, mask, eos_id, max_new_tokens=length)
        np.testing.assert_array_equal(short, long[:, :length])
    with pytest.raises(UserError, match="max_new_tokens"):
        decode(params, PREFIX, ids, mask, eos_id, max_new_tokens=0)


def test_stops_when_all_rows_have_ended(params):
    """The model runs once for the prompts, then once for each further token of the longest row."""
    runs = []

    class Counted(Llama):
        def logits(self, hidden):
            jax.debug.callback(lambda: runs.append(1))
            return super().logits(hidden)

    ids = np.array(PROMPTS[:1], np.int32)
    free = np.asarray(decode(params, PREFIX[:1], ids, np.ones_like(ids), 0))[0]
    options = dict(pad_id=PAD, max_new_tokens=NEW)
    counted = jax.jit(
        lambda eos_id: greedy_decode(
            Counted(**SIZE), params, PREFIX[:1], ids, np.ones_like(ids), eos_id=eos_id, **options
        )
    )
    for length in (1, 4):
        assert free[length - 1] not in free[: length - 1]
        runs.clear()
        out = counted(free[length - 1])
        jax.effects_barrier()
        np.testing.assert_array_equal(out[0], [*free[:length], *[PAD] * (NEW - length)])
        assert len(runs) == length
