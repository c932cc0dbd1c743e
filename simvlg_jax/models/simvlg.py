"""SimVLG (EVLGen, arXiv 2310.03291): frozen ViT -> TomeFormer -> linear -> soft prompt of a frozen language model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import contrastive, layers
from simvlg_jax.models.connectors.connector import ConnectorOutput
from simvlg_jax.models.encoders.frames import WAYS, Frames, add_positions, weigh
from simvlg_jax.models.encoders.vit import visual_tokens
from simvlg_jax.models.losses import prompt_distances, token_cross_entropy, token_losses
from simvlg_jax.models.packing import Packing, make_packing


@struct.dataclass
class VisualOutput:
    """What the picture becomes on its way to the language model.

    Attributes:
      connector: (B, P, D) the connector's tokens.
      prefix: (B, P, E) the soft prompt.
      source_map: (B, N) int32, which prefix token each patch, and the class token, became part of; or None. Of a clip
        whose frames are joined or merged, the patches are those of all frames, frame by frame.
      layers: of each layer of the connector, the source map (B, N) after it; see `ConnectorOutput`.
    """

    connector: jax.Array
    prefix: jax.Array
    source_map: jax.Array | None
    layers: tuple[jax.Array, ...]


@struct.dataclass
class SimVLGOutput:
    """What the captioner returns.

    Attributes:
      visual: see `VisualOutput`.
      hidden: (B, P + L, E), the language model's states over [prefix; text].
    """

    visual: VisualOutput
    hidden: jax.Array


CONTRAST_WIDTH = 256  # of the embeddings of pictures and sentences
FRAME_WEIGHT_INIT = nn.initializers.normal(2.0)


class SimVLG(nn.Module):
    """The whole captioner. Parameters: vit, ln_vision, connector, llm_proj, llm.

    A sentence encoder adds the auxiliary contrastive loss and its parameters: sentence_encoder, vision_proj, text_proj,
    temperature. A P-Former, whose prompts are those to resemble, adds pformer.

    Attributes:
      vit: a `ViT`.
      connector: a `Connector`.
      llm: a language model with `width`, `embed`, `logits` and `__call__` as `Llama` has.
      dtype: compute dtype of the projections.
      start_first: whether the start token comes before the soft prompt: [start; prefix; text]. Published:
        [prefix; start; text].
      vit_grad: whether gradients flow into the ViT, to train it jointly or to train the temporal merging inside it.
      llm_grad: whether the language model is trained too.
      longest_text: the most tokens that a text of a pack has.
      sentence_encoder: a `SentenceEncoder`, or None (published recipes). The contrastive loss compares its embedding of
        a caption with the connector's class token, or with the mean token if it has no class token.
      pformer: a frozen `PFormer`, or None.
      frames: how the frames of clips are joined.
      max_frames: number of frames whose order can be learned, 0: none. Tokens of single frames get positions that are
        zero at first (frame_embedding; `add_positions`). A mean over frames gets weights that are random at first,
        since those that start at zero learn slowly (frame_weight; `weigh`).
    """

    vit: nn.Module
    connector: nn.Module
    llm: nn.Module
    dtype: DTypeLike = jnp.float32
    start_first: bool = False
    vit_grad: bool = False
    llm_grad: bool = False
    longest_text: int = 32
    sentence_encoder: nn.Module | None = None
    pformer: nn.Module | None = None
    frames: Frames = Frames()
    max_frames: int = 0

    def setup(self) -> None:
        self.ln_vision = layers.LayerNorm(1e-5)
        if self.max_frames:
            ordered = WAYS[self.frames.way].ordered
            name, init = ("frame_embedding", nn.initializers.zeros) if ordered else ("frame_weight", FRAME_WEIGHT_INIT)
            shape = self.max_frames, self.vit.width
            setattr(self, name, self.param(name, layers.partitioned(init, None, "embed"), shape))
        width, axes, dtype = self.connector.width, ("embed", "mlp"), self.dtype
        self.llm_proj = layers.torch_dense(width, self.llm.width, axes, dtype=dtype)
        if self.sentence_encoder is not None:
            self.vision_proj = layers.torch_dense(width, CONTRAST_WIDTH, axes, dtype=dtype)
            self.text_proj = layers.torch_dense(self.sentence_encoder.width, CONTRAST_WIDTH, axes, dtype=dtype)
            self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())

    def encode_image(self, images: jax.Array) -> VisualOutput:
        """Returns the soft prompt of pictures, and what it is made of.

        Args:
          images: (B, H, W, 3), or clips (B, F, H, W, 3); uint8, or normalised floats.
        """
        merged = self._connect(images)
        prefix, maps = self.llm_proj(merged.tokens), (merged.source_map, merged.layers)
        return VisualOutput(merged.tokens, prefix, *(maps if self.frames.traced else (None, ())))

    def _connect(self, images: jax.Array) -> ConnectorOutput:
        """Runs `encode_image` up to the connector."""
        seen = visual_tokens(self.vit, images, self.vit_grad)
        tokens, source_map = seen.tokens, seen.source_map
        if tokens.ndim == 3:
            return self.connector(self.ln_vision(tokens), source_map)
        ordered = WAYS[self.frames.way].ordered
        if self.max_frames and not ordered:
            tokens = weigh(tokens, self.frame_weight)
        joined = self.frames.join(tokens, self.vit.class_token)
        tokens = self.ln_vision(joined.tokens)
        if self.max_frames and ordered:  # after the norm, so that their scale does not depend on the encoder
            tokens = add_positions(tokens, joined.shares, self.frame_embedding)
        return self.connector(tokens, joined.source_map)

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """Returns the embeddings (B, L, E) of ids (B, L) int32."""
        return self.llm.embed(ids)

    @nn.nowrap
    def prompted(self, prefix: jax.Array, start: jax.Array) -> jax.Array:
        """Returns `prompted` in this model's order: (B, P + 1, E)."""
        return prompted(prefix, start, self.start_first)

    def __call__(self, images: jax.Array, ids: jax.Array, mask: jax.Array) -> SimVLGOutput:
        """Runs the language model over the soft prompt and the text.

        Args:
          images: as for `encode_image`.
          ids, mask: (B, L) int32, padded on the right; the mask is 1 for real tokens.
        """
        visual = self.encode_image(images)
        return SimVLGOutput(visual, self._read(visual.prefix, ids, mask))

    def _read(self, prefix: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns `read_after_prompt`: (B, P + L, E)."""
        return read_after_prompt(self.llm, prefix, ids, mask, self.start_first)

    def caption_losses(
        self,
        images: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        lengths: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the next-token cross-entropy of each caption, summed over its targets, and their number.

        Args:
          images, ids, mask: as for `__call__`.
          targets: (B, L) int32, the token to predict at each text position; -100 where no loss is taken.
          lengths: (G, B / G) int32, the tokens of each caption, if captions are packed: `ids`, `mask` and `targets` are
            then (G, C), with B / G captions after each other in each row; see `packing`.
          weights: what each target counts, shaped like the targets, float32; None: 1.

        Returns:
          ((B,) summed negative log-likelihood in nats, float32; (B,) number of targets, float32); of packs (G,) each.
        """
        return self._text_losses(self.encode_image(images).prefix, ids, mask, targets, lengths, weights)

    def blind_losses(
        self, ids: jax.Array, mask: jax.Array, targets: jax.Array, lengths: jax.Array | None = None
    ) -> jax.Array:
        """Returns the nats of each target without a picture, shaped like the targets, float32.

        They are infinite for the first token of a caption, before which there is nothing to guess it from. Arguments
        as for `caption_losses`.
        """
        count = len(ids) if lengths is None else lengths.size
        nothing = jnp.zeros((count, 0, self.llm.width), self.dtype)
        if lengths is None:
            hidden = self._read(nothing, ids, mask)  # (B, L, E)
            states, first = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], 1), jnp.arange(ids.shape[1]) == 0
        else:
            states, packing = self._read_packed(nothing, ids, lengths)
            first = packing.positions == 0
        return jnp.where(first, jnp.inf, token_losses(states, self.llm.logits, targets, trains_head=self.llm_grad))

    def several_losses(
        self, images: jax.Array, ids: jax.Array, mask: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `caption_losses` of K captions of each picture, whose soft prompt is computed once.

        Args:
          images: as for `__call__`.
          ids, mask, targets: (B, K, L) int32, as for `caption_losses`.

        Returns:
          ((B, K) summed negative log-likelihood in nats, (B, K) number of targets), float32.
        """
        count = ids.shape[1]
        prefix = jnp.repeat(self.encode_image(images).prefix, count, 0)  # (B * K, P, E)
        texts = (x.reshape(-1, x.shape[2]) for x in (ids, mask, targets))
        losses, written = self._text_losses(prefix, *texts, None, None)
        return losses.reshape(-1, count), written.reshape(-1, count)

    def _text_losses(
        self,
        prefix: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        lengths: jax.Array | None,
        weights: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `caption_losses` after soft prompts (B, P, E)."""
        if lengths is None:
            states = before_targets(self._read(prefix, ids, mask), targets)
        else:
            states, _ = self._read_packed(prefix, ids, lengths)
        return token_cross_entropy(states, self.llm.logits, targets, trains_head=self.llm_grad, weights=weights)

    def _read_packed(self, prefix: jax.Array, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Packing]:
        """Reads packed texts (G, C) after soft prompts (B, P, E).

        Returns:
          (the states (G, C, E) that predict the tokens of the texts, where the tokens of the packs are).
        """
        (packs, tokens), (_, tokens_before, width) = ids.shape, prefix.shape
        packing = make_packing(lengths, tokens, tokens_before, self.longest_text, self.start_first)
        text = self.llm.embed(ids)
        prefixes = prefix.reshape(packs, lengths.shape[1] * tokens_before, width)
        embeddings = jnp.concatenate([prefixes.astype(text.dtype), text], 1)
        hidden = self.llm(embeddings, packing, packing.positions).hidden  # (G, T, E)
        return packing.before_text(hidden), packing

    def likelihoods(
        self, prefix: jax.Array, ids: jax.Array, mask: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns how likely texts are after soft prompts that `encode_image` gave.

        Args:
          prefix: (B, P, E), one for each text.
          ids, mask, targets: as for `caption_losses`.

        Returns:
          ((B,) log-likelihood of the targets, nats in float32; (B,) bool, whether each of them is the likeliest token).
        """
        logits = self.llm.logits(before_targets(self._read(prefix, ids, mask), targets))
        losses = token_losses(logits, lambda logits: logits, targets)
        return -jnp.sum(losses, 1), jnp.all((jnp.argmax(logits, -1) == targets) | (targets < 0), 1)

    def explain(
        self, images: jax.Array, ids: jax.Array, mask: jax.Array, targets: jax.Array
    ) -> tuple[VisualOutput, jax.Array]:
        """Returns what a report shows of pictures, in one forward pass.

        Args:
          images, ids, mask, targets: as for `caption_losses`.

        Returns:
          (what the pictures became; (B, L) float32, the nats of each target, 0 where no loss is taken).
        """
        out = self(images, ids, mask)
        return out.visual, token_losses(before_targets(out.hidden, targets), self.llm.logits, targets)

    def losses_and_pair(
        self,
        images: jax.Array,
        sentence_ids: jax.Array,
        sentence_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        lengths: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, contrastive.Pair]:
        """Returns `caption_losses`, and the pair for `contrastive_losses` (section 3.2) from the same forward pass.

        Args:
          sentence_ids, sentence_mask: (B, L') int32, the captions for the sentence encoder.
        """
        visual = self.encode_image(images)
        pair = self._pair(visual.connector, sentence_ids, sentence_mask)
        return *self._text_losses(visual.prefix, ids, mask, targets, lengths, weights), pair

    def aligned_losses(
        self,
        images: jax.Array,
        sentence_ids: jax.Array,
        sentence_mask: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        targets: jax.Array,
        lengths: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns `caption_losses`, and `prompt_distances` (B,) of the soft prompts and the P-Former's.

        Args:
          sentence_ids, sentence_mask: (B, L') int32, the captions for the P-Former.
        """
        prefix = self.encode_image(images).prefix
        distances = prompt_distances(prefix, self.pformer(sentence_ids, sentence_mask))
        return *self._text_losses(prefix, ids, mask, targets, lengths, weights), distances

    def embed_pair(self, images: jax.Array, sentence_ids: jax.Array, sentence_mask: jax.Array) -> contrastive.Pair:
        """Returns the pair of `losses_and_pair` without running the language model."""
        return self._pair(self._connect(images).tokens, sentence_ids, sentence_mask)

    def _pair(self, connector: jax.Array, sentence_ids: jax.Array, sentence_mask: jax.Array) -> contrastive.Pair:
        """Returns the pair from the connector's tokens (B, P, D) and the captions (B, L').

        The class token represents a picture, or the mean token if the connector has no class token.
        """
        sentences = jax.lax.stop_gradient(self.sentence_encoder(sentence_ids, sentence_mask))
        picture = self.vision_proj(connector[:, 0] if self.connector.class_token else connector.mean(1))
        return contrastive.Pair(contrastive.unit(picture), contrastive.unit(self.text_proj(sentences)))

    def contrastive_losses(self, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns `contrastive.matching_losses` at the learned temperature: (B,) float32, B the global batch."""
        return contrastive.matching_losses(picture, text, self.temperature, weight)


def prompted(prefix: jax.Array, start: jax.Array, start_first: bool) -> jax.Array:
    """Joins prefix (B, P, E) and the start token's embedding (B, 1, E) in their order: (B, P + 1, E)."""
    prefix = prefix.astype(start.dtype)
    return jnp.concatenate([start, prefix] if start_first else [prefix, start], 1)


def read_after_prompt(
    llm: nn.Module, prefix: jax.Array, ids: jax.Array, mask: jax.Array, start_first: bool
) -> jax.Array:
    """Returns a language model's states (B, P + L, E) over soft prompts (B, P, E) and texts (B, L)."""
    text = llm.embed(ids)
    embeddings = jnp.concatenate([prompted(prefix, text[:, :1], start_first), text[:, 1:]], 1)  # (B, P + L, E)
    mask = jnp.concatenate([jnp.ones(prefix.shape[:2], mask.dtype), mask], 1)
    positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
    return llm(embeddings, mask, positions).hidden


def before_targets(hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the states (B, L, E) of (B, P + L, E) that predict the targets (B, L).

    Text token i is predicted from the position before it, the first one from the last prefix token.
    """
    return hidden[:, -targets.shape[1] - 1 : -1]
