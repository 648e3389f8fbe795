"""Prints what comes of every odd file: `python -m bench.odd_files [--reader NAME] [--errors]`.

Exit code 1 if one of them ends in a traceback, or in nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

from bench.odd_files.data import made_of_data
from bench.odd_files.directories import directories
from bench.odd_files.readers import data_files
from bench.odd_files.trial import trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", default="", help="only those whose name holds this")
    parser.add_argument("--errors", action="store_true", help="print every error")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    total: Counter[str] = Counter()
    print("| read | files | inputs | records | errors |\n|---|---|---|---|---|")
    wrong = []
    for reader in [*data_files(), *made_of_data(), *directories()]:
        if chosen.reader not in reader.name:
            continue
        outcomes = list(trials(reader))
        kinds = Counter(outcome.kind for outcome in outcomes)
        total += kinds
        print(
            f"| {reader.name} | {len(reader.files)} | {len(outcomes)} | {kinds['records']} | {kinds['error']} |",
            flush=True,
        )
        wrong += [outcome for outcome in outcomes if not outcome.is_right]
        if chosen.errors:
            for one in outcomes:
                print(f"  {one.file}, {one.damage}: {one.kind} {one.records or one.text[:300]!r}")
    print(f"\n{total.total()} inputs: {total['records']} read, {total['error']} refused with one error")
    for one in wrong:
        print(f"\n{one.reader}: {one.file}, {one.damage}: {one.kind}\n{one.text}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
