"""What identifies a world: everything in it is a pure function of a `WorldSpec`."""

from dataclasses import dataclass
from typing import Literal

from pipeline.core.data.split_names import Split
from pipeline.core.data.world.names import PARTITIONS
from pipeline.core.errors import UserError

Size = Literal["small", "medium", "large"]

PASSAGES_PER_UNIT = 100
"""Kinds of entity come in fixed numbers per 100 passages, so a world has a multiple of 100."""


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """Seed, extent and partition of one world. Two partitions share no name, whatever their seeds.

    Raises:
        UserError: the partition is unknown, or `num_passages` is not a positive multiple of 100.
    """

    seed: int
    num_passages: int = 2_000
    num_train: int = 2_000
    num_dev: int = 300
    num_test: int = 500
    partition: str = "default"

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise UserError(f"partition {self.partition!r} is unknown; choose one of {', '.join(PARTITIONS)}")
        if self.num_passages < PASSAGES_PER_UNIT or self.num_passages % PASSAGES_PER_UNIT:
            raise UserError(
                f"num_passages is {self.num_passages}; it must be a positive multiple of {PASSAGES_PER_UNIT}"
            )

    @classmethod
    def of_size(cls, seed: int, size: Size, partition: str = "default") -> "WorldSpec":
        """The world of one of the three named sizes. Raises UserError for another size."""
        if size not in _SIZES:
            raise UserError(f"size {size!r} is unknown; choose one of {', '.join(_SIZES)}")
        return cls(seed, *_SIZES[size], partition=partition)

    @property
    def units(self) -> int:
        return self.num_passages // PASSAGES_PER_UNIT

    def num_questions(self, split: Split) -> int:
        """Questions in this split."""
        return {"train": self.num_train, "dev": self.num_dev, "test": self.num_test}[split]


_SIZES: dict[str, tuple[int, int, int, int]] = {
    "small": (2_000, 2_000, 300, 500),
    "medium": (100_000, 20_000, 2_000, 2_000),
    "large": (2_000_000, 100_000, 5_000, 5_000),
}
