"""The CUDA kernels compiled, on a machine without a GPU.

Budgets, wide words, tensor cores, no fused noise.

After a change on purpose: ``python tests/native/test_cubins.py`` writes budgets.json anew.
"""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = Path(__file__).with_name("budgets.json")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
EACH = pytest.mark.parametrize(
    "architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90a"]
)
NVCC = ("nvcc", "-std=c++17", "-O3", "-fmad=false", "-I", str(ROOT / "csrc"))
TYPES = {"a": "int8", "h": "uint8", "t": "uint16", "f": "float32", "7Float16": "float16"}
TYPES |= {"8BFloat16": "bfloat16", "Lb1": "whole", "3One": "any", "5Eight": "", "Lb0": ""}
TYPES |= {f"Li{dim}": str(dim) for dim in (32, 64, 128)}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kernel_name(mangled: str) -> str:
    """The kernel and its types: ``gather_wide_kernel uint8 bfloat16 whole``."""
    length = re.match(r"_ZN5spcxr(\d+)", mangled)
    assert length, mangled
    end = length.end() + int(length[1])
    types = re.match(r"I(.*?)EEv", mangled[end:])
    codes = re.findall("|".join(sorted(TYPES, key=len, reverse=True)), types[1] if types else "")
    return " ".join([mangled[length.end() : end], *(TYPES[c] for c in codes if TYPES[c])])


FOLDERS: list[Path] = []  # of cubins, to be removed


@functools.cache
def compiled(architecture: str) -> tuple[Path, dict[str, dict[str, int]]]:
    """A folder of cubins; registers, stack, spills and shared memory of each kernel."""
    folder, made = Path(tempfile.mkdtemp()), {}
    FOLDERS.append(folder)
    target = f"arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    for source in SOURCES:
        cubin = folder / f"{source.stem}.cubin"
        said = run(*NVCC, "-Xptxas", "-v", "-cubin", "-gencode", target, "-o", cubin, source)
        for entry in said.split("Compiling entry function '")[1:]:
            made[kernel_name(entry.split("'")[0])] = {
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "stack": int(re.search(r"(\d+) bytes stack frame", entry)[1]),
                "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", entry)),
                "shared": int((re.search(r"(\d+) bytes smem", entry) or [0, 0])[1]),
            }
    return folder, made


@pytest.fixture(scope="module", autouse=True)
def no_cubins_stay():
    yield
    for folder in FOLDERS:
        shutil.rmtree(folder)
    FOLDERS.clear()
    compiled.cache_clear()


@needs_nvcc
@EACH
def test_cuda_kernels_stay_within_their_budgets(architecture):
    """A kernel may use less than budgets.json allows, never more, and never spills."""
    budgets = json.loads(BUDGETS.read_text())
    _, measured = compiled(architecture)
    assert set(measured) == set(budgets)
    for name, used in measured.items():
        assert used["spills"] == 0, f"{name} spills on {architecture}"
        for what, limit in budgets[name][architecture].items():
            assert used[what] <= limit, f"{name} on {architecture}: {used[what]} {what} > {limit}"


def disassembler() -> Path:
    """Triton's wheel ships one."""
    spec = importlib.util.find_spec("triton")
    found = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not found or not found.is_file():
        pytest.skip("no cuobjdump: triton is not installed")
    return found


@needs_nvcc
@EACH
def test_fast_paths_use_wide_words(architecture):
    """Eight pixels a load and 16 bytes a store, in every kernel that makes eight tokens at once."""
    folder, _ = compiled(architecture)
    seen = 0
    for cubin in folder.glob("*.cubin"):
        code = run(disassembler(), "-sass", cubin)
        for function in code.split("Function : ")[1:]:
            name, *types = kernel_name(function.split()[0]).split()
            if name not in {"gather_wide_kernel", "visible_wide_kernel", "loss_kernel"}:
                continue
            if types[0] == "any":
                continue
            pixel, token = types[:2]
            lines = 1 if name == "loss_kernel" else 4
            loads = len(re.findall(rf"LDG\.E\.{64 if pixel == 'uint8' else 128}\.CON", function))
            stores = len(re.findall(r"STG\.E\.128", function))
            assert loads >= lines * (2 if pixel == "float32" else 1), (name, types, loads)
            assert stores >= lines * (2 if token == "float32" else 1), (name, types, stores)
            seen += 1
    assert seen == 3 * 9 * 2  # kernels, pairs of types, whole images or boxes


