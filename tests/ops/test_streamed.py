"""Calls so large that what they make is stored past the caches (8 MiB and more, csrc/cpu/lanes.h)
give the bits of small calls, whatever the instruction set."""

import os
import subprocess
import sys

import pytest
from view_cases import needs_native

pytestmark = needs_native

COMPARE = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import numpy as np
import torch
from view_cases import pixels_of
from spcxr import _native
from spcxr.objectives.corruption import Corruption, sample_crops, sample_fill
from spcxr.ops.masked_patch_gather import masked_patch_gather, visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import DISTANCES, masked_reconstruction_loss
from spcxr.ops.views import FILLS, Views, whole_views

COUNT, SIDE, KINDS = 100, 224, (torch.float32, torch.bfloat16, torch.float16)
ids = torch.arange(COUNT)
boxes, flip = sample_crops(ids, seed=0, epoch=0, source_px=SIDE)

def ten(views, fill, begin):
    some = slice(begin, begin + 10)
    views = Views(*(x if x is None else x[some] for x in views[:5]), *views[5:])
    fill = fill._replace(**{{name: x[some] for name, x in zip(fill._fields, fill, strict=True)
                            if isinstance(x, torch.Tensor)}})
    return views, fill._replace(partner=fill.partner - begin)

def check(pixels, patch, dtype):
    whole = whole_views(pixels, patch_px=patch, scale=.01, shift=-.4)
    cropped = Views(pixels, boxes, flip, whole.scale, whole.shift, (SIDE, SIDE), patch)
    law = Corruption(alien_ratio=0.0, fills=FILLS)
    fill = sample_fill(ids, law, seed=0, epoch=0, size=(SIDE, SIDE), patch_px=patch)
    fill = fill._replace(partner=ids // 10 * 10 + (ids + 1) % 10)  # within its ten
    for views in (whole, cropped):
        made = masked_patch_gather(views, fill, dtype=dtype, backend="native")
        clean = masked_patch_gather(views, dtype=dtype, backend="native")
        assert made.nbytes >= 8 << 20
        mask = torch.rand(COUNT, *views.grid, generator=torch.Generator().manual_seed(1)) < .1
        packed = visible_patch_gather(views, mask, dtype=dtype, backend="native")
        assert packed.tokens.nbytes >= 8 << 20
        assert torch.equal(packed.tokens, clean[~mask.flatten(1)])
        for b in range(0, COUNT, 10):
            one, hidden = ten(views, fill, b)
            few = masked_patch_gather(one, hidden, dtype=dtype, backend="native")
            assert torch.equal(made[b : b + 10], few)
            few = masked_patch_gather(one, dtype=dtype, backend="native")
            assert torch.equal(clean[b : b + 10], few)

def check_gradient(dtype, distance):
    # of 2.1 million elements, in many pieces
    pixels = pixels_of((42, 1, SIDE, SIDE), torch.uint8)
    views = whole_views(pixels, patch_px=16, scale=.01, shift=-.4)
    mask = torch.rand(42, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) < .6
    made = []
    for backend in ("native", "reference"):
        rows = pixels.float().view(42, 196, 256).sin().to(dtype).requires_grad_()
        loss = masked_reconstruction_loss(rows, views, mask, distance=distance, backend=backend)
        (loss * 3e4).backward()
        made.append(rows.grad)
    assert dtype != torch.float32 or made[0].nbytes >= 8 << 20
    torch.testing.assert_close(*made, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)

for dtype in (torch.float32, torch.bfloat16):
    for distance in DISTANCES:
        check_gradient(dtype, distance)

pixels = pixels_of((COUNT, 1, SIDE, SIDE), torch.uint8)
law = dict(scale=np.full(COUNT, .01, "f"), shift=np.full(COUNT, -.4, "f"))
large = _native.masked_patch_gather(pixels.numpy(), size=(SIDE, SIDE), patch=16, **law)
views = whole_views(pixels, patch_px=16, scale=.01, shift=-.4)
assert torch.equal(torch.from_numpy(large), masked_patch_gather(views, backend="native"))

for dtype in KINDS:
    check(pixels_of((COUNT, 1, SIDE, SIDE), torch.uint8), 16, dtype)
check(pixels_of((COUNT, 1, SIDE, SIDE), torch.uint16), 8, torch.bfloat16)
check(pixels_of((COUNT, 3, SIDE, SIDE), torch.float32), 14, torch.float32)
"""


@pytest.mark.parametrize("isa", ["", "avx2"])
def test_equals_small_calls(isa):
    environ = {**os.environ, **({"SPCXR_CPU_ISA": isa} if isa else {})}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environ, capture_output=True, text=True
    )
    if "SPCXR_CPU_ISA" in done.stderr and isa:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr
