"""How the library for GPUs is described: compiler, architectures, flags. Without GPU and nvcc."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from torchconv import _build, _load, _toolchain

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


def built_library(folder: Path, architectures: tuple[str, ...]) -> Path:
    """What passes for a library of these sources."""
    folder.mkdir()
    library = folder / _build.library_name(_build.CUDA)
    library.write_bytes(b"code")
    checksum = hashlib.sha256(b"code").hexdigest()
    source_hash = _build.source_hash(_build.CUDA, ROOT)
    record = _build.Record(source_hash, "", "", "", checksum, architectures)
    _build.record_path(library).write_text(json.dumps(asdict(record)))
    return library


def test_compiler_of_the_toolkit(toolkit: Path) -> None:
    assert _toolchain.nvcc() == toolkit / "bin" / "nvcc"
    assert "release 13.0" in _toolchain.nvcc_version()
    assert _toolchain.cuda_toolkit() == toolkit


def test_compiler_of_another_cuda(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(
        _toolchain.BuildError, match=r"CUDA 13\.0.*of CUDA 12\.8(.|\n)*toolkit 12\.8"
    ):
        _toolchain.nvcc_version()


def test_compiler_that_does_not_start(toolkit: Path) -> None:
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    message = r"the CUDA compiler does not start(.|\n)*variable CUDA_HOME"
    with pytest.raises(_toolchain.BuildError, match=message):
        _toolchain.nvcc_version()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_toolchain.BuildError, match="CUDA_HOME has no nvcc"):
        _toolchain.nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(_toolchain.shutil, "which", lambda name: None)
    with pytest.raises(_toolchain.BuildError, match="there is no CUDA compiler"):
        _toolchain.nvcc()


def test_tensors_are_left_to_pytorch_without_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "prebuilt_dir", lambda: tmp_path / "lib")
    monkeypatch.setattr(_load, "cache_dirs", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not _load.serves_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not _load.serves_cuda()
    library = built_library(tmp_path / "lib", ("9.0",))
    assert _load.serves_cuda()
    library.write_bytes(b"of other sources, say")
    assert not _load.serves_cuda()


def test_tensors_are_left_to_pytorch_of_another_cuda(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "prebuilt_dir", lambda: tmp_path / "lib")
    monkeypatch.setattr(_load, "cache_dirs", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _load.serves_cuda()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert not _load.serves_cuda()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX 10.0a")
    listed = _toolchain.cuda_architectures()
    assert listed == ("8.0", "9.0+PTX", "10.0a")
    assert [flag for flag in _build.nvcc_flags(listed) if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_100a,code=sm_100a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(_toolchain.BuildError, match="'Hopper'"):
        _toolchain.cuda_architectures()


@pytest.mark.parametrize(
    "architectures, runs",
    [
        (("8.0",), [(8, 0), (8, 6), (8, 9)]),
        (("8.6",), [(8, 6), (8, 9)]),
        (("9.0",), [(9, 0)]),
        (("9.0a+PTX",), [(9, 0)]),
        (("10.0f",), [(10, 0), (10, 3)]),
        (("8.0+PTX", "9.0a"), [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]),
        ((), []),
    ],
)
def test_which_gpus_run_a_library(
    architectures: tuple[str, ...], runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability in every:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        fault = _toolchain.gpus_fault(architectures)
        assert (fault == "") == (capability in runs), capability
        assert fault == "" or fault.endswith(f"the GPU here is {capability[0]}.{capability[1]}")


def test_library_for_another_gpu_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_library(tmp_path / "lib", ("8.0",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_load, "cache_dirs", lambda: [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(
        _toolchain.BuildError, match=r"is for GPUs of 8\.0, and the GPU here is 9\.0"
    ):
        _load._open(_build.CUDA, ROOT, tmp_path / "lib")


def test_architectures_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _toolchain.cuda_architectures() == _toolchain.CUDA_ARCHITECTURES


def test_cutlass_is_named_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCONV_CUTLASS_DIR", str(tmp_path))
    assert _toolchain.cutlass_includes() == []
    assert "-DTORCHCONV_CUTLASS" not in _build.nvcc_flags(("9.0",))
    (tmp_path / "include").mkdir()
    assert _toolchain.cutlass_includes() == [tmp_path / "include"]
    assert "-DTORCHCONV_CUTLASS" in _build.nvcc_flags(("9.0",))


def test_ninja_file(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator is compiled twice, and only the kernels by nvcc."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    text = _build.ninja_file(["default", _build.CUDA], ROOT)
    assert "build default/ops.o: compile" in text
    assert "build cuda/ops.o: compile" in text
    assert "build cuda/cuda/avg_pool2d.cu.o: nvcc" in text
    assert "default/cuda" not in text and "cuda/cpu" not in text
    assert f"build {_build.library_name(_build.CUDA)}: link_cuda" in text


def test_source_hashes_differ(tmp_path: Path) -> None:
    assert _build.source_hash(_build.CUDA, ROOT) != _build.source_hash("default", ROOT)
