"""Weights that a config names: where they end up, the ids of each family, and messages for files that do not fit."""

import json
import sys
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import simvlg_jax
from simvlg_jax import from_torch, tasks, to_torch
from simvlg_jax.config.load import load_config
from simvlg_jax.convert import evlgen, stacking, tokenizers, tomeformer
from simvlg_jax.convert import llama as hf_llama
from simvlg_jax.convert import opt as hf_opt
from simvlg_jax.models.llms.llama import LLAMA_SIZES
from simvlg_jax.models.llms.vicuna import VICUNA_SIZES
from simvlg_jax.utils.errors import UserError

WORDS = ["<s>", "<pad>", "</s>", "\n", *[f"w{i}" for i in range(60)]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Returns folders of tiny models as Hugging Face saves them, each with a tokenizer."""
    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=98,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
    )
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=98,
    )
    llama = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    vicuna = LlamaForCausalLM(LlamaConfig(**sizes | dict(vocab_size=64), tie_word_embeddings=False))
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    found = {}
    for name, model in (("opt", opt), ("llama", llama), ("vicuna", vicuna)):
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        start = "</s>" if name == "opt" else "<s>"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain, bos_token=start, eos_token="</s>", pad_token="<pad>" if name == "opt" else None
        )
        tokenizer.save_pretrained(found[name])
        found[f"{name}_model"] = model
    return found


def task_of(*overrides: str) -> tasks.Task:
    return tasks.build_task(load_config("configs/tiny.py", [f"--config.{o}" for o in overrides]))


def with_arguments(arguments: list[str]):
    return mock.patch.object(sys, "argv", ["from_torch", *arguments])


def abstract(task: tasks.Task) -> dict:
    return nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("scan", [True, False])
def test_opt_from_a_folder(folders, scan):
    task = task_of("llm.size=opt_tiny", f"llm.weights={folders['opt']}", f"llm.scan={scan}", "llm.start_is_target=True")
    loaded = task.load_pretrained(abstract(task))["llm"]
    stacked = loaded if scan else stacking.stack_layers(loaded)
    tensors = state(folders["opt_model"])
    back = hf_opt.to_hf(task.model.llm, stacked)
    assert set(back) == set(tensors) and all(np.array_equal(back[name], tensors[name]) for name in back)
    ids, targets = task.batch.texts["caption"].encoder("w1 w2")
    assert ids == targets == [2, 5, 6, 3]  # </s> w1 w2 and the line break, the start a target too


def test_llama_from_a_folder(folders):
    task = task_of("llm.size=tiny", f"llm.weights={folders['llama']}")
    tensors = state(folders["llama_model"])
    back = hf_llama.to_hf(task.model.llm, task.load_pretrained(abstract(task))["llm"])
    assert set(back) == set(tensors) and all(np.array_equal(back[name], tensors[name]) for name in back)
    ids, targets = task.batch.texts["caption"].encoder("w1 w2")
    assert ids == [0, 5, 6, 2] and targets == [-100, 5, 6, 2]


def test_vicuna_starts_with_its_end_and_gains_a_pad_row(folders, monkeypatch):
    size = LLAMA_SIZES["tiny"] | dict(vocab_size=65, tie_embeddings=False)
    monkeypatch.setitem(VICUNA_SIZES, "vicuna_tiny", size)
    task = task_of("llm.size=vicuna_tiny", f"llm.weights={folders['vicuna']}")
    loaded = task.load_pretrained(abstract(task))["llm"]
    tensors = state(folders["vicuna_model"])
    np.testing.assert_array_equal(loaded["embedding"][:64], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(loaded["lm_head"][:, :64], tensors["lm_head.weight"].T)
    assert not np.any(loaded["embedding"][64]) and not np.any(loaded["lm_head"][:, 64])
    assert (
        task.batch.texts["caption"].encoder("w1")[0] == [2, 5, 2] and task.batch.texts["caption"].encoder.pad_id == 64
    )


def test_sentencepiece_tokenizer_is_read_as_vicuna_ships_it(tmp_path):
    """There is a tokenizer.model and no tokenizer.json."""
    texts = tmp_path / "texts.txt"
    texts.write_text("a photo of a cat on a sofa\ntwo dogs play in the park\n" * 50)
    options = dict(vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(input=str(texts), model_prefix=str(tmp_path / "tokenizer"), **options)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    published = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = tokenizers.load_hf_tokenizer(tmp_path)
    for text in ("a photo of two cats", "park 4 \u00e9"):
        assert found.backend_tokenizer.encode(text, add_special_tokens=False).ids == published.encode(text)
    assert (found.bos_token_id, found.eos_token_id) == (published.bos_id(), published.eos_id()) == (1, 2)


def test_published_checkpoint_gives_the_trained_part(tmp_path):
    task = task_of("llm.size=opt_tiny")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(task))
    trained = {name: tree for name, tree in params.items() if name not in ("vit", "llm")}
    to_torch.write_state_dict(tmp_path / "x.safetensors", evlgen.to_evlgen(task.model, trained))
    task = task_of("llm.size=opt_tiny", f"train.init_from={tmp_path / 'x.safetensors'}")
    loaded = task.load_pretrained(abstract(task))
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)

    config = load_config("configs/tiny.py", ["--config.llm.size=opt_tiny", "--config.mesh.fsdp=2"])
    model = simvlg_jax.load(tmp_path / "x.safetensors", config)
    for name, tree in trained.items():
        jax.tree.map(np.testing.assert_array_equal, model.params[name], tree)
    assert len(model.params["connector"]["layer_0"]["mlp"]["fc1"]["kernel"].sharding.device_set) == 8
    assert isinstance(model.caption(np.zeros((32, 32, 3), np.uint8)), str)
    assert config.train.init_from == ""  # the caller's is left alone
    with pytest.raises(UserError, match="no weights at"):
        simvlg_jax.load("/nowhere/x.pth", config)


def test_positions_get_their_norm_when_training_starts_and_not_before(tmp_path, capsys):
    task = task_of("llm.size=opt_tiny")
    params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), abstract(task))
    named = {name: tree for name, tree in params.items() if name not in ("vit", "llm")}
    to_torch.write_state_dict(tmp_path / "x.safetensors", evlgen.to_evlgen(task.model, named))
    overrides = ["llm.size=opt_tiny", "connector.position_norm=40.0", f"train.init_from={tmp_path / 'x.safetensors'}"]
    flags = [f"--config.{o}" for o in overrides]
    with with_arguments(["--config", "configs/tiny.py", "--output", str(tmp_path / "out"), *flags]):
        from_torch.main()
    converted = capsys.readouterr().out.split()[0].removeprefix("--config.")
    written = task_of(overrides[0], converted).load_pretrained(abstract(task))
    jax.tree.map(np.testing.assert_array_equal, written, named)  # as they were
    was = named["connector"]["embeddings"]["position"]
    for given in (overrides, [*overrides[:2], converted]):
        started = task_of(*given).load_pretrained(abstract(task))
        found = started["connector"]["embeddings"]["position"]
        assert np.square(found - found.mean(0)).sum(1).mean() ** 0.5 == pytest.approx(40, rel=1e-5)
        np.testing.assert_allclose(found / found[0, 0], was / was[0, 0], rtol=1e-4)
        started["connector"]["embeddings"]["position"] = was
        jax.tree.map(np.testing.assert_array_equal, started, named)

    model = simvlg_jax.load(tmp_path / "x.safetensors", load_config("configs/tiny.py", flags))  # a trained model
    jax.tree.map(np.testing.assert_array_equal, model.params["connector"], named["connector"])


def test_a_norm_needs_positions(tmp_path):
    task = task_of("connector.weights=", "connector.position_norm=9.0")
    with pytest.raises(UserError, match="position_norm scales positions that are read, and none are") as raised:
        task.load_pretrained(abstract(task))
    assert raised.value.status == 2
    with pytest.raises(UserError, match="all equal"):
        tomeformer.with_position_norm({"embeddings": {"position": np.ones((512, 4))}}, 9.0)


def test_weights_that_do_not_fit_say_so(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(LLAMA_SIZES, "one_more", LLAMA_SIZES["tiny"] | dict(vocab_size=65, tie_embeddings=False))
    (tmp_path / "x.gguf").touch()
    for overrides, message in (
        (["llm.size=tiny", f"llm.weights={folders['opt']}"], "no Llama layers here"),
        (["llm.size=opt_tiny", f"llm.weights={folders['llama']}"], "no OPT here"),
        (["llm.size=tiny", f"llm.weights={folders['vicuna']}"], "a model of this size ties them"),
        (["llm.size=one_more", f"llm.weights={folders['vicuna']}"], r"embedding: model \(65, 32\), weights \(64, 32\)"),
        (["llm.size=opt_tiny", f"llm.weights={tmp_path / 'x.gguf'}"], "not from GGUF"),
        (["connector.weights=/nowhere"], "no weights at /nowhere"),
    ):
        task = task_of(*overrides)
        with pytest.raises(UserError, match=message):
            task.load_pretrained(abstract(task))
    with pytest.raises(UserError, match="no tokenizer of a known kind"):
        task_of(f"llm.weights={tmp_path}").batch.texts["caption"].encoder  # noqa: B018
    with pytest.raises(UserError, match=r"llm\.size is 'opt'; it takes .*'opt_125m'.*'vicuna_7b'"):
        task_of("llm.size=opt")
    with pytest.raises(UserError, match="no dropout"):
        task_of("llm.dropout=0.1")


def test_converted_once_is_the_same(folders, tmp_path, capsys):
    overrides = ["llm.size=opt_tiny", f"llm.weights={folders['opt']}"]
    arguments = ["--config", "configs/tiny.py", "--output", str(tmp_path), *[f"--config.{o}" for o in overrides]]
    with with_arguments(arguments):
        from_torch.main()
    printed = capsys.readouterr().out.split()
    wanted = {"weights": tmp_path / "llm.safetensors", "tokenizer": folders["opt"]}
    assert printed == [f"--config.llm.{key}={value}" for key, value in wanted.items()]
    direct = task_of(*overrides)
    converted = task_of("llm.size=opt_tiny", *[flag.removeprefix("--config.") for flag in printed])
    trees = [task.load_pretrained(abstract(task))["llm"] for task in (direct, converted)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    assert converted.batch.texts["caption"].encoder("w1 w2") == direct.batch.texts["caption"].encoder("w1 w2")
    nothing = with_arguments(["--config", "configs/tiny.py", "--output", str(tmp_path / "none")])
    with nothing, pytest.raises(UserError, match="names no weights"):
        from_torch.main()
    assert not (tmp_path / "none").exists()


def test_published_checkpoint_converted_once_is_the_same(tmp_path, capsys):
    task = task_of("llm.size=opt_tiny", "vit.temporal=True")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(task))
    tensors = evlgen.to_evlgen(task.model, {name: tree for name, tree in params.items() if name != "llm"})
    to_torch.write_state_dict(tmp_path / "x.pth", tensors)
    overrides = ["llm.size=opt_tiny", "vit.temporal=True", f"train.init_from={tmp_path / 'x.pth'}"]
    flags = [f"--config.{o}" for o in overrides]
    with with_arguments(["--config", "configs/tiny.py", "--output", str(tmp_path / "out"), *flags]):
        from_torch.main()
    printed = [flag.removeprefix("--config.") for flag in capsys.readouterr().out.split()]
    assert [flag.split("=")[0] for flag in printed] == ["vit.weights", "train.init_from"]
    converted = task_of(*overrides[:2], *printed)
    trees = [t.load_pretrained(abstract(t)) for t in (task_of(*overrides), converted)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
