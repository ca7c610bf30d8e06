"""Named implementations of one kind (decompositions, exporters, runtimes)."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from sft.core.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to implementation; an unknown name lists the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise InputError(f"There is no {self.kind} '{name}'. Known: {known}.")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
