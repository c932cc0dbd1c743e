"""SimVLG (EVLGen, arXiv 2310.03291) in PyTorch: pictures or clips in, captions out.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate(pixel_values)  # (B, 3, H, W), or clips (B, 3, F, H, W)

Needs torch and transformers alone. Parameters carry the names of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class SimVLGConfig(PretrainedConfig):
    """Sizes.

    Attributes:
      vision: image_size, patch_size, width, depth, num_heads, mlp_dim, norm_eps, key_bias, patch_bias, quick_gelu,
        input_norm, temporal, merges (tokens merged away in each block; absent: none), max_frames (number of frames with
        learned temporal positions; absent: 0).
      connector: type (a key of CONNECTORS; absent: TomeFormer), width, and for TomeFormer depth, num_heads, merges
        (tokens merged away in each layer), dropout, places (patches of a frame, if tokens are of several; absent: 0);
        for MlpConnector cells (rows and columns that patches are averaged in; []: none); for Perceiver depth,
        num_heads, queries, dropout.
      frames: of clips: count, way (a key of WAYS; absent: mean), wanted (tokens that "merged" leaves; 0: as many as a
        frame has), positions (number of frames with learned positions).
      text_config: the language model's own config, of OPT, LLaMA, Qwen2 or Qwen3.
      start_token_id, end_token_id, pad_token_id: of the captions; prompt_ids: what follows the start token.
      start_first: the start token stands before the soft prompt instead of after it.
      max_new_tokens, min_new_tokens, num_beams, length_penalty, repetition_penalty: of decoding, if `generate` is not
        told otherwise.
    """

    model_type = "simvlg"

    def __init__(
        self,
        vision: dict | None = None,
        connector: dict | None = None,
        frames: dict | None = None,
        text_config: dict | None = None,
        start_token_id: int = 2,
        end_token_id: int = 2,
        pad_token_id: int = 1,
        prompt_ids: list[int] | None = None,
        start_first: bool = False,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        **kwargs,
    ):
        self.vision = vision or {}
        self.connector = connector or {}
        self.frames = frames or {}
        text_config = text_config or {"model_type": "opt"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.start_token_id, self.end_token_id = start_token_id, end_token_id
        self.prompt_ids = prompt_ids or []
        self.start_first = start_first
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.repetition_penalty = repetition_penalty
        super().__init__(pad_token_id=pad_token_id, **kwargs)


def attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, dropout: float = 0.0, sizes: Tensor | None = None
) -> Tensor:
    """(B, T, D) each -> (B, T, D). A key counts as many times as its size (B, T) says."""
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if sizes is None else sizes.log()[:, None, None].to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)


def match(metric: Tensor, r: int, class_token: bool = True) -> Tensor:
    """Chooses the r tokens that are merged into those most similar to them by metric (B, T, C).

    Tokens of even index seek their most similar one of odd index; the r best pairs merge. A class token (index 0) is
    never merged. Order: the even ones left over, then the odd ones. Returns the new place of each token, (B, T).
    """
    num_tokens = metric.shape[1]
    with torch.no_grad():
        unit = F.normalize(metric.float(), dim=-1)
        # The order of cosines, from the distances: cosines of similar tokens all round to numbers close to 1.
        similarity = -(unit[:, ::2, None] - unit[:, None, 1::2]).square().sum(-1)
        if class_token:
            similarity[:, 0] = -torch.inf
        best, partner = similarity.max(-1)
        sources = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
        is_source = torch.zeros_like(best, dtype=torch.bool).scatter(1, sources, True)
        unmerged = best.shape[1] - r
        slots = torch.empty(metric.shape[:2], dtype=torch.long, device=metric.device)
        slots[:, ::2] = torch.where(is_source, unmerged + partner, (~is_source).cumsum(1) - 1)
        slots[:, 1::2] = unmerged + torch.arange(num_tokens // 2, device=metric.device)
    return slots


def count_slots(slots: Tensor, num_slots: int, sizes: Tensor | None = None) -> Tensor:
    """How many patches are in each slot, (B, num_slots), of tokens that are `sizes` patches (B, T) or one each."""
    sizes = torch.ones_like(slots, dtype=torch.float32) if sizes is None else sizes
    return sizes.new_zeros(len(slots), num_slots).scatter_add(1, slots, sizes)


def merge(x: Tensor, slots: Tensor, num_slots: int, sizes: Tensor | None = None) -> Tensor:
    """The means of the tokens (B, T, D) in each slot, (B, num_slots, D), weighted by their sizes (B, T)."""
    parts = x.float() if sizes is None else x * sizes[..., None]
    total = parts.new_zeros(len(x), num_slots, x.shape[2]).scatter_add(1, slots[..., None].expand_as(x), parts)
    return (total / count_slots(slots, num_slots, sizes)[..., None]).to(x.dtype)


def merge_by_keys(
    x: Tensor, key: Tensor, num_heads: int, r: int, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Merges r tokens of x (B, T, D) by the mean over heads of key (B, T, D): (B, T - r, D), and the slots if r > 0."""
    r = min(r, (x.shape[1] - 1) // 2)
    if r <= 0:
        return x, None
    slots = match(key.unflatten(-1, (num_heads, -1)).mean(2), r)
    return merge(x, slots, x.shape[1] - r, sizes), slots


def mean_of_frames(patches: Tensor, wanted: int) -> tuple[Tensor, Tensor, None]:
    """The means over time. Like all of WAYS it takes patches (B, F, P, D) and the number of tokens to leave.

    Returns tokens (B, M, D), the share of each frame in each (B or 1, M, F), the token of each patch (B, F P) or None.
    """
    frames, places = patches.shape[1:3]
    return patches.mean(1), patches.new_full((1, places, frames), 1 / frames), None


def join_frames(patches: Tensor, wanted: int) -> tuple[Tensor, Tensor, None]:
    """All patches, frame after frame."""
    shares = torch.eye(patches.shape[1], device=patches.device).repeat_interleave(patches.shape[2], 0)
    return patches.flatten(1, 2), shares[None], None


def pool_frames(patches: Tensor, wanted: int) -> tuple[Tensor, Tensor, None]:
    """The mean over time of each place, then the mean over space of each frame (Video-ChatGPT)."""
    in_time, shares, _ = mean_of_frames(patches, wanted)
    own = torch.eye(patches.shape[1], device=patches.device)[None]
    return torch.cat([in_time, patches.mean(2)], 1), torch.cat([shares, own], 1), None


def merge_frames(patches: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merges neighbouring frames, then neighbouring pairs of frames, and so on, by their deviations from the mean."""
    frames, places = patches.shape[1:3]
    levels, growth = frames.bit_length() - 1, min(wanted or places, frames * places) / places
    x, centre = patches.flatten(0, 1), patches.float().mean((1, 2)).repeat_interleave(frames, 0)[:, None]
    slots = torch.arange(places, device=x.device).expand(len(x), -1)  # the token of each patch of a group
    for level in range(1, levels + 1):
        left, centre = round(places * growth ** (level / levels)), centre[::2]
        x = x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)  # the halves alternate
        slots = (2 * slots.unflatten(0, (-1, 2)) + torch.arange(2, device=x.device)[:, None]).flatten(1)
        if left < x.shape[1]:
            merged = match(x - centre, x.shape[1] - left, class_token=False)
            x = merge(x, merged, left, count_slots(slots, x.shape[1]))
            slots = merged.gather(1, slots)
    counts = F.one_hot(slots, x.shape[1]).unflatten(1, (frames, places)).sum(2).mT.float()  # (B, M, F)
    return x, counts / counts.sum(-1, keepdim=True), slots


WAYS = {"mean": mean_of_frames, "joined": join_frames, "pooled": pool_frames, "merged": merge_frames}


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    """One matrix for query, key and value, with biases of their own; EVA's keys have none."""

    def __init__(self, width: int, num_heads: int, key_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width)) if key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output and the keys, both (B, T, D)."""
        key_bias = torch.zeros_like(self.v_bias) if self.k_bias is None else self.k_bias
        bias = torch.cat([self.q_bias, key_bias, self.v_bias])
        query, key, value = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.proj(attention(query, key, value, self.num_heads, sizes=sizes)), key


class VisionMlp(nn.Module):
    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = QuickGELU() if quick_gelu else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TemporalMerge(nn.Module):
    """Each token attends to the tokens of its own place in all frames; values are the tokens themselves."""

    def __init__(self, width: int, hidden: int = 256, num_heads: int = 8):
        super().__init__()
        self.hidden, self.num_heads = hidden, num_heads
        self.alpha = nn.Parameter(torch.zeros(()))
        self.key, self.query = nn.Linear(width, hidden), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, F, N, D) -> (B, F, N, D)
        def heads(t: Tensor) -> Tensor:  # -> (B, N, heads, F, D / heads)
            return t.unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1, 4)

        merged = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(x), scale=self.hidden**-0.5
        )
        return self.alpha * merged.permute(0, 3, 1, 2, 4).flatten(3)


class VisionBlock(nn.Module):
    """With a merge between attention and MLP (ToMe, arXiv 2210.09461), if merge_r > 0."""

    def __init__(self, size: dict, merge_r: int):
        super().__init__()
        width, eps = size["width"], size["norm_eps"]
        self.merge_r = merge_r
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = VisionAttention(width, size["num_heads"], size["key_bias"])
        self.temporal_merge = TemporalMerge(width) if size["temporal"] else None
        self.mlp = VisionMlp(width, size["mlp_dim"], size["quick_gelu"])

    def forward(self, x: Tensor, num_frames: int, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B F, T, D) of tokens that are `sizes` patches -> (B F, T - r, D), and the slots of the merge."""
        context, key = self.attn(self.norm1(x), sizes)
        x = x + context
        if self.temporal_merge is not None:
            x = x + self.temporal_merge(x.unflatten(0, (-1, num_frames))).flatten(0, 1)
        x, slots = merge_by_keys(x, key, self.attn.num_heads, self.merge_r, sizes)
        return x + self.mlp(self.norm2(x)), slots


class PatchEmbed(nn.Module):
    def __init__(self, size: dict):
        super().__init__()
        patch = size["patch_size"]
        self.proj = nn.Conv2d(3, size["width"], patch, patch, bias=size["patch_bias"])

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N - 1, D)
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The residual stream after the last block, the class token first: no final norm."""

    def __init__(self, size: dict):
        super().__init__()
        width, tokens = size["width"], (size["image_size"] // size["patch_size"]) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = PatchEmbed(size)
        self.norm_pre = nn.LayerNorm(width, size["norm_eps"]) if size["input_norm"] else nn.Identity()
        positions = size.get("max_frames", 0)
        self.temporal_position = nn.Parameter(torch.zeros(positions, width)) if positions else None
        self.merges = size.get("merges") or [0] * size["depth"]
        self.blocks = nn.ModuleList([VisionBlock(size, r) for r in self.merges])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> (B, T, D); (B, 3, F, H, W) -> (B, F, T, D).

        Also which token each of the N tokens became part of, (B, N); None if none merges.
        """
        frames = x.shape[2] if x.ndim == 5 else 1
        images = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([cls, patches], 1) + self.pos_embed
        if self.temporal_position is not None:
            tokens = tokens + self.temporal_position[:frames].repeat(len(x), 1)[:, None]
        tokens = self.norm_pre(tokens)
        places = torch.arange(tokens.shape[1], device=x.device).expand(len(x), -1) if any(self.merges) else None
        for block in self.blocks:
            sizes = None if places is None else count_slots(places, tokens.shape[1])
            tokens, slots = block(tokens, frames, sizes)
            if slots is not None:
                places = slots.gather(1, places)
        return tokens.unflatten(0, (-1, frames)) if x.ndim == 5 else tokens, places


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The context of x (B, S, D) and the keys, of itself or of what is seen (B, T, D)."""
        seen = x if seen is None else seen
        key = self.key(seen)
        dropout = self.dropout if self.training else 0.0
        context = attention(self.query(x), key, self.value(seen), self.num_heads, dropout)
        return context, key


class AddAndNorm(nn.Module):
    def __init__(self, hidden: int, width: int, dropout: float):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(hidden, width), nn.LayerNorm(width, 1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class TomeFormerLayer(nn.Module):
    """BERT's post-LayerNorm layer, with a merge between attention and MLP."""

    def __init__(self, size: dict, merge_r: int):
        super().__init__()
        width, dropout = size["width"], size["dropout"]
        self.merge_r = merge_r
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(width, size["num_heads"], dropout), "output": AddAndNorm(width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = AddAndNorm(4 * width, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        context, key = self.attention["self"](x)
        x = self.attention["output"](context, x)
        x, _ = merge_by_keys(x, key, self.attention["self"].num_heads, self.merge_r)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TomeFormerEmbeddings(nn.Module):
    def __init__(self, width: int, dropout: float, places: int):
        super().__init__()
        self.places = places
        self.position_embeddings, self.token_type_embeddings = nn.Embedding(512, width), nn.Embedding(2, width)
        self.LayerNorm, self.dropout = nn.LayerNorm(width, 1e-12), nn.Dropout(dropout)

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Each token gets its position, or the mean of those that became part of it by `places` (B, N).

        Patches of each frame of a clip have the same positions.
        """
        positions = self.position_embeddings.weight
        if self.places:
            patches = (x if places is None else places).shape[1] - 1
            positions = torch.cat([positions[:1], positions[1 + torch.arange(patches) % self.places]])
        if places is None:
            positions = positions[: x.shape[1]]
        else:
            positions = merge(positions[: places.shape[1]].expand(len(x), -1, -1), places, x.shape[1])
        x = x + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class TomeFormer(nn.Module):
    def __init__(self, size: dict):
        super().__init__()
        self.embeddings = TomeFormerEmbeddings(size["width"], size["dropout"], size.get("places", 0))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([TomeFormerLayer(size, r) for r in size["merges"]])})

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:  # (B, T, D) -> (B, P, D)
        x = self.embeddings(x, places)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return x


class MlpConnector(nn.Module):
    """GELU on each patch after VL_proj (LLaVA-1.5), or on means of patches, which commute with VL_proj."""

    def __init__(self, size: dict):
        super().__init__()
        self.cells = size["cells"]

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:  # (B, T, D) -> (B, P, D)
        if self.cells and places is not None:
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))  # the token of each patch
        x = x[:, 1:]
        if self.cells:
            grid = round(x.shape[1] ** 0.5)
            x = F.adaptive_avg_pool2d(x.mT.unflatten(2, (grid, grid)), self.cells).flatten(2).mT
        return F.gelu(x)


class PerceiverLayer(nn.Module):
    def __init__(self, size: dict):
        super().__init__()
        width = size["width"]
        self.visual_norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = SelfAttention(width, size["num_heads"], size["dropout"])
        self.attention_out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(size["dropout"])

    def forward(self, latents: Tensor, visual: Tensor) -> Tensor:  # (B, P, D), (B, T, D) -> (B, P, D)
        asking = self.latent_norm(latents)
        context, _ = self.attention(asking, torch.cat([self.visual_norm(visual), asking], 1))
        latents = latents + self.dropout(self.attention_out(context))
        return latents + self.dropout(self.fc2(F.relu(self.fc1(self.mlp_norm(latents))).square()))


class Perceiver(nn.Module):
    """Flamingo's Perceiver Resampler (arXiv 2204.14198)."""

    def __init__(self, size: dict):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(size["queries"], size["width"]))
        self.layers = nn.ModuleList([PerceiverLayer(size) for _ in range(size["depth"])])
        self.norm = nn.LayerNorm(size["width"])

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:  # (B, T, D) -> (B, P, D)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return self.norm(latents)


CONNECTORS = {each.__name__: each for each in (TomeFormer, MlpConnector, Perceiver)}  # of what VL_proj gives


class SimVLG(PreTrainedModel):
    """Frozen vision encoder -> connector -> linear layer -> soft prompt of a frozen language model."""

    config_class = SimVLGConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: SimVLGConfig):
        super().__init__(config)
        self.visual_encoder = VisionTransformer(config.vision)
        width, hidden = config.connector["width"], config.text_config.hidden_size
        self.ln_vision = nn.LayerNorm(config.vision["width"], 1e-5)
        self.VL_proj = nn.Linear(config.vision["width"], width)
        self.VLconnector = CONNECTORS[config.connector.get("type", "TomeFormer")](config.connector)
        family = "opt" if config.text_config.model_type == "opt" else "llm"
        self.add_module(f"{family}_proj", nn.Linear(width, hidden))
        self.add_module(f"{family}_model", AutoModelForCausalLM.from_config(config.text_config))
        positions = config.frames.get("positions", 0)
        if positions:
            self.frame_position = nn.Parameter(torch.zeros(positions, config.vision["width"]))
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.opt_model if hasattr(self, "opt_model") else self.llm_model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a checkpoint."""

    def soft_prompt(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, F, H, W), normalised -> (B, P, width of the language model)."""
        tokens, places = self.visual_encoder(pixel_values)
        tokens, places = self.of_clips(tokens) if tokens.ndim == 4 else (self.ln_vision(tokens), places)
        project = self.opt_proj if hasattr(self, "opt_proj") else self.llm_proj
        return project(self.VLconnector(self.VL_proj(tokens), places))

    def of_clips(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, F, T, D) of frames -> normed (B, M, D), and the token of each class token and patch (B, N), or None.

        The class tokens become their mean. Each token gets the positions of the frames that it is made of.
        """
        way, wanted = self.config.frames.get("way", "mean"), self.config.frames.get("wanted", 0)
        joined, shares, places = WAYS[way](tokens[:, :, 1:], wanted)
        joined = self.ln_vision(torch.cat([tokens[:, :, :1].mean(1), joined], 1))
        if hasattr(self, "frame_position"):
            frames = tokens.shape[1]
            shares = torch.cat([shares.new_full((len(shares), 1, frames), 1 / frames), shares], 1)
            joined = joined + (shares @ self.frame_position[:frames].float()).to(joined.dtype)
        return joined, None if places is None else F.pad(places + 1, (1, 0))

    def prompted(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Embeddings (B, P + L, E) of the soft prompt and a text whose first id is the start token."""
        prefix = self.soft_prompt(pixel_values)
        text = self.language_model.get_input_embeddings()(input_ids).to(prefix.dtype)
        start = [text[:, :1], prefix] if self.config.start_first else [prefix, text[:, :1]]
        return torch.cat([*start, text[:, 1:]], 1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ):
        """The language model's output over [soft prompt; text]; `labels` (B, L) as for it, -100 where no loss is taken.

        The mean loss is over all labels but those of a start token that stands before the soft prompt.
        """
        embeddings = self.prompted(pixel_values, input_ids)
        prefix = embeddings.shape[1] - input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = F.pad(mask, (prefix, 0), value=1)
        if labels is not None:
            labels = F.pad(labels, (prefix, 0), value=-100)
            if self.config.start_first:
                labels[:, prefix] = -100
        return self.language_model(inputs_embeds=embeddings, attention_mask=mask, labels=labels)

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, prompt_ids: list[int] | None = None, **kwargs) -> Tensor:
        """New token ids (B, T), by the config's settings; keyword arguments go to the language model's generate."""
        config = self.config
        ids = [config.start_token_id, *(config.prompt_ids if prompt_ids is None else prompt_ids)]
        input_ids = torch.tensor([ids], device=pixel_values.device).expand(len(pixel_values), -1)
        embeddings = self.prompted(pixel_values, input_ids)
        settings = {
            "max_new_tokens": config.max_new_tokens,
            "min_new_tokens": config.min_new_tokens or None,
            "num_beams": config.num_beams,
            "length_penalty": config.length_penalty,
            "repetition_penalty": config.repetition_penalty,
            "do_sample": False,
            "bos_token_id": config.start_token_id,
            "eos_token_id": config.end_token_id,
            "pad_token_id": config.pad_token_id,
            **kwargs,
        }
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
