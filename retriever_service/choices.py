"""Values that options on the command line choose from. Nothing is imported here, so that `--help` answers at once."""

from __future__ import annotations

from typing import Literal

WeightsDtype = Literal["float32", "bfloat16", "float16"]
"""What an encoder's weights are loaded as."""
StoreDtype = Literal["float32", "float16"]
"""Of vectors on disk."""
Method = Literal["dense", "bm25", "hybrid"]
"""How a search ranks passages."""
DEFAULT_KS = (5, 10, 100)
"""Depths that rankings are judged at."""
