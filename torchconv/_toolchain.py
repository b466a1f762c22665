"""What a build needs of the machine: compilers, ninja, CUTLASS's headers, the GPUs to compile for.

Everything is found, or its absence said with the fix, when it is asked for: importing this looks
for nothing. setup.py loads it possibly with no torch installed (see _build.py).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

MINIMUM_COMPILER = {"gcc": 9, "clang": 10}
# Without a GPU to ask and without TORCH_CUDA_ARCH_LIST: Ampere, Hopper with its own instructions,
# and PTX for what comes later.
CUDA_ARCHITECTURES = ("8.0+PTX", "9.0a")


class BuildError(RuntimeError):
    """The library cannot be built. Says why, and what to do; holds the compiler's own words."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(f"torchconv could not build its library: {why}\nTo fix this: {fix}")


def torch_version() -> str:
    import torch

    return str(torch.__version__)


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, which may hold several words, else the system's own.

    That is what torch.utils.cpp_extension takes, which is not asked here: importing it is slow.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    candidates = [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    tried = ", ".join(shlex.join(candidate) for candidate in candidates)
    raise BuildError(
        f"there is no C++ compiler ({tried}: not found)",
        "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: "
        "xcode-select --install; conda: conda install cxx-compiler), or set the environment "
        "variable CXX to one",
    )


def runtime_libraries() -> list[str]:
    """The C++ library and the unwinder that this process has open, with PyTorch, for the linker.

    Exceptions and streams work only among libraries that share both. Some compilers link copies of
    their own into all that they make (-static-libstdc++ in a wrapper, a toolchain with nothing but
    libstdc++.a): then an error raised here ends the process. What is named first is taken.
    """
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:  # not on Linux
        return []
    opened = {Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line}
    names = ("libstdc++.so.6", "libgcc_s.so.1")
    return sorted(str(path) for path in opened if path.name.startswith(names) and path.is_file())


@functools.lru_cache
def _version_lines(command: tuple[str, ...], kind: str, variable: str) -> list[str]:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the {kind} compiler does not start: {shlex.join(command)} --version: {error}",
            f"set the environment variable {variable} to a working {kind} compiler",
        ) from error
    return done.stdout.splitlines() if done.stdout.strip() else ["unknown"]


def compiler_version() -> str:
    """The first line that the compiler says of itself."""
    return _version_lines(tuple(compiler()), "C++", "CXX")[0].strip()


def nvcc() -> Path:
    """CUDA's compiler: that of $CUDA_HOME or $CUDA_PATH, else the one on PATH, else the usual."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            path = Path(os.environ[variable]) / "bin" / "nvcc"
            if path.is_file():
                return path
            raise BuildError(f"{variable} has no nvcc: {path}", f"set or unset {variable}")
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise BuildError(
            "there is no CUDA compiler (nvcc: not found)",
            f"install the CUDA toolkit{_wanted_cuda()}, or set the environment variable CUDA_HOME",
        )
    return Path(found)


def cuda_toolkit() -> Path:
    """Where the toolkit of `nvcc` is, by its own words: nvcc itself may be a script or a link."""
    command = [str(nvcc()), "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = next((line.partition("TOP=")[2] for line in said.splitlines() if " TOP=" in line), "")
    return Path(top.strip()).resolve() if top else nvcc().resolve().parent.parent


def _wanted_cuda() -> str:
    import torch

    return f" {torch.version.cuda}, which PyTorch was built for" if torch.version.cuda else ""


def nvcc_version() -> str:
    """What nvcc says of itself. Raises BuildError where it is of another major than PyTorch's."""
    import torch

    path = nvcc()
    lines = _version_lines((str(path),), "CUDA", "CUDA_HOME")
    version = next((line for line in lines if "release" in line), "unknown").strip()
    release = version.partition("release ")[2].partition(",")[0]
    wanted = torch.version.cuda
    if wanted and release and release.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(
            f"{path} is of CUDA {release}, and PyTorch {torch_version()} of CUDA {wanted}",
            f"install the CUDA toolkit {wanted}, and set the environment variable CUDA_HOME to it",
        )
    return version


