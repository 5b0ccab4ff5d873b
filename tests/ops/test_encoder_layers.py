"""The encoder's linear layers: every backend against float64, odd rows, threads, torch's gates."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from spcxr.errors import SpcxrError
from spcxr.ops import dispatch
from spcxr.ops.encoder_layers import (
    BlockEnd,
    Norm,
    TiledLinear,
    norm_linear,
    reference_norm_linear,
    residual_mlp,
    tiled,
    untiled,
)

WHY = dispatch.unavailable("norm_linear", "native", "cpu")
needs_products = pytest.mark.skipif(WHY is not None, reason=str(WHY))
BACKENDS = [pytest.param("native", marks=needs_products), "reference"]
backends = pytest.mark.parametrize("name", BACKENDS)
WIDTHS = (192, 384, 768, 1024)


class Layers:
    """Layers of a width, rows for them, and what float64 makes of them."""

    def __init__(self, width: int, rows: tuple[int, ...], seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.norm = Norm(self._vector(width, 1), self._vector(width), 1e-6)
        self.qkv = self._linear(width, 3 * width)
        self.end = BlockEnd(
            self._linear(width, width),
            self.norm,
            self._linear(width, 2 * width),
            self._linear(2 * width, width),
        )
        self.tokens, self.attended = (self._vector((*rows, width)) for _ in range(2))

    def _vector(self, size, middle: float = 0.0) -> torch.Tensor:
        shape = size if isinstance(size, tuple) else (size,)
        return (torch.randn(shape, generator=self.draw) + middle).bfloat16()

    def _linear(self, wide: int, out: int) -> TiledLinear:
        weight = torch.randn(out, wide, generator=self.draw) * wide**-0.5
        return TiledLinear(tiled(weight), self._vector(out))

    def first(self, backend: str = "auto") -> torch.Tensor:
        return norm_linear(self.tokens, self.norm, self.qkv, backend=backend)

    def last(self, backend: str = "auto") -> torch.Tensor:
        return residual_mlp(self.tokens, self.attended, self.end, backend=backend)

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        def apply(layer: TiledLinear, rows: torch.Tensor) -> torch.Tensor:
            return F.linear(rows, untiled(layer.weight).double(), layer.bias.double())

        def normalised(rows: torch.Tensor) -> torch.Tensor:
            weight, bias, eps = self.norm
            return F.layer_norm(rows, weight.shape, weight.double(), bias.double(), eps)

        stream = self.tokens.double() + apply(self.end.proj, self.attended.double())
        hidden = F.gelu(apply(self.end.fc1, normalised(stream)))
        return (
            apply(self.qkv, normalised(self.tokens.double())),
            stream + apply(self.end.fc2, hidden),
        )


def error(made: torch.Tensor, truth: torch.Tensor) -> float:
    return float((made.double() - truth).norm() / truth.norm())


@backends
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 33)])
def test_against_float64(name, width, rows):
    layers = Layers(width, rows)
    first, last = layers.truth()
    # Rounding to bfloat16 alone errs by 1.7e-3.
    assert error(layers.first(name), first) < 3e-3
    assert error(layers.last(name), last) < 3e-3
    assert layers.first(name).shape == (*rows, 3 * width)
    assert layers.last(name).shape == (*rows, width)


@backends
def test_no_rows(name):
    layers = Layers(192, (0, 5))
    assert layers.first(name).shape == (0, 5, 576)
    assert layers.last(name).shape == (0, 5, 192)


@needs_products
@pytest.mark.parametrize("rows", [17, 33, 99, 197])
def test_the_same_bits_on_any_threads_and_beside_any_rows(rows):
    layers, made = Layers(384, (rows,)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append((layers.first(), layers.last()))
    finally:
        torch.set_num_threads(before)
    (first, last), (first_of_two, last_of_two) = made
    assert torch.equal(first, first_of_two)
    assert torch.equal(last, last_of_two)
    some = slice(rows // 3, rows // 3 + 5)
    layers.tokens, layers.attended = layers.tokens[some].clone(), layers.attended[some].clone()
    assert torch.equal(layers.first(), first[some])
    assert torch.equal(layers.last(), last[some])


@needs_products
def test_what_was_in_memory_is_not_seen():
    """Outputs and scratch are full of NaN before the call."""
    wanted = Layers(384, (45,)).last()
    poison = Layers(384, (45,))
    poison.tokens, poison.attended = (torch.full_like(poison.tokens, torch.nan) for _ in range(2))
    assert poison.last().isnan().all()
    assert torch.equal(Layers(384, (45,)).last(), wanted)


@needs_products
def test_several_threads_of_python_at_once():
    cases = [Layers(192, (20 + i,), seed=i) for i in range(4)]
    wanted = [case.last() for case in cases]
    found: list[torch.Tensor | None] = [None] * len(cases)

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = cases[i].last()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_does_not_fit_is_refused():
    layers = Layers(192, (3,))
    with pytest.raises(SpcxrError, match="multiples of 32"):
        tiled(torch.zeros(64, 24))
    for tokens in (layers.tokens.float(), layers.tokens[:, :96]):
        with pytest.raises(SpcxrError, match="give bfloat16"):
            norm_linear(tokens, layers.norm, layers.qkv)
    with pytest.raises(SpcxrError, match="contiguous"):
        norm_linear(layers.tokens.repeat(1, 2)[:, ::2], layers.norm, layers.qkv)
    with pytest.raises(SpcxrError, match="one width"):
        norm_linear(layers.tokens, Layers(384, (1,)).norm, layers.qkv)
    with pytest.raises(SpcxrError, match="one shape"):
        residual_mlp(layers.tokens, layers.attended[:2], layers.end)
    with pytest.raises(dispatch.BackendUnavailable, match="no Triton twin"):
        layers.first("triton")


@needs_products
def test_the_op_itself_keeps_memory_safe():
    layers = Layers(192, (3,))
    words = (layers.tokens, *layers.norm, *layers.qkv)
    for place, wrong in (
        (0, layers.tokens.float()),
        (1, layers.norm.weight[:8]),
        (5, words[5][:8]),
    ):
        bad = [*words]
        bad[place] = wrong
        with pytest.raises(RuntimeError, match="give"):
            torch.ops.spcxr.norm_linear(*bad)


def test_without_products_of_bfloat16_it_says_so():
    code = (
        "from spcxr.ops import dispatch\n"
        "rows = [r for r in dispatch.report() if r['verb'] == 'residual_mlp']\n"
        "print([r['reason'] for r in rows if r['backend'] == 'native'][0])\n"
        "print([r['backend'] for r in rows if r['used']])\n"
    )
    environment = {**os.environ, "SPCXR_CPU_ISA": "portable"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    reason, used = run.stdout.splitlines()
    assert "bfloat16" in reason or "not built" in reason
    assert used == "['reference']"


# --- torch's gates ----------------------------------------------------------------------------


def words_of(layers: Layers) -> tuple:
    end = layers.end
    parts = (*end.proj, *end.norm, *end.fc1, *end.fc2)
    return layers.tokens, layers.attended, *parts


@needs_products
def test_opcheck():
    layers = Layers(192, (2, 5))
    first = (layers.tokens, *layers.norm, *layers.qkv)
    torch.library.opcheck(torch.ops.spcxr.norm_linear.default, first)
    torch.library.opcheck(torch.ops.spcxr.residual_mlp.default, words_of(layers))
    assert torch.equal(reference_norm_linear(*first), layers.first("reference"))


def both(layers: Layers, name: str, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    first = norm_linear(tokens, layers.norm, layers.qkv, backend=name)
    last = residual_mlp(tokens, attended, layers.end, backend=name)
    return torch.cat([first, last], -1)


@needs_products
def test_compiles_whole_and_once_for_any_rows():
    torch._dynamo.reset()
    layers = Layers(192, (1,))
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 9, 11):
            case = Layers(192, (rows,))
            words = (layers, "native", case.tokens, case.attended)
            assert torch.equal(compiled(*words), both(*words))


@backends
def test_exports_with_dynamic_rows(name):
    class Call(torch.nn.Module):
        def forward(self, tokens, attended):
            return both(layers, name, tokens, attended)

    layers, other = Layers(192, (6,)), Layers(192, (11,))
    rows = torch.export.Dim("rows", min=2)
    given = (layers.tokens, layers.attended)
    program = torch.export.export(Call(), given, dynamic_shapes=({0: rows}, {0: rows}))
    made = program.module()(other.tokens, other.attended)
    assert torch.equal(made, both(layers, name, other.tokens, other.attended))


@needs_products
def test_fake_tensors_have_shapes_alone():
    layers = Layers(192, (2, 5))
    wanted = layers.last()
    with FakeTensorMode() as mode:
        words = [mode.from_tensor(t) if torch.is_tensor(t) else t for t in words_of(layers)]
        fake = torch.ops.spcxr.residual_mlp(*words)
    assert (fake.shape, fake.dtype, fake.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
