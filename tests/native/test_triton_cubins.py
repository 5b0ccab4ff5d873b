"""Every Triton kernel, as its verb launches it, compiled to a cubin on a machine without a GPU.

The verbs themselves are called, with a driver that says which GPU there would be and a launch that
stops after compiling: what is held to the budgets is what would run, options included.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = Path(__file__).with_name("triton_budgets.json")

COMPILE = """
import json, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from spcxr.kernels.group_mask import group_mask
from spcxr.kernels.masked_attention import masked_attention, masked_attention_backward
from spcxr.kernels.masked_patch_gather import masked_patch_gather, visible_patch_gather
from spcxr.kernels.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.group_mask import PLACEMENTS, Law

class Pretended:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

made, launch, kind = [], JITFunction.run, ""
def compile_only(self, *values, **options):
    options["warmup"] = True
    made.append((kind, launch(self, *values, **options)))
JITFunction.run = compile_only
driver.set_active(Pretended())

count, side, patch, room = 2, 224, 16, 3
ids, rows, halves = torch.arange(count), (side // patch) ** 2, torch.rand(count)
for placement in PLACEMENTS:
    group_mask(ids, 5, 6, *Law.of((14, 14), (0.5, 0.75), None, placement))
turn = torch.zeros(count, dtype=torch.bool)
boxes = torch.zeros(count, 4)
fine, coarse = turn[:, None, None].expand(count, side, side), turn.new_zeros(count, 14, 14)
fill = (ids.int(), ids, torch.zeros(count, room, 4).int(), torch.zeros(count, room, 2).int(), ids)
for pixel_type, dtype, seen in (
    (torch.uint8, torch.bfloat16, (None, None)), (torch.uint8, torch.bfloat16, (boxes, turn)),
    (torch.uint16, torch.float16, (boxes, turn)), (torch.float32, torch.float32, (boxes, turn)),
):
    pixels = torch.zeros(count, 1, side, side, dtype=pixel_type)
    words = (pixels, *seen, halves, halves, [side, side], patch)
    masked_patch_gather(*words, fine, *fill, 2**40, 3, 1, dtype)
    masked_patch_gather(*words, *(None,) * 6, 0, 0, 0, dtype)
    visible_patch_gather(*words, coarse, 100, dtype)
    predicted = torch.zeros(count, rows, patch * patch, dtype=dtype)
    masked_reconstruction_loss(predicted, *words, fine, True, True, True)
    masked_reconstruction_loss(predicted, *words, coarse, False, False, False)
# Triton compiles an argument of 1 in: it is another kernel then.
one, dot = torch.arange(1), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
words = (dot, None, turn[:1], halves[:1], halves[:1], [2, 2], 1)
masked_patch_gather(*words, fine[:1, :2, :2], one.int(), one, torch.zeros(1, 1, 4).int(),
                    torch.zeros(1, 1, 2).int(), one, 1, 1, 0, torch.float32)
visible_patch_gather(*words, fine[:1, :2, :2], 1, torch.float32)
masked_reconstruction_loss(torch.zeros(1, 4, 1), *words, fine[:1, :2, :2], True, True, True)

def attend(dtype, dim, bias, bits, starts, *strides):
    global kind
    kind = f" {dtype} {dim}".replace("torch.", "")
    qkv = torch.zeros(count, 197, 3, 6, dim, dtype=dtype)
    q, k, v = (qkv if starts is None else qkv.flatten(0, 1)).unbind(-3)
    if strides:
        q, k, v = (t.as_strided((1, 1, 1, dim), strides) for t in (q, k, v))
    bias = torch.zeros(3, q.shape[-2], dim, dtype=dtype) if bias else None
    words = (q, k, v, bias, bits, starts, q.shape[1] if starts is None else 197, dim**-0.5)
    out, lse = masked_attention(*words, True)
    masked_attention_backward(out, *words, out, lse)

bits, starts = torch.zeros(count, 7).int(), torch.zeros(count + 1).int()
attend(torch.bfloat16, 64, False, bits, starts)
attend(torch.float16, 128, True, bits, starts)
attend(torch.float16, 16, False, bits, None, 1, 1, 1, 1)
attend(torch.float32, 128, True, bits, starts)

def told(option, cubin):
    tool = triton.knobs.nvidia.cuobjdump.path
    open(sys.argv[2], "wb").write(cubin)
    return subprocess.run([tool, option, sys.argv[2]], capture_output=True, text=True).stdout

found = []
for kind, kernel in made:
    usage = told("--dump-resource-usage", kernel.asm["cubin"])
    used = dict(zip(("registers", "stack", "local"), map(int, re.search(
        r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", usage).groups())))
    used["shared"] = kernel.metadata.shared
    words = set(re.findall(r"(?:LDG|STG|HMMA|HGMMA)[.\\w]*", told("-sass", kernel.asm["cubin"])))
    marks = ("fma.rn", "atom.", "red.global", "bar.sync", "__assertfail")  # not shared.global
    marks = [m for m in marks if re.search(r"\\b" + re.escape(m), kernel.asm["ptx"])]
    name = kernel.metadata.name
    sums_asserted = "overflow detected" in kernel.asm["ttir"]
    name += "" if name == "rest_kernel" else kind
    found.append({"name": name, "used": used, "words": sorted(words), "marks": marks,
                  "sums_asserted": sums_asserted})
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=[pytest.param(80, marks=pytest.mark.slow), 90])
def compiled(request, tmp_path_factory):
    """(architecture, what was found of each compiled kernel)."""
    pytest.importorskip("triton", reason="triton is not installed")
    place = tmp_path_factory.mktemp("cubins")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(place), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(request.param), str(place / "cubin")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return f"sm_{request.param}", json.loads(run.stdout)


def attention(found, kinds=""):
    """The kernels of masked attention, of some types."""
    kernels = ("attention_kernel", "dq_kernel", "dk_dv_kernel")
    return [k for k in found if k["name"].startswith(kernels) and kinds in k["name"]]


def test_kernels_stay_within_their_budgets(compiled):
    """A kernel may use less than allowed, of its dtypes the worst, never more; none spills."""
    architecture, found = compiled
    budgets = json.loads(BUDGETS.read_text())
    assert {kernel["name"] for kernel in found} == set(budgets)
    for kernel in found:
        assert kernel["used"].pop("local") == 0
        for what, used in kernel["used"].items():
            limit = budgets[kernel["name"]][architecture][what]
            assert used <= limit, f"{kernel['name']} on {architecture}: {used} {what} > {limit}"


def test_floats_are_rounded_one_by_one_and_added_in_a_fixed_order(compiled):
    for kernel in compiled[1]:
        banned = {"fma.rn", "atom.", "red.global"}
        if kernel in attention(compiled[1]):  # its sums are one product after another
            banned.remove("fma.rn")
        assert not banned & set(kernel["marks"]), kernel["name"]


def test_words_of_the_generator_may_wrap(compiled):
    """With debug on, Triton stops a kernel whose sums overflow, unless it is told not to."""
    assert not any(kernel["sums_asserted"] for kernel in compiled[1])


def test_group_mask_waits_for_its_own_writes(compiled):
    """What one rectangle writes, the next reads in other threads."""
    kernels = [k for k in compiled[1] if k["name"] == "group_mask_kernel"]
    assert len(kernels) == 2
    assert all("bar.sync" in kernel["marks"] for kernel in kernels)


def test_rows_are_read_and_written_by_wide_words(compiled):
    """Of whole images in bytes, eight pixels at a time (the gather: four); tokens likewise."""
    for name, load, store in (
        ("gather_kernel", "LDG.E", "STG.E.64"),
        ("visible_kernel", "LDG.E.64", "STG.E.128"),
        ("loss_kernel", "LDG.E.64", "STG.E.128"),
    ):
        kernel = next(k for k in compiled[1] if k["name"] == name)
        assert {load, store} <= set(kernel["words"]), kernel


def test_attention_runs_on_tensor_cores(compiled):
    """In 16 bits; float32 is not rounded to tf32. Rows are read and written 16 bytes at a time."""
    architecture, found = compiled
    unit = {"sm_80": "HMMA", "sm_90": "HGMMA"}[architecture]
    for kernel in attention(found, "float16"):  # and bfloat16
        assert any(word.startswith(unit) for word in kernel["words"]), kernel
    for kernel in attention(found, "float32"):
        assert not any("MMA" in word for word in kernel["words"]), kernel
    for kernel in attention(found, "64") + attention(found, "128"):
        wide = ("LDG.E.128", "LDGSTS.E.BYPASS.128"), ("STG.E.128",)
        assert all(set(words) & set(kernel["words"]) for words in wide), kernel


def test_attention_stops_at_impossible_sequences(compiled):
    for kernel in attention(compiled[1], "128"):
        assert "__assertfail" in kernel["marks"], kernel["name"]
