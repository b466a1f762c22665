"""Trains a small network of torchconv layers on real handwritten digits, then looks inside it.

The 1797 digits of scikit-learn are scans of 8x8 pixels. The network is LeNet's chain of lectures B
and C: convolution with its activation, pooling (maximum, minimum and average, once each), a fully
connected layer, cross entropy, and plain SGD, w <- w - eta dw. Training images are shifted by up to
one pixel (data augmentation). Pictures go to examples/output: the training curves, the learned
first-layer filters, the feature maps of one digit, and the windows that excite each filter most.

    python examples/digits.py [--epochs 30] [--seed 0] [--output FOLDER]

The exit status is 0 if at least 97% of the test digits are recognised, else 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import trange

import torchconv.nn as tc

REQUIRED = 0.97
BATCH = 32
BLUE, ORANGE = "#2b6ca3", "#d9822b"


def build_network() -> nn.Sequential:
    """1x8x8 -> 16x8x8 -> 16x4x4 -> 32x4x4 -> 32x3x3 -> 64x2x2 -> 64x1x1 -> 10 scores."""
    network = nn.Sequential(
        tc.Conv2d(1, 16, 3, padding=1, activation="relu"),
        tc.MaxPool2d(2),
        tc.Conv2d(16, 32, 3, padding=1, activation="tanh"),
        tc.MinPool2d(2, stride=1),
        tc.Conv2d(32, 64, 2, activation="relu"),
        tc.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    for layer in network:
        if isinstance(layer, tc.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; every digit in the same proportion."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def shift(images: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel, down and to the right."""
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # [N,1,3,3,8,8]
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (network(images).argmax(1) == labels).float().mean().item()


def train(
    network: nn.Sequential, data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int
) -> tuple[list[float], list[float]]:
    """The mean loss and the test accuracy of every epoch."""
    images, labels, test_images, test_labels = data
    losses, accuracies = [], []
    with trange(epochs, unit="epoch", file=sys.stderr) as progress:
        for epoch in progress:
            eta = 0.2 if epoch < 0.75 * epochs else 0.02
            total, steps = 0.0, len(labels) // BATCH
            # Whole batches only: the gradient of a last batch of three would be mostly noise.
            for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(network(shift(images[batch])), labels[batch])
                network.zero_grad()
                loss.backward()
                with torch.no_grad():
                    for parameter in network.parameters():
                        assert parameter.grad is not None
                        parameter.sub_(eta * parameter.grad)
                total += loss.item()
            losses.append(total / steps)
            accuracies.append(accuracy(network, test_images, test_labels))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", test=f"{accuracies[-1]:.1%}")
    return losses, accuracies


