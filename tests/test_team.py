"""Threads that stay together for the loops of a chain: csrc/core/team.h by itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which("c++")
# Threads, one range after another, all as one: see team.cpp.
POOLS = range(3)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=["", "thread"])
def team(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A program of its own, plain and with the sanitizer of threads where the compiler has it."""
    folder = tmp_path_factory.mktemp("team")
    assert COMPILER is not None
    sanitizer = [f"-fsanitize={request.param}"] if request.param else []
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}")
    probe = [COMPILER, *sanitizer, "-o", str(folder / "empty"), str(empty)]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"the compiler does not take {sanitizer}")
    program = folder / "team"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Werror", f"-I{SOURCES}"]
        + [*sanitizer, "-o", str(program)]
        + [str(HERE / "team.cpp"), str(SOURCES / "core" / "team.cpp")],
        check=True,
    )
    yield program


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("of_pool", "threads"), [(2, 2), (5, 5), (2, 5), (16, 16)])
def test_each_element_is_reached_once(team: Path, pool: int, of_pool: int, threads: int) -> None:
    arguments = [str(n) for n in (pool, of_pool, threads, 50)]
    subprocess.run([str(team), "loops", *arguments], check=True, timeout=300)


@pytest.mark.parametrize("pool", POOLS)
def test_failure_is_the_leaders(team: Path, pool: int) -> None:
    subprocess.run([str(team), "failure", str(pool), "3"], check=True, timeout=300)
