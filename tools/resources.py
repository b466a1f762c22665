"""What CUDA's assembler and disassembler say of kernels: registers, memory, instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    """One kernel compiled for one architecture, as `ptxas -v` reports it."""

    symbol: str
    arch: str
    source: str = ""  # the file's name
    name: str = ""  # readable, with template arguments
    registers: int = 0
    shared: int = 0  # bytes, static
    stack: int = 0
    spills: int = 0  # bytes stored and loaded
    instructions: dict[str, int] = field(default_factory=dict)  # from the disassembly, by opcode

    @property
    def base(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]

    def holds(self, opcode: str) -> bool:
        pattern = re.compile(opcode)
        return any(pattern.fullmatch(each) for each in self.instructions)


_COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_report(text: str) -> list[Kernel]:
    """The kernels of `nvcc -Xptxas -v`. A device function's own frame counts as its kernel's."""
    kernels: list[Kernel] = []
    current: Kernel | None = None
    for line in text.splitlines():
        if match := _COMPILING.search(line):
            current = Kernel(match[1], match[2])
            kernels.append(current)
        elif current is None:
            continue
        elif match := _STACK.search(line):
            current.stack = max(current.stack, int(match[1]))
            current.spills += int(match[2]) + int(match[3])
        elif match := _USED.search(line):
            current.registers = int(match[1])
            shared = _SHARED.search(line)
            current.shared = int(shared[1]) if shared else 0
    return kernels


def complaints(text: str) -> list[str]:
    """Warnings of nvcc, of its host compiler and of ptxas; C7510 and C7511: wgmma serialised."""
    found = []
    for line in text.splitlines():
        if re.search(r"\bwarning\b", line, re.IGNORECASE) and "can be suppressed" not in line:
            found.append(line.strip())
        elif "C7510" in line or "C7511" in line:
            found.append(line.strip())
    return list(dict.fromkeys(found))


def readable(symbols: Sequence[str]) -> dict[str, str]:
    """Short names of mangled ones: no namespaces of ours, no parameters."""
    unmangle = shutil.which("c++filt") or shutil.which("cu++filt")
    lines = list(symbols)
    if unmangle and lines:
        done = subprocess.run(
            [unmangle], input="\n".join(lines) + "\n", capture_output=True, text=True
        )
        if done.returncode == 0 and len(done.stdout.splitlines()) == len(lines):
            lines = done.stdout.splitlines()
    return {symbol: shorten(line) for symbol, line in zip(symbols, lines, strict=True)}


def shorten(name: str) -> str:
    """torchconv::cuda::(anonymous namespace)::k<float>(int) is k<float>."""
    for prefix in ("(anonymous namespace)::", "torchconv::cuda::"):
        name = name.replace(prefix, "")
    name = name.removeprefix("void ")
    depth = 0
    for at, character in enumerate(name):
        if character == "<":
            depth += 1
        elif character == ">":
            depth -= 1
        elif character == "(" and depth == 0:
            return name[:at]
    return name


def find_tool(name: str) -> str | None:
    """A tool of CUDA: on PATH, in this Python's environment, or beside nvcc."""
    places = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable), "/usr/local/cuda/bin"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


_FUNCTION = re.compile(r"^\s*Function : (\w+)")
_CODE_FOR = re.compile(r"^\s*code for (\w+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def parse_disassembly(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(symbol, arch): {opcode: how many}} of `cuobjdump -sass`."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = ""
    counts: dict[str, int] | None = None
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            if counts is not None:
                counts[match[1]] = counts.get(match[1], 0) + 1
        elif match := _CODE_FOR.match(line):
            arch = match[1]
        elif match := _FUNCTION.match(line):
            counts = found.setdefault((match[1], arch), {})
    return found


def disassemble(objects: Path) -> dict[tuple[str, str], dict[str, int]]:
    """What parse_disassembly finds in an object file. Raises RuntimeError with the tool's words."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump is not there")
    path = os.pathsep.join([os.path.dirname(tool), os.environ.get("PATH", "")])  # for nvdisasm
    done = subprocess.run(
        [tool, "-sass", str(objects)], capture_output=True, text=True, errors="replace",
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {objects}: {done.stderr.strip()}")
    return parse_disassembly(done.stdout)
