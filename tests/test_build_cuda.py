"""How the library for GPUs is described: compiler, architectures, flags. Without GPU and nvcc."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from torchconv import _build, _load

ROOT = _build.source_root()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit whose nvcc says that it is of CUDA 13.0."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    return nvcc.parent.parent


def test_compiler_of_the_toolkit(toolkit: Path) -> None:
    assert _build.nvcc() == toolkit / "bin" / "nvcc"
    assert "release 13.0" in _build.nvcc_version()
    assert _build.cuda_toolkit() == toolkit


def test_compiler_of_another_cuda(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(_build.BuildError, match=r"CUDA 13\.0.*of CUDA 12\.8(.|\n)*toolkit 12\.8"):
        _build.nvcc_version()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match="CUDA_HOME has no nvcc"):
        _build.nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(_build.shutil, "which", lambda name: None)
    with pytest.raises(_build.BuildError, match="there is no CUDA compiler"):
        _build.nvcc()


def test_tensors_are_left_to_pytorch_without_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "prebuilt_dir", lambda: tmp_path / "lib")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not _load.serves_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not _load.serves_cuda()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / _build.library_name(_build.CUDA)).touch()
    assert _load.serves_cuda()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX 10.0a")
    listed = _build.cuda_architectures()
    assert listed == ("8.0", "9.0+PTX", "10.0a")
    assert [flag for flag in _build.nvcc_flags(listed) if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_100a,code=sm_100a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(_build.BuildError, match="'Hopper'"):
        _build.cuda_architectures()


def test_architectures_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _build.cuda_architectures() == _build.CUDA_ARCHITECTURES


def test_cutlass_is_named_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCONV_CUTLASS_DIR", str(tmp_path))
    assert _build.cutlass_includes() == []
    assert "-DTORCHCONV_CUTLASS" not in _build.nvcc_flags(("9.0",))
    (tmp_path / "include").mkdir()
    assert _build.cutlass_includes() == [tmp_path / "include"]
    assert "-DTORCHCONV_CUTLASS" in _build.nvcc_flags(("9.0",))


def test_ninja_file(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator is compiled twice, and only the kernels by nvcc."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    text = _build.ninja_file(["default", _build.CUDA], ROOT)
    assert "build default/ops/conv2d.o: compile" in text
    assert "build cuda/ops/conv2d.o: compile" in text
    assert "build cuda/cuda/avg_pool2d.cu.o: nvcc" in text
    assert "default/cuda" not in text and "cuda/cpu" not in text
    assert f"build {_build.library_name(_build.CUDA)}: link_cuda" in text


def test_source_hashes_differ(tmp_path: Path) -> None:
    assert _build.source_hash(_build.CUDA, ROOT) != _build.source_hash("default", ROOT)
