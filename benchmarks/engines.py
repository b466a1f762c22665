"""Inference engines as peers: what people leave PyTorch for, on one machine with it.

An engine gets the network through PyTorch's ONNX exporter, one graph for each shape of input, with
the weights as constants; it folds, packs and chooses layouts by itself before the first call that
is timed. It runs on as many threads as PyTorch has, in float32 throughout (OpenVINO would round to
bfloat16 by default), takes contiguous images and has no backward. Needs the `peers` extra.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Eager, Operator
from benchmarks.problems import Problem

# From a batch as a NumPy array to the result, as one.
Run = Callable[[Any], Any]


class Exported(nn.Module):
    """A network behind an engine. The engine builds at the first call with a shape."""

    def __init__(self, network: nn.Module, build: Callable[[bytes], Run]) -> None:
        super().__init__()
        self._network, self._build = network, build
        self._runs: dict[torch.Size, Run] = {}

    def forward(self, batch: Tensor) -> Tensor:
        run = self._runs.get(batch.shape)
        if run is None:
            run = self._runs[batch.shape] = self._build(as_onnx(self._network, batch))
        return torch.from_numpy(run(batch.numpy()))


class Constant(nn.Module):
    """An operator with everything but its input bound."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, operator: Operator, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self._operator = operator
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        return self._operator(input, self.weight, self.bias)


def as_onnx(network: nn.Module, batch: Tensor) -> bytes:
    """The network as an ONNX model. Raises TypeError for other types than float32."""
    if batch.dtype != torch.float32:
        raise TypeError(f"engines are timed in float32, got {batch.dtype}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own, about PyTorch's trees
        program = torch.onnx.export(network.eval(), (batch,), dynamo=True, verbose=False)
    assert program is not None
    model: bytes = program.model_proto.SerializeToString()
    return model


class Engine(ABC):
    """What the engines have in common; see benchmarks.peers.Peer."""

    name: str
    differentiable = False
    layouts: Sequence[str] = ("nchw",)

    @abstractmethod
    def build(self, model: bytes) -> Run:
        """An ONNX model, ready to run."""

    def operator(self, problem: Problem) -> Operator:
        return self._constant(Eager().operator(problem))

    def with_residual(self, problem: Problem, residual: Tensor) -> Operator:
        return self._constant(Eager().with_residual(problem, residual))

    def model(self, model: nn.Module) -> nn.Module:
        return Exported(model, self.build)

    def fused(self, model: nn.Module, frozen: bool = False) -> nn.Module:
        return self.model(model)  # engines always fuse and freeze

    def fused_training(self, model: nn.Module) -> nn.Module:
        raise NotImplementedError(f"{self.name} does not train")

    def _constant(self, operator: Operator) -> Operator:
        """Weight and bias are those of the first call."""
        ready: list[nn.Module] = []

        def call(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
            if not ready:
                ready.append(self.model(Constant(operator, w, b)))
            result: Tensor = ready[0](x)
            return result

        return call


class OnnxRuntime(Engine):
    name = "onnxruntime"

    def build(self, model: bytes) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        (input_,) = session.get_inputs()
        return lambda batch: session.run(None, {input_.name: batch})[0]


class OpenVino(Engine):
    name = "openvino"

    def build(self, model: bytes) -> Run:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda batch: request.infer([batch], share_inputs=True, share_outputs=True)[0]
