"""Moving averages of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(kept: nn.Module, seen: nn.Module, momentum: float) -> None:
    """Move ``kept``'s weights ``1 - momentum`` of the way to ``seen``'s; its buffers are copied.

    >>> slow, fast = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> for module, value in ((slow, 0.0), (fast, 1.0)):
    ...     _ = nn.init.constant_(module.weight, value)
    >>> follow(slow, fast, 0.75); slow.weight.item()
    0.25
    """
    own: list[Tensor] = list(kept.parameters())
    theirs: list[Tensor] = list(seen.parameters())
    torch._foreach_lerp_(own, theirs, 1.0 - momentum)
    for mine, other in zip(kept.buffers(), seen.buffers(), strict=True):
        mine.copy_(other)
