"""What is shipped: the sdist and the wheel hold everything that a build or the JIT reads.

Both are built from a copy of the tree with the hooks that pip calls, sources only, so nothing is
compiled; the tag of a wheel with libraries is read from a build with one-line sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = re.escape("torchconv-") + r"\d+\.\d+\.\d+"


def copy_tree(target: Path) -> Path:
    """The files that packaging reads, with what a working tree may hold besides."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    if (ROOT / "CHANGELOG.md").exists():
        shutil.copy(ROOT / "CHANGELOG.md", target)
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "torchconv", target / "torchconv", ignore=ignored)
    shutil.copytree(ROOT / "csrc", target / "csrc")
    for stray in (
        "tests/test_stray.py",
        "torchconv/stray.so",
        "torchconv/lib/stray.so",
        "csrc/x.o",
    ):
        (target / stray).parent.mkdir(parents=True, exist_ok=True)
        (target / stray).write_text("")
    return target


def run_hook(tree: Path, hook: str, out: Path, **environment: str) -> Path:
    """Calls a PEP 517 hook as a frontend does: in the tree, in a process of its own."""
    out.mkdir(exist_ok=True)
    script = f"import setuptools.build_meta as m; print(m.{hook}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


def csrc_files(root: Path) -> set[str]:
    """Every file of csrc that git would keep."""
    files = (path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*"))
    return {name for name in files if Path(name).suffix not in ("", ".o")}


def python_files() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchconv").glob("*.py")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


def test_sdist_holds_what_a_build_reads(tree: Path, tmp_path: Path) -> None:
    path = run_hook(tree, "build_sdist", tmp_path / "dist", TORCHCONV_SOURCES_ONLY="1")
    assert re.fullmatch(NAME + r"\.tar\.gz", path.name)
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = csrc_files(ROOT) | python_files()
    needed |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "torchconv/py.typed"}
    assert needed <= names, sorted(needed - names)
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith("tests")]


def test_wheel_of_an_unpacked_sdist_holds_what_the_jit_reads(tree: Path, tmp_path: Path) -> None:
    """As pip does for a user: sdist, then the wheel from it."""
    sdist = run_hook(tree, "build_sdist", tmp_path / "dist", TORCHCONV_SOURCES_ONLY="1")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = run_hook(unpacked, "build_wheel", tmp_path / "dist", TORCHCONV_SOURCES_ONLY="1")
    assert re.fullmatch(NAME + r"-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        wheel_info = archive.read(next(n for n in names if n.endswith("/WHEEL"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    needed = {f"torchconv/{name}" for name in csrc_files(ROOT)} | python_files()
    needed |= {"torchconv/py.typed"}
    assert needed <= names, sorted(needed - names)
    package = {name for name in names if not re.match(NAME + r"\.dist-info/", name)}
    assert package <= needed, sorted(package - needed)
    assert "Root-Is-Purelib: true" in wheel_info
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: BSD-3-Clause" in metadata
    assert {"torch>=2.10", "filelock", "tqdm", "ninja"} == set(
        re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    )


def test_wheel_from_a_working_tree_leaves_out_what_lies_around(tree: Path, tmp_path: Path) -> None:
    wheel = run_hook(tree, "build_wheel", tmp_path / "dist", TORCHCONV_SOURCES_ONLY="1")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if "tests" in name]


def test_wheel_with_libraries_is_for_any_python(tree: Path, tmp_path: Path) -> None:
    """The tag promises one binary for every Python: no library may need libpython."""
    small = tmp_path / "small"
    shutil.copytree(tree, small, ignore=shutil.ignore_patterns("csrc", "build", "*.egg-info"))
    for name in ("ops", "cpu"):  # one name in two folders, as in the real tree
        (small / "csrc" / name).mkdir(parents=True)
        (small / "csrc" / name / "same.cpp").write_text(f"int torchconv_{name}() {{ return 1; }}")
    shutil.copytree(tree / "csrc" / "bound", small / "csrc" / "bound")
    wheel = run_hook(small, "build_wheel", tmp_path / "dist")
    assert re.fullmatch(NAME + r"-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    libraries = sorted((tmp_path / "unpacked/torchconv/lib").glob("*.so"))
    names = [path.name for path in libraries]
    assert "torchconv_cpu_default.so" in names and "torchconv_growth.so" in names
    for library in libraries:
        assert library.with_suffix(".json").is_file()
        assert b"libpython" not in library.read_bytes()
        assert b"libtorch_python" not in library.read_bytes()


def test_setup_without_torch_ships_the_sources(tree: Path, tmp_path: Path) -> None:
    """`pip install .` builds where there is no PyTorch: setup.py must not need it."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        f"import setuptools.build_meta as m; print(m.build_wheel({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].endswith("-py3-none-any.whl")


def test_unknown_instruction_set_is_refused(tree: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"], cwd=tree, capture_output=True, text=True,
        env={**os.environ, "TORCHCONV_ISAS": "avx1024"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "TORCHCONV_ISAS: avx1024" in done.stderr
