"""One convolution, pooling or batch normalisation problem, and the files in benchmarks/shapes that
list them.

A line of such a file is `operator NxCxHxW [-> K] RxS [options]  # where the shape comes from`:

    conv2d      8x128x56x56 -> 128  3x3 p1 g32      # ResNeXt-50, second stage
    max_pool2d  8x64x112x112        3x3 s2 p1
    adaptive_avg_pool2d  8x2048x7x7  1x1
    batch_norm2d  8x256x56x56  residual relu

Adaptive pooling has the output's PxQ where the others have the window, and batch normalisation, by
the batch's own statistics, has none, but `residual`, `relu` and `relu6` for what follows it.
Options: s stride, p padding, d dilation (one number or HxW each), g groups, `bias`, `ceil`, and the
name of a dtype, which pins the problem to it whatever --dtype says. The letters are those of
csrc/core: N C H W for the input, K filters of R by S, an output of P by Q.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SHAPES = Path(__file__).parent / "shapes"
POOLINGS = ("max_pool2d", "min_pool2d", "avg_pool2d")
ADAPTIVE_POOLINGS = ("adaptive_avg_pool2d", "adaptive_max_pool2d")
NORM = "batch_norm2d"
OPERATORS = ("conv2d", *POOLINGS, *ADAPTIVE_POOLINGS, NORM)
ACTIVATIONS = ("relu", "relu6")
DTYPES = ("float32", "float64", "bfloat16", "float16")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """One line of a shape file. A pair is (vertical, horizontal)."""

    operator: str
    n: int
    c: int
    h: int
    w: int
    k: int  # filters; C for what has none
    kernel: Pair  # for adaptive pooling, the output
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    ceil_mode: bool = False
    residual: bool = False  # behind a normalisation, as activation is
    activation: str | None = None
    dtype: str | None = None
    group: str = ""
    note: str = ""

    @property
    def pooling(self) -> bool:
        return self.operator in (*POOLINGS, *ADAPTIVE_POOLINGS)

    @property
    def norm(self) -> bool:
        return self.operator == NORM

    @property
    def memory_bound(self) -> bool:
        """Whether the bytes that it moves are its measure, not its arithmetic."""
        return self.pooling or self.norm

    @property
    def adaptive(self) -> bool:
        return self.operator in ADAPTIVE_POOLINGS

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.c,) if self.norm else (self.k, self.c // self.groups, *self.kernel)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        if self.adaptive:
            return (self.n, self.k, *self.kernel)
        return (self.n, self.k, self._outputs(0), self._outputs(1))

    def _outputs(self, axis: int) -> int:
        size = (self.h, self.w)[axis]
        before, stride = self.padding[axis], self.stride[axis]
        room = size + 2 * before - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        if not self.ceil_mode:
            return room // stride + 1
        count = -(-room // stride) + 1
        # A last window that would start in the padding is dropped, as in PyTorch.
        return count - 1 if (count - 1) * stride >= size + before else count

    @property
    def kind(self) -> str:
        """The class of problem that one algorithm or another serves; means are taken over it."""
        if self.memory_bound:
            return " ".join((self.operator, *self._behind()))
        size = f"{self.kernel[0]}x{self.kernel[1]}"
        if self.groups == self.c and self.groups > 1:
            return f"depthwise {size}"
        if self.groups > 1:
            return f"grouped {size}"
        return f"{size} s{_shorter(self.stride)}" + (" dilated" if self.dilation != (1, 1) else "")

    def _behind(self) -> list[str]:
        """What follows a normalisation, as a line has it."""
        return ["residual"] * self.residual + [self.activation or ""] * bool(self.activation)

    def __str__(self) -> str:
        words = [] if self.operator == "conv2d" else [self.operator.removesuffix("2d")]
        shape = "x".join(map(str, self.input_shape))
        words.append(shape if self.memory_bound else f"{shape}->{self.k}")
        if self.norm:
            return " ".join((*words, *self._behind()))
        words.append(("-> " if self.adaptive else "") + f"{self.kernel[0]}x{self.kernel[1]}")
        for letter, pair, default in (
            ("s", self.stride, (1, 1)),
            ("p", self.padding, (0, 0)),
            ("d", self.dilation, (1, 1)),
        ):
            if pair != default:
                words.append(letter + _shorter(pair))
        if self.groups > 1:
            words.append(f"g{self.groups}")
        words += ["bias"] * self.bias + ["ceil"] * self.ceil_mode
        return " ".join(words)


def _shorter(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _pair(text: str) -> Pair:
    numbers = [int(part) for part in text.split("x")]
    return (numbers[0], numbers[-1])


_OPTION = re.compile(r"([spdg])(\d+(?:x\d+)?)")
_SHAPE = re.compile(r"\d+x\d+x\d+x\d+")
_NAMES = {"s": "stride", "p": "padding", "d": "dilation"}


def parse_line(line: str, group: str = "") -> Problem | None:
    """The problem on one line, or None for a blank line or a comment."""
    text, _, note = line.partition("#")
    words = text.replace("->", " -> ").split()
    if not words:
        return None
    operator = words.pop(0)
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}, expected one of {', '.join(OPERATORS)}")
    if len(words) < (1 if operator == NORM else 2) or not _SHAPE.fullmatch(words[0]):
        raise ValueError(f"expected an input shape NxCxHxW and a kernel in {text.strip()!r}")
    n, c, h, w = (int(size) for size in words.pop(0).split("x"))
    k = c
    if operator == "conv2d":
        if len(words) < 3 or words[0] != "->":
            raise ValueError(f"expected '-> K' after the input shape in {text.strip()!r}")
        k = int(words[1])
        del words[:2]
    if operator == NORM:
        words.insert(0, "1x1")
    if not re.fullmatch(r"\d+x\d+", words[0]):
        raise ValueError(f"expected a kernel RxS in {text.strip()!r}, got {words[0]!r}")
    options: dict[str, Pair] = {}
    groups, bias, ceil_mode, dtype = 1, operator == NORM, False, None
    residual, activation = False, None
    for word in words[1:]:
        option = None if operator in (*ADAPTIVE_POOLINGS, NORM) else _OPTION.fullmatch(word)
        if option and option[1] == "g":
            groups = int(option[2])
        elif option:
            options[_NAMES[option[1]]] = _pair(option[2])
        elif word == "bias" and operator == "conv2d":
            bias = True
        elif word == "ceil" and operator in POOLINGS:
            ceil_mode = True
        elif word == "residual" and operator == NORM:
            residual = True
        elif word in ACTIVATIONS and operator == NORM:
            activation = word
        elif word in DTYPES:
            dtype = word
        else:
            raise ValueError(f"unknown option {word!r} in {text.strip()!r}")
    kernel = _pair(words[0])
    problem = Problem(
        operator=operator,
        n=n,
        c=c,
        h=h,
        w=w,
        k=k,
        kernel=kernel,
        stride=options.get("stride", (1, 1)),
        padding=options.get("padding", (0, 0)),
        dilation=options.get("dilation", (1, 1)),
        groups=groups,
        bias=bias,
        ceil_mode=ceil_mode,
        residual=residual,
        activation=activation,
        dtype=dtype,
        group=group,
        note=note.strip(),
    )
    if c % groups or k % groups:
        raise ValueError(f"groups={groups} must divide C={c} and K={k} in {text.strip()!r}")
    if min(problem.output_shape) < 1:
        raise ValueError(f"the output would be {problem.output_shape} in {text.strip()!r}")
    return problem


def available_groups() -> list[str]:
    """The names that --shapes accepts: one for each file in benchmarks/shapes."""
    return sorted(path.stem for path in SHAPES.glob("*.txt"))


def load_group(group: str) -> list[Problem]:
    """Every problem of benchmarks/shapes/<group>.txt, in the order of the file."""
    path = SHAPES / f"{group}.txt"
    if not path.is_file():
        known = ", ".join(available_groups())
        raise ValueError(f"no shapes named {group!r}, expected some of: {known}, all")
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            problem = parse_line(line, group)
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
        if problem is not None:
            problems.append(problem)
    return problems
