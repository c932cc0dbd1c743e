"""What is trained: SimVLG's captioning, or the contrastive pre-training of its vision encoder.

A task binds a model to its losses, its text, its pre-trained weights and the split of its parameters into
trained and frozen. The loop, the checkpoints and the step know only this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from simvlg_jax.convert import families, pretrained, tokenizers
from simvlg_jax.data import text
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.connectors.token_merging import merge_schedule, schedule_down_to
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.models.contrastive import ContrastiveViT, Pair
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.models.sentence_encoder import SentenceEncoder
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import UserError


class Losses(NamedTuple):
    """What a task makes of a batch.

    Attributes:
      losses: (B,) summed over each example's targets.
      counts: (B,) number of targets.
      pair: the embeddings that `Task.contrast` compares, if there is one; not in evaluation.
    """

    losses: jax.Array
    counts: jax.Array
    pair: Pair | None = None


@dataclass(frozen=True)
class Contrast:
    """A loss that compares every example of the global batch with all others.

    Attributes:
      weight: of its mean over the examples, beside the mean of `Losses` over the targets.
      embed: (params, batch, dropout key) -> the pair that `Task.losses` gives for the same, without the losses.
      losses: (params, picture (B, S), text (B, S)) -> (B,), B the global batch.
      counts: batch -> `Losses.counts`.
    """

    weight: float
    embed: Callable[[dict, dict, jax.Array], Pair]
    losses: Callable[[dict, jax.Array, jax.Array], jax.Array]
    counts: Callable[[dict], jax.Array]


@dataclass(frozen=True)
class Task:
    """A model and how it is trained.

    Attributes:
      model: the Linen module.
      is_trained: whether the parameter at a path, ("connector", "layer_0", ...), is trained; else it is frozen.
      init: key -> parameters, boxed with their logical axes.
      losses: (params, batch, dropout key, or None in evaluation) -> `Losses`.
      load_pretrained: abstract parameters -> {top-level name: lazy or host arrays} of those with named weights.
      image_size: side of the pictures, pixels.
      sources: top-level name -> where its frozen weights come from, in words.
      max_tokens: longest text, tokens.
      load_text: gives `text_encoder`.
      load_sentence_text: gives `sentence_encoder`, if there is one.
      contrast: the loss across examples, if there is one.
    """

    model: nn.Module
    is_trained: Callable[[tuple[str, ...]], bool]
    init: Callable[[jax.Array], dict]
    losses: Callable[[dict, dict, jax.Array | None], Losses]
    load_pretrained: Callable[[dict], dict]
    image_size: int
    sources: dict[str, str]
    max_tokens: int
    load_text: Callable[[], text.TextEncoder]
    load_sentence_text: Callable[[], text.TextEncoder] | None = None
    contrast: Contrast | None = None

    @cached_property
    def text_encoder(self) -> text.TextEncoder:
        """Caption -> token ids and targets; reads the tokenizer, which compiling does not need."""
        return self.load_text()

    @cached_property
    def sentence_encoder(self) -> text.TextEncoder | None:
        """Caption -> token ids of the auxiliary contrastive loss, if there is one."""
        return self.load_sentence_text and self.load_sentence_text()


def build_task(config: ConfigDict) -> Task:
    """The task that `config.task` names."""
    return {"caption": caption_task, "contrastive": contrastive_task}[config.task](config)


def row(table: dict, key: str, name: str) -> dict:
    if name not in table:
        raise UserError(f"{key} is {name!r}; it takes {', '.join(map(repr, table))}", 2)
    return table[name]


def build_vit(config: ConfigDict) -> ViT:
    vit = config.vit
    return ViT(
        **row(VIT_SIZES, "vit.size", vit.size),
        temporal=vit.temporal,
        max_frames=vit.max_frames,
        scan=vit.scan,
        remat=vit.remat,
        dtype=jnp.dtype(config.dtype),
    )


def build_llm(config: ConfigDict) -> nn.Module:
    llm = config.llm
    family = families.of_size(llm.size)
    options = dict(scan=llm.scan, remat=llm.remat, dtype=jnp.dtype(config.dtype))
    if llm.dropout:
        if not hasattr(family.module, "dropout"):
            raise UserError(f"llm.dropout is {llm.dropout} and {llm.size} has no dropout: set it to 0", 2)
        options["dropout"] = llm.dropout
    return family.module(**family.sizes[llm.size], **options)


def build_connector(config: ConfigDict, num_tokens: int) -> TomeFormer:
    """The TomeFormer for `num_tokens` visual tokens, with the schedule that the config asks for."""
    connector = config.connector
    size = row(BERT_SIZES, "connector.size", connector.size)
    if connector.r and connector.tokens:
        raise UserError("connector.r and connector.tokens are two ways to say one thing: set one of them to 0", 2)
    try:
        if connector.tokens:
            merges = schedule_down_to(size["depth"], num_tokens, connector.tokens)
        elif connector.r:
            ramp = {"r": connector.r, "inflect": connector.inflect} if connector.inflect else connector.r
            merges = merge_schedule(size["depth"], ramp)
        else:
            merges = merge_schedule(size["depth"], tuple(connector.merges))
    except ValueError as error:
        raise UserError(f"connector.{'tokens' if connector.tokens else 'merges'}: {error}", 2) from error
    return TomeFormer(
        **size,
        merges=merges,
        dropout=connector.dropout,
        weighted_mean=connector.weighted_mean,
        proportional_attention=connector.proportional_attention,
        dtype=jnp.dtype(config.dtype),
    )


def build_model(config: ConfigDict) -> SimVLG:
    """SimVLG in the sizes of a config."""
    vit = build_vit(config)
    return SimVLG(
        vit,
        build_connector(config, vit.num_tokens),
        build_llm(config),
        jnp.dtype(config.dtype),
        start_first=config.llm.start_first,
        vit_grad=config.vit.train or config.vit.temporal,
        sentence_encoder=build_sentence_encoder(config) if config.train.beta else None,
    )


def build_text_encoder(config: ConfigDict) -> text.TextEncoder:
    """Captions as the language model's tokens."""
    llm, (tokenizer, *ids) = config.llm, tokenizers.load_text(config)
    return text.CaptionText(
        tokenizer, *ids, max_tokens=llm.max_text_tokens, start_is_target=llm.start_is_target, prompt=llm.prompt
    )


