"""Decoding against transformers' generate, for each family of language models, and by its invariants.

`test_golden` compares with the published models.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel, Qwen3Config

from simvlg_jax.convert import families
from simvlg_jax.decoding import processors
from simvlg_jax.decoding.generate import generate
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.utils.errors import UserError

VOCABULARY, WIDTH = 60, 32
LLAMA = dict(width=WIDTH, depth=2, num_heads=4, num_kv_heads=2, ffn=48, vocab_size=VOCABULARY)
HF_LLAMA = dict(
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=VOCABULARY,
    initializer_range=0.3,
)
MODELS = {
    "llama": (LLAMA, LlamaConfig(**HF_LLAMA)),
    "qwen3": (
        LLAMA | dict(head_dim=8),
        Qwen3Config(**HF_LLAMA, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ),
    "opt": (
        dict(width=WIDTH, depth=2, num_heads=4, ffn=48, vocab_size=VOCABULARY),
        OPTConfig(
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            init_std=0.3,
        ),
    ),
}
FAMILIES = pytest.mark.parametrize("family", MODELS)
PAD, NO_END = 59, 58
NEW = 9  # new tokens

PREFIX = np.random.default_rng(0).normal(size=(4, 3, WIDTH)).astype(np.float32)
PROMPTS = [[1, 5, 9, 4], [1, 7], [1], [1, 30, 31]]


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """PROMPTS as ids, mask (B, Q), the text at the left or at the right."""
    ids, mask = np.full((4, 4), PAD, np.int32), np.zeros((4, 4), np.int32)
    for row, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if side == "right" else slice(4 - len(prompt), 4)
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@functools.cache
def pair(family: str) -> tuple[PreTrainedModel, object, dict]:
    """transformers' model with random weights, our module and its parameters."""
    torch.manual_seed(3)
    size, config = MODELS[family]
    theirs = AutoModelForCausalLM.from_config(config).eval()
    llm = families.FAMILIES[family].module(**size)
    state = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    return theirs, llm, families.FAMILIES[family].from_hf(llm, state)


@functools.cache
def jitted(family: str, settings: Decoding):
    _, llm, _ = pair(family)
    return jax.jit(
        lambda params, prefix, ids, mask, eos_id, key: generate(
            llm, params, prefix, ids, mask, settings, eos_id=eos_id, pad_id=PAD, key=key
        )
    )


def decode(family, eos_id, side="left", prefix=PREFIX, prompts=None, key=None, **options) -> np.ndarray:
    """Our texts (B, N, NEW)."""
    settings = Decoding(**dict(max_new_tokens=NEW) | options)
    ids, mask = prompts or padded(side)
    key = jax.random.key(0) if key is None else key
    return np.asarray(jitted(family, settings)(pair(family)[2], prefix, ids, mask, eos_id, key))


def reference(family: str, eos_id: int, num_captions: int = 1, **options) -> np.ndarray:
    """transformers' texts from the same prefix and left-padded prompts: (B, N, NEW), padded."""
    theirs, _, _ = pair(family)
    ids, mask = padded("left")
    text = theirs.get_input_embeddings()(torch.tensor(ids))
    with torch.no_grad():
        out = theirs.generate(
            inputs_embeds=torch.cat([torch.tensor(PREFIX), text], 1),
            attention_mask=torch.tensor(np.pad(mask, ((0, 0), (3, 0)), constant_values=1)),
            max_new_tokens=NEW,
            num_return_sequences=num_captions,
            eos_token_id=eos_id,
            pad_token_id=PAD,
            **dict(do_sample=False) | options,
        ).numpy()
    return np.pad(out, ((0, 0), (0, NEW - out.shape[1])), constant_values=PAD).reshape(len(PROMPTS), num_captions, NEW)


@functools.cache
def end_of(family: str) -> int:
    """A token that ends some greedy texts early and others not, so that the end matters."""
    free = decode(family, NO_END)[:, 0]
    return next(int(token) for token in np.unique(free[:, 1:4]) if 0 < np.any(free == token, 1).sum() < 4)


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("min_new_tokens", [0, 6])
def test_greedy_equals_transformers(family, side, min_new_tokens):
    """On whichever side the prompts are padded."""
    wanted = reference(family, end_of(family), min_new_tokens=min_new_tokens)
    if min_new_tokens == 0:
        assert (wanted == PAD).any(), "no row ended: the test would not see the end token"
    ours = decode(family, end_of(family), side, min_new_tokens=min_new_tokens)
    np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("penalty", [1.5, 0.7])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_penalty_on_repetition_equals_transformers(penalty, num_beams):
    options = dict(min_new_tokens=6, num_beams=num_beams)
    wanted = reference("llama", end_of("llama"), repetition_penalty=penalty, **options)
    assert not np.array_equal(wanted, reference("llama", end_of("llama"), **options)), "the penalty changes nothing"
    ours = decode("llama", end_of("llama"), repetition_penalty=penalty, **options)
    np.testing.assert_array_equal(ours, wanted)


BEAMS = [
    dict(num_beams=2),
    dict(num_beams=5),
    dict(num_beams=5, length_penalty=0.0),
    dict(num_beams=5, length_penalty=-1.0),
    dict(num_beams=4, length_penalty=2.0),
    dict(num_beams=3, min_new_tokens=6),
    dict(num_beams=5, num_captions=3),
    dict(num_beams=4, num_captions=4, min_new_tokens=3, length_penalty=2.0),
]


OTHERS = [name for name in MODELS if name != "llama"]  # they share all code of decoding, so a few settings do


@pytest.mark.parametrize(
    ("family", "options"), [("llama", o) for o in BEAMS] + [(name, BEAMS[-1]) for name in OTHERS], ids=str
)
def test_beams_equal_transformers(family, options):
    for eos_id in (end_of(family), NO_END):
        np.testing.assert_array_equal(decode(family, eos_id, **options), reference(family, eos_id, **options))


