"""Two processes of one job on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240


def on_two_ranks(code, *arguments):
    """Run a script in two processes that know of each other, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **places,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, words in zip(processes, said, strict=True):
        assert process.returncode == 0, words
