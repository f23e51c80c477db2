"""Ahead-of-time compilation of every kernel that ships: `python -m benchmarks.aot [--chosen]`.

Compiles the Triton kernels in the modes, dtypes and flags that their launchers ask for, for sm_80
and sm_90, and csrc/cuda/*.cu for sm_90a where nvcc is installed. No GPU is needed. Prints one line
per build; exits with 1 on a spilled register, too much shared memory or a failed compile.

What is built: every kernel in every mode and dtype with all its flags off and all on, the bfloat16
GEMM also with each flag alone; and everything with all flags on for sizes and strides that are no
multiples of 16 (the GEMM has a smaller tile there).
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from r1kernels._triton import attention, common, glu
from r1kernels._triton import counted_kernels as counted
from r1kernels._triton import head_configs as configs
from r1kernels._triton import head_kernels as head
from r1kernels._triton import kept_logp as kept
from r1kernels._triton import product_kernels as product
from r1kernels._triton import target_kernels as target
from r1kernels._triton import token_logp as token
from r1kernels._triton.common import INTERPRETED
from r1kernels.reference.glu import ACTIVATIONS

CUDA_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
# Machine instructions worth counting in CUDA C++.
SASS = ("HGMMA", "UTMALDG", "UBLKCP", "SYNCS", "USETMAXREG", "MEMBAR", "LDL", "STL")
# Bytes a block may use: the opt-in limit of the architecture.
SHARED_LIMIT = {80: 166_912, 90: 232_448}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MODES = {
    "sums": head.SUMS.value,
    "store": head.STORE.value,
    "gradient": head.GRADIENT.value,
    "top": head.TOP.value,
    "product": head.PRODUCT.value,
}
BIAS_SOFTCAP = ["HAS_BIAS", "SOFTCAP"]
LOW_BIAS = ["HAS_LOW", *BIAS_SOFTCAP]
SOFTCAP_ENTROPY = ["SOFTCAP", "ENTROPY"]
KEPT_LOGITS = {"BLOCK_N": kept.BLOCK_LOGITS_N, "BLOCK_D": kept.BLOCK_LOGITS_D}
KEPT_SUM = {"BLOCK_N": kept.BLOCK_SUM_N, "BLOCK_D": kept.BLOCK_SUM_D}
SEGMENT = {"BLOCK_T": target.BLOCK_SEGMENT_T, "BLOCK_D": target.BLOCK_SEGMENT_D}
WORKERS = 2

# Types of the parameters that are neither a float32 pointer (*_ptr) nor an int32: x is the dtype of
# the inputs, o of what is written.
PARAMETERS = {
    "hidden_ptr": "*x",
    "weight_ptr": "*x",
    "low_ptr": "*x",
    "lora_ptr": "*x",
    "bias_ptr": "*x",
    "logits_ptr": "*x",
    "out_ptr": "*o",
    "dh_ptr": "*x",
    "gate_ptr": "*x",
    "up_ptr": "*x",
    "query_ptr": "*x",
    "key_ptr": "*x",
    "value_ptr": "*x",
    "dout_ptr": "*x",
    "tiles_ptr": "*i64",
    "left_ptr": "*x",
    "right_ptr": "*x",
    "steps_ptr": "*i32",
    "num_steps_ptr": "*i32",
    "sums_ptr": "*fp64",
    "targets_ptr": "*i64",
    "order_ptr": "*i64",
    "offsets_ptr": "*i64",
    "starts_ptr": "*i64",
    "ids_ptr": "*i32",
    "exact_ptr": "*fp64",
    "exact_logp_ptr": "*fp64",
    "exact_entropy_ptr": "*fp64",
    "exact_lse_ptr": "*fp64",
    "ends_ptr": "*i64",
    "rows_ptr": "*i64",
    "count_ptr": "*i32",
    "scale": "fp32",
    "softcap": "fp32",
}


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel of a module, the dtypes of its inputs and output, its constants and options."""

    module: str
    kernel: str
    arch: int
    dtype: str
    out: str
    constants: dict[str, int | bool]
    options: dict[str, int]
    aligned: bool = True
    variant: str = ""

    @property
    def name(self) -> str:
        """kernel[dtype,flag,...], without spaces."""
        mode = [word for word, value in MODES.items() if self.constants.get("MODE") == value]
        flags = [
            key.lower().removeprefix("has_")
            for key, value in self.constants.items()
            if value is True and key not in ("EVEN_D", "EVEN_E", "SPECIALIZED")
        ]
        words = [self.dtype, *mode, *flags, *([] if self.aligned else ["unaligned"])]
        words += [self.variant] * bool(self.variant)
        return f"{self.kernel.strip('_')}[{','.join(words)}]"


