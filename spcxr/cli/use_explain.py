"""``spcxr explain``: its flags."""

from __future__ import annotations

import click

from spcxr.cli.options import with_exit_code
from spcxr.cli.use_options import chosen_compute, compute_options, rule_option, said


@click.command("explain")
@compute_options(batch_size=4)
@click.option("--out", required=True, help="Folder of the results; a stopped command goes on.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    help="Label to explain; may be given several times.  [what the model calls]",
)
@rule_option
@click.option("--png", is_flag=True, help="Maps as 8-bit PNG on the file's own grid, too.")
def explain(
    model: str,
    inputs: tuple[str, ...],
    out: str,
    labels: tuple[str, ...],
    threshold_rule: str,
    png: bool,
    **flags: object,
) -> None:
    """What labels rest on: MODEL is a run of spcxr-train classify, INPUT files and folders.

    Attention rollout and Grad-CAM over each radiograph; OUT/explain.csv has a row a file.
    """

    def work() -> None:
        from spcxr.infer.explain_files import explain_files

        compute = chosen_compute(flags)
        table = explain_files(
            model, inputs, out, compute, labels=labels, rule=threshold_rule, png=png
        )
        click.echo(said(out, table, "explained"))

    with_exit_code(work, bool(flags["debug"]))
