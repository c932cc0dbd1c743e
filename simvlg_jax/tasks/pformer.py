"""The P-Former of BLIText (arXiv 2307.07063): captions alone teach it to prompt the frozen language model."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simvlg_jax.convert import own_files, pformer, pretrained
from simvlg_jax.data.batch import BatchSpec
from simvlg_jax.models.contrastive import Pair
from simvlg_jax.models.pformer import MASKED, PromptLearner, Texts
from simvlg_jax.tasks import build, params
from simvlg_jax.tasks.params import Rule
from simvlg_jax.tasks.task import CONTRAST, Arrays, Contrast, Losses, Params, Task
from simvlg_jax.utils.errors import UserError

SENTENCE = ("sentence_ids", "sentence_mask")
CAPTION = ("caption_ids", "caption_mask", "caption_targets")
FILE = "pformer.safetensors"  # what a run leaves
MASK_ID = 103  # of bert-base-uncased, also MiniLM's


def pformer_task(config: ConfigDict) -> Task:
    """The sum of three losses: captions are told apart, prompts lie near words, and the language model writes them.

    Batches have no pictures. The evaluation asks how often a caption with masked words is nearest to the whole one.
    When a run ends, what it trained is written to pformer.safetensors.
    """
    check(config)
    tokenizer = build.pformer_tokenizer(config)
    llm, dtype = build.build_llm(config), jnp.dtype(config.dtype)
    own = build.build_pformer(config, llm.width, config.pformer.dropout)
    mask_id = MASK_ID if tokenizer else own.vocab_size - 1
    model = PromptLearner(own, llm, mask_id, start_first=config.llm.start_first, dtype=dtype)

    def apply(method: str, params: Params, key: jax.Array | None, *arrays):
        options = {} if key is None else dict(rngs={"dropout": key})
        return model.apply({"params": params}, *arrays, method=method, **options)

    def draw(batch: Arrays, key: jax.Array | None) -> jax.Array:
        key = jax.random.key(0) if key is None else key  # an evaluation always masks the same
        return jax.random.bernoulli(jax.random.fold_in(key, 1), MASKED, batch["sentence_ids"].shape)

    def losses(params: Params, batch: Arrays, key: jax.Array | None) -> Losses:
        texts = Texts(*(batch[name] for name in CAPTION))
        sentence = (batch[name] for name in SENTENCE)
        values, embedded = apply("losses", params, key, *sentence, draw(batch, key), texts)
        values["vq"] *= batch["weight"]
        return Losses(values, Pair(embedded, embedded))

    def embed_masked(params: Params, batch: Arrays, key: jax.Array | None) -> jax.Array:
        ids, mask = (batch[name] for name in SENTENCE)
        return apply("embed", params, key, model.masked(ids, mask, draw(batch, key)), mask)

    def embed(params: Params, batch: Arrays, key: jax.Array | None) -> Pair:
        embedded = embed_masked(params, batch, key)
        return Pair(embedded, embedded)

    def embed_both(params: Params, batch: Arrays, key: jax.Array | None) -> Pair:
        whole = apply("embed", params, key, *(batch[name] for name in SENTENCE))
        return Pair(embed_masked(params, batch, key), whole)

    def contrastive_losses(params: Params, own: jax.Array, others: jax.Array, weight: jax.Array) -> jax.Array:
        return apply("contrastive_losses", params, None, own, others, weight)

    def counts(batch: Arrays, training: bool) -> dict[str, jax.Array]:
        written = jnp.sum(batch["caption_targets"] >= 0, 1, dtype=jnp.float32)
        return {"vq": batch["weight"], "lm": written}

    def initialize(key: jax.Array, batch: Arrays) -> Params:
        texts = Texts(*(batch[name] for name in CAPTION))
        sentence = (batch[name] for name in SENTENCE)
        return model.init(key, *sentence, draw(batch, None), texts, method="losses")["params"]

    def load_pretrained(abstract: Params) -> Params:
        loaded = pformer.load(config.pformer.weights, own) if config.pformer.weights else {}
        if config.llm.weights:
            loaded["llm"] = pretrained.load_llm(config.llm.weights, llm)
        build.check_shapes(loaded, abstract, pformer.ABSENT)
        return loaded

    texts = {"caption": build.caption_spec(config), "sentence": build.sentence_spec(config, tokenizer)}
    return Task(
        model=model,
        batch=BatchSpec(None, texts),
        rules=(
            *params.trained("pformer"),
            *params.trained("text_proj"),
            Rule("temperature", trained=True),
            *params.frozen("llm/.*"),
        ),
        initialize=initialize,
        losses=losses,
        counts=counts,
        weights={CONTRAST: 1.0, "vq": 1.0, "lm": 1.0},
        load_pretrained=load_pretrained,
        sources={"llm": config.llm.weights or "random"},
        evaluator="retrieval",
        contrast=Contrast(embed, contrastive_losses),
        ranking=Contrast(embed_both, contrastive_losses),
        after_run=write,
    )


def write(trained: Params, workdir: Path) -> None:
    own_files.write_tree(workdir / FILE, trained)


def check(config: ConfigDict) -> None:
    """Raises UserError (status 2) for what this task does not have."""
    for key in ("llm.train", "vit.train", "vit.temporal", "data.pack", "train.beta", "train.init_from"):
        group, name = key.split(".")
        if config[group][name]:
            raise UserError(f"{key} is for the caption task, and the task is pformer: leave it at its default", 2)
