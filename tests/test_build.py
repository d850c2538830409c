from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="waits for Linux with a C++ compiler")
SMALL_KERNELS = {
    "csrc/common/answer.h": "#pragma once\ninline long answer() { return 41; }\n",
    "csrc/toy/cpu.cpp": '#include "common/answer.h"\n'
    'extern "C" __attribute__((visibility("default"))) long toy() { return answer(); }\n',
    "csrc/host/module.cpp": "#include <Python.h>\nstatic PyModuleDef definition = {PyModuleDef_HEAD_INIT};\n"
    "PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&definition); }\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """setup.py with two small libraries, in a folder whose name has a blank in it."""
    root = tmp_path / "a checkout"
    (root / "vlpfast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / "vlpfast/__init__.py").write_text('__version__ = "0.0.1"\n')
    for name, text in SMALL_KERNELS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def build(root: Path, *, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python setup.py build_ext --inplace` with this PATH and these variables, without the caller's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("VLPFAST_BUILD", "CXX", "CXXFLAGS", "LDFLAGS", "NVCC")}
    kept |= environment | ({} if path is None else {"PATH": path})
    command = [sys.executable, "-W", "ignore", "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=root, env=kept, capture_output=True, text=True)


def libraries(root: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in root.glob("vlpfast/*.so"))


@needs_compiler
def test_a_second_build_does_nothing_and_a_changed_header_rebuilds(checkout: Path) -> None:
    def toy() -> int:
        code = "import ctypes, torch; print(ctypes.CDLL('vlpfast/_C.so').toy())"
        return int(subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True).stdout)

    first = build(checkout)
    assert first.returncode == 0, first.stdout + first.stderr
    assert libraries(checkout) == ["_C", "_host"] and toy() == 41
    times = {path: path.stat().st_mtime_ns for path in checkout.glob("vlpfast/*.so")}
    assert "no work to do" in build(checkout).stdout
    assert times == {path: path.stat().st_mtime_ns for path in checkout.glob("vlpfast/*.so")}
    header = checkout / "csrc/common/answer.h"
    header.write_text(header.read_text().replace("41", "43"))
    again = build(checkout)
    assert "csrc/toy/cpu.cpp" in again.stdout and "csrc/host/module.cpp" not in again.stdout
    assert toy() == 43
    (checkout / "csrc/toy/cpu.cpp").write_text("#error wrong\n")
    broken = build(checkout)
    assert broken.returncode != 0 and "the native build failed" in broken.stderr and "#error wrong" in broken.stdout
    assert toy() == 43


@needs_compiler
def test_none_builds_nothing(checkout: Path) -> None:
    assert build(checkout, VLPFAST_BUILD="none").returncode == 0
    assert libraries(checkout) == []


def test_unknown_mode(checkout: Path) -> None:
    done = build(checkout, VLPFAST_BUILD="gpu")
    assert done.returncode != 0 and "VLPFAST_BUILD: expected cpu, cuda or none, got 'gpu'" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Linux")
def test_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    default = build(checkout, path=str(tmp_path))
    assert default.returncode == 0 and default.stderr.count("no C++ compiler found") == 1
    assert libraries(checkout) == []
    asked = build(checkout, path=str(tmp_path), VLPFAST_BUILD="cpu")
    assert asked.returncode != 0 and "VLPFAST_BUILD=cpu: no C++ compiler found" in asked.stderr


@needs_compiler
def test_cuda_without_what_it_needs(checkout: Path, tmp_path: Path) -> None:
    no_kernels = build(checkout, VLPFAST_BUILD="cuda")
    assert no_kernels.returncode != 0 and "csrc holds no .cu file" in no_kernels.stderr
    (checkout / "csrc/toy/sm90.cu").write_text("")
    no_nvcc = build(checkout, path=str(tmp_path), VLPFAST_BUILD="cuda", CXX=str(COMPILER))
    assert no_nvcc.returncode != 0 and "nvcc not found" in no_nvcc.stderr
    assert libraries(checkout) == []


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="waits for nvcc")
def test_cuda_puts_kernels_into_the_operator_library(checkout: Path) -> None:
    (checkout / "csrc/toy/sm90.cu").write_text(
        "__global__ void kernel(float* x) { x[threadIdx.x] *= 2; }\n"
        'extern "C" __attribute__((visibility("default"))) int launch(float* x) '
        "{ kernel<<<1, 32>>>(x); return cudaGetLastError(); }\n"
    )
    done = build(checkout, VLPFAST_BUILD="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import ctypes, torch; library = ctypes.CDLL('vlpfast/_C.so'); print(library.toy(), library.launch is not None)"
    used = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    assert used.stdout.split() == ["41", "True"]


@pytest.mark.skipif(not (ROOT / "vlpfast/_C.so").exists(), reason="waits for the native library (a C++ compiler)")
@pytest.mark.skipif(shutil.which("nm") is None, reason="waits for binutils")
def test_the_operator_library_uses_nothing_but_the_stable_interface() -> None:
    listed = subprocess.run(["nm", "-DC", ROOT / "vlpfast/_C.so"], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in listed or "torch_" in listed
    assert not re.findall(r"^.*\b(?:c10|at|torch)::.*$", listed, re.MULTILINE)


@pytest.mark.slow
@needs_compiler
def test_the_wheel_has_both_libraries_and_computes(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("VLPFAST_BUILD", "VLPFAST_BACKEND", "PYTHONPATH")}

    def call(*command: str, cwd: Path = ROOT) -> str:
        done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("csrc", "vlpfast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for folder in ROOT.glob("build/native-*"):  # what is compiled already and has not changed is not compiled again
        shutil.copytree(folder, source / "build" / folder.name)
    (source / "vlpfast/_stale.so").touch()
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    call(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name and "linux" in wheel.name
    inside = zipfile.ZipFile(wheel).namelist()
    assert sorted(name.split(".")[0] for name in inside if name.endswith(".so")) == ["vlpfast/_C", "vlpfast/_host"]
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("vlpfast/**/*.py")}
    assert packages <= {os.path.dirname(name) for name in inside}
    call(*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel))
    code = (
        f"import os, sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"  # which takes a minute
        "import vlpfast, vlpfast._host\n"
        "from vlpfast.ops import backends, selfcheck\n"
        "checks = selfcheck.check()\n"
        "assert all(check.ok for check in checks), checks\n"
        "print(vlpfast.__file__, vlpfast._host.__file__, *sorted({check.backend for check in checks}), sep='\\n')"
    )
    module, host, *used = call("-c", code, cwd=tmp_path).split("\n")[:-1]
    assert module.startswith(str(tmp_path / "site")) and host.startswith(str(tmp_path / "site"))
    assert "cpp" in used
