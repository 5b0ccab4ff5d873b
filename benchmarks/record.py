"""What a run leaves behind: its circumstances, a row a measurement, a verdict a target.

A result is ``results/<device>/<bench>.json``. Shared machines move by a factor of two, so minimum
and median stand side by side: the minimum says what the code can do, the median what it did.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spcxr.ops.dispatch import cpu_features

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CORES = len(os.sched_getaffinity(0))

Row = dict[str, Any]


class Target(NamedTuple):
    """``metric`` of a row, or its ratio to that of contender ``of``, and its limit."""

    metric: str
    at_least: float | None
    at_most: float | None
    of: str | None


def device_name(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's with its widest instructions (one model name stands for
    machines with and without AVX-512) and the number of cores this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(
        r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M
    )
    model = named.group(1) if named else platform.processor() or platform.machine()
    widest = "AMX" if "amx_" in cpu_features() else torch.backends.cpu.get_cpu_capability()
    return f"{model} {widest}, {CORES} cores"


def slug(device: str) -> str:
    """The name of the device's folder under ``results/``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def commit() -> str:
    """The checkout's commit, with ``+`` when tracked files (but results) differ from it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown: not a git checkout, or no git"

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git(
            *("status", "--porcelain", "--untracked-files=no", "--", "."),
            ":!benchmarks/results",
        )
    except subprocess.CalledProcessError as error:  # such as a checkout of another user
        return f"unknown: {error.stderr.splitlines()[0]}"
    return head + ("+" if changed else "")


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """What a reader must know to repeat or to doubt a number."""
    triton = importlib.util.find_spec("triton") is not None
    made = {
        "device": device_name(device),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if triton else None,
        "cores": CORES,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_5_min": round(os.getloadavg()[1], 2),
    }
    if device == "cuda":
        made |= {"cuda": torch.version.cuda, "driver": _driver()}
        made["sm_count"] = torch.cuda.get_device_properties(0).multi_processor_count
    return made


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False)
    return said.stdout.strip().splitlines()[0] if said.stdout.strip() else "unknown: it said none"


def cost(row: Row, which: str = "median") -> float:
    """Microseconds an image: what contenders are compared by."""
    return row[f"{which}_us_an_image"]


def peers(row: Row, rows: list[Row]) -> list[Row]:
    """The rows measured as this one was: same group, device and threads."""
    keys = ("group", "device", "threads")
    return [other for other in rows if all(other[k] == row[k] for k in keys)]


def verdict(row: Row, target: Target, rows: list[Row]) -> Row:
    """Judge one target: ``held``, ``MISSED``, or ``NOT MEASURED`` without the row it names."""

    def measure(found: Row) -> float:
        return 1 / cost(found) if target.metric == "speed" else found[target.metric]

    name = f"{row['group']}: {row['what']}: {target.metric}"
    sense = "at_most" if target.at_least is None else "at_least"
    limit = getattr(target, sense)
    made = {"target": name + (f" / {target.of}" if target.of else ""), sense: limit}
    value = measure(row)
    if target.of is not None:
        others = [
            other
            for other in peers(row, rows)
            if other["what"] == target.of and (target.metric == "speed" or target.metric in other)
        ]
        if not others:
            return {**made, "value": None, "verdict": "NOT MEASURED"}
        value /= measure(others[0])
    held = value <= limit if sense == "at_most" else value >= limit
    return {**made, "value": value, "verdict": "held" if held else "MISSED"}


def write(folder: Path, name: str, circumstances: Row, rows: list[Row], targets: list[Row]) -> Path:
    """``folder/<name>.json``, figures to five digits."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    kept = {**circumstances, "rows": rows, "targets": targets}
    kept = json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.5g}"))
    file.write_text(json.dumps(kept, indent=1) + "\n")
    return file


COLUMNS = {  # of the table, by field of a row; "x" are multiples of the first row
    "min_us_an_image": "min us/image",
    "median_us_an_image": "median us/image",
    "x_min": "x min",
    "x_median": "x median",
    "host_us": "host us",
    "gb_s": "GB/s",
    "share_of_copy": "of a copy",
    "peak_mib": "peak MiB",
}
UNSHOWN = {"what", "group", "device", "threads", "images", "rounds", "bytes", "rotated_mib"} | {
    f"{kind}_us" for kind in ("min", "median", "q20", "q80")
}


def table(rows: list[Row]) -> list[str]:
    """One group of rows: each contender's cost and its multiple of the first one's."""
    first = rows[0]
    shown = [
        {f"x_{which}": cost(row, which) / cost(first, which) for which in ("min", "median")} | row
        for row in rows
    ]
    columns = [c for c in COLUMNS if any(c in row for row in shown)]
    width = max(len(row["what"]) for row in rows) + 2
    lines = [
        f"{first['group']} ({first['device']}, {first['threads']} thread(s), "
        f"{first['images']} image(s) a call)",
        " " * width + "  ".join(f"{COLUMNS[c]:>15}" for c in columns),
    ]
    for row in shown:
        cells = "  ".join(f"{short(row[c]) if c in row else '':>15}" for c in columns)
        lines.append(f"{row['what']:<{width}}{cells}")
        more = {k: v for k, v in row.items() if k not in COLUMNS and k not in UNSHOWN}
        if more:
            lines.append("    " + "  ".join(f"{k}={short(v)}" for k, v in more.items()))
    return lines


def short(value: Any) -> str:
    """A figure as it is printed: four digits."""
    if isinstance(value, list):
        return f"[{', '.join(short(v) for v in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
