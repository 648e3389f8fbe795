"""What all sections of the configuration have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """YAML reads a section whose keys are all commented out as null."""
        return {} if value is None else value


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def as_method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def as_word(value: Any) -> Any:
    """YAML reads a plain yes or no as a truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def from_home(value: Any) -> Any:
    """`~` is the home directory, as it is in a shell."""
    if isinstance(value, tuple):
        return tuple(map(from_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(as_list), AfterValidator(from_home)]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Marks a key that may name something on disk. A run keeps it as an absolute path, which holds in any directory."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(from_home, handler(source))
