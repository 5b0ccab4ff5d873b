"""``spcxr segment``: its flags."""

from __future__ import annotations

import click

from spcxr.cli.options import with_exit_code
from spcxr.cli.use_options import chosen_compute, compute_options


@click.command("segment")
@compute_options(batch_size=4)
@click.option("--out", required=True, help="Folder of the results; a stopped command goes on.")
@click.option("--overlay/--no-overlay", default=True, help="Pictures with outlines.  [yes]")
@click.option("--dicom-seg", is_flag=True, help="DICOM SEG of each DICOM file; others are refused.")
@click.option(
    "--post",
    type=click.Choice(("default", "none", "largest", "holes")),
    default="default",
    help="Mend the mask: keep the largest pieces, fill holes, both (default) or neither.",
)
@click.option("--uncertainty", is_flag=True, help="Predict mirrored, too: mean, map and figures.")
def segment(
    model: str,
    inputs: tuple[str, ...],
    out: str,
    **flags: object,
) -> None:
    """Draw masks over radiographs: MODEL is a run of spcxr-train segment, INPUT files and folders.

    DICOM, PNG, JPEG, TIFF, told apart by content. OUT/segment.csv has a row a file.
    """

    def work() -> None:
        from spcxr.infer.segment_files import Wanted, segment_files

        wanted = Wanted(
            overlay=bool(flags["overlay"]),
            dicom_seg=bool(flags["dicom_seg"]),
            post=str(flags["post"]),
            uncertainty=bool(flags["uncertainty"]),
        )
        table = segment_files(model, inputs, out, wanted, chosen_compute(flags))
        click.echo(
            f"done: {out} ({table.done} segmented, {table.flagged} of them flagged, "
            f"{table.rejected} rejected)"
        )

    with_exit_code(work, bool(flags["debug"]))
