"""The vision encoder, with temporal attentive soft merging for clips."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .merging import attention, count_slots, merge_by_keys


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "tanh_gelu": partial(nn.GELU, approximate="tanh")}


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
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = ACTIVATIONS[activation]()

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
        self.merge_r, self.class_token = merge_r, size["class_token"]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = VisionAttention(width, size["num_heads"], size["key_bias"])
        self.temporal_merge = TemporalMerge(width) if size["temporal"] else None
        self.mlp = VisionMlp(width, size["mlp_dim"], size["activation"])

    def forward(self, x: Tensor, num_frames: int, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B F, T, D) of tokens that are `sizes` patches -> (B F, T - r, D), and the slots of the merge."""
        context, key = self.attn(self.norm1(x), sizes)
        x = x + context
        if self.temporal_merge is not None:
            x = x + self.temporal_merge(x.unflatten(0, (-1, num_frames))).flatten(0, 1)
        x, slots = merge_by_keys(x, key, self.attn.num_heads, self.merge_r, self.class_token, sizes)
        return x + self.mlp(self.norm2(x)), slots


class PatchEmbed(nn.Module):
    def __init__(self, size: dict):
        super().__init__()
        patch = size["patch_size"]
        self.proj = nn.Conv2d(3, size["width"], patch, patch, bias=size["patch_bias"])

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, P, D)
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The residual stream after the last block, a class token first if there is one: no final norm."""

    def __init__(self, size: dict):
        super().__init__()
        width, tokens = size["width"], (size["image_size"] // size["patch_size"]) ** 2 + size["class_token"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if size["class_token"] else None
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
        tokens = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = tokens + self.pos_embed
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
