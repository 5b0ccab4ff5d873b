"""What the built library is: one file for every torch >= 2.11 and every Python."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spcxr.ops import dispatch

pytestmark = [
    pytest.mark.skipif(dispatch.native().reason is not None, reason=str(dispatch.native().reason)),
    pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils) on PATH"),
]
# Weak in our source: a CPU-only torch has none of them.
OPTIONAL = {"aoti_torch_get_current_cuda_stream"}


def undefined_symbols() -> dict[str, str]:
    command = ["nm", "-D", "--undefined-only", str(dispatch.LIBRARY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: kind for kind, name in re.findall(r"^\s+(\w) (\S+)$", said, re.MULTILINE)}


def test_it_needs_the_stable_abi_and_nothing_else_of_torch():
    names = undefined_symbols()
    assert not [n for n in names if n.startswith("Py") or n.startswith("_Py")], "Python C API"
    assert not [n for n in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", n)], "torch's C++ ABI"
    assert not [n for n in names if n.startswith("cuda")], "cudart is linked statically"
    for name in OPTIONAL & names.keys():
        assert names[name] == "w"


def test_nothing_newer_than_the_oldest_torch_supported():
    """Shims of the stable headers that came with 2.12 and 2.13: torch 2.11 has none of them."""
    newer = "with_tags|set_python_module|torch_exception_get_what"
    assert not [name for name in undefined_symbols() if re.search(newer, name)]


def test_cuda_code_for_each_architecture_promised():
    triton = pytest.importorskip("triton", reason="no triton: its wheel ships cuobjdump")
    built = dispatch.build_info()["cuda"]
    if not built.startswith("sm_"):
        pytest.skip(f"no CUDA code: {built}")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--list-elf", "--list-ptx", str(dispatch.LIBRARY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"sm_80\.cubin", said)
    assert re.search(r"sm_90a?\.cubin", said)
    assert re.search(r"\.sm_80\.ptx", said)
