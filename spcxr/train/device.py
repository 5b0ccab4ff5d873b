"""Where, how precisely, and how many images at a time to compute."""

from __future__ import annotations

import contextlib
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from spcxr.errors import SpcxrError

CPU_INFO = Path("/proc/cpuinfo")
NATIVE_BF16 = frozenset({"amx_bf16", "avx512_bf16"})


@dataclass(frozen=True)
class Compute:
    """Where, how precisely (``bf16`` or ``fp32``), and how many images at a time."""

    batch_size: int
    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        return autocast(self.device, self.precision)


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Raises
    ------
    SpcxrError
        ``cuda`` where torch sees no GPU, or an unknown name.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SpcxrError(f"device is {name!r}; choose one of: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU seen"
        raise SpcxrError(f"--device cuda: {build}; choose --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(name: str, device: torch.device) -> str:
    """``bf16`` or ``fp32``: what ``auto`` means on this device; the other two are kept as asked.

    bf16 is chosen on GPUs and CPUs that multiply it in hardware (AMX, AVX512-BF16). Elsewhere it
    is emulated, tens of times slower than fp32, so fp32 is chosen; `why_not_bf16` says so.

    >>> pick_precision("bf16", torch.device("cpu"))
    'bf16'
    """
    if name not in ("auto", "bf16", "fp32"):
        raise SpcxrError(f"precision is {name!r}; choose one of: auto, bf16, fp32")
    if name != "auto":
        return name
    return "fp32" if why_not_bf16(name, device) else "bf16"


def why_not_bf16(name: str, device: torch.device) -> str:
    """The line for the log where ``auto`` means fp32, else ``""``. For an open `Journal` to say.

    >>> why_not_bf16("fp32", torch.device("cpu"))
    ''
    """
    if name != "auto":
        return ""
    if device.type == "cuda":
        native, lacking = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    else:
        native = not NATIVE_BF16.isdisjoint(cpu_flags())
        lacking = "this CPU (neither AMX nor AVX512-BF16)"
    return "" if native else f"precision fp32: {lacking} only emulates bf16, many times slower"


def cpu_flags() -> frozenset[str]:
    """What Linux says the first CPU can do; nothing where there is no ``/proc/cpuinfo``."""
    if not CPU_INFO.is_file():
        return frozenset()
    line = re.search(r"^flags\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    return frozenset(line.group(1).split() if line else ())


def memory_mib(device: torch.device) -> float:
    """The most that tensors took on a GPU so far; on a CPU what this process holds now, MiB.

    >>> memory_mib(torch.device("cpu")) > 1
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass: torch's autocast for ``bf16``, nothing for ``fp32``.

    >>> with autocast(torch.device("cpu"), "bf16"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
