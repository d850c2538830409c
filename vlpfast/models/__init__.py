"""The models by name. Importing this imports none of them: `get` does."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from vlpfast.types import UserError

REGISTRY = {
    "clip": "vlpfast.models.clip:CLIP",
    "coop": "vlpfast.models.coop:CoOp",
    "instructblip": "vlpfast.models.instructblip:InstructBLIP",
    "tcl": "vlpfast.models.tcl:TCL",
    "tcl_assignment": "vlpfast.models.tcl_finetune:TCLAssignment",
    "tcl_entailment": "vlpfast.models.tcl_finetune:TCLEntailment",
    "tcl_nlvr2": "vlpfast.models.tcl_finetune:TCLNLVR2",
    "tcl_retrieval": "vlpfast.models.tcl:TCLRetrieval",
    "tcl_vqa": "vlpfast.models.tcl_finetune:TCLVQA",
}


def names() -> list[str]:
    return sorted(REGISTRY)


def get(name: str) -> type:
    """The class of a registered model. UserError: no such name; it names the nearest."""
    if name not in REGISTRY:
        near = get_close_matches(name, REGISTRY, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown model {name!r}{hint} (known: {', '.join(names())})")
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(import_module(module), attribute)
