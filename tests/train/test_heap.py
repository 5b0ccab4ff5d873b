"""Freed memory is used again, without the system clearing its pages anew."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, threading
import torch
from spcxr.train.heap import keep_freed_memory

def turn():
    made = [torch.ones(2**23, dtype=torch.uint8) for _ in range(3)]

def turns():
    for _ in range(20):
        turn()

def faults():
    turn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    runner = threading.Thread(target=turns) if sys.argv[1] == "thread" else None
    (runner.start(), runner.join()) if runner else turns()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
assert keep_freed_memory()
print(plain, faults())
"""


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_blocks_of_megabytes_are_reused(where):
    """24 MiB, twenty times: 6144 pages a few times, where 122,880 would be cleared without."""
    words = [sys.executable, "-c", COUNT, where]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    _, kept = map(int, run.stdout.split())
    assert kept < 122_880 / 4
