"""The one description of torchconv's binary: sources, flags, names and hashes, and how to build it.

setup.py reads it to build ahead of time and _load.py reads it to build at the first call, so both
give the same library. Every source is compiled once per instruction set, with plain flags, into
one shared library each (no dispatch inside: _load.py opens the one for this CPU), and the sources
of csrc/cuda with nvcc into one more, for GPUs: a *variant* is an instruction set or CUDA. Both ways
write the same ninja file; torch.utils.cpp_extension says where PyTorch's headers and libraries are.
Its own `load` is not called: it names object files after the base name alone, and here the same
operator has the same file name in every folder.

The idea of one module for both ways is that of nerfstudio-project/gsplat (`cuda/build.py`).
setup.py loads this file and _toolchain.py without the package, possibly with no torch installed:
import nothing but the standard library at the top of either.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ._toolchain import (
    BuildError,
    age_fault,
    compiler,
    compiler_kind,
    compiler_version,
    cuda_architectures,
    cuda_toolkit,
    cutlass_includes,
    find_ninja,
    jobs,
    nvcc,
    nvcc_version,
    runtime_libraries,
    torch_version,
)

# The oldest PyTorch whose stable ABI the sources use: 2.10.
ABI_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
# -Wno-psabi: passing 64-byte vectors in registers concerns only calls between libraries.
COMMON_FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi", *ABI_FLAGS,
)  # fmt: skip
# What GCC would do to every function besides, for a quarter of a source's time to compile: kernels
# whose loops are written as they shall run are no faster for it, and their code is larger. Value
# ranges (-ftree-vrp) are kept: without them, and these, some kernels take half as long again.
TRIM_FLAGS = {
    "gcc": (
        "-fno-thread-jumps", "-fno-tree-dominator-opts", "-fno-tree-slp-vectorize",
        "-fno-tree-pre", "-fno-code-hoisting", "-fno-gcse", "-fno-rerun-cse-after-loop",
        "-fno-crossjumping", "-fno-tree-tail-merge", "-fno-ipa-cp", "-fno-ipa-sra", "-fno-ipa-icf",
    ),
    "clang": (),
}  # fmt: skip
# These keep all of it: batch normalisation, average pooling's gradient and depthwise rows would
# take a tenth longer and more.
WHOLE_PATTERNS = (
    "cpu/batch_norm*.cpp", "cpu/microkernels/channel_columns*.cpp",
    "cpu/microkernels/plane_rows*.cpp", "cpu/avg_pool2d*.cpp",
)  # fmt: skip
# Of -O3, what is around the micro-kernels needs no more than the vectoriser, with the cost model
# that it has there: the rest makes copies of loops, which take long to compile and are no faster.
# Clang's -O2 has all of it.
DRIVER_PATTERNS = ("cpu/*.cpp", "cpu/microkernels/winograd_gemm.cpp")
DRIVER_FLAGS = {"gcc": ("-O2", "-ftree-vectorize", "-fvect-cost-model"), "clang": ("-O2",)}
# But these are faster with all of it, except where the next list has them.
FULL_PATTERNS = (
    "cpu/depthwise_*.cpp", "cpu/winograd_strided*.cpp", "cpu/winograd_wgrad_phases.cpp",
)  # fmt: skip
# Those that need not even the vectoriser: loops that are written as vectors, pooling's above all,
# which has the most instances, and what runs once a call.
LIGHT_PATTERNS = (
    "core/*.cpp", "ops/**/*.cpp", "cpu/*pool2d*.cpp", "cpu/conv_choice.cpp", "cpu/conv_explain.cpp",
    "cpu/conv_ways.cpp", "cpu/conv_view.cpp", "cpu/conv_gather.cpp", "cpu/conv_fprop.cpp",
    "cpu/conv_backward.cpp", "cpu/*_gemm.cpp", "cpu/packed_weights.cpp",
    "cpu/winograd.cpp", "cpu/conv_wgrad.cpp", "cpu/depthwise_columns.cpp",
    "cpu/group_gather.cpp", "cpu/group_wgrad.cpp", "cpu/winograd_wgrad.cpp",
    "cpu/conv_band_wgrad.cpp", "cpu/direct_tasks.cpp", "cpu/parallel_range.cpp",
    "cpu/batch_norm*.cpp",
)  # fmt: skip
LIGHT_FLAGS = ("-O2",)
# Integers' pooling is written as vectors to the last step, and no slower with this. That of the
# float types takes up to 1.8 times as long.
LEAST_PATTERNS = ("cpu/select_pool2d_integer.cpp",)
LEAST_FLAGS = ("-O1",)
# These take longest to compile and are begun first, so that no core is idle at the end.
SLOW_PATTERNS = (
    "cpu/*_pool2d*.cpp", "cpu/microkernels/*.cpp", "cpu/group_*.cpp", "cpu/*_gemm.cpp",
    "cpu/*wgrad.cpp", "cpu/winograd*.cpp", "cpu/conv_gather.cpp", "cpu/conv_band.cpp",
    "ops/*2d.cpp",
)  # fmt: skip
# Small sources that belong together are compiled as one translation unit, by its name: much of
# their time goes to headers and to what they share. What each names in its anonymous namespace must
# differ, and they are optimised alike; those compiled for another target stay by themselves.
TOGETHER_PATTERNS = {
    "ops": ("ops/**/*.cpp",),
    "cpu/norm": ("cpu/batch_norm*.cpp",),
    "cpu/conv": (
        "core/*.cpp", "cpu/conv_choice.cpp", "cpu/conv_explain.cpp", "cpu/conv_ways.cpp",
        "cpu/conv_view.cpp",
        "cpu/conv_gather.cpp", "cpu/conv_fprop.cpp", "cpu/conv_backward.cpp",
        "cpu/packed_weights.cpp", "cpu/parallel_range.cpp",
    ),
    "cpu/depthwise": ("cpu/depthwise_[!c]*.cpp", "cpu/depthwise_channels.cpp"),
    "cpu/direct": ("cpu/channel_*.cpp", "cpu/direct_plan.cpp", "cpu/row_pairs.cpp"),
    "cpu/group": (
        "cpu/group_band.cpp", "cpu/group_weights.cpp", "cpu/group_winograd*.cpp",
    ),
    "cpu/pack": (
        "cpu/axis_groups.cpp", "cpu/channels_last_copy.cpp", "cpu/col2im.cpp", "cpu/conv_band.cpp",
        "cpu/conv_pack.cpp",
        "cpu/inner_gather.cpp", "cpu/patches.cpp", "cpu/phase_image.cpp", "cpu/plane_pairs.cpp",
        "cpu/wgrad_*.cpp",
    ),
    "cpu/winograd_rows": ("cpu/winograd_rows*.cpp", "cpu/winograd_weights.cpp"),
    "cpu/winograd_strided": ("cpu/winograd_strided*.cpp", "cpu/winograd_wgrad_phases.cpp"),
    "cpu/microkernels/direct_tile": (
        "cpu/microkernels/direct_run.cpp", "cpu/microkernels/direct_tile_float32.cpp",
    ),
    "cpu/microkernels/gemm": ("cpu/microkernels/gemm_float*.cpp",),
    "cpu/microkernels/group_tile": ("cpu/microkernels/group_tile_float*.cpp",),
    "cpu/microkernels/product": (
        "cpu/microkernels/*_product.cpp", "cpu/microkernels/multiply_adds.cpp",
    ),
    "cpu/microkernels/taps": (
        "cpu/microkernels/plane_rows_spread.cpp", "cpu/microkernels/tap*.cpp",
        "cpu/microkernels/winograd_column.cpp",
    ),
}  # fmt: skip
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ),
}  # fmt: skip
# Neither libpython nor libtorch_python: one library for every Python.
LINK_FLAGS = (
    ("-undefined", "dynamic_lookup")
    if sys.platform == "darwin"
    else ("-Wl,--as-needed", "-Wl,--no-undefined", "-ltorch_cpu", "-lc10")
)
# With TORCHCONV_SANITIZE=1, as `make sanitize` sets it: what reads or writes outside its memory, or
# does what C++ leaves undefined, ends the process. These come last, so that -O1 counts.
SANITIZE_FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer", "-O1", "-g1",
)  # fmt: skip
# The sources outside the stable ABI, see there: each a library beside the others, bound to one
# PyTorch. C++20, under the name that the oldest compilers know, because PyTorch's own headers need
# it; and no headers of operators but those asked for, which halves what is read.
BOUND_PATTERNS = ("bound/*.cpp",)
GROWTH_LIBRARY = "torchconv_growth.so"
RECORDED_LIBRARY = "torchconv_recorded.so"
WATCH_LIBRARY = "torchconv_watch.so"
BOUND_FLAGS = (
    "-std=c++2a", "-O1", "-DNDEBUG", "-DAT_PER_OPERATOR_HEADERS", "-fPIC", "-fvisibility=hidden",
    "-Wall", "-Wextra",
)  # fmt: skip
SOURCE_PATTERNS = ("core/*.cpp", "ops/*.cpp", "ops/cpu/*.cpp", "cpu/**/*.cpp")
HEADER_PATTERNS = ("core/**/*.h", "ops/**/*.h", "cpu/**/*.h")
# The variant for GPUs. The operators are compiled once more, calling its kernels; the CUDA sources
# know no PyTorch. NDEBUG is more than speed: device assertions make ptxas serialise wgmma.
CUDA = "cuda"
CUDA_SOURCE_PATTERNS = ("cuda/*.cu", "cuda/*.cpp", "ops/*.cpp", "ops/cuda/*.cpp")
CUDA_HEADER_PATTERNS = ("core/**/*.h", "ops/**/*.h", "cuda/**/*.h", "cuda/**/*.cuh")
CUDA_SLOW_PATTERNS = ("cuda/cutlass_*.cu", "cuda/mma_*.cu", "cuda/simt_*.cu")
CUDA_FLAGS = ("-DTORCHCONV_CUDA",)
NVCC_FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", *CUDA_FLAGS, "--expt-relaxed-constexpr",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall",
)  # fmt: skip
# libtorch.so itself is used by name alone: it brings libtorch_cuda, where PyTorch has it, into what
# a lookup at run time sees. CUDA's runtime is linked statically, so that any PyTorch's will do.
CUDA_LINK_FLAGS = (
    "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10",
    "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--no-undefined",
)  # fmt: skip
# What a source declares mostly stays in use to its end: GCC would look again and again for what it
# may throw away, a twentieth of the time to compile, for at most 300 MB that it spares. The results
# are the same.
MEMORY_FLAGS = {"gcc": ("--param=ggc-min-heapsize=1000000",), "clang": ()}
# The headers that every source reads, compiled once for all of them.
PRECOMPILED = "cpu/precompiled.h"
OUTPUT = "output.txt"


@dataclass(frozen=True)
class Record:
    """What is written beside each library, as JSON: what it was built from, and its checksum."""

    source_hash: str
    build_hash: str
    torch: str
    compiler: str
    sha256: str
    architectures: Sequence[str] = ()  # of the library for GPUs


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine's compiler can build for."""
    x86_64 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(ISA_FLAGS) if x86_64 else ("default",)


