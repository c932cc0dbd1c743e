"""The first stage of BLIP-2 (arXiv 2301.12597, section 3.2): a Q-Former learns from pictures and captions without LLM.

Three losses share its layers. ITC compares pictures and captions, ITM tells whether a pair belongs together, and LM
writes the caption after the queries.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import contrastive, layers
from simvlg_jax.models.bert import MAX_POSITIONS
from simvlg_jax.models.connectors.qformer import QFormerStates
from simvlg_jax.models.contrastive import LEFT_OUT, Pair
from simvlg_jax.models.encoders.vit import visual_tokens
from simvlg_jax.models.losses import prompt_distances, token_cross_entropy

LABELS = np.array([1, 0, 0])  # of the pairs that ITM classifies: its own, with another picture, with another caption
PAIRS = len(LABELS)
SMOOTHING = 0.1  # of LM's targets
FLOOR = 1e-4  # added to the probability of every negative by the older code


@struct.dataclass
class Features:
    """What ITC compares, and what the other two losses need of it.

    Attributes:
      visual: (B, N, C), the visual tokens after LayerNorm.
      queries: the Q-Former's states of the picture alone, (B, Q, D).
      text: its states of the caption alone, (B, L, D).
      pair: pictures (B, Q, S), an embedding of each query; captions (B, S); unit vectors in float32.
    """

    visual: jax.Array
    queries: QFormerStates
    text: QFormerStates
    pair: Pair


@struct.dataclass
class Negatives:
    """Of each example the row of another: whose picture its caption gets, and whose caption its picture gets.

    Attributes:
      image, text: (B,) int32.
    """

    image: jax.Array
    text: jax.Array


class LmHead(nn.Module):
    """BERT's layer before the vocabulary: (B, L, D) -> (B, L, D), and the bias (V,) of the logits."""

    vocab_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bias = self.param("bias", layers.partitioned(nn.initializers.zeros, "vocab"), (self.vocab_size,))
        x = layers.dense(x.shape[-1], x.shape[-1], ("embed", "mlp"), dtype=self.dtype, name="dense")(x)
        return layers.LayerNorm(1e-12, name="norm")(layers.gelu(x)), bias


