"""Masked attention where torch would be silently wrong, and where there are shapes alone."""

import pytest
import torch
from attention_cases import PADDING, Call
from torch.autograd import forward_ad
from view_cases import needs_native

from spcxr.errors import SpcxrError
from spcxr.ops.masked_attention import masked_attention


@needs_native
def test_exports_packed_with_a_dynamic_batch():
    class Attend(torch.nn.Module):
        def forward(self, qkv, starts):
            return masked_attention(qkv, cu_seqlens=starts, n_max=20, backend="native")

    first, other = (
        torch.tensor(values, dtype=torch.int32) for values in ((0, 5, 6, 7, 12), (0, 3, 15))
    )
    sizes = {"qkv": {0: torch.export.Dim("rows")}, "starts": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        Attend(), (torch.randn(12, 3, 2, 64), first), dynamic_shapes=sizes
    )
    qkv = torch.randn(15, 3, 2, 64)
    wanted = masked_attention(qkv, cu_seqlens=other, n_max=20, backend="native")
    assert torch.equal(program.module()(qkv, other), wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own use
def test_forward_mode_is_refused(backend):
    """Torch would drop the tangents."""
    qkv = torch.randn(1, 5, 3, 1, 64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, qkv)
        with pytest.raises((SpcxrError, NotImplementedError), match=r"(?i)forward"):
            masked_attention(dual, backend=backend)


def test_shapes_on_the_meta_device():
    qkv = torch.zeros(5, 3, 2, 64, device="meta")
    assert masked_attention(qkv[None]).shape == (1, 5, 128)
    starts = torch.zeros(3, dtype=torch.int32, device="meta")
    assert masked_attention(qkv, cu_seqlens=starts, n_max=4).shape == (5, 128)


def test_starts_may_have_strides(backend):
    call = Call("packed")
    wanted = call(backend)
    call.cu_seqlens = call.cu_seqlens.repeat_interleave(2)[::2]
    assert torch.equal(call(backend), wanted)


def test_without_sequences_padding_is_zero(backend):
    call = Call("no image, packed")
    call.qkv.data[:] = torch.nan
    assert len(call.qkv) == PADDING
    assert not call(backend).any()


@needs_native
@pytest.mark.parametrize("most", [5, 10**8, 2**31 - 1])
def test_any_bound_of_the_lengths_is_taken(most):
    """Memory goes by the longest sequence, not by n_max."""
    call = Call("packed")
    wanted = call("native")
    assert torch.equal(call("native", n_max=max(most, call.n_max)), wanted)


def test_torch_func_goes_to_sdpa():
    qkv = torch.randn(1, 5, 3, 1, 64)

    def total(x):
        return masked_attention(x).square().sum()

    mine = torch.func.grad(total)(qkv)
    leaf = qkv.clone().requires_grad_()
    torch.testing.assert_close(mine, torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.gpu
def test_rows_may_begin_anywhere_on_a_gpu():
    """Rows that lie side by side, but from an odd element on."""
    flat = torch.randn(1 + 2 * 9 * 3 * 2 * 64, dtype=torch.bfloat16, device="cuda")
    odd = flat[1:].view(2, 9, 3, 2, 64)
    assert torch.equal(masked_attention(odd), masked_attention(odd.clone()))
