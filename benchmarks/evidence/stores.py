"""The images of the study: manifests cut from the data folder's own, checked, and prepared.

A training row of whom a held row shows a copy is left out; a patient on both sides is refused.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.duplicates import Pair, drop_copied, near_duplicates
from spcxr.errors import SpcxrError

HELD = ("val", "test", "drift")
NEEDED = ("path", "patient_id", "split")
CHECKS = "checks.json"
Rows = list[Mapping[str, str]]


def read_manifest(data: Path, name: str) -> Rows:
    """The rows of ``DATA/NAME_manifest.csv``.

    Raises
    ------
    SpcxrError
        no such file, or a column that is needed is not there.
    """
    path = data / f"{name}_manifest.csv"
    if not path.is_file():
        raise SpcxrError(f"{path}: no such file; give the folder that holds the manifests")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lacking = [column for column in NEEDED if rows and column not in rows[0]]
    if lacking or not rows:
        raise SpcxrError(f"{path}: no {'column ' + lacking[0] if lacking else 'rows'}; add it")
    return rows


def choose(rows: Rows, spec: Mapping[str, Any]) -> Rows:
    """Those whose columns hold one of the texts of ``spec["keep"]``; ``spec["set"]`` are columns
    that get one value in all of them, ``spec["columns"]`` those that are kept; ``spec["at_most"]``
    limits splits, by a fixed draw: an epoch is chosen by few images where few are labelled. Of a
    ``spec["least_age"]`` a row without an age is left out.

    >>> rows = [{"source": "x/one", "label": "a"}, {"source": "two", "label": "b"}]
    >>> choose(rows, {"keep": {"source": ["one"]}, "set": {"split": "test"}})
    [{'source': 'x/one', 'label': 'a', 'split': 'test'}]
    """
    keep = spec.get("keep", {})
    chosen = [
        row
        for row in rows
        if all(any(text in row[column] for text in texts) for column, texts in keep.items())
        and ("least_age" not in spec or float(row["age"] or -1) >= spec["least_age"])
    ]
    for split, most in spec.get("at_most", {}).items():
        others = [row for row in chosen if row["split"] != split]
        drawn = sorted((r for r in chosen if r["split"] == split), key=lambda r: _draw(r["path"]))
        chosen = others + drawn[:most]
    columns = spec.get("columns")
    return [
        {name: cell for name, cell in row.items() if columns is None or name in columns}
        | spec.get("set", {})
        for row in chosen
    ]


def _draw(path: str) -> bytes:
    return hashlib.blake2b(path.encode()).digest()


def refuse_shared_patients(name: str, train: Rows, held: Rows) -> None:
    """Refuse a patient who is in training and in a held split, here or in another manifest.

    >>> one = [{"patient_id": "7", "path": "a"}]
    >>> refuse_shared_patients("ped", one, one)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: ped: patient 7 is in training and in a held split; mend the manifest
    """
    known = {row["patient_id"] for row in held if row["patient_id"]}
    for row in train:
        if row["patient_id"] in known:
            raise SpcxrError(
                f"{name}: patient {row['patient_id']} is in training and in a held split; "
                "mend the manifest"
            )


def make_stores(
    data: Path,
    out: Path,
    specs: Mapping[str, Mapping[str, Any]],
    prepare: Callable[[Path, Path], None],
) -> dict[str, Any]:
    """Write manifests, prepare the stores that are not there, and return what the checks found.

    The facts stand in ``OUT/stores/checks.json`` as well.

    Raises
    ------
    SpcxrError
        a manifest that cannot be used; or OUT was made from others, or by other ``specs``.
    """
    file = out / "stores" / CHECKS
    origin = digest(data, specs)
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("made_of", origin) != origin:
        raise SpcxrError(f"{out}: made from other manifests or stores.yaml; take a new folder")
    if not known:
        known = {"made_of": origin} | write_manifests(data, out / "manifests", specs)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1))
    for name in specs:
        if not (out / "stores" / name / "store.json").is_file():
            prepare(out / "manifests" / f"{name}.csv", out / "stores" / name)
    return dict(known)


def digest(data: Path, specs: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the manifests that ``specs`` name and of ``specs``: the same for the same rows."""
    names = {spec["manifest"] for spec in specs.values()}
    rows = {name: read_manifest(data, name) for name in names}
    said = json.dumps([dict(specs), rows], sort_keys=True).encode()
    return hashlib.blake2b(said, digest_size=16).hexdigest()


def write_manifests(
    data: Path, folder: Path, specs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Cut, check and write the manifests; return the near-duplicates and the counts of rows."""
    given = {name: _chosen(data, name, spec) for name, spec in specs.items()}
    every = [row for rows in given.values() for row in rows]
    held = [row for row in every if row["split"].startswith(HELD)]
    train = [row for row in every if not row["split"].startswith(HELD)]
    pairs = near_duplicates(data, paths(held), paths(train))
    counts = {}
    for name, rows in given.items():
        own_held = [row for row in rows if row["split"].startswith(HELD)]
        own, left_out = drop_copied([row for row in rows if row not in own_held], pairs)
        refuse_shared_patients(name, own, held)
        _write(folder / f"{name}.csv", [*own, *own_held])
        counts[name] = {"left_out": len(left_out)} | _counted([*own, *own_held])
    return {"near_duplicates": [Pair(*pair)._asdict() for pair in pairs], "stores": counts}


def _chosen(data: Path, name: str, spec: Mapping[str, Any]) -> Rows:
    manifest = read_manifest(data, spec["manifest"])
    asked = [*spec.get("keep", {}), *spec.get("columns", [])]
    asked += ["age"] if "least_age" in spec else []
    if lacking := [column for column in asked if column not in manifest[0]]:
        raise SpcxrError(
            f"{data / spec['manifest']}_manifest.csv: no column {lacking[0]}, which stores.yaml "
            f"asks for in {name}; add it, or change stores.yaml"
        )
    if not (rows := choose(manifest, spec)):
        raise SpcxrError(f"{name}: stores.yaml keeps no row of {spec['manifest']}; change it")
    return rows


def paths(rows: Rows) -> list[str]:
    """Their paths, each once."""
    return list(dict.fromkeys(row["path"] for row in rows))


def _counted(rows: Rows) -> dict[str, str]:
    made = {}
    for split in sorted({row["split"] for row in rows}):
        chosen = [row for row in rows if row["split"] == split]
        who = {row["patient_id"] or row["path"] for row in chosen}
        made[split] = f"{len(chosen)} images, {len(who)} patients"
    return made


def _write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
