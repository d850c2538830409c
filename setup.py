"""Builds the native libraries with ninja; everything else about the package is in pyproject.toml.

csrc/*/*.cpp     -> vlpfast/_C.so            operators on torch's stable ABI: one file for every torch from 2.10 and every Python
csrc/*/*.cu      -> the same library         with VLPFAST_BUILD=cuda
csrc/host/*.cpp  -> vlpfast/_host.<tag>.so   pybind11 helpers of the data path

VLPFAST_BUILD=cpu|cuda|none chooses (default: cpu). Where there is no C++ compiler a default build says so and goes on without
native libraries; cpu or cuda asked for by name fails there. CXX, CXXFLAGS, LDFLAGS and NVCC are honoured.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMON = "-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
OPERATORS = f"{COMMON} -O3 -fno-math-errno -fno-trapping-math -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc"
HOST = f"{COMMON} -O2 -pthread"
KERNELS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -gencode arch=compute_90a,code=sm_90a -Icsrc"
# torch is loaded before the library, so no rpath; libtorch stays among what the library needs even where no symbol names it
LINK = "-Xlinker --no-as-needed -ltorch_cpu -ltorch"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def find(variable: str, *names: str) -> str | None:
    """The program that the environment variable names, else the first of `names` on the path."""
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


def find_compiler() -> str | None:
    return find("CXX", "g++", "c++", "clang++")


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"vlpfast: building needs the package {name} in this environment (or set VLPFAST_BUILD=none)")
    return Path(spec.submodule_search_locations[0])


def plan() -> list[Extension]:
    """What is to be built here; an empty list for a package of Python alone."""
    mode = os.environ.get("VLPFAST_BUILD", "")
    if mode not in ("", "cpu", "cuda", "none"):
        raise SystemExit(f"vlpfast: VLPFAST_BUILD: expected cpu, cuda or none, got {mode!r}")
    if mode == "none":
        return []
    missing = ""
    if sys.platform != "linux":
        missing = f"the native libraries are built on Linux only (this is {sys.platform})"
    elif find_compiler() is None:
        missing = "no C++ compiler found (install g++ or clang++, or set CXX)"
    if missing and mode:
        raise SystemExit(f"vlpfast: VLPFAST_BUILD={mode}: {missing}")
    if missing:
        print(f"vlpfast: {missing}; going on without the native libraries, operators use torch or Triton", file=sys.stderr)
        return []
    kernels = sources("csrc/*/*.cu") if mode == "cuda" else []
    if mode == "cuda" and not kernels:
        raise SystemExit("vlpfast: VLPFAST_BUILD=cuda: csrc holds no .cu file, nothing is there for nvcc; use cpu")
    if mode == "cuda" and find("NVCC", "nvcc") is None:
        raise SystemExit("vlpfast: VLPFAST_BUILD=cuda: nvcc not found (install the CUDA toolkit, or set NVCC)")
    host = sources("csrc/host/*.cpp")
    operators = [source for source in sources("csrc/*/*.cpp") if source not in host]
    headers = sources("csrc/*/*.h") + sources("csrc/*/*.cuh")
    return [
        Extension("vlpfast._C", operators + kernels, depends=headers),
        Extension("vlpfast._host", host, depends=headers),
    ]


def ninja_file(folder: str, outputs: dict[str, Extension]) -> str:
    """The rules, for ninja started in ROOT. folder: where results go. outputs: file name of a library -> what goes into it."""

    def quote(argument: object) -> str:
        return shlex.quote(str(argument)).replace("$", "$$")

    torch = package_folder("torch")
    host_includes = [sysconfig.get_path("include"), package_folder("pybind11") / "include"]
    dependencies = "depfile = $out.d\n  deps = gcc\n  description = $in"
    lines = [
        f"builddir = {folder}",
        f"rule cxx\n  command = {find_compiler()} -MMD -MF $out.d $flags -c $in -o $out\n  {dependencies}",
        f"rule nvcc\n  command = {find('NVCC', 'nvcc')} -MMD -MF $out.d {KERNELS} -c $in -o $out\n  {dependencies}",
        f"rule link\n  command = {find_compiler()} -shared -pthread $in -o $out $flags\n  description = $out",
        f"rule link_cuda\n  command = {find('NVCC', 'nvcc')} -shared -cudart static $in -o $out $flags\n  description = $out",
    ]
    for output, extension in outputs.items():
        if extension.name == "vlpfast._C":
            flags = f"{OPERATORS} -isystem {quote(torch / 'include')}"
            link = f"-L{quote(torch / 'lib')} {LINK}"
        else:
            flags, link = HOST + "".join(f" -isystem {quote(path)}" for path in host_includes), ""
        objects = {source: f"{folder}/{source}.o" for source in extension.sources}
        for source, result in objects.items():
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            lines.append(f"build {result}: {rule} {source}\n  flags = {flags} {os.environ.get('CXXFLAGS', '')}")
        rule = "link_cuda" if any(source.endswith(".cu") for source in objects) else "link"
        lines.append(f"build {folder}/{output}: {rule} {' '.join(objects.values())}")
        lines.append(f"  flags = {link} {os.environ.get('LDFLAGS', '')}")
    return "\n".join(lines) + "\n"


def ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise SystemExit("vlpfast: building needs ninja: pip install ninja (or set VLPFAST_BUILD=none)") from None
    return os.path.join(BIN_DIR, "ninja")


class BuildNative(build_ext):
    """Runs ninja, which rebuilds what has changed, and puts the libraries where setuptools wants them."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so" if fullname.endswith("_C") else super().get_ext_filename(fullname)

    def run(self) -> None:
        folder = f"build/native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        outputs = {os.path.basename(self.get_ext_fullpath(extension.name)): extension for extension in self.extensions}
        if not outputs:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "build.ninja").write_text(ninja_file(folder, outputs))
        quiet = [] if self.distribution.verbose else ["--quiet"]
        if subprocess.run([ninja(), "-f", f"{folder}/build.ninja", *quiet]).returncode:
            raise SystemExit("vlpfast: the native build failed, see above (VLPFAST_BUILD=none installs without it)")
        for name, extension in outputs.items():
            built, target = Path(folder, name), Path(self.get_ext_fullpath(extension.name))
            if not target.exists() or target.stat().st_mtime_ns != built.stat().st_mtime_ns:
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
                shutil.copy2(built, aside)
                os.replace(aside, target)  # a process that has loaded the old one keeps it


os.chdir(ROOT)
# The libraries of an in-place build lie among the Python files; a wheel takes those that were built for it, not these.
setup(ext_modules=plan(), cmdclass={"build_ext": BuildNative}, exclude_package_data={"vlpfast": ["*.so"]})
