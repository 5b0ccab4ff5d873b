"""Attention of short sequences with hidden keys: dense, key-masked, or packed without padding.

Scaled dot-product attention (arXiv 1706.03762), read in place from the fused qkv projection and
written ready for the output projection. Made for the lengths of (masked) vision transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch
from spcxr.ops.attention_reference import WORD, pack_key_mask, reference_attention
from spcxr.ops.checks import constant_when_traced, values_seen
from spcxr.ops.views import TOKEN_TYPES

VERB = "masked_attention"
MAX_HEAD_DIM = 256


def masked_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    n_max: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``softmax(scale * q k^T) v`` of each head, over the keys that are not masked.

    Masked keys are not read, whatever they hold. A query without any key gets 0 and gives zero
    gradients. Forward and backward are deterministic.

    Parameters
    ----------
    qkv
        ``[B, N, 3, h, d]``, or packed ``[T, 3, h, d]`` with ``cu_seqlens``; or a triple q, k, v of
        ``[B, N, h, d]`` or ``[T, h, d]``. float32, bfloat16 or float16 (float64: the reference
        serves), any strides. Under autocast float32 is cast as for a matrix product.
    bias
        ``[3, h, d]`` or ``[3*h*d]``, added to q, k and v while they are read. None: nothing.
    key_mask
        ``[B, N]`` bool (packed: ``[B, n_max]``), True = masked; or the same from `pack_key_mask`,
        for a mask that serves many layers. None: nothing is masked.
    cu_seqlens
        ``[B + 1]`` int32, from 0 up: sequence b has the rows ``cu_seqlens[b]`` to
        ``cu_seqlens[b + 1]``. Rows past the last are padding and give 0.
    n_max
        most tokens of a sequence, for a packed batch: a number, so that no device is waited for.
    scale
        of the scores; None: ``1 / sqrt(d)``.
    backend
        ``auto``, or one of `dispatch.BACKENDS`. The reference is torch's
        ``scaled_dot_product_attention``; ``auto`` hands over to it what the kernels do not serve
        (`handed_over`).

    Returns
    -------
    ``[B, N, h*d]`` or ``[T, h*d]``, of ``qkv``'s dtype.

    Raises
    ------
    SpcxrError
        parameters that do not fit; sequences that fall, are longer than ``n_max`` or go past ``T``
        (on a GPU, where values are not read back, the kernel traps);
        `dispatch.BackendUnavailable`.

    >>> masked_attention(torch.zeros(2, 5, 3, 4, 8)).shape
    torch.Size([2, 5, 32])
    >>> starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> masked_attention(torch.ones(5, 3, 1, 2), cu_seqlens=starts, n_max=3)[0]
    tensor([1., 1.])
    """
    parts = tuple(_as_computed(t) for t in ((qkv,) if isinstance(qkv, Tensor) else qkv))
    n_max = _check_parts(parts, cu_seqlens, n_max)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    dim = parts[0].shape[-1]
    if bias is not None:
        bias = _check_bias(_as_computed(bias), parts[0])
    count = parts[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    bits = None if key_mask is None else _check_key_mask(key_mask, count, n_max, parts[0].device)
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    sequences = (bias, bits, cu_seqlens, n_max, scale)
    served = _serving(backend, parts[0], n_max)
    if served == "reference":
        q, k, v = _split(parts)
        return reference_attention(q, k, v, bias, bits, cu_seqlens, n_max, scale)
    inputs = parts if bias is None else (*parts, bias)
    _check_forward_mode(inputs)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if served == "native":
        name = VERB if len(parts) == 1 else f"{VERB}_split"
        return getattr(torch.ops.spcxr, name)(*parts, *sequences, wanted)[0]
    return _Twin.apply(len(parts), wanted, *parts, *sequences)


# --- what is asked for, and who serves --------------------------------------------------------


def _as_computed(t: Tensor) -> Tensor:
    """Autocast's dtype where it holds, and heads that a kernel can read: their elements side by
    side, on a GPU at multiples of 16 bytes."""
    kind = t.device.type
    if kind != "meta" and t.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        t = t.to(torch.get_autocast_dtype(kind))
    if t.ndim == 0:
        return t
    apart = kind == "cuda" and any(n % 8 for n in (t.storage_offset(), *t.stride()[:-1]))
    if apart:  # contiguous() would leave what merely begins at an odd place
        return t.clone(memory_format=torch.contiguous_format)
    return t if t.stride(-1) == 1 else t.contiguous()


def _check_parts(parts: tuple[Tensor, ...], cu_seqlens: Tensor | None, n_max: int | None) -> int:
    """The most tokens of a sequence; refuses what does not fit together."""
    if len(parts) not in (1, 3):
        raise SpcxrError(f"{len(parts)} tensors; give qkv, or three: q, k, v")
    first, packed = parts[0], cu_seqlens is not None
    rank = (3 if packed else 4) + (len(parts) == 1)
    layout = ("[T" if packed else "[B, N") + (", 3, h, d]" if len(parts) == 1 else ", h, d]")
    if any(
        t.ndim != rank or t.shape != first.shape or (len(parts) == 1 and t.shape[-3] != 3)
        for t in parts
    ):
        shapes = ", ".join(str(list(t.shape)) for t in parts)
        raise SpcxrError(f"attention over {shapes}; give {layout} or three of them: q, k, v")
    dtypes = {t.dtype for t in parts}
    if len(dtypes) > 1 or first.dtype not in (*TOKEN_TYPES, torch.float64):
        named = ", ".join(map(str, dtypes))
        raise SpcxrError(f"attention in {named}; give one of float32, bfloat16, float16")
    if any(t.device != first.device for t in parts):
        raise SpcxrError("q, k and v are on different devices; move them to one")
    if first.shape[-1] == 0:
        raise SpcxrError("head dim 0 is not served; give 1 or more")
    if cu_seqlens is None:
        if n_max is not None:
            raise SpcxrError("n_max is for a packed batch; give cu_seqlens too")
        return first.shape[1]
    if not isinstance(n_max, (int, torch.SymInt)) or n_max < 0:
        raise SpcxrError("a packed batch needs n_max, the most tokens of a sequence")
    _check_sequences(cu_seqlens, first, n_max)
    return n_max


def _check_forward_mode(inputs: tuple[Tensor, ...]) -> None:
    """Torch would drop the tangents of an op that has none, without a word."""
    if torch.compiler.is_compiling():
        return
    if any(unpack_dual(t).tangent is not None for t in inputs):
        raise SpcxrError(f"{VERB} has no forward-mode derivative; use backward")


def _check_sequences(cu_seqlens: Tensor, first: Tensor, n_max: int) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] == 0:
        raise SpcxrError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; give [B + 1] int32"
        )
    if cu_seqlens.device != first.device:
        raise SpcxrError(f"cu_seqlens on {cu_seqlens.device}, qkv on {first.device}; move one")
    if not values_seen(cu_seqlens):
        return
    total, lengths = first.shape[0], cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > total or (lengths < 0).any():
        raise SpcxrError(f"cu_seqlens must rise from 0 to at most the {total} rows of the batch")
    if (lengths > n_max).any():
        raise SpcxrError(f"a sequence has {int(lengths.max())} tokens, n_max is {n_max}; raise it")


