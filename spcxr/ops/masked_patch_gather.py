"""The fused input path: from raw pixels to what the encoder is shown, in one pass.

crop and flip -> antialiased resample -> scale and shift -> patches -> hide groups, or keep the
visible patches alone. Grey levels of one or two bytes go in, rows of patches come out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch, philox
from spcxr.ops.checks import traced, values_seen
from spcxr.ops.patches import patchify
from spcxr.ops.views import (
    FILLS,
    SCHEMA,
    TOKEN_TYPES,
    Fill,
    Views,
    check_fill,
    check_mask,
    check_views,
    clean_images,
    pixel_mask,
    shuffled,
)


class Packed(NamedTuple):
    """The visible patches of a batch, without padding between images.

    ``tokens [T, C*P*P]``; ``ids [T]`` int32, the number of each patch in its image, -1 past the
    end; ``cu_seqlens [B + 1]`` int32, the row at which each image begins.
    """

    tokens: Tensor
    ids: Tensor
    cu_seqlens: Tensor


def masked_patch_gather(
    views: Views,
    fill: Fill | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Views as rows of patches, hidden pixels replaced (GMML, arXiv 2205.14986).

    `noise` is N(0, 1), number ``n * C*P*P + e`` of the image's stream for element ``e`` of patch
    ``n``; `zeros` the value 0, which is the mean of normalised data; `other` the same pixels of the
    partner's view; `shuffle` those of another rectangle of the view.

    Parameters
    ----------
    views
        images, boxes, size and patches: `Views`.
    fill
        what is hidden, and by what: `Fill`. None: nothing, the clean views.
    dtype
        float32, bfloat16 or float16; values are rounded once.
    backend
        ``auto``, or one of `dispatch.BACKENDS`.

    Returns
    -------
    ``[B, N, C*P*P]``, patches in row-major order, elements in (channel, row, column) order.

    Raises
    ------
    SpcxrError
        parameters that do not fit, before any memory is touched; `dispatch.BackendUnavailable`.

    >>> from spcxr.ops.views import whole_views
    >>> images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    >>> masked_patch_gather(whole_views(images, patch_px=8))[0, 1, :3]
    tensor([ 8.,  9., 10.])
    """
    check_views(views)
    _check_dtype(dtype)
    if fill is not None:
        check_fill(views, fill)
    kernel = dispatch.kernel("masked_patch_gather", backend, views.pixels.device.type, _REFERENCE)
    hidden: tuple[Any, ...] = (None,) * 6 + (0, 0, 0) if fill is None else fill.words
    return kernel(*views.words, *hidden, dtype)


