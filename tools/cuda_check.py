"""What can be known of the GPU's kernels without a GPU: they compile, link, and look as meant.

    python -m tools.cuda_check [--all]

Compiles csrc/cuda for Hopper (sm_90a), and for Ampere (sm_80) with PTX for what comes later, links
the library, and reads what ptxas reports of every kernel. Without --all, what CUTLASS makes is
compiled for Hopper alone, which is the only one that runs it. Fails on register spills, on any
warning, on wgmma that ptxas serialises, on operators without a kernel, and, where CUDA's
disassembler is there, on matrix kernels without matrix instructions and on kernels bound by memory
without 16-byte accesses. Prints a table of the kernels; every instance is in kernels.txt of the
build folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tools import resources
from tools.resources import Kernel
from torchconv import _build, _toolchain

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda-check"
HOPPER, AMPERE = "9.0a", "8.0+PTX"
# Bytes of spills, stores and loads together, that a kernel may have on an architecture, and why.
SPILL_BUDGET = {
    # A word or two of what the next copies are of, read once a panel: the tile of four blocks.
    ("simt_planes_kernel", "sm_80"): 32,
    # Its places in the output, which are read once after the loop over the window.
    ("pool_large_windows", "sm_80"): 24,
    # 7x7 alone: the weights take most of the 168 registers that three blocks leave a thread.
    ("depthwise_channel_mma_kernel", "sm_90a"): 16,
    # Places of its strips, read once an item: groups of few channels at stride 1.
    ("grouped_rows_wgrad_kernel", "sm_90a"): 16,
    # A word from before the loop that is read after it, of the tile whose columns are turned.
    ("sm90::wgrad_tf32_kernel", "sm_90a"): 8,
    # 64 sums of 128 registers, in one tile of each architecture.
    ("mma_planes_resident_kernel", "sm_90a"): 8,
    ("mma_planes_resident_kernel", "sm_80"): 16,
    # Their launch bounds are for Hopper; a few instances of each.
    ("pool_bands", "sm_80"): 48,
    ("depthwise_channels_kernel", "sm_80"): 16,
    ("channel_gradients_kernel", "sm_80"): 24,
    ("depthwise_channel_mma_kernel", "sm_80"): 188,
    ("grouped_rows_kernel", "sm_80"): 144,
    ("grouped_rows_wgrad_kernel", "sm_80"): 52,
    ("mma_patch_kernel", "sm_80"): 96,
}


@dataclass(frozen=True)
class Rule:
    """Kernels of some files must hold an instruction: each of them, or one instance of each."""

    files: str
    kernels: str  # of the name without template arguments
    arch: str
    opcode: str
    every: bool
    what: str


WIDE = r"(LDG|STG|LDGSTS)\.E(\.\w+)*\.128(\.\w+)*"
RULES = (
    Rule("cutlass_sm90_*.cu", "*_kernel", "sm_90a", r"HGMMA\..*", True, "wgmma"),
    Rule("mma_*.cu", "mma_*", "sm_80", r"[HI]MMA\..*", True, "mma"),
    Rule("mma_*.cu", "mma_*", "sm_90a", r"[HI]MMA\..*", True, "mma"),
    Rule("grouped_mma_*.cu", "grouped_*", "sm_90a", r"[HI]MMA\..*", True, "mma"),
    Rule("depthwise_*mma*.cu", "*", "sm_80", r"HMMA\..*", True, "mma"),
    Rule("depthwise_*mma*.cu", "*", "sm_90a", r"HMMA\..*", True, "mma"),
    Rule("*pool2d*.cu", "*", "sm_90a", WIDE, False, "16-byte accesses"),
    Rule("depthwise_*.cu", "*", "sm_90a", WIDE, False, "16-byte accesses"),
    Rule("winograd_gemm.cu", "*", "sm_90a", WIDE, True, "16-byte accesses"),
    Rule("simt_planes.cu", "simt_planes_kernel", "sm_90a", WIDE, True, "16-byte accesses"),
    Rule("winograd_outputs.cu", "winograd_outputs", "sm_90a", WIDE, False, "16-byte accesses"),
    Rule("conv_layout*.cu", "*", "sm_90a", WIDE, False, "16-byte accesses"),
    Rule("activation_backward*.cu", "*", "sm_90a", WIDE, False, "16-byte accesses"),
)
# Kernels that a rule does not ask, and why.
EXCEPTIONS: dict[str, str] = {
    "gather": "reads the one element that a window selected",
    "depthwise_taps_kernel": "takes what the other depthwise kernels leave, of any size",
    "depthwise_taps_wgrad_kernel": "likewise",
    "channel_strips_kernel": "a lane has one or two channels, so that sums and weights of all taps "
    "fit in registers; lanes lie side by side",
    "channel_strips_wgrad_kernel": "likewise",
    "channel_gradients_kernel": "likewise",
    "repack_filters": "turns weights, a small part of any call's memory, through shared memory",
    "turn_filters": "likewise",
    "grouped_rows_add_parts": "adds up the parts of a weight gradient",
    "average_pairs": "reads two elements of each row of a window, where rows of a plane are no "
    "whole vectors",
    "sum_rows": "adds up the few partial sums of a bias gradient",
}


def ninja_file(architecture: str, root: Path) -> str:
    """The build of torchconv/_build.py, with ptxas's report of every source beside its object."""
    os.environ["TORCH_CUDA_ARCH_LIST"] = architecture
    text = _build.ninja_file([_build.CUDA], root)
    command = "command = $nvcc -MMD -MF $out.d -c $in -o $out"
    assert text.count(command) == 1
    reporting = "command = $nvcc -Xptxas -v -MMD -MF $out.d -c $in -o $out > $out.log 2>&1"
    return text.replace(command, f"{reporting} || (cat $out.log; exit 1)")


