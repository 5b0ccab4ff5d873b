"""masked_attention in Triton: the formulas of ``csrc/core/attention.h``, forward and backward.

A program takes a block of queries (forward, dq) or of keys (dk and dv) of one head and meets the
other side block by block, in order: no atomics, the same bits in every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
ENDLESS = tl.constexpr(float("inf"))
REST_BLOCK = 4096
# Sums of products are fused, whatever Triton's default. With debug on, Triton asserts that no sum
# overflows; that costs registers.
OPTIONS = {"enable_fp_fusion": True, "sanitize_overflow": False}


class Heads(NamedTuple):
    """One of q, k, v or of their gradients; strides in elements. A packed batch has no batch's."""

    data: Any
    batch: Any
    token: Any
    head: Any


def _interpreted_steps(first, end, step):
    return range(first, int(end.handle.data.item()), step)


# The interpreter cannot take range() of a tensor.
steps = _interpreted_steps if triton.knobs.runtime.interpret else tl.range


@triton.jit
def _turn(n_max, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, head, first token) of a program: blocks of one head are neighbours."""
    blocks = tl.cdiv(n_max, BLOCK)
    pair = tl.program_id(0) // blocks
    return (pair // HEADS).to(tl.int64), pair % HEADS, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _span(cu_seqlens, b, total, n_max):
    """(first row, number of tokens) of a sequence."""
    row, length = b * n_max, n_max
    if cu_seqlens is not None:
        first, end = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1)
        sound = (first >= 0) & (first <= end) & (end <= total) & (end - first <= n_max)
        sound &= (b > 0) | (first == 0)
        tl.device_assert(sound, "cu_seqlens must rise from 0 to the batch's rows, by n_max at most")
        row, length = first.to(tl.int64), end - first
    return row, length


@triton.jit
def _seen(key_bits, b, j, length, n_max):
    """Which keys there are that are not masked."""
    seen = j < length
    if key_bits is not None:
        words = key_bits + b * tl.cdiv(n_max, 32) + j // 32
        seen &= (tl.load(words, mask=seen, other=0) >> (j % 32) & 1) == 0
    return seen


@triton.jit
def _head(t, cu_seqlens, b, row, head):
    """Where a head of a sequence begins."""
    first = b * t.batch if cu_seqlens is None else row * t.token
    return t.data + first + head.to(tl.int64) * t.head


@triton.jit
def _biases(bias, head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """What is added to q, to k and to v of a head, float32."""
    first = bias + head * DIM + tl.arange(0, DIM)
    step: tl.constexpr = HEADS * DIM
    q, k, v = tl.load(first), tl.load(first + step), tl.load(first + 2 * step)
    return q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)


@triton.jit
def _places(begin, token, i, DIM: tl.constexpr):
    """Where rows ``i`` of a head are."""
    return (begin + i.to(tl.int64) * token)[:, None] + tl.arange(0, DIM)[None, :]


@triton.jit
def _rows(begin, token, i, wanted, bias, DIM: tl.constexpr):
    """Rows ``i`` of a head with their bias; what is not wanted is not read: 0 in its place."""
    tile = tl.load(_places(begin, token, i, DIM), mask=wanted[:, None], other=0)
    if bias is not None:
        tile = (tile.to(tl.float32) + bias[None, :]).to(tile.dtype)
    return tile


@triton.jit
def _product(a, b):
    """a b^T in float32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _weighted(weights, rows, total):
    """total + weights rows, in float32."""
    return tl.dot(weights.to(rows.dtype), rows, total, input_precision="ieee")


