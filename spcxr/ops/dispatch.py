"""The one place where a backend is chosen, with a reason for each that is not.

``native`` is the C++/CUDA library beside the package (``spcxr/_native_ops.so``, LibTorch stable
ABI), ``triton`` the twins in ``spcxr.kernels``, ``reference`` plain torch. A backend asked for by
name serves or raises; ``auto`` takes the first that can and logs once which.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spcxr.errors import SpcxrError
from spcxr.ops.checks import constant_when_traced

log = logging.getLogger(__name__)

BACKENDS = ("native", "triton", "reference")  # in the order `auto` tries them
# Verb -> the module of its Triton twin, spcxr.kernels.<module>; None: it has none.
VERBS: dict[str, str | None] = {
    "group_mask": "group_mask",
    "masked_patch_gather": "masked_patch_gather",
    "visible_patch_gather": "masked_patch_gather",
    "masked_reconstruction_loss": "masked_reconstruction_loss",
    "masked_attention": "masked_attention",
    "norm_linear": None,
    "residual_mlp": None,
}
# What the backward passes of verbs call.
BACKWARD = ("masked_attention_backward", "reconstruction_gradient")
# Kernels for CPUs that multiply bfloat16 alone: elsewhere torch's own layers are the faster ones.
OF_BFLOAT16 = ("norm_linear", "residual_mlp")
# What `auto` leaves to torch although the kernels are there (`masked_attention.handed_over`).
HANDED_OVER = {
    "masked_attention": "on CUDA it hands over to torch's SDPA: float32, head dims other than 32, "
    "64, 128, sequences of more than 256 tokens, heads that do not fit the shared memory",
}
LIBRARY = Path(__file__).resolve().parents[1] / "_native_ops.so"


class BackendUnavailable(SpcxrError):
    """The backend that was asked for cannot serve here; the message says why."""


class Native(NamedTuple):
    """The loaded library: its own account of its build, or the reason it is not there."""

    build: dict[str, str]
    reason: str | None


@functools.cache
def native() -> Native:
    """Load the native library, once."""
    if not LIBRARY.exists():
        return Native(
            {},
            f"{LIBRARY.name} was not built (no C++ compiler at install, or a checkout that was not "
            "installed); install g++, then: pip install --no-build-isolation -e .",
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # what ctypes raises: another torch, a missing symbol, a torn file
        cause = str(error).splitlines()[0]
        return Native({}, f"{LIBRARY} does not load ({cause}); build it for this torch")
    if missing := [op for op in (*VERBS, *BACKWARD) if not hasattr(torch.ops.spcxr, op)]:
        return Native(
            {}, f"{LIBRARY} is older than these sources (no {missing[0]}); build it again"
        )
    account = ctypes.CDLL(str(LIBRARY)).spcxr_build_info
    account.restype = ctypes.c_char_p
    return Native(json.loads(account()), None)


def encoder_isa() -> str | None:
    """The instruction set that serves the verbs `OF_BFLOAT16` on this CPU; None: nothing does."""
    if native().reason is not None:
        return None
    account = ctypes.CDLL(str(LIBRARY)).spcxr_encoder_isa
    account.restype = ctypes.c_char_p
    name: bytes | None = account()
    return None if name is None else name.decode()


def register_fake(verb: str, fake: Callable[..., Any]) -> None:
    """Tell torch.compile and torch.export the shapes of a native op, when it is there."""
    if native().reason is None:
        torch.library.register_fake(f"spcxr::{verb}", fake)


def register_autograd(verb: str, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
    """Tell torch the gradient of a native op, when it is there."""
    if native().reason is None:
        torch.library.register_autograd(f"spcxr::{verb}", backward, setup_context=keep)


_REFERENCES = torch.library.Library("spcxr_reference", "DEF")


def register_reference(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """A reference as an op, torch.ops.spcxr_reference.<verb>, of the native op's schema: it reads
    values and loops over them, so torch.compile and fake tensors must take it as a whole."""
    verb = schema.partition("(")[0]
    _REFERENCES.define(schema)
    _REFERENCES.impl(verb, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spcxr_reference::{verb}", fake, lib=_REFERENCES)
    op: Callable[..., Any] = getattr(torch.ops.spcxr_reference, verb)
    return op


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(verb: str, backend: str, device: str) -> str | None:
    """Why a backend cannot serve a verb for tensors on ``cpu`` or ``cuda``; None when it can.

    >>> unavailable("group_mask", "reference", "cpu") is None
    True
    """
    if verb not in VERBS or backend not in BACKENDS:
        raise SpcxrError(
            f"no backend {backend!r} of {verb!r}; choose auto or: {', '.join(BACKENDS)}"
        )
    if backend == "native":
        return _native_reason(verb, device)
    return _triton_reason(verb, device) if backend == "triton" else None


def _native_reason(verb: str, device: str) -> str | None:
    made, reason = native()
    if reason is None and verb in OF_BFLOAT16 and (device != "cpu" or encoder_isa() is None):
        return "made for CPUs with products of bfloat16 (AMX, AVX-512-BF16)"
    if reason is not None or device == "cpu":
        return reason
    if device != "cuda":
        return f"no kernel for tensors on {device!r}"
    return None if made["cuda"].startswith("sm_") else f"built without CUDA ({made['cuda']})"


def _triton_reason(verb: str, device: str) -> str | None:
    if VERBS[verb] is None:
        return "no Triton twin of it"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if importlib.util.find_spec("spcxr.kernels") is None:
        return "spcxr.kernels is not installed (pip install --no-build-isolation -e .)"
    if interpreted():
        return None if device == "cpu" else "TRITON_INTERPRET=1 interprets on the CPU only"
    if device != "cuda":
        return f"needs a CUDA device, and the tensors are on {device!r}"
    return None


_AUTO: ContextVar[str] = ContextVar("auto", default="auto")


@contextlib.contextmanager
def auto_means(backend: str) -> Iterator[None]:
    """Within it ``auto`` is this backend: for tracing a model that must not need our library.

    >>> with auto_means("reference"):
    ...     choose("masked_attention", "auto", "cpu")
    'reference'
    """
    token = _AUTO.set(backend)
    try:
        yield
    finally:
        _AUTO.reset(token)


# A backend does not change within a process.
@constant_when_traced
def choose(verb: str, backend: str, device: str) -> str:
    """The name of the backend that serves, for tensors on a device type.

    Raises
    ------
    BackendUnavailable
        the backend was asked for by name and cannot serve.

    >>> choose("group_mask", "reference", "cpu")
    'reference'
    """
    if backend == "auto":
        backend = _AUTO.get()
    if backend == "auto":
        return _first_that_can(verb, device)
    reason = unavailable(verb, backend, device)
    if reason is not None:
        raise BackendUnavailable(f"{verb}: backend {backend!r} cannot serve: {reason}")
    return backend


@functools.cache
def _first_that_can(verb: str, device: str) -> str:
    """The automatic choice, logged once: a warning when the native kernels are not used."""
    reasons = {name: unavailable(verb, name, device) for name in BACKENDS}
    served = next(name for name, reason in reasons.items() if reason is None)
    passed = [f"{n}: {r}" for n, r in reasons.items() if r is not None]
    level = logging.WARNING if reasons["native"] else logging.INFO
    log.log(level, "%s on %s: %s serves%s", verb, device, served, "".join(f"; {p}" for p in passed))
    return served


def kernel(
    verb: str, backend: str, device: str, reference: Callable[..., Any]
) -> Callable[..., Any]:
    """The function that serves: a native op, a Triton twin or the reference given."""
    served = choose(verb, backend, device)
    if served == "native":
        return getattr(torch.ops.spcxr, verb)
    return triton_twin(verb, verb) if served == "triton" else reference


def triton_twin(verb: str, name: str) -> Callable[..., Any]:
    """A function of a verb's Triton module."""
    return getattr(importlib.import_module(f"spcxr.kernels.{VERBS[verb]}"), name)


