"""From the sdist to an installed package: with a compiler, without one, with a broken nvcc."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("spcxr", "kernels", "csrc")
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
FILES += ("CHANGELOG.md", "constraints.txt", "Makefile")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")


def run(*command, cwd: Path, **environment: str) -> str:
    """Run to the end, with warnings as the installed tools have them; return what was said."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built in a copy: a build leaves things in its source folder."""
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, copy, cwd=out)
    (made,) = out.glob("*.tar.gz")
    return made


def wheel_of(sdist: Path, out: Path, **environment: str) -> tuple[Path, str]:
    said = run(
        *(*PIP, "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, sdist),
        cwd=out,
        **environment,
    )
    (made,) = out.glob("*.whl")
    return made, said


def test_the_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    ours = [p for part in PARTS for p in (ROOT / part).rglob("*") if p.is_file()]
    wanted = {".py", ".cpp", ".cu", ".cuh", ".h", ".in", ".typed"}
    sources = {str(p.relative_to(ROOT)) for p in ours if p.suffix in wanted or p.name == "py.typed"}
    assert sources - held == set()
    assert set(FILES) - held == set()
    assert not [name for name in held if name.endswith(".so")]


def test_without_a_compiler_the_package_is_pure_and_says_so(sdist, tmp_path):
    made, said = wheel_of(sdist, tmp_path, CXX="/no/such/compiler")
    assert made.name.endswith("-py3-none-any.whl")
    assert "**** spcxr: PURE PYTHON INSTALL" in said
    names = zipfile.ZipFile(made).namelist()
    assert "spcxr/kernels/group_mask.py" in names
    assert "spcxr/py.typed" in names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("kernels/", "tests/"))]


def test_a_stale_library_in_the_source_folder_gets_into_no_wheel(sdist, tmp_path):
    """An editable install leaves its own there."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (source / "spcxr" / "_stale.so").write_bytes(b"of another torch")
    made, _ = wheel_of(source, tmp_path, CXX="/no/such/compiler")
    assert not [n for n in zipfile.ZipFile(made).namelist() if n.endswith(".so")]


SERVES = """
from spcxr.ops import dispatch
import spcxr, spcxr.kernels
print(spcxr.__file__)
print(dispatch.choose("group_mask", "auto", "cpu"))
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.package
def test_a_wheel_from_the_sdist_serves(sdist, tmp_path):
    made, _ = wheel_of(sdist, tmp_path)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-linux_" in made.name
    names = zipfile.ZipFile(made).namelist()
    assert "spcxr/_native_ops.so" in names
    assert [n for n in names if n.startswith("spcxr/_native.cpython")]
    assert not [n for n in names if n.startswith(("csrc", "build", "kernels"))]
    target = tmp_path / "installed"
    run(*PIP, "install", "-q", "--no-deps", "--target", target, made, cwd=tmp_path)
    said = run(sys.executable, "-c", SERVES, cwd=tmp_path, PYTHONPATH=str(target))
    assert said.splitlines() == [str(target / "spcxr" / "__init__.py"), "native"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.package
def test_pip_install_with_build_isolation(sdist, tmp_path):
    """What a user types. The constraint keeps the isolated build from fetching CUDA's torch."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    constraint = {"PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt")}
    constraint["PIP_CONSTRAINT"] = constraint["PIP_BUILD_CONSTRAINT"]
    run(python, "-m", "pip", "install", "-q", "--upgrade", "pip", cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", sdist, cwd=tmp_path, **constraint)
    said = run(python, "-c", SERVES, cwd=tmp_path).splitlines()
    assert said[0].startswith(str(tmp_path / "venv"))
    assert said[1] == "native"


def configure(tmp_path: Path, mode: str, nvcc: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DSPCXR_CUDA={mode}"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDACXX": nvcc, "PATH": "/usr/bin:/bin"},
    )


@needs_compiler
@pytest.mark.skipif(shutil.which("cmake", path="/usr/bin") is None, reason="no cmake in /usr/bin")
@pytest.mark.parametrize("nvcc", ["/no/such/nvcc", "/bin/false"])
def test_auto_falls_back_loudly_and_on_refuses(tmp_path, nvcc):
    """Missing and broken: AUTO says so in one line, ON fails."""
    auto = configure(tmp_path / "auto", "AUTO", nvcc)
    said = auto.stdout + auto.stderr
    assert "**** spcxr: NO CUDA KERNELS" in said, said
    on = configure(tmp_path / "on", "ON", nvcc)
    assert on.returncode != 0
    assert "SPCXR_CUDA=ON" in on.stderr
    wrong = configure(tmp_path / "wrong", "MAYBE", nvcc)
    assert "give AUTO, ON or OFF" in wrong.stderr
