"""The examples run: a few steps of each, in a process of its own as a user would start it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = ("matplotlib", "sklearn", "tabulate", "pytorchcv")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"the examples need {', '.join(NEEDED)}",
)


def start(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -m puts the working folder on the path, where an uninstalled torchconv is found.
    return subprocess.run(
        [sys.executable, "-m", f"examples.{script}", *arguments],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_photos() -> None:
    done = start("photos", "--repeats", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "features.init_block.conv.conv" in done.stdout
    assert "Restored" in done.stdout


def test_digits_draws_its_pictures_and_fails_when_it_falls_short(tmp_path: Path) -> None:
    done = start("digits", "--epochs", "1", "--output", str(tmp_path / "pictures"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "falls short of 97%" in done.stderr
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(pictures) == {
        "digits_training.png",
        "digits_filters.png",
        "digits_feature_maps.png",
        "digits_exciting_windows.png",
    }
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_bad_arguments_are_refused() -> None:
    for script, arguments in (("photos", ("--repeats", "0")), ("digits", ("--epochs", "0"))):
        done = start(script, *arguments)
        assert done.returncode == 2
        assert "at least 1, got 0" in done.stderr
