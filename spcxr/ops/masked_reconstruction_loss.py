"""How well hidden pixels were rebuilt: L1 or MSE against the raw images, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch
from spcxr.ops.patches import patchify
from spcxr.ops.views import (
    SCHEMA,
    TOKEN_TYPES,
    Views,
    check_mask,
    check_views,
    clean_images,
    pixel_mask,
)

DISTANCES = ("l1", "mse")
PATCH_VARIANCE_FLOOR = 1e-6  # kPatchVarianceFloor of csrc/core/views.h


def masked_reconstruction_loss(
    predicted: Tensor,
    views: Views,
    mask: Tensor,
    *,
    distance: str = "l1",
    normalise_patches: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mean distance between predicted and clean elements over the hidden pixels of the batch.

    The target is computed from the raw images again instead of being kept. Where a gradient is
    wanted, the same pass keeps what it is made of: the errors' signs as int8 (``l1``), or the
    errors as float32 (``mse``). Differentiable by ``predicted`` alone, once: what goes twice
    through the loss raises.

    Parameters
    ----------
    predicted
        ``[B, N, C*P*P]`` float32, bfloat16 or float16, on the images' device.
    views
        the images and boxes that the corrupted views were made of.
    mask
        ``[B, h, w]`` (pixels) or ``[B, Gh, Gw]`` (patches) bool, True = hidden.
    distance
        ``l1`` (GMML) or ``mse`` (MAE, MC-SSL).
    normalise_patches
        each target patch less its mean, over its standard deviation (MAE's ``norm_pix_loss``:
        unbiased variance + 1e-6).
    backend
        ``auto``, or one of `dispatch.BACKENDS`.

    Returns
    -------
    float32 scalar; 0, with zero gradients, where nothing is hidden.

    Raises
    ------
    SpcxrError
        parameters that do not fit; `dispatch.BackendUnavailable`.

    >>> from spcxr.ops.views import whole_views
    >>> views = whole_views(torch.zeros(1, 1, 16, 16, dtype=torch.uint8), patch_px=8)
    >>> predicted = torch.full((1, 4, 64), 0.5, requires_grad=True)
    >>> loss = masked_reconstruction_loss(predicted, views, torch.ones(1, 2, 2, dtype=torch.bool))
    >>> loss.backward(); loss.item(), predicted.grad.sum().item()
    (0.5, 1.0)
    """
    check_views(views)
    check_mask(views, mask)
    if distance not in DISTANCES:
        raise SpcxrError(f"no distance {distance!r}; choose from: {', '.join(DISTANCES)}")
    patches = views.grid[0] * views.grid[1]
    shape = (views.pixels.shape[0], patches, views.row_length)
    if tuple(predicted.shape) != shape or predicted.dtype not in TOKEN_TYPES:
        raise SpcxrError(
            f"predictions are {tuple(predicted.shape)} {predicted.dtype}; give {list(shape)} of "
            "float32, bfloat16 or float16"
        )
    if predicted.device != views.pixels.device:
        raise SpcxrError(
            f"predictions on {predicted.device}, images on {views.pixels.device}; "
            "move them to one device"
        )
    verb = "masked_reconstruction_loss"
    kernel = dispatch.kernel(verb, backend, predicted.device.type, _REFERENCE)
    wanted = torch.is_grad_enabled() and predicted.requires_grad
    words = (*views.words, mask.contiguous(), distance == "mse", normalise_patches)
    if dispatch.choose(verb, backend, predicted.device.type) == "triton":
        return _Loss.apply(kernel, predicted, words, wanted)
    return kernel(predicted, *words, wanted)[0]  # an op, whose autograd is registered below


class _Once(torch.autograd.Function):
    """The gradient, where a graph of it is made (``create_graph=True``): that graph ends here.

    Not `once_differentiable`, which lets a graph pass whose upstream is a constant: second
    derivatives by the parameters behind the predictions would then come out, but not in full.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _upstream: Tensor) -> Tensor:
        raise SpcxrError(
            "masked_reconstruction_loss has no second derivative; leave it out of what is "
            "differentiated with create_graph=True"
        )


def _product(slope: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.ops.spcxr.reconstruction_gradient`` in plain torch."""
    return (slope.float() * factor).to(dtype)