def build_sentence_encoder(config: ConfigDict) -> SentenceEncoder:
    """The frozen encoder of the contrastive losses; a tiny one, over the caption's own tokens, without weights."""
    sentence, dtype = config.sentence_encoder, jnp.dtype(config.dtype)
    if not sentence.weights:
        vocab_size = build_text_encoder(config).tokenizer.get_vocab_size()
        return SentenceEncoder(**BERT_SIZES["tiny"], vocab_size=vocab_size, dtype=dtype)
    size = row(BERT_SIZES, "sentence_encoder.size", sentence.size)
    return SentenceEncoder(**size, pooling=sentence.pooling, dtype=dtype)


def build_sentence_text(config: ConfigDict) -> text.TextEncoder:
    """Captions as the sentence encoder's tokens."""
    if not config.sentence_encoder.weights:
        return build_text_encoder(config)
    return text.SentenceText(
        tokenizers.load_sentence_tokenizer(config.sentence_encoder.weights), config.llm.max_text_tokens
    )


def caption_task(config: ConfigDict) -> Task:
    """SimVLG: by default only the connector, ln_vision and the two projections are trained."""
    model = build_model(config)
    side, beta = model.vit.image_size, config.train.beta

    def losses(params: dict, batch: dict, key: jax.Array | None) -> Losses:
        inputs = [batch[name] for name in ("image", "ids", "mask", "targets")]
        if key is None:
            return Losses(*model.apply({"params": params}, *inputs, method="caption_losses"))
        options = dict(rngs={"dropout": key})
        if not beta:
            return Losses(*model.apply({"params": params}, *inputs, method="caption_losses", **options))
        inputs += [batch["sentence_ids"], batch["sentence_mask"]]
        return Losses(*model.apply({"params": params}, *inputs, method="losses_and_pair", **options))

    def embed(params: dict, batch: dict, key: jax.Array) -> Pair:
        inputs = [batch[name] for name in ("image", "sentence_ids", "sentence_mask")]
        options = dict(rngs={"dropout": key})
        return model.apply({"params": params}, *inputs, method="embed_pair", **options)

    def counts(batch: dict) -> jax.Array:
        return jnp.sum(batch["targets"] >= 0, 1, dtype=jnp.float32)

    def init(key: jax.Array) -> dict:
        token = jnp.ones((1, 1), jnp.int32)
        image = jnp.zeros((1, side, side, 3), jnp.uint8)
        inputs, method = [image, token, token, token], "caption_losses"
        if beta:
            inputs, method = [*inputs, token, token], "losses_and_pair"
        return model.init(key, *inputs, method=method)["params"]

    def load_pretrained(abstract: dict) -> dict:
        loaded = {}
        if config.vit.weights:
            loaded["vit"] = pretrained.load_vit(config.vit.weights, model.vit)
        if config.connector.weights:
            loaded["connector"] = pretrained.load_bert(config.connector.weights, config.connector.size)
        if config.llm.weights:
            loaded["llm"] = pretrained.load_llm(config.llm.weights, model.llm)
        if beta and config.sentence_encoder.weights:
            loaded["sentence_encoder"] = pretrained.load_sentence_encoder(config.sentence_encoder)
        if config.train.init_from:
            loaded = partition.join(loaded, pretrained.load_published(config.train.init_from, model))
        check_shapes(loaded, abstract)
        return loaded

    frozen = [name for name in ("vit", "llm") if not config[name].train] + ["sentence_encoder"] * bool(beta)

    def is_trained(path: tuple[str, ...]) -> bool:
        return partition.is_trained(path, frozen)

    sources = {name: config[name].weights or config.train.init_from or "random" for name in frozen}
    return Task(
        model,
        is_trained,
        init,
        losses,
        load_pretrained,
        side,
        sources,
        config.llm.max_text_tokens,
        lambda: build_text_encoder(config),
        (lambda: build_sentence_text(config)) if beta else None,
        Contrast(beta, embed, contrastive_losses(model), counts) if beta else None,
    )


