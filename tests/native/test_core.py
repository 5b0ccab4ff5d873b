"""The C++ core by itself: ctest under sanitizers; Triton twins compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
compiler = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C++ compiler on PATH")


def run(*command, **settings) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=300, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_ctest_under_sanitizers(tmp_path, sanitizer):
    """Index arithmetic, generator, law; and the CUDA kernels emulated thread by thread."""
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DSPCXR_CUDA=OFF"]
    run(*configure, f"-DSPCXR_SANITIZE={sanitizer}")
    run("cmake", "--build", tmp_path, "--parallel", "2")
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path, "--output-on-failure")


TRITON_COMPILE = """
import importlib, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spcxr.ops.group_mask import PLACEMENTS, Law
kernel = importlib.import_module("spcxr.kernels.group_mask")
law_names = ["GRID_H", "GRID_W", "TARGET_LOW", "TARGET_SPAN", "H_LOW", "H_SPAN", "W_LOW", "W_SPAN",
             "TORUS", "MAX_BLOCKS"]
signature = dict(image_ids="*i64", blocks="*i32", mask="*i8", k0="i32", k1="i32", epoch="i32")
signature |= {name: "constexpr" for name in law_names}
for side, placement, capability in zip((14, 224, 14), (*PLACEMENTS, PLACEMENTS[0]), (80, 90, 90)):
    law = Law.of((side, side), (0.5, 0.75), None, placement)
    values = [*law.grid, *law.target, *law.sides, law.torus, law.max_blocks]
    source = ASTSource(fn=kernel.group_mask_kernel, signature=signature,
                       constexprs=dict(zip(law_names, values, strict=True)))
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": kernel.NUM_WARPS})
    assert len(made.asm["cubin"]) > 1000
    # What one rectangle writes, the next reads in other threads.
    assert "bar.sync" in made.asm["ptx"]
print("cubins")
"""


def test_triton_twin_compiles_to_cubins(tmp_path):
    """For sm_80 and sm_90, on a machine without a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    (tmp_path / "compile.py").write_text(TRITON_COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    said = run(sys.executable, "-W", "ignore", tmp_path / "compile.py", env=environment)
    assert said.strip().endswith("cubins")
