"""What test sets hold: people, labels, views, sites, sizes, as one table with a column a set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.evaluate.report import Cell, Section, Table
from spcxr.recipes.testset import TestSet

Array = NDArray[Any]

MOST_SHOWN = 4  # values of a column; the rest are counted together
UNKNOWN = "unknown"
NOT_KNOWN = "–"


def summary_section(sets: Sequence[TestSet], names: Sequence[str] = ()) -> Section:
    """Facts down, sets across, so that a page of one or two sets reads on a phone.

    Parameters
    ----------
    sets
        the sets that were measured.
    names
        labels to count (the model's); a set without such a column has ``–``. Segmentation: none.

    Returns
    -------
    Of each set: images, patients, age (median, range), sex, view, site, pixel sizes of the files,
    masks, and of each label how many images have it, have it not, and are unknown or uncertain.
    """
    columns = [dict(_facts(test_set, names)) for test_set in sets]
    rows: list[list[Cell]] = [[key, *(c[key] for c in columns)] for key in columns[0]]
    tables = [Table("Test sets", ["", *(s.name for s in sets)], rows)]
    if names:
        counts = [dict(_label_counts(test_set, names)) for test_set in sets]
        found: list[list[Cell]] = [[name, *(c[name] for c in counts)] for name in names]
        note = "Images with the label / without it / unknown or uncertain."
        tables.append(Table("Labels", ["label", *(s.name for s in sets)], found, note))
    return Section("Data", tables=tables)


def _facts(test_set: TestSet, names: Sequence[str]) -> Iterable[tuple[str, Cell]]:
    yield "images", len(test_set.rows)
    yield "patients", len(np.unique(test_set.patients))
    yield "age in years", _ages(test_set.column("age"))
    for name in ("sex", "view", "site"):
        yield name, shares(test_set.column(name).tolist())
    yield "size in pixels", _sizes(test_set)
    if not names:
        yield "with a mask", int(test_set.store.manifest.masked[test_set.rows].sum())


def _ages(cells: Array) -> str:
    """Median and range, and how many are unknown.

    >>> _ages(np.array([40.0, None, 60.0, 52.5], dtype=object))
    '52 (40–60), 1 unknown'
    """
    known = np.array([cell for cell in cells if cell is not None], np.float64)
    if not len(known):
        return UNKNOWN
    said = f"{np.median(known):.0f} ({known.min():.0f}–{known.max():.0f})"
    absent = len(cells) - len(known)
    return said + (f", {absent} unknown" if absent else "")


def shares(cells: Sequence[str]) -> str:
    """How often each value occurs, the commonest first; blank is unknown.

    >>> shares(["F", "M", "F", ""]), shares(["", ""])
    ('F 2, M 1, unknown 1', 'unknown')
    """
    counts = Counter(str(cell) for cell in cells if cell)
    if not counts:
        return UNKNOWN
    common = counts.most_common()
    said = [f"{value} {count}" for value, count in common[:MOST_SHOWN]]
    if rest := common[MOST_SHOWN:]:
        said.append(f"{len(rest)} others {sum(count for _, count in rest)}")
    if absent := len(cells) - counts.total():
        said.append(f"{UNKNOWN} {absent}")
    return ", ".join(said)


def _sizes(test_set: TestSet) -> str:
    """Width x height of the files as they were read, and what the store made of them."""
    side = test_set.store.preprocess.size_px
    stored = f"stored {side} x {side}"
    if not {"image_width_px", "image_height_px"} <= set(
        test_set.store.manifest.columns.column_names
    ):
        return stored
    wide, high = (test_set.column(f"image_{name}_px") for name in ("width", "height"))
    known = [(w, h) for w, h in zip(wide, high, strict=True) if w is not None and h is not None]
    if not known:
        return stored
    low, top = min(known, key=np.prod), max(known, key=np.prod)
    span = f"{low[0]} x {low[1]}"
    return (span if low == top else f"{span} to {top[0]} x {top[1]}") + f", {stored}"


def _label_counts(test_set: TestSet, names: Sequence[str]) -> Iterable[tuple[str, Cell]]:
    manifest = test_set.store.manifest
    for name in names:
        if name not in manifest.labels:
            yield name, NOT_KNOWN
            continue
        values = manifest.label_matrix([name])[test_set.rows, 0]
        yes, no = int((values == 1).sum()), int((values == 0).sum())
        yield name, f"{yes} / {no} / {len(values) - yes - no}"
