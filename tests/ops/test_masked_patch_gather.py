"""The fused input path: every backend against plain torch, plain torch against a plain loop."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from view_cases import PIXELS, SHAPES, fill_of, needs_native, views_of

from spcxr.errors import SpcxrError
from spcxr.ops import philox
from spcxr.ops.masked_patch_gather import Packed, masked_patch_gather, visible_patch_gather
from spcxr.ops.patches import patchify
from spcxr.ops.views import FILLS, Views, clean_images, pixel_mask, whole_views

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def close(made, wanted, dtype):
    """To float rounding; in halves, to one unit in the last place of the larger values."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert made.dtype == wanted.dtype == dtype
    assert made.shape == wanted.shape
    torch.testing.assert_close(made.float(), wanted.float(), rtol=tolerance, atol=2e-5)


# --- the reference against loops and libraries ----------------------------------------------


def test_the_reference_equals_a_plain_loop():
    views = views_of("cropped")._replace(pixels=views_of("cropped").pixels[:5])
    fill = fill_of(views)
    made = masked_patch_gather(views, fill, backend="reference")
    clean, mask = clean_images(views), pixel_mask(views, fill.mask)
    noise = philox.normal(fill.image_ids, 6 * 256, seed=2**35, epoch=3, stream="noise-1")
    for b, kind in enumerate(fill.kind.tolist()):
        picture = clean[b, 0].clone()
        for y, x in mask[b].nonzero().tolist():
            if FILLS[kind] == "noise":
                patch, inside = (y // 16) * 3 + x // 16, (y % 16) * 16 + x % 16
                value = noise[b, patch * 256 + inside]
            elif FILLS[kind] == "zeros":
                value = torch.zeros(())
            elif FILLS[kind] == "other":
                value = clean[fill.partner[b], 0, y, x]
            else:
                value = clean[b, 0, y, x]
                for (top, left, h, w), (r, c) in zip(
                    fill.blocks[b].tolist(), fill.sources[b].tolist(), strict=True
                ):
                    if top <= y < top + h and left <= x < left + w:
                        value = clean[b, 0, r + y - top, c + x - left]
            picture[y, x] = value
        assert torch.equal(patchify(picture[None, None], 16)[0], made[b])


def test_within_a_grey_level_of_torchs_antialiased_bilinear(backend):
    views = views_of("shrunk")
    whole = views._replace(boxes=None, flip=None, scale=torch.ones(3), shift=torch.zeros(3))
    made = masked_patch_gather(whole, backend=backend)
    torchs = F.interpolate(whole.pixels, size=(24, 16), mode="bilinear", antialias=True)
    assert (made - patchify(torchs.float(), 8)).abs().max() <= 1.0


# --- every backend against the reference ----------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clean_views_equal_the_reference(backend, name, pixels, dtype):
    views = views_of(name, pixels)
    made = masked_patch_gather(views, dtype=dtype, backend=backend)
    close(made, masked_patch_gather(views, dtype=dtype, backend="reference"), dtype)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("by_patch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_corrupted_views_equal_the_reference(backend, name, by_patch, dtype):
    for seed in range(3):
        views = views_of(name, PIXELS[seed], seed)
        fill = fill_of(views, by_patch=by_patch, seed=seed)
        made = masked_patch_gather(views, fill, dtype=dtype, backend=backend)
        close(made, masked_patch_gather(views, fill, dtype=dtype, backend="reference"), dtype)


def test_noise_is_the_same_bits(backend):
    views = views_of("native size")
    fill = fill_of(views, kinds=("noise",))._replace(mask=torch.ones(5, 32, 48, dtype=torch.bool))
    made = masked_patch_gather(views, fill, backend=backend)
    wanted = philox.normal(fill.image_ids, 6 * 256, seed=2**35, epoch=3, stream="noise-1")
    assert torch.equal(made.flatten(1), wanted)
    assert wanted.std().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_visible_patches_equal_the_reference(backend, name, dtype):
    views = views_of(name)
    mask = fill_of(views, by_patch=True).mask
    for hidden in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
        made = visible_patch_gather(views, hidden, dtype=dtype, backend=backend)
        wanted = visible_patch_gather(views, hidden, dtype=dtype, backend="reference")
        close(made.tokens, wanted.tokens, dtype)
        assert torch.equal(made.ids, wanted.ids)
        assert torch.equal(made.cu_seqlens, wanted.cu_seqlens)
        assert made.ids.dtype == made.cu_seqlens.dtype == torch.int32


def test_rows_past_the_end_are_zeros(backend):
    views = views_of("cropped")
    mask = fill_of(views, by_patch=True).mask
    count = int((~mask).sum())
    exact = visible_patch_gather(views, mask, backend=backend)
    made = visible_patch_gather(views, mask, rows=count + 7, backend=backend)
    assert torch.equal(made.tokens[:count], exact.tokens)
    assert not made.tokens[count:].any()
    assert made.ids[count:].tolist() == [-1] * 7


def test_strided_images(backend):
    """Views into larger memory: rows, channels and images apart, pixels side by side."""
    views = views_of("shrunk")
    wide = torch.zeros(3, 5, 160, 200, dtype=torch.uint8)
    wide[:, 1:4, 5:155, 9:179] = views.pixels
    strided = views._replace(pixels=wide[:, 1:4, 5:155, 9:179])
    fill = fill_of(views)
    made = masked_patch_gather(strided, fill, backend=backend)
    assert torch.equal(made, masked_patch_gather(views, fill, backend=backend))
    sparse = views._replace(pixels=wide[:, 1:4, 5:155, 9:179:2])
    with pytest.raises(SpcxrError, match="side by side"):
        masked_patch_gather(sparse, backend=backend)


def test_the_same_image_whatever_its_batch(backend):
    views, keep = views_of("cropped"), torch.tensor([3, 1])
    fill = fill_of(views, kinds=("noise", "zeros", "shuffle"))
    few = views._replace(**{k: getattr(views, k)[keep] for k in Views._fields[:5]})
    names = ("mask", "kind", "blocks", "sources", "image_ids")
    some = fill._replace(partner=torch.tensor([1, 0]), **{k: getattr(fill, k)[keep] for k in names})
    made = masked_patch_gather(few, some, backend=backend)
    assert torch.equal(made, masked_patch_gather(views, fill, backend=backend)[keep])


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_gives_the_same_bits(isa, tmp_path):
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from test_masked_patch_gather import *
made = []
for name in SHAPES:
    for dtype in DTYPES:
        views = views_of(name, torch.uint16)
        made.append(masked_patch_gather(views, fill_of(views), dtype=dtype, backend="native"))
        mask = fill_of(views, by_patch=True).mask
        made.append(visible_patch_gather(views, mask, dtype=dtype, backend="native").tokens)
torch.save(made, sys.argv[1])
"""
    found = []
    for chosen in (isa, "portable"):
        file = tmp_path / chosen
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(file)],
            env={**os.environ, "SPCXR_CPU_ISA": chosen, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if chosen != "portable" and "SPCXR_CPU_ISA" in run.stderr:
            pytest.skip(f"this CPU has no {isa}")
        assert run.returncode == 0, run.stderr
        found.append(torch.load(file))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(name, shape, dtype):
    for pixels, by_patch in zip(PIXELS, (False, True, False), strict=True):
        views = views_of(shape, pixels)
        fill = fill_of(views, by_patch=by_patch)
        there, hidden = views.to("cuda"), fill.to("cuda")
        made = masked_patch_gather(there, hidden, dtype=dtype, backend=name)
        assert made.is_cuda
        close(made.cpu(), masked_patch_gather(views, fill, dtype=dtype, backend="reference"), dtype)
        mask = fill_of(views, by_patch=True).mask
        wanted = visible_patch_gather(views, mask, rows=40, dtype=dtype, backend="reference")
        packed = visible_patch_gather(there, mask.cuda(), rows=40, dtype=dtype, backend=name)
        close(packed.tokens.cpu(), wanted.tokens, dtype)
        assert torch.equal(packed.ids.cpu(), wanted.ids)
        assert torch.equal(packed.cu_seqlens.cpu(), wanted.cu_seqlens)


# --- what cannot be -------------------------------------------------------------------------


def box(*values):
    return torch.tensor([values] * 5, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixels": torch.zeros(5, 61, 47, dtype=torch.uint8)}, r"give \[B, 1 or 3, H, W\]"),
        ({"pixels": torch.zeros(5, 1, 61, 47, dtype=torch.int32)}, "uint8, uint16 or float32"),
        ({"pixels": torch.zeros(5, 2, 61, 47)}, "1 or 3"),
        ({"pixels": torch.zeros(5, 1, 61, 47, requires_grad=True)}, "gradient"),
        ({"boxes": box(0, 0, 62, 47)}, "outside its image"),
        ({"boxes": box(-1, 0, 20, 20)}, "outside its image"),
        ({"boxes": box(0, 0, 0, 20)}, "empty"),
        ({"boxes": box(0, float("nan"), 20, 20)}, "not finite"),
        ({"boxes": box(0, 0, 20, 20)[:2]}, "boxes is"),
        ({"boxes": box(0, 0, 20, 20).double()}, "boxes is"),
        ({"flip": torch.zeros(5)}, "flip is"),
        ({"scale": torch.zeros(5).double()}, "scale is"),
        ({"shift": torch.zeros(5, 1)}, "shift is"),
        ({"scale": torch.zeros(5, device="meta")}, "on meta"),
        ({"size": (32, 47)}, "does not divide|do not divide"),
        ({"patch_px": 0}, "do not divide"),
        ({"patch_px": 64}, "do not divide"),
    ],
)
def test_views_refused(change, said):
    views = views_of("cropped")._replace(**change)
    with pytest.raises(SpcxrError, match=said):
        masked_patch_gather(views)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": torch.zeros(5, 3, 2, dtype=torch.bool)}, "the mask is"),
        ({"mask": torch.zeros(5, 2, 3)}, "bool"),
        ({"kind": torch.full((5,), 4).int()}, "kind must be 0 to 3"),
        ({"kind": torch.zeros(5).long()}, "kind is"),
        ({"partner": torch.full((5,), 5)}, "rows of the batch"),
        ({"partner": torch.full((5,), -1)}, "rows of the batch"),
        ({"partner": torch.arange(5), "kind": torch.full((5,), 2).int()}, "own partner"),
        ({"blocks": torch.tensor([[30, 0, 3, 4]]).int().expand(5, 1, 4).contiguous()}, "sources"),
        ({"sources": torch.full((5, 40, 2), 31).int()}, "a source rectangle"),
        ({"image_ids": torch.full((5,), -1)}, "image id"),
        ({"image_ids": torch.zeros(5)}, "image_ids is"),
        ({"seed": -1}, "seed -1"),
        ({"view": 256}, "view 256"),
    ],
)
def test_fills_refused(change, said):
    views = views_of("cropped")
    with pytest.raises(SpcxrError, match=said):
        masked_patch_gather(views, fill_of(views)._replace(**change))


def test_other_things_refused():
    views = views_of("cropped")
    mask = fill_of(views, by_patch=True).mask
    with pytest.raises(SpcxrError, match=r"no tokens of torch\.float64"):
        masked_patch_gather(views, dtype=torch.float64)
    with pytest.raises(SpcxrError, match="rows 1: fewer than the"):
        visible_patch_gather(views, torch.zeros_like(mask), rows=1)
    with pytest.raises(SpcxrError, match=r"the mask is \(5, 32, 48\)"):
        visible_patch_gather(views, fill_of(views).mask)


@needs_native
def test_the_op_itself_checks_before_it_reads():
    """Whoever calls torch.ops directly gets an error, not somebody's memory."""
    views = views_of("cropped")
    fill, op = fill_of(views), torch.ops.spcxr.masked_patch_gather
    wrong_views = [
        {"boxes": box(0, 0, 62, 47)},
        {"boxes": box(0, float("nan"), 20, 20)},
        {"boxes": box(0, 0, 20, 20)[:2]},
        {"flip": torch.zeros(3, dtype=torch.bool)},
        {"scale": torch.zeros(4)},
        {"patch_px": 0},
        {"patch_px": 5},
    ]
    wrong_fills = [
        {"partner": torch.full((5,), 5)},
        {"kind": torch.full((5,), 9).int()},
        {"mask": torch.zeros(5, 3, 3, dtype=torch.bool)},
        {"sources": torch.full((5, 40, 2), 31).int()},
        {"blocks": torch.full((5, 40, 4), 31).int()},
        {"image_ids": torch.full((5,), 2**48)},
    ]
    calls = [(views._replace(**change), fill) for change in wrong_views]
    calls += [(views, fill._replace(**change)) for change in wrong_fills]
    for bad_views, bad_fill in calls:
        with pytest.raises(RuntimeError):
            op(*bad_views.words, *bad_fill, torch.float32)


def test_packed_is_what_attention_takes():
    views = whole_views(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), patch_px=16)
    packed = visible_patch_gather(views, torch.zeros(2, 2, 2, dtype=torch.bool))
    assert isinstance(packed, Packed)
    assert functools.reduce(max, packed.cu_seqlens.diff().tolist()) == 4
