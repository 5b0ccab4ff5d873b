"""The columns of ``segment.csv``, of which each file has a row."""

from __future__ import annotations

from spcxr.infer.measures import LEFT, LUNGS, RIGHT

TABLE, SETTINGS = "segment.csv", "segment.json"


def columns(structures: tuple[str, ...]) -> tuple[str, ...]:
    """Of the table of a model; one of whole lungs has areas of both sides as well.

    >>> [name for name in columns(("heart",)) if name.startswith("area")]
    ['area_px_heart', 'area_mm2_heart']
    """
    areas = [
        f"area_{unit}_{name.replace(' ', '_')}"
        for unit in ("px", "mm2")
        for name in measured(structures)
    ]
    return (
        *("path", "name", "status", "reason", "flags", "notes"),
        *("mask", "overlay", "dicom_seg", "uncertainty_map"),
        *("height_px", "width_px", "spacing_row_mm", "spacing_column_mm", *areas),
        *("cardiothoracic_ratio", "uncertainty", "flip_dice"),
    )


def measured(structures: tuple[str, ...]) -> tuple[str, ...]:
    """Structures, and sides of whole lungs, in lower case.

    >>> measured(("Lung", "Heart"))
    ('lung', 'heart', 'right lung', 'left lung')
    """
    low = tuple(name.lower() for name in structures)
    whole = any(name in LUNGS for name in low)
    return (*low, *(side for side in (RIGHT, LEFT) if whole and side not in low))
