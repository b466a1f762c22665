"""Runs a real network on two real photographs before and after torchconv.convert.

The network is pytorchcv's ResNet-18, the photographs are the two that come with scikit-learn. The
weights are random (seeded): trained ones would have to be downloaded, and for comparing numbers and
times they make no difference, though the classes mean nothing. Checks that converting changes the
outputs by no more than rounding, prints each layer's time before and after, and restores the model.

    python examples/photos.py [--repeats 15] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
import torch.nn.functional as F
from pytorchcv.model_provider import get_model
from sklearn.datasets import load_sample_images
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import trange

import torchconv

# float32 rounding through 20 convolutions; both libraries are this far from the exact result.
TOLERANCE = 2e-5
LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def load_photographs(size: int = 224) -> Tensor:
    """The photographs as the network wants them, [2,3,size,size], normalised as for ImageNet."""
    crops = []
    for photograph in load_sample_images().images:
        image = torch.tensor(photograph).permute(2, 0, 1).unsqueeze(0).float() / 255
        height, width = image.shape[-2:]
        scale = size / 0.875 / min(height, width)
        target = (round(height * scale), round(width * scale))
        image = F.interpolate(image, target, mode="bilinear", antialias=True, align_corners=False)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        crops.append(image[..., top : top + size, left : left + size])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((torch.cat(crops) - mean) / deviation).contiguous()


class Stopwatch:
    """Times every convolution and pooling layer of a model through forward hooks."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.shapes: dict[str, str] = {}
        self._started = 0.0

    @contextmanager
    def attached_to(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, layer in model.named_modules():
            if isinstance(layer, LAYERS):
                handles.append(layer.register_forward_pre_hook(self._start))
                handles.append(layer.register_forward_hook(self._stop_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._started = time.perf_counter()

    def _stop_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def stop(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.times.setdefault(name, []).append(time.perf_counter() - self._started)
            shapes = ("x".join(map(str, tensor.shape)) for tensor in (inputs[0], output))
            self.shapes[name] = " -> ".join(shapes)

        return stop

    def milliseconds(self, name: str) -> float:
        return 1e3 * median(self.times[name])


@torch.no_grad()
def time_layers(model: nn.Module, images: Tensor, repeats: int, what: str) -> Stopwatch:
    """The stopwatch after `repeats` passes, with the whole passes under the name ''."""
    model(images)
    watch = Stopwatch()
    with watch.attached_to(model):
        for _ in trange(repeats, desc=what, unit="pass", file=sys.stderr):
            start = time.perf_counter()
            model(images)
            watch.times.setdefault("", []).append(time.perf_counter() - start)
    return watch


def kind(layer: nn.Module) -> str:
    name = type(layer).__name__
    size = getattr(layer, "kernel_size", 1)
    stride = getattr(layer, "stride", 1)
    rows = size if isinstance(size, int) else size[0]
    step = stride if isinstance(stride, int) else stride[0]
    return f"{name} {rows}x{rows}" + (f" s{step}" if step != 1 else "")


def times_table(model: nn.Module, before: Stopwatch, after: Stopwatch) -> str:
    rows = []
    totals = [0.0, 0.0]
    for name, shape in before.shapes.items():
        pair = (before.milliseconds(name), after.milliseconds(name))
        totals = [total + value for total, value in zip(totals, pair, strict=True)]
        rows.append([name, kind(model.get_submodule(name)), shape, *pair, pair[0] / pair[1]])
    rows.append(["these layers", "", "", *totals, totals[0] / totals[1]])
    whole = (before.milliseconds(""), after.milliseconds(""))
    rows.append(["whole network", "", "", *whole, whole[0] / whole[1]])
    headers = ["layer", "kind", "input -> output", "torch ms", "torchconv ms", "ratio"]
    return tabulate(rows, headers, floatfmt=("", "", "", ".3f", ".3f", ".2f"))


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="ResNet-18 before and after torchconv.convert.")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes, before and after")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    torch.manual_seed(options.seed)
    images = load_photographs()
    model: nn.Module = get_model("resnet18", pretrained=False).eval()

    expected = model(images)
    before = time_layers(model, images, options.repeats, "torch.nn ")

    torchconv.convert(model)
    got = model(images)
    after = time_layers(model, images, options.repeats, "torchconv")

    difference = (got - expected).abs().max().item()
    error = ((got - expected).norm() / expected.norm()).item()
    top, converted_top = (scores.topk(5, dim=1).indices for scores in (expected, got))
    print(times_table(model, before, after))
    print("\nTimes are medians; ratio is torch / torchconv, above 1 torchconv is faster.")
    print(f"largest difference {difference:.2e}, relative error {error:.2e}")
    for photograph, first, second in zip(("china", "flower"), top, converted_top, strict=True):
        print(f"{photograph}: top 5 classes {first.tolist()}, after convert {second.tolist()}")
    if error > TOLERANCE or not torch.equal(top, converted_top):
        print(f"The outputs differ by more than rounding ({TOLERANCE:.0e}).", file=sys.stderr)
        return 1

    torchconv.restore(model)
    if not torch.equal(model(images), expected):
        print("The restored model does not give its first outputs.", file=sys.stderr)
        return 1
    print("Restored: the model gives exactly its first outputs again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
