"""What every benchmark shares: timing, the run's circumstances, and where results go.

A result is ``benchmarks/results/<device>/<name>.json``: circumstances (device, commit, torch,
date) and rows. Shared machines move by a factor of two, so minimum and median stand side by side:
the minimum says what the code can do, the median what it did.
"""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Timing(NamedTuple):
    """Seconds a call, over ``repeats`` measurements of ``calls`` calls each."""

    min_s: float
    median_s: float
    repeats: int
    calls: int


def time_call(
    call: Callable[[], Any],
    *,
    device: str = "cpu",
    repeats: int = 20,
    least_s: float = 0.02,
    most_s: float = 5.0,
) -> Timing:
    """Time a call: after a warm-up, ``repeats`` batches of at least ``least_s`` each, and at most
    ``most_s`` in all (but three batches). On ``cuda`` the device is waited for at either end."""
    once = _batch(call, 1, device)  # the warm-up: compiles, allocates, touches pages
    once = min(once, _batch(call, 1, device))
    calls = max(1, int(least_s / max(once, 1e-9)))
    batches: list[float] = []
    began = time.perf_counter()
    while len(batches) < repeats:
        batches.append(_batch(call, calls, device) / calls)
        if time.perf_counter() - began > most_s and len(batches) >= 3:
            break
    return Timing(min(batches), statistics.median(batches), len(batches), calls)


def _batch(call: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def device_name(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's with the number of cores this process may use.

    >>> device_name("cpu").endswith("cores")
    True
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(
        r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M
    )
    model = named.group(1) if named else platform.processor() or platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The checkout's commit, with ``+`` when tracked files differ from it."""
    if not (ROOT / ".git").exists():
        return "unknown: not a git checkout"

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """What a reader must know to repeat or to doubt a number."""
    made = {
        "device": device_name(device),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        made |= {"cuda": torch.version.cuda, "driver": said.splitlines()[0].strip()}
    return made


def write(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> Path:
    """Print the rows and write them to ``results/<device>/<name>.json``."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps({**circumstances(device), "rows": rows}, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{k}={_short(v)}" for k, v in row.items()))
    print(file.relative_to(ROOT))
    return file


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
