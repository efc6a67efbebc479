"""Builds `pumice._native`, the CPU kernels: one build for all CPUs and for every PyTorch; the rest is in pyproject.toml.

Where there is no C++ compiler the installation still succeeds, says what is lost, and runs on PyTorch alone.
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("pumice", "kernels", "cpu")
SOURCES = ("module", "features", "threads", "portable", "avx2", "avx512", "avx512_bf16")
SOURCES += ("gram", "attention", "grouped", "nm", "tiles", "lanes", "linear", "blocks", "conv", "decoder")
MSVC = sys.platform == "win32"
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno"]
if sys.platform.startswith("linux"):
    FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC's own AVX-512 headers set them off
# For tests/test_sanitizers.py: a build that stops at the first bad access or undefined operation.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if os.environ.get("PUMICE_SANITIZE") else []
if SANITIZE:
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", "-DPUMICE_UNROLL=", *SANITIZE]
# The stable ABI does not exist for free-threaded Python, which then gets a build of its own.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")


class OptionalBuild(build_ext):
    """Compiles the kernels; a failure is reported and forgiven, since everything works without them, only slower."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.report(error)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.report(error)

    def copy_extensions_to_source(self) -> None:
        try:
            super().copy_extensions_to_source()
        except Exception as error:
            self.report(error)

    def report(self, error: Exception) -> None:
        print(f"pumice: the C++ kernels were not built ({type(error).__name__}: {error}).", file=sys.stderr)
        print("pumice: it runs without them, on PyTorch alone; `pumice doctor` says what is lost.", file=sys.stderr)


native = Extension(
    "pumice._native",
    sources=[(FOLDER / f"{name}.cpp").as_posix() for name in SOURCES],
    depends=[path.as_posix() for path in sorted(FOLDER.glob("*.h"))],
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if STABLE else [],
    py_limited_api=STABLE,
    extra_compile_args=["/O2", "/std:c++17"] if MSVC else FLAGS,
    extra_link_args=[] if MSVC else [*(["-pthread"] if sys.platform.startswith("linux") else []), *SANITIZE],
    optional=True,
)

setup(
    # The recipes lie at the top of the repository, where people look for them, and inside the package once installed.
    packages=[*find_packages(include=["pumice*"]), "pumice.recipes", "pumice.recipes.moe"],
    package_dir={"pumice.recipes": "recipes"},
    ext_modules=[native],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE else {},
)