def draw_curves(losses: list[float], accuracies: list[float], path: Path) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    epochs = range(1, len(losses) + 1)
    axis.plot(epochs, losses, color=BLUE)
    axis.set(xlabel="epoch", ylim=(0, None), title="Training on 8x8 digits with plain SGD")
    axis.set_ylabel("training loss", color=BLUE)
    right = axis.twinx()
    right.plot(epochs, [100 * value for value in accuracies], color=ORANGE)
    right.axhline(100 * REQUIRED, color="grey", linestyle=":", linewidth=1)
    right.set_ylabel(f"test accuracy (%), dotted: {REQUIRED:.0%} required", color=ORANGE)
    right.set_ylim(0, 102)
    right.annotate(
        f"{accuracies[-1]:.1%}", (len(losses), 100 * accuracies[-1]), (0, -14),
        textcoords="offset points", ha="right", color=ORANGE,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def first_weight(network: nn.Sequential) -> Tensor:
    layer = network[0]
    assert isinstance(layer, tc.Conv2d)
    return layer.weight.detach()


def draw_filters(weight: Tensor, path: Path) -> None:
    """The kernels of the first layer, [16,1,3,3]: red adds to the response, blue lowers it."""
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.subplots(2, 8).flatten()
    limit = weight.abs().max().item()
    for number, (axis, kernel) in enumerate(zip(axes, weight, strict=True)):
        picture = axis.imshow(kernel[0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(number, fontsize=8)
        axis.set_axis_off()
    figure.colorbar(picture, ax=axes, shrink=0.9)
    figure.suptitle("First-layer filters", fontsize=11)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def draw_feature_maps(network: nn.Sequential, image: Tensor, label: int, path: Path) -> None:
    """One digit on its way through the layers, up to 16 channels of each."""
    stages = [("input", image)]
    features = image.unsqueeze(0)
    for layer in list(network.children())[:6]:
        features = layer(features)
        name = type(layer).__name__
        activation = getattr(layer, "activation", None)
        stages.append((f"{name}, {activation}" if activation else name, features[0]))
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(len(stages), 17, width_ratios=[3.4] + [1] * 16)
    for row, (name, maps) in zip(axes, stages, strict=True):
        for axis in row:
            axis.set_axis_off()
        size = "x".join(map(str, maps.shape))
        row[0].text(1, 0.5, f"{name}\n{size}", ha="right", va="center", fontsize=9)
        # One grey scale for a layer, so that channels can be compared.
        low, high = maps.min().item(), maps.max().item()
        for axis, channel in zip(row[1:], maps, strict=False):
            axis.imshow(channel, cmap="gray" if maps is image else "viridis", vmin=low, vmax=high)
    scores = network(image.unsqueeze(0))[0]
    figure.suptitle(
        f"Feature maps of a {label}, recognised as {scores.argmax().item()} "
        f"with probability {scores.softmax(0).max().item():.3f} (16 channels a layer at most)",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def draw_exciting_windows(network: nn.Sequential, images: Tensor, path: Path) -> None:
    """For each first-layer filter, the test digits with the strongest response, and where.

    Max pooling hands its gradient to the one winner of each window, so the gradient of a single
    response is the filter itself, lying on the 3x3 pixels that caused it.
    """
    pixels = images.clone().requires_grad_()
    responses = network[:2](pixels)  # [N,16,4,4]
    weight = first_weight(network)
    shown = weight.abs().sum((1, 2, 3)).topk(8).indices.sort().values.tolist()
    count = 8
    figure = Figure(figsize=(8.4, 8.2), layout="constrained")
    axes = figure.subplots(len(shown), count + 1)
    limit = weight.abs().max().item()
    for row, channel in zip(axes, shown, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
        row[0].imshow(weight[channel, 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        row[0].set_ylabel(f"filter {channel}", fontsize=9)
        strongest, where = responses[:, channel].flatten(1).max(1)
        for axis, sample in zip(row[1:], strongest.topk(count).indices, strict=True):
            response = responses[sample, channel].flatten()[where[sample]]
            (gradient,) = torch.autograd.grad(response, pixels, retain_graph=True)
            axis.imshow(images[sample, 0], cmap="gray")
            ys, xs = gradient[sample, 0].nonzero(as_tuple=True)
            if len(ys):  # a filter that answers nothing (dead ReLU) has no window
                corner = (xs.min().item() - 0.5, ys.min().item() - 0.5)
                width, height = (1 + (v.max() - v.min()).item() for v in (xs, ys))
                axis.add_patch(Rectangle(corner, width, height, fill=False, ec=ORANGE, lw=2))
    figure.suptitle("Filters and the windows of test digits that excite them most", fontsize=11)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a network of torchconv layers on digits.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # layers of microseconds: a second thread would only be waited for
    data = load_data()
    network = build_network()
    print(network)
    start = time.perf_counter()
    losses, accuracies = train(network, data, options.epochs)
    seconds = time.perf_counter() - start

    images, labels = data[2:]
    options.output.mkdir(parents=True, exist_ok=True)
    draw_curves(losses, accuracies, options.output / "digits_training.png")
    draw_filters(first_weight(network), options.output / "digits_filters.png")
    draw_feature_maps(
        network, images[0], int(labels[0]), options.output / "digits_feature_maps.png"
    )
    draw_exciting_windows(network, images, options.output / "digits_exciting_windows.png")
    print(f"Test accuracy {accuracies[-1]:.2%} on {len(labels)} digits after {seconds:.1f} s.")
    print(f"Pictures are in {options.output}.")
    if accuracies[-1] < REQUIRED:
        print(f"That falls short of {REQUIRED:.0%}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
