"""Builds the libraries ahead of time and puts the C++ sources into the package.

What pyproject.toml cannot say: where PyTorch is installed (pip's --no-build-isolation) the wheel
holds one library per instruction set; where it is not, only the sources, which the first call
compiles. The libraries use PyTorch's stable ABI and no Python at all, so a wheel with them is
tagged py3-none-PLATFORM. Sources, flags and names are those of torchconv/_build.py.

Environment: TORCHCONV_ISAS=avx512,avx2 limits the instruction sets, and a `cuda` among them builds
the library for GPUs ahead of time too (TORCH_CUDA_ARCH_LIST says which), TORCHCONV_SOURCES_ONLY=1
builds none, CXX names the compiler, MAX_JOBS how many run at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # with --no-build-isolation it is whatever is installed
    raise SystemExit(
        f"torchconv needs setuptools 77 or later to build, and this is {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    ) from None

ROOT = Path(__file__).resolve().parent


def _module_of_package(name: str) -> ModuleType:
    """One of torchconv's, without running the package itself, which needs PyTorch."""
    stand_in = ModuleType("torchconv_build")
    stand_in.__path__ = [str(ROOT / "torchconv")]
    sys.modules[stand_in.__name__] = stand_in
    return importlib.import_module(f"{stand_in.__name__}.{name}")


build = _module_of_package("_build")


def with_binaries() -> bool:
    if os.environ.get("TORCHCONV_SOURCES_ONLY", "") not in ("", "0"):
        return False
    return importlib.util.find_spec("torch") is not None


def isas() -> list[str]:
    wanted = os.environ.get("TORCHCONV_ISAS", "").replace(",", " ").split()
    known = (*build.isas(), build.CUDA)
    unknown = set(wanted) - set(known)
    if unknown:
        raise SystemExit(f"TORCHCONV_ISAS: {', '.join(sorted(unknown))}: not of {known}")
    return [each for each in known if each in (wanted or build.isas())]


def source_files() -> list[Path]:
    """Everything that a build reads, relative to the project."""
    csrc = ROOT / "csrc"
    suffixes = (".h", ".cpp", ".cuh", ".cu")
    return sorted(p.relative_to(ROOT) for p in csrc.rglob("*") if p.suffix in suffixes)


class BuildPackage(build_py):
    """The package with csrc in it, so that the JIT finds its sources wherever it is installed."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # _build.py finds the checkout's own
            return
        target = Path(self.build_lib) / "torchconv"
        shutil.rmtree(target / "csrc", ignore_errors=True)  # an earlier build's, maybe other files
        shutil.rmtree(target / "lib", ignore_errors=True)
        for path in source_files():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, target / path)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if not self.editable_mode:
            outputs += [os.path.join(self.build_lib, "torchconv", path) for path in source_files()]
        return outputs


class BuildLibraries(build_ext):
    """One shared library per instruction set, in torchconv/lib. None is a Python extension."""

    def run(self) -> None:
        wanted = isas()
        try:
            # A folder for each PyTorch and compiler: its objects stay good for the next run.
            work = ROOT / "build" / f"kernels-{build.environment_hash()}"
            print(f"building {', '.join(wanted)} with {build.jobs()} jobs in {work}", flush=True)
            libraries = build.compile_libraries(wanted, ROOT / "csrc", work, _print_progress)
        except build.BuildError as error:
            hint = "or set TORCHCONV_SOURCES_ONLY=1 to compile at the first call instead"
            raise SystemExit(f"\n{error}\n{hint}") from None
        print((work / build.OUTPUT).read_text(), end="")  # the warnings
        target = self._target()
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for library in libraries:
            for path in (library, build.record_path(library)):
                shutil.copy2(path, target)
        if self.inplace:
            (target / ".gitignore").write_text("*\n")

    def _target(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "torchconv" / "lib"

    def _files(self) -> list[str]:
        names = [build.library_name(isa) for isa in isas()]
        bound = build.bound_libraries(ROOT / "csrc")
        names += [name for name in bound if (self._target() / name).is_file()]  # what PyTorch lets
        return [f"lib/{n}" for name in names for n in (name, str(build.record_path(Path(name))))]

    def get_outputs(self) -> list[str]:
        return [os.path.join(self.build_lib, "torchconv", name) for name in self._files()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {
            os.path.join(self.build_lib, "torchconv", name): os.path.join("torchconv", name)
            for name in self._files()
        }

    def get_source_files(self) -> list[str]:
        return [str(path) for path in source_files()]


def _print_progress(done: int, total: int) -> None:
    if done * 10 // total > (done - 1) * 10 // total:  # ten lines, however many files
        print(f"{done} of {total} files", flush=True)


class TagWheel(bdist_wheel):
    """No Python ABI: any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if with_binaries() else (python, abi, platform)


class Project(setuptools.Distribution):
    def has_ext_modules(self) -> bool:
        """Runs build_ext and makes the wheel one for this platform only."""
        return with_binaries()


commands: dict[str, Any] = {
    "bdist_wheel": TagWheel,
    "build_ext": BuildLibraries,
    "build_py": BuildPackage,
}
setuptools.setup(cmdclass=commands, distclass=Project)
