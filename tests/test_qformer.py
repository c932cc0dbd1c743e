"""The Q-Former as a connector: transformers' BLIP-2 gives the same numbers, with weights that go either way."""

import json

import check_golden
import flax.linen as nn
import golden_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_golden import GOLDEN
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)
from verbs import call

import simvlg_jax
from simvlg_jax import to_torch
from simvlg_jax.config.load import load_config
from simvlg_jax.convert import evlgen, qformer
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.demo.looks import Looks
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.evaluator import EvalData
from simvlg_jax.evaluation.gallery import Gallery
from simvlg_jax.huggingface.writers import WRITERS
from simvlg_jax.models import bert
from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.models.dropout import Dropout
from simvlg_jax.models.llms.opt import OPT_SIZES
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training import loop
from simvlg_jax.utils.errors import UserError

QUERIES, VOCABULARY = 5, 98
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), np.uint8).repeat(16, 1).repeat(16, 2)


def config_of(*flags: str):
    own = ("connector.type=qformer", f"connector.queries={QUERIES}", "llm.size=opt_tiny", "mesh.data=1", *flags)
    return load_config("configs/tiny.py", [f"--config.{flag}" for flag in own])


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every parameter random, so that each matters; norms stay near 1."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        torch.nn.init.normal_(x, float(x.ndim == 1 and name.endswith("norm.weight")), 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> Blip2ForConditionalGeneration:
    """Returns a BLIP-2 of the sizes of configs/tiny.py. Its vocabulary has six more rows, as the published one's."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        ).to_dict(),
        text_config=OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=VOCABULARY + 6,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=VOCABULARY,
    )
    model = randomize(Blip2ForConditionalGeneration(config))
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[32:64] = 0  # keys have no bias in the published model
        model.language_projection.weight *= 10  # so that captions depend on the pictures
    return with_our_epsilon(model)


def with_our_epsilon(model: Blip2ForConditionalGeneration) -> Blip2ForConditionalGeneration:
    model.vision_model.post_layernorm.eps = 1e-5
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("blip2")
    theirs.save_pretrained(path)
    return path


def pixels_of(model, pictures) -> torch.Tensor:
    return torch.from_numpy(np.array(model.vit.normalize(pictures)).transpose(0, 3, 1, 2))


def test_blip2_of_hugging_face_captions_as_it_does_there(theirs, folder):
    ours = simvlg_jax.load(folder, config_of())
    model, text = ours.task.model, ours.task.batch.texts["caption"].encoder
    ids, _ = (np.array([x] * len(PICTURES)) for x in text("a red square"))
    out = jax.jit(model.apply)({"params": ours.params}, PICTURES, ids, np.ones_like(ids))
    pixels = pixels_of(model, PICTURES)
    soft = np.full((len(ids), QUERIES), VOCABULARY)
    with torch.no_grad():
        wanted = theirs(pixels, torch.from_numpy(np.concatenate([soft, ids], 1)))
    prefix = theirs.language_projection(wanted.qformer_outputs.last_hidden_state).detach().numpy()
    assert golden_numbers.relative(out.visual.prefix, prefix) < 1e-5
    logits = model.llm.apply({"params": ours.params["llm"]}, out.hidden, method="logits")
    assert golden_numbers.relative(logits, wanted.logits[..., :VOCABULARY].numpy()) < 1e-5
    assert out.visual.source_map is None and out.visual.layers == ()

    generated = theirs.generate(pixels, max_new_tokens=16, do_sample=False, suppress_tokens=[*range(98, 104)])
    written = Captioner(model, text, Decoding(max_new_tokens=16))
    found = np.asarray(written(ours.params, jnp.asarray(PICTURES)).ids)[:, 0]
    generated = generated[:, QUERIES + 1 :].numpy()  # without the prompt
    assert np.array_equal(found[:, : generated.shape[1]], generated)
    assert len(np.unique(found, axis=0)) > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the workdir of a run. Its language model has one id to spare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPT_SIZES, "opt_roomy", OPT_SIZES["opt_tiny"] | dict(vocab_size=VOCABULARY + 1))
        workdir = tmp_path_factory.mktemp("run")
        config = config_of("llm.size=opt_roomy", "train.steps=2", "evals.val.every=0", "evals.val.max_examples=4")
        assert loop.train(config, workdir) == 0
        yield workdir


def test_a_run_shows_pictures_without_a_merge_map(run):
    model = simvlg_jax.load(run)
    explained = model.explain(PICTURES[0], "red")
    assert explained.layers == [] and [text for text, _ in explained.tokens][:3] == ["r", "e", "d"]
    assert set(model.params["connector"]["layer_0"]) > {"cross_query", "query_mlp"}
    assert not {"mlp", "cross_query"} & set(model.params["connector"]["layer_1"])
    data = EvalData(model.config.evals.val, model.task, model.config, meshes.make_mesh(model.config.mesh))
    shown = Gallery(data, model.task, 0)(model.params, [0])
    assert shown[0]["source_map"] is None and shown[0]["layers"] == []
    with pytest.raises(UserError, match="merges no tokens"):
        model.with_merging(merges=[6])
    with pytest.raises(UserError, match=r"connector\.tokens is for tomeformer, pool"):
        model.with_merging(tokens=6)
    looks = Looks(model)
    assert not looks.merges and looks.own == looks.least == looks.most == model.config.connector.queries


def test_export_is_what_transformers_and_lavis_read(run, tmp_path):
    trained = simvlg_jax.load(run, checkpoint="latest")
    model, params = trained.task.model, trained.params
    latest = ("--workdir", run, "--checkpoint", "latest")
    assert call(to_torch, *latest, "--format", "hf", "--output", tmp_path / "hf") == 0
    exported, report = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    pixels = pixels_of(model, PICTURES)
    with torch.no_grad():
        features = with_our_epsilon(exported.eval()).get_image_features(pixels, return_dict=True)
    prefix = model.apply({"params": params}, PICTURES, method="encode_image").prefix
    assert golden_numbers.relative(prefix, features.pooler_output.numpy()) < 1e-5
    text = trained.task.batch.texts["caption"].encoder
    captioner = Captioner(model, text, Decoding(max_new_tokens=12))
    ours = captioner.decode(np.asarray(captioner(params, jnp.asarray(PICTURES)).ids))
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.num_query_tokens == QUERIES and processor.image_processor.size["height"] == 32
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY == exported.config.image_token_index
    generated = exported.generate(pixels, max_new_tokens=12, do_sample=False)
    assert [[x.strip()] for x in processor.batch_decode(generated, skip_special_tokens=True)] == ours

    path = tmp_path / "lavis.pth"
    assert call(to_torch, *latest, "--format", "evlgen", "--output", path) == 0
    kept = torch.load(path, weights_only=True)["model"]
    assert {"query_tokens", "ln_vision.weight", "opt_proj.bias"} <= set(kept)
    task = build_task(config_of("llm.size=opt_roomy", f"train.init_from={path}"))
    loaded = task.load_pretrained(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))
    jax.tree.map(np.testing.assert_array_equal, loaded, {name: jax.device_get(params[name]) for name in loaded})
    assert set(loaded) == {"ln_vision", "connector", "llm_proj"}


def test_what_blip2_cannot_be_says_so(tmp_path):
    for flags, message in (
        ([], "all 98 tokens of the language model are in use"),
        (["llm.start_first=True"], "before the start token"),
        (["vit.size=siglip_tiny"], "EVA's vision encoder"),
        (["vit.tokens=9"], "without merging"),
    ):
        task = build_task(config_of(*flags))
        text = task.batch.texts["caption"].encoder
        with pytest.raises(UserError, match=message):
            WRITERS["qformer"](tmp_path, task.model, {}, text, None)


def test_second_stage_of_lavis_gives_the_connector_and_the_norm_before_it(capsys):
    sizes = json.loads((GOLDEN / "qformer_opt.json").read_text())
    tensors = load_file(GOLDEN / "qformer_opt.safetensors")
    connector = golden_numbers.build_qformer(sizes)
    wanted = evlgen.from_evlgen(check_golden.build(sizes, 1), tensors)
    loaded = qformer.load(str(GOLDEN / "qformer_opt.safetensors"), connector)
    assert set(loaded) == {"connector", "ln_vision"}
    for name, tree in loaded.items():
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, tree), wanted[name])
    assert not capsys.readouterr().err


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return bert.attention(x, num_heads=2, drop=Dropout(0.0), epsilon=1e-12, dtype=jnp.float32)[0]


def test_bert_gives_self_attention_and_leaves_the_rest_random(tmp_path):
    source = randomize(
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50)
        )
    )
    source.save_pretrained(tmp_path)
    task = build_task(config_of(f"connector.weights={tmp_path}"))
    abstract = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    loaded = task.load_pretrained(abstract)["connector"]
    assert set(loaded) == {"norm", "layer_0", "layer_1"}
    assert set(loaded["layer_0"]) == {"query", "key", "value", "attention_out", "attention_norm"}
    x = np.random.default_rng(0).normal(size=(2, QUERIES, 32)).astype(np.float32)
    with torch.no_grad():
        wanted = source.encoder.layer[0].attention(torch.from_numpy(x))[0].numpy()
    found = SelfAttention().apply({"params": jax.tree.map(jnp.asarray, loaded["layer_0"])}, x)
    assert golden_numbers.relative(found, wanted) < 1e-5


def test_merged_equal_tokens_draw_the_attention_of_all_their_patches():
    connector = QFormer(32, 2, 2, queries=3)
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(2, 4, 24)).astype(np.float32)[:, [0, 1, 1, 2, 3, 3, 3]]
    merged = whole[:, [0, 1, 3, 4]]
    source_map = np.array([[0, 1, 1, 2, 3, 3, 3]] * 2, np.int32)
    apply = jax.jit(connector.apply)
    params = nn.unbox(jax.jit(connector.init)(jax.random.key(0), whole))
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape), params)
    found = apply(params, merged, source_map)
    np.testing.assert_allclose(found.tokens, apply(params, whole).tokens, rtol=1e-5, atol=1e-5)
    assert found.source_map is None and found.layers == ()
    assert np.abs(found.tokens - apply(params, merged).tokens).max() > 1e-3


@pytest.mark.parametrize("connector", ["qformer", "tomeformer"])
def test_recomputing_layers_changes_no_number(connector):
    """The dropout masks are the same too."""
    visual = np.random.default_rng(0).normal(size=(2, 17, 32)).astype(np.float32)
    outcomes = []
    for remat in (False, True):
        config = config_of(f"connector.type={connector}", f"connector.remat={remat}")
        model = build_task(config).model.connector
        params = nn.unbox(jax.jit(model.init)(jax.random.key(0), visual))

        def loss(params, model=model):
            return jnp.square(model.apply(params, visual, rngs={"dropout": jax.random.key(1)}).tokens).sum()

        outcomes.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4), *outcomes)


def test_keys_of_merging_are_refused():
    for flag in ("tokens=5", "r=3", "weighted_mean=True"):
        with pytest.raises(UserError, match=r"is for tomeformer.*: leave it at .* with connector\.type='qformer'"):
            build_task(config_of(f"connector.{flag}"))
    with pytest.raises(UserError, match=r"connector\.size is 'huge'"):
        build_task(config_of("connector.size=huge"))
