"""Which texts are encoded together, from their numbers of tokens. Padding is work like any other on a CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def of_like_length(lengths: Sequence[int], multiple: int, largest: int) -> list[list[int]]:
    """Rows in batches of at most `largest`, each of texts that pad to the same multiple of tokens.

    The padded length of a text is then its own, whatever is encoded beside it.
    """
    rows: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows[-(-length // multiple)].append(row)
    return [group[i : i + largest] for group in rows.values() for i in range(0, len(group), largest)]


def of_like_size(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows by descending length, in batches of at most so many tokens, padding included; a longer text is alone.

    Short texts fill the processor as well as long ones, and memory is bounded.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
