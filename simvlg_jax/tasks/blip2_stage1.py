"""BLIP-2's first stage (arXiv 2301.12597): pictures and captions teach a Q-Former; there is no language model."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simvlg_jax.convert import blip2, own_files, pformer, pretrained
from simvlg_jax.convert.connectors import CONNECTORS
from simvlg_jax.convert.tensor_files import SUFFIXES
from simvlg_jax.data.batch import BatchSpec, Pictures
from simvlg_jax.models.blip2 import PAIRS, Blip2
from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.models.contrastive import Pair
from simvlg_jax.tasks import build, params
from simvlg_jax.tasks.params import Rule
from simvlg_jax.tasks.task import Arrays, Contrast, Losses, Params, Task
from simvlg_jax.utils.errors import UserError

INPUTS = ("image", "sentence_ids", "sentence_mask")
ALIGNED = ("pformer_ids", "pformer_mask")
FILE = "qformer.safetensors"  # what a run leaves for the second stage


def blip2_stage1_task(config: ConfigDict) -> Task:
    """The sum of three losses: contrast of pictures and captions, matching of pairs, and writing the caption.

    They are the means over the examples, the pairs and the tokens of the global batch. (The published code averages
    the processes' means of tokens.) Pictures and captions are compared with all others of a micro-batch, as published:
    with `train.accumulate` there are fewer of them. When a run ends, what it trained is written to qformer.safetensors,
    from which the caption task starts with `connector.weights`.

    With `train.align` the queries, projected to the language model's width, also learn to resemble the prompts that a
    frozen P-Former makes of the caption (BLIText, arXiv 2307.07063); the projection is in the file too.
    """
    tokenizer = config.connector.tokenizer or config.connector.weights
    vit = build.build_vit(config)
    connector = build.build_connector(config, vit)
    check(config, connector)
    words = build.BERT_VOCABULARY if tokenizer else build.build_text_encoder(config).tokenizer.get_vocab_size()
    align = config.train.align
    model = Blip2(
        vit,
        connector,
        vocab_size=words + 1,
        floor=config.train.negatives == "floored_softmax",
        dtype=jnp.dtype(config.dtype),
        pformer=build.build_pformer(config, build.build_llm(config).width) if align else None,
    )

    def losses(params: Params, batch: Arrays, key: jax.Array | None) -> Losses:
        options = {} if key is None else dict(rngs={"dropout": key})
        draw = jax.random.fold_in(jax.random.key(0) if key is None else key, 1)
        return Losses(model.apply({"params": params}, *arguments(batch, draw), method="losses", **options))

    def arguments(batch: Arrays, draw: jax.Array) -> tuple:
        sentence = tuple(batch[name] for name in ALIGNED) if align else None
        return *(batch[name] for name in (*INPUTS, "weight")), draw, None, sentence

    def counts(batch: Arrays, training: bool) -> dict[str, jax.Array]:
        weight = batch["weight"]
        written = jnp.maximum(batch["sentence_mask"].sum(1) - 1, 0)
        return {"itc": weight, "itm": PAIRS * weight, "lm": written * weight} | ({"align": weight} if align else {})

    def initialize(key: jax.Array, batch: Arrays) -> Params:
        return model.init(key, *arguments(batch, jax.random.key(0)), method="losses")["params"]

    def embed(params: Params, batch: Arrays, key: jax.Array | None) -> Pair:
        del key  # only evaluation embeds without the other losses
        return model.apply({"params": params}, *(batch[name] for name in INPUTS), method="embed")

    def itc_losses(params: Params, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        return model.apply({"params": params}, picture, text, weight, method="itc_losses")

    def load_pretrained(abstract: Params) -> Params:
        loaded = blip2.load(config.connector.weights, model) if config.connector.weights else {}
        if not align:
            loaded.pop("llm_proj", None)  # of an aligned first stage
        elif config.pformer.weights:
            loaded["pformer"] = pformer.load(config.pformer.weights, model.pformer)["pformer"]
        if config.vit.weights:
            loaded["vit"] = pretrained.load_vit(config.vit.weights, vit)
        build.check_shapes(loaded, abstract, CONNECTORS["qformer"].absent)
        return loaded

    lr = config.optimizer.lr_multipliers
    texts = {"sentence": build.sentence_spec(config, tokenizer)}
    rules = []
    if align:
        texts["pformer"] = build.sentence_spec(config, build.pformer_tokenizer(config))
        rules = [*params.trained("llm_proj", lr.llm_proj), *params.frozen("pformer/.*")]
    return Task(
        model=model,
        batch=BatchSpec(Pictures(vit.image_size), texts),
        rules=(
            *params.frozen("vit/.*"),
            *params.trained("ln_vision", lr.ln_vision),
            *params.trained("connector", lr.connector),
            *(rule for name in ("vision_proj", "text_proj", "itm_head", "lm_head") for rule in params.trained(name)),
            Rule("word|position", trained=True, decay=True),
            Rule("temperature", trained=True),
            *rules,
        ),
        initialize=initialize,
        losses=losses,
        counts=counts,
        weights={"itc": 1.0, "itm": 1.0, "lm": 1.0} | ({"align": align} if align else {}),
        load_pretrained=load_pretrained,
        sources={name: config[name].weights or "random" for name in ("vit", "pformer")[: 1 + bool(align)]},
        evaluator="retrieval",
        ranking=Contrast(embed, itc_losses),
        after_run=write,
    )


def write(trained: Params, workdir: Path) -> None:
    own_files.write_tree(workdir / FILE, trained)


def check(config: ConfigDict, connector: object) -> None:
    """Raises UserError (status 2) for what this stage does not have, and if no tokenizer is named."""
    if config.connector.weights.endswith(SUFFIXES) and not config.connector.tokenizer:
        raise UserError(
            "connector.weights is a file without a tokenizer: set connector.tokenizer to a BERT's folder", 2
        )
    if not isinstance(connector, QFormer):
        raise UserError("the task blip2_stage1 trains a Q-Former: set connector.type=qformer", 2)
    for key in ("vit.train", "vit.temporal", "data.pack", "train.beta", "train.init_from"):
        group, name = key.split(".")
        if config[group][name]:
            raise UserError(f"{key} is for the caption task, and the task is blip2_stage1: leave it at its default", 2)