def contrastive_task(config: ConfigDict) -> Task:
    """The ViT and two projections are trained against a frozen sentence encoder."""
    named = config.sentence_encoder.weights
    vit = build_vit(config)
    dtype = jnp.dtype(config.dtype)
    sentences = build_sentence_encoder(config)
    model = ContrastiveViT(vit, sentences, dtype=dtype)

    def embed(params: dict, batch: dict, key: jax.Array | None) -> Pair:
        del key  # nothing in this model is random
        return model.apply({"params": params}, batch["image"], batch["ids"], batch["mask"])

    def counts(batch: dict) -> jax.Array:
        return jnp.ones(batch["image"].shape[0])

    def losses(params: dict, batch: dict, key: jax.Array | None) -> Losses:
        ones = counts(batch)
        return Losses(jnp.zeros_like(ones), ones, embed(params, batch, key))

    def init(key: jax.Array) -> dict:
        token = jnp.ones((1, 1), jnp.int32)
        return model.init(key, jnp.zeros((1, vit.image_size, vit.image_size, 3), jnp.uint8), token, token)["params"]

    def load_pretrained(abstract: dict) -> dict:
        loaded = {"sentence_encoder": pretrained.load_sentence_encoder(config.sentence_encoder)} if named else {}
        if config.vit.weights:
            loaded["vit"] = pretrained.load_vit(config.vit.weights, vit)
        check_shapes(loaded, abstract)
        return loaded

    sources = {"sentence_encoder": named or "random"}

    def is_trained(path: tuple[str, ...]) -> bool:
        return path[0] != "sentence_encoder"

    return Task(
        model,
        is_trained,
        init,
        losses,
        load_pretrained,
        vit.image_size,
        sources,
        config.llm.max_text_tokens,
        lambda: build_sentence_text(config),
        contrast=Contrast(1.0, embed, contrastive_losses(model), counts),
    )


def contrastive_losses(model: nn.Module) -> Callable[[dict, jax.Array, jax.Array], jax.Array]:
    """A model's method of that name, for `Contrast`."""
    return lambda params, picture, text: model.apply({"params": params}, picture, text, method="contrastive_losses")


def check_shapes(loaded: dict[str, dict], abstract: dict) -> None:
    """Raises UserError with every loaded array whose shape is not the model's.

    Of a loaded module only what video adds to an image model may be missing.
    """
    wanted = traverse_util.flatten_dict({name: abstract[name] for name in loaded}, sep="/")
    found = traverse_util.flatten_dict(loaded, sep="/")
    wrong = [
        f"{name}: model {getattr(wanted.get(name), 'shape', 'has none')}, weights {np.shape(found.get(name))}"
        for name in sorted(set(wanted) | set(found))
        if (name not in found and partition.TEMPORAL.isdisjoint(name.split("/")))
        or (name in found and (name not in wanted or wanted[name].shape != np.shape(found[name])))
    ]
    if wrong:
        raise UserError("the weights are of another architecture than the config:\n  " + "\n  ".join(wrong))