class Blip2(nn.Module):
    """Frozen ViT -> ln_vision -> Q-Former, through which captions go too, and the heads of three losses.

    Parameters: vit, ln_vision, connector, word, position, vision_proj, text_proj, itm_head, lm_head, temperature. Those
    of ln_vision and connector are the ones of a captioner (`SimVLG`), which lacks the text's MLPs in each layer. With a
    P-Former, whose prompts the projected queries are to resemble, there are also pformer and llm_proj.

    Attributes:
      vit: a `ViT`.
      connector: a `QFormer`.
      vocab_size: V, with the token [DEC], the last one, that starts a caption to be written.
      max_positions: of a caption.
      shared_width: S, the width of the embeddings that ITC compares.
      floor: whether negatives are drawn as before July 2023, see `negative_logits`.
      pformer: a frozen `PFormer`, or None.
    """

    vit: nn.Module
    connector: nn.Module
    vocab_size: int
    max_positions: int = MAX_POSITIONS
    shared_width: int = 256
    floor: bool = False
    dtype: DTypeLike = jnp.float32
    pformer: nn.Module | None = None

    def setup(self) -> None:
        width, axes, dtype = self.connector.width, ("embed", "mlp"), self.dtype
        self.ln_vision = layers.LayerNorm(1e-5)
        words = layers.partitioned(layers.NORMAL_INIT, "vocab", "embed")
        self.word = self.param("word", words, (self.vocab_size, width))
        positions = layers.partitioned(layers.NORMAL_INIT, None, "embed")
        self.position = self.param("position", positions, (self.max_positions, width))
        self.vision_proj = layers.torch_dense(width, self.shared_width, axes, dtype=dtype)
        self.text_proj = layers.torch_dense(width, self.shared_width, axes, dtype=dtype)
        self.itm_head = layers.torch_dense(width, 2, ("embed", None), dtype=dtype)
        self.lm_head = LmHead(self.vocab_size, dtype)
        if self.pformer is not None:
            self.llm_proj = layers.torch_dense(width, self.pformer.prompt_width, axes, dtype=dtype)
        self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())

    def losses(
        self,
        images: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        weight: jax.Array,
        key: jax.Array,
        negatives: Negatives | None = None,
        sentence: tuple[jax.Array, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Returns {"itc", "itm", "lm"}: the losses of each example, (B,) float32 nats; with a P-Former also "align".

        B is the whole batch on all devices: every row may be the negative of any other.

        Args:
          images: (B, H, W, 3) uint8.
          ids, mask: (B, L) int32, [CLS] caption [SEP], padded on the right.
          weight: (B,) float32, 1 or 0. A row of weight 0 has no loss and is no negative of others.
          key: of the draw of negatives.
          negatives: given instead of drawn.
          sentence: ids and mask (B, L') int32 of the captions for the P-Former.

        Returns:
          "itc" of one pair, "itm" summed over `PAIRS` pairs, "lm" summed over the tokens after [CLS]; "align", the
          `prompt_distances` of the projected queries and the P-Former's prompts.
        """
        features = self.features(images, ids, mask)
        to_text, to_image = self.similarities(features.pair)
        if negatives is None:
            negatives = draw_negatives(key, to_text, to_image, weight, self.floor)
        with jax.named_scope("itm"):
            logits = self.match(features.visual, ids, mask, negatives)
            itm = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(LABELS, logits.shape[:2]))
            alone = weight.sum() <= weight  # no other row can be the negative
            itm = jnp.where(weight > 0, itm[:, 0] + jnp.where(alone, 0.0, itm[:, 1:].sum(1)), 0.0)
        with jax.named_scope("lm"):
            lm = self.writing_losses(features.queries, ids, mask, weight)
        losses = {"itc": _itc(to_text, to_image, weight), "itm": itm, "lm": lm}
        if self.pformer is not None:
            distances = prompt_distances(self.llm_proj(features.queries.tokens), self.pformer(*sentence))
            losses["align"] = jnp.where(weight > 0, distances, 0.0)
        return losses

    def features(self, images: jax.Array, ids: jax.Array, mask: jax.Array) -> Features:
        """Returns what pictures and captions are on their own; arguments as for `losses`."""
        visual = self.ln_vision(visual_tokens(self.vit, images).tokens)
        queries = self.connector.read(visual)
        text = self.connector.read(text=self.embed_text(ids), mask=mask[:, None] > 0)
        pair = Pair(
            contrastive.unit(self.vision_proj(queries.tokens)), contrastive.unit(self.text_proj(text.tokens[:, 0]))
        )
        return Features(visual, queries, text, pair)

    def embed(self, images: jax.Array, ids: jax.Array, mask: jax.Array) -> Pair:
        """Returns the pair of `features`."""
        return self.features(images, ids, mask).pair

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """Returns the embeddings (B, L, D) of ids (B, L). Positions start at 0, also after queries."""
        words = layers.split_batch(layers.lookup(self.word, ids, self.dtype))
        return words + self.position[: ids.shape[1]].astype(self.dtype)

    def similarities(self, pair: Pair) -> tuple[jax.Array, jax.Array]:
        """Returns the similarities of each picture to all captions, and of each caption to all pictures, (B, B) each.

        A picture is as similar to a caption as its most similar query. No gradient flows to what is compared with, as
        published: the first trains pictures alone, the second captions alone.
        """
        picture, text = pair
        others = jax.lax.stop_gradient(pair)
        precise = dict(precision="highest")
        to_text = jnp.einsum("BQS,WS->BWQ", picture, others.text, **precise).max(-1)
        to_image = jnp.einsum("BS,WQS->BWQ", text, others.picture, **precise).max(-1)
        return to_text / self.temperature, to_image / self.temperature

    def itc_losses(self, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns the ITC loss (B,) of embedded pictures (B, Q, S) and captions (B, S)."""
        return _itc(*self.similarities(Pair(picture, text)), weight)

    def match(self, visual: jax.Array, ids: jax.Array, mask: jax.Array, negatives: Negatives) -> jax.Array:
        """Returns the logits (B, PAIRS, 2) float32 of `PAIRS` pairs; class 1 says that they belong together.

        The pairs are (picture, caption) = (own, own), (negative, own), (own, negative). Queries and caption see each
        other. The pairs of an example are neighbours in the batch, so that its devices keep them.
        """
        visual = _interleave(visual, jnp.take(visual, negatives.image, 0), visual)
        ids, mask = (_interleave(x, x, jnp.take(x, negatives.text, 0)) for x in (ids, mask))
        queries = self.connector.queries
        seen = jnp.concatenate([jnp.ones((len(mask), queries), bool), mask > 0], 1)
        states = self.connector.read(visual, self.embed_text(ids), mask=seen[:, None])
        return self.itm_head(states.tokens[:, :queries]).astype(jnp.float32).mean(1).reshape(-1, PAIRS, 2)

    def writing_states(self, queries: QFormerStates, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the states (B, L, D) that write the caption: each token sees the queries and the tokens before it.

        The queries are given by their keys and values, through which gradients flow. [DEC] takes the place of [CLS].
        """
        length = ids.shape[1]
        ids = ids.at[:, 0].set(self.vocab_size - 1)
        before = jnp.tril(jnp.ones((length, length), bool)) & (mask[:, None] > 0)  # (B, L, L)
        seen = jnp.concatenate([jnp.ones((*before.shape[:2], self.connector.queries), bool), before], 2)
        return self.connector.read(text=self.embed_text(ids), mask=seen, past=queries.keys).tokens

    def logits(self, states: jax.Array) -> jax.Array:
        """Returns the logits (B, L, V) float32 of states (B, L, D). Words are weighed by their own embeddings."""
        x, bias = self.lm_head(states)
        return _word_logits(x, self.word, bias)

    def writing_losses(self, queries: QFormerStates, ids: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns the smoothed cross-entropy (B,) of the tokens after the first, summed."""
        x, bias = self.lm_head(self.writing_states(queries, ids, mask))
        targets = jnp.where((mask[:, 1:] > 0) & (weight[:, None] > 0), ids[:, 1:], -1)
        word = self.word
        return token_cross_entropy(x[:, :-1], lambda x: _word_logits(x, word, bias), targets, smoothing=SMOOTHING)[0]


def _itc(to_text: jax.Array, to_image: jax.Array, weight: jax.Array) -> jax.Array:
    entropies = [contrastive.cross_entropies(similarity, weight) for similarity in (to_text, to_image)]
    return jnp.where(weight > 0, sum(entropies) / 2, 0.0)


def _word_logits(x: jax.Array, word: jax.Array, bias: jax.Array) -> jax.Array:
    return layers.linear("BSD,VD->BSV", x, word, x.dtype, jnp.float32) + bias


def _interleave(*parts: jax.Array) -> jax.Array:
    """Returns P arrays (B, ...) as one (B P, ...), in which the rows of an example are neighbours."""
    return layers.split_batch(jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:]))


def negative_logits(similarity: jax.Array, weight: jax.Array, floor: bool) -> jax.Array:
    """Returns the logarithms (B, B), up to a constant, of how likely each column is drawn as the negative of a row.

    Likelier are those that are more similar. The own pair and columns of weight 0 are never drawn if there is another.

    Args:
      similarity: (B, B), row b's own pair in column b.
      weight: (B,), 1 or 0.
      floor: False: the softmax of the similarities, as in LAVIS since July 2023. True: that plus `FLOOR`, as before.
    """
    counts = weight[None, :] > 0
    logits = jnp.where(counts, similarity.astype(jnp.float32), LEFT_OUT)
    if floor:
        logits = jnp.log(jax.nn.softmax(logits) + FLOOR)
    own = jnp.eye(len(similarity), dtype=bool)
    return jnp.where(counts & ~own, logits, LEFT_OUT)


def draw_negatives(
    key: jax.Array, to_text: jax.Array, to_image: jax.Array, weight: jax.Array, floor: bool = False
) -> Negatives:
    """Returns one negative of each kind for each example.

    Args:
      to_text, to_image: (B, B), see `Blip2.similarities`.
      weight, floor: see `negative_logits`.
    """
    key_of_image, key_of_text = jax.random.split(key)
    logits = jax.lax.stop_gradient((to_image, to_text))
    image, text = (
        jax.random.categorical(key, negative_logits(s, weight, floor))
        for key, s in zip((key_of_image, key_of_text), logits, strict=True)
    )
    return Negatives(image, text)