@needs_nvcc
@EACH
def test_gradients_use_wide_words(architecture):
    """Eight slopes a load, 16 bytes a store."""
    folder, _ = compiled(architecture)
    code = run(disassembler(), "-sass", folder / "reconstruction_loss.cubin")
    seen = 0
    for function in code.split("Function : ")[1:]:
        name, *types = kernel_name(function.split()[0]).split()
        if name == "gradient_kernel":
            assert re.search(rf"LDG\.E\.{64 if types[0] == 'int8' else 128}\.CON", function), types
            assert re.search(r"STG\.E\.128", function), types
            seen += 1
    assert seen == 6  # signs or errors, to three types


@needs_nvcc
@EACH
def test_attention_uses_tensor_cores(architecture):
    """Products on tensor cores from shared memory, and 16 bytes a lane between it and global."""
    folder, _ = compiled(architecture)
    seen = 0
    for cubin in folder.glob("attention_*.cubin"):
        code = run(disassembler(), "-sass", cubin)
        for function in code.split("Function : ")[1:]:
            name, token, dim = kernel_name(function.split()[0]).split()
            backward = name == "attention_backward_kernel"
            products = re.findall(r"HMMA\.16816\.F32(\.BF16)?", function)
            assert all((p == ".BF16") == (token == "bfloat16") for p in products)
            # Products over 16 keys or queries: two of the forward pass, seven of the backward one.
            at_least = int(dim) // 8 * 2 * (7 if backward else 2)
            assert len(products) >= at_least, (name, token, dim, len(products))
            counts = {
                what: len(re.findall(pattern, function))
                for what, pattern in {
                    "rows": r"LDSM\.16\.M88\.4",
                    "columns": r"LDSM\.16\.MT88\.4",
                    "copies": r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128",
                    "loads": r"LDG\.E\.128",
                    "stores": r"STG\.E\.128",
                }.items()
            }
            assert all(counts.values()), (name, token, dim, counts)
            assert not re.search(r"\b(LDL|STL)\b", function), (name, token, dim)
            seen += 1
    assert seen == 2 * 2 * 3  # passes, types, head dims


@needs_nvcc
def test_only_resampling_fuses(tmp_path):
    """A fused multiply-add rounds once: the noise would have other bits than the CPU's.

    Attention has no such twin, and says itself what it fuses.
    """
    assert "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>" in (ROOT / "CMakeLists.txt").read_text()
    fused = 0
    for source in SOURCES:
        if source.stem.startswith("attention"):
            continue
        out = tmp_path / "out.ptx"
        run(*NVCC, "-ptx", "-gencode", "arch=compute_80,code=compute_80", "-o", out, source)
        lines = [line for line in out.read_text().splitlines() if "fma.rn.f32" in line]
        assert not [line for line in lines if "resampling" not in line]
        fused += len(lines)
    assert fused > 0  # the remark is still there to be found


def write_budgets() -> None:
    """Registers to the next multiple of eight, in which the hardware hands them out."""
    budgets: dict[str, dict[str, dict[str, int]]] = {}
    for architecture in ARCHITECTURES:
        for name, used in compiled(architecture)[1].items():
            limits = {"registers": -(-used["registers"] // 8) * 8, "stack": used["stack"]}
            budgets.setdefault(name, {})[architecture] = limits | {"shared": used["shared"]}
    rows = ",\n".join(
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(a)}: {json.dumps(limits)}" for a, limits in of.items())
        + "\n }"
        for name, of in sorted(budgets.items())
    )
    BUDGETS.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    write_budgets()
