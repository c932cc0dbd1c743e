"""Qwen2.5 and Qwen3 equal transformers' in states, gradients, greedy ids, weights and text."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from simvlg_jax.config.load import load_config
from simvlg_jax.convert import families
from simvlg_jax.decoding.generate import generate
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.tasks import Task, build_task

SIZES = {
    "qwen2.5": dict(width=24, depth=2, num_heads=6, num_kv_heads=2, ffn=40, vocab_size=50),
    "qwen3": dict(width=24, depth=2, num_heads=6, num_kv_heads=3, head_dim=10, ffn=40, vocab_size=50),
}
MODELS = [(name, tied) for name in SIZES for tied in (True, False)]
CONFIGS = {"qwen2.5": Qwen2Config, "qwen3": Qwen3Config}
SPLIT = (  # of the published tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def pair(name: str, tied: bool) -> tuple[PreTrainedModel, Llama, dict]:
    """Returns transformers' model with random weights, our model, and its parameters. Every weight matters."""
    torch.manual_seed(0)
    size = SIZES[name] | dict(tie_embeddings=tied)
    config = CONFIGS[name](
        hidden_size=size["width"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_kv_heads"],
        intermediate_size=size["ffn"],
        vocab_size=size["vocab_size"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation="eager",
        **{"head_dim": size["head_dim"]} if "head_dim" in size else {},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter, x in model.named_parameters():  # biases and norms start constant
        if x.ndim == 1:
            torch.nn.init.normal_(x, float("norm" in parameter), 0.3)
    llm = families.FAMILIES[name].module(**size)
    return model, llm, families.FAMILIES[name].from_hf(llm, state(model))


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.linalg.norm(np.asarray(ours) - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_states_and_gradients_equal_transformers(name, tied):
    """Compares hidden states, logits and all gradients, with a soft prompt before padded texts."""
    model, llm, params = pair(name, tied)
    rng = np.random.default_rng(1)
    prefix = rng.normal(size=(3, 4, 24)).astype(np.float32)
    ids = rng.integers(0, 50, (3, 7)).astype(np.int32)
    mask = np.concatenate([np.ones((3, 4), bool), np.arange(7) < np.array([[7], [4], [1]])], 1)
    positions = np.broadcast_to(np.arange(11), (3, 11))
    weights = rng.normal(size=(3, 11, 50)).astype(np.float32) * mask[..., None]

    @jax.jit
    def outputs(params, prefix):
        variables = {"params": params}
        embeddings = jnp.concatenate([prefix, llm.apply(variables, ids, method="embed")], 1)
        hidden = llm.apply(variables, embeddings, mask, positions).hidden
        logits = llm.apply(variables, hidden, method="logits")
        return jnp.sum(jax.nn.log_softmax(logits) * weights), (hidden, logits)

    gradients, (hidden, logits) = jax.grad(outputs, argnums=(0, 1), has_aux=True)(params, prefix)
    model.zero_grad()
    soft = torch.tensor(prefix, requires_grad=True)
    embeddings = torch.cat([soft, model.get_input_embeddings()(torch.tensor(ids))], 1)
    out = model(inputs_embeds=embeddings, attention_mask=torch.tensor(mask).long(), output_hidden_states=True)
    (out.logits.log_softmax(-1) * torch.tensor(weights)).sum().backward()
    assert close(hidden[mask], out.hidden_states[-1].detach().numpy()[mask])
    assert close(logits[mask], out.logits.detach().numpy()[mask])
    assert close(gradients[1], soft.grad.numpy())
    ours = families.FAMILIES[name].to_hf(llm, jax.device_get(gradients[0]))
    theirs = {parameter: x.grad.numpy() for parameter, x in model.named_parameters()}
    assert set(ours) - set(theirs) == ({"lm_head.weight"} if tied else set())
    # Key biases too: turned by the position, they are not the same for all keys.
    assert not [parameter for parameter, x in theirs.items() if not close(ours[parameter], x)]


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_greedy_ids_equal_transformers(name, tied):
    model, llm, params = pair(name, tied)
    prefix = np.random.default_rng(0).normal(size=(5, 3, 24)).astype(np.float32)
    start = np.full((5, 1), 7, np.int32)
    embeddings = torch.cat([torch.tensor(prefix), model.get_input_embeddings()(torch.tensor(start))], 1)

    def theirs(eos_id: int) -> np.ndarray:
        ids = model.generate(
            inputs_embeds=embeddings.detach(), max_new_tokens=9, do_sample=False, eos_token_id=eos_id, pad_token_id=49
        ).numpy()
        return np.pad(ids, ((0, 0), (0, 9 - ids.shape[1])), constant_values=49)

    @jax.jit
    def ours(params, eos_id):
        settings = Decoding(max_new_tokens=9)
        return generate(llm, params, prefix, start, np.ones_like(start), settings, eos_id=eos_id, pad_id=49)[:, 0]

    free = theirs(48)
    assert len(np.unique(free)) > 5
    for eos_id in (48, int(free[0, 4])):  # the second ends the first text early
        np.testing.assert_array_equal(ours(params, eos_id), theirs(eos_id))


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_weights_go_out_as_they_came_in(name, tied):
    model, llm, params = pair(name, tied)
    tensors, theirs = families.FAMILIES[name].to_hf(llm, params), state(model)
    assert set(tensors) == set(theirs)
    assert all(np.array_equal(tensors[parameter], theirs[parameter]) for parameter in theirs)
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict({parameter: torch.tensor(x) for parameter, x in tensors.items()}, strict=True)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(other.eval()(ids).logits, model(ids).logits)


def write_tokenizer(folder: Path, eos_token: str) -> Tokenizer:
    """Writes a Qwen tokenizer of few words, in the files in which Qwen's is published."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a photo of a cat on a sofa", "two dogs play in the park"] * 9, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "bos_token": None}
    config |= {"eos_token": eos_token, "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace"}
    added = {str(tokenizer.token_to_id(t)): {"content": t, "special": True, "normalized": False} for t in special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    return tokenizer


def task_of(*overrides: str) -> Task:
    return build_task(load_config("configs/tiny.py", [f"--config.{o}" for o in overrides]))


@pytest.mark.parametrize("eos_token", ["<|endoftext|>", "<|im_end|>"], ids=["base", "instruct"])
@pytest.mark.parametrize(("name", "size"), [("qwen2.5", "qwen2.5_tiny"), ("qwen3", "qwen3_tiny")])
def test_from_a_folder(name, size, eos_token, tmp_path, monkeypatch):
    """The folder has sharded weights and a tokenizer without BOS, so the end token also starts a caption."""
    family = families.FAMILIES[name]
    monkeypatch.setitem(family.sizes, size, SIZES[name] | dict(tie_embeddings=name == "qwen3"))
    model = pair(name, name == "qwen3")[0]
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    published = write_tokenizer(tmp_path, eos_token)
    task = task_of(f"llm.size={size}", f"llm.weights={tmp_path}")
    abstract = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    tensors = family.to_hf(task.model.llm, task.load_pretrained(abstract)["llm"])
    theirs = state(model)
    assert set(tensors) == set(theirs)
    assert all(np.array_equal(tensors[parameter], theirs[parameter]) for parameter in theirs)

    text = task.batch.texts["caption"].encoder
    end, pad = map(published.token_to_id, (eos_token, "<|endoftext|>"))
    wanted = published.encode("two cats, 42 caf\u00e9s in the park").ids
    ids, targets = text("two cats, 42 cafe\u0301s in the park")
    assert ids == [end, *wanted, end] and targets == [-100, *wanted, end]
    assert text.pad_id == pad
    assert text.tokenizer.decode(wanted) == "two cats, 42 caf\u00e9s in the park"