@triton.jit(debug=True, do_not_specialize=["total", "n_max"])
def attention_kernel(
    out,
    lse,
    q,
    k,
    v,
    bias,
    key_bits,
    cu_seqlens,
    total,
    n_max,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out [total, HEADS * DIM]``, ``lse [HEADS, total]`` or None; a block of queries."""
    b, head, start = _turn(n_max, HEADS, BLOCK_Q)
    row, length = _span(cu_seqlens, b, total, n_max)
    if start < length:
        i = start + tl.arange(0, BLOCK_Q)
        asks = i < length
        keys, values = _head(k, cu_seqlens, b, row, head), _head(v, cu_seqlens, b, row, head)
        queries = _head(q, cu_seqlens, b, row, head)
        q_bias, k_bias, v_bias = bias, bias, bias
        if bias is not None:
            q_bias, k_bias, v_bias = _biases(bias, head, HEADS, DIM)
        asked = _rows(queries, q.token, i, asks, q_bias, DIM)
        most = tl.full((BLOCK_Q,), LOWEST, tl.float32)
        weight = tl.zeros((BLOCK_Q,), tl.float32)
        made = tl.zeros((BLOCK_Q, DIM), tl.float32)
        for first in steps(0, length, BLOCK_K):
            j = first + tl.arange(0, BLOCK_K)
            seen = _seen(key_bits, b, j, length, n_max)
            score = _product(asked, _rows(keys, k.token, j, seen, k_bias, DIM)) * scale
            score = tl.where(seen[None, :], score, -ENDLESS)
            before = most
            most = tl.maximum(before, tl.max(score, 1))
            faded = tl.exp(before - most)
            p = tl.exp(score - most[:, None])
            weight = weight * faded + tl.sum(p, 1)
            made = _weighted(p, _rows(values, v.token, j, seen, v_bias, DIM), made * faded[:, None])
        blind = weight == 0
        made = made / tl.where(blind, 1.0, weight)[:, None]
        places = _places(out + (row * HEADS + head) * DIM, HEADS * DIM, i, DIM)
        tl.store(places, made.to(out.dtype.element_ty), mask=asks[:, None])
        if lse is not None:
            known = tl.where(blind, ENDLESS, most + tl.log(weight))
            line = head.to(tl.int64) * total + row
            tl.store(lse + line + i, known, mask=asks)


@triton.jit(debug=True, do_not_specialize=["total", "n_max"])
def dq_kernel(
    dq,
    delta,
    grad_out,
    q,
    k,
    v,
    bias,
    key_bits,
    cu_seqlens,
    total,
    n_max,
    scale,
    out,
    lse,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq of a block of queries, and ``delta [HEADS, total]``: the sums of grad_out * out."""
    b, head, start = _turn(n_max, HEADS, BLOCK_Q)
    row, length = _span(cu_seqlens, b, total, n_max)
    if start < length:
        i = start + tl.arange(0, BLOCK_Q)
        asks = i < length
        keys, values = _head(k, cu_seqlens, b, row, head), _head(v, cu_seqlens, b, row, head)
        queries = _head(q, cu_seqlens, b, row, head)
        q_bias, k_bias, v_bias = bias, bias, bias
        if bias is not None:
            q_bias, k_bias, v_bias = _biases(bias, head, HEADS, DIM)
        asked = _rows(queries, q.token, i, asks, q_bias, DIM)
        begin = (row * HEADS + head) * DIM
        do = _rows(grad_out + begin, HEADS * DIM, i, asks, None, DIM)
        given = _rows(out + begin, HEADS * DIM, i, asks, None, DIM)
        own = tl.sum(do.to(tl.float32) * given.to(tl.float32), 1)
        line = head.to(tl.int64) * total + row
        tl.store(delta + line + i, own, mask=asks)
        known = tl.load(lse + line + i, mask=asks, other=ENDLESS)
        made = tl.zeros((BLOCK_Q, DIM), tl.float32)
        for first in steps(0, length, BLOCK_K):
            j = first + tl.arange(0, BLOCK_K)
            seen = _seen(key_bits, b, j, length, n_max)
            met = _rows(keys, k.token, j, seen, k_bias, DIM)
            score = tl.where(seen[None, :], _product(asked, met) * scale, -ENDLESS)
            p = tl.exp(score - known[:, None])
            dp = _product(do, _rows(values, v.token, j, seen, v_bias, DIM))
            made = _weighted(p * (dp - own[:, None]), met, made)
        made = (made * scale).to(dq.data.dtype.element_ty)
        begin_dq = _head(dq, cu_seqlens, b, row, head)
        tl.store(_places(begin_dq, dq.token, i, DIM), made, mask=asks[:, None])


@triton.jit(debug=True, do_not_specialize=["total", "n_max"])
def dk_dv_kernel(
    dk,
    dv,
    delta,
    grad_out,
    q,
    k,
    v,
    bias,
    key_bits,
    cu_seqlens,
    total,
    n_max,
    scale,
    lse,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dk and dv of a block of keys; scores are [BLOCK_K, BLOCK_Q] here."""
    b, head, start = _turn(n_max, HEADS, BLOCK_K)
    row, length = _span(cu_seqlens, b, total, n_max)
    if start < length:
        j = start + tl.arange(0, BLOCK_K)
        seen = _seen(key_bits, b, j, length, n_max)
        queries = _head(q, cu_seqlens, b, row, head)
        q_bias, k_bias, v_bias = bias, bias, bias
        if bias is not None:
            q_bias, k_bias, v_bias = _biases(bias, head, HEADS, DIM)
        keys = _rows(_head(k, cu_seqlens, b, row, head), k.token, j, seen, k_bias, DIM)
        values = _rows(_head(v, cu_seqlens, b, row, head), v.token, j, seen, v_bias, DIM)
        grad_out += (row * HEADS + head) * DIM
        line = head.to(tl.int64) * total + row
        made_k = tl.zeros((BLOCK_K, DIM), tl.float32)
        made_v = tl.zeros((BLOCK_K, DIM), tl.float32)
        for first in steps(0, length, BLOCK_Q):
            i = first + tl.arange(0, BLOCK_Q)
            asks = i < length
            asked = _rows(queries, q.token, i, asks, q_bias, DIM)
            do = _rows(grad_out, HEADS * DIM, i, asks, None, DIM)
            known = tl.load(lse + line + i, mask=asks, other=ENDLESS)
            own = tl.load(delta + line + i, mask=asks, other=0)
            p = tl.exp(_product(keys, asked) * scale - known[None, :])
            made_v = _weighted(p, do, made_v)
            ds = p * (_product(values, do) - own[None, :])
            made_k = _weighted(ds, asked, made_k)
        # What a masked key would have had is its row's alone, and dropped.
        made_k = tl.where(seen[:, None], made_k * scale, 0.0).to(dk.data.dtype.element_ty)
        made_v = tl.where(seen[:, None], made_v, 0.0).to(dv.data.dtype.element_ty)
        there = (j < length)[:, None]
        tl.store(_places(_head(dk, cu_seqlens, b, row, head), dk.token, j, DIM), made_k, mask=there)
        tl.store(_places(_head(dv, cu_seqlens, b, row, head), dv.token, j, DIM), made_v, mask=there)


@triton.jit(do_not_specialize=["count", "total"])
def rest_kernel(rows, cu_seqlens, count, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros for the rows of ``rows [total, WIDTH]`` that belong to no sequence."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(cu_seqlens + count).to(tl.int64) * WIDTH
    empty = (element >= used) & (element < total.to(tl.int64) * WIDTH)
    tl.store(rows + element, tl.zeros((BLOCK,), rows.dtype.element_ty), mask=empty)


def _heads(t: torch.Tensor) -> Heads:
    return Heads(t, t.stride(0) if t.dim() == 4 else 0, t.stride(-3), t.stride(-2))


def _sizes(q: torch.Tensor) -> tuple[int, int, dict[str, Any]]:
    """(rows of a program's own side, rows it meets at a time, options): on sm_80 nothing spills."""
    exact, dim = q.dtype == torch.float32, q.shape[-1]
    own, met = (16 if dim > 32 else 32, 16) if exact else (64, 32)
    return own, met, {"num_warps": 8 if exact or dim > 64 else 4, "num_stages": 2, **OPTIONS}


def _words(*words: Any) -> tuple[int, int, tuple[Any, ...]]:
    """(pairs of a sequence and a head, rows, what every kernel is told of a call)."""
    q, k, v, bias, key_bits, cu_seqlens, n_max, scale = words
    count = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    total = q.shape[:-2].numel()
    side = (t if t is None else t.contiguous() for t in (bias, key_bits, cu_seqlens))
    return count * q.shape[-2], total, (*map(_heads, (q, k, v)), *side, total, n_max, scale)


def _clear_rest(rows: torch.Tensor, cu_seqlens: torch.Tensor | None, width: int) -> None:
    """Zeros where a packed batch has no sequence."""
    if cu_seqlens is not None and rows.numel():
        grid = (triton.cdiv(rows.numel(), REST_BLOCK),)
        count, total = len(cu_seqlens) - 1, rows.shape[0]
        rest_kernel[grid](rows, cu_seqlens.contiguous(), count, total, width, REST_BLOCK)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_bits: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    n_max: int,
    scale: float,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.ops.spcxr.masked_attention`` in Triton: (out, lse). No GPU is waited for."""
    pairs, total, words = _words(q, k, v, bias, key_bits, cu_seqlens, n_max, scale)
    heads, dim = q.shape[-2:]
    out = q.new_empty((*q.shape[:-2], heads * dim))
    shape = (heads, total) if need_lse else (0,)
    # Rows of no sequence have no keys.
    lse = q.new_full(shape, float("inf"), dtype=torch.float32)
    own, met, options = _sizes(q)
    grid = (pairs * triton.cdiv(n_max, own),)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if grid[0]:
            asked = lse if need_lse else None
            attention_kernel[grid](out, asked, *words, heads, dim, own, met, **options)
        _clear_rest(out, cu_seqlens, heads * dim)
    return out, lse


def masked_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_bits: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    n_max: int,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """``torch.ops.spcxr.masked_attention_backward`` in Triton: dq, dk, dv as one [.., 3, h, d]."""
    pairs, _total, words = _words(q, k, v, bias, key_bits, cu_seqlens, n_max, scale)
    heads, dim = q.shape[-2:]
    made = q.new_empty((*q.shape[:-2], 3, heads, dim))
    dq, dk, dv = made.unbind(-3)
    delta = torch.empty_like(lse)
    grad_out, out = grad_out.contiguous(), out.contiguous()
    own, met, options = _sizes(q)
    grid = (pairs * triton.cdiv(n_max, own),)
    dq_words = (_heads(dq), delta, grad_out, *words, out, lse, heads, dim, own, met)
    dk_dv_words = (_heads(dk), _heads(dv), delta, grad_out, *words, lse, heads, dim, met, own)
    with torch.cuda.device_of(q):
        if grid[0]:
            dq_kernel[grid](*dq_words, **options)
            dk_dv_kernel[grid](*dk_dv_words, **options)
        _clear_rest(made, cu_seqlens, 3 * heads * dim)
    return made
