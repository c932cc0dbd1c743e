"""SimVLG (EVLGen, arXiv 2310.03291): frozen ViT -> TomeFormer -> linear -> soft prompt of a frozen language model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import contrastive, layers
from simvlg_jax.models.connectors.connector import ConnectorOutput
from simvlg_jax.models.losses import token_cross_entropy


@struct.dataclass
class VisualOutput:
    """What the picture becomes on its way to the language model.

    Attributes:
      connector: (B, P, D) the connector's tokens.
      prefix: (B, P, E) the soft prompt.
      source_map: (B, N) int32, which prefix token each ViT token became part of, or None.
    """

    connector: jax.Array
    prefix: jax.Array
    source_map: jax.Array | None


@struct.dataclass
class SimVLGOutput:
    """visual: see `VisualOutput`; hidden: (B, P + L, E), the language model's states over [prefix; text]."""

    visual: VisualOutput
    hidden: jax.Array


CONTRAST_WIDTH = 256  # of the space that pictures and sentences are compared in


class SimVLG(nn.Module):
    """The whole captioner. Parameters: vit, ln_vision, connector, llm_proj, llm.

    With a sentence encoder also sentence_encoder, vision_proj, text_proj, temperature: the auxiliary contrastive loss.

    Attributes:
      vit: a `ViT`.
      connector: a `Connector`.
      llm: a language model with `width`, `embed`, `logits` and `__call__` as `Llama` has.
      dtype: compute dtype of the projections.
      start_first: the start token stands before the soft prompt ([start; prefix; text]) instead of after it as
        published ([prefix; start; text]).
      sentence_encoder: a `SentenceEncoder` whose embeddings of captions the connector's class token (or mean token) is
        held against, or None (published recipes).
      vit_grad: let gradients into the ViT (for training it jointly, or video's temporal merging inside it).
    """

    vit: nn.Module
    connector: nn.Module
    llm: nn.Module
    dtype: DTypeLike = jnp.float32
    start_first: bool = False
    vit_grad: bool = False
    sentence_encoder: nn.Module | None = None

    def setup(self) -> None:
        self.ln_vision = layers.LayerNorm(1e-5)
        width, axes, dtype = self.connector.width, ("embed", "mlp"), self.dtype
        self.llm_proj = layers.torch_dense(width, self.llm.width, axes, dtype=dtype)
        if self.sentence_encoder is not None:
            self.vision_proj = layers.torch_dense(width, CONTRAST_WIDTH, axes, dtype=dtype)
            self.text_proj = layers.torch_dense(self.sentence_encoder.width, CONTRAST_WIDTH, axes, dtype=dtype)
            self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())

    def encode_image(self, images: jax.Array) -> VisualOutput:
        """images: (B, H, W, 3), or clips (B, F, H, W, 3) for a temporal ViT; uint8, or already normalised floats."""
        merged = self._connect(images)
        return VisualOutput(merged.tokens, self.llm_proj(merged.tokens), merged.source_map)

    def _connect(self, images: jax.Array) -> ConnectorOutput:
        """`encode_image` as far as the connector."""
        if images.dtype == jnp.uint8:
            images = self.vit.normalize(images)
        if self.vit.temporal and images.ndim == 4:
            images = images[:, None]  # a picture is a clip of one frame
        tokens = self.vit(images)  # (B, N, C), of clips (B, F, N, C)
        if not self.vit_grad:
            tokens = jax.lax.stop_gradient(tokens)
        tokens = tokens.mean(1) if images.ndim == 5 else tokens
        return self.connector(self.ln_vision(tokens))

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """ids (B, L) int32 -> (B, L, E)."""
        return self.llm.embed(ids)

    @nn.nowrap
    def prompted(self, prefix: jax.Array, start: jax.Array) -> jax.Array:
        """prefix (B, P, E) and the start token's embedding (B, 1, E) in their order: (B, P + 1, E)."""
        prefix = prefix.astype(start.dtype)
        return jnp.concatenate([start, prefix] if self.start_first else [prefix, start], 1)

    def __call__(self, images: jax.Array, ids: jax.Array, mask: jax.Array) -> SimVLGOutput:
        """images (B, H, W, 3); ids, mask (B, L) int32, right-padded, mask 1 for real tokens."""
        visual = self.encode_image(images)
        text = self.llm.embed(ids)
        parts = self.prompted(visual.prefix, text[:, :1]), text[:, 1:]
        embeddings = jnp.concatenate(parts, 1)  # (B, P + L, E)
        mask = jnp.concatenate([jnp.ones(visual.prefix.shape[:2], mask.dtype), mask], 1)
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        return SimVLGOutput(visual, self.llm(embeddings, mask, positions).hidden)

    def caption_losses(
        self, images: jax.Array, ids: jax.Array, mask: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Next-token cross-entropy of each caption, summed over its targets, and how many it has.

        Args:
          images, ids, mask: as for `__call__`.
          targets: (B, L) int32, the token expected at each text position, -100 where no loss is taken.

        Returns:
          ((B,) summed negative log-likelihood in nats, float32; (B,) number of targets, float32).
        """
        return self.next_token_losses(self(images, ids, mask).hidden, targets)

    def next_token_losses(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`caption_losses` from the language model's states (B, P + L, E)."""
        # Text token i is predicted from the position before it, the first one from the last prefix token.
        return token_cross_entropy(hidden[:, -targets.shape[1] - 1 : -1], self.llm.logits, targets)

    def losses_and_pair(
        self,
        images: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        sentence_ids: jax.Array,
        sentence_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array, contrastive.Pair]:
        """`caption_losses` and, of the same forward pass, what `contrastive_losses` (section 3.2) compares.

        Args:
          sentence_ids, sentence_mask: (B, L') int32, the captions for the sentence encoder.
        """
        out = self(images, ids, mask)
        pair = self._pair(out.visual.connector, sentence_ids, sentence_mask)
        return *self.next_token_losses(out.hidden, targets), pair

    def embed_pair(self, images: jax.Array, sentence_ids: jax.Array, sentence_mask: jax.Array) -> contrastive.Pair:
        """The pair of `losses_and_pair`, without the language model."""
        return self._pair(self._connect(images).tokens, sentence_ids, sentence_mask)

    def _pair(self, connector: jax.Array, sentence_ids: jax.Array, sentence_mask: jax.Array) -> contrastive.Pair:
        """The connector's class token, of (B, P, D), or its mean token if it has none, and the captions (B, L')."""
        sentences = jax.lax.stop_gradient(self.sentence_encoder(sentence_ids, sentence_mask))
        picture = self.vision_proj(connector[:, 0] if self.vit.class_token else connector.mean(1))
        return contrastive.Pair(contrastive.unit(picture), contrastive.unit(self.text_proj(sentences)))

    def contrastive_losses(self, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        """`contrastive.matching_losses` at the learned temperature: (B,), B the global batch."""
        return contrastive.matching_losses(picture, text, self.temperature, weight)
