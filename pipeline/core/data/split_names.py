"""The three sets of questions: what is trained on, what the best iteration is chosen by, what is reported."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
