"""``spcxr predict``: its flags."""

from __future__ import annotations

import click

from spcxr.cli.options import with_exit_code
from spcxr.cli.use_options import chosen_compute, compute_options, rule_option, said


@click.command("predict")
@compute_options(batch_size=16)
@click.option("--out", required=True, help="File of the results: .csv, .json or .parquet.")
@rule_option
@click.option("--with-ids", is_flag=True, help="Add patient, study and image ids of DICOM headers.")
def predict(
    model: str,
    inputs: tuple[str, ...],
    out: str,
    threshold_rule: str,
    with_ids: bool,
    **flags: object,
) -> None:
    """Probabilities of labels: MODEL is a run of spcxr-train classify, INPUT files and folders.

    OUT has a row a file, also for files that are rejected. A stopped command goes on.
    """

    def work() -> None:
        from spcxr.infer.predict_files import predict_files

        compute = chosen_compute(flags)
        counts = predict_files(model, inputs, out, compute, rule=threshold_rule, with_ids=with_ids)
        click.echo(said(out, counts, "predicted"))

    with_exit_code(work, bool(flags["debug"]))
