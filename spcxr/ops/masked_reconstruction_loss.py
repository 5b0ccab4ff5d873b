"""How well hidden pixels were rebuilt: L1 or MSE against the raw images, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch
from spcxr.ops.patches import patchify
from spcxr.ops.views import TOKEN_TYPES, Views, check_mask, check_views, clean_images, pixel_mask

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

    The target is computed from the raw images again instead of being kept, and where a gradient is
    wanted it is made in the same pass. Differentiable by ``predicted`` alone, once.

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
    kernel = dispatch.kernel(verb, backend, predicted.device.type, _reference)
    wanted = torch.is_grad_enabled() and predicted.requires_grad
    if wanted and predicted.dtype == torch.float16:
        # One element's slope is below what float16 holds before a loss scaler has multiplied it,
        # and the scaler's 65536 is above: the slope stays in float32 until both have met.
        predicted = predicted.float()
    words = (*views.words, mask, distance == "mse", normalise_patches)
    if dispatch.choose(verb, backend, predicted.device.type) == "native":
        return kernel(predicted, *words, wanted)[0]  # its autograd is registered below
    return _Loss.apply(kernel, predicted, words, wanted)


class _Loss(torch.autograd.Function):
    """Autograd of the backends that torch does not know as ops."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, predicted: Tensor, words: Any, wanted: bool) -> Tensor:
        loss, gradient = kernel(predicted.detach(), *words, wanted)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream.to(gradient.dtype), None, None


def _reference(predicted: Tensor, *words: Any) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, and its gradient by hand."""
    views, (mask, squared, normalise_patches, needs_gradient) = Views.of_words(words), words[7:]
    clean = clean_images(views)
    target = patchify(clean, views.patch_px)
    if normalise_patches:
        target = target - target.mean(-1, keepdim=True)
        variance = target.square().sum(-1, keepdim=True) / max(views.row_length - 1, 1)
        target = target / (variance + PATCH_VARIANCE_FLOOR).sqrt()
    hidden = patchify(pixel_mask(views, mask)[:, None].expand_as(clean), views.patch_px)
    error = (predicted.float() - target) * hidden
    weight = 1.0 / hidden.sum().clamp(min=1)
    total = (error.square() if squared else error.abs()).sum(dtype=torch.float64)
    loss = (total * weight.double()).float()
    if not needs_gradient:
        return loss, predicted.new_empty(0)
    slope = 2 * error if squared else error.sign()
    return loss, (slope * weight).to(predicted.dtype)


def _fake(predicted: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gradient = predicted.new_empty(predicted.shape if rest[-1] else (0,))  # contiguous, as made
    return predicted.new_empty((), dtype=torch.float32), gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros of the predictions' size for the second output
    ctx.save_for_backward(output[1])
    ctx.count = len(inputs)


def _backward(ctx: Any, upstream: Tensor | None, _of_gradient: None) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    rest = (None,) * (ctx.count - 1)
    return (None if upstream is None else gradient * upstream.to(gradient.dtype)), *rest


dispatch.register_fake("masked_reconstruction_loss", _fake)
dispatch.register_autograd("masked_reconstruction_loss", _backward, _keep)
