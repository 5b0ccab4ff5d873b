"""The C++ core by itself: ctest under sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
compiler = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C++ compiler on PATH")


def run(*command, **settings) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=1200, **settings
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# The thread sanitizer is for the emulated CUDA kernels, whose threads share memory; the CPU's
# kernels share none, and take minutes under it.
THREADED = ("test_core", "test_cuda_emulated", "test_cuda_gather", "test_cuda_attention")


@needs_compiler
@pytest.mark.parametrize(
    "sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_ctest_under_sanitizers(tmp_path, sanitizer):
    """Index arithmetic, generator, law; and the CUDA kernels emulated thread by thread."""
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DSPCXR_CUDA=OFF"]
    run(*configure, f"-DSPCXR_SANITIZE={sanitizer}")
    targets = ["--target", *THREADED] if sanitizer == "thread" else []
    run("cmake", "--build", tmp_path, "--parallel", "2", *targets)
    chosen = ["-R", f"^({'|'.join(THREADED)})$"] if sanitizer == "thread" else []
    said = run("ctest", "--test-dir", tmp_path, "--parallel", "2", "--output-on-failure", *chosen)
    assert "100% tests passed" in said
