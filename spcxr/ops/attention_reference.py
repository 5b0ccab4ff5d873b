"""Masked attention in plain torch, and key masks as bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError

WORD = 32  # bits


def pack_key_mask(mask: Tensor) -> Tensor:
    """``[B, N]`` bool, True = masked -> ``[B, ceil(N / 32)]`` int32, bit ``j % 32`` of a word.

    >>> pack_key_mask(torch.tensor([[True, False, True]])).tolist()
    [[5]]
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise SpcxrError(f"key mask is {tuple(mask.shape)} {mask.dtype}; give [B, N] bool")
    words = -(-mask.shape[1] // WORD)
    padded = F.pad(mask, (0, words * WORD - mask.shape[1])).view(mask.shape[0], words, WORD)
    weights = torch.arange(WORD, device=mask.device)
    return (padded.long() << weights).sum(2).to(torch.int32)  # bit 31 is the sign


def unpack_key_mask(bits: Tensor, n_max: int) -> Tensor:
    """The first ``n_max`` bits of each row, as bool."""
    each = bits[..., None] >> torch.arange(WORD, device=bits.device, dtype=torch.int32) & 1
    return each.flatten(1)[:, :n_max].bool()


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bits: Tensor | None,
    cu_seqlens: Tensor | None,
    n_max: int,
    scale: float,
) -> Tensor:
    """Torch's ``scaled_dot_product_attention``, with what it lacks around it."""
    if bias is not None:
        q, k, v = q + bias[0], k + bias[1], v + bias[2]
    total, places = q.shape[0], torch.arange(n_max, device=q.device)
    seen = None if key_bits is None else ~unpack_key_mask(key_bits, n_max)
    if cu_seqlens is not None:
        if total == 0 or cu_seqlens.shape[0] == 1:
            return torch.where(torch.zeros_like(q, dtype=torch.bool), q, 0).flatten(-2)
        inside = places < cu_seqlens.diff()[:, None]
        seen = inside if seen is None else seen & inside
        rows = (cu_seqlens[:-1, None] + places).clamp(max=total - 1)
        q, k, v = torch.where(inside[..., None, None], q[rows], 0), k[rows], v[rows]
    out = _dense(q, k, v, seen, scale)
    if cu_seqlens is None:
        return out
    row = torch.arange(total, device=q.device)
    image = torch.searchsorted(cu_seqlens[1:].contiguous(), row.int(), right=True)
    image = image.clamp(max=out.shape[0] - 1)
    place = (row - cu_seqlens[image]).clamp(0, max(n_max - 1, 0))
    return torch.where((row < cu_seqlens[-1])[:, None], out[image, place], 0)


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    mask = some = None
    if seen is not None:
        k, v = (torch.where(seen[..., None, None], t, 0) for t in (k, v))
        some = seen.any(1, keepdim=True)
        mask = (seen | ~some)[:, None, None]  # a row without keys would be NaN
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.transpose(1, 2).flatten(2)
    return out if some is None else torch.where(some[..., None], out, 0)
