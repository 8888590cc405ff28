"""Drives CMake for the compiled part; everything declarative is in pyproject.toml.

torch is found, never imported: an import would cost seconds and fail in an isolated build.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCE_HASH = runpy.run_path(str(ROOT / "ghl_kernels" / "source_hash.py"))["source_hash"]()


def torch_directory() -> Path | None:
    """The installed torch with stable-ABI headers; also the one outside an isolated build."""
    places = [*sys.path, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    for place in places:
        directory = Path(place) / "torch"
        if (directory / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return directory
    return None


def compiler() -> str | None:
    """The C++ compiler CMake will use: CXX if set, else the first that is installed."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return next((path for c in candidates if (path := shutil.which(c))), None)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


class BuildNative(build_ext):
    """Builds and installs the CMake project into the ghl_kernels package."""

    def run(self) -> None:
        torch = torch_directory()
        missing = [
            name
            for name, found in (
                ("a C++ compiler", compiler()),
                ("torch >= 2.11", torch),
                ("cmake", shutil.which("cmake")),
                ("ninja", shutil.which("ninja")),
                ("CMakeLists.txt", (ROOT / "CMakeLists.txt").exists()),
            )
            if not found
        ]
        if missing:
            reason = f"{' and '.join(missing)} not found"
            self.warn(f"{reason}: ghl-kernels is installed without its compiled part")
            return
        self.configure_and_build(torch)

    def configure_and_build(self, torch: Path | None) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "GHL_TORCH_DIR": torch,
            "GHL_SOURCE_HASH": SOURCE_HASH,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if architectures := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            options["GHL_CUDA_ARCH_LIST"] = ";".join(architectures.replace(";", " ").split())
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *definitions)
        run("cmake", "--build", build)
        try:
            run("cmake", "--build", build, "--target", "_replay")
        except subprocess.CalledProcessError:
            self.warn("csrc/replay does not compile with this torch: Python plays tapes")
        run("cmake", "--install", build, "--prefix", self.package_directory())

    def package_directory(self) -> Path:
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        return root / "ghl_kernels"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.package_directory().glob("*.so")]


setup(
    ext_modules=[Extension("ghl_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