def _capabilities() -> list[tuple[int, int]]:
    """Of the GPUs here, each once."""
    import torch

    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(index) for index in devices})


def cuda_architectures() -> tuple[str, ...]:
    """What to compile for, as "9.0a" or "8.0+PTX": $TORCH_CUDA_ARCH_LIST, else the GPUs here."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        listed = [f"{major}.{minor}" for major, minor in _capabilities()]
    for each in listed:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", each):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST names an architecture '{each}'",
                "write numbers, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'",
            )
    return tuple(listed) or CUDA_ARCHITECTURES


def gpus_fault(architectures: Sequence[str]) -> str:
    """Why code for these architectures must not be opened, in words; empty if it may: where one of
    the GPUs here runs it, or there is none to ask."""
    pairs = _capabilities()
    if not pairs or any(_runs(each, pair) for each in architectures for pair in pairs):
        return ""
    here = " and ".join(f"{major}.{minor}" for major, minor in pairs)
    return f"is for GPUs of {' and '.join(architectures) or 'no kind'}, and the GPU here is {here}"


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what nvcc_flags compiles."""
    name, _, ptx = architecture.partition("+")
    major, minor = (int(number) for number in name.rstrip("af").split("."))
    if name.endswith("a") or (name == "9.0" and not ptx):
        return capability == (major, minor)
    if ptx and not name.endswith("f"):
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


def cutlass_includes() -> list[Path]:
    """The header folders of CUTLASS: $TORCHCONV_CUTLASS_DIR/include, or the package
    nvidia-cutlass; none where it is not there, and then its kernels are left out."""
    roots = []
    if os.environ.get("TORCHCONV_CUTLASS_DIR"):
        roots.append(Path(os.environ["TORCHCONV_CUTLASS_DIR"]))
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is not None and spec.origin is not None:
            roots.append(Path(spec.origin).parent / "source")
    folders = [root / name for root in roots for name in ("include", "tools/util/include")]
    return [folder for folder in folders if folder.is_dir()]


def find_ninja() -> str:
    """ninja: that of this Python's environment, which need not be on PATH, else the system's."""
    places = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
    found = shutil.which("ninja", path=os.pathsep.join(places)) or shutil.which("ninja")
    if not found and importlib.util.find_spec("ninja") is not None:
        import ninja

        found = shutil.which("ninja", path=str(getattr(ninja, "BIN_DIR", "")))
    if not found:
        raise BuildError("ninja, which runs the compiler, is not there", "pip install ninja")
    return found


def jobs() -> int:
    """How many compilers run at once: $MAX_JOBS as in torch.utils.cpp_extension, else the cores."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache
def _predefined_macros(command: tuple[str, ...]) -> dict[str, str]:
    macros = subprocess.run(
        [*command, "-x", "c++", "-dM", "-E", os.devnull], capture_output=True, text=True
    ).stdout
    return dict(line.split(" ", 2)[1:3] for line in macros.splitlines() if line.count(" ") > 1)


def compiler_kind(command: Sequence[str]) -> str:
    """clang or gcc, whatever name and version a vendor has given it."""
    return "clang" if "__clang__" in _predefined_macros(tuple(command)) else "gcc"


def age_fault(command: Sequence[str]) -> str:
    """Why a C++ compiler is too old, in words; empty if it is not."""
    kind = compiler_kind(command)
    macro = "__clang_major__" if kind == "clang" else "__GNUC__"
    major = _predefined_macros(tuple(command)).get(macro, "")
    needed = MINIMUM_COMPILER[kind]
    if major.isdigit() and int(major) < needed:
        return f"the compiler is too old ({kind} {major}; {kind} {needed} is the oldest that works)"
    return ""
