"""Classes and numbers of a sample, from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.pictures import DamagedSample
from vlpfast.data.templates import Tree, leaf, resolve
from vlpfast.types import TargetSpec, UserError


class Targets:
    """The targets of a DataSpec. Raises UserError for a specification that makes no sense."""

    def __init__(self, specs: Mapping[str, TargetSpec]) -> None:
        self.names, self._specs = list(specs), dict(specs)
        self._places = {name: {one: place for place, one in enumerate(spec.classes)} for name, spec in specs.items()}
        self._lengths: dict[str, int] = {}  # of vectors
        for name, spec in specs.items():
            if spec.kind not in ("class", "number", "vector"):
                raise UserError(f'{name}.kind: expected "class", "number" or "vector", got {spec.kind!r}')
            if not all(spec.key.split(".")):
                raise UserError(f"{name}.key: expected a field of the sample's JSON, got {spec.key!r}")
            if len(self._places[name]) < len(spec.classes):
                raise UserError(f"{name}.classes: expected each name once")

    def measure(self, records: Sequence[dict[str, Any]]) -> None:
        """Takes the length of each vector from the first of these samples that has one; others count as damaged.
        UserError: none has one."""
        for name, spec in self._specs.items():
            if spec.kind != "vector" or name in self._lengths:
                continue
            reasons = []
            for record in records:
                try:
                    value, _ = leaf(self._resolve(name, record), lambda path, count: 0)
                except DamagedSample as error:
                    reasons.append(str(error))
                else:
                    self._lengths[name] = len(value)
                    break
            else:
                raise UserError(f"the first {len(records)} samples have no target {name!r}: {reasons[0]}")

    def inspect(self, record: dict[str, Any]) -> dict[str, Tree]:
        """Raises DamagedSample."""
        return {name: self._resolve(name, record) for name in self.names}

    def fields(self, found: Sequence[dict[str, Tree]], pick: Callable[[int, str, int], int]) -> dict[str, Tensor]:
        """found: what inspect() told of each sample; pick(row, purpose, count): as texts draw -> Batch fields."""
        made = {}
        for name, spec in self._specs.items():
            values = [
                leaf(of[name], lambda path, count, row=row: pick(row, f"list {path}", count))[0] for row, of in enumerate(found)
            ]
            made[name] = torch.tensor(values, dtype=torch.int64 if spec.kind == "class" else torch.float32)
        return made

    def _resolve(self, name: str, record: dict[str, Any]) -> Tree:
        spec = self._specs[name]
        read = {"class": self._class, "number": self._number, "vector": self._vector}[spec.kind]
        try:
            return resolve(
                record, tuple(spec.key.split(".")), lambda value: read(name, spec, value), vector=spec.kind == "vector"
            )
        except DamagedSample as error:
            raise DamagedSample(f"target {name}: {error}") from error

    def _class(self, name: str, spec: TargetSpec, value: Any) -> int:
        places = self._places[name]
        if isinstance(value, str):
            if value not in places:
                known = f"none of the {len(places)} class names" if places else "a name, and no class names are known"
                raise DamagedSample(f'"{spec.key}" in the json member is {value!r}, {known}')
            return places[value]
        number = value - spec.first if isinstance(value, int) else -1  # true and false are 1 and 0
        if not 0 <= number < (len(places) or 1 << 31):
            expected = f"a class name or its number, {spec.first} .. {spec.first + len(places) - 1}" if places else "a number"
            raise DamagedSample(f'"{spec.key}" in the json member is {value!r}, expected {expected}')
        return number

    def _number(self, name: str, spec: TargetSpec, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:  # not above NaN either
            raise DamagedSample(f'"{spec.key}" in the json member is {value!r}, expected a number')
        return float(value)

    def _vector(self, name: str, spec: TargetSpec, value: Any) -> list[float]:
        if not isinstance(value, list) or not value:
            raise DamagedSample(f'"{spec.key}" in the json member is no list of numbers')
        if (length := self._lengths.get(name, len(value))) != len(value):
            raise DamagedSample(f'"{spec.key}" in the json member has {len(value)} numbers, the other samples\' {length}')
        return [self._number(name, spec, number) for number in value]


def read_classes(spec: TargetSpec, records: Sequence[dict[str, Any] | None]) -> np.ndarray:
    """The class of each sample, int64 [N]; of a list the first one's; -1: it has none that can be used."""
    target = Targets({"label": spec})
    found = np.full(len(records), -1, np.int64)
    for i, record in enumerate(records):
        try:
            found[i] = leaf(target._resolve("label", record or {}), lambda path, count: 0)[0]
        except DamagedSample:
            continue
    return found
