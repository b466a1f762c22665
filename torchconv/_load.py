"""Finds the library for this CPU, or compiles it, and opens it: once, at the first call.

The prebuilt library (`torchconv/lib`, written by setup.py) is opened if it was built from the very
sources that lie here. Otherwise the one for this CPU is compiled into a cache folder named by the
hash of sources, flags, PyTorch and compiler, and is there from then on. A build runs in a
temporary folder beside its final one and is renamed when done, under a lock that the operating
system releases when its holder dies: no half-built library is ever seen, and no stale lock.

The library for GPUs is found in the same way at the first call with a CUDA tensor.

Nothing is loaded at import, and nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from . import _build, _toolchain
from ._toolchain import BuildError

__all__ = [
    "BuildError",
    "build_hash",
    "is_loaded",
    "isa",
    "library_path",
    "load",
    "load_cuda",
    "prepare",
    "serves_cuda",
]

_mutex = threading.RLock()
records = False  # whether the library is open that records calls in C++
watching: Path | None = None  # the library that looks after Python's objects, if it can be opened
_loaded: Path | None = None
_loaded_cuda: Path | None = None


def _after_fork() -> None:
    """A child must not wait for a thread that only its parent has."""
    global _mutex
    _mutex = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def isa() -> str:
    """The instruction set to run: what PyTorch runs, so ATEN_CPU_CAPABILITY chooses here too."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    wanted = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "default")
    return wanted if wanted in _build.isas() else "default"


def is_loaded() -> bool:
    return _loaded is not None


def library_path(variant: str | None = None) -> Path | None:
    """The library that is open, else the one that would be opened without compiling, or None.

    variant: that of this CPU, or `_build.CUDA`.
    """
    opened = _loaded_cuda if variant == _build.CUDA else _loaded
    return opened or next(_ready(variant or isa(), _build.source_root(), prebuilt_dir()), None)


def build_hash() -> str:
    """Of this CPU's library: sources, flags, PyTorch and compiler."""
    return _build.build_hash(isa(), _build.source_root())


def prebuilt_dir() -> Path:
    """Where setup.py puts the libraries that it built ahead of time."""
    return Path(__file__).resolve().parent / "lib"


def _temporary_cache() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"torchconv-{user}"


def cache_dirs() -> list[Path]:
    """The folders for compiled libraries: the configured one, then one in the temporary folder."""
    folders = [_temporary_cache()]
    environment = os.environ
    if environment.get("TORCHCONV_CACHE_DIR"):
        folders.insert(0, Path(environment["TORCHCONV_CACHE_DIR"]).expanduser().absolute())
    elif environment.get("TORCH_EXTENSIONS_DIR"):
        folders.insert(0, Path(environment["TORCH_EXTENSIONS_DIR"]).absolute() / "torchconv")
    elif environment.get("XDG_CACHE_HOME"):
        folders.insert(0, Path(environment["XDG_CACHE_HOME"]).absolute() / "torchconv")
    else:
        with contextlib.suppress(RuntimeError):  # no home folder
            folders.insert(0, Path.home() / ".cache" / "torchconv")
    return folders


def prepare(variant: str | None = None) -> Path:
    """The library that load() or load_cuda() would open, compiled if need be, but not opened.

    variant: that of this CPU, or `_build.CUDA`.
    """
    name, root = variant or isa(), _build.source_root()
    return next(_ready(name, root, prebuilt_dir()), None) or _build_once(name, root, [], [])