def is_cutlass(source: Path) -> bool:
    return source.name.startswith("cutlass")


def compile_for(
    architecture: str, root: Path, folder: Path, whole: bool
) -> tuple[list[Path], str, bool]:
    """The objects of CUDA sources that now lie in folder, what was printed, and whether it linked.

    whole: CUTLASS's too, and all of them linked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(architecture, root))
    sources = [s for s in _build.sources(root, _build.CUDA) if s.suffix == ".cu"]
    if not whole:
        sources = [source for source in sources if not is_cutlass(source)]
    objects = [
        folder / _build.CUDA / source.relative_to(root).with_suffix(".cu.o") for source in sources
    ]
    targets = [] if whole else [str(path.relative_to(folder)) for path in objects]
    command = [_toolchain.find_ninja(), "-k", "0", "-j", str(_toolchain.jobs()), *targets]
    environment = {**os.environ, "NINJA_STATUS": f"[{architecture} %f/%t] "}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    output = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("["))
    if done.returncode != 0:
        print(output)
        if not all(path.is_file() for path in objects):
            raise SystemExit(f"cuda-check: {architecture} does not compile")
    return objects, output, done.returncode == 0


def read_kernels(objects: Sequence[Path]) -> list[Kernel]:
    kernels = []
    for path in objects:
        found = resources.parse_report(path.with_name(path.name + ".log").read_text())
        for kernel in found:
            kernel.source = path.name.removesuffix(".o")
        kernels += found
    names = resources.readable([kernel.symbol for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.symbol]
    return kernels


def add_instructions(kernels: Sequence[Kernel], objects: Sequence[Path]) -> None:
    known = {}
    for path in objects:
        known.update(resources.disassemble(path))
    for kernel in kernels:
        kernel.instructions = known.get((kernel.symbol, kernel.arch), {})


def spill_faults(kernels: Sequence[Kernel]) -> list[str]:
    faults = []
    for kernel in kernels:
        allowed = SPILL_BUDGET.get((kernel.base, kernel.arch), 0)
        if kernel.spills > allowed:
            faults.append(
                f"{kernel.source}: {kernel.name[:200]} ({kernel.arch}) spills {kernel.spills} "
                f"bytes, above {allowed}"
            )
    return faults


def rule_faults(kernels: Sequence[Kernel], rules: Sequence[Rule] = RULES) -> list[str]:
    faults = []
    for rule in rules:
        groups: dict[tuple[str, str], list[Kernel]] = {}
        for kernel in kernels:
            if (
                fnmatch(kernel.source, rule.files)
                and fnmatch(kernel.base, rule.kernels)
                and kernel.arch == rule.arch
                and kernel.base not in EXCEPTIONS
            ):
                groups.setdefault((kernel.source, kernel.base), []).append(kernel)
        for (source, base), instances in groups.items():
            without = [kernel for kernel in instances if not kernel.holds(rule.opcode)]
            if rule.every:
                faults += [
                    f"{source}: {k.name[:200]} ({k.arch}) has no {rule.what}" for k in without
                ]
            elif len(without) == len(instances):
                faults.append(f"{source}: no instance of {base} ({rule.arch}) has {rule.what}")
    return faults


def table(kernels: Sequence[Kernel]) -> str:
    """A line for each kernel and architecture; a range where its instances differ."""
    from tabulate import tabulate

    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.source, kernel.base, kernel.arch), []).append(kernel)

    def span(values: Sequence[int]) -> str:
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low}-{high}"

    rows = []
    for (source, base, arch), found in sorted(groups.items()):
        rows.append(
            [source, base[-40:], arch, len(found)]
            + [span([getattr(k, name) for k in found]) for name in
               ("registers", "shared", "stack", "spills")]
        )  # fmt: skip
    headers = ["file", "kernel", "arch", "instances", "registers", "shared", "stack", "spills"]
    return tabulate(rows, headers, disable_numparse=True)


def every_instance(kernels: Sequence[Kernel]) -> str:
    lines = ["registers  shared  stack  spills  arch    file: kernel"]
    for k in sorted(kernels, key=lambda k: (k.source, k.name, k.arch)):
        numbers = f"{k.registers:9}  {k.shared:6}  {k.stack:5}  {k.spills:6}"
        wide = sum(n for opcode, n in k.instructions.items() if re.fullmatch(WIDE, opcode))
        matrix = sum(n for opcode, n in k.instructions.items() if "MMA." in opcode)
        counted = f"  [16-byte accesses {wide}, matrix {matrix}]" if k.instructions else ""
        lines.append(f"{numbers}  {k.arch:6}  {k.source}: {k.name}{counted}")
    return "\n".join(lines) + "\n"


# Every operator must have a kernel for the GPU's tensors, but for those that are the CPU's alone.
LOADING = """
import sys, torch, torchconv
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
from torchconv import _schemas, _settings
names = [schema.partition("(")[0] for schema in _schemas.SCHEMAS]
names = [name for name in names if name not in _schemas.CPU_ONLY]
names += [name + ".settings" for name in _settings.OVERLOADED if name not in _schemas.CPU_ONLY]
names = ["torchconv::" + name for name in names]
print(" ".join(name for name in names if not has(name, "CUDA")))
"""


def loading_faults(library: Path) -> list[str]:
    """Whether PyTorch's CPU build opens the library, and which operators it leaves out."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(library)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        return [f"{library.name} cannot be loaded: {done.stderr.strip().splitlines()[-1]}"]
    return [f"{name} has no kernel for CUDA tensors" for name in done.stdout.split()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cuda_check", description="Check the GPU's kernels without a GPU."
    )
    parser.add_argument("--all", action="store_true", help="every source for every architecture")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    root = _build.source_root().resolve()
    faults: list[str] = []
    kernels: list[Kernel] = []
    objects: list[Path] = []
    print(f"{_toolchain.nvcc()}: {_toolchain.nvcc_version()}")
    cutlass = _toolchain.cutlass_includes()
    print(f"CUTLASS: {cutlass[0]}" if cutlass else "CUTLASS is not there: its kernels are left out")
    for architecture in (HOPPER, AMPERE):
        folder = BUILD / architecture.partition("+")[0]
        whole = options.all or architecture == HOPPER
        made, output, linked = compile_for(architecture, root, folder, whole)
        logs = {path.name: path.with_name(path.name + ".log").read_text() for path in made}
        for name, text in {**logs, "C++": output}.items():
            faults += [f"{name}: {line}" for line in resources.complaints(text)]
        kernels += read_kernels(made)
        objects += made
        if not linked:
            faults.append(f"{architecture}: the library does not compile and link")
        elif whole:
            faults += loading_faults(folder / _build.library_name(_build.CUDA))
        print(f"compiled {len(made)} files for {architecture}, {time.monotonic() - begun:.0f} s")
    faults += spill_faults(kernels)
    if resources.find_tool("cuobjdump"):
        add_instructions(kernels, objects)
        faults += rule_faults(kernels)
        print(f"read the instructions of {len(kernels)} kernels")
    else:
        print(
            "cuobjdump is not there: no instructions were looked for (pip install cuda-dev extra)"
        )
    (BUILD / "kernels.txt").write_text(every_instance(kernels))
    print(f"\n{table(kernels)}\n")
    for fault in faults:
        print(f"cuda-check: {fault}")
    print(f"cuda-check: {len(kernels)} kernels, {len(faults)} faults, every instance in "
          f"{(BUILD / 'kernels.txt').relative_to(ROOT)}")  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
