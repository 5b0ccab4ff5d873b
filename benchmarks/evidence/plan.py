"""What is to be run: a file of ``rows/`` is one row of the study, and a list of commands.

A row's ``levels`` (how many labels) times its ``arms`` (where the encoder comes from) are its jobs,
each one ``spcxr-train`` command over several seeds. All arms of a level have the same settings
but for what the arm itself names, so budgets are equal unless an arm's name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spcxr.errors import SpcxrError

FOLDER = Path(__file__).parent
SCRATCH, PRETRAINED = "scratch", "pretrained"
SMALL = "small"
RANDOM = "random-encoder"  # an init like the pretrained ones, with weights as they were drawn
# Of the choice of a rate: never a seed that is reported.
TRIAL_SEED = 1000
# Of an arm, the driver's own; all else goes to the command.
OWN = ("times_epochs", "levels")
DRAWN = ("label_fraction", "labels_per_class")  # whose rows depend on the seed

Settings = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One command: the row, level and arm it is of, its settings, and where it writes."""

    row: str
    level: str
    arm: str
    command: str
    settings: Settings
    folder: Path

    @property
    def seeds(self) -> list[Path]:
        """The folders of its seeds, each with ``predictions.csv``."""
        if self.settings.get("seeds", 1) == 1:
            return [self.folder]
        first = self.settings.get("seed", 0)
        return [self.folder / f"seed-{first + k}" for k in range(self.settings["seeds"])]


@dataclass(frozen=True)
class Row:
    """One file of ``rows/``.

    ``command`` is run on ``store`` with ``settings``, to which each of ``levels`` and of ``arms``
    adds its own; ``levels`` of an arm are the ones it is run on, if not all. ``differences`` are
    pairs of arms, ``metrics`` what is measured, the first of them what ``rates`` (a level, and base
    rates to try) are chosen by. ``baseline``: a linear model on thumbnails as well. ``elsewhere``:
    other stores to measure on; ``corruptions``: of the test images. ``split``: whose rows are
    measured, ``val`` where the row is to decide something. ``doubtful``: rows (a column and its
    text) that are left out of further lines, and on which levels. ``small`` are the fields that are
    others in the small study.
    """

    name: str
    title: str
    command: str
    store: str
    arms: dict[str, Settings]
    order: int = 0
    settings: Settings = field(default_factory=dict)
    levels: dict[str, Settings] = field(default_factory=lambda: {"all": {}})
    differences: list[list[str]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    rates: Settings = field(default_factory=dict)
    baseline: bool = False
    elsewhere: list[str] = field(default_factory=list)
    corruptions: list[str] = field(default_factory=list)
    split: str = "test"
    doubtful: Settings = field(default_factory=dict)
    small: Settings = field(default_factory=dict)


def read_row(path: Path, *, small: bool = False) -> Row:
    """Read a row; with ``small`` its block ``small`` replaces fields.

    Raises
    ------
    SpcxrError
        a field that no row has, or none where one must be.
    """
    given = yaml.safe_load(path.read_text()) or {}
    if small:
        given |= given.get(SMALL, {})
    given = {"name": path.stem} | given
    unknown = sorted(set(given) - set(Row.__dataclass_fields__))
    if unknown:
        raise SpcxrError(f"{path}: no row has {unknown[0]!r}; see plan.Row for its fields")
    try:
        row = Row(**given)
    except TypeError as error:
        raise SpcxrError(f"{path}: {error}; add the field") from error
    for pair in row.differences:
        if strange := [arm for arm in pair if arm not in row.arms]:
            raise SpcxrError(f"{path}: differences name {strange[0]!r}, which is no arm; mend it")
    return row


def read_rows(folder: Path, *, small: bool = False) -> list[Row]:
    """All rows by their order; with ``small`` those that have a block ``small``."""
    rows = [read_row(path, small=small) for path in sorted(folder.glob("*.yaml"))]
    return sorted((row for row in rows if row.small or not small), key=lambda row: row.order)


def jobs(row: Row, out: Path, rates: Mapping[str, float] | None = None) -> Iterator[Job]:
    """The row's commands, level by level.

    ``rates`` are the arms' base rates, where they were chosen by `trials`.
    """
    for level, of_level in row.levels.items():
        for arm, of_arm in row.arms.items():
            if level not in of_arm.get("levels", row.levels):
                continue
            settings = _settings(row, of_level, of_arm, out)
            if arm in (rates or {}):
                settings["base_lr"] = rates[arm]  # type: ignore[index]
            folder = out / row.name / level / _slug(arm)
            yield Job(row.name, level, arm, row.command, settings | {"out": str(folder)}, folder)


def trials(row: Row, out: Path) -> Iterator[tuple[float, Job]]:
    """(rate, job) of the rates that each trained arm is tried with, on one level and one seed that
    is not reported. Each arm has as many tries."""
    if not row.rates:
        return
    level = row.rates["level"]
    for arm, of_arm in row.arms.items():
        if of_arm.get("method", "full") != "full":
            continue
        for rate in row.rates["base_lr"]:
            settings = _settings(row, row.levels[level], of_arm, out)
            folder = out / row.name / "rates" / _slug(arm) / f"{rate:g}"
            settings |= {"seeds": 1, "seed": TRIAL_SEED, "base_lr": rate, "out": str(folder)}
            yield rate, Job(row.name, level, arm, row.command, settings, folder)


def _settings(row: Row, of_level: Settings, of_arm: Settings, out: Path) -> Settings:
    merged = row.settings | of_level | of_arm
    settings = {name: value for name, value in merged.items() if name not in OWN}
    settings["data"] = str(out / "stores" / row.store)
    if "epochs" in settings:
        settings["epochs"] = int(settings["epochs"] * of_arm.get("times_epochs", 1))
    for name in ("init", "lungs_from"):
        if settings.get(name, SCRATCH) != SCRATCH:
            settings[name] = str(out / settings[name])
    if settings.get("method", "full") != "full":
        # What frozen features do not read; on all labels nothing is drawn, and seeds are one.
        if not set(DRAWN) & set(settings):
            settings.pop("seeds", None)
        for name in ("layer_decay", "base_lr"):
            settings.pop(name, None)
    return settings


def _slug(arm: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in arm.lower())
