"""``spcxr embed``: its flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from spcxr.cli.options import with_exit_code
from spcxr.cli.use_options import chosen_compute, compute_options, said


class Numbers(click.ParamType):
    """One number, or several with commas."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """``"0.5,0.4"`` -> ``(0.5, 0.4)``.

        >>> Numbers().convert("0.5,0.4", None, None)
        (0.5, 0.4)
        """
        try:
            return tuple(map(float, str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r}: give a number, or one a channel with commas between", param, ctx)


def told_options(command: Callable[..., None]) -> Callable[..., None]:
    """What weights of another library do not say, as `load_encoder` takes it."""
    presets, fits = ("minmax", "voi", "mimic-jpg", "chexpert-jpg", "rad-dino"), "pad crop stretch"
    for decorator in (
        click.option("--heads", type=click.IntRange(1), help="Heads of attention (other library)."),
        click.option("--std", type=Numbers(), help="Their deviation (other library)."),
        click.option(
            "--mean", type=Numbers(), help="Of the training's pixels in [0, 1] (other library)."
        ),
        click.option(
            "--size-px", type=click.IntRange(1), help="Side of the square (other library)."
        ),
        click.option(
            "--fit", type=click.Choice(fits.split()), help="Into the square (other library)."
        ),
        click.option("--preset", type=click.Choice(presets), help="Grey levels (other library)."),
    ):
        command = decorator(command)
    return command


def told(flags: Mapping[str, object]) -> dict[str, Any]:
    """Settings of `load_encoder` by the flags that were given.

    >>> told({"preset": "voi", "fit": None, "size_px": None, "mean": (0.5,), "std": None,
    ...       "heads": None})
    {'mean': (0.5,), 'preprocess': {'preset': 'voi'}}
    """
    known = {name: flags[name] for name in ("mean", "std", "heads") if flags[name] is not None}
    names = ("preset", "fit", "size_px")
    if preprocess := {name: flags[name] for name in names if flags[name] is not None}:
        known["preprocess"] = preprocess
    return known


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
@told_options
def embed(
    model: str, inputs: tuple[str, ...], out: str, tokens: str, with_ids: bool, **flags: object
) -> None:
    """Feature vectors of radiographs: MODEL is a run or a model folder, INPUT files and folders.

    MODEL may also be weights of another library, file or folder (timm, DINO, MAE, Hugging Face).
    They do not say how their images were made: --preset, --fit, --mean and --std do.

    Rows are in the order given. A stopped command goes on; files that are rejected have a row too.
    """

    def work() -> None:
        from spcxr.infer.embed_files import embed_files

        counts = embed_files(
            model,
            inputs,
            out,
            chosen_compute(flags),
            tokens=tokens,
            with_ids=with_ids,
            told=told(flags),
        )
        click.echo(said(out, counts, "embedded"))

    with_exit_code(work, bool(flags["debug"]))
