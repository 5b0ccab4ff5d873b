"""One rule for every backend: what is refused, what is mended, what spoils what."""

import numpy as np
import pytest
import torch
from view_cases import fill_of, needs_native, views_of

from spcxr.errors import SpcxrError
from spcxr.ops.masked_patch_gather import masked_patch_gather, visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.views import Views, whole_views


def loss_of(views, mask, backend, distance="mse"):
    rows = torch.ones(len(views.pixels), views.grid[0] * views.grid[1], views.row_length)
    rows.requires_grad_()
    loss = masked_reconstruction_loss(rows, views, mask, distance=distance, backend=backend)
    return loss, torch.autograd.grad(loss, rows)[0]


def same(made, wanted):
    for a, b in zip(made, wanted, strict=True):
        assert torch.equal(a, b)


# --- masks of other bytes than 0 and 1 ------------------------------------------------------


def as_bytes(mask, byte):
    """A PNG's mask, seen as bool: true is any byte but 0."""
    return (mask.to(torch.uint8) * byte).view(torch.bool)


@pytest.mark.parametrize("name", ["cropped", "native size", "colour", "patch of 4"])
@pytest.mark.parametrize("by_patch", [False, True])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_true_of_any_byte_hides(backend, name, by_patch, byte):
    views = views_of(name)
    fill = fill_of(views, by_patch=by_patch)
    for mask in (fill.mask, torch.ones_like(fill.mask)):
        hidden = fill._replace(mask=mask)
        other = fill._replace(mask=as_bytes(mask, byte))
        made = masked_patch_gather(views, other, backend=backend)
        assert torch.equal(made, masked_patch_gather(views, hidden, backend=backend))
        same(loss_of(views, other.mask, backend), loss_of(views, mask, backend))
        if by_patch:
            rows = mask.numel()
            same(
                visible_patch_gather(views, other.mask, rows=rows, backend=backend),
                visible_patch_gather(views, mask, rows=rows, backend=backend),
            )


def test_a_flip_of_any_byte_flips(backend):
    views = views_of("cropped")
    other = views._replace(flip=as_bytes(views.flip, 254))
    made = masked_patch_gather(other, backend=backend)
    assert torch.equal(made, masked_patch_gather(views, backend=backend))


def test_numpy_masks_of_any_byte():
    native = pytest.importorskip("spcxr._native")
    one = np.ones(1, np.float32)
    call = {"size": (2, 2), "patch": 2, "scale": one, "shift": one}
    images = np.zeros((1, 1, 2, 2), np.uint8)
    mask = np.full((1, 1, 1), 255, np.uint8).view(bool)
    tokens, ids, starts = native.visible_patch_gather(images, mask=mask, **call)
    assert (len(tokens), len(ids), starts.tolist()) == (0, 0, [0, 0])
    for grid in ((1, 1, 1), (1, 2, 2)):
        mask = np.full(grid, 255, np.uint8).view(bool)
        hidden = native.masked_patch_gather(images, mask=mask, kind=np.ones(1, np.int32), **call)
        assert not hidden.any()


# --- pixels that are not finite -------------------------------------------------------------


