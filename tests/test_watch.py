"""What csrc/bound/watch.cpp sees: each change of what it watches, and no other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from torchconv import _build, _load, _watch
from torchconv._watch import Attribute, Instance, Table, Watch, WatchedTensor, can_watch

_load.load()
pytestmark = pytest.mark.skipif(_load.watching is None, reason="no library for this PyTorch")


@pytest.fixture(params=[True, False], ids=["versions", "no versions"], autouse=True)
def versions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not request.param:
        monkeypatch.setattr(_watch, "_have_versions", lambda: False)
    yield


class Thing:
    def __init__(self) -> None:
        self.size: Any = (3, 4)
        self.name = "thing"

    def change(self) -> None:
        self.name = "other"


class Other(Thing):
    pass


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def watch_of(thing: Thing) -> Watch:
    values = vars(thing)
    table = Table(
        values, len(values), (("name", thing.name),), (("size", thing.size),), ("forward",)
    )
    return Watch([Instance(thing, type(thing), values)], [table], [], [])


def of_another_class(thing: Any) -> None:
    thing.__class__ = Other


def in_another_dict(thing: Any) -> None:
    thing.__dict__ = dict(vars(thing))


def with_another_value(thing: Any) -> None:
    thing.size = (3, 5)


def with_another_object(thing: Any) -> None:
    thing.name = "".join(["th", "ing"])


def with_a_method_that_sets(thing: Any) -> None:
    thing.change()


def with_one_more(thing: Any) -> None:
    thing.more = 1


def with_what_was_absent(thing: Any) -> None:
    del thing.size
    thing.forward = 1


def with_one_less(thing: Any) -> None:
    del thing.size


def with_what_cannot_be_compared(thing: Any) -> None:
    thing.size = Unequal()


def by_the_dict(thing: Any) -> None:
    vars(thing)["size"] = None


CHANGES = [
    of_another_class, in_another_dict, with_another_value, with_another_object,
    with_a_method_that_sets, with_one_more, with_what_was_absent, with_one_less,
    with_what_cannot_be_compared, by_the_dict,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_objects(change: Callable[[Any], None]) -> None:
    thing = Thing()
    watch = watch_of(thing)
    assert watch.holds() and watch.holds()
    change(thing)
    assert not watch.holds() and not watch.holds()


def test_what_is_equal_or_undone() -> None:
    thing: Any = Thing()
    watch = watch_of(thing)
    thing.size = (*[3], 4)
    assert watch.holds()
    name, thing.name = thing.name, "other"
    assert not watch.holds()
    thing.name = name
    assert watch.holds()
    thing.more = 1
    assert not watch.holds()
    del thing.more
    assert watch.holds()
    thing.__class__ = Other
    assert not watch.holds()
    thing.__class__ = Thing
    assert watch.holds()


def test_values_that_change_and_stay_the_same_objects() -> None:
    thing: Any = Thing()
    thing.size = [3, 4]
    values = vars(thing)
    watch = Watch([], [Table(values, equal=(("size", [3, 4]),))], [], [])
    assert watch.holds() and watch.holds()
    thing.size[0] = 2
    assert not watch.holds()
    thing.size[0] = 3
    assert watch.holds()


def test_tables() -> None:
    tables: list[dict[str, Any]] = [{}, OrderedDict()]
    for table in tables:
        watch = Watch([], [Table(table, 0)], [], [])
        assert watch.holds()
        table["a"] = 1
        assert not watch.holds()
        table.clear()
        assert watch.holds()
        watch = Watch([], [Table(table, same=(("a", None),))], [], [])
        assert not watch.holds()
        table.update(a=None, b=1)
        assert watch.holds()


def test_attributes_of_classes() -> None:
    class Kind(Thing):
        pass

    watch = Watch([], [], [Attribute(Kind, "change", Thing.change)], [])
    assert watch.holds()
    Kind.change = lambda self: None  # type: ignore[method-assign]
    assert not watch.holds()
    del Kind.change
    assert watch.holds()
    watch = Watch([], [], [Attribute(Kind, "absent", None)], [])
    assert not watch.holds()


def transposed(p: Any) -> None:
    version, address = p._version, p.data_ptr()
    p.data = p.data.transpose(0, 1)
    assert (p._version, p.data_ptr()) == (version, address)


def part(p: Any) -> None:
    p.data = p.data[:2]


def later_part(p: Any) -> None:
    p.data = p.data[1:]


def other_memory(p: Any) -> None:
    p.data = p.data.clone()


def same_memory_of_another_storage(p: Any) -> None:
    p.data = torch.from_numpy(p.detach().numpy())


class Subclass(nn.Parameter):
    pass


def of_another_tensor_class(p: Any) -> None:
    p.__class__ = Subclass


def other_type(p: Any) -> None:
    p.data = p.data.view(torch.bfloat16)[:, :4]


def one_dimension_more(p: Any) -> None:
    p.data = p.data.unsqueeze(0).unsqueeze(0).unsqueeze(0)


def swapped(p: Any) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(p * 2))


def resized(p: Any) -> None:
    p.data.untyped_storage().resize_(0)


OF_TENSORS = [
    transposed, part, later_part, other_memory, other_type, one_dimension_more, swapped, resized,
    same_memory_of_another_storage, of_another_tensor_class,
]  # fmt: skip


@pytest.mark.parametrize("change", OF_TENSORS, ids=lambda f: f.__name__)
def test_changed_tensors(change: Callable[[Any], None]) -> None:
    kept = torch.randn(4, 4)
    p = nn.Parameter(kept)
    memory = p.untyped_storage()
    watch = Watch([], [], [], [WatchedTensor(p, p.data_ptr())])
    with torch.no_grad():
        p.add_(1)  # whose count nobody watches
        assert watch.holds()
        change(p)
    assert not watch.holds()
    del memory


def test_counted_changes() -> None:
    p = nn.Parameter(torch.randn(4))
    watch = Watch([], [], [], [WatchedTensor(p, p.data_ptr(), p._version)])
    assert watch.holds()
    p.requires_grad_(False)
    p.data.add_(1)  # which PyTorch does not count
    assert watch.holds()
    p.add_(1)
    assert not watch.holds()


def test_tensors_that_cannot_be_watched() -> None:
    assert can_watch([torch.randn(2), nn.Parameter(torch.randn(1, 2, 3, 4))])
    for other in (
        torch.randn(2, device="meta"), torch.eye(2).to_sparse(), torch.randn((1,) * 5),
        torch._neg_view(torch.randn(2)), torch._efficientzerotensor(2),
    ):  # fmt: skip
        assert not can_watch([torch.randn(2), other])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _load.load()
    monkeypatch.setattr(_load, "watching", None)
    monkeypatch.setattr(_build, "bound_fault", lambda _: "was built for PyTorch 2.13.0+other")
    _load._open_library(library, _load.isa())
    assert _load.watching is None and not can_watch([torch.randn(2)])
