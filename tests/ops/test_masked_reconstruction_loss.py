"""The reconstruction loss: the plain formula through autograd, and every backend against it."""

import os
import subprocess
import sys

import pytest
import torch
from view_cases import PIXELS, SHAPES, fill_of, needs_native, views_of

from spcxr.errors import SpcxrError
from spcxr.ops.masked_reconstruction_loss import DISTANCES, masked_reconstruction_loss
from spcxr.ops.patches import patchify
from spcxr.ops.views import clean_images, pixel_mask, whole_views


def plainly(predicted, views, mask, distance, normalise_patches):
    """What a user would write, in float64, differentiable by autograd."""
    clean = clean_images(views).double()
    target = patchify(clean, views.patch_px)
    if normalise_patches:
        mean = target.mean(-1, keepdim=True)
        var = (target - mean).square().sum(-1, keepdim=True) / (target.shape[2] - 1)
        target = (target - mean) / (var + 1e-6).sqrt()
    hidden = patchify(pixel_mask(views, mask)[:, None].expand_as(clean), views.patch_px)
    error = (predicted.double() - target)[hidden]
    if error.numel() == 0:
        return predicted.double().sum() * 0
    return (error.abs() if distance == "l1" else error.square()).mean()


def predictions(views, dtype=torch.float32, seed=0):
    shape = (len(views.pixels), views.grid[0] * views.grid[1], views.row_length)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def with_gradient(loss, predicted):
    (gradient,) = torch.autograd.grad(loss, predicted)
    return loss.detach(), gradient


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalise_patches", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_plain_formula(backend, name, distance, normalise_patches, dtype):
    for seed, by_patch in enumerate((False, True)):
        views = views_of(name, PIXELS[seed], seed)
        mask = fill_of(views, by_patch=by_patch).mask
        predicted = predictions(views, dtype)
        options = {"distance": distance, "normalise_patches": normalise_patches}
        loss, gradient = with_gradient(
            masked_reconstruction_loss(predicted, views, mask, backend=backend, **options),
            predicted,
        )
        wanted, slope = with_gradient(plainly(predicted, views, mask, **options), predicted)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert loss.item() == pytest.approx(wanted.item(), rel=2e-5)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        # A half rounds small gradients to steps of 6e-8.
        same = torch.isclose(gradient.float(), slope.float(), rtol=tolerance, atol=1e-7)
        # Where an error is zero to rounding, its sign is anybody's.
        assert same.float().mean() > 0.999 if same.numel() else True


def test_gradient_is_the_slope(backend):
    """gradcheck wants float64, which no backend takes; MSE is a parabola, so a central difference
    along any direction is its slope at any step, to rounding."""
    views = views_of("patch of 4")
    mask, predicted = fill_of(views).mask, predictions(views)

    def call(rows):
        return masked_reconstruction_loss(rows, views, mask, distance="mse", backend=backend)

    _, gradient = with_gradient(call(predicted), predicted)
    for seed in range(5):
        direction = predictions(views, seed=seed + 1).detach()
        with torch.no_grad():
            rise = call(predicted + direction) - call(predicted - direction)
        slope = (gradient * direction).sum().item()
        assert slope == pytest.approx(rise.item() / 2, rel=1e-3, abs=1e-5)


def test_gradient_of_l1_is_the_slope(backend):
    """L1 is a straight line while no error changes its sign: errors of 20 and steps below 5."""
    views = views_of("patch of 4")
    mask = fill_of(views).mask
    rows = predictions(views).detach()
    predicted = (20 * rows.sign() + rows).requires_grad_()

    def call(rows):
        return masked_reconstruction_loss(rows, views, mask, backend=backend)

    _, gradient = with_gradient(call(predicted), predicted)
    for seed in range(5):
        direction = predictions(views, seed=seed + 1).detach()
        with torch.no_grad():
            rise = call(predicted + direction) - call(predicted - direction)
        slope = (gradient * direction).sum().item()
        assert slope == pytest.approx(rise.item() / 2, rel=1e-4, abs=1e-5)


def test_a_second_derivative_is_refused(backend):
    """Also where only what lies behind the predictions is differentiated again, which
    `once_differentiable` would let pass without the loss's own part."""
    views = views_of("cropped")
    mask, weight = fill_of(views).mask, predictions(views)
    inner = weight * weight
    loss = masked_reconstruction_loss(inner, views, mask, distance="mse", backend=backend)
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    torch.testing.assert_close(
        slope.detach(), torch.autograd.grad(loss, inner)[0] * 2 * weight.detach()
    )
    with pytest.raises(SpcxrError, match="no second derivative"):
        slope.square().sum().backward()


def test_the_gradient_is_scaled_by_what_comes_from_above(backend):
    views = views_of("cropped")
    mask, predicted = fill_of(views).mask, predictions(views)
    loss = masked_reconstruction_loss(predicted, views, mask, backend=backend)
    (once,) = torch.autograd.grad(loss, predicted, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, predicted)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
def test_a_loss_scaler_reaches_half_precision(backend, scale):
    """One slope is below float16's least number, torch.amp's first scale above its greatest."""
    views = whole_views(torch.zeros(2, 1, 64, 64, dtype=torch.uint8), patch_px=16)
    predicted = torch.full((2, 16, 256), 1e-4, dtype=torch.float16, requires_grad=True)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    loss = masked_reconstruction_loss(predicted, views, mask, distance="mse", backend=backend)
    (loss * scale).backward()
    wanted = torch.full_like(predicted, 2e-4 / 8192 * scale)
    torch.testing.assert_close(predicted.grad, wanted, rtol=5e-3, atol=0)