def visible_patch_gather(
    views: Views,
    mask: Tensor,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Packed:
    """The patches that are not hidden, packed one image after the other (MAE, NaViT's packing).

    Parameters
    ----------
    views
        images, boxes, size and patches: `Views`.
    mask
        ``[B, Gh, Gw]`` bool, True = hidden.
    rows
        rows of the result, for static shapes, below 2**31; those past the last visible patch are
        zeros with id -1. None: exactly the visible patches, which are counted first (a GPU is
        waited for, and torch.export has nothing to count).
    dtype, backend
        as in `masked_patch_gather`.

    Returns
    -------
    `Packed`. The most patches an image can have is the grid's, whatever the mask: give that as
    ``n_max`` to attention.

    Raises
    ------
    SpcxrError
        parameters that do not fit; (on the CPU) fewer ``rows`` than visible patches; 2**31 patches
        and more.

    >>> from spcxr.ops.views import whole_views
    >>> images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    >>> mask = torch.tensor([[[True, False], [False, True]], [[True, True], [True, False]]])
    >>> packed = visible_patch_gather(whole_views(images, patch_px=8), mask)
    >>> packed.tokens.shape, packed.ids.tolist(), packed.cu_seqlens.tolist()
    (torch.Size([3, 64]), [1, 2, 3], [0, 2, 3])
    """
    check_views(views)
    _check_dtype(dtype)
    check_mask(views, mask, patches_only=True)
    rows = _rows_of(mask, rows)
    device = views.pixels.device.type
    kernel = dispatch.kernel("visible_patch_gather", backend, device, _VISIBLE_REFERENCE)
    return Packed(*kernel(*views.words, mask.contiguous(), rows, dtype))


def _rows_of(mask: Tensor, rows: int | None) -> int:
    """Rows of the packed result; int32 counts them."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if rows is None and traced(mask) and not compiling:  # torch.compile may break its graph here
        raise SpcxrError(
            "rows=None counts the visible patches, and torch.export and fake tensors have none to "
            "count; give rows"
        )
    if not traced(mask):
        if mask.numel() >= 2**31:
            raise SpcxrError(f"{mask.numel()} patches, 2**31 or more, in one call; split the batch")
        if rows is not None and not 0 <= rows < 2**31:
            raise SpcxrError(f"rows {rows}; give 0 to 2**31 - 1, at most {mask.numel()} are needed")
    if rows is None:
        return int((~mask).sum())
    if values_seen(mask) and rows < int((~mask).sum()):
        raise SpcxrError(
            f"rows {rows}: fewer than the {int((~mask).sum())} visible patches; give as many"
        )
    return rows


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in TOKEN_TYPES:
        raise SpcxrError(f"no tokens of {dtype}; choose float32, bfloat16 or float16")


# --- plain torch ----------------------------------------------------------------------------


def _reference(*words: Any) -> Tensor:
    """Resample everything, build every fill, choose."""
    views, dtype = Views.of_words(words), words[-1]
    clean, patch = clean_images(views), views.patch_px
    if words[7] is None:
        return patchify(clean, patch).to(dtype)
    fill = Fill(*words[7:-1])
    kind = fill.kind[:, None, None, None]
    filling = torch.zeros_like(clean)
    filling = torch.where(kind == FILLS.index("other"), clean[fill.partner], filling)
    moved = shuffled(clean, fill.blocks, fill.sources)
    rows = patchify(torch.where(kind == FILLS.index("shuffle"), moved, filling), patch)
    noise = philox.normal(
        fill.image_ids,
        rows.shape[1] * rows.shape[2],
        seed=fill.seed,
        epoch=fill.epoch,
        stream=f"noise-{fill.view}",
    )
    rows = torch.where(kind[..., 0] == FILLS.index("noise"), noise.view_as(rows), rows)
    hidden = patchify(pixel_mask(views, fill.mask)[:, None].expand_as(clean), patch)
    return torch.where(hidden, rows, patchify(clean, patch)).to(dtype)


def _visible_reference(*words: Any) -> tuple[Tensor, Tensor, Tensor]:
    """All patches, then those that are wanted."""
    views, (mask, rows, dtype) = Views.of_words(words), words[7:]
    visible = ~mask.flatten(1)
    tokens = patchify(clean_images(views), views.patch_px)[visible].to(dtype)
    numbers = torch.arange(visible.shape[1], dtype=torch.int32, device=mask.device)
    ids = numbers.expand(visible.shape)[visible]
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
    starts[1:] = visible.sum(1).cumsum(0)
    packed = tokens.new_zeros(rows, tokens.shape[1])
    numbered = ids.new_full((rows,), -1)
    packed[: len(ids)], numbered[: len(ids)] = tokens, ids
    return packed, numbered, starts


# --- torch.compile, torch.export ------------------------------------------------------------


def _fake(pixels: Tensor, *rest: Any) -> Tensor:
    size, patch, dtype = rest[4], rest[5], rest[-1]
    patches = (size[0] // patch) * (size[1] // patch)
    return pixels.new_empty(
        (pixels.shape[0], patches, pixels.shape[1] * patch * patch), dtype=dtype
    )


def _visible_fake(pixels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    patch, rows, dtype = rest[5], rest[7], rest[8]
    length = pixels.shape[1] * patch * patch
    ids = pixels.new_empty((rows,), dtype=torch.int32)
    starts = pixels.new_empty((pixels.shape[0] + 1,), dtype=torch.int32)
    return pixels.new_empty((rows, length), dtype=dtype), ids, starts


dispatch.register_fake("masked_patch_gather", _fake)
dispatch.register_fake("visible_patch_gather", _visible_fake)
_REFERENCE = dispatch.register_reference(
    f"masked_patch_gather({SCHEMA}, Tensor? mask, Tensor? kind, Tensor? partner, Tensor? blocks, "
    "Tensor? sources, Tensor? image_ids, SymInt seed, SymInt epoch, int view, ScalarType dtype) "
    "-> Tensor",
    _reference,
    _fake,
)
_VISIBLE_REFERENCE = dispatch.register_reference(
    f"visible_patch_gather({SCHEMA}, Tensor mask, SymInt rows, ScalarType dtype) -> "
    "(Tensor tokens, Tensor ids, Tensor cu_seqlens)",
    _visible_reference,
    _visible_fake,
)
