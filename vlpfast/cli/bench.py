"""vlpfast-bench: lists and runs the scripts of benchmarks/."""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
from pathlib import Path

import vlpfast
from vlpfast.cli._run import run
from vlpfast.types import UserError

FOLDER = Path(vlpfast.__file__).parents[1] / "benchmarks"


def scripts(folder: Path) -> dict[str, Path]:
    """Name to file of every benchmark; UserError where there are none."""
    found = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
    if not found:
        raise UserError(
            f"no benchmark scripts in {folder}: they are part of vlpfast's source, not of the installed package. "
            "Get the source, then run python benchmarks/NAME.py, or vlpfast-bench after pip install -e ."
        )
    return found


def summary(script: Path) -> str:
    """First line of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlpfast-bench",
        description="Runs a benchmark, or lists them all.",
        epilog="example: vlpfast-bench contrastive --device cpu --quick (what follows the name goes to the script; try --help)",
    )
    parser.add_argument("name", nargs="?", help="a benchmark; without one they are listed")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark")
    parsed = parser.parse_args(arguments)
    known = scripts(FOLDER)
    if parsed.name is None:
        width = max(map(len, known))
        print("\n".join(f"{name:{width}}  {summary(path)}".rstrip() for name, path in known.items()))
        return 0
    if parsed.name not in known:
        near = difflib.get_close_matches(parsed.name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise UserError(f"no benchmark named {parsed.name!r}; {hint}")
    return subprocess.run([sys.executable, str(known[parsed.name]), *parsed.options]).returncode


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
