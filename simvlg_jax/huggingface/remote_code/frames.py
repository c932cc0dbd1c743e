"""How the frames of a clip become one sequence of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import count_slots, match, merge


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