def _gradient_of(product: Any, ctx: Any, upstream: Tensor) -> Tensor:
    """d loss / d predicted, times what comes from above; not to be differentiated again.

    One element's part is below what float16 holds before a loss scaler has multiplied it, and the
    scaler's 65536 is above: both meet in float32.
    """
    slope, weight = ctx.saved_tensors
    with torch.no_grad():
        gradient: Tensor = product(slope, weight * upstream, ctx.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    once: Tensor = _Once.apply(gradient.requires_grad_())
    return once


class _Loss(torch.autograd.Function):
    """Autograd of the Triton twin, which torch does not know as an op."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, predicted: Tensor, words: Any, wanted: bool) -> Tensor:
        loss, slope, weight = kernel(predicted.detach(), *words, wanted)
        ctx.save_for_backward(slope, weight)
        ctx.dtype = predicted.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, _gradient_of(_product, ctx, upstream), None, None


def _reference(predicted: Tensor, *words: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch, and what its gradient is made of."""
    views, (mask, squared, normalise_patches, needs_gradient) = Views.of_words(words), words[7:]
    clean = clean_images(views)
    target = patchify(clean, views.patch_px)
    if normalise_patches:
        target = target - target.mean(-1, keepdim=True)
        variance = target.square().sum(-1, keepdim=True) / max(views.row_length - 1, 1)
        target = target / (variance + PATCH_VARIANCE_FLOOR).sqrt()
    hidden = patchify(pixel_mask(views, mask)[:, None].expand_as(clean), views.patch_px)
    error = (predicted.float() - target).masked_fill(~hidden, 0)  # times 0, a NaN would stay
    share = 1.0 / hidden.sum().clamp(min=1).double()
    total = (error.square() if squared else error.abs()).sum(dtype=torch.float64)
    loss, weight = (total * share).float(), (share * (2 if squared else 1)).float()
    slope = error if squared else error.sign().to(torch.int8)
    return loss, slope if needs_gradient else slope.new_empty(0), weight


def _fake(predicted: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    squared, _normalise, needs_gradient = rest[-3:]
    shape = predicted.shape if needs_gradient else (0,)
    slope = predicted.new_empty(shape, dtype=torch.float32 if squared else torch.int8)
    loss, weight = (predicted.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, slope, weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the predictions' size for the second output
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.count = inputs[0].dtype, len(inputs)


def _backward_by(product: Any) -> Any:
    def backward(ctx: Any, upstream: Tensor | None, *_of_what_is_kept: None) -> tuple[Any, ...]:
        gradient = None if upstream is None else _gradient_of(product, ctx, upstream)
        return gradient, *(None,) * (ctx.count - 1)

    return backward


def _native_product(slope: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    product: Tensor = torch.ops.spcxr.reconstruction_gradient(slope, factor, dtype)
    return product


def _fake_product(slope: Tensor, _factor: Tensor, dtype: torch.dtype) -> Tensor:
    return slope.new_empty(slope.shape, dtype=dtype)


dispatch.register_fake("masked_reconstruction_loss", _fake)
dispatch.register_fake("reconstruction_gradient", _fake_product)
_REFERENCE = dispatch.register_reference(
    f"masked_reconstruction_loss(Tensor predicted, {SCHEMA}, Tensor mask, bool squared, "
    "bool normalise_patches, bool needs_gradient) -> (Tensor loss, Tensor slope, Tensor weight)",
    _reference,
    _fake,
)
torch.library.register_autograd(
    "spcxr_reference::masked_reconstruction_loss", _backward_by(_product), setup_context=_keep
)
dispatch.register_autograd("masked_reconstruction_loss", _backward_by(_native_product), _keep)