def test_beam_options_matter():
    """The settings above give at least as many different results as there are kinds of them."""
    results = {decode("llama", end_of("llama"), **options)[:, 0].tobytes() for options in BEAMS}
    assert len(results) >= 4


SAMPLING = [
    dict(),
    dict(temperature=0.6),
    dict(top_k=4),
    dict(top_p=0.7),
    dict(temperature=1.7, top_k=12, top_p=0.6, repetition_penalty=1.5, min_new_tokens=5),
    dict(num_captions=3, top_p=0.9),
]


@pytest.mark.parametrize(
    ("family", "options"), [("llama", o) for o in SAMPLING] + [(name, SAMPLING[-2]) for name in OTHERS], ids=str
)
def test_samples_equal_transformers_with_the_same_draws(family, options, monkeypatch):
    """Its multinomial draw takes our Gumbel noise: the most likely token of log probability plus noise."""
    key, steps = jax.random.key(5), iter(range(NEW))

    def multinomial(probabilities, num_samples):
        assert num_samples == 1
        noise = jax.random.gumbel(jax.random.fold_in(key, next(steps)), probabilities.shape)
        return (probabilities.log() + torch.tensor(np.asarray(noise))).argmax(1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    # transformers' own default is top_k=50
    wanted = reference(family, end_of(family), do_sample=True, **dict(top_k=0) | options)
    ours = decode(family, end_of(family), key=key, do_sample=True, **options)
    np.testing.assert_array_equal(ours, wanted)


def test_samples_have_the_probabilities_of_the_processed_logits():
    """1,000 first tokens after one prefix: each frequency within 5 standard deviations."""
    theirs, _, _ = pair("llama")
    with torch.no_grad():
        logits = theirs(inputs_embeds=torch.tensor(np.repeat(PREFIX[:1], 1, 0)[:, :2])).logits[0, -1]
    probabilities = torch.softmax(logits / 1.5, -1).numpy()
    kept = np.sort(probabilities)[::-1][:10][-1] <= probabilities
    wanted = np.where(kept, probabilities, 0) / probabilities[kept].sum()

    class Fixed(Llama):
        """Gives these logits wherever it is asked."""

        def logits(self, hidden):
            return jax.numpy.broadcast_to(jax.numpy.asarray(logits.numpy()), (*hidden.shape[:-1], VOCABULARY))

    settings = Decoding(max_new_tokens=1, do_sample=True, temperature=1.5, top_k=10, num_captions=1000)
    ids = np.ones((1, 1), np.int32)
    drawn = jax.jit(
        lambda params: generate(
            Fixed(**LLAMA),
            params,
            PREFIX[:1],
            ids,
            ids,
            settings,
            eos_id=NO_END,
            pad_id=PAD,
            key=jax.random.key(1),
        )
    )(pair("llama")[2])
    frequency = np.bincount(np.asarray(drawn).ravel(), minlength=VOCABULARY) / 1000
    assert (np.abs(frequency - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 1000)).all()


@FAMILIES
@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=str)
def test_rows_do_not_depend_on_each_other(family, options):
    """A row alone and unpadded gets the tokens it got in the batch."""
    together = decode(family, end_of(family), **options)
    ids = np.array(PROMPTS[1:2], np.int32)
    alone = decode(family, end_of(family), prefix=PREFIX[1:2], prompts=(ids, np.ones_like(ids)), **options)
    np.testing.assert_array_equal(alone[0], together[1])


def test_fewer_tokens_are_a_beginning():
    long = decode("llama", end_of("llama"), "right")
    for length in (1, 3):
        short = decode("llama", end_of("llama"), "right", max_new_tokens=length)
        np.testing.assert_array_equal(short, long[:, :, :length])


def test_stops_when_all_rows_have_ended():
    """The model runs once for the prompts, then once for each further token of the longest row."""
    runs = []

    class Counted(Llama):
        def logits(self, hidden):
            jax.debug.callback(lambda: runs.append(1))
            return super().logits(hidden)

    ids = np.array(PROMPTS[:1], np.int32)
    free = decode("llama", NO_END, prefix=PREFIX[:1], prompts=(ids, np.ones_like(ids)))[0, 0]
    _, _, params = pair("llama")
    settings = Decoding(max_new_tokens=NEW)
    counted = jax.jit(
        lambda eos_id: generate(
            Counted(**LLAMA), params, PREFIX[:1], ids, np.ones_like(ids), settings, eos_id=eos_id, pad_id=PAD
        )
    )
    for length in (1, 4):
        assert free[length - 1] not in free[: length - 1]
        runs.clear()
        out = counted(free[length - 1])
        jax.effects_barrier()
        np.testing.assert_array_equal(out[0, 0], [*free[:length], *[PAD] * (NEW - length)])
        assert len(runs) == length


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=1, count_bos=True), "counts the start"),
        (dict(num_beams=0), "num_beams"),
        (dict(num_beams=2, do_sample=True), "choose one"),
        (dict(do_sample=True, temperature=0.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(num_captions=2), "num_captions above 1"),
        (dict(num_captions=3, num_beams=2), "num_captions above 1"),
    ],
)
def test_settings_that_contradict_are_refused(options, problem):
    with pytest.raises(UserError, match=problem) as error:
        Decoding(**options)
    assert error.value.status == 2


def test_processors_keep_the_most_likely_token():
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    for function in (processors.keep_top_p, lambda x, p: processors.keep_top_k(x, 1)):
        kept = np.isfinite(np.asarray(function(logits, 1e-9)))
        assert (kept.sum(1) == 1).all()
        assert kept[np.arange(3), logits.argmax(1)].all()
