"""A recipe's frozen dataclass -> click flags, and one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any

import click

from spcxr import config as configs
from spcxr.errors import Interrupted, SpcxrError


def recipe_options(
    cls: type[configs.Config], arguments: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Decorate a command with ``--config``, ``--debug`` and a flag for each field of ``cls``.

    Fields named in ``arguments`` become positional (a ``tuple[str, ...]`` takes one or more).
    The command receives one resolved configuration.
    """

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(config: str | None, debug: bool, **flags: Any) -> None:
            given = {k: None if v == () else v for k, v in flags.items()}
            with_exit_code(lambda: command(configs.resolve(cls, config, given)), debug)

        wrapped: Callable[..., None] = run
        for f in reversed(dataclasses.fields(cls)):
            positional = f.name in arguments
            wrapped = (_argument if positional else _option)(f, configs.hints(cls)[f.name])(wrapped)
        wrapped = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(
            wrapped
        )
        return click.option(
            "--config",
            type=click.Path(),
            help="YAML or JSON file of these settings; flags win over it.",
        )(wrapped)

    return decorate


def _argument(f: dataclasses.Field[Any], hint: Any) -> Callable[..., Any]:
    many = typing.get_origin(hint) is tuple
    return click.argument(f.name, nargs=-1 if many else 1, required=False, metavar=f.name.upper())


def _option(f: dataclasses.Field[Any], hint: Any) -> Callable[..., Any]:
    flag, help_line = "--" + f.name.replace("_", "-"), str(f.metadata.get("help", ""))
    default = "required" if f.default is dataclasses.MISSING else _shown(f.default)
    help_line = f"{help_line}  [{default}]" if default else help_line
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", f.name, default=None, help=help_line)
    choices = f.metadata.get("choices")
    is_tuple = typing.get_origin(hint) is tuple
    kind = click.Choice(choices) if choices and not is_tuple else None
    return click.option(flag, f.name, type=kind, default=None, help=help_line)


def _shown(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else ""
        if value is None
        else str(value)
    )


@contextlib.contextmanager
def one_line_when_stopped(debug: bool = False) -> Iterator[None]:
    """Ctrl-C becomes one line on stderr and exit code 130; click would say ``Aborted!``, and 1."""
    try:
        yield
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exc()
        said = "stopped; the same command goes on from what is saved, or starts again"
        click.echo(f"error: {said}", err=True)
        raise SystemExit(Interrupted.exit_code) from error


def with_exit_code(work: Callable[[], None], debug: bool) -> None:
    """Run ``work``; an `SpcxrError`, or Ctrl-C, becomes one line on stderr and its exit code."""
    try:
        with one_line_when_stopped(debug):
            work()
    except SpcxrError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        # A place that cannot be used: no permission, read-only, full, not a folder, vanished.
        if debug:
            traceback.print_exc()
        where = error.filename or "a file"
        remedy = "free some space" if error.errno == errno.ENOSPC else "check this path"
        click.echo(f"error: {where}: {error.strerror or error}; {remedy}", err=True)
        raise SystemExit(2) from error