def load(root: Path | None = None, prebuilt: Path | None = None) -> Path:
    """Opens this CPU's library, compiling it if need be; later calls do nothing.

    root and prebuilt name other folders of sources and of prebuilt libraries, for tests.
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    with _mutex:
        if _loaded is None:
            root = _build.source_root() if root is None else root
            _loaded = _open(isa(), root, prebuilt_dir() if prebuilt is None else prebuilt)
            _share_switches()
        return _loaded


def serves_cuda() -> bool:
    """Whether CUDA tensors have kernels here: PyTorch runs them, and the library for them is there
    or can be compiled."""
    import torch

    if torch.version.cuda is None:
        return False
    try:
        return bool(_toolchain.nvcc_version())
    except BuildError:  # or of another CUDA than PyTorch
        return next(_ready(_build.CUDA, _build.source_root(), prebuilt_dir()), None) is not None


def load_cuda() -> Path:
    """Opens the library for GPUs, compiling it if need be; later calls do nothing.

    Raises BuildError where that is not possible: no nvcc, say, or one of another CUDA.
    """
    global _loaded_cuda
    if _loaded_cuda is None:
        with _mutex:
            if _loaded_cuda is None:
                _loaded_cuda = _open(_build.CUDA, _build.source_root(), prebuilt_dir())
                _share_switches()
    return _loaded_cuda


def _share_switches() -> None:
    """Tells the library for GPUs of the switches in the CPU's, as soon as both are there; until
    then nobody has moved one."""
    if _loaded is not None and _loaded_cuda is not None:
        allowed = ctypes.CDLL(str(_loaded)).torchconv_winograd_allowed
        ctypes.CDLL(str(_loaded_cuda)).torchconv_set_winograd_switch(allowed)


def _open(name: str, root: Path, prebuilt: Path) -> Path:
    reasons = [reason for reason in [_passed_over(name, root, prebuilt)] if reason]
    refused = []
    for path in _ready(name, root, prebuilt):
        fault = _gpus_fault(path) if name == _build.CUDA else ""
        if fault:
            refused.append(path)
            reasons.append(f"{path} {fault}")
            continue
        try:
            _open_library(path, name)
            return path
        except OSError as error:  # built on another system, say
            refused.append(path)
            reasons.append(f"{path} cannot be opened ({error})")
    if name == _build.CUDA:
        fault = _toolchain.gpus_fault(_toolchain.cuda_architectures())
        if fault:
            raise BuildError(
                f"what TORCH_CUDA_ARCH_LIST asks for {fault}", "add that to it, or unset it"
            )
    path = _build_once(name, root, reasons, refused)
    try:
        _open_library(path, name)
    except OSError as error:
        raise BuildError(
            f"{path} was just built, but cannot be opened: {error}",
            "compile with the C++ compiler of the system that runs Python; if the folder does not "
            "allow code to run (noexec), set TORCHCONV_CACHE_DIR to another",
        ) from error
    return path


def _gpus_fault(library: Path) -> str:
    record = _build.read_record(library)  # none beside what was shipped without sources
    return _toolchain.gpus_fault(record.architectures) if record is not None else ""


@ctypes.CFUNCTYPE(ctypes.c_bool)
def _allows_tf32() -> bool:
    """PyTorch's switch for convolution, which the kernels for GPUs ask about at every call."""
    import torch

    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


def _open_library(path: Path, name: str) -> None:
    global records, watching
    import torch

    torch.ops.load_library(str(path))
    if name == _build.CUDA:
        library = ctypes.CDLL(str(path))
        library.torchconv_set_tf32_switch(_allows_tf32)
        # Whoever still convolves while Python ends must not call it.
        atexit.register(library.torchconv_set_tf32_switch, None)
        return
    growth = path.parent / _build.GROWTH_LIBRARY
    if not _build.bound_fault(growth):
        with contextlib.suppress(OSError):  # without it only growing does not work
            let_grow = ctypes.CDLL(str(growth)).torchconv_let_grow
            ctypes.CDLL(str(path)).torchconv_set_let_grow(let_grow)
    recorded = path.parent / _build.RECORDED_LIBRARY
    if not _build.bound_fault(recorded):
        with contextlib.suppress(OSError):  # without it small layers train more slowly
            torch.ops.load_library(str(recorded))
            records = True
    watch = path.parent / _build.WATCH_LIBRARY
    # Without Python's lock nothing may look at what others change.
    if not _build.bound_fault(watch) and not sysconfig.get_config_var("Py_GIL_DISABLED"):
        with contextlib.suppress(OSError):  # without it fused networks take longer to call
            sees_python = ctypes.CDLL(str(watch)).torchconv_sees_python
            sees_python.restype = ctypes.c_bool
            if sees_python():
                watching = watch


def _passed_over(name: str, root: Path, prebuilt: Path) -> str:
    """Why the prebuilt library is not used, if there is one."""
    library = prebuilt / _build.library_name(name)
    if not library.exists() or not root.is_dir():
        return ""
    fault = _build.fault(library, _build.source_hash(name, root))
    return f"{library} {fault}" if fault else ""


def _ready(name: str, root: Path, prebuilt: Path) -> Iterator[Path]:
    """The libraries that need no compiling: built ahead of time, then in the cache folders."""
    library = prebuilt / _build.library_name(name)
    if not root.is_dir():  # only binaries were shipped: there is nothing to compare them with
        if library.is_file():
            yield library
        return
    source_hash = _build.source_hash(name, root)
    if not _build.fault(library, source_hash):
        yield library
    try:
        environment = _build.environment_hash(name)
    except BuildError:  # no compiler here (any more): what another one compiled will do
        environment = "*"
    for cache in cache_dirs():
        if _is_ours(cache):
            for folder in sorted(cache.glob(f"{name}-{source_hash}-{environment}")):
                library = folder / _build.library_name(name)
                if not _build.fault(library, source_hash):
                    yield library


def _is_ours(cache: Path) -> bool:
    """False for a folder in which another user could have put a library.

    Only the one in the temporary folder is asked: anyone may have made it before us.
    """
    if cache != _temporary_cache() or not hasattr(os, "getuid"):
        return True
    try:
        status = cache.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return private and status.st_uid == os.getuid()


def _build_once(name: str, root: Path, reasons: list[str], refused: list[Path]) -> Path:
    """Compiles into the first cache folder that can be written.

    reasons says why that is needed; refused are libraries that cannot be opened.
    """
    key = f"{name}-{_build.source_hash(name, root)}-{_build.environment_hash(name)}"
    _toolchain.find_ninja()  # says what is missing before anything is made
    unwritable = []
    for cache in cache_dirs():
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(cache):
                raise PermissionError("another user can write to it")
            with tempfile.TemporaryFile(dir=cache):
                pass
        except OSError as error:
            unwritable.append(f"{cache} ({error.strerror or error})")
            continue
        if unwritable:
            reasons = [*reasons, f"the cache cannot be {', '.join(unwritable)}"]
        with _locked(cache / f"{key}.lock"):
            return _build_in(cache, key, name, root, reasons, refused)
    raise BuildError(
        f"no cache folder can be written: {', '.join(unwritable)}",
        "set the environment variable TORCHCONV_CACHE_DIR to a folder that can",
    )


def _build_in(
    cache: Path, key: str, name: str, root: Path, reasons: list[str], refused: list[Path]
) -> Path:
    """Compiles in a temporary folder and renames it to cache/key. The caller holds key's lock."""
    final = cache / key / _build.library_name(name)
    if final not in refused and not _build.fault(final, _build.source_hash(name, root)):
        return final  # built by another process while this one waited
    _sweep(cache, key)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
    try:
        with _progress(name, final.parent, reasons) as progress:
            built = _build.compile_libraries([name], root, temporary / "build", progress)
        ready = temporary / "ready"
        ready.mkdir()
        for library in built:
            for path in (library, _build.record_path(library)):
                path.rename(ready / path.name)
        shutil.rmtree(final.parent, ignore_errors=True)
        ready.rename(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _sweep(cache: Path, key: str) -> None:
    """Removes the temporary folders of builds that were killed: those whose lock is free."""
    from filelock import FileLock, Timeout

    for left in cache.glob(".*-*-*.*"):
        owner = left.name[1:].rpartition(".")[0]
        with contextlib.suppress(Timeout, OSError):
            if owner == key:  # this process holds the lock
                shutil.rmtree(left, ignore_errors=True)
            else:
                with FileLock(cache / f"{owner}.lock", timeout=0):
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file; waits for another builder, but not for ever."""
    from filelock import FileLock, Timeout

    setting = os.environ.get("TORCHCONV_BUILD_TIMEOUT", "600")
    try:
        seconds = float(setting)
    except ValueError:
        raise BuildError(
            f"TORCHCONV_BUILD_TIMEOUT is '{setting}', which is not a number of seconds",
            "set it to a number, or unset it for 600",
        ) from None
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"torchconv: waiting for another process that compiles (it holds {path})")
            lock.acquire(timeout=max(seconds, 0))
    except Timeout:
        raise BuildError(
            f"another process has held the lock {path} for {seconds:g} seconds",
            "wait for that process or end it (the lock goes with it), or wait longer by setting "
            "TORCHCONV_BUILD_TIMEOUT, or set TORCHCONV_CACHE_DIR to another folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _quiet() -> bool:
    return sys.stderr is None or os.environ.get("TORCHCONV_QUIET", "") not in ("", "0")


def _say(text: str) -> None:
    if not _quiet():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(
    name: str, folder: Path, reasons: list[str]
) -> Iterator[Callable[[int, int], None] | None]:
    """Says once what is compiled, where and why; gives what moves a bar on stderr."""
    if _quiet():
        yield None
        return
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread of its own, which a later fork would not like

    _say(f"torchconv: compiling its {name} kernels, once, into {folder}")
    for reason in reasons:
        _say(f"torchconv: because {reason}")
    with Bar(desc=f"torchconv {name}", unit="file", file=sys.stderr, mininterval=0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
