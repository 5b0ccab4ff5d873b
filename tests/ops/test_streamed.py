"""Calls so large that tokens are stored past the caches (8 MiB and more, csrc/cpu/lanes.h) give the
bits of small calls, whatever the instruction set."""

import os
import subprocess
import sys

import pytest
from view_cases import needs_native

pytestmark = needs_native

COMPARE = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from view_cases import pixels_of
from spcxr.objectives.corruption import Corruption, sample_crops, sample_fill
from spcxr.ops.masked_patch_gather import masked_patch_gather, visible_patch_gather
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
