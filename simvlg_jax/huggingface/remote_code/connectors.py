"""What makes the soft prompt of visual tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .merging import attention, merge, merge_by_keys


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
        self.merge_r, self.class_token = merge_r, size["class_token"]
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(width, size["num_heads"], dropout), "output": AddAndNorm(width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = AddAndNorm(4 * width, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        context, key = self.attention["self"](x)
        x = self.attention["output"](context, x)
        x, _ = merge_by_keys(x, key, self.attention["self"].num_heads, self.merge_r, self.class_token)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TomeFormerEmbeddings(nn.Module):
    def __init__(self, width: int, dropout: float, class_token: bool, places: int):
        super().__init__()
        self.first, self.places = int(class_token), places
        self.position_embeddings, self.token_type_embeddings = nn.Embedding(512, width), nn.Embedding(2, width)
        self.LayerNorm, self.dropout = nn.LayerNorm(width, 1e-12), nn.Dropout(dropout)

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Each token gets its position, or the mean of those that became part of it by `places` (B, N).

        Patches of each frame of a clip have the same positions.
        """
        positions = self.position_embeddings.weight
        if self.places:
            patches = torch.arange((x if places is None else places).shape[1] - self.first)
            positions = torch.cat([positions[: self.first], positions[self.first + patches % self.places]])
        if places is None:
            positions = positions[: x.shape[1]]
        else:
            positions = merge(positions[: places.shape[1]].expand(len(x), -1, -1), places, x.shape[1])
        x = x + positions + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class TomeFormer(nn.Module):
    def __init__(self, size: dict):
        super().__init__()
        embeddings = size["width"], size["dropout"], size["class_token"], size.get("places", 0)
        self.embeddings = TomeFormerEmbeddings(*embeddings)
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
        self.first, self.cells = size["dropped"], size["cells"]

    def forward(self, x: Tensor, places: Tensor | None) -> Tensor:  # (B, T, D) -> (B, P, D)
        if self.cells and places is not None:
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))  # the token of each patch
        x = x[:, self.first :]
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
