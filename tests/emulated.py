"""Runs tests with the GPU's kernels on the CPU: csrc/cuda compiled for tests/emulator.

    python tests/emulated.py [--sanitize] [arguments of pytest]

The operators are those of the GPU's library, registered for tensors in ordinary memory, so the
tests of the kernels run as they are. With --sanitize the address and undefined behaviour sanitizers
watch every access. Without arguments it is the tests that say what a kernel computes; those of what
only the CPU's library has (its pool, kept weights, choice of algorithm) are left out. emulator.h
says which environment variables choose the order of threads and the emulated device.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
TESTS = (
    "test_pool2d.py", "test_pool2d_special.py", "test_pool2d_vectors.py", "test_adaptive_pool2d.py",
    "test_conv2d.py", "test_conv2d_16bit.py", "test_conv2d_activation.py",
    "test_conv2d_residual.py", "test_depthwise.py",
    "test_grouped.py", "test_few_channels.py", "test_tensor_core.py", "test_lectures.py",
    "test_group_tiles.py", "test_implicit_gemm.py", "test_lectures_backward.py",
    "test_gradients.py", "test_operators.py", "test_properties.py", "test_errors.py",
    "test_grouped_tensor_core.py",
)  # fmt: skip
SOURCES = ("ops/*.cpp", "core/*.cpp", "cuda/*.cpp", "cuda/*.cu")
# New memory holds no zeros that a kernel could count on: NaN, or what is large in any type.
FILL = {"MALLOC_PERTURB_": "128"}
SANITIZER_FILL = ":malloc_fill_byte=127:max_malloc_fill_size=1000000000"
LIBRARY = "TORCHCONV_EMULATED_LIBRARY"  # names the library to the pytest plugin below
FOLDER = {False: ROOT / "build" / "emulated", True: ROOT / "build" / "emulated-sanitize"}


def sources(root: Path) -> list[Path]:
    """The kernels first, which take longest. CUTLASS has no emulation."""
    found = [path for pattern in reversed(SOURCES) for path in sorted(root.glob(pattern))]
    found = [path for path in found if not path.name.startswith("cutlass")]
    return [*found, *(EMULATOR / name for name in ("emulator.cpp", "execution.cpp", "absent.cpp"))]


def ninja_file(root: Path, sanitize: bool) -> str:
    from torchconv import _build, _toolchain

    sanitizers = _build.SANITIZE_FLAGS if sanitize else ()
    includes, libraries = _build._torch_paths()
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
        "-Wno-unknown-pragmas", "-Wno-psabi", "-ftls-model=local-dynamic",
        "-DTORCHCONV_CUDA", "-DTORCHCONV_EMULATE_CUDA",
        *_build.ABI_FLAGS, *sanitizers, "-I", str(root), "-I", str(EMULATOR),
        f"-fmacro-prefix-map={root}{os.sep}=csrc/",
    ]  # fmt: skip
    flags += [word for path in includes for word in ("-isystem", path)]
    link = [word for path in libraries for word in ("-L", path)]
    link += [*_build.LINK_FLAGS, *sanitizers]
    lines = [
        f"cxx = {_build._ninja_command(_toolchain.compiler())}",
        f"flags = {_build._ninja_command(flags)}",
        f"link = {_build._ninja_command(link)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in $link -o $out",
    ]
    objects = []
    for source in sources(root):
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {_build._ninja_path(source)}")
    lines.append(f"build library.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build(sanitize: bool = False) -> Path:
    """The emulated library, compiled as far as it has changed."""
    from filelock import FileLock

    from torchconv import _build, _toolchain

    folder = FOLDER[sanitize]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [_toolchain.find_ninja(), "-j", str(_toolchain.jobs())]
    with FileLock(folder / "lock"):
        (folder / "build.ninja").write_text(ninja_file(_build.source_root().resolve(), sanitize))
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
        )
    (folder / "output.txt").write_text(done.stdout)
    if done.returncode != 0:
        raise _toolchain.BuildError(f"{done.stdout}{done.stderr}", "correct the sources")
    return folder / "library.so"


def surroundings(library: Path, sanitize: bool) -> dict[str, str]:
    """The environment of a process that opens the library."""
    environment = {**os.environ, **FILL, LIBRARY: str(library)}
    if sanitize:
        from sanitize import OPTIONS, runtimes
        from torchconv import _toolchain

        environment |= OPTIONS
        environment["ASAN_OPTIONS"] += SANITIZER_FILL
        environment["LD_PRELOAD"] = " ".join(runtimes(_toolchain.compiler()))
    paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def open_library(library: Path) -> None:
    """In the place of the CPU's library, before that is opened."""
    import torch

    from torchconv import _load

    assert not _load.is_loaded()
    torch.ops.load_library(str(library))
    _load._loaded = library


def pytest_configure() -> None:
    open_library(Path(os.environ[LIBRARY]))


# --- an emulated GPU for tests that run beside it ------------------------------------------------


class Gpu:
    """The emulated library in a process of its own, because this one has the CPU's library open.

    A call names an operator and gives its arguments and, for each time that it is to run, the
    environment variables of emulator.h; it returns the results, or raises RuntimeError.
    """

    def __init__(self, library: Path, sanitize: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=surroundings(library, sanitize),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, name: str, arguments: Sequence[Any], runs: Sequence[dict[str, str]]) -> Any:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        _send(process.stdin, (name, list(arguments), list(runs)))
        answer = _receive(process.stdout)
        if answer is None:
            raise RuntimeError(f"the emulated GPU's process ended with status {process.wait()}")
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _send(stream: BinaryIO, message: Any) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    """None at the end of the stream."""
    import torch

    size = stream.read(8)
    if len(size) < 8:
        return None
    return torch.load(io.BytesIO(stream.read(int.from_bytes(size, "little"))))


def serve() -> int:
    """Answers Gpu's calls on stdin and stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print is no answer
    import torch

    torch.set_num_threads(1)
    open_library(Path(os.environ[LIBRARY]))
    while (message := _receive(sys.stdin.buffer)) is not None:
        name, arguments, runs = message
        answer: Any = []
        try:
            for run in runs:
                os.environ.update(run)
                answer.append(getattr(torch.ops.torchconv, name)(*arguments))
        except RuntimeError as error:
            answer = f"{name}: {error}"
        _send(answers, answer)
    return 0


# --- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    sys.path.insert(0, str(ROOT))
    arguments = list(arguments)
    if arguments == ["--serve"]:
        return serve()
    sanitize = "--sanitize" in arguments
    if sanitize:
        arguments.remove("--sanitize")
    library = build(sanitize)
    print(f"built {library.relative_to(ROOT)}", flush=True)
    selected = arguments or [str(ROOT / "tests" / name) for name in TESTS]
    options = ["-p", "emulated", "--capture=sys", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *selected]
    return subprocess.run(command, cwd=ROOT, env=surroundings(library, sanitize)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
