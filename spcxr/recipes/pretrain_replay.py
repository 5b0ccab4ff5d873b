"""A step that was left out because it was not finite, computed again to find out why."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from spcxr.config import resolve
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.recipes import views
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.pretrain_start import Training, build
from spcxr.train.checkpoint import load_checkpoint
from spcxr.train.device import autocast, pick_device, pick_precision
from spcxr.train.distributed import World


def replay(run: str | Path, step: int, *, device: str = "auto") -> dict[str, float]:
    """Losses of a step of ``bad_steps.jsonl``, forward and backward, and its gradient's norm.

    Images, crops, masks and noise are those of the run; the weights are those of
    ``checkpoints/bad``, which the first such step met. Run it under `torch.autograd.detect_anomaly`
    to see where it goes wrong::

        with torch.autograd.detect_anomaly():
            replay("runs/a", 1207)

    Raises
    ------
    SpcxrError
        no run, or a step that is not in its ``bad_steps.jsonl``.
    """
    run = Path(run)
    config = resolve(PretrainConfig, run / "config.yaml", {})
    _refuse_good_steps(run, step)
    world = World(pick_device(device))
    own = run / "store"
    store = Store.open(own if (own / "store.json").is_file() else config.data)
    training = build(config, run, store, world)
    load_checkpoint(run / "checkpoints" / "bad", model=training.objective)
    return _losses(training, step - 1)


def _refuse_good_steps(run: Path, step: int) -> None:
    book = run / "bad_steps.jsonl"
    lines = book.read_text().splitlines() if book.is_file() else []
    steps = [int(json.loads(line)["step"]) for line in lines]
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise SpcxrError(f"{book}: step {step} was not left out; those that were: {known}")


def _losses(training: Training, step: int) -> dict[str, float]:
    """Of the step after ``step`` steps, all parts of all ranks one after the other."""
    config, device = training.config, training.world.device
    precision = pick_precision(config.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    objective = training.objective.train()
    objective.begin_step(training.progress(step))
    parts = training.rows_of(step)[1]
    found: dict[str, float] = {}
    for rows in parts:
        drawn = views.draw(training.store, rows, training.law, step // training.epoch_steps)
        with autocast(device, precision):
            losses = objective([view.to(device) for view in drawn], dtype=dtype)
        (losses["loss"] / len(parts)).backward()
        for name, value in losses.items():
            found[name] = found.get(name, 0.0) + float(value.detach()) / len(parts)
    slopes = [p.grad for p in objective.parameters() if p.grad is not None]
    return {**found, "grad_norm": float(torch.nn.utils.get_total_norm(slopes))}