@dataclass(frozen=True, slots=True)
class Record:
    """What a build came to; `error` is the compiler's complaint, empty where it compiled."""

    name: str
    arch: int
    registers: int = 0
    shared: int = 0
    spills: int = 0
    error: str = ""
    sass: Counter[str] = field(default_factory=Counter)  # CUDA C++: instructions by first word


def builds(arch: int) -> Iterator[Build]:
    """Everything that is compiled for an architecture; see the module's docstring."""
    for (dtype, x), aligned in itertools.product(DTYPES.items(), (True, False)):
        rows = [
            (target, "_target_logits_kernel", {"BLOCK_D": target.BLOCK_D}, LOW_BIAS, 4),
            (target, "_add_target_hidden_kernel", {"BLOCK_D": target.BLOCK_D}, [], 4),
            (target, "_add_target_weight_kernel", SEGMENT, [], 4),
            (kept, "_kept_logits_kernel", KEPT_LOGITS, BIAS_SOFTCAP, kept.NUM_WARPS),
            (kept, "_kept_dhidden_kernel", KEPT_SUM, [], kept.NUM_WARPS),
            (kept, "_kept_dweight_kernel", KEPT_SUM, ["HAS_BIAS"], kept.NUM_WARPS),
        ]
        for module, kernel, blocks, names, warps in rows:
            for flags in _settings(names, single=False, off=aligned):
                out = x if module is kept else "fp32"
                options = {"num_warps": warps}
                yield Build(
                    module.__name__, kernel, arch, x, out, {**blocks, **flags}, options, aligned
                )
        for flags in _settings(SOFTCAP_ENTROPY, single=aligned, off=aligned):
            blocks = token.tile(dtype, flags["SOFTCAP"])
            # Rows cut alike in logits and gradient, as they are unless their strides differ
            same, other = ("bwd", {"SAME_CUT": True}), ("bwd", {"SAME_CUT": False})
            forward, uncut = ("fwd", {"CUT": True}), ("fwd", {"CUT": False})
            for kernel, more in (forward, same, *[uncut, other] * (not aligned)):
                constants = {**blocks, **flags, **more}
                yield Build(
                    token.__name__,
                    f"_token_logp_{kernel}_kernel",
                    arch,
                    x,
                    x,
                    constants,
                    {"num_warps": token.NUM_WARPS},
                    aligned,
                )
        for kernel, (at, activation) in itertools.product(
            ("_glu_fwd_kernel", "_glu_bwd_kernel"), enumerate(ACTIVATIONS)
        ):
            yield Build(
                glu.__name__,
                kernel,
                arch,
                x,
                x,
                {"ACTIVATION": at, "BLOCK_N": glu.BLOCK_N},
                {"num_warps": glu.NUM_WARPS},
                aligned,
                activation,
            )
        blocks = product.tiles(dtype, aligned)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        blocks["GROUP_C"] = product.GROUP_C
        yield Build(
            product.__name__, "_add_product_kernel", arch, x, "fp32", blocks, options, aligned
        )
        if x == "bf16" and aligned:
            yield from _counted_builds(arch)
        if x != "fp32":
            yield from _attention_builds(arch, x, aligned)
        for name, variant in configs.VARIANTS.items():
            if arch in variant and (name == "pointers" or (aligned and x != "fp32")):
                yield from _head_builds(arch, dtype, name, aligned)
    blocks = {"BLOCK_C": head.BLOCK_REDUCE, "BLOCK_TILES": head.BLOCK_REDUCE}
    for mode, listed in (("sums", False), ("sums", True), ("top", True)):
        flags = {"LISTED": listed, "MODE": MODES[mode]}
        out = "fp32" if mode == "top" else "fp64"
        options = {"num_warps": 4}
        yield Build(
            head.__name__, "_reduce_kernel", arch, "fp32", out, blocks | flags, options, False
        )
    for module, kernel, blocks in (
        (kept, "_kept_softmax_kernel", {"BLOCK_N": kept.BLOCK_SOFTMAX_N}),
        (common, "_finish_rows_kernel", {"BLOCK_T": common.BLOCK_ROWS}),
    ):
        yield Build(module.__name__, kernel, arch, "fp32", "fp32", blocks, {"num_warps": 4}, False)


