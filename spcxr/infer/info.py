"""What ``spcxr info`` says: versions, devices, and every kernel backend with its reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import spcxr
from spcxr.ops import dispatch
from spcxr.train.device import pick_device, pick_precision

LIBRARIES = ("torch", "triton", "numpy", "pydicom", "pillow", "monai", "pyarrow", "safetensors",
             "highdicom", "onnx", "onnxruntime", "timm")  # fmt: skip
DICOM_PLUGINS = ("pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls", "python-gdcm")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gather() -> dict[str, Any]:
    """Facts as plain values, ready for JSON.

    >>> gather()["spcxr"] == spcxr.__version__
    True
    """
    device = pick_device("auto")
    return {
        "spcxr": spcxr.__version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "dicom_plugins": {name: _version(name) for name in DICOM_PLUGINS},
        "device": {
            "chosen": str(device),
            "precision": pick_precision("auto", device),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "build": dispatch.build_info(),
        "backends": [dict(row) for row in dispatch.report()],
    }


def render(facts: dict[str, Any], *, as_json: bool = False) -> str:
    """The facts as JSON, or as a page for a terminal.

    >>> print(render({"spcxr": "1", "backends": []}))
    spcxr                1
    """
    if as_json:
        return json.dumps(facts, indent=2, default=str)
    return "\n".join(_lines(facts))


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    wide = 20 - len(indent)
    for name, value in facts.items():
        if name == "backends":
            yield from map(_backend_line, value)
        elif isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"{indent}{name:<{wide}} {said}"


def _backend_line(row: dict[str, Any]) -> str:
    state = "used" if row["used"] else "available" if row["available"] else "not available"
    return f"{row['verb']:<24} {row['backend']:<10} {state:<14} {row['reason']}"
