"""The parts of a model, and its texts, from a config."""

from collections.abc import Collection

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from simvlg_jax.config import defaults
from simvlg_jax.config.check import lookup
from simvlg_jax.convert import encoders, families, tokenizers
from simvlg_jax.convert.connectors import CONNECTORS
from simvlg_jax.convert.tensor_files import SUFFIXES
from simvlg_jax.data import text
from simvlg_jax.data.batch import TextSpec
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.models.encoders.frames import WAYS, Frames
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.models.pformer import PFormer
from simvlg_jax.models.sentence_encoder import SentenceEncoder
from simvlg_jax.tasks import params
from simvlg_jax.utils.errors import UserError

BERT_VOCABULARY = 30522  # of bert-base-uncased, also MiniLM's


def build_vit(config: ConfigDict) -> ViT:
    return encoders.build(config.vit, jnp.dtype(config.dtype))


def build_llm(config: ConfigDict) -> nn.Module:
    llm = config.llm
    family = families.of_size(llm.size)
    options = dict(scan=llm.scan, remat=llm.remat, dtype=jnp.dtype(config.dtype))
    if llm.dropout:
        if not hasattr(family.module, "dropout"):
            raise UserError(f"llm.dropout is {llm.dropout} and {llm.size} has no dropout: set it to 0", 2)
        options["dropout"] = llm.dropout
    return family.module(**family.sizes[llm.size], **options)


def build_frames(config: ConfigDict) -> Frames:
    """How the frames of a config's clips are joined. A typo in `video.frames_as` raises UserError (status 2)."""
    lookup(WAYS, "video.frames_as", config.video.frames_as)
    return Frames(config.data.frames, config.video.frames_as, config.video.tokens)


def build_connector(config: ConfigDict, vit: ViT) -> Connector:
    """The connector for the tokens of a vision encoder; with budgets and without `tokens`, of the largest budget."""
    connector = config.connector.copy_and_resolve_references()
    kind = lookup(CONNECTORS, "connector.type", connector.type)
    for key, off in defaults.get_config().connector.items():
        if not off and connector[key] and key not in ("weights", *kind.keys):
            owners = ", ".join(name for name, each in CONNECTORS.items() if key in each.keys)
            raise UserError(
                f"connector.{key} is for {owners}: leave it at {off!r} with connector.type={connector.type!r}", 2
            )
    connector.tokens = connector.tokens or max(connector.budgets, default=0)
    try:
        return kind.build(connector, build_frames(config).seen(vit), jnp.dtype(config.dtype))
    except ValueError as error:
        raise UserError(str(error), 2) from error


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
    size = lookup(BERT_SIZES, "sentence_encoder.size", sentence.size)
    return SentenceEncoder(**size, pooling=sentence.pooling, dtype=dtype)


def build_pformer(config: ConfigDict, prompt_width: int, dropout: float = 0.0) -> PFormer:
    """The P-Former for a language model of a width; without a tokenizer, over that model's tokens and a [MASK].

    Raises:
      UserError (status 2): no such size, or no tokenizer is named.
    """
    own = config.pformer
    if own.weights.endswith(SUFFIXES) and not own.tokenizer:
        raise UserError("pformer.weights is a file without a tokenizer: set pformer.tokenizer to a BERT's folder", 2)
    of_llm = not pformer_tokenizer(config)
    return PFormer(
        **lookup(BERT_SIZES, "pformer.size", own.size),
        prompt_width=prompt_width,
        queries=own.queries,
        vocab_size=build_text_encoder(config).tokenizer.get_vocab_size() + 1 if of_llm else BERT_VOCABULARY,
        dropout=dropout,
        dtype=jnp.dtype(config.dtype),
    )


def pformer_tokenizer(config: ConfigDict) -> str:
    """The name of the P-Former's tokenizer; "" for the language model's."""
    return config.pformer.tokenizer or config.pformer.weights


def build_sentence_text(config: ConfigDict, tokenizer: str) -> text.TextEncoder:
    """Captions as the tokens of a BERT, which a name tells; without a name, as the language model's."""
    if not tokenizer:
        return build_text_encoder(config)
    return text.SentenceText(tokenizers.load_sentence_tokenizer(tokenizer), config.llm.max_text_tokens)


def caption_spec(config: ConfigDict) -> TextSpec:
    """The captions that the language model learns to write."""
    return TextSpec(config.llm.max_text_tokens, True, lambda: build_text_encoder(config))


def sentence_spec(config: ConfigDict, tokenizer: str) -> TextSpec:
    """The captions that a BERT reads, see `build_sentence_text`."""
    return TextSpec(config.llm.max_text_tokens, False, lambda: build_sentence_text(config, tokenizer))


def check_shapes(loaded: dict[str, dict], abstract: dict, absent: Collection[str] = ()) -> None:
    """Raises UserError with every loaded array whose shape is not the model's.

    Args:
      absent: parts of a loaded module that may be missing, beside what video adds to an image model.
    """
    optional = {*params.OF_VIDEO, *absent}
    wanted = traverse_util.flatten_dict({name: abstract[name] for name in loaded if name in abstract}, sep="/")
    found = traverse_util.flatten_dict(loaded, sep="/")
    wrong = [
        f"{name}: model {getattr(wanted.get(name), 'shape', 'has none')}, weights {np.shape(found.get(name))}"
        for name in sorted(set(wanted) | set(found))
        if (name not in found and optional.isdisjoint(name.split("/")))
        or (name in found and (name not in wanted or wanted[name].shape != np.shape(found[name])))
    ]
    if wrong:
        raise UserError("the weights are of another architecture than the config:\n  " + "\n  ".join(wrong))
