"""The libraries that are bound to one PyTorch: compiled along, and missed by nobody."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import pytest

from tiny_library import (
    answer_of,
    cache as cache,
    get,
    make_foreign,
    root as root,
)
from torchconv import _build, _load

EXPORT = 'extern "C" __attribute__((visibility("default")))'


@pytest.fixture
def growing(root: Path) -> Path:
    """Sources with a growth library, and a library that says whether it was handed over."""
    (root / "bound").mkdir()
    (root / "bound/growth.cpp").write_text(f"{EXPORT} void torchconv_let_grow(void*) {{}}\n")
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
    source = growing / "bound/growth.cpp"
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
    assert _build.bound_fault(growth) == ""
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
    assert _build.bound_fault(growth) == why
    assert get(growing, library.parent) == library
    assert answer_of(library) == 42 and not can_grow(library)


def test_growth_library_that_does_not_compile_costs_nothing_else(
    growing: Path, cache: Path
) -> None:
    (growing / "bound/growth.cpp").write_text("#error this PyTorch is too new\n")
    library = get(growing)
    assert sorted(path.name for path in library.parent.iterdir()) == [
        "torchconv_cpu_default.json", "torchconv_cpu_default.so",
    ]  # fmt: skip
    assert answer_of(library) == 42 and not can_grow(library)
    assert get(growing) == library


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
    assert "torchconv_recorded.so (is missing: small layers train more slowly)" in out
    assert "torchconv_watch.so (is missing: calls of fused networks take longer)" in out
