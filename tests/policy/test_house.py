"""The rules of the house (docs/architecture.md), each as a test that can fail."""

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from spcxr import cli

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "spcxr").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
OTHERS = [path for room in ("tests", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
ALL_PYTHON = [*SOURCES, *OTHERS, ROOT / "setup.py"]
FLOORS = {"kernels": 0, "ops": 1, "models": 2, "objectives": 3, "recipes": 4, "infer": 4, "cli": 5}
BESIDE = {"data", "train", "evaluate"}
FREE = {"errors", "config"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The package below spcxr that a file stands in ('' for spcxr itself)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported_modules(path: Path) -> set[str]:
    """Absolute names of every import in a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_down_the_floors_only(path):
    here = room(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "spcxr" or len(parts) < 2:
            continue
        there = parts[1]
        if here in FLOORS and there in FLOORS:
            assert FLOORS[there] <= FLOORS[here], f"{here} imports {name}, a higher floor"
        if here in BESIDE:
            assert there in FREE | {here}, f"{here} stands beside the floors and imports {name}"
        if there == "config":
            assert here in {"recipes", "cli", "config"}, f"{here} sees config classes"
        if there in BESIDE:
            allowed = BESIDE | {"recipes", "infer", "cli"}
            assert here in allowed, (
                f"{here} imports {name}; only recipes, infer, cli join the sides"
            )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_dispatcher_imports_backends(path):
    if relative(path) == "spcxr/ops/dispatch.py" or room(path) == "kernels":
        return
    for name in imported_modules(path):
        assert not name.startswith(("triton", "spcxr.kernels", "spcxr._native")), name


@pytest.mark.parametrize("path", ALL_PYTHON, ids=relative)
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= 400, "over 400 lines: split the file"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        documented = ast.get_docstring(node) is not None and len(node.body) > 1
        body = node.body[1:] if documented else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
        assert lines <= 60, f"{node.name} has {lines} lines"
        if path in SOURCES:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in {"self", "cls"}])
            limit = 24 if "kernels" in path.parts else 8
            assert count <= limit, f"{node.name} takes {count} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_swallowed(path):
    """No bare or blanket except: a failure is named or it is raised."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            names = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else {""}
            )
            blanket = names & {"", "Exception", "BaseException"}
            raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            assert not blanket or raises, (
                f"line {node.lineno}: a blanket except that does not raise"
            )


def test_no_drawer_for_everything():
    drawers = {"utils", "misc", "helper", "helpers", "common"}
    assert not [relative(p) for p in ALL_PYTHON if p.stem in drawers]


def test_import_is_light():
    code = "import spcxr, sys; print([m for m in sys.modules if m in %r])"
    heavy = ["torch", "numpy", "pydicom", "triton", "monai", "PIL", "click", "pyarrow"]
    run = [sys.executable, "-c", code % heavy]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_does_not_load_torch():
    code = (
        "import sys; from click.testing import CliRunner; from spcxr import cli;"
        "r = CliRunner().invoke(cli.train, ['--help']); assert r.exit_code == 0, r.output;"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def flags() -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for group, before in ((cli.train, ""), (cli.use, "spcxr ")):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            options = sorted(o for p in command.params for o in (*p.opts, *p.secondary_opts))
            made[before + name] = options
    return made


def test_flags_are_pinned():
    """A flag is a promise. To change one on purpose: python tests/policy/test_house.py"""
    pinned = json.loads((Path(__file__).parent / "flags.json").read_text())
    assert flags() == pinned


@pytest.mark.parametrize("name", cli.TRAIN)
def test_every_flag_has_help(name):
    command = cli.train.get_command(click.Context(cli.train), name)
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help line"


def test_readme_names_only_what_exists():
    """Every `make X` and `spcxr-train X` in the documents exists."""
    targets = {l.split(":")[0] for l in (ROOT / "Makefile").read_text().splitlines() if ":" in l}
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        words = document.read_text().replace("`", " ").split()
        for word, following in itertools.pairwise(words):
            following = following.strip(".,;:)")
            if word == "spcxr-train" and following.isalpha():
                assert following in cli.TRAIN, f"{document.name}: spcxr-train {following}"
            if word == "make" and following in {
                "demo",
                "test",
                "lint",
                "bench",
                "wheel",
                "gpu-check",
            }:
                assert following in targets


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_pictures_are_there(document):
    """A file named in a document exists; other sites are not asked."""
    text = (ROOT / document).read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(
        r"`((?:docs|benchmarks)/[\w./]+)`", text
    )
    assert [n for n in named if not n.startswith("http") and not (ROOT / n).exists()] == []


if __name__ == "__main__":
    (Path(__file__).parent / "flags.json").write_text(json.dumps(flags(), indent=1) + "\n")
