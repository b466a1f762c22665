"""Packed weights that layers in eval mode keep: the same bits, and never stale."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.nn.utils import parametrizations

import torchconv
import torchconv.functional as F
from conftest import in_layout
from dispatch_log import DispatchLog
from torchconv import nn
from torchconv._dispatch import Operator

SIZE = (2, 32, 10, 11)


def layer(channels: int = 32, filters: int = 32, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, padding=kernel // 2, **kwargs).eval()


def kept(module: nn.Conv2d) -> int:
    """Bytes of packed weights."""
    return 0 if module._packed_weights is None else module._packed_weights.bytes()


def unpacked(module: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.conv2d(
            *(x, module.weight, module.bias, module.stride, module.padding, module.dilation),
            module.groups,
            activation=module.activation,
            flip_kernel=module.flip_kernel,
        )


def assert_fresh(module: nn.Conv2d, x: Tensor | None = None) -> None:
    """The layer computes what its weights say, to the bit, also from what it keeps."""
    if x is None:
        x = torch.randn(SIZE, dtype=module.weight.dtype)
    expected = unpacked(module, x)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)


@pytest.fixture
def packed() -> Iterator[nn.Conv2d]:
    """A layer that keeps weights."""
    module = layer()
    assert_fresh(module)
    assert kept(module) > 0
    yield module


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"channels": 35, "filters": 37},
        {"channels": 130, "filters": 256},
        {"kernel": 1},
        {"kernel": 1, "channels": 40, "filters": 50, "stride": 2},
        {"kernel": 5, "stride": 2},
        {"stride": 2},
        {"channels": 3, "filters": 64, "kernel": 7, "stride": 2},
        {"dilation": 2},
        {"channels": 3, "filters": 20, "kernel": 7, "stride": 2},
        {"channels": 3, "filters": 40, "kernel": 7, "stride": 2},
        {"groups": 2},
        {"groups": 32},
        {"flip_kernel": True, "activation": "relu", "bias": False},
    ],
    ids=str,
)
def test_same_bits(arguments: dict[str, Any], dtype: torch.dtype, layout: str) -> None:
    """In every layout, alone and in a batch, for one thread and two."""
    module = layer(**arguments).to(dtype)
    x = torch.randn(3, module.in_channels, 17, 16, dtype=dtype)
    x = x.to(memory_format=getattr(torch, f"{layout}_format".replace("last_format", "last")))
    assert_fresh(module, x)
    assert_fresh(module, x[1:2])
    if dtype == torch.float32:
        assert (kept(module) > 0) == (module.groups < 32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads if threads < 3 else 1)
        assert_fresh(module, x)
    finally:
        torch.set_num_threads(threads)


def test_infinity_and_nan(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    x[0, 3, 4, 5], x[1, 0, 0, 0] = torch.inf, torch.nan
    expected = unpacked(packed, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), expected, rtol=0, atol=0, equal_nan=True)


def test_unbatched_and_empty(packed: nn.Conv2d) -> None:
    assert_fresh(packed, torch.randn(SIZE[1:]))
    assert_fresh(packed, torch.randn(0, *SIZE[1:]))


# --- when weights are kept -----------------------------------------------------------------------


def test_only_inference_keeps() -> None:
    module, x = layer(), torch.randn(SIZE)
    y = module(x)
    assert y.requires_grad and kept(module) == 0
    module.train()
    with torch.no_grad():
        module(x)
    assert kept(module) == 0
    module.eval()
    module.requires_grad_(False)
    assert module(x.requires_grad_()).requires_grad and kept(module) == 0
    assert not module(x.detach()).requires_grad and kept(module) > 0
    module.train()
    assert "_packed_weights" not in vars(module)


def test_gradients_after_inference(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None and packed.weight.grad is not None


def test_inference_mode(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    with torch.inference_mode():
        packed.weight.mul_(2)
        y = packed(x)
        assert y.is_inference()
    assert torch.equal(y, unpacked(packed, x))
    with torch.inference_mode():
        module = layer()
        assert module.weight.is_inference()
        for _ in range(2):
            assert torch.equal(module(x), unpacked(module, x))
            module.weight[0, 0, 0, 0] += 1
    assert kept(module) == 0


def test_weights_in_shared_memory(packed: nn.Conv2d) -> None:
    """Another process may change them, which this one does not count."""
    packed.weight.share_memory_()
    assert_fresh(packed)
    assert kept(packed) == 0
    other = layer().share_memory()
    assert_fresh(other)
    assert kept(other) == 0


def test_autocast_and_subclasses_keep_nothing() -> None:
    module, x = layer(), torch.randn(SIZE)

    class Watched(Tensor):
        pass

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        module(x.as_subclass(Watched))
    assert kept(module) == 0


def test_switch(packed: nn.Conv2d) -> None:
    assert torchconv.backends.packed_weights_kept()
    torchconv.drop_packed_weights(torch.nn.Sequential(packed, torch.nn.ReLU()))
    with torchconv.backends.keep_packed_weights(False):
        assert not torchconv.backends.packed_weights_kept()
        assert_fresh(packed)
        assert kept(packed) == 0
    assert_fresh(packed)
    assert kept(packed) > 0


# --- never stale ---------------------------------------------------------------------------------


def by_optimizer(module: nn.Conv2d) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.randn(SIZE)).square().sum().backward()
    optimizer.step()


def by_load_state_dict(module: nn.Conv2d) -> None:
    module.load_state_dict(layer().state_dict())


def by_assigning_a_state_dict(module: nn.Conv2d) -> None:
    module.load_state_dict(layer().state_dict(), assign=True)


def by_new_parameter(module: nn.Conv2d) -> None:
    module.weight = Parameter(torch.randn_like(module.weight))


def by_parameter_of_the_same_memory(module: nn.Conv2d) -> None:
    """Its count of changes is another one."""
    other = Parameter(module.weight.data)
    with torch.no_grad():
        while other._version < module.weight._version:
            other[0, 0, 0, 0] += 1
        other[0, 0, 0, 0] += 1
        module.weight[0, 0, 0, 1] += 1
    module.weight = other


def by_assigning_data(module: nn.Conv2d) -> None:
    module.weight.data = torch.randn_like(module.weight)


def by_assigning_data_twice(module: nn.Conv2d) -> None:
    """The second may come to lie where the first weights were."""
    for _ in range(2):
        module.weight.data = torch.zeros_like(module.weight)
    module.weight.data = torch.randn_like(module.weight)


def by_writing_data(module: nn.Conv2d) -> None:
    """As averages of weights (EMA) and target networks do."""
    module.weight.data.mul_(0.5).add_(1)


def by_negating_data(module: nn.Conv2d) -> None:
    """Flips one bit of many words, an even number of them in each lane of a checksum."""
    module.weight.data.view(-1)[:4096].neg_()


def by_writing_one_element_of_data(module: nn.Conv2d) -> None:
    module.weight.data[-1, 3, 2, 1] += 5


def by_clipping_data(module: nn.Conv2d) -> None:
    most = float(module.weight.abs().max()) * 0.999
    module.weight.data.clamp_(-most, most)


def by_a_vector_of_all_parameters(module: nn.Conv2d) -> None:
    vector = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(vector, module.parameters())
    assert_fresh(module)
    vector[1001] += 5


def by_reset_parameters(module: nn.Conv2d) -> None:
    module.reset_parameters()


def by_one_element(module: nn.Conv2d) -> None:
    with torch.no_grad():
        module.weight[7, 5, 1, 2] += 1


def by_memory_format(module: nn.Conv2d) -> None:
    module.to(memory_format=torch.channels_last)


def by_dtype(module: nn.Conv2d) -> None:
    module.double()


def by_dtype_and_back(module: nn.Conv2d) -> None:
    module.bfloat16().float()


def by_geometry(module: nn.Conv2d) -> None:
    module.stride, module.flip_kernel = (2, 1), True


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_noticed(change: Callable[[nn.Conv2d], None]) -> None:
    for _ in range(3):  # memory that was freed is used again
        module = layer()
        assert_fresh(module)
        before = kept(module)
        assert before > 0
        change(module)
        assert_fresh(module)
        # Two forms of the same weights, or elements of twice the size.
        most = 2 if change in (by_geometry, by_dtype) else 1
        assert kept(module) <= most * before  # nothing stale


def by_activation(module: nn.Conv2d) -> None:
    module.activation = "relu"


def by_padding(module: nn.Conv2d) -> None:
    module.padding = (0, 2)


def by_padding_mode(module: nn.Conv2d) -> None:
    module.padding_mode = "reflect"


def by_new_bias(module: nn.Conv2d) -> None:
    module.bias = Parameter(torch.randn_like(module.bias))


def by_no_bias(module: nn.Conv2d) -> None:
    module.bias = None


def by_writing_bias(module: nn.Conv2d) -> None:
    module.bias.data.add_(1)


def by_parametrizing_bias(module: nn.Conv2d) -> None:
    torch.nn.utils.parametrize.register_parametrization(module, "bias", torch.nn.Softplus())


@pytest.mark.parametrize(
    "change",
    [
        *(by_activation, by_padding, by_padding_mode, by_new_bias, by_no_bias, by_writing_bias),
        by_parametrizing_bias,
    ],
    ids=lambda f: f.__name__,
)
def test_arguments_are_not_stale(packed: nn.Conv2d, change: Callable[[nn.Conv2d], None]) -> None:
    """The layer remembers the operator's arguments, too."""
    change(packed)
    x = torch.randn(SIZE)
    images, padding = x, packed.padding
    if packed.padding_mode == "reflect":
        images, padding = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 0
    for _ in range(2):
        with torch.no_grad():
            actual = packed(x)
            expected = F.conv2d(
                *(images, packed.weight, packed.bias, packed.stride, padding),
                activation=packed.activation,
            )
        assert torch.equal(actual, expected)


