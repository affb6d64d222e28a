"""The base of every value that crosses a module border: immutable, and strict about what it is given."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler


def _fail_fast(schema: Any) -> None:
    """Mark every tuple of any length in a schema; models inside it have done so already."""
    if isinstance(schema, dict):
        if schema.get("type") == "tuple" and "variadic_item_index" in schema:
            schema["fail_fast"] = True
        for name, part in schema.items():
            if name != "metadata":
                _fail_fast(part)
    elif isinstance(schema, list):
        for part in schema:
            _fail_fast(part)


class Frozen(BaseModel):
    """An immutable value; an unknown field is an error, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True, validate_by_name=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Reading a tuple ends at its first wrong item: millions of them would be millions of error values."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    def __copy__(self) -> Self:
        """The same fields; what a `cached_property` has kept may not be so of the copy, which `model_copy` changes."""
        copied = super().__copy__()
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied
