"""Finding, compiling and opening the library in the ordinary way, and what is told of it.

Processes are started only where what one prints is looked at from the start.
"""

from __future__ import annotations

import os
import subprocess
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
)
from torchconv import _build, _load

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


def test_incremental_build_compiles_only_what_changed(
    root: Path, cache: Path, tmp_path: Path
) -> None:
    totals: list[tuple[int, int]] = []
    for _ in range(2):
        _build.compile_libraries(["default"], root, tmp_path / "b", lambda *n: totals.append(n))
        (root / "ops/same.cpp").write_text((root / "ops/same.cpp").read_text() + "\n")
    assert [total for _, total in totals] == [3, 3, 3, 2, 2]


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


def test_build_hash_names_this_cpus_library(cache: Path) -> None:
    assert _load.build_hash() == _build.build_hash(_load.isa(), _build.source_root())
    assert len(_load.build_hash()) == 20
