"""Which columns of a manifest are labels, and what their cells say."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from spcxr.data.tables import Columns
from spcxr.errors import SpcxrError

LABEL_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None}
MOST_CLASSES = 200  # more distinct values than this in `label` is free text, not classes
ALMOST = 0.9  # the share of a column's cells that are a label's, from which the rest are errors


def parse_labels(
    text: Columns, reserved: Collection[str], wanted: tuple[str, ...], name: str
) -> dict[str, list[int | None]]:
    """Label columns by name: those wanted, or those that can be nothing else."""
    classes = _classes(text["label"]) if "label" in text else {}
    if wanted:
        chosen = [c for w in wanted for c in (classes if w == "label" and classes else [w])]
    else:
        plain = [c for c in text if c not in {*reserved, "label"} and _all_labels(text[c])]
        if "label" in text and not classes and _all_labels(text["label"]):
            plain.append("label")
        chosen = [*plain, *classes]
    if len(classes) > MOST_CLASSES and not classes.keys().isdisjoint(chosen):
        raise SpcxrError(
            f"{name}: column 'label' holds {len(classes)} different values; "
            "name other label columns with --labels, or rename it"
        )
    made: dict[str, list[int | None]] = {}
    for column in chosen:
        if column in text and column in classes and not wanted:
            raise SpcxrError(
                f"{name}: {column!r} is both a column and a value of 'label'; "
                "name the label columns with --labels, or rename one"
            )
        if column in text and column not in reserved:
            made[column] = _label_cells(text[column], column, name)
        elif column in classes:
            made[column] = classes[column]
        else:
            found = ", ".join([*(c for c in text if c not in reserved), *classes]) or "none"
            raise SpcxrError(f"{name}: no label column {column!r}; columns that could be: {found}")
    if made.keys() & classes.keys():
        _refuse_twins(text["label"], classes, name)
    return made


def _twins(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in upper and lower case only, together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _refuse_twins(cells: list[str], classes: Iterable[str], name: str) -> None:
    """One class spelt two ways would be two, each wrong in the other's rows."""
    for group in _twins(classes):
        row = {v: next(n for n, c in enumerate(cells, 2) if v in _parts(c)) for v in group}
        said = " and ".join(f"{value!r} (row {row[value]})" for value in group)
        raise SpcxrError(
            f"{name}: values of 'label' that differ in case only: {said}; spell them alike"
        )


def twin_labels(labels: Iterable[str], name: str) -> tuple[str, ...]:
    """A note for each group of labels whose names differ in upper and lower case only.

    >>> twin_labels(["Pneumonia", "covid", "pneumonia"], "m.csv")
    ("m.csv: labels 'Pneumonia' and 'pneumonia' differ in case only and are learned as two; ...",)
    """
    return tuple(
        f"{name}: labels {' and '.join(map(repr, group))} differ in case only and are learned as "
        f"{'two' if len(group) == 2 else len(group)}; choose with --labels, or rename one"
        for group in _twins(labels)
    )


def _all_labels(cells: list[str]) -> bool:
    """Whether the cells are labels and not all blank."""
    return any(cells) and set(cells) <= LABEL_VALUES.keys()


def _classes(cells: list[str]) -> dict[str, list[int | None]]:
    """One column per distinct value of a text column; a blank cell is unknown in all of them."""
    if set(cells) <= LABEL_VALUES.keys():
        return {}
    parts = [_parts(cell) for cell in cells]
    values = sorted({value for row in parts for value in row})
    if len(values) > MOST_CLASSES:
        return {value: [] for value in values}  # refused by the caller before anyone reads them
    return {v: [int(v in row) if row else None for row in parts] for v in values}


def _parts(cell: str) -> list[str]:
    """The classes that one cell names: ``a|b`` = both."""
    return [part.strip() for part in cell.split("|") if part.strip()]


def _label_cells(cells: list[str], column: str, name: str) -> list[int | None]:
    for number, cell in enumerate(cells, start=2):
        if cell not in LABEL_VALUES:
            raise SpcxrError(
                f"{name}: row {number}, column {column!r} holds {cell!r}; "
                "a label is 1, 0, -1 (uncertain) or blank (unknown)"
            )
    return [LABEL_VALUES[cell] for cell in cells]


def almost_labels(text: Columns, left_out: Collection[str], name: str) -> tuple[str, ...]:
    """A note for each column outside ``left_out`` that some odd cells kept from being a label.

    >>> almost_labels({"covid": ["1", "0"] * 9 + ["", "yes"]}, (), "m.csv")
    ("m.csv: column 'covid' is not taken as a label: row 21 holds 'yes' (18 of 19 cells are ...",)
    """
    notes = []
    for column, cells in text.items():
        filled = [cell for cell in cells if cell]
        fit = sum(cell in LABEL_VALUES for cell in filled)
        if column in left_out or fit == len(filled) or fit < ALMOST * len(filled):
            continue
        row, odd = next((n, c) for n, c in enumerate(cells, start=2) if c not in LABEL_VALUES)
        notes.append(
            f"{name}: column {column!r} is not taken as a label: row {row} holds {odd[:20]!r} "
            f"({fit} of {len(filled)} cells are 1, 0 or -1); mend its cells if it is one"
        )
    return tuple(notes)
