"""What all records share: frozen, printable, stored as JSON."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sft.core.errors import InputError
from sft.core.files import read_text, write_text

FORMAT = 1
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Record:
    """What all records share: JSON in and out, checked field by field."""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for `json.dumps`; fields that hold arrays are left out."""
        plain: dict[str, Any] = _adapter(type(self)).dump_python(
            self, mode="json", exclude={"statistics"}
        )
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "record") -> Self:
        """Parse and check; an `InputError` names the field that is wrong."""
        try:
            record: Self = _adapter(cls).validate_json(text)
        except ValidationError as error:
            raise InputError(
                f"'{source}' is not a valid {cls.__name__}: {_explain(error)}"
            ) from None
        stored = getattr(record, "format", FORMAT)
        if stored != FORMAT:
            raise InputError(
                f"'{source}' has format {stored}, this version of SFT reads {FORMAT}. "
                f"Make it again with this version."
            )
        return record

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls.from_json(read_text(Path(path)), str(path))


_adapters: dict[type, TypeAdapter[Any]] = {}


def _adapter(cls: type) -> TypeAdapter[Any]:
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors()[:3]:
        where = ".".join(str(p) for p in item["loc"]) or "the whole"
        parts.append(f"{where}: {item['msg']}")
    return "; ".join(parts)
