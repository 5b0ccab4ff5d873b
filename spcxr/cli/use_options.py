"""Flags that every command of ``spcxr`` that works through files has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from spcxr.infer.result_table import Counts
    from spcxr.train.device import Compute


def compute_options(batch_size: int) -> Callable[[Any], Any]:
    """MODEL, INPUT..., ``--device``, ``--precision``, ``--batch-size`` and ``--debug``."""
    decorators = (
        click.argument("model", metavar="MODEL"),
        click.argument("inputs", metavar="INPUT...", nargs=-1, required=True),
        click.option("--device", default="auto", help="auto, cpu or cuda.  [auto]"),
        click.option("--precision", default="auto", help="auto, bf16 or fp32.  [auto]"),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            default=batch_size,
            help=f"Images at a time.  [{batch_size}]",
        ),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


rule_option = click.option(
    "--threshold-rule",
    type=click.Choice(("youden", "specificity_90", "sensitivity_90")),
    default="youden",
    help="Which of the model's thresholds calls a label (several labels).  [youden]",
)


def chosen_compute(flags: Mapping[str, object]) -> Compute:
    """What the flags of `compute_options` ask for, settled.

    >>> chosen_compute({"device": "cpu", "precision": "fp32", "batch_size": 4}).precision
    'fp32'
    """
    from spcxr.train.device import Compute, pick_device, pick_precision

    where = pick_device(str(flags["device"]))
    precision = pick_precision(str(flags["precision"]), where)
    return Compute(int(str(flags["batch_size"])), where, precision)


def said(out: str, counts: Counts, verb: str) -> str:
    """The last line of a command.

    >>> from spcxr.infer.result_table import Counts
    >>> said("a.csv", Counts(done=3, rejected=1), "predicted")
    'done: a.csv (3 predicted, 1 rejected)'
    """
    return f"done: {out} ({counts.done} {verb}, {counts.rejected} rejected)"