def _check_bias(bias: Tensor, first: Tensor) -> Tensor:
    heads, dim = first.shape[-2:]
    if bias.dtype != first.dtype or bias.device != first.device:
        raise SpcxrError(
            f"bias in {bias.dtype} on {bias.device}; give {first.dtype} on {first.device}"
        )
    if tuple(bias.shape) not in ((3, heads, dim), (3 * heads * dim,)):
        raise SpcxrError(f"bias is {tuple(bias.shape)}; give [3, {heads}, {dim}] or its flat form")
    return bias.reshape(3, heads, dim).contiguous()


def _check_key_mask(mask: Tensor, count: int, n_max: int, device: torch.device) -> Tensor:
    """The mask in bits."""
    words = -(-n_max // WORD)
    wanted = (count, n_max) if mask.dtype == torch.bool else (count, words)
    if mask.dtype not in (torch.bool, torch.int32) or tuple(mask.shape) != wanted:
        raise SpcxrError(
            f"key mask is {tuple(mask.shape)} {mask.dtype}; give [{count}, {n_max}] bool, or "
            f"[{count}, {words}] int32 from pack_key_mask"
        )
    if mask.device != device:
        raise SpcxrError(f"key mask on {mask.device}, qkv on {device}; move them to one device")
    return pack_key_mask(mask) if mask.dtype == torch.bool else mask.contiguous()


def handed_over(
    backend: str, device: torch.device, dtype: torch.dtype, dim: int, n_max: int
) -> str | None:
    """Why a backend's kernels leave a call to ``scaled_dot_product_attention``; None: they serve.

    >>> handed_over("native", torch.device("cpu"), torch.float32, 64, 1025) is None
    True
    >>> handed_over("native", torch.device("cuda"), torch.bfloat16, 64, 1025)
    'sequences of more than 256 tokens'
    """
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64"
    if backend == "triton":
        return None if dim in (16, 32, 64, 128) else "head dims other than 16, 32, 64, 128"
    if dim > MAX_HEAD_DIM:
        return f"head dims of more than {MAX_HEAD_DIM}"
    if device.type == "cpu":
        return None
    if dtype == torch.float32:
        return "float32"
    if dim not in CUDA_HEAD_DIMS:
        return "head dims other than 32, 64, 128"
    if n_max > CUDA_MOST_TOKENS:
        return f"sequences of more than {CUDA_MOST_TOKENS} tokens"
    if _backward_bytes(n_max, dim) > _shared_bytes(device):
        return f"{n_max} tokens of head dim {dim} in the shared memory of this device"
    return None


CUDA_HEAD_DIMS, CUDA_MOST_TOKENS = (32, 64, 128), 256  # of csrc/cuda/attention_tiles.cuh


def _backward_bytes(n_max: int, dim: int) -> int:
    """Shared memory of a block of the backward kernel, which needs the most."""
    return -(-n_max // 16) * 16 * (8 * dim + 10) + 32


@constant_when_traced
def _shared_bytes(device: torch.device) -> int:
    found: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the attribute
    return found.shared_memory_per_block_optin


def _transformed() -> bool:
    """Whether torch.func differentiates: it does not see the gradients registered for an op."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _serving(backend: str, first: Tensor, n_max: int) -> str:
    served = dispatch.choose(VERB, backend, first.device.type)
    reason = handed_over(served, first.device, first.dtype, first.shape[-1], n_max)
    if served != "reference" and reason is None and _transformed():
        reason = "torch.func's transforms"
    if reason is None:
        return served
    if backend == "auto":
        return "reference"
    raise dispatch.BackendUnavailable(f"{VERB}: backend {backend!r} does not serve {reason}")


# --- the twins of the native kernels ----------------------------------------------------------


def _split(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return parts[0].unbind(-3) if len(parts) == 1 else parts


class _Twin(torch.autograd.Function):
    """Autograd of the Triton twin, which torch does not know as an op."""

    @staticmethod
    def forward(ctx: Any, count: int, wanted: bool, *words: Any) -> Tensor:
        twin = dispatch.triton_twin(VERB, VERB)
        parts, sequences = words[:count], words[count:]
        out, lse = twin(*_split(parts), *sequences, wanted)
        bias, bits, cu_seqlens, *ctx.rest = sequences
        ctx.count, ctx.after = count, 0
        ctx.save_for_backward(*parts, bias, bits, cu_seqlens, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        backward = dispatch.triton_twin(VERB, f"{VERB}_backward")
        return None, None, *_gradients(ctx, upstream, backward)


def _gradients(ctx: Any, upstream: Tensor, kernel: Any) -> tuple[Any, ...]:
    """Of the parts, of the bias, and None for what has none."""
    *parts, bias, bits, cu_seqlens, out, lse = ctx.saved_tensors
    made = kernel(upstream, *_split(tuple(parts)), bias, bits, cu_seqlens, *ctx.rest, out, lse)
    of_bias = None
    if bias is not None and ctx.needs_input_grad[-5 - ctx.after]:
        of_bias = made.flatten(0, -4).float().sum(0).to(bias.dtype)
    of_parts = (made,) if ctx.count == 1 else made.unbind(-3)
    return *of_parts, of_bias, None, None, None, None, *(None,) * ctx.after


# --- autograd, torch.compile, torch.export, FLOPs ---------------------------------------------


def _fake(*words: Any) -> tuple[Tensor, Tensor]:
    *parts, _, _, _, _, _, need_lse = words
    first = parts[0]
    rows = first.shape[: first.ndim - (3 if len(parts) == 1 else 2)]
    heads, dim = first.shape[-2:]
    lse = (heads, math.prod(rows)) if need_lse else (0,)
    return first.new_empty((*rows, heads * dim)), first.new_empty(lse, dtype=torch.float32)


def _backward_fake(upstream: Tensor, q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:-2], 3, *q.shape[-2:]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *parts, bias, bits, cu_seqlens, n_max, scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*parts, bias, bits, cu_seqlens, *output)
    ctx.rest, ctx.count, ctx.after = (n_max, scale), len(parts), 1


def _backward(ctx: Any, upstream: Tensor | None, _of_lse: None) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * (ctx.count + 6)
    return _gradients(ctx, upstream, torch.ops.spcxr.masked_attention_backward)


def _backward_twice(_ctx: Any, *_upstream: Any) -> None:
    """Torch would leave a second derivative out with a warning only."""
    raise RuntimeError(f"{VERB} has no second derivative")


def _scores(shape: torch.Size, cu_seqlens: Tensor | None, n_max: int) -> int:
    """Query-key pairs of a call, masked ones too; of unknown sequences, the most there can be."""
    heads = shape[-2]
    if cu_seqlens is None:
        return shape[0] * n_max**2 * heads
    if values_seen(cu_seqlens):
        return int(cu_seqlens.diff().long().square().sum()) * heads
    return (cu_seqlens.shape[0] - 1) * n_max**2 * heads


def _flops(*words: Any, out_val: Any = None, **_: Any) -> int:
    *parts, _, _, cu_seqlens, n_max, _, _ = words
    return 4 * parts[0].shape[-1] * _scores(parts[0].shape, cu_seqlens, n_max)


def _backward_flops(
    _upstream: Tensor,
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    _bias: Tensor | None,
    _bits: Tensor | None,
    cu_seqlens: Tensor | None,
    n_max: int,
    *_: Any,
    **__: Any,
) -> int:
    return 10 * q.shape[-1] * _scores(q.shape, cu_seqlens, n_max)


for _name in (VERB, f"{VERB}_split"):
    dispatch.register_fake(_name, _fake)
    dispatch.register_autograd(_name, _backward, _keep)
dispatch.register_fake(f"{VERB}_backward", _backward_fake)
dispatch.register_autograd(f"{VERB}_backward", _backward_twice, lambda ctx, inputs, output: None)
if dispatch.native().reason is None:
    _ops = torch.ops.spcxr
    register_flop_formula([_ops.masked_attention, _ops.masked_attention_split], get_raw=True)(
        _flops
    )
    register_flop_formula(_ops.masked_attention_backward, get_raw=True)(_backward_flops)
