"""Times whole networks: converted by torchconv against a peer in its better layout.

    python -m benchmarks.models --peer torch

Each network of pytorchcv, and ConvNeXt-T (convnext.py), all with random weights, runs inference on
one image and a training step (forward, cross entropy, backward, SGD) on a small batch, both
libraries in both layouts, in turn. The ratio compares the better layout of each.
`fused` is inference after torchconv.fuse, still against the peer's network as it is; the columns
`fused` of the peer are what its own folding of normalisation gives (torch.fx.experimental).
`frozen` is the same after torchconv.fuse(..., freeze=True), which promises what engines assume.
`fused_training` is the training step after torchconv.fuse_training, against the peer's as it is.
Inference engines (--peer onnxruntime, openvino) always fold and have no training steps.
Before timing, the outputs and the gradients of all parameters are checked against the same network
in float64.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import machine, report, timing
from benchmarks.convnext import convnext_tiny
from benchmarks.options import (
    PEERS,
    add_peer_option,
    add_timing_options,
    check_timing_options,
    rounds,
)
from benchmarks.peers import LAYOUTS, Peer, TorchConv
from benchmarks.run import RESULTS

MODELS = (
    "resnet18",
    "resnet50",
    "vgg16",
    "mobilenetv2_w1",
    "resnext50_32x4d",
    "squeezenet_v1_1",
    "efficientnet_b0",
    "mobilenetv3_large_w1",
    "convnext_tiny",
)
PASSES = ("inference", "fused", "frozen", "training", "fused_training")
TRAINING = ("training", "fused_training")
# Errors grow from layer to layer, so a network is judged by the peer's own error in float32. In
# training one activation that rounds to the other side of zero (or wins another pooling window)
# moves the gradients by up to a few percent, in either library; no two agree better than that. So
# float32 gradients only have to be in the neighbourhood, and those in float64 must be exact.
SLACK = 8
LEAST = {name: 5e-2 if name in TRAINING else 1e-5 for name in PASSES}
LEAST_FLOAT64 = 1e-9
# Before a library's name: its network with normalisation folded.
FUSED = "fused "
# Calls of one library in a row; in training, what a call leaves in the caches is nothing to a step.
TURN = {name: 1 if name in TRAINING else 4 for name in PASSES}
# Seconds before a turn of an inference engine or beside one, until the other's threads sleep.
PAUSE = 0.05


def load_model(name: str) -> nn.Module:
    """A network with seeded random weights."""
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    if name == "convnext_tiny":
        return convnext_tiny()
    try:
        model: nn.Module = get_model(name, pretrained=False)
    except ValueError as error:
        raise SystemExit(f"pytorchcv has no network named {name!r}") from error
    return model


def make_batch(size: int, layout: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 224, 224, generator=generator)
    labels = torch.randint(1000, (size,), generator=generator)
    return images.contiguous(memory_format=LAYOUTS[layout]), labels


def make_call(
    model: nn.Module, pass_name: str, images: Tensor, labels: Tensor
) -> Callable[[], object]:
    """What is timed."""
    if pass_name not in TRAINING:
        return lambda: model(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def probe(model: nn.Module, pass_name: str, images: Tensor, labels: Tensor) -> Tensor:
    """The output, or the gradients of all parameters in one vector, in float64."""
    if pass_name not in TRAINING:
        return model(images).double()
    torch.manual_seed(2)  # dropout
    loss = F.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def takes(model: nn.Module, layout: str) -> bool:
    """Whether the network runs in a layout at all, with PyTorch's own layers: some flatten by
    `view`, which only contiguous activations allow."""
    # PyTorch 2.13 does not declare this form of Module.to.
    candidate = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            candidate(make_batch(2, layout)[0])
    except RuntimeError:
        return False
    return True


def measure(
    name: str, pass_name: str, ours: Peer, peer: Peer, batch: int, budget: float, min_rounds: int
) -> report.Result:
    """One network in one pass: check both libraries in each layout, then time all of them."""
    model = load_model(name).train(pass_name in TRAINING)
    # Dropout draws its mask in the layout's order, so no two layouts would agree.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    errors: dict[tuple[str, str], float] = {}
    with torch.set_grad_enabled(pass_name in TRAINING):
        # Two images suffice to judge gradients; float64 is slow.
        images, labels = make_batch(min(batch, 2), "nchw")
        double = copy.deepcopy(model).double()
        expected = probe(double, pass_name, images.double(), labels)
        makers = {ours.name: ours.model, peer.name: peer.model}
        if pass_name in ("fused", "frozen"):
            makers[ours.name] = functools.partial(ours.fused, frozen=pass_name == "frozen")
            if peer.differentiable:  # else it is an engine, which folds in any case
                makers[FUSED + peer.name] = peer.fused
        if pass_name == "fused_training":
            makers[ours.name] = ours.fused_training
        made = makers[ours.name](double)
        exact = relative(probe(made, pass_name, images.double(), labels), expected)
        layouts = [layout for layout in LAYOUTS if layout == "nchw" or takes(model, layout)]
        for layout in layouts:
            for name_of_library, maker in makers.items():
                if name_of_library != ours.name and layout not in peer.layouts:
                    continue
                candidate = copy.deepcopy(model)
                candidate.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
                candidate = maker(candidate)
                images, labels = make_batch(min(batch, 2), layout)
                found = probe(candidate, pass_name, images, labels)
                errors[name_of_library, layout] = relative(found, expected)
                images, labels = make_batch(batch, layout)
                calls[name_of_library, layout] = make_call(candidate, pass_name, images, labels)
        worst = max(errors[ours.name, layout] for layout in layouts)
        peers = max(errors[peer.name, layout] for layout in layouts if layout in peer.layouts)
        row = report.Result(
            "models", name, "", "float32", "better", pass_name, error=worst, peer_error=peers
        )
        allowed = max(SLACK * peers, LEAST[pass_name])
        for dtype, error, bound in (
            ("float32", worst, allowed),
            ("float64", exact, LEAST_FLOAT64),
        ):
            if not error <= bound:
                reason = f"torchconv is wrong in {dtype}: error {error:.1e}, above {bound:.1e}"
                return replace(row, failure=reason)
        turn = TURN[pass_name]
        pause = 0.0 if peer.differentiable else PAUSE
        times = timing.interleave(list(calls.values()), budget, min_rounds, turn=turn, pause=pause)
    timings = dict(zip(calls, times, strict=True))

    def better(library: Peer) -> timing.Timing:
        found = (time for (name, _), time in timings.items() if name == library.name)
        return min(found, key=lambda time: time.median)

    extra = {" ".join(key): 1e3 * value.median for key, value in timings.items()}
    rate = batch / better(ours).median
    return replace(
        row, ours=better(ours), peer=better(peer), rate=rate, unit="images/s", extra=extra
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="Time whole converted networks against a peer in its better layout.",
    )
    add = parser.add_argument
    add(
        "--models",
        default=",".join(MODELS),
        help="names in pytorchcv or convnext_tiny, comma-separated",
    )
    add_peer_option(parser)
    add("--passes", default="all", help=f"of {', '.join(PASSES)}, comma-separated (default: all)")
    add("--batch", type=int, default=1, help="images in an inference batch (default: 1)")
    add("--training-batch", type=int, default=8, help="images in a training batch (default: 8)")
    add_timing_options(parser, budget=20)
    options = parser.parse_args(arguments)
    check_timing_options(parser, options, positive=("batch", "training_batch"))
    options.models = options.models.split(",")
    options.pass_names = list(PASSES) if options.passes == "all" else options.passes.split(",")
    unknown = [name for name in options.pass_names if name not in PASSES]
    if unknown:
        parser.error(f"unknown pass {unknown[0]!r}, expected one of {', '.join(PASSES)}")
    return options


def output_base(options: argparse.Namespace) -> Path:
    """benchmarks/results/models-<peer>, plus whatever narrows the run down."""
    parts = ["models", options.peer]
    if options.passes != "all":
        parts.append("+".join(options.pass_names))
    if options.threads:
        parts.append(f"{options.threads}threads")
    if options.models != list(MODELS):
        parts.append("filtered")
    if options.quick:
        parts.append("quick")
    return RESULTS / "-".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours, peer = TorchConv(), PEERS[options.peer]()
    budget, min_rounds = rounds(options)
    load = machine.warn_if_busy()
    passes = [name for name in options.pass_names if name not in TRAINING or peer.differentiable]
    pairs = [(name, pass_name) for name in options.models for pass_name in passes]
    results: list[report.Result] = []
    with tqdm(pairs, unit="row", file=sys.stderr) as progress:
        for name, pass_name in progress:
            progress.set_description(f"{name} {pass_name}")
            batch = options.training_batch if pass_name in TRAINING else options.batch
            results.append(measure(name, pass_name, ours, peer, batch, budget, min_rounds))
    batches = (
        f"inference on {options.batch}, training on {options.training_batch} images of 224x224"
    )
    summary = report.Report(
        title=f"Networks against {peer.name}, {batches}",
        peer=peer.name,
        machine={**machine.describe(), "load before": load},
        results=results,
        columns=[
            f"{library} {layout}"
            for library in (ours.name, peer.name, FUSED + peer.name)
            for layout in (LAYOUTS if library == ours.name else peer.layouts)
        ],
    )
    report.publish(summary, options.output or output_base(options))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
