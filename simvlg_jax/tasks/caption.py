"""SimVLG's one stage: captions teach the connector and its projections; ViT and language model are frozen."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simvlg_jax.convert import pformer, pretrained, tomeformer
from simvlg_jax.convert.connectors import CONNECTORS
from simvlg_jax.data.batch import BatchSpec, Pictures
from simvlg_jax.models.contrastive import Pair
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.models.token_weights import number_of_captions, shares, unguessed
from simvlg_jax.tasks import build, params
from simvlg_jax.tasks.params import Rule
from simvlg_jax.tasks.task import CONTRAST, Arrays, Contrast, Losses, Params, Task

PICTURE_AND_SENTENCE = ("image", "sentence_ids", "sentence_mask")
CAPTION = ("caption_ids", "caption_mask", "caption_targets")
PICTURE_AND_CAPTION = ("image", *CAPTION)
PICTURE_AND_PROMPTED = ("image", "pformer_ids", "pformer_mask")


def caption_task(config: ConfigDict) -> Task:
    """Next-token cross-entropy of the captions; with `train.beta` also the auxiliary contrastive loss.

    With `train.align` the soft prompts also learn to resemble those that a frozen P-Former makes of the caption
    (BLIText, arXiv 2307.07063), one by one. If they are not as many, the first ones are compared.
    """
    beta, align, power = config.train.beta, config.train.align, config.train.unguessed
    by_caption = config.train.mean_over == "captions"
    vit, llm = build.build_vit(config), build.build_llm(config)
    model = SimVLG(
        vit,
        build.build_connector(config, vit),
        llm,
        jnp.dtype(config.dtype),
        start_first=config.llm.start_first,
        vit_grad=config.vit.train or config.vit.temporal,
        llm_grad=config.llm.train,
        longest_text=config.llm.max_text_tokens,
        sentence_encoder=build.build_sentence_encoder(config) if beta else None,
        pformer=build.build_pformer(config, llm.width) if align else None,
        frames=build.build_frames(config),
        max_frames=config.video.max_frames,
    )

    def apply(method: str, params: Params, batch: Arrays, names: tuple[str, ...], key: jax.Array | None, **options):
        if key is not None:
            options["rngs"] = {"dropout": key}
        return model.apply({"params": params}, *(batch[name] for name in names), method=method, **options)

    def token_weights(params: Params, batch: Arrays, caption: tuple[str, ...]) -> jax.Array | None:
        """What each target counts in training, shaped like them; None: 1."""
        weights = None
        if power:
            weights = unguessed(apply("blind_losses", params, batch, caption, None), power)
        if by_caption:
            shared = shares(batch["caption_targets"], batch.get("caption_lengths"))
            weights = shared if weights is None else weights * shared
        return weights

    def losses(params: Params, batch: Arrays, key: jax.Array | None) -> Losses:
        caption = (*CAPTION, "caption_lengths") if "caption_lengths" in batch else CAPTION
        if key is None:
            return Losses({"caption": apply("caption_losses", params, batch, ("image", *caption), None)[0]})
        options = dict(weights=token_weights(params, batch, caption))
        if align:
            names = (*PICTURE_AND_PROMPTED, *caption)
            values, _, distances = apply("aligned_losses", params, batch, names, key, **options)
            return Losses({"caption": values, "align": distances * batch["weight"]})
        if beta:
            names = (*PICTURE_AND_SENTENCE, *caption)
            values, _, pair = apply("losses_and_pair", params, batch, names, key, **options)
            return Losses({"caption": values}, pair)
        return Losses({"caption": apply("caption_losses", params, batch, ("image", *caption), key, **options)[0]})

    def embed(params: Params, batch: Arrays, key: jax.Array | None) -> Pair:
        return apply("embed_pair", params, batch, PICTURE_AND_SENTENCE, key)

    def contrastive_losses(params: Params, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        return model.apply({"params": params}, picture, text, weight, method="contrastive_losses")

    def counts(batch: Arrays, training: bool) -> dict[str, jax.Array]:
        if training and by_caption:
            written = number_of_captions(batch["caption_targets"], batch.get("caption_lengths"))
        else:
            written = jnp.sum(batch["caption_targets"] >= 0, 1, dtype=jnp.float32)
        return {"caption": written} | ({"align": batch["weight"]} if align else {})

    def initialize(key: jax.Array, batch: Arrays) -> Params:
        method, first = "caption_losses", ("image",)
        if beta:
            method, first = "losses_and_pair", PICTURE_AND_SENTENCE
        elif align:
            method, first = "aligned_losses", PICTURE_AND_PROMPTED
        return model.init(key, *(batch[name] for name in (*first, *CAPTION)), method=method)["params"]

    texts = {"caption": build.caption_spec(config)}
    if beta:
        texts["sentence"] = build.sentence_spec(config, config.sentence_encoder.weights)
    if align:
        texts["pformer"] = build.sentence_spec(config, build.pformer_tokenizer(config))
    frozen = [name for name in ("vit", "llm") if not config[name].train]
    frozen += ["sentence_encoder"] * bool(beta) + ["pformer"] * bool(align)
    return Task(
        model=model,
        batch=BatchSpec(Pictures(vit.image_size, config.data.frames), texts),
        rules=caption_rules(config),
        initialize=initialize,
        losses=losses,
        counts=counts,
        weights={"caption": 1.0} | ({CONTRAST: beta} if beta else {}) | ({"align": align} if align else {}),
        load_pretrained=lambda abstract: load_pretrained(config, model, abstract),
        sources={name: config[name].weights or config.train.init_from or "random" for name in frozen},
        evaluator="captioning",
        contrast=Contrast(embed, contrastive_losses) if beta else None,
        captions=True,
        elastic=[caption_task(with_budget(config, tokens)) for tokens in sorted(config.connector.budgets)],
    )


def with_budget(config: ConfigDict, tokens: int) -> ConfigDict:
    """A copy of the config with one budget of visual tokens in place of all."""
    config = config.copy_and_resolve_references()
    config.connector.update(tokens=tokens, budgets=())
    return config


def caption_rules(config: ConfigDict) -> tuple[Rule, ...]:
    """By default connector, ln_vision and projections are trained, as published, and in video the temporal merging."""
    lr = config.optimizer.lr_multipliers
    rules = []
    for name in ("ln_vision", "llm_proj"):
        rules += params.trained(name, lr[name])
    rules += [
        *params.trained("connector/vl_proj", lr.vl_proj),
        *params.trained("connector(?!/vl_proj/)", lr.connector),
    ]
    rules += params.trained("llm", lr.llm) if config.llm.train else params.frozen("llm/.*")
    if config.vit.train:
        rules += params.trained("vit", lr.vit)
    else:
        rules += params.frozen("vit/(?!(.*/)?temporal_(merge|position)).*")
        rules += params.trained("vit/(.*/)?temporal_merge", lr.vit)
        rules += [Rule("vit/temporal_position", trained=True, decay=True, lr=lr.vit)]
    rules += [Rule("frame_(embedding|weight)", trained=True, decay=True, lr=lr.vit)]
    if config.train.beta:
        for name in ("vision_proj", "text_proj"):
            rules += params.trained(name, lr.get(name, 1.0))
        rules += [Rule("temperature", trained=True, lr=lr.get("temperature", 1.0))]
        rules += params.frozen("sentence_encoder/.*")
    if config.train.align:
        rules += params.frozen("pformer/.*")
    return tuple(rules)


def load_pretrained(config: ConfigDict, model: SimVLG, abstract: Params) -> Params:
    """{top-level name: arrays} of every part whose weights the config names; a published checkpoint replaces them.

    Raises:
      UserError: weights that cannot be read, or are of another architecture.
    """
    loaded, kind = {}, CONNECTORS[config.connector.type]
    if config.vit.weights:
        loaded["vit"] = pretrained.load_vit(config.vit.weights, model.vit)
    if config.connector.weights:
        loaded |= kind.load(config.connector.weights, model.connector)
    if config.llm.weights:
        loaded["llm"] = pretrained.load_llm(config.llm.weights, model.llm)
    if config.train.beta and config.sentence_encoder.weights:
        loaded["sentence_encoder"] = pretrained.load_sentence_encoder(config.sentence_encoder)
    if config.train.align and config.pformer.weights:
        loaded["pformer"] = pformer.load(config.pformer.weights, model.pformer)["pformer"]
    if config.train.init_from:
        loaded = params.join(loaded, pretrained.load_published(config.train.init_from, model))
    absent = kind.absent if config.connector.weights and not config.train.init_from else ()
    build.check_shapes(loaded, abstract, absent)
    if config.connector.position_norm:
        loaded["connector"] = tomeformer.with_position_norm(loaded.get("connector", {}), config.connector.position_norm)
    return loaded