@pytest.mark.parametrize("name", ["native size", "cropped", "magnified", "shrunk"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pixel_that_is_not_finite_spoils_what_it_is_seen_in(backend, name, value):
    def seen(number, views):
        pixels = views.pixels.clone()
        pixels[:, 0, pixels.shape[2] // 2, pixels.shape[3] // 3] = number
        return masked_patch_gather(views._replace(pixels=pixels), backend=backend)

    views = views_of(name, torch.float32)
    if name == "native size":  # the same by a box, and one image of it moved
        boxes = torch.tensor([[0.0, 0, 32, 48]] * 4 + [[3.5, 1.25, 20, 30]])
        seen_whole = seen(value, views).isfinite()
        views = views._replace(boxes=boxes, flip=torch.zeros(5, dtype=torch.bool))
        assert torch.equal(seen(value, views).isfinite()[:4], seen_whole[:4])
    touched = seen(0.0, views) != seen(1e6, views)
    made = seen(value, views)
    assert touched.any((1, 2)).any()
    assert torch.equal(~made.isfinite(), touched)
    assert torch.equal(made[~touched], seen(0.0, views)[~touched])


def test_a_visible_pixel_that_is_not_finite_is_no_part_of_the_loss(backend):
    views = views_of("native size", torch.float32)
    mask = fill_of(views).mask
    wanted = loss_of(views, mask, backend)
    views.pixels[~mask[:, None]] = float("nan")
    same(loss_of(views, mask, backend), wanted)


# --- what the native op refuses is refused or mended first ----------------------------------


def test_a_box_may_miss_the_border_by_a_rounding(backend):
    views = views_of("cropped")
    boxes = torch.tensor([[-5e-4, -5e-4, 61.0, 47.0], [0.0, 0, 61.0005, 47.0005]] * 3)[:5]
    views = views._replace(boxes=boxes)
    made = masked_patch_gather(views, backend=backend)
    wanted = masked_patch_gather(views, backend="reference")
    torch.testing.assert_close(made, wanted, rtol=2e-5, atol=2e-5)
    for wrong in ([-2e-3, 0, 20, 20], [0.0, 0, 61.003, 47], [0, 28.0, 20, 19.01]):
        with pytest.raises(SpcxrError, match="outside its image"):
            masked_patch_gather(views._replace(boxes=torch.tensor([wrong] * 5)), backend=backend)


def spread(tensor):
    """The same numbers, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def test_tensors_that_are_not_contiguous(backend):
    views = views_of("cropped")
    fill, mask = fill_of(views), fill_of(views, by_patch=True).mask
    loose = views._replace(**{n: spread(getattr(views, n)) for n in Views._fields[1:5]})
    parts = dict(zip(fill._fields[:6], map(spread, fill[:6]), strict=True))
    made = masked_patch_gather(loose, fill._replace(**parts), backend=backend)
    assert torch.equal(made, masked_patch_gather(views, fill, backend=backend))
    same(
        visible_patch_gather(loose, spread(mask), backend=backend),
        visible_patch_gather(views, mask, backend=backend),
    )
    same(loss_of(loose, spread(fill.mask), backend), loss_of(views, fill.mask, backend))
    one = views._replace(scale=torch.tensor(0.1).expand(5), boxes=views.boxes[:1].expand(5, 4))
    masked_patch_gather(one, backend=backend)
    column = whole_views(torch.zeros(2, 1, 4, 9)[..., ::9], patch_px=1)
    assert masked_patch_gather(column, backend=backend).shape == (2, 4, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": torch.tensor([0.0, 0, float("nan"), 0, 0])}, "scale of image 2 is nan; give"),
        ({"shift": torch.full((5,), float("inf"))}, "shift of image 0 is inf; give finite"),
        ({"size": (512, 512), "patch_px": 512}, "patches of at most 256"),
        ({"size": (16, 40000)}, "sides of 1 to 32768 px"),
        ({"pixels": torch.zeros(1, 1, 1, 1).expand(5, 1, 40000, 1)}, "sides of 1 to 32768 px"),
        ({"pixels": torch.zeros(5, 1, 0, 47)}, "sides of 1 to 32768 px"),
    ],
)
def test_views_refused_whatever_the_backend(backend, change, said):
    views = views_of("cropped")._replace(**{"boxes": None, **change})
    with pytest.raises(SpcxrError, match=said):
        masked_patch_gather(views, backend=backend)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ([0, 0, -1, 2], "negative side"),
        ([0, 0, 2, -1], "negative side"),
        ([2**31 - 2, 0, 4, 4], "leaves its view"),
    ],
)
def test_blocks_refused_whatever_the_backend(backend, block, said):
    views = views_of("cropped")
    fill = fill_of(views, kinds=("shuffle",))
    fill = fill._replace(blocks=fill.blocks.clone())
    fill.blocks[3, 7] = torch.tensor(block)
    with pytest.raises(SpcxrError, match=said):
        masked_patch_gather(views, fill, backend=backend)


# --- more patches than int32 counts ---------------------------------------------------------


def test_rows_that_int32_does_not_count(backend):
    views = views_of("cropped")
    mask = fill_of(views, by_patch=True).mask
    for rows in (2**40, 2**31, -1):
        with pytest.raises(SpcxrError, match=rf"rows {rows}; give 0 to 2\*\*31 - 1, at most 30"):
            visible_patch_gather(views, mask, rows=rows, backend=backend)


def too_many():
    """2**31 patches in no memory: one pixel of the source, one cell of the mask."""
    mask = torch.zeros(1, 1, 1, dtype=torch.bool).expand(2, 1 << 15, 1 << 15)
    ones = torch.ones(2)
    return Views(torch.zeros(2, 1, 1, 1), None, None, ones, ones, (1 << 15, 1 << 15), 1), mask


def test_patches_that_int32_does_not_count(backend):
    views, mask = too_many()
    with pytest.raises(SpcxrError, match="2147483648 patches"):
        visible_patch_gather(views, mask, backend=backend)


@needs_native
def test_patches_that_int32_does_not_count_past_the_checks():
    views, mask = too_many()
    op = torch.ops.spcxr.visible_patch_gather
    with pytest.raises(RuntimeError, match=r"2\*\*31 patches or more"):
        op(*views.words, mask, 5, torch.float32)
    native = pytest.importorskip("spcxr._native")
    one = np.ones(2, np.float32)
    call = {"size": views.size, "patch": 1, "scale": one, "shift": one}
    with pytest.raises(ValueError, match=r"2\*\*31 patches or more"):
        native.visible_patch_gather(
            np.zeros((2, 1, 1, 1), np.uint8),
            mask=np.broadcast_to(np.zeros(1, bool), (2, *views.size)),
            **call,
        )
