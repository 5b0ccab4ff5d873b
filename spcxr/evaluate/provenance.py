"""Where the numbers of a page come from: version, commit, machine, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import spcxr


def provenance(facts: Mapping[str, object]) -> dict[str, str]:
    """Version, commit where known, Python and the command; then ``facts`` in their order.

    >>> provenance({"seed": 3})["seed"]
    '3'
    """
    made = {
        "spcxr": spcxr.__version__,
        "commit": known_commit(),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return made | {name: str(value) for name, value in facts.items()}


def known_commit() -> str:
    """The commit of the checkout spcxr runs from, or that it runs from an installed package."""
    root = Path(spcxr.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "installed package"
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "not known (git did not answer)"
    return said.stdout.strip()
