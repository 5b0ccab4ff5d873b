"""The two commands: ``spcxr-train`` (prepare, train, evaluate) and ``spcxr`` (use)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from spcxr import __version__
from spcxr.cli.options import one_line_when_stopped, recipe_options, with_exit_code
from spcxr.cli.use_embed import embed
from spcxr.cli.use_explain import explain
from spcxr.cli.use_export import export
from spcxr.cli.use_predict import predict
from spcxr.cli.use_segment import segment


@dataclass(frozen=True)
class Command:
    """Where a command lives: a recipe module with ``run(config)``, its settings, positionals."""

    module: str
    config: str
    help: str
    arguments: tuple[str, ...] = ()


TRAIN = {
    "demo": Command(
        "demo", "DemoConfig", "The whole story on drawn phantoms, on a CPU, in minutes."
    ),
    "prepare": Command(
        "prepare", "PrepareConfig", "DICOM / PNG / JPEG / TIFF -> a packed store.", ("sources",)
    ),
    "pretrain": Command("pretrain", "PretrainConfig", "Self-supervised pretraining on a store."),
    "classify": Command("classify", "ClassifyConfig", "Fine-tune for labels (or from scratch)."),
    "segment": Command("segment", "SegmentConfig", "Fine-tune for lung masks (or from scratch)."),
    "evaluate": Command(
        "evaluate", "EvaluateConfig", "Metrics with intervals, and a report.", ("run",)
    ),
}


class Group(click.Group):
    """A click group whose commands end in one line on Ctrl-C, from their first import on."""

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_when_stopped():
            return super().invoke(ctx)


class LazyGroup(Group):
    """A click group that imports a recipe only when its command is asked for."""

    def __init__(self, table: dict[str, Command], **settings: Any) -> None:
        super().__init__(**settings)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return (
            build(name, self.table[name]) if name in self.table else super().get_command(ctx, name)
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, entry.help) for name, entry in self.table.items()]
        rows += [(name, self.commands[name].get_short_help_str()) for name in self.commands]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def build(name: str, entry: Command) -> click.Command:
    """Import one recipe and make its click command."""
    recipe = importlib.import_module(f"spcxr.recipes.{entry.module}")
    run: Callable[[Any], Any] = recipe.run

    def command(config: Any) -> None:
        click.echo(f"done: {run(config)}")

    flagged = recipe_options(getattr(recipe, entry.config), entry.arguments)(command)
    return click.command(name, help=entry.help)(flagged)


@click.group(cls=LazyGroup, table=TRAIN)
@click.version_option(__version__, prog_name="spcxr-train")
def train() -> None:
    """Pretrain, fine-tune and evaluate vision transformers on chest X-rays."""


@click.group(cls=Group)
@click.version_option(__version__, prog_name="spcxr")
def use() -> None:
    """Use what was trained: labels, masks and features of radiographs."""


for command in (predict, segment, embed, explain, export):
    use.add_command(command)


@use.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def info(model: str | None, as_json: bool, debug: bool) -> None:
    """What a MODEL is and answers; without one, what this machine offers.

    Versions, devices, and each kernel backend with the reason why it is or is not used.
    """

    def work() -> None:
        from spcxr.infer.info import gather, render
        from spcxr.infer.model_info import describe

        facts = gather() if model is None else describe(model)
        click.echo(render(facts, as_json=as_json))

    with_exit_code(work, debug)
