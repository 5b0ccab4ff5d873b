"""Where and how precisely to compute."""

from __future__ import annotations

import contextlib
import logging

import torch

from spcxr.errors import SpcxrError

logger = logging.getLogger("spcxr")


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
    is emulated, tens of times slower than fp32, so fp32 is chosen and a line logged.

    >>> pick_precision("bf16", torch.device("cpu"))
    'bf16'
    """
    if name not in ("auto", "bf16", "fp32"):
        raise SpcxrError(f"precision is {name!r}; choose one of: auto, bf16, fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        native, lacking = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    else:
        found = torch.cpu.get_capabilities()
        native = bool(found.get("amx_bf16") or found.get("avx512_bf16"))
        lacking = "this CPU (neither AMX nor AVX512-BF16)"
    if not native:
        logger.info("precision fp32: %s only emulates bf16, many times slower", lacking)
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass: torch's autocast for ``bf16``, nothing for ``fp32``.

    >>> with autocast(torch.device("cpu"), "bf16"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
