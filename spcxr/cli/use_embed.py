"""``spcxr embed``: its flags."""

from __future__ import annotations

import click

from spcxr.cli.options import with_exit_code
from spcxr.cli.use_options import chosen_compute, compute_options, said


@click.command("embed")
@compute_options(batch_size=16)
@click.option(
    "--out", required=True, help="File of the vectors: .parquet, .npz, .safetensors, .csv, .json."
)
@click.option(
    "--tokens",
    type=click.Choice(("cls", "patch", "both")),
    default="cls",
    help="The vector of the image, those of its patches, or both.  [cls]",
)
@click.option("--with-ids", is_flag=True, help="Add patient, study and image ids of DICOM headers.")
def embed(
    model: str, inputs: tuple[str, ...], out: str, tokens: str, with_ids: bool, **flags: object
) -> None:
    """Feature vectors of radiographs: MODEL is a run or a model folder, INPUT files and folders.

    Rows are in the order given. A stopped command goes on; files that are rejected have a row too.
    """

    def work() -> None:
        from spcxr.infer.embed_files import embed_files

        compute = chosen_compute(flags)
        counts = embed_files(model, inputs, out, compute, tokens=tokens, with_ids=with_ids)
        click.echo(said(out, counts, "embedded"))

    with_exit_code(work, bool(flags["debug"]))
