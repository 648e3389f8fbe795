"""How long to wait before something is tried again."""

from __future__ import annotations

import random


class Backoff:
    """Pauses that double with each failure, drawn so that callers do not return all at once.

    Args:
        base_s: mean of the first pause, in seconds.
        seed: of the jitter; None: another one in each process.
    """

    def __init__(self, base_s: float, seed: int | None = 0) -> None:
        self.base_s = base_s
        self._random = random.Random(seed)

    def pause_s(self, failures: int, *, asked_s: float = 0.0, most_s: float = float("inf")) -> float:
        """Seconds to wait after so many failures, between half and one and a half of the mean.

        Args:
            failures: so far; after none there is no pause.
            asked_s: what the other side asked for; it is kept, with some jitter, unless it is more than `most_s`.
        """
        if not failures:
            return 0.0
        own = self.base_s * 2.0 ** (failures - 1) * self._random.uniform(0.5, 1.5)
        return max(own, min(asked_s * self._random.uniform(1.0, 1.5), most_s))
