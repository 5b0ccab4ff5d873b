"""Reading files of weights: safetensors, and PyTorch's pickles without running what they hold."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from spcxr.errors import SpcxrError

PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
# How a zip file (torch.save since 1.6) and a bare pickle (before, or of other protocols) begin.
BEGINNINGS_OF_PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
# What torch's restricted unpickler raises on bytes that are cut short or not a pickle at all.
TORN = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a whole ``.safetensors`` file.

    Raises
    ------
    SpcxrError
        no such file, a torn one, or a pickle by that name.
    """
    _refuse_absent(path)
    with path.open("rb") as file:
        head = file.read(9)
        # safetensors: the length of its JSON in 8 bytes, which may look like a pickle's first two.
        if head[8:] != b"{" and head.startswith(BEGINNINGS_OF_PICKLES):
            raise SpcxrError(f"{path}: a pickle, not safetensors; rename it to {path.stem}.pth")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SpcxrError(f"{path}: not a whole safetensors file ({error}); copy it again") from (
            error
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a file of weights holds, on the CPU: tensors by name, or dictionaries of them.

    Pickles go through torch's restricted unpickler, which calls nothing: beside tensors and plain
    values only ``argparse.Namespace`` is let in, since MAE and DINO keep their settings in one.
    Tensors stay in the file (memory-mapped) until they are used, where its format allows it.

    Raises
    ------
    SpcxrError
        no such file, a torn one, another suffix, or a pickle that holds other objects.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     file = Path(place) / "mae.pth"
    ...     torch.save({"model": {"cls_token": torch.zeros(3)}, "args": argparse.Namespace()}, file)
    ...     read_checkpoint(file)["model"]
    {'cls_token': tensor([0., 0., 0.])}
    """
    if path.suffix not in SUFFIXES:
        raise SpcxrError(f"{path}: unknown kind of weights; give one of: {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    _refuse_absent(path)
    mapped = zipfile.is_zipfile(path)
    try:
        with safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what matters is raised
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except TORN as error:
        if culprit := _culprit(error):
            raise SpcxrError(
                f"{path}: refused, for it holds {culprit} beside tensors, which could run code; "
                "where you trust it, save its tensors by safetensors.torch.save_file"
            ) from error
        raise SpcxrError(
            f"{path}: not a whole file of weights ({type(error).__name__}); copy it again, or "
            "save its tensors by safetensors.torch.save_file"
        ) from error
    if not isinstance(found, dict):
        raise SpcxrError(f"{path}: holds a {type(found).__name__}, no weights by name; save those")
    return found


def _refuse_absent(path: Path) -> None:
    if not path.is_file():
        raise SpcxrError(
            f"{path}: not there; give a run, a model folder or a .safetensors file "
            f"({', '.join(PICKLES)} are read too)"
        )


def _culprit(error: Exception) -> str:
    """The class or function that the unpickler refused, out of torch's many lines of advice."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return named.group(1) if named else ""
