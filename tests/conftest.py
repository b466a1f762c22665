"""What every test file shares: seeds, devices, memory layouts and the size of an allowed error.

Values are compared with the same computation in float64, which is taken as the truth, because two
correct float32 convolutions differ from one another by more than either differs from it. The bounds
below are the product's stated accuracy, not numbers found by trial.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

import torchconv
import torchconv._load

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# These problems are tiny, and waiting for a second thread on a busy machine takes ten times as long
# as computing them. test_determinism shows that every number of threads gives the same bits.
torch.set_num_threads(1)

# A GPU would otherwise round float32 factors to TF32, and the float64 truth is compared at 1e-6.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

# Inductor keeps what it compiled by its source, and its source for one instruction set does not
# compile for another.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor-{capability}"))
    )

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if not torchconv._load.serves_cuda():
        return "torchconv has no CUDA library here, and no nvcc to compile one"
    return None


WHY_NO_CUDA = _why_no_cuda()
# Left out rather than skipped a thousand times; the header of the run says so, and why.
DEVICES = ("cpu",) if WHY_NO_CUDA else ("cpu", "cuda")
# A module's tests run on every device with `pytestmark = everywhere`; `cpu_only` excepts one that
# is about the CPU's library, or about what PyTorch cannot do on a GPU.
everywhere = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
cuda_only = pytest.mark.cuda_only


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], help="run only tests that have a device, on this one"
    )
    parser.addoption(
        "--within", type=float, help="skip the tests that would begin after so many seconds"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only: not on a GPU")
    config.addinivalue_line("markers", "cuda_only: only on a GPU")
    if config.getoption("--device") == "cuda" and WHY_NO_CUDA:
        raise pytest.UsageError(f"--device cuda: {WHY_NO_CUDA}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --device, files without tests for it: what they import need not be there."""
    if config.getoption("--device") is None or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    has_some = any(word in text for word in ("everywhere", "cuda_only", "device: str"))
    return None if has_some else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        one = metafunc.config.getoption("--device")
        devices = [d for d in DEVICES if one in (None, d)]
        if metafunc.definition.get_closest_marker("cuda_only"):
            devices = [d for d in devices if d == "cuda"]
        if metafunc.definition.get_closest_marker("cpu_only"):
            devices = [d for d in devices if d == "cpu"]
        metafunc.parametrize("device", devices, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    one = config.getoption("--device")
    if one is None:
        return

    def stays(item: pytest.Item) -> bool:
        named = getattr(getattr(item, "callspec", None), "params", {})
        return "device" in named or (one == "cuda" and bool(item.get_closest_marker("cuda_only")))

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]


_begun = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--within")
    if seconds is not None and time.monotonic() - _begun > seconds:
        pytest.skip("no time is left (--within)")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device that new tensors are on."""
    name = str(request.param)
    if name == "cpu":
        yield name
        return
    with torch.device(name):
        yield name
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        # Nothing more can run in this process. pytest-xdist reports the test and starts another.
        print(f"{request.node.nodeid}: the GPU is lost: {error}", file=sys.__stderr__, flush=True)
        if os.environ.get("PYTEST_XDIST_WORKER"):
            os._exit(86)
        pytest.exit(f"{request.node.nodeid}: the GPU is lost: {error}", returncode=86)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20250117)


def pytest_report_header() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = f"cpu (cuda is skipped: {WHY_NO_CUDA})" if WHY_NO_CUDA else "cpu, cuda"
    return (
        f"torchconv {torchconv.__version__}, torch {torch.__version__}, "
        f"CPU capability {capability}, devices: {devices}"
    )


# --- memory layouts ------------------------------------------------------------------------------


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _sliced(t: Tensor) -> Tensor:
    """Every other row and column of a larger array, from an odd start: a storage offset."""
    n, c, h, w = t.shape
    whole = torch.full((n, c, 2 * h, 2 * w + 1), 77, dtype=t.dtype, device=t.device)
    view = whole[:, :, ::2, 1::2]
    view.copy_(t)
    return view


def _sliced_channels_last(t: Tensor) -> Tensor:
    """Every other channel of a channels_last array: dense in no format, but channels last."""
    n, c, h, w = t.shape
    whole = _channels_last(torch.full((n, 2 * c, h, w), 77, dtype=t.dtype, device=t.device))
    view = whole[:, ::2]
    view.copy_(t)
    return view


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def _batch_inner(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def _offset(t: Tensor) -> Tensor:
    """Contiguous, but three elements into its storage: an address no vector load is aligned to."""
    whole = torch.full((t.numel() + 3,), 77, dtype=t.dtype, device=t.device)
    view = whole[3:].view(t.shape)
    view.copy_(t)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "transposed": _transposed,
    "batch_inner": _batch_inner,
    "offset": _offset,
}


def in_layout(t: Tensor, layout: str) -> Tensor:
    """t's values in a layout by name, as a leaf that asks for a gradient if t does."""
    laid = LAYOUTS[layout](t.detach())
    return laid.requires_grad_(t.requires_grad)


def to_numpy(t: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = t.detach().cpu().numpy()
    return array


def from_numpy(array: NDArray[Any]) -> Tensor:
    """On the device that new tensors are on."""
    return torch.from_numpy(array).to(torch.get_default_device())


# --- accuracy ------------------------------------------------------------------------------------

# ||out - truth|| / ||truth||, the product's promise for float32; float64 has 2^29 more.
NORM_BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}


def relative_error(out: Tensor, truth: Tensor, usual: float = 0.0) -> float:
    """The norm of the error against truth's, or against its usual size where that is larger."""
    truth = truth.detach().double()
    difference = float(torch.linalg.vector_norm(out.detach().double() - truth))
    size = max(float(torch.linalg.vector_norm(truth)), usual)
    return difference / size if size > 0 else difference


def assert_accurate(out: Tensor, truth: Tensor, *, roundings: int = 1, usual: float = 0.0) -> None:
    """out is the float64 truth up to the arithmetic of out's dtype.

    float32 and float64: the norm of the error against the norm of the truth, or against what that
    usually is, where the truth is few sums that may happen to cancel. The half types add up
    in float32 and round the sum, so every element is within half a unit in its last place
    (`roundings` of them, where an intermediate tensor has that dtype too) and the float32 bound on
    the sum.
    """
    assert out.shape == truth.shape, (out.shape, truth.shape)
    assert out.device == truth.device
    if out.numel() == 0:
        return
    if out.dtype in NORM_BOUND:
        error = relative_error(out, truth, usual)
        assert error <= NORM_BOUND[out.dtype], f"relative error {error:.2e} in {out.dtype}"
        return
    info = torch.finfo(out.dtype)
    truth = truth.double()
    # smallest_normal * eps is one subnormal step, the spacing near zero.
    allowed = roundings * (0.5 * info.eps * truth.abs() + info.smallest_normal * info.eps)
    allowed += 4e-6 * truth.abs().max()
    excess = ((out.double() - truth).abs() - allowed).max()
    assert excess <= 0, f"an element is {float(excess):.2e} past its rounding in {out.dtype}"


def assert_same(out: Tensor, expected: Tensor) -> None:
    """The same bits (any NaN equals any NaN), dtype and strides."""
    assert out.dtype == expected.dtype
    assert out.shape == expected.shape
    assert out.stride() == expected.stride(), (out.stride(), expected.stride())
    assert torch.equal(torch.isnan(out), torch.isnan(expected))
    assert torch.equal(torch.where(out == out, out, 0), torch.where(out == out, expected, 0))
    if out.is_floating_point():
        numbers = out == out
        assert torch.equal(out[numbers].signbit(), expected[numbers].signbit()), "sign of a zero"


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Network(torch.nn.Module):
    """A few layers that a test's own `forward` puts together."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: torch.nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.steps = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def assert_fakes_equal_real(op: Any, arguments: Any) -> None:
    """Size, dtype and exact strides of every output, from fake and from meta tensors."""
    detached = tree_map_only(Tensor, Tensor.detach, arguments)
    real = tree_flatten(op(*detached))[0]
    with FakeTensorMode() as mode:
        faked = tree_map_only(Tensor, mode.from_tensor, detached)
        fake = tree_flatten(op(*faked))[0]
    meta_arguments = tree_map_only(Tensor, lambda t: t.to("meta"), detached)
    meta = tree_flatten(op(*meta_arguments))[0]
    for out, *predictions in zip(real, fake, meta, strict=True):
        for prediction in predictions:
            assert prediction.dtype == out.dtype
            assert prediction.shape == out.shape
            assert prediction.stride() == out.stride()
