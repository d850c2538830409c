"""Templates over a sample's JSON, and what its dotted fields hold: values, or lists of which one is chosen later."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from vlpfast.data.pictures import DamagedSample
from vlpfast.types import UserError

Path = tuple[str, ...]  # a dotted field, divided
Template = list[str | int | Path]  # texts, ids of special tokens, fields, in their order
Tree = Any  # a value, or a Choices of trees

CAPTION: Path = ("caption",)


@dataclass(frozen=True)
class Choices:
    """A list of the JSON on the way to a value. path: where it is; items: the values within its elements."""

    path: str
    items: list[Tree]
    elements: list[Any]

    def weights(self) -> list[float]:
        """The elements' "weight", 1 where they have none. Raises DamagedSample."""
        found = [element.get("weight", 1.0) if isinstance(element, dict) else 1.0 for element in self.elements]
        for weight in found:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise DamagedSample(f'"{self.path}.weight" in the json member is {weight!r}, expected a number from 0 on')
        return [float(weight) for weight in found]


def parse_template(text: str, special: Mapping[str, int], where: str) -> Template:
    """special: tokens that become their ids where the template itself spells them. `{{` and `}}` are braces. Raises UserError."""
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is no template: {error}") from error
    tokens = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)")
    template: Template = []
    for literal, name, form, conversion in pieces:
        at = 0
        for token in tokens.finditer(literal):
            template += [literal[at : token.start()], special[token.group()]]
            at = token.end()
        template.append(literal[at:])
        if name is None:
            continue
        if form or conversion or not all(name.split(".")) or "[" in name:
            raise UserError(f"{where}: expected fields of the sample's JSON such as {{label}} or {{qa.question}} in {text!r}")
        template.append(tuple(name.split(".")))
    return [part for part in template if part != ""]


def resolve(value: Any, path: Path, read: Callable[[Any], Any], *, vector: bool = False, at: int = 0) -> Tree:
    """The field `path` of `value`, every value in it as `read` gives it. vector: the value itself is a list. Raises
    DamagedSample: there is no such field, or a list without elements."""
    if isinstance(value, list) and not (vector and at == len(path)):
        where = ".".join(path[:at])
        if not value:
            raise DamagedSample(f'the list "{where}" in the json member is empty')
        if any(isinstance(item, list) for item in value):
            raise DamagedSample(f'the list "{where}" in the json member has lists as its elements')
        return Choices(where, [resolve(item, path, read, vector=vector, at=at) for item in value], value)
    if at == len(path):
        return read(value)
    if not isinstance(value, dict) or path[at] not in value:
        raise DamagedSample(f'there is no "{".".join(path)}" in the json member')
    return resolve(value[path[at]], path, read, vector=vector, at=at + 1)


def leaf(tree: Tree, choose: Callable[[str, int], int]) -> tuple[Any, list[Choices]]:
    """The value that choose(path of a list, its length) leads to, and the lists on the way."""
    lists = []
    while isinstance(tree, Choices):
        lists.append(tree)
        tree = tree.items[choose(tree.path, len(tree.items))]
    return tree, lists


def innermost(tree: Tree) -> list[Choices]:
    """The lists whose elements hold values without a further list."""
    if not isinstance(tree, Choices):
        return []
    own = [tree] if any(not isinstance(item, Choices) for item in tree.items) else []
    return own + [found for item in tree.items for found in innermost(item)]


def leaves(tree: Tree) -> list[Any]:
    """All values."""
    return [value for item in tree.items for value in leaves(item)] if isinstance(tree, Choices) else [tree]
