"""The Triton twins of the fused input path in Triton's interpreter, against plain torch.

In a subprocess: the interpreter is chosen when triton is imported. Tokens of bfloat16 are left to
`test_on_a_gpu`: the interpreter cuts them off where a GPU rounds to the nearest.
"""

import os
import subprocess
import sys

import pytest

BEGIN = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from test_masked_patch_gather import close
from test_masked_reconstruction_loss import predictions, with_gradient
from view_cases import PIXELS, SHAPES, fill_of, views_of
from spcxr.ops import philox
from spcxr.ops.masked_patch_gather import masked_patch_gather, visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.views import Views, whole_views

BACKENDS, HALF = ("triton", "reference"), torch.float16
# One of everything; each shape meets one pixel type, and both grids of the mask.
CASES = [(name, PIXELS[i % 3]) for i, name in enumerate(SHAPES)]

def first(views, count):
    return views._replace(**{{k: v if v is None else v[:count] for k, v in
                             zip(Views._fields[:5], views[:5], strict=True)}})

def gathered(views, fill, dtype):
    made = [masked_patch_gather(views, fill, dtype=dtype, backend=b) for b in BACKENDS]
    close(*made, dtype)
    return made[0]

def packed(views, mask, rows, dtype):
    made, wanted = (
        visible_patch_gather(views, mask, rows=rows, dtype=dtype, backend=b) for b in BACKENDS)
    close(made.tokens, wanted.tokens, dtype)
    for a, b in zip(made[1:], wanted[1:], strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert torch.equal(a, b)

def lost(predicted, views, mask, distance, normalise):
    made, wanted = (
        with_gradient(masked_reconstruction_loss(predicted, views, mask, distance=distance,
                                                 normalise_patches=normalise, backend=b), predicted)
        for b in BACKENDS)
    torch.testing.assert_close(made[0], wanted[0], rtol=2e-6, atol=0)
    step = {{torch.float32: 1e-5, HALF: 2**-9}}[predicted.dtype]
    same = torch.isclose(made[1].float(), wanted[1].float(), rtol=step, atol=1e-7)
    assert same.all() if distance == "mse" else (~same).sum() <= 1  # the sign of nearly zero
    assert made[1].dtype == predicted.dtype
"""

SCRIPTS = {
    "every fill": """
for i, (name, pixels) in enumerate(CASES):
    views = views_of(name, pixels)
    gathered(views, fill_of(views), (torch.float32, HALF)[i % 2])
    if name != "shrunk":  # a thousand taps an element
        gathered(views, fill_of(views, by_patch=True, seed=1), (HALF, torch.float32)[i % 2])
""",
    "clean views, edges": """
for name, pixels in CASES:
    if name != "shrunk":
        gathered(first(views_of(name, pixels), 2), None, torch.float32)
views = views_of("cropped")
fill = fill_of(views)
for mask in (torch.zeros_like(fill.mask), torch.ones_like(fill.mask)):
    gathered(views, fill._replace(mask=mask), torch.float32)
# Without blocks nothing is shuffled; the last of the blocks counts where they overlap.
gathered(views, fill._replace(blocks=fill.blocks[:, :0], sources=fill.sources[:, :0]), HALF)
# What is not finite spoils what it has a weight in alone.
odd = views_of("cropped", torch.float32)
odd.pixels[:, 0, 30, 20] = float("nan")
made, wanted = (masked_patch_gather(odd, backend=b) for b in BACKENDS)
assert torch.equal(made.isfinite(), wanted.isfinite())
assert 0 < int((~made.isfinite()).sum()) < 300
# Rows, channels and images apart in memory.
wide = torch.zeros(5, 3, 70, 60, dtype=torch.uint8)
wide[:, 1:2, 4:65, 6:53] = views.pixels
strided = views._replace(pixels=wide[:, 1:2, 4:65, 6:53])
assert torch.equal(gathered(strided, fill, HALF), gathered(views, fill, HALF))
""",
    "noise": """
views = views_of("native size")
fill = fill_of(views, kinds=("noise",))._replace(mask=torch.ones(5, 32, 48, dtype=torch.bool))
made = masked_patch_gather(views, fill, backend="triton").flatten(1)
wanted = philox.normal(fill.image_ids, 6 * 256, seed=2**35, epoch=3, stream="noise-1")
assert torch.equal(made.view(torch.int32), wanted.view(torch.int32))
# The words that matter: radius 0 and the largest, the axes of the circle, signs of zero.
import numpy, triton, triton.language as tl
from spcxr.kernels.philox import _normal_pair
@triton.jit
def pairs(words, made, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = _normal_pair(tl.load(words + 2 * at), tl.load(words + 2 * at + 1))
    tl.store(made + 2 * at, a)
    tl.store(made + 2 * at + 1, b)
odd = [0, 255, 256, 2**31, 2**32 - 1, 2**32 - 256, 0xB504F333, 0xB504F400]
turns = [q << 30 | r for q in range(4) for r in (0, 63, 64, 2**29, 2**30 - 1)]
words = torch.tensor([[a, b] for a in odd for b in turns] * 2)[:256]
made = torch.empty(words.shape)
pairs[(1,)](words.to(torch.uint32), made, 256)
wanted = philox.box_muller(words.reshape(-1, 4)).view(-1, 2)
assert torch.equal(made.view(torch.int32), wanted.view(torch.int32))
""",
    "visible patches": """
for i, (name, pixels) in enumerate(CASES):
    views = views_of(name, pixels)
    mask = fill_of(views, by_patch=True).mask
    dtype = (torch.float32, HALF)[i % 2]
    packed(views, mask, None, dtype)
    if name in ("cropped", "nothing"):
        for hidden in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
            packed(views, hidden, int((~hidden).sum()) + 3, dtype)
views = whole_views(views_of("native size").pixels.repeat(1, 1, 2, 2), patch_px=2)  # 1536 patches
packed(first(views, 1), torch.arange(1536).view(1, 32, 48) % 60 != 7, None, HALF)
long = whole_views(views_of("native size").pixels[:2].repeat(1, 1, 2, 1), patch_px=48)
long = long._replace(size=(48, 48), boxes=torch.tensor([[0.0, 0, 64, 48]] * 2))
packed(long, torch.tensor([True, False]).view(2, 1, 1), None, torch.float32)  # 2304 elements
""",
    "loss": """
for i, (name, pixels) in enumerate(CASES):
    if name != "shrunk":  # what is resampled is the gather's
        views = first(views_of(name, pixels), 2)
        mask = fill_of(views, by_patch=i % 2 == 0).mask
        dtype, *law = ((torch.float32, "l1", False), (HALF, "mse", True))[i // 2 % 2]
        lost(predictions(views, dtype), views, mask, *law)
views = first(views_of("cropped"), 2)
predicted, mask = predictions(views), fill_of(views).mask
for hidden in (torch.zeros_like(mask), torch.ones_like(mask)):
    lost(predicted, views, hidden, "mse", False)
turned = predicted.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
lost(turned, views, mask, "l1", True)
lost(predicted, views, mask, "mse", False)
with torch.no_grad():
    alone = masked_reconstruction_loss(predicted, views, mask, backend="triton")
assert alone == masked_reconstruction_loss(predicted, views, mask, backend="triton")
long = whole_views(views_of("native size").pixels[:2].repeat(1, 1, 3, 2), patch_px=48, scale=.01)
for mask in (torch.ones(2, 2, 2), torch.rand(2, 96, 96) < .5):  # 2304 elements: two turns
    lost(predictions(long), long, mask.bool(), "mse", True)
""",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_equals_the_reference(what):
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + SCRIPTS[what] + "print('equal')"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout.strip().endswith("equal"), run.stderr
