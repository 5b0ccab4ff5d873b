"""torch's own gates: opcheck, torch.compile, torch.export and fake tensors, every verb, native and
plain. (Triton's twins are called by Python that no tracer takes.)"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from view_cases import fill_of, needs_native, views_of

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch
from spcxr.ops.group_mask import Law, group_mask
from spcxr.ops.masked_patch_gather import masked_patch_gather, visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.views import Fill, Views

NAMES = [pytest.param("native", marks=needs_native), "reference"]
backends = pytest.mark.parametrize("name", NAMES)
LAW = Law.of((4, 6), (0.5, 0.75), None, "uniform")


def parts_of(count=5, name="cropped"):
    """The tensors of views, fill, mask of patches and predictions, of any number of images."""
    views = views_of(name)
    fill, mask = fill_of(views), fill_of(views, by_patch=True).mask
    turn = torch.arange(count) % len(views.pixels)
    rows = torch.randn(count, 6, 256, generator=torch.Generator().manual_seed(0))
    partner = (torch.arange(count) + 1) % count
    tensors = (*views[:5], *fill[:2], *fill[3:6], mask)
    return [*(None if t is None else t[turn] for t in tensors), partner, rows]


def called(verb, backend, parts, rows=64):
    """One verb on `parts_of`; every call takes all of them."""
    pixels, boxes, flip, scale, shift, mask, kind, blocks, sources, ids, by_patch, *more = parts
    partner, predicted = more
    views = Views(pixels, boxes, flip, scale, shift, (32, 48), 16)
    if verb == "group":
        return tuple(group_mask(ids, seed=1, epoch=0, grid=(4, 6), backend=backend))
    if verb == "clean":
        return masked_patch_gather(views, dtype=torch.float16, backend=backend)
    if verb == "corrupt":
        fill = Fill(mask, kind, partner, blocks, sources, ids, 2**35, 3, 1)
        return masked_patch_gather(views, fill, dtype=torch.bfloat16, backend=backend)
    if verb == "visible":
        return tuple(visible_patch_gather(views, by_patch, rows=rows, backend=backend))
    return masked_reconstruction_loss(predicted, views, mask, distance="mse", backend=backend)


VERBS = ("group", "clean", "corrupt", "visible", "loss")


def same(a, b):
    a, b = ((t,) if isinstance(t, torch.Tensor) else t for t in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- opcheck --------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [pytest.param("spcxr", marks=needs_native), "spcxr_reference"])
def test_opcheck(room):
    ops = getattr(torch.ops, room)
    for name in ("cropped", "native size"):
        views = views_of(name)
        fill, mask = fill_of(views), fill_of(views, by_patch=True).mask
        rows = torch.randn(5, 6, 256)
        calls = {
            "group_mask": [(fill.image_ids, 1, 0, *LAW)],
            "masked_patch_gather": [
                (*views.words, *fill.words, torch.bfloat16),
                (*views.words, *(None,) * 6, 0, 0, 0, torch.float16),
            ],
            "visible_patch_gather": [(*views.words, mask, 30, torch.float32)],
            "masked_reconstruction_loss": [
                (rows, *views.words, fill.mask, True, True, True),
                (rows, *views.words, mask, False, False, False),
            ],
        }
        for verb, several in calls.items():
            for words in several:
                torch.library.opcheck(getattr(ops, verb).default, words)


@needs_native
def test_references_have_the_schemas_of_the_native_ops():
    for verb in dispatch.VERBS:
        if verb in ("masked_attention", *dispatch.OF_BFLOAT16):  # plain torch that can be traced
            continue
        native, plain = (
            str(getattr(getattr(torch.ops, room), verb).default._schema).partition("::")[2]
            for room in ("spcxr", "spcxr_reference")
        )
        assert native == plain


# --- torch.compile --------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("verb", VERBS)
def test_compiles_whole_and_once_for_any_batch(verb, name):
    torch._dynamo.reset()
    compiled = torch.compile(called, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (7, 9, 11):  # neither 4 nor 6: torch takes equal sizes for one number
            parts = parts_of(count)
            assert same(compiled(verb, name, parts), called(verb, name, parts))


@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_loss_compiles_with_its_gradient(name, dynamic):
    def step(parts, predicted):
        return called("loss", name, [*parts[:-1], predicted * 2])

    parts, made = parts_of(7), []
    torch._dynamo.reset()
    for call in (torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager"), step):
        predicted = parts[-1].clone().requires_grad_()
        loss = call(parts, predicted)
        made.append((loss.detach(), *torch.autograd.grad(loss, predicted)))
    assert same(*made)


# --- torch.export ---------------------------------------------------------------------------


class Call(torch.nn.Module):
    def __init__(self, verb, backend, rows=64):
        super().__init__()
        self.verb, self.backend, self.rows = verb, backend, rows

    def forward(self, *parts):
        return called(self.verb, self.backend, parts, self.rows)


@backends
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(verb, name, strict):
    parts, few = tuple(parts_of()), tuple(parts_of(2))
    batch = torch.export.Dim("B", min=1)
    shapes = (tuple({0: batch} for _ in parts),)
    module = Call(verb, name)
    program = torch.export.export(module, parts, dynamic_shapes=shapes, strict=strict)
    assert same(program.module()(*few), module(*few))


def test_export_says_that_it_cannot_count():
    with pytest.raises(SpcxrError, match="none to count; give rows"):
        torch.export.export(Call("visible", "auto", None), tuple(parts_of()), strict=False)


# --- fake tensors ---------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("verb", VERBS)
def test_fake_tensors_have_shapes_alone(verb, name):
    parts = parts_of()
    with FakeTensorMode() as mode:
        fakes = called(verb, name, [mode.from_tensor(t) for t in parts])
    wanted = called(verb, name, parts)
    fakes, wanted = ((t,) if isinstance(t, torch.Tensor) else t for t in (fakes, wanted))
    for fake, real in zip(fakes, wanted, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_fake_tensors_cannot_be_counted():
    with FakeTensorMode() as mode, pytest.raises(SpcxrError, match="give rows"):
        called("visible", "auto", [mode.from_tensor(t) for t in parts_of()], rows=None)
