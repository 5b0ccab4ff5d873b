"""``spcxr export``: its flags."""

from __future__ import annotations

import click

from spcxr.cli.options import with_exit_code


@click.command("export")
@click.argument("model", metavar="MODEL")
@click.option(
    "--format",
    "kind",
    type=click.Choice(("timm", "onnx", "pt2", "aoti")),
    required=True,
    help="timm folder, ONNX, torch.export, or compiled for C++ (AOTInductor).",
)
@click.option("--out", required=True, help="Folder of the results: new, or an earlier export.")
@click.option(
    "--channels",
    type=click.Choice(("1", "3")),
    help="Of the images that the files take; 3: grey given thrice.  [the model's]",
)
@click.option("--opset", type=int, help="Of ONNX, 18 to 23.  [18]")
@click.option("--batch-size", type=click.IntRange(1), help="A fixed number of images.  [any]")
@click.option("--pure-aten", is_flag=True, help="pt2, aoti: no file with spcxr's operators.")
@click.option("--encoder-only", is_flag=True, help="Leave the head out.")
@click.option("--images", multiple=True, help="A radiograph to check on; may be given often.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def export(model: str, kind: str, out: str, **flags: object) -> None:
    """Write a model as other programs load it: MODEL is a run, or its model/ folder.

    Every file is read back and must answer as the model does, or none is written.
    """

    def work() -> None:
        from spcxr.infer.export import Wanted
        from spcxr.infer.export import export as write
        from spcxr.train.interrupt import sigterm_as_ctrl_c

        channels, images = flags["channels"], flags["images"]
        opset, batch = flags["opset"], flags["batch_size"]
        wanted = Wanted(
            format=kind,
            channels=None if channels is None else int(str(channels)),
            opset=opset if isinstance(opset, int) else None,
            batch=batch if isinstance(batch, int) else None,
            pure_aten=bool(flags["pure_aten"]),
            encoder_only=bool(flags["encoder_only"]),
            images=images if isinstance(images, tuple) else (),
        )
        with sigterm_as_ctrl_c():
            checks = write(model, out, wanted)
        for check in checks:
            click.echo(check)
        click.echo(f"done: {out}")

    with_exit_code(work, bool(flags["debug"]))
