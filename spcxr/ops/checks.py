"""Whether a check may look at the numbers of a tensor, or at its shape alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

P = ParamSpec("P")
R = TypeVar("R")


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Dynamo calls the function once while it traces, and keeps what it returned.

    The mark is all that ``torch.compiler.assume_constant_result`` sets; but that imports Dynamo,
    which takes as long as torch itself, in programs that compile nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traced(*tensors: Tensor) -> bool:
    """Whether the tensors have no numbers: torch.compile or torch.export traces, or they are fake
    (`FakeTensorMode`). The native kernels check numbers again when they run.

    >>> traced(torch.zeros(2))
    False
    """
    if torch.compiler.is_compiling():
        return True
    # A plain tensor first: `is_fake` alone takes microseconds, which a small batch would feel.
    return any(type(t) is not Tensor and is_fake(t) for t in tensors)


def values_seen(*tensors: Tensor) -> bool:
    """Whether a check may read numbers: not where there are none, nor on a GPU, which would be
    waited for.

    >>> values_seen(torch.zeros(2))
    True
    """
    return not traced(*tensors) and all(t.device.type == "cpu" for t in tensors)
