"""Attention, and the merging of similar tokens (ToMe, arXiv 2210.09461)."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    x: Tensor, key: Tensor, num_heads: int, r: int, class_token: bool, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Merges r tokens of x (B, T, D) by the mean over heads of key (B, T, D): (B, T - r, D), and the slots if r > 0."""
    r = min(r, (x.shape[1] - class_token) // 2)
    if r <= 0:
        return x, None
    slots = match(key.unflatten(-1, (num_heads, -1)).mean(2), r, class_token)
    return merge(x, slots, x.shape[1] - r, sizes), slots
