"""One frozen dataclass per recipe: its flags, its ``--config`` file, its saved ``config.yaml``.

Defaults < preset < file < flags. Unknown keys are refused; every refusal names the remedy.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
import math
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union

import yaml

from spcxr.errors import SpcxrError

C = TypeVar("C", bound="Config")


class ConfigError(SpcxrError):
    """A setting that cannot be: the message names it and the remedy."""


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """One field of a `Config`: default (none = required), help line, and the values it may take."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Base of every recipe's settings: checks choices, ranges and types once, when made.

    >>> @dataclass(frozen=True)
    ... class Cook(Config):
    ...     egg_count: int = setting(2, "eggs", low=1)
    ...     style: str = setting("fried", "how", choices=("fried", "boiled"))
    >>> Cook(style="poached")
    Traceback (most recent call last):
    spcxr.config.ConfigError: style is 'poached'; choose one of: fried, boiled
    >>> resolve(Cook, file=None, flags={"egg_count": 3})
    Cook(egg_count=3, style='fried')
    """

    # Settings by the name that the field `recipe` may take: below those of file and flags.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _refuse_empty(f, getattr(self, f.name))
            _check(f, getattr(self, f.name))


def _refuse_empty(f: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a blank text where one is needed, or where None would have stood for none.

    A blank path would be the current folder: what ``--out "$UNSET"`` in a script would fill.
    """
    values = value if isinstance(value, tuple) else (value,)
    blank = any(isinstance(v, str) and not v.strip() for v in values)
    if blank and (f.default is MISSING or f.default is None):
        remedy = "leave it out" if f.default is None else "give one, or check the script's variable"
        name = f.name if isinstance(value, tuple) else f"--{f.name.replace('_', '-')}"
        raise ConfigError(f"{name} is empty; {remedy}")


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value outside the field's choices or range."""
    if value is None:
        return
    values = value if isinstance(value, tuple) else (value,)
    choices, low, high = (f.metadata.get(k) for k in ("choices", "low", "high"))
    for v in values:
        if choices and v not in choices:
            raise ConfigError(f"{f.name} is {v!r}; choose one of: {', '.join(choices)}")
        if isinstance(v, float) and not math.isfinite(v):
            raise ConfigError(f"{f.name} is {v}; give a finite number")
        if (low is not None and v < low) or (high is not None and v > high):
            raise ConfigError(f"{f.name} is {v}; it must {_span(low, high)}")


def _span(low: float | None, high: float | None) -> str:
    """A range in words.

    >>> _span(100, None), _span(None, 1), _span(0, 1)
    ('be at least 100', 'be at most 1', 'lie in [0, 1]')
    """
    if high is None:
        return f"be at least {low}"
    return f"be at most {high}" if low is None else f"lie in [{low}, {high}]"


def hints(cls: type[Config]) -> dict[str, Any]:
    """Field name -> resolved type, for every field of a `Config` class."""
    found = typing.get_type_hints(cls)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def convert(name: str, hint: Any, value: Any) -> Any:
    """Make ``value`` (from a YAML file or a flag) an instance of the field's type, or refuse it.

    >>> convert("crop_scale", tuple[float, float], "0.5,1")
    (0.5, 1.0)
    >>> convert("epochs", int, 2.5)
    Traceback (most recent call last):
    spcxr.config.ConfigError: epochs is 2.5; expected int
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return convert(name, hint, value)
    if origin is tuple:
        return _convert_tuple(name, arguments, value)
    if isinstance(value, bool) != (hint is bool) and hint is not str:
        raise ConfigError(f"{name} is {value!r}; expected {hint.__name__}")
    try:
        made = hint(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {value!r}; expected {hint.__name__}") from error
    if hint is int and isinstance(value, float) and made != value:
        raise ConfigError(f"{name} is {value!r}; expected int")
    return made


def _convert_tuple(name: str, arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """``"a,b"``, a list or a single value -> a tuple of the declared element type and length."""
    if isinstance(value, str):
        # As in a CSV: "square, bright",empty is two.
        cells = next(csv.reader([value], skipinitialspace=True), [])
        parts: list[Any] = [p.strip() for p in cells if p.strip()]
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
    if arguments[-1] is not Ellipsis and len(parts) != len(arguments):
        raise ConfigError(f"{name} is {value!r}; expected {len(arguments)} values, as in a,b")
    return tuple(convert(name, arguments[0], p) for p in parts)


def as_flag(values: Iterable[str]) -> str:
    """Several values as one flag takes them, in a shell.

    >>> print(as_flag(["a", "b"]), as_flag(["square, bright", "b"]))
    a,b '"square, bright",b'
    """
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return shlex.quote(line.getvalue())


class _EachOnce(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _each_once([(key.value, None) for key, _ in node.value if isinstance(key.value, str)])
        return super().construct_mapping(node, deep)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of these; a key that stands twice is refused."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"key {key!r} stands twice: keep one")
        made[key] = value
    return made


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON settings file."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); check the --config path") from error
    try:
        if path.suffix == ".json":
            loaded = json.loads(text, object_pairs_hook=_each_once)
        else:
            loaded = yaml.load(text, _EachOnce)
    except (yaml.YAMLError, ValueError) as error:
        line = str(error).replace("\n", " ")
        raise ConfigError(f"{path}: not valid YAML/JSON ({line}); correct the file") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected 'name: value' lines, found {type(loaded).__name__}")
    return loaded


def resolve(cls: type[C], file: str | Path | None, flags: dict[str, Any]) -> C:
    """Defaults < preset < file < flags -> one frozen configuration; flags of None were not given.

    The preset is the one of ``cls.presets`` that file or flags name as ``recipe``.
    """
    wanted = hints(cls)
    given = dict(read_file(file)) if file else {}
    for key in given:
        if key not in wanted:
            close = difflib.get_close_matches(str(key), wanted, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(wanted)}"
            raise ConfigError(f"{file}: unknown key {key!r}; {remedy}")
    given.update({k: v for k, v in flags.items() if v is not None})
    given = {**cls.presets.get(str(given.get("recipe")), {}), **given}
    required = {f.name for f in dataclasses.fields(cls) if f.default is MISSING}
    for name in sorted(required - given.keys()):
        raise ConfigError(
            f"--{name.replace('_', '-')} is missing; give it as a flag or in --config"
        )
    return cls(**{name: convert(name, wanted[name], v) for name, v in given.items()})


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values (tuples become lists), ready for YAML and valid as ``--config`` again."""
    made = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in made.items()}
