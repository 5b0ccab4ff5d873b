"""Writing one graph as ONNX, as ``torch.export`` program or as a compiled package; each is read
back and run before it counts as written."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.infer.export_check import Check, compare
from spcxr.infer.export_graphs import Graph
from spcxr.ops import dispatch

ONNX_PARTS = ("onnx", "onnxscript", "onnxruntime")
OPSETS = (18, 23)  # the least and the most that torch's exporter writes and that was tried
Answers = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Job:
    """What all files of one export share.

    ``batch`` is the number of images that a file takes at once, None for any; ``grey``
    ``[B, 1, H, W]`` are the images of the check; ``facts`` travel inside every file.
    """

    folder: Path
    channels: int
    batch: int | None
    opset: int
    pure_aten: bool
    grey: Tensor
    facts: dict[str, Any]


def trace(graph: Graph, job: Job, backend: str) -> torch.export.ExportedProgram:
    """The graph as a program of aten operators, and of spcxr's own with backend ``native``."""
    height, width = job.grey.shape[2:]
    # Two images: torch takes a size of 1 for a constant.
    example = torch.rand(job.batch or 2, job.channels, height, width)
    free = {0: torch.export.Dim("batch", min=1, max=2**16)} if job.batch is None else {}
    with torch.no_grad(), dispatch.auto_means(backend), quietly():
        made = torch.export.export(graph.module, (example,), dynamic_shapes={"images": free})
    # Where each line of code lies on this machine, in whose home: nobody else's business.
    for part in made.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return made


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Torch's exporters warn of what they do themselves, and of torchvision, which is not used."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        logger.setLevel(level)


def held_against(file: str, graph: Graph, job: Job, answers: Answers, by: str) -> Check:
    """Run a file on the images of the check: one, and all (as many as it takes, if fixed)."""
    if job.batch is None:
        batches = [job.grey[:1], job.grey]
    else:
        batches = [job.grey.repeat(-(-job.batch // len(job.grey)), 1, 1, 1)[: job.batch]]
    with torch.inference_mode():
        wanted = [graph.reference(grey) for grey in batches]
        got = [answers(grey.expand(-1, job.channels, -1, -1).contiguous()) for grey in batches]
    wanted_all, got_all = (
        [torch.cat(parts) for parts in zip(*found, strict=True)] for found in (wanted, got)
    )
    return compare(file, graph.outputs, wanted_all, got_all, by)


# --- torch.export ---------------------------------------------------------------------------------


def backends(job: Job) -> dict[str, str]:
    """What is added to a file's name -> the backend of attention in it.

    Raises
    ------
    SpcxrError
        without the native library there are no operators of spcxr to write.
    """
    if job.pure_aten:
        return {"": "reference"}
    if (reason := dispatch.native().reason) is not None:
        raise SpcxrError(f"no file with spcxr's operators: {reason}; or ask for --pure-aten")
    return {"": "reference", "-spcxr": "native"}


# Both are made in memory: torch's own writer of files ends the process when the disk is full.


def write_pt2(graph: Graph, job: Job) -> list[Check]:
    """``NAME.pt2`` of aten operators alone and ``NAME-spcxr.pt2`` of spcxr's own among them."""
    checks = []
    for suffix, backend in backends(job).items():
        file = f"{graph.name}{suffix}.pt2"
        program, path = trace(graph, job, backend), job.folder / file
        made = io.BytesIO()
        with quietly():
            torch.export.save(program, made, extra_files={"spcxr.json": json.dumps(job.facts)})
            path.write_bytes(made.getbuffer())
            answers: Any = torch.export.load(path).module()
        checks.append(held_against(file, graph, job, answers, f"torch {torch.__version__}"))
    return checks


def write_aoti(graph: Graph, job: Job) -> list[Check]:
    """The same compiled by AOTInductor for this kind of CPU: ``NAME.aoti.pt2``, for C++."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise SpcxrError("--format aoti compiles, and there is no C++ compiler; install g++")
    checks = []
    said = {key: json.dumps(value) for key, value in job.facts.items()}
    for suffix, backend in backends(job).items():
        file = f"{graph.name}{suffix}.aoti.pt2"
        program, made = trace(graph, job, backend), io.BytesIO()
        with quietly(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=made, inductor_configs={"aot_inductor.metadata": said}
            )
            (job.folder / file).write_bytes(made.getbuffer())
            answers: Any = torch._inductor.aoti_load_package(str(job.folder / file))
        checks.append(held_against(file, graph, job, answers, f"AOTInductor {torch.__version__}"))
    return checks


# --- ONNX -----------------------------------------------------------------------------------------


def need_onnx() -> None:
    """Raise, with what to install, unless all three of `ONNX_PARTS` can be imported."""
    for name in ONNX_PARTS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SpcxrError(
                f"--format onnx needs {name} ({error}); install it: pip install 'spcxr[export]'"
            ) from error


def write_onnx(graph: Graph, job: Job) -> list[Check]:
    """``NAME.onnx`` of standard operators, run by ONNX Runtime on the CPU."""
    need_onnx()
    runtime: Any = importlib.import_module("onnxruntime")
    file = f"{graph.name}.onnx"
    program = trace(graph, job, "reference")
    with quietly():
        made: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=job.opset,
            input_names=["images"],
            output_names=list(graph.outputs),
            verbose=False,
        )
    _call_batch(made.model.graph)
    _forget_sources(made.model)
    for key, value in job.facts.items():
        made.model.metadata_props[f"spcxr.{key}"] = _text(value)
    made.save(job.folder / file)
    try:
        session = runtime.InferenceSession(job.folder / file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no other base
        line = str(error).splitlines()[0]
        raise SpcxrError(
            f"{file}: ONNX Runtime {runtime.__version__} does not take it ({line}); try a lower "
            "--opset, or a newer onnxruntime"
        ) from error

    def answers(images: Tensor) -> tuple[Tensor, ...]:
        found = session.run(list(graph.outputs), {"images": images.numpy()})
        return tuple(torch.from_numpy(np.asarray(one)) for one in found)

    return [held_against(file, graph, job, answers, f"onnxruntime {runtime.__version__}")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _forget_sources(model: Any) -> None:
    """Leave out what each node came of: with it, the paths of this machine's Python files."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()


def _call_batch(graph: Any) -> None:
    """Name the free size ``batch``, which torch numbers (``s34``)."""
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    free = {str(d) for d in graph.inputs[0].shape if not isinstance(d, int)}
    for value in values:
        if value.shape is not None and any(str(d) in free for d in value.shape):
            value.shape = type(value.shape)(["batch" if str(d) in free else d for d in value.shape])