def _counted_builds(arch: int) -> Iterator[Build]:
    """The GEMMs over listed rows."""
    blocks = {"BLOCK": counted.BLOCK, "STEP": counted.STEP, "GROUP": counted.GROUP}
    kernels = [("_hidden_rows_kernel", {"EVEN": even}) for even in (False, True)]
    for kernel, flags in [*kernels, ("_weight_rows_kernel", {})]:
        for lists in (False, True):
            constants = {**blocks, **flags, "LISTS": lists}
            options = counted.options(arch)
            yield Build(counted.__name__, kernel, arch, "bf16", "fp32", constants, options)


def _attention_builds(arch: int, x: str, even: bool) -> Iterator[Build]:
    """Attention by head width, even ones or those that are padded to them. It runs by name only, so
    all but one setting count as variants."""
    kernels = enumerate(("fwd", "dquery", "dkey"))
    for (which, kernel), width in itertools.product(kernels, attention.CONFIGS):
        blocks = attention.config(which, width if even else width - 8)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        for causal in (True, False) if even and width == 128 else (True,):
            main = (x, even, width, causal) == ("bf16", True, 128, True)
            constants = {**blocks, "CAUSAL": causal, "EVEN_E": even}
            yield Build(
                attention.__name__, f"_attention_{kernel}_kernel", arch, x, x, constants, options,
                even, "" if main else f"e{width}",
            )  # fmt: skip


def _head_builds(arch: int, dtype: torch.dtype, variant: str, aligned: bool) -> Iterator[Build]:
    """The GEMM kernel of a variant in its modes."""
    x = DTYPES[dtype]
    for mode in MODES:
        pointers = variant == "pointers"
        if (mode == "top" and not pointers) or (mode == "product" and not aligned):
            continue
        out = x if mode == "product" else DTYPES[head.store_dtype(dtype)]
        names = {"top": BIAS_SOFTCAP, "product": [], "gradient": BIAS_SOFTCAP}.get(
            mode, [*BIAS_SOFTCAP, "ENTROPY"]
        )
        settings = _settings(names, single=x == "bf16" and aligned, off=aligned)
        # A low-rank term adds a loop, and float32 then has the loads of its unaligned tiles.
        if pointers and mode != "product" and not (aligned and x == "fp32"):
            settings += [{**each, "HAS_LOW": True} for each in settings[: 1 + (x == "bf16")]]
        for flags in settings:
            flags = {"HAS_BIAS": False, "SOFTCAP": False, "ENTROPY": False} | flags
            low = flags.pop("HAS_LOW", False)
            gradient = mode == "gradient"
            config = configs.launch_config(
                arch, dtype, aligned, gradient, flags["SOFTCAP"], flags["ENTROPY"], variant
            )
            if config.loads != configs.VARIANTS[variant][arch].loads:
                continue
            blocks = {key: getattr(config, key) for key in ("BLOCK_C", "BLOCK_V", "BLOCK_D")}
            blocks |= {"GROUP_C": config.GROUP_C, "SPLIT": config.SPLIT, "MODE": MODES[mode]}
            blocks |= flags
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            if config.loads != "pointers":
                blocks["SPECIALIZED"] = config.loads == "specialized"
                kernel = "_head_tma_kernel"
                yield Build(head.__name__, kernel, arch, x, out, blocks, options, aligned, variant)
                continue
            # Lists are of rows to be redone, or of those with a coefficient.
            for listed in {"product": (False,), "top": (True,)}.get(mode, (False, True)):
                constants = {**blocks, "HAS_LOW": low, "EVEN_D": aligned, "LISTED": listed}
                yield Build(
                    head.__name__, "_head_kernel", arch, x, out, constants, options, aligned
                )


def _settings(names: list[str], single: bool, off: bool) -> list[dict[str, bool]]:
    """All flags on; with `off` also all off; with `single` also each alone."""
    found = [dict.fromkeys(names, True)]
    if off and names:
        found.append(dict.fromkeys(names, False))
    if single:
        found += [{name: name == alone for name in names} for alone in names]
    return found


def _matrix(name: str, build: Build) -> str:
    """Type of an operand of the TMA kernel: a descriptor's, or a pointer's."""
    dtype = build.out if name == "out" else build.dtype
    if build.constants["SPECIALIZED"]:
        return f"*{dtype}"
    constants = build.constants
    rows = constants["BLOCK_V" if name == "weight" else "BLOCK_C"]
    columns = constants["BLOCK_D"]
    if name == "out":
        columns = constants["BLOCK_V"] // constants["SPLIT"]
    return f"tensordesc<{dtype}[{rows}, {columns}]>"