def library_name(variant: str) -> str:
    return "torchconv_cuda.so" if variant == CUDA else f"torchconv_cpu_{variant}.so"


def source_root() -> Path:
    """csrc: inside the package where it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def _found(root: Path, patterns: Sequence[str]) -> set[Path]:
    return {path for pattern in patterns for path in root.glob(pattern)}


def sources(root: Path, variant: str = "") -> list[Path]:
    """Every translation unit, in an order that does not depend on the file system."""
    cuda = variant == CUDA
    slow = _found(root, CUDA_SLOW_PATTERNS if cuda else SLOW_PATTERNS)
    found = sorted(_found(root, CUDA_SOURCE_PATTERNS if cuda else SOURCE_PATTERNS))
    found.sort(key=lambda path: path not in slow)
    if not found:
        raise BuildError(
            f"no C++ sources in {root}", "reinstall torchconv; its folder csrc is not there"
        )
    return found


def units(root: Path, variant: str) -> dict[str, list[Path]]:
    """The sources by the object that they are compiled to, a name without suffix."""
    together = {
        path: name
        for name, patterns in TOGETHER_PATTERNS.items()
        for path in _found(root, patterns)
    }
    found: dict[str, list[Path]] = {}
    for path in sources(root, variant):
        own = path.relative_to(root).with_suffix("").as_posix()
        found.setdefault(together.get(path, own), []).append(path)
    return found


def headers(root: Path, variant: str = "") -> list[Path]:
    return sorted(_found(root, CUDA_HEADER_PATTERNS if variant == CUDA else HEADER_PATTERNS))


def bound_libraries(root: Path) -> dict[str, Path]:
    """The names of the libraries that are bound to one PyTorch, each with its one source."""
    return {f"torchconv_{path.stem}.so": path for path in sorted(_found(root, BOUND_PATTERNS))}


def sanitize_flags() -> tuple[str, ...]:
    return SANITIZE_FLAGS if os.environ.get("TORCHCONV_SANITIZE", "") not in ("", "0") else ()


def compile_flags(variant: str, chosen: Sequence[str] = ()) -> list[str]:
    """The C++ compiler's; chosen: how far a source is optimised, if not by -O3."""
    own = CUDA_FLAGS if variant == CUDA else ISA_FLAGS[variant]
    return [*COMMON_FLAGS, *chosen, *own, *sanitize_flags()]


def optimization(root: Path) -> dict[Path, tuple[str, ...]]:
    """What -O3 is too much for: how far each source of a CPU's library is optimised instead."""
    kind = compiler_kind(compiler())
    drivers = _found(root, DRIVER_PATTERNS) - _found(root, FULL_PATTERNS)
    flags = dict.fromkeys(drivers, DRIVER_FLAGS[kind])
    flags |= dict.fromkeys(_found(root, LIGHT_PATTERNS), LIGHT_FLAGS)
    flags |= dict.fromkeys(_found(root, LEAST_PATTERNS), LEAST_FLAGS)
    trimmed = set(sources(root)) - _found(root, WHOLE_PATTERNS)
    return flags | {path: (*flags.get(path, ()), *TRIM_FLAGS[kind]) for path in trimmed}


def link_flags(variant: str = "") -> list[str]:
    return [*(CUDA_LINK_FLAGS if variant == CUDA else LINK_FLAGS), *sanitize_flags()]


def _digest(parts: Sequence[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def source_hash(variant: str, root: Path) -> str:
    """Of everything torchconv itself puts into a library: a stale one has another source hash.

    The stable ABI makes the library good for any PyTorch, so neither PyTorch nor the compiler is
    part of it: a library built ahead of time stays when either is upgraded.
    """
    files = [*sources(root, variant), *headers(root, variant)]
    parts: list[str | bytes] = [*compile_flags(variant), *link_flags(variant)]
    if variant == CUDA:
        parts += NVCC_FLAGS
    else:
        files += bound_libraries(root).values()
        parts += BOUND_FLAGS
    parts += [*DRIVER_PATTERNS, *DRIVER_FLAGS["gcc"], *DRIVER_FLAGS["clang"], *FULL_PATTERNS]
    parts += [*TRIM_FLAGS["gcc"], *WHOLE_PATTERNS]
    parts += [*LIGHT_PATTERNS, *LIGHT_FLAGS, *LEAST_PATTERNS, *LEAST_FLAGS]
    for name, patterns in TOGETHER_PATTERNS.items():
        parts += [name, *patterns]
    for path in files:
        parts += [path.relative_to(root).as_posix(), path.read_bytes()]
    return _digest(parts)


def build_hash(variant: str, root: Path) -> str:
    """Of the sources and of what turns them into a library: PyTorch's headers and the compiler."""
    return _digest([source_hash(variant, root), environment_hash(variant)])


def environment_hash(variant: str = "") -> str:
    parts = [torch_version(), compiler_version(), platform.machine()]
    if variant == CUDA:
        parts += [nvcc_version(), *cuda_architectures(), str(cutlass_includes())]
    return _digest(parts)[:12]


def nvcc_flags(architectures: Sequence[str]) -> list[str]:
    flags = list(NVCC_FLAGS)
    for each in architectures:
        number, _, ptx = each.replace(".", "").partition("+")
        own = "90a" if number == "90" else number  # plain 9.0 has no wgmma
        flags.append(f"-gencode=arch=compute_{own},code=sm_{own}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if cutlass_includes():
        flags.append("-DTORCHCONV_CUTLASS")
    return flags


def _ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _torch_paths() -> tuple[list[str], list[str]]:
    """PyTorch's include and library folders."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # or it says at import that it found no GPU
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    finally:
        logger.setLevel(level)
    return include_paths(), library_paths()


def ninja_file(wanted: Sequence[str], root: Path) -> str:
    """The build of some variants: objects go to VARIANT/<path in csrc>.o, libraries beside."""
    includes, libraries = _torch_paths()
    # A message of a check in the sources names csrc/ops/conv2d.cpp wherever it was compiled.
    shared = ["-I", str(root), f"-fmacro-prefix-map={root}{os.sep}=csrc/"]
    shared += MEMORY_FLAGS[compiler_kind(compiler())]
    for path in includes:
        shared += ["-isystem", path]
    folders = [word for path in libraries for word in ("-L", path)]
    link = folders + link_flags() + runtime_libraries()
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {_ninja_command(compiler())}",
        f"shared = {_ninja_command(shared)}",
        f"link = {_ninja_command(link)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $shared -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule header",
        "  command = $cxx -MMD -MF $out.d $flags $shared -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -shared $in $link -o $out",
        "  description = link $out",
        # Does not fail: a PyTorch whose C++ API has changed costs this library, not the others. Nor
        # does it leave an older one in its place.
        "rule bound",
        "  command = rm -f $out; $cxx $flags $shared -shared $in $link -o $out || true",
        "  description = bound $out",
    ]
    if CUDA in wanted:
        toolkit = cuda_toolkit()
        lines += _cuda_rules(root, toolkit, folders)
    for name, source in _bound_along(wanted, root).items():
        lines += [
            f"build {name}: bound {_ninja_path(source)}",
            f"  flags = {_ninja_command(BOUND_FLAGS)}",
        ]
    chosen = optimization(root)
    # A wrapper such as ccache mostly cannot keep what was compiled with a precompiled header.
    precompiles = len(compiler()) == 1 and (root / PRECOMPILED).is_file()
    for variant in wanted:
        header = f"{variant}/{PRECOMPILED}"
        before, extra = "", []
        if precompiles and variant != CUDA:
            before, extra = f" | {header}.gch", ["-include", header]
            lines += [
                f"build {header}.gch: header {_ninja_path(root / PRECOMPILED)}",
                f"  flags = {_ninja_command(compile_flags(variant))}",
            ]
        objects = []
        for name, (source, *others) in units(root, variant).items():
            suffix = ".cu.o" if source.suffix == ".cu" else ".o"
            objects.append(f"{variant}/{name}{suffix}")
            if source.suffix == ".cu":
                lines.append(f"build {_ninja_path(objects[-1])}: nvcc {_ninja_path(source)}")
                continue
            flags = [*compile_flags(variant, chosen.get(source, ())), *extra]
            flags += [word for path in others for word in ("-include", str(path))]
            if variant == CUDA:
                flags += ["-isystem", str(toolkit / "include")]
            lines += [
                f"build {_ninja_path(objects[-1])}: compile {_ninja_path(source)}{before}",
                f"  flags = {_ninja_command(flags)}",
            ]
        inputs = " ".join(_ninja_path(name) for name in objects)
        rule = "link_cuda" if variant == CUDA else "link"
        lines.append(f"build {library_name(variant)}: {rule} {inputs}")
    return "\n".join(lines) + "\n"


def _cuda_rules(root: Path, toolkit: Path, folders: list[str]) -> list[str]:
    command = [str(nvcc()), *nvcc_flags(cuda_architectures()), "-I", str(root)]
    if os.environ.get("CXX"):
        command += ["-ccbin", compiler()[-1]]
    for path in cutlass_includes():
        command += ["-isystem", str(path)]
    library_folders = [word for name in ("lib64", "lib") for word in ("-L", str(toolkit / name))]
    link = [*folders, *library_folders, *link_flags(CUDA), *runtime_libraries()]
    return [
        f"nvcc = {_ninja_command(command)}",
        f"link_cuda = {_ninja_command(link)}",
        "rule nvcc",
        "  command = $nvcc -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link_cuda",
        "  command = $cxx -shared $in $link_cuda -o $out",
        "  description = link $out",
    ]


def compile_libraries(
    wanted: Sequence[str],
    root: Path,
    build_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Builds into build_dir, again only what changed, and returns the libraries.

    The last of them are the bound libraries, if this PyTorch and this compiler can build them.
    progress is called with how many of the files (objects and libraries) are done. What the
    compiler says, warnings too, goes to build_dir/output.txt.
    """
    root, build_dir = root.resolve(), build_dir.resolve()
    text = ninja_file(wanted, root)
    command = [find_ninja(), "-j", str(jobs())]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(text)
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    if sanitize_flags():
        environment.pop("LD_PRELOAD", None)  # the sanitizers are for this process alone
    output: list[str] = []
    # ninja and its compilers end with this process: ninja at its next word, the pipe being closed.
    with subprocess.Popen(
        command, cwd=build_dir, env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                done, of, total = line[1:].partition("]")[0].partition("/")
                if line.startswith("[") and of and done.isdigit() and total.isdigit():
                    if progress is not None:
                        progress(int(done), int(total))
                else:
                    output.append(line)
        except BaseException:
            process.terminate()  # an interrupt: ninja stops its compilers and removes half objects
            raise
    (build_dir / OUTPUT).write_text("".join(output))
    if process.returncode != 0:
        raise _compile_error("".join(output))
    libraries = [build_dir / library_name(variant) for variant in wanted]
    for variant, library in zip(wanted, libraries, strict=True):
        write_record(library, variant, root)
    for name in _bound_along(wanted, root):
        bound = build_dir / name
        if bound.is_file():
            write_record(bound, wanted[0], root)  # whose sources are among those of any of them
            libraries.append(bound)
    return libraries


def _bound_along(wanted: Sequence[str], root: Path) -> dict[str, Path]:
    """Those bound libraries that come with these variants: only CPUs' have any."""
    return bound_libraries(root) if any(each != CUDA for each in wanted) else {}


def _compile_error(output: str) -> BuildError:
    """The compiler's message, from the first error on, and the likeliest fix."""
    lines = output.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("FAILED:")), 0)
    lines = lines[first:]
    if len(lines) > 80:
        lines = [*lines[:80], f"... ({len(lines) - 80} more lines)"]
    version = compiler_version()
    too_old = age_fault(compiler())
    if too_old:
        fix = f"{too_old}: install a newer one, or set the environment variable CXX to one"
    else:
        fix = "if another compiler was meant, set the environment variable CXX; else report this"
    return BuildError(f"{version} failed:\n" + "\n".join(lines), fix)


def record_path(library: Path) -> Path:
    return library.with_suffix(".json")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_record(library: Path, variant: str, root: Path) -> None:
    record = Record(
        source_hash=source_hash(variant, root),
        build_hash=build_hash(variant, root),
        torch=torch_version(),
        compiler=compiler_version(),
        sha256=_sha256(library),
        architectures=cuda_architectures() if variant == CUDA else (),
    )
    record_path(library).write_text(json.dumps(asdict(record), indent=1) + "\n")


def read_record(library: Path) -> Record | None:
    """What was written beside a library; None if nothing was, or nothing readable."""
    try:
        return Record(**json.loads(record_path(library).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def fault(library: Path, expected_source_hash: str) -> str:
    """Why a library must not be opened, in words; empty if it may.

    The checksum is compared because a truncated library does not fail to open: it crashes.
    """
    if not library.is_file():
        return "is missing"
    record = read_record(library)
    if record is None:
        return "has no record of what it was built from"
    if record.source_hash != expected_source_hash:
        return "was built from other sources or flags"
    try:
        return "" if _sha256(library) == record.sha256 else "is damaged"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def bound_fault(library: Path) -> str:
    """Why a bound library must not be opened, in words; empty if it may.

    It lies beside a library that `fault` has found to be of the right sources. What must be right
    besides is PyTorch, to the letter: its C++ API has no stable ABI.
    """
    record = read_record(library)
    if record is not None and record.torch != torch_version():
        return f"was built for PyTorch {record.torch}"
    return fault(library, record.source_hash if record is not None else "")