def test_other_images(packed: nn.Conv2d) -> None:
    """Sizes and gradients after a call that was remembered; and what is refused still is."""
    for size in ((1, 32, 7, 9), (3, 32, 20, 4), (32, 8, 8), (0, 32, 8, 8)):
        assert_fresh(packed, torch.randn(size))
    assert packed(torch.randn(SIZE)).requires_grad
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="should be the same"):
            packed(torch.randn(SIZE).double())
        with pytest.raises(RuntimeError, match="32 channels"):
            packed(torch.randn(2, 31, 8, 8))
        with pytest.raises(TypeError):
            packed([1.0])


def test_steps_of_a_subclass() -> None:
    class Doubling(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(2 * input, weight, bias)

    x = torch.randn(SIZE)
    module = Doubling(32, 32, 3, padding=1).eval()
    plain = layer()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = plain(2 * x)
        for _ in range(3):
            assert torch.equal(module(x), expected)
    own: Any = plain
    own._conv_forward = lambda input, weight, bias: input
    with torch.no_grad():
        assert own(x) is x


def test_winograd_switch(packed: nn.Conv2d) -> None:
    with torchconv.backends.allow_winograd(False):
        assert_fresh(packed)
    assert_fresh(packed)


def test_change_between_two_calls_of_one_graph() -> None:
    """A layer that is called twice with its weights changed in between."""
    module, x = layer(), torch.randn(SIZE)
    with torch.no_grad():
        first = module(x)
        module.weight.neg_()
        bias = module.bias.view(-1, 1, 1)
        torch.testing.assert_close(module(x) - bias, bias - first, atol=1e-4, rtol=1e-4)


def test_bias_is_not_packed(packed: nn.Conv2d) -> None:
    with torch.no_grad():
        packed.bias.data.add_(1)
    assert_fresh(packed)


def test_computed_weights_are_not_kept() -> None:
    """weight_norm and the like make new weights in every call."""
    module = parametrizations.weight_norm(layer())
    for _ in range(3):
        assert_fresh(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.add_(1)
    assert kept(module) == 0


def test_functional_call(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    for _ in range(3):
        other = {"weight": torch.randn_like(packed.weight), "bias": torch.zeros(32)}
        with torch.no_grad():
            y = torch.func.functional_call(packed, other, (x,))
            assert torch.equal(y, F.conv2d(x, other["weight"], other["bias"], padding=1))
    assert_fresh(packed)


# --- sizes and threads ---------------------------------------------------------------------------


def test_images_of_many_sizes_share() -> None:
    module = layer()
    assert_fresh(module)
    before = kept(module)
    for size in range(8, 20):
        assert_fresh(module, torch.randn(1, 32, size, 11))
    assert kept(module) == before > 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("groups", "kernel", "stride"), [(2, 5, 2), (2, 3, 3), (2, 2, 2), (1, 5, 2), (1, 2, 3)]
)
def test_image_of_one_output(groups: int, kernel: int, stride: int, layout: str) -> None:
    """All taps reach an image of the kernel's size, but no step is ever taken."""
    module = nn.Conv2d(16, 16, kernel, stride=stride, groups=groups).eval()
    for size in (20, kernel, 21):
        x = torch.randn(1, 16, size, size)
        assert_fresh(module, in_layout(x, layout))


def test_a_bounded_number_of_forms() -> None:
    """Small images, which some taps never reach, have forms of their own."""
    module = layer(kernel=9)
    sizes = []
    for size in (12, 4, 3, 2, 1):
        x = torch.randn(1, 32, size, size).to(memory_format=torch.channels_last)
        assert_fresh(module, x)
        sizes.append(kept(module))
    assert 0 < sizes[0] and max(sizes) <= 2 * sizes[0] and sizes[-1] < sizes[0]


def test_channels_last_and_contiguous_in_turn(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    for _ in range(2):
        assert_fresh(packed, x)
        assert_fresh(packed, x.to(memory_format=torch.channels_last))


def test_threads() -> None:
    """Threads that call one layer while its weights change from one barrier to the next."""
    module, x, count = layer(), torch.randn(SIZE), 4
    barrier = threading.Barrier(count, timeout=60)
    wrong: list[Any] = []

    def run(index: int) -> None:
        try:
            for round in range(6):
                if index == 0:
                    with torch.no_grad():
                        module.weight.add_(0.1)
                    expected.append(unpacked(module, x))
                barrier.wait()
                with torch.no_grad():
                    for _ in range(5):
                        if not torch.equal(module(x), expected[-1]):
                            wrong.append(round)
                barrier.wait()
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    expected: list[Tensor] = []
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_is_given_back() -> None:
    def allocated() -> int:
        gc.collect()
        return torchconv.memory_stats()["allocated"]

    module = layer(128, 128)
    before = allocated()
    assert_fresh(module, torch.randn(1, 128, 9, 9))
    assert kept(module) > 2**20
    assert allocated() >= before + kept(module)
    copy_ = copy.copy(module._packed_weights)
    del module
    assert allocated() == before
    assert copy_ is not None and copy_.bytes() == 0


# --- no part of the layer's state ----------------------------------------------------------------


def test_state(packed: nn.Conv2d) -> None:
    fresh = layer()
    assert list(packed.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in packed.named_buffers()] == []
    assert len(pickle.dumps(packed)) == len(pickle.dumps(fresh))
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (
        pickle.loads(pickle.dumps(packed)),
        copy.deepcopy(packed),
        copy.copy(packed),
        loaded,
    ):
        assert "_packed_weights" not in vars(other)
        assert_fresh(other)
    with torch.no_grad():
        other = copy.deepcopy(packed)
        other.weight.zero_()
    assert_fresh(other)
    assert_fresh(packed)


def test_converted_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1)).eval()
    torchconv.convert(model)
    module: Any = model[0]
    assert_fresh(module)
    assert kept(module) > 0
    torchconv.restore(model)
    assert type(module) is torch.nn.Conv2d
    assert vars(module).keys() == vars(torch.nn.Conv2d(1, 1, 1)).keys()


def test_traces_hold_the_plain_operator(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    expected = unpacked(packed, x)
    with torch.no_grad():
        exported = torch.export.export(packed, (x,))
        graphs: list[Any] = [
            torch.fx.symbolic_trace(packed),
            make_fx(packed)(x),
            exported.module(),
        ]
        traced = torch.jit.trace(packed, x)
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        assert "settings" not in str(traced.graph)
        for function in (*graphs, traced, compiled):
            assert torch.equal(function(x), expected)
        for graph in graphs:
            assert "settings" not in graph.code
        with DispatchLog() as log:
            packed(x)
        assert log.names == ["torchconv::conv2d"]
        mapped = torch.func.vmap(packed)(x[None])
        assert torch.equal(mapped[0], expected)


# --- the operator --------------------------------------------------------------------------------


def test_operator_with_any_owner() -> None:
    """An owner that does not exist has nothing kept, and the result is conv2d's."""
    x, w = torch.randn(SIZE), torch.randn(32, 32, 3, 3)
    expected = torch.ops.torchconv.conv2d(x, w)
    values = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "none", False)
    for owner in (0, -1, 2**62):
        settings = Operator("conv2d").settings((*values, owner, 0))
        got = torch.ops.torchconv.conv2d.settings(x, w, None, None, settings)
        assert torch.equal(got, expected)
