"""Builds the C++/CUDA kernels with CMake (pyproject.toml has the metadata).

SPCXR_CUDA=AUTO|ON|OFF (environment) decides on CUDA kernels; AUTO builds them when nvcc works.
Without a C++ compiler the package is pure Python, and says so.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def has_compiler() -> bool:
    named = os.environ.get("CXX", "").split()[:1]
    return any(shutil.which(c) for c in named or ["c++", "g++", "clang++"])


def tool(name: str) -> str:
    """The path of cmake or ninja: this Python's own (from PyPI), or the system's."""
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        folder = module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR
        return str(Path(folder) / name)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"spcxr: {name} is needed to build: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configure, build and install the shared libraries into the package's folder."""

    def run(self) -> None:
        for needed in ("torch", "pybind11"):
            if importlib.util.find_spec(needed) is None:
                raise SystemExit(
                    f"spcxr: {needed} is needed to build and is not there: pip install {needed} "
                    "first, or leave --no-build-isolation out"
                )
        in_place = self.inplace or self.editable_mode
        package = ROOT / "spcxr" if in_place else Path(self.build_lib).resolve() / "spcxr"
        build = Path(self.build_temp).resolve()
        cmake = tool("cmake")
        # Fresh: an isolated build's torch and pybind11 stood in a folder that is gone by now.
        configure = [
            *(cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSPCXR_CUDA={os.environ.get('SPCXR_CUDA', 'AUTO')}",
            "-DSPCXR_TESTS=OFF",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        install = [cmake, "--install", str(build), "--component", "python", "--prefix"]
        subprocess.run([*install, str(package)], check=True)


native = has_compiler()
if not native:
    print(
        "**** spcxr: PURE PYTHON INSTALL: no C++ compiler found (install g++ and reinstall for the "
        "native kernels) ****",
        file=sys.stderr,
    )
setup(
    packages=[*find_packages(include=["spcxr", "spcxr.*"]), "spcxr.kernels"],
    ext_modules=[Extension("spcxr._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
