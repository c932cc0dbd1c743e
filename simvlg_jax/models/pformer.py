"""P-Former (BLIText, arXiv 2307.07063): predicts from a caption alone the soft prompt that makes a frozen LLM write it.

It is trained on texts (`PromptLearner`). A picture's soft prompt may then be taught to resemble that of its caption.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import contrastive, layers
from simvlg_jax.models.bert import MAX_POSITIONS
from simvlg_jax.models.losses import token_cross_entropy
from simvlg_jax.models.sentence_encoder import SentenceEncoder
from simvlg_jax.models.simvlg import before_targets, read_after_prompt

MASKED = 0.25  # share of the tokens that [MASK] replaces
BLOCK = 4096  # rows of the vocabulary that are compared at a time


class PFormer(nn.Module):
    """A BERT whose class token becomes a soft prompt. Parameters: encoder, cls_proj, pooler, prompt_proj.

    The number of prompts is set here. (In the published code it is the length of the text, which only works because
    both are 32.)

    Attributes:
      width, depth, num_heads: sizes, see `bert.BERT_SIZES`.
      prompt_width: E, the width of the language model.
      queries: Q, the number of prompt vectors.
      dropout: rate at BERT's usual places.
      hidden: width inside the MLPs; None for 4 times `width`.
    """

    width: int
    depth: int
    num_heads: int
    prompt_width: int
    queries: int = 32
    vocab_size: int = 30522
    dropout: float = 0.1
    hidden: int | None = None
    max_positions: int = MAX_POSITIONS
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.encoder = SentenceEncoder(
            self.width,
            self.depth,
            self.num_heads,
            self.vocab_size,
            pooling="class",
            dropout=self.dropout,
            hidden=self.hidden,
            max_positions=self.max_positions,
            dtype=self.dtype,
        )
        axes, dtype = ("embed", "mlp"), self.dtype
        self.cls_proj = layers.torch_dense(self.width, self.queries * self.width, axes, dtype=dtype)
        self.pooler = layers.torch_dense(self.width, self.width, axes, dtype=dtype)
        self.prompt_proj = layers.torch_dense(self.width, self.prompt_width, axes, dtype=dtype)

    def encode(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the class token (B, D) float32 after the last layer, of ids and mask (B, L) int32."""
        return self.encoder(ids, mask)

    def prompts(self, sentence: jax.Array) -> jax.Array:
        """Returns the soft prompts (B, Q, E) of class tokens (B, D)."""
        x = self.cls_proj(sentence.astype(self.dtype)).reshape(-1, self.queries, self.width)
        return self.prompt_proj(jnp.tanh(self.pooler(x)))

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the soft prompts (B, Q, E) of ids and mask (B, L) int32."""
        return self.prompts(self.encode(ids, mask))


@struct.dataclass
class Texts:
    """Captions as the language model reads and writes them; arrays as for `SimVLG.caption_losses`."""

    ids: jax.Array
    mask: jax.Array
    targets: jax.Array


class PromptLearner(nn.Module):
    """Trains a P-Former on captions. Parameters: pformer, text_proj, temperature, llm.

    Three losses teach it: captions are told apart, prompts lie near words of the language model, and the frozen
    language model writes the caption after them.

    Attributes:
      pformer: a `PFormer`.
      llm: a frozen language model, as in `SimVLG`.
      mask_id: the id of [MASK].
      shared_width: S, the width of the embeddings that are told apart.
      start_first: as in `SimVLG`.
    """

    pformer: nn.Module
    llm: nn.Module
    mask_id: int
    shared_width: int = 256
    start_first: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        axes = ("embed", "mlp")
        self.text_proj = layers.torch_dense(self.pformer.width, self.shared_width, axes, dtype=self.dtype)
        self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the unit vectors (B, S) float32 of ids and mask (B, L) int32."""
        return self._embedded(self.pformer.encode(ids, mask))

    def _embedded(self, sentence: jax.Array) -> jax.Array:
        return contrastive.unit(self.text_proj(sentence.astype(self.dtype)))

    def masked(self, ids: jax.Array, mask: jax.Array, drawn: jax.Array) -> jax.Array:
        """Returns the ids (B, L), with [MASK] where `drawn` (B, L) bool says so, but not for [CLS] and padding."""
        first = jnp.arange(ids.shape[1]) == 0
        return jnp.where(drawn & (mask > 0) & ~first, self.mask_id, ids)

    def losses(
        self, ids: jax.Array, mask: jax.Array, drawn: jax.Array, texts: Texts
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns the losses of each caption, and what `contrastive_losses` compares.

        Args:
          ids, mask: (B, L) int32, [CLS] caption [SEP], padded on the right.
          drawn: (B, L) bool, which tokens [MASK] replaces. The language model writes the caption without [MASK].
          texts: the same captions.

        Returns:
          ({"vq": (B,), the mean squared distance of the prompts to the nearest words; "lm": (B,), nats summed over the
          targets}, (B, S) unit vectors), float32.
        """
        sentence = self.pformer.encode(self.masked(ids, mask, drawn), mask)
        prompts = self.pformer.prompts(sentence)
        states = read_after_prompt(self.llm, prompts, texts.ids, texts.mask, self.start_first)
        states = before_targets(states, texts.targets)
        lm, _ = token_cross_entropy(states, self.llm.logits, texts.targets, trains_head=False)
        prompts = prompts.astype(jnp.float32)
        words = self.llm.embed(self.nearest(prompts)).astype(jnp.float32)
        vq = jnp.mean(jnp.square(prompts - jax.lax.stop_gradient(words)), (1, 2))
        return {"vq": vq, "lm": lm}, self._embedded(sentence)

    @jax.named_scope("nearest_words")
    def nearest(self, prompts: jax.Array) -> jax.Array:
        """Returns the ids (B, Q) int32 of the words whose embeddings are nearest to prompts (B, Q, E).

        The distances to a block of the vocabulary exist at a time. The first of equally near words counts.
        """
        prompts = jax.lax.stop_gradient(prompts)
        count = self.llm.vocab_size
        size = min(BLOCK, count)

        def compare(best: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            distance, ids = best
            rows = start + jnp.arange(size)
            words = self.llm.embed(jnp.minimum(rows, count - 1)[None])[0].astype(jnp.float32)  # (size, E)
            products = jnp.einsum("BQE,VE->BQV", prompts, words, precision="highest")
            apart = jnp.where(rows < count, jnp.sum(words**2, 1) - 2 * products, jnp.inf)
            least = apart.min(-1)
            nearer = least < distance
            own = start + jnp.argmin(apart, -1).astype(jnp.int32)
            return (jnp.where(nearer, least, distance), jnp.where(nearer, own, ids)), None

        none = jnp.full(prompts.shape[:2], jnp.inf), jnp.zeros(prompts.shape[:2], jnp.int32)
        return jax.lax.scan(compare, none, jnp.arange(0, count, size, dtype=jnp.int32))[0][1]

    def contrastive_losses(self, own: jax.Array, others: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns how surprising it is that each row is most similar to its own one, (B,) float32 nats.

        As published, no gradient flows to what a row is compared with.

        Args:
          own, others: (B, S) unit vectors; in training they are the same.
          weight: (B,), 1 or 0. Rows of weight 0 have no loss and are no other's either.
        """
        similarity = jnp.einsum("IS,JS->IJ", own, jax.lax.stop_gradient(others), precision="highest")
        return jnp.where(weight > 0, contrastive.cross_entropies(similarity / self.temperature, weight), 0.0)