def compile_triton(build: Build) -> Record:
    """Compiles one build and reads registers and spills from ptxas's own report."""
    kernel = getattr(sys.modules[build.module], build.kernel)
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        pointer = parameter.name.endswith("_ptr")
        text = PARAMETERS.get(parameter.name, "*fp32" if pointer else "i32")
        matrix = build.kernel == "_head_tma_kernel" and parameter.name in (
            "hidden",
            "weight",
            "out",
        )
        if matrix:
            text = _matrix(parameter.name, build)
        signature[parameter.name] = {"*x": f"*{build.dtype}", "*o": f"*{build.out}"}.get(text, text)
        special = text == "i32" and not parameter.do_not_specialize
        if (
            pointer
            or parameter.name in ("columns", "R")
            or (build.aligned and special)
            or text[0] == "*"
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=build.constants, attrs=attributes)
    report = io.StringIO()
    try:
        with contextlib.redirect_stdout(report):
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", build.arch, 32),
                options={**build.options, "enable_fp_fusion": True},
            )
    # Whatever a compiler pass raises is this build's result, and fails the run.
    except Exception as error:
        return Record(build.name, build.arch, error=f"{type(error).__name__}: {error}")
    return read_report(build.name, build.arch, report.getvalue(), compiled.metadata.shared)


def read_report(name: str, arch: int, report: str, shared: int = 0) -> Record:
    """The largest figures of a `ptxas -v` report; no figures at all are a failure."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spills = [
        int(stores) + int(loads)
        for stores, loads in re.findall(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", report
        )
    ]
    static = [int(count) for count in re.findall(r"(\d+) bytes smem", report)]
    if not registers or not spills:
        return Record(name, arch, error="the compiler reported no resource usage")
    return Record(name, arch, max(registers), max([shared, *static]), max(spills))


def cuda_sources() -> list[Path]:
    """The CUDA sources that hold kernels, where nvcc is installed."""
    if not shutil.which("nvcc"):
        return []
    return [path for path in sorted(CUDA_SOURCES.glob("*.cu")) if "_kernel.cuh" in path.read_text()]


def compile_cuda(path: Path) -> Record:
    """Compiles one CUDA source for sm_90a and counts its machine instructions."""
    name = path.name
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-I", str(CUDA_SOURCES.parent)]
        command += ["-gencode", "arch=compute_90a,code=sm_90a", "-cubin", "-o", f"{folder}/out"]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        if done.returncode:
            return Record(name, 90, error=done.stderr.strip() or f"nvcc exit {done.returncode}")
        dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", f"{folder}/out"]
        code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    record = read_report(name, 90, done.stderr)
    # setmaxnreg ignored, wgmma made sequential.
    if warning := re.search(r".*\b(C7508|C7510)\b.*", done.stderr):
        return replace(record, error=warning[0])
    words = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(\w+)", code)
    return replace(record, sass=Counter(words))


def faults(record: Record) -> list[str]:
    """Why a build must not ship; empty for a good one."""
    if record.error:
        return [f"FAILED {record.error}"]
    found = []
    if record.spills:
        found.append("SPILLS")
    if record.sass["LDL"] or record.sass["STL"]:
        found.append("LOCAL MEMORY")
    if record.shared > SHARED_LIMIT[record.arch]:
        found.append(f"SHARED MEMORY over {SHARED_LIMIT[record.arch]}")
    return found


def line(record: Record) -> str:
    """KERNEL sm_90 registers=.. shared=.. spills=.., and what is wrong with it."""
    figures = f"registers={record.registers} shared={record.shared} spills={record.spills}"
    counts = [f"{word}={record.sass[word]}" for word in SASS if record.sass[word]]
    return " ".join([record.name, f"sm_{record.arch}", figures, *counts, *faults(record)])


def _prepare(cache: str) -> None:
    """In each worker: a cache of its own run, since a cached kernel has no ptxas report."""
    triton.knobs.cache.dir = cache
    triton.knobs.nvidia.dump_ptxas_log = True


def main() -> int:
    if INTERPRETED:
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 2
    sources = cuda_sources()
    todo = [build for arch in SHARED_LIMIT for build in builds(arch)]
    if "--chosen" in sys.argv[1:]:
        chosen = {"", *configs.CHOICE.values(), *ACTIVATIONS}
        todo = [build for build in todo if build.variant in chosen]
    total = bad = 0
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            WORKERS,
            mp_context=multiprocessing.get_context("fork" if os.name == "posix" else None),
            initializer=_prepare,
            initargs=(cache,),
        ) as pool,
    ):
        records = (
            pool.map(compile_triton, todo, chunksize=4),
            pool.map(compile_cuda, sources),
        )
        for record in itertools.chain(*records):
            print(line(record), flush=True)
            total += 1
            bad += bool(faults(record))
    print(f"{total} builds, {bad} at fault", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