def test_nothing_hidden_is_a_loss_of_zero(backend):
    views = views_of("cropped")
    predicted = predictions(views)
    nothing = torch.zeros(5, 2, 3, dtype=torch.bool)
    loss = masked_reconstruction_loss(predicted, views, nothing, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert not predicted.grad.any()


def test_no_gradient_where_none_is_wanted(backend):
    views = views_of("cropped")
    mask, predicted = fill_of(views).mask, predictions(views)
    wanted = masked_reconstruction_loss(predicted, views, mask, backend=backend)
    with torch.no_grad():
        loss = masked_reconstruction_loss(predicted, views, mask, backend=backend)
    assert not loss.requires_grad
    assert loss.item() == wanted.item()
    assert not masked_reconstruction_loss(predicted.detach(), views, mask).requires_grad


def test_predictions_that_are_not_contiguous(backend):
    views = views_of("cropped")
    mask, predicted = fill_of(views).mask, predictions(views)
    turned = predicted.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    options = {"distance": "mse", "backend": backend}
    a = with_gradient(masked_reconstruction_loss(turned, views, mask, **options), turned)
    b = with_gradient(masked_reconstruction_loss(predicted, views, mask, **options), predicted)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@needs_native
def test_repeats_bitwise_whatever_the_threads():
    """Threads in subprocesses: the number is fixed at the first parallel region."""
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_masked_reconstruction_loss import *
views = views_of("cropped")
predicted = predictions(views)
loss = masked_reconstruction_loss(predicted, views, fill_of(views).mask, backend="native")
loss.backward()
print(loss.item().hex(), predicted.grad.double().sum().item().hex())
"""
    said = set()
    for threads in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        said.add(run.stdout)
    assert len(said) == 1


@needs_native
def test_opcheck_of_rows_that_are_not_contiguous():
    for name in ("cropped", "colour"):
        views = views_of(name)
        words = (*views.words, fill_of(views).mask, True, True, True)
        op = torch.ops.spcxr.masked_reconstruction_loss.default
        rows = predictions(views).detach()
        # A head that is a convolution leaves its rows so.
        torch.library.opcheck(op, (rows.transpose(1, 2).contiguous().transpose(1, 2), *words))


@needs_native
def test_the_gradients_op():
    op, factor = torch.ops.spcxr.reconstruction_gradient, torch.tensor(-0.3)
    signs = torch.tensor([[1, 0, -1]], dtype=torch.int8)
    for slope in (signs, signs.float() * 1e-6, signs[:0]):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.library.opcheck(op.default, (slope, factor, dtype))
            assert torch.equal(op(slope, factor, dtype), (slope.float() * factor).to(dtype))
    for words in (
        (signs.half(), factor, torch.float16),
        (signs, factor.double(), torch.float32),
        (signs, factor[None], torch.float32),
        (signs, factor, torch.float64),
    ):
        with pytest.raises(RuntimeError, match=r"int8 or float32|factor|tokens"):
            op(*words)


def test_float16_keeps_errors_that_it_does_not_hold(backend):
    views = whole_views(torch.zeros(1, 1, 16, 16, dtype=torch.uint8), patch_px=16, shift=4e4)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    for value, shift in ((-4e4, 4e4), (1e-7, 0.0)):
        predicted = torch.full((1, 1, 256), value, dtype=torch.float16, requires_grad=True)
        views = views._replace(shift=torch.tensor([shift]))
        loss = masked_reconstruction_loss(predicted, views, mask, distance="mse", backend=backend)
        (gradient,) = torch.autograd.grad(loss * 4096, predicted)
        error = predicted.detach().float() - shift
        assert torch.equal(gradient, (error * (2 / 256 * 4096)).half())


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", ["native", "triton"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(backend_name, distance, dtype):
    for name in SHAPES:
        for normalise_patches in (False, True):
            views = views_of(name)
            mask, predicted = fill_of(views).mask, predictions(views, dtype)
            options = {"distance": distance, "normalise_patches": normalise_patches}
            there = predicted.detach().cuda().requires_grad_()
            made = with_gradient(
                masked_reconstruction_loss(
                    there, views.to("cuda"), mask.cuda(), backend=backend_name, **options
                ),
                there,
            )
            wanted = with_gradient(plainly(predicted, views, mask, **options), predicted)
            assert made[0].item() == pytest.approx(wanted[0].item(), rel=1e-4)
            same = torch.isclose(made[1].float().cpu(), wanted[1].float(), rtol=2e-2, atol=1e-7)
            assert same.float().mean() > 0.999 if same.numel() else True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"predicted": torch.zeros(5, 6, 255)}, "predictions are"),
        ({"predicted": torch.zeros(5, 6, 256).double()}, "float64"),
        ({"predicted": torch.zeros(5, 6, 256, device="meta")}, "move them to one device"),
        ({"mask": torch.zeros(5, 6, dtype=torch.bool)}, "the mask is"),
        ({"mask": torch.zeros(5, 2, 3)}, "bool"),
        ({"distance": "l3"}, "choose from: l1, mse"),
        ({"backend": "cupy"}, "choose auto or"),
    ],
)
def test_refused(change, said):
    views = views_of("cropped")
    arguments = {"predicted": predictions(views), "mask": fill_of(views).mask, **change}
    with pytest.raises(SpcxrError, match=said):
        masked_reconstruction_loss(arguments.pop("predicted"), views, **arguments)
