"""The linear layers of an encoder's block in use, in bfloat16, with all that stands between them.

`norm_linear` (LayerNorm, then the qkv projection) and `residual_mlp` (output projection, residual,
LayerNorm, MLP, residual) are, with `masked_attention` between them, a pre-norm block
(arXiv 2010.11929). Rows go through all layers of a call while they are in the cache; sums, the
residual stream within a call and LayerNorm's arithmetic are in float32. No gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch

MULTIPLE = 32  # of every width: what the products work in


class Norm(NamedTuple):
    """LayerNorm over the last axis: weight and bias ``[D]`` bfloat16, and eps."""

    weight: Tensor
    bias: Tensor
    eps: float


class TiledLinear(NamedTuple):
    """A linear layer: ``weight`` as `tiled` orders it, ``bias [out]`` bfloat16."""

    weight: Tensor
    bias: Tensor


def tiled(weight: Tensor) -> Tensor:
    """A linear layer's weight ``[out, in]`` in the order that the products read it.

    ``[out/16, in/32, 16, 16, 2]`` bfloat16, contiguous: tiles of 16 pairs of neighbours along
    ``in`` for 16 columns, as AMX (TDPBF16PS) and AVX-512-BF16 (VDPBF16PS) take them.

    Raises
    ------
    SpcxrError
        a side that is no multiple of 32.

    >>> weight = torch.arange(64 * 32).view(64, 32).bfloat16()
    >>> tiled(weight).shape, torch.equal(untiled(tiled(weight)), weight)
    (torch.Size([4, 1, 16, 16, 2]), True)
    """
    out, wide = weight.shape
    if out % MULTIPLE or wide % MULTIPLE:
        raise SpcxrError(f"a weight of {out} x {wide}; give multiples of {MULTIPLE}")
    parts = weight.bfloat16().view(out // 16, 16, wide // 32, 16, 2)
    return parts.permute(0, 2, 3, 1, 4).contiguous()


def untiled(weight: Tensor) -> Tensor:
    """What `tiled` made, as ``[out, in]`` again."""
    columns, steps = weight.shape[:2]
    return weight.permute(0, 3, 1, 2, 4).reshape(columns * 16, steps * 32)


def norm_linear(
    tokens: Tensor, norm: Norm, linear: TiledLinear, *, backend: str = "auto"
) -> Tensor:
    """``linear(norm(tokens))``.

    Parameters
    ----------
    tokens
        ``[.., D]`` bfloat16, contiguous.
    backend
        ``auto``, ``native`` (a CPU with products of bfloat16) or ``reference``, plain torch.

    Returns
    -------
    ``[.., out]`` bfloat16. A row's numbers do not depend on the rows beside it.

    Raises
    ------
    SpcxrError
        tensors that do not fit together; `dispatch.BackendUnavailable`.

    >>> norm = Norm(torch.ones(32).bfloat16(), torch.zeros(32).bfloat16(), 1e-6)
    >>> layer = TiledLinear(tiled(torch.eye(32)), torch.ones(32).bfloat16())
    >>> tokens = torch.tensor([[-1.0, 1.0] * 16]).bfloat16()
    >>> norm_linear(tokens, norm, layer)[0, :4]
    tensor([0., 2., 0., 2.], dtype=torch.bfloat16)
    """
    _check(tokens, norm, linear)
    call = dispatch.kernel("norm_linear", backend, tokens.device.type, reference_norm_linear)
    made: Tensor = call(tokens, *norm, *linear)
    return made


class BlockEnd(NamedTuple):
    """The layers of a block after attention: D to D, LayerNorm, D to H, H to D."""

    proj: TiledLinear
    norm: Norm
    fc1: TiledLinear
    fc2: TiledLinear


def residual_mlp(
    tokens: Tensor, attended: Tensor, layers: BlockEnd, *, backend: str = "auto"
) -> Tensor:
    """``y + fc2(gelu(fc1(norm(y))))`` of ``y = tokens + proj(attended)``.

    Parameters
    ----------
    tokens, attended
        ``[.., D]`` bfloat16, contiguous: what came into the block, and what attention gave.
    backend
        as for `norm_linear`.

    Returns
    -------
    ``[.., D]`` bfloat16. GELU is the exact one, to 5e-5.

    Raises
    ------
    SpcxrError
        tensors that do not fit together; `dispatch.BackendUnavailable`.

    >>> ones, eye = torch.ones(32).bfloat16(), tiled(torch.eye(32))
    >>> layer, norm = TiledLinear(eye, 0 * ones), Norm(ones, 0 * ones, 1e-6)
    >>> residual_mlp(ones[None], ones[None], BlockEnd(layer, norm, layer, layer))[0, :2]
    tensor([2., 2.], dtype=torch.bfloat16)
    """
    _check(tokens, layers.norm, layers.proj)
    _check(tokens, layers.norm, layers.fc1)
    hidden = layers.fc1.bias.shape[0]
    if attended.shape != tokens.shape or layers.fc2.weight.shape[1] * 32 != hidden:
        raise SpcxrError(
            f"rows {tuple(tokens.shape)} and {tuple(attended.shape)}, fc1 to {hidden}, fc2 from "
            f"{layers.fc2.weight.shape[1] * 32}; give one shape and one hidden width"
        )
    call = dispatch.kernel("residual_mlp", backend, tokens.device.type, reference_residual_mlp)
    made: Tensor = call(tokens, attended, *layers.proj, *layers.norm, *layers.fc1, *layers.fc2)
    return made


def _check(tokens: Tensor, norm: Norm, linear: TiledLinear) -> None:
    wide = linear.weight.shape[1] * 32 if linear.weight.ndim == 5 else None
    if tokens.dtype != torch.bfloat16 or tokens.ndim == 0 or tokens.shape[-1] != wide:
        raise SpcxrError(
            f"rows of {tuple(tokens.shape)} {tokens.dtype} for a weight of "
            f"{tuple(linear.weight.shape)}; give bfloat16 [.., in] and a weight from tiled()"
        )
    if not tokens.is_contiguous():
        raise SpcxrError("rows do not lie side by side; call .contiguous()")
    if norm.weight.shape[0] != wide:
        raise SpcxrError(f"a norm over {norm.weight.shape[0]} of rows of {wide}; give one width")


# --- plain torch, from the words of the native ops ---------------------------------------------


def _apply(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product of bfloat16 with its sums in float32."""
    return F.linear(rows.bfloat16().float(), untiled(weight).float(), bias.float())


def _normalised(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(rows.float(), weight.shape, weight.float(), bias.float(), eps)


def reference_norm_linear(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """`norm_linear` in plain torch."""
    rows = _normalised(tokens, norm_weight, norm_bias, eps)
    return _apply(rows, weight, bias).bfloat16()


def reference_residual_mlp(tokens: Tensor, attended: Tensor, *words: Any) -> Tensor:
    """`residual_mlp` in plain torch; ``words`` are those of `BlockEnd`, one after the other."""
    proj, proj_bias, norm, norm_bias, eps, fc1, fc1_bias, fc2, fc2_bias = words
    stream = tokens.float() + _apply(attended, proj, proj_bias)
    hidden = F.gelu(_apply(_normalised(stream, norm, norm_bias, eps), fc1, fc1_bias))
    return (stream + _apply(hidden, fc2, fc2_bias)).bfloat16()


# --- torch.compile, torch.export ---------------------------------------------------------------


def _norm_linear_fake(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    return tokens.new_empty((*tokens.shape[:-1], bias.shape[0]))


def _residual_mlp_fake(tokens: Tensor, *words: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


dispatch.register_fake("norm_linear", _norm_linear_fake)
dispatch.register_fake("residual_mlp", _residual_mlp_fake)
