"""What a part of the check finds: measured figures, some of them with a bound that must hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = Literal["tiny", "0.6b", "7b"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `bound` and `ok` are empty and None where it is only reported."""

    what: str
    value: float
    unit: str
    bound: str = ""
    ok: bool | None = None

    def cells(self) -> list[str]:
        verdict = "" if self.ok is None else ("ok" if self.ok else "FAILED")
        return [self.what, f"{self.value:.4g} {self.unit}".strip(), self.bound, verdict]


def at_most(what: str, value: float, unit: str, bound: float) -> Row:
    """A figure that must not exceed `bound`."""
    return Row(what, value, unit, f"<= {bound:g}", value <= bound)


def at_least(what: str, value: float, unit: str, bound: float) -> Row:
    """A figure that must reach `bound`."""
    return Row(what, value, unit, f">= {bound:g}", value >= bound)
