"""Prepare when processes die: killed outright, killed by a file, or born dead."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spcxr.data import pool
from spcxr.data.assembly import read_rejections
from spcxr.data.store import Store
from spcxr.recipes.prepare import PrepareConfig, run

SIZE = 16


@pytest.fixture
def many(tmp_path):
    """37 small images."""
    (tmp_path / "in").mkdir()
    for i in range(37):
        pixels = (np.arange(24 * 40).reshape(24, 40) * (i + 3) // 7 % 256).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i:03d}.png")
    return tmp_path / "in"


def settings(source, out):
    return PrepareConfig(sources=(str(source),), out=str(out), size_px=SIZE, workers=0)


def script(folder, source, grace_s=5.0):
    """A program that prepares with two workers, in pieces of several files."""
    code = (
        "from spcxr.data import pieces, pool\n"
        "from spcxr.recipes.prepare import *\n"
        "if __name__ == '__main__':\n"
        "    pieces.PIECES = 1\n"
        f"    pool.GRACE_S = {grace_s}\n"
        f"    run(PrepareConfig(sources=({str(source)!r},), out={str(folder / 's')!r},"
        f" size_px={SIZE}, workers=2))"
    )
    (folder / "job.py").write_text(code)
    return folder / "job.py"


def alive(process):
    """Whether a process runs: one that waits for its parent to notice its end does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_killed_outright_it_goes_on_too(many, tmp_path):
    """SIGKILL in the middle: no store, no orphans, and the rerun equals an unbroken one."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 600), np.uint8)
    Image.fromarray(noise).save(many / "037.png")
    for i in range(38, 400):  # a second's work, of which the kill leaves most undone
        os.link(many / "037.png", many / f"{i:03d}.png")
    command = [sys.executable, script(tmp_path, many)]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    pieces = tmp_path / "s.partial" / "pieces"
    deadline = time.monotonic() + 180
    while not list(pieces.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) >= 2
    assert not any(map(alive, workers))
    assert list(pieces.glob("*.npz"))
    assert not (tmp_path / "s").exists()
    store = Store.open(run(settings(many, tmp_path / "s")))
    store.verify()
    assert len(store) == 400


def planted(folder, deed):
    """An environment whose Pythons do ``deed`` when Pillow is to open ``020.png``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, time, pathlib\n"
        "from PIL import Image\n"
        "opened = Image.open\n"
        "def deadly(file, *rest, **named):\n"
        "    name = getattr(file, 'name', file)\n"
        "    if str(name).endswith('020.png'):\n"
        f"        {deed}\n"
        "    return opened(file, *rest, **named)\n"
        "Image.open = deadly\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def test_ctrl_c_ends_a_worker_that_a_file_holds_up(many, tmp_path):
    stuck = tmp_path / "stuck"
    deed = f"pathlib.Path({str(stuck)!r}).touch(); time.sleep(600)"
    job = subprocess.Popen(
        [sys.executable, script(tmp_path, many, grace_s=0.5)],
        env=planted(tmp_path / "plant", deed),
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore SIGINT, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 180
    while not stuck.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=180)
    assert "of 37 images read; the same command goes on from there" in said.splitlines()[-1]
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)  # one of them is Python's resource tracker, which leaves a little later
    assert not any(map(alive, workers))


def test_a_file_that_kills_its_reader_is_rejected_and_the_run_goes_on(many, tmp_path):
    """A decoder's segmentation fault, played by a sitecustomize that workers import."""
    job = script(tmp_path, many)
    subprocess.run(
        [sys.executable, job],
        env=planted(tmp_path / "plant", "os.abort()"),
        check=True,
        timeout=120,
        capture_output=True,
    )
    store = Store.open(tmp_path / "s")
    assert len(store) == 36
    found = list(read_rejections(store.path / "rejected.csv"))
    assert found == [(str(many / "020.png"), pool.CRASHED)]


def test_a_script_without_a_main_guard_is_told_so(many, tmp_path):
    """Spawned workers run such a script again and die of it, before they read any file."""
    call = f"run(PrepareConfig(sources=({str(many)!r},), out={str(tmp_path / 's')!r}, workers=1))"
    (tmp_path / "job.py").write_text(f"from spcxr.recipes.prepare import *\n{call}\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "call prepare below `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "s.partial" / "pieces").glob("*.crashed"))