def report() -> list[dict[str, Any]]:
    """Rows of verb, backend, available, used, reason, for the device this machine would use.

    >>> [row["backend"] for row in report() if row["verb"] == "group_mask"]
    ['native', 'triton', 'reference']
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for verb in VERBS:
        used = choose(verb, "auto", device)
        for backend in BACKENDS:
            reason = unavailable(verb, backend, device)
            row = {"verb": verb, "backend": backend, "available": reason is None}
            row["used"] = backend == used
            why = f"first that can serve on {device}" if backend == used else f"{used} comes first"
            rows.append(row | {"reason": reason or why + _more(verb, backend)})
    return rows


def _more(verb: str, backend: str) -> str:
    """What a reason says besides of a native verb."""
    if backend != "native":
        return ""
    if verb in OF_BFLOAT16:
        return f"; in products of {encoder_isa()}"
    return f"; {HANDED_OVER[verb]}" if verb in HANDED_OVER else ""


def build_info() -> dict[str, str]:
    """What the native library is and was built with, and what this CPU can do.

    >>> {"library", "cpu_features"} <= set(build_info())
    True
    """
    made, reason = native()
    return {"library": reason or str(LIBRARY), **made, "cpu_features": cpu_features()}


def cpu_features() -> str:
    """The vector and matrix extensions of this CPU that kernels care about."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return torch.backends.cpu.get_cpu_capability()
    line = re.search(r"^flags\s*:(.*)$", flags.read_text(), re.MULTILINE)
    words = (line.group(1) if line else "").split()
    kept = [w for w in words if re.fullmatch(r"avx2|avx512(f|bw|vnni|_vnni|_bf16)|amx_\w+", w)]
    return " ".join(kept) or "none of AVX2, AVX-512, AMX"
