"""What all sections of the configuration have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


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


Sources = Annotated[tuple[str, ...], BeforeValidator(as_list)]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Marks a key that may name something on disk. A run keeps it as an absolute path, which holds in any directory."""
