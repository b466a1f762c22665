"""Finding, compiling and opening the library: what goes wrong on users' machines, one test each.

A tiny source tree stands in for csrc (its two files have one name, as csrc/ops and csrc/cpu do), so
a build takes a fraction of a second. Processes are started only where one has to be killed,
interrupted or forked, or where what it prints is looked at from the start.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from torchconv import _build, _load, _toolchain

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = Path("/nonexistent")
VARIABLES = (
    "CXX", "MAX_JOBS", "TORCHCONV_BUILD_TIMEOUT", "TORCHCONV_CACHE_DIR", "TORCHCONV_QUIET",
    "TORCHCONV_SANITIZE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME",
)  # fmt: skip


def make_sources(root: Path, answer: int = 42) -> Path:
    files = {
        "core/answer.h": f"#pragma once\nconstexpr int kAnswer = {answer};\n",
        "cpu/same.cpp": '#include "core/answer.h"\nint answer() { return kAnswer; }\n',
        "ops/same.cpp": (
            "int answer();\n"
            'extern "C" __attribute__((visibility("default"))) int torchconv_answer() '
            "{ return answer(); }\n"
        ),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def answer_of(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).torchconv_answer())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sources(tmp_path / "csrc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHCONV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def get(root: Path, prebuilt: Path = NOWHERE) -> Path:
    """What load() does in a process that has loaded nothing yet."""
    return _load._open("default", root, prebuilt)


def compiled(cache: Path) -> list[str]:
    """The libraries' folders, and whatever else is not a lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def write_compiler(path: Path, body: str) -> str:
    """A C++ compiler that does something first."""
    path.write_text(f'#!/bin/sh\nif [ "$1" != --version ]; then\n{body}\nfi\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


# An interrupt must arrive even where the tests were started with it ignored, as by nohup.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from torchconv import _load
path = _load.load(Path(sys.argv[1]), Path("/nonexistent"))
print(path)
"""


def start(root: Path, script: str = SCRIPT, **environment: str) -> subprocess.Popen[str]:
    """A new process that loads the library; in a group of its own, to be ended as a whole."""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(root)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default", **environment},
    )  # fmt: skip


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"{path} never came"
        time.sleep(0.02)


# --- the ordinary way ----------------------------------------------------------------------------


def test_compiles_once_says_so_once_and_only_on_stderr(
    root: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = get(root)
    out, err = capfd.readouterr()
    assert answer_of(library) == 42
    assert out == ""
    assert err.count("torchconv: compiling its default kernels, once, into") == 1
    assert "3/3" in err  # two objects and the library
    assert get(root) == library
    assert capfd.readouterr() == ("", "")
    assert compiled(cache) == [library.parent.name]


def test_quiet(
    root: Path, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHCONV_QUIET", "1")
    get(root)
    assert capfd.readouterr() == ("", "")


def test_importing_compiles_nothing_and_imports_nothing_heavy(cache: Path) -> None:
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import torchconv; from torchconv import _load\n"
        "assert not _load.is_loaded()\n"
        "heavy = {'filelock', 'tqdm', 'setuptools', 'ninja', 'torch.utils.cpp_extension'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    process = start(NOWHERE, script)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "[]"), err
    assert "torchconv" not in err
    assert not cache.exists()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_aten_cpu_capability_chooses_the_library(cache: Path, capability: str) -> None:
    script = "from torchconv import _load; print(_load.isa())"
    process = start(NOWHERE, script, ATEN_CPU_CAPABILITY=capability)
    out, _ = process.communicate(timeout=120)
    assert out.strip() == (capability if capability in _build.isas() else "default")


def test_hash_follows_contents_and_flags_and_nothing_else(root: Path, tmp_path: Path) -> None:
    first = _build.source_hash("default", root)
    assert _build.source_hash("default", make_sources(tmp_path / "elsewhere")) == first
    assert len({_build.source_hash(isa, root) for isa in _build.ISA_FLAGS}) == len(_build.ISA_FLAGS)
    (root / "core/new.h").write_text("")
    assert _build.source_hash("default", root) != first
    (root / "core/new.h").unlink()
    make_sources(root, answer=43)
    assert _build.source_hash("default", root) != first


def test_ordinary_library_is_never_taken_for_the_sanitized_one(
    root: Path, cache: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(_load._ready("default", root, prebuilt)) == [get(root, prebuilt)]
    monkeypatch.setenv("TORCHCONV_SANITIZE", "1")
    assert list(_load._ready("default", root, prebuilt)) == []
    assert "-fsanitize=address" in _build.ninja_file(["default"], root)
    monkeypatch.setenv("TORCHCONV_SANITIZE", "0")
    assert list(_load._ready("default", root, prebuilt)) == [get(root, prebuilt)]


def test_changed_header_is_compiled_anew(root: Path, cache: Path) -> None:
    first = get(root)
    second = get(make_sources(root, answer=7))
    assert first != second
    assert answer_of(second) == 7


def test_stable_abi_operator_runs(tmp_path: Path, cache: Path) -> None:
    """The flags are those that PyTorch's stable headers need, and the links suffice."""
    import torch

    (tmp_path / "csrc/ops").mkdir(parents=True)
    (tmp_path / "csrc/ops/twice.cpp").write_text("""
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/ops.h>
        #include <torch/csrc/stable/tensor.h>
        using torch::stable::Tensor;
        Tensor copy(Tensor x) { return torch::stable::clone(x); }
        STABLE_TORCH_LIBRARY_FRAGMENT(torchconv_test, m) { m.def("copy(Tensor x) -> Tensor"); }
        STABLE_TORCH_LIBRARY_IMPL(torchconv_test, CPU, m) { m.impl("copy", TORCH_BOX(&copy)); }
    """)
    library = get(tmp_path / "csrc")
    x = torch.arange(3)
    assert torch.equal(torch.ops.torchconv_test.copy(x), x)
    assert b"libpython" not in library.read_bytes()
    assert b"libtorch_python" not in library.read_bytes()


def test_errors_are_raised_from_what_a_compiler_links_statically(
    tmp_path: Path, cache: Path
) -> None:
    """A wrapper's -static-libgcc -static-libstdc++: a second unwinder and locale in the process."""
    archive = subprocess.check_output(["c++", "-print-file-name=libstdc++.a"], text=True).strip()
    if not os.path.isabs(archive):
        pytest.skip("no static C++ library")
    (tmp_path / "csrc/ops").mkdir(parents=True)
    (tmp_path / "csrc/ops/refuse.cpp").write_text("""
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/tensor.h>
        #include <sstream>
        #include <stdexcept>
        torch::stable::Tensor refuse(torch::stable::Tensor x) {
          std::ostringstream message;
          message << "size " << x.numel();
          throw std::runtime_error(message.str());
        }
        STABLE_TORCH_LIBRARY_FRAGMENT(torchconv_test, m) { m.def("refuse(Tensor x) -> Tensor"); }
        STABLE_TORCH_LIBRARY_IMPL(torchconv_test, CPU, m) { m.impl("refuse", TORCH_BOX(&refuse)); }
    """)
    script = f"""{SCRIPT}
import torch
try:
    torch.ops.torchconv_test.refuse(torch.zeros(3))
except RuntimeError as error:
    print(error)
"""
    with start(tmp_path / "csrc", script, CXX="c++ -static-libgcc -static-libstdc++") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("size 3"), out


def test_paths_with_spaces(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCONV_CACHE_DIR", str(tmp_path / "my cache $HOME"))
    library = get(make_sources(tmp_path / "my sources"))
    assert "my cache $HOME" in str(library)
    assert answer_of(library) == 42


def test_compiler_of_several_words(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "env c++ -DkAnswer=7*")
    (root / "core/answer.h").write_text("#pragma once\n#define kUnused\n")
    (root / "cpu/same.cpp").write_text("int answer() { return kAnswer 6; }")
    assert answer_of(get(root)) == 42


def test_cache_folder_follows_the_environment(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _load.cache_dirs()[0] == cache
    monkeypatch.delenv("TORCHCONV_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _load.cache_dirs()[0] == tmp_path / ".cache/torchconv"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert _load.cache_dirs()[0] == tmp_path / "extensions/torchconv"


# --- built ahead of time -------------------------------------------------------------------------


@pytest.fixture
def prebuilt(root: Path, cache: Path, tmp_path: Path) -> Path:
    """A library as setup.py makes one."""
    _build.compile_libraries(["default"], root, tmp_path / "lib")
    return tmp_path / "lib"


def test_prebuilt_library_is_opened_without_a_compiler(
    root: Path, cache: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert get(root, prebuilt) == prebuilt / "torchconv_cpu_default.so"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("sources", "was built from other sources or flags"),
        ("record", "has no record of what it was built from"),
        ("truncated", "is damaged"),
        ("foreign", "cannot be opened"),
    ],
)
def test_prebuilt_library_that_is_not_good_is_passed_over_aloud(
    root: Path, cache: Path, prebuilt: Path, capfd: pytest.CaptureFixture[str],
    spoil: str, why: str,
) -> None:  # fmt: skip
    library = prebuilt / "torchconv_cpu_default.so"
    if spoil == "sources":
        make_sources(root, answer=5)
    elif spoil == "record":
        library.with_suffix(".json").unlink()
    elif spoil == "truncated":
        os.truncate(library, 4096)
    else:
        make_foreign(library)
    assert answer_of(get(root, prebuilt)) == (5 if spoil == "sources" else 42)
    err = capfd.readouterr().err
    assert f"torchconv: because {library} {why}" in err


def make_foreign(library: Path) -> None:
    """A library whose record is right but which this system cannot open."""
    library.write_bytes(b"\x7fELF of another machine")
    record = json.loads(library.with_suffix(".json").read_text())
    record["sha256"] = _build._sha256(library)
    library.with_suffix(".json").write_text(json.dumps(record))


def test_incremental_build_compiles_only_what_changed(
    root: Path, cache: Path, tmp_path: Path
) -> None:
    totals: list[tuple[int, int]] = []
    for _ in range(2):
        _build.compile_libraries(["default"], root, tmp_path / "b", lambda *n: totals.append(n))
        (root / "ops/same.cpp").write_text((root / "ops/same.cpp").read_text() + "\n")
    assert [total for _, total in totals] == [3, 3, 3, 2, 2]


# --- the growth library, for one PyTorch only ----------------------------------------------------


EXPORT = 'extern "C" __attribute__((visibility("default")))'


@pytest.fixture
def growing(root: Path) -> Path:
    """Sources with a growth library, and a library that says whether it was handed over."""
    (root / "growth").mkdir()
    (root / "growth/growth.cpp").write_text(f"{EXPORT} void torchconv_let_grow(void*) {{}}\n")
    (root / "ops/can_grow.cpp").write_text(
        "static void* let_grow;\n"
        f"{EXPORT} void torchconv_set_let_grow(void* function) {{ let_grow = function; }}\n"
        f"{EXPORT} int torchconv_can_grow() {{ return let_grow != nullptr; }}\n"
    )
    return root


def can_grow(library: Path) -> bool:
    return bool(ctypes.CDLL(str(library)).torchconv_can_grow())


def test_growth_library_is_compiled_along_and_opened(growing: Path, cache: Path) -> None:
    library = get(growing)
    assert (library.parent / "torchconv_growth.so").is_file()
    assert can_grow(library)
    source = growing / "growth/growth.cpp"
    source.write_text(source.read_text() + "\n")
    assert get(growing) != library


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("version", "was built for PyTorch 2.13.0+other"),
        ("absent", "is missing"),
        ("record", "has no record of what it was built from"),
        ("truncated", "is damaged"),
        ("foreign", ""),
    ],
)
def test_growth_library_that_is_not_good_is_not_opened_and_missed_by_nobody(
    growing: Path, cache: Path, tmp_path: Path, spoil: str, why: str
) -> None:
    library, growth = _build.compile_libraries(["default"], growing, tmp_path / "lib")
    assert _build.growth_fault(growth) == ""
    record = growth.with_suffix(".json")
    if spoil == "version":
        record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.13.0+other"}))
    elif spoil == "absent":
        growth.unlink()
    elif spoil == "record":
        record.unlink()
    elif spoil == "truncated":
        os.truncate(growth, 4096)
    else:
        make_foreign(growth)
    assert _build.growth_fault(growth) == why
    assert get(growing, library.parent) == library
    assert answer_of(library) == 42 and not can_grow(library)


def test_growth_library_that_does_not_compile_costs_nothing_else(
    growing: Path, cache: Path
) -> None:
    (growing / "growth/growth.cpp").write_text("#error this PyTorch is too new\n")
    library = get(growing)
    assert sorted(path.name for path in library.parent.iterdir()) == [
        "torchconv_cpu_default.json", "torchconv_cpu_default.so",
    ]  # fmt: skip
    assert answer_of(library) == 42 and not can_grow(library)
    assert get(growing) == library


# --- what is missing or broken -------------------------------------------------------------------


def refusal(root: Path) -> str:
    with pytest.raises(_load.BuildError) as caught:
        get(root)
    assert isinstance(caught.value, RuntimeError)
    return str(caught.value)


def test_missing_compiler(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    message = refusal(root)
    assert "there is no C++ compiler (/nonexistent/c++: not found)" in message
    assert "apt-get install g++" in message


def test_no_compiler_on_path(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "there is no C++ compiler (c++, g++, clang++: not found)" in refusal(root)


def test_compiler_that_does_not_start(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert "the C++ compiler does not start: false --version" in refusal(root)


def test_library_compiled_earlier_needs_no_compiler(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = get(root)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert get(root) == library


def test_missing_ninja(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = _toolchain.shutil.which
    monkeypatch.setattr(
        _toolchain.shutil, "which", lambda name, **k: None if name == "ninja" else which(name, **k)
    )
    message = refusal(root)
    assert "ninja, which runs the compiler, is not there" in message
    assert "pip install ninja" in message
    assert not cache.exists()


def test_missing_sources(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"no C++ sources in {tmp_path / 'empty'}" in refusal(tmp_path / "empty")
    assert f"no C++ sources in {tmp_path / 'absent'}" in refusal(tmp_path / "absent")


def test_compile_error_holds_the_compilers_message_and_can_be_mended(
    root: Path, cache: Path
) -> None:
    good = (root / "cpu/same.cpp").read_text()
    (root / "cpu/same.cpp").write_text("#error this compiler will not do\n")
    message = refusal(root)
    assert "cpu/same.cpp" in message
    assert "#error this compiler will not do" in message
    assert "To fix this:" in message
    assert compiled(cache) == []
    (root / "cpu/same.cpp").write_text(good)
    assert answer_of(get(root)) == 42


def test_undefined_symbol_is_an_error_of_the_build(root: Path, cache: Path) -> None:
    (root / "cpu/same.cpp").write_text("")
    assert "answer()" in refusal(root)


def test_old_compiler_is_named(
    root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = 'case "$*" in *-dM*) echo "#define __GNUC__ 7"; exit 0;; *) exit 1;; esac'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "old", old))
    assert "the compiler is too old (gcc 7; gcc 9 is the oldest that works)" in refusal(root)


@pytest.mark.parametrize("spoil", ["truncated", "empty", "record", "foreign"])
def test_damaged_cached_library_is_compiled_anew(root: Path, cache: Path, spoil: str) -> None:
    library = get(root)
    library.rename(library.with_suffix(".old"))  # this process has it open
    if spoil == "record":
        library.with_suffix(".json").write_text("{")
    elif spoil == "foreign":
        make_foreign(library)
    else:
        library.write_bytes(b"" if spoil == "empty" else b"\x7fELF")
    assert get(root) == library
    assert answer_of(library) == 42


def test_cache_that_cannot_be_written(
    root: Path, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The per-user temporary folder takes its place; without that, one clear error."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TORCHCONV_CACHE_DIR", str(tmp_path / "file/cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    library = get(root)
    assert library.parent.parent.parent == tmp_path / "tmp"
    assert library.parent.parent.stat().st_mode & 0o077 == 0
    assert f"the cache cannot be {tmp_path / 'file/cache'} (" in capfd.readouterr().err
    assert get(root) == library
    assert capfd.readouterr().err == ""

    with monkeypatch.context() as patch:  # pytest itself needs the real one
        patch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
        message = refusal(root)
    assert f"no cache folder can be written: {tmp_path / 'file/cache'} (" in message
    assert "TORCHCONV_CACHE_DIR" in message


def test_temporary_cache_that_others_can_write_is_not_trusted(
    root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHCONV_CACHE_DIR", str(tmp_path / "file/cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = get(root)
    library.parent.parent.chmod(0o777)
    assert "another user can write to it" in refusal(root)


# --- several processes and threads ---------------------------------------------------------------


def test_two_processes_build_once(root: Path, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = write_compiler(tmp_path / "cxx", f"echo x >> '{log}'; sleep 0.5")
    processes = [start(root, CXX=compiler) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert len(log.read_text().split()) == 3
    assert sum("compiling its default kernels" in err for _, err in results) == 1


def test_threads_build_once(
    root: Path, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "_loaded", None)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(_load.load(root, NOWHERE))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(set(paths)) == 1
    assert _load.is_loaded() and _load.library_path() == paths[0]
    assert capfd.readouterr().err.count("compiling its") == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_build_that_is_stopped_leaves_nothing_in_the_way(
    root: Path, cache: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Also the lock of a killed process is free at once: the operating system held it."""
    started, go = tmp_path / "started", tmp_path / "go"
    slow = f"touch '{started}'; while [ ! -e '{go}' ]; do sleep 0.05; done"
    process = start(root, CXX=write_compiler(tmp_path / "cxx", slow))
    try:
        wait_for(started)
        process.send_signal(how)
        _, err = process.communicate(timeout=60) if how == signal.SIGINT else (process.wait(), "")
        left = [name for name in compiled(cache) if name.startswith(".")]
        assert bool(left) == (how == signal.SIGKILL)
        assert how != signal.SIGINT or "KeyboardInterrupt" in err
        make_sources(root, answer=3)  # another key: what the dead build left goes all the same
        library = get(root)
        assert answer_of(library) == 3
        assert compiled(cache) == [library.parent.name]
    finally:
        go.touch()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the orphans of the killed build
        except ProcessLookupError:
            pass
        process.communicate()


def test_lock_that_is_held_too_long_is_named(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    library = get(root)
    (lock_file,) = cache.glob("*.lock")
    library.with_suffix(".json").unlink()
    monkeypatch.setenv("TORCHCONV_BUILD_TIMEOUT", "0.2")
    with FileLock(lock_file):
        message = refusal(root)
    assert f"another process has held the lock {lock_file} for 0.2 seconds" in message
    assert f"(it holds {lock_file})" in capfd.readouterr().err
    monkeypatch.setenv("TORCHCONV_BUILD_TIMEOUT", "soon")
    assert "TORCHCONV_BUILD_TIMEOUT is 'soon'" in refusal(root)


def test_fork_after_load_and_while_a_thread_loads(root: Path, cache: Path) -> None:
    script = SCRIPT + (
        "import ctypes, os, threading\n"
        "def child(again):\n"
        "    if again: _load._loaded = None\n"
        "    same = _load.load(Path(sys.argv[1]), Path('/nonexistent')) == path\n"
        "    os._exit(0 if same and ctypes.CDLL(str(path)).torchconv_answer() == 42 else 1)\n"
        "def fork(again):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: child(again)\n"
        "    print('status', os.waitpid(pid, 0)[1])\n"
        "fork(False)\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with _load._mutex: held.set(); done.wait()\n"
        "threading.Thread(target=hold, daemon=True).start(); held.wait()\n"
        "fork(True)\n"
        "done.set()\n"
    )
    process = start(root, script)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("status 0") == 2, out


# --- python -m torchconv -------------------------------------------------------------------------


def test_report_prints_what_a_bug_report_needs_and_builds_nothing(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import torchconv
    from torchconv import __main__

    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert __main__.main([]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {what.strip(): value.strip() for what, value in rows.items()}
    assert rows["torchconv"].startswith(torchconv.__version__)
    assert rows["torch"].startswith(torch.__version__)
    assert rows["instruction set"] == _load.isa()
    assert rows["threads"].startswith(f"{torch.get_num_threads()} ")
    assert rows["compiler"] == "none: there is no C++ compiler (/nonexistent/c++: not found)"
    assert rows["CXX"] == "/nonexistent/c++"
    assert {"python", "system", "sources", "library for this CPU", "CUDA of PyTorch"} <= rows.keys()
    assert not cache.exists()


def test_report_says_why_outputs_cannot_grow(
    growing: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchconv import __main__

    library = get(growing)
    monkeypatch.setattr(_load, "library_path", lambda: library)
    assert __main__.main([]) == 0
    assert "cannot grow" not in capsys.readouterr().out
    (library.parent / "torchconv_growth.so").unlink()
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    assert "torchconv_growth.so (is missing: large outputs cannot grow in place)" in out


def test_build_hash_names_this_cpus_library(cache: Path) -> None:
    assert _load.build_hash() == _build.build_hash(_load.isa(), _build.source_root())
    assert len(_load.build_hash()) == 20
