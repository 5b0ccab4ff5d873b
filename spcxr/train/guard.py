"""Steps that were not finite: noted with their images, and a stop when they do not end."""

from __future__ import annotations

import json
from pathlib import Path

from spcxr.errors import SpcxrError
from spcxr.train.batches import Rows
from spcxr.train.optim import Step

MOST_IN_A_ROW = 5


def note_bad_step(folder: Path, step: int, epoch: int, rows: Rows, outcome: Step) -> None:
    """Append a step that was left out to ``bad_steps.jsonl``: its number, its image ids.

    With the run's seed they are all that its crops, masks and noise were drawn from; the weights
    that it met first are in ``checkpoints/bad``.
    """
    line = {
        "step": step,
        "epoch": epoch,
        "loss": str(outcome.loss),
        "grad_norm": str(outcome.grad_norm),
        "image_ids": rows.tolist(),
    }
    with (folder / "bad_steps.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def refuse_endless_bad_steps(folder: Path, step: int, bad_in_a_row: int) -> None:
    """Stop the run at the fifth step in a row that is not finite: the weights are beyond repair.

    >>> refuse_endless_bad_steps(Path("runs/a"), 70, 5)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: runs/a: loss or gradient not finite in 5 steps in a row, up to 70; ...
    """
    if bad_in_a_row >= MOST_IN_A_ROW:
        raise SpcxrError(
            f"{folder}: loss or gradient not finite in {bad_in_a_row} steps in a row, up to "
            f"{step}; their images are in {folder / 'bad_steps.jsonl'}; check them, or start a "
            "new --out with a lower --base-lr or --precision fp32"
        )
