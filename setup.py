"""Builds r1kernels._C and, where nvcc and CUDA sources exist, r1kernels._C_cuda. Needs no torch.

Without a C++ compiler (or with CXX naming none) the package is pure Python; NVCC=none: no CUDA.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
SEARCH = f"{os.environ.get('PATH')}:/usr/local/cuda/bin"
NVCC = shutil.which(os.environ.get("NVCC") or "nvcc", path=SEARCH)
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math"
NVCC_FLAGS = "-std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -gencode=arch=compute_90a,code=sm_90a"
# Kernels are picked at run time, so only the file named after an instruction set may use it.
AVX512_FLAGS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
ISA_FLAGS = {"_avx2": "-mavx2 -mfma -mf16c", "_avx512": AVX512_FLAGS}
INCLUDE = [pybind11.get_include(), sysconfig.get_path("include"), os.path.abspath("csrc")]
NINJA = """\
flags = {flags} {include}
rule compile
  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
rule link
  command = {compiler} -shared $flags $in -o $out
"""


def extensions() -> list[Extension]:
    has_compiler, header = shutil.which(shlex.split(CXX)[0]), Path(INCLUDE[1], "Python.h")
    if not has_compiler or not header.exists():
        missing = header if has_compiler else CXX
        warnings.warn(f"no {missing}: r1kernels is built without its native backend", stacklevel=2)
        return []
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    cpu = [s for s in glob("csrc/cpu/*.cpp") if is_x86 or not s[:-4].endswith(tuple(ISA_FLAGS))]
    found = [Extension("r1kernels._C", ["csrc/bindings.cpp", *cpu])]
    if NVCC and (cuda := glob("csrc/cuda/*.cu")):
        found.append(Extension("r1kernels._C_cuda", ["csrc/bindings_cuda.cu", *cuda]))
    return found


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = Path(self.build_temp).absolute() / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        compiler, flags = (NVCC, NVCC_FLAGS) if ext.name.endswith("_cuda") else (CXX, CXX_FLAGS)
        include = " ".join(f"-I{shlex.quote(path)}" for path in INCLUDE)
        ninja, objects = NINJA.format(compiler=compiler, flags=flags, include=include), ""
        for source in map(Path, sorted(ext.sources)):
            isa = next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), "")
            build = f"{escape(folder / source.stem)}.o"
            ninja += f"build {build}: compile {escape(source.absolute())}\n  flags = $flags {isa}\n"
            objects += f" {build}"
        (folder / "build.ninja").write_text(f"{ninja}build {escape(target)}: link{objects}\n")
        if subprocess.call([sys.executable, "-m", "ninja", "-C", str(folder)]):
            off = "NVCC=none" if compiler == NVCC else "CXX=none"
            raise CompileError(f"{ext.name} did not compile; {off} installs without it")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
