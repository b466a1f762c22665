"""Compiling and opening the library where something is missing or broken, or others are at it too:
what goes wrong on users' machines, one test each.

Processes are started only where one has to be killed, interrupted or forked.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest

from tiny_library import (
    NOWHERE,
    SCRIPT,
    answer_of,
    cache as cache,
    compiled,
    get,
    make_foreign,
    make_sources,
    root as root,
    start,
    wait_for,
    write_compiler,
)
from torchconv import _build, _load, _toolchain

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


def test_clang_is_told_by_its_macros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its version's text, which names gcc here and some vendor's compiler elsewhere."""
    macros = "#define __GNUC__ 4\\n#define __clang__ 1\\n#define __clang_major__ 9"
    says = f'case "$*" in *-dM*) printf "{macros}\\n"; exit 0;; *) exit 1;; esac'
    compiler = write_compiler(tmp_path / "vendor", says)
    monkeypatch.setenv("CXX", compiler)
    assert "clang 9" in _toolchain.age_fault([compiler])
    assert _build.DRIVER_FLAGS["clang"] in _build.optimization(_build.source_root()).values()


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
    compiles = f"""case "$*" in *" -o "*) echo x >> '{log}'; sleep 0.5;; esac"""
    compiler = write_compiler(tmp_path / "cxx", compiles)
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
