"""Builds the compiled kernels: plain C++ and CUDA on raw pointers, compiled in parallel by ninja.

No torch is needed. `fmft_fast._cpu` is always built, `fmft_fast._cuda` where nvcc is found. Read
from the environment:

    FMFT_CUDA        auto (the default: build if nvcc is found, warn if that fails), 1 or 0
    FMFT_CUDA_ARCHS  compute capabilities, "80;86;89;90" by default, with PTX for the newest
    CXX, CXXFLAGS    host compiler and further flags; NVCC, CUDA_HOME for the CUDA compiler
    MAX_JOBS         limit of parallel compilations
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "dq", "bw", "vl"))]
ISA_FLAGS = {"portable": []}
if X86:
    ISA_FLAGS |= {"avx2": AVX2, "avx512": [*AVX512, "-mprefer-vector-width=512"]}

# -ffp-contract=fast lets a x b + c become one instruction; nothing else may change the arithmetic.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
CXX_FLAGS += ["-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

NINJA_RULES = """\
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $out
rule cuda
  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA $out
rule link
  command = $linker $in -o $out $flags
  description = LINK $out
"""


class BuildError(Exception):
    """A compiler or a tool that the build needs is missing or failed."""


def cuda_mode() -> str:
    mode = os.environ.get("FMFT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FMFT_CUDA must be auto, 1 or 0, got {mode!r}")
    return mode


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("NVCC"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = candidate and shutil.which(candidate)
        if found:
            return found
    return None


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: pip install ninja, or build with pip's build isolation")
    return [found]


def pybind11_include() -> str:
    """Return the folder of pybind11's headers: the package's own, else torch's copy."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            include = Path(spec.origin).parent / "include"
            if (include / "pybind11").is_dir():
                return str(include)
    raise BuildError(
        "pybind11 is missing: pip install pybind11, or build with pip's build isolation"
    )


def cuda_archs() -> list[str]:
    archs = os.environ.get("FMFT_CUDA_ARCHS", "80;86;89;90").replace(",", ";").split(";")
    archs = [arch.strip().replace(".", "") for arch in archs if arch.strip()]
    if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
        raise BuildError(f"FMFT_CUDA_ARCHS must look like '80;90', got {';'.join(archs)!r}")
    return sorted(archs, key=lambda arch: int(arch.rstrip("af")))


def arch_flags(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


class NinjaFile:
    """A build.ninja for one extension module."""

    def __init__(self, folder: Path, tools: dict[str, str]):
        self.folder = folder
        self.lines = [f"{name} = {escape(path)}" for name, path in tools.items()] + [NINJA_RULES]
        self.objects: list[str] = []

    def compile(self, rule: str, source: Path, flags: list[str], variant: str = "") -> None:
        target = f"{source.parent.name}-{source.stem}{variant}.o"
        self.objects.append(target)
        self.lines += [f"build {target}: {rule} {escape(source)}", f"  flags = {' '.join(flags)}"]

    def link(self, output: Path, flags: list[str]) -> None:
        self.lines += [
            f"build {escape(output)}: link {' '.join(self.objects)}",
            f"  flags = {' '.join(flags)}",
        ]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [*find_ninja(), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, cwd=self.folder).returncode:
            raise BuildError(f"compilation failed in {self.folder}; see the messages above")


def escape(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildKernels(build_ext):
    """Builds both modules with ninja in place of setuptools' own compiler driver."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        if ext.name == "fmft_fast._cpu":
            build_cpu(folder, output)
        else:
            self.build_cuda_if_possible(folder, output)

    def build_cuda_if_possible(self, folder: Path, output: Path) -> None:
        nvcc = find_nvcc()
        try:
            if nvcc is None:
                raise BuildError("nvcc is missing: install the CUDA toolkit or set CUDA_HOME")
            build_cuda(folder, output, nvcc)
        except BuildError as error:
            if cuda_mode() == "1":
                raise
            output.unlink(missing_ok=True)
            warnings.warn(f"fmft_fast is built without its CUDA kernels: {error}", stacklevel=1)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        declared = self.extensions
        self.extensions = [
            ext
            for ext in declared
            if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()
        ]
        super().copy_extensions_to_source()
        self.extensions = declared


def host_flags() -> list[str]:
    includes = [
        sysconfig.get_path("include"),
        sysconfig.get_path("platinclude"),
        pybind11_include(),
    ]
    return [f"-isystem {escape(path)}" for path in dict.fromkeys(includes)]


def link_flags() -> list[str]:
    shared = ["-bundle", "-undefined dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return [*shared, "-pthread"]


def build_cpu(folder: Path, output: Path) -> None:
    cxx = os.environ.get("CXX", "c++")
    flags = [*CXX_FLAGS, "-pthread", *os.environ.get("CXXFLAGS", "").split()]
    ninja = NinjaFile(folder, {"cxx": cxx, "linker": cxx})
    dispatch = ["-DFMFT_X86_DISPATCH"] if X86 else []
    for isa, isa_flags in ISA_FLAGS.items():
        for source in ("kernels", "trajectory_kernels"):
            isa_only = [*flags, f"-DFMFT_ISA={isa}", *isa_flags]
            ninja.compile("cxx", CSRC / f"cpu/{source}.cpp", isa_only, isa)
    for source in ("step", "trajectory_plan", "trajectory", "adaptive", "per_sample", "threads"):
        ninja.compile("cxx", CSRC / f"cpu/{source}.cpp", [*flags, *dispatch])
    ninja.compile("cxx", CSRC / "bindings/cpu.cpp", [*flags, *host_flags()])
    ninja.link(output, link_flags())
    ninja.run()


def build_cuda(folder: Path, output: Path, nvcc: str) -> None:
    archs = cuda_archs()
    ninja = NinjaFile(folder, {"nvcc": nvcc, "cxx": os.environ.get("CXX", "c++"), "linker": nvcc})
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        ninja.compile("cuda", source, [*NVCC_FLAGS, *arch_flags(archs)])
    names = f"-DFMFT_CUDA_ARCHS={'_'.join(archs)}"
    ninja.compile("cxx", CSRC / "bindings/cuda.cpp", [*CXX_FLAGS, *host_flags(), names])
    ninja.link(output, ["-shared", "-cudart static"])
    ninja.run()


def extensions() -> list[Extension]:
    names = ["fmft_fast._cpu"]
    if cuda_mode() == "1" or (cuda_mode() == "auto" and find_nvcc()):
        names.append("fmft_fast._cuda")
    return [Extension(name, sources=[]) for name in names]


try:
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
except BuildError as error:
    raise SystemExit(f"error: {error}") from error
