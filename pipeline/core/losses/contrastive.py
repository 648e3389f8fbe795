"""InfoNCE for sentence encoders: each query should be nearer to its own passage than to the others of its unit.

Negatives come from the unit and not from whatever shares a micro-batch: the loss then is a sum over units, whose value
does not depend on packing, ranks or accumulation. A recipe makes a unit of as many queries as it wants negatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.core.losses.loss import Form, Output, Outputs, Prepared, Rows, Terms
from pipeline.core.records import Outline


@dataclass(frozen=True, slots=True)
class InfoNce:
    """Mean over queries of -log softmax(cos(query, passages of the unit) / temperature) at the query's own passage
    (van den Oord et al. 2018, equation 4).

    Streams, one number per example: `is_query`, 1 or 0; `group`, which a query shares with its passage and nobody else
    in the unit does. A passage of a group without a query is a negative for all.
    """

    temperature: float = 0.05

    output: ClassVar[Output] = "embeddings"
    streams: ClassVar[Mapping[str, Form]] = {"is_query": "number", "group": "number"}
    reference: ClassVar[str | None] = None
    compares: ClassVar[bool] = True

    def prepare(self, examples: Sequence[Outline]) -> Prepared:
        queries = [(e.unit, e.number("group")) for e in examples if e.number("is_query")]
        passages = Counter((e.unit, e.number("group")) for e in examples if not e.number("is_query"))
        if wrong := [key for key in queries if passages[key] != 1]:
            raise ValueError(f"a query must have one passage of its own; (unit, group) without: {wrong[:5]}")
        return Prepared(
            sizes=[example.number("is_query") for example in examples],
            computed=[True] * len(examples),
        )

    def terms(self, outputs: Outputs, rows: Rows, normaliser: float) -> Terms:
        embeddings = torch.nn.functional.normalize(outputs.predicted.float(), dim=-1)
        is_query, group = rows.numbers["is_query"] > 0, rows.numbers["group"]
        scores = embeddings[is_query] @ embeddings[~is_query].T / self.temperature
        same_unit = rows.unit[is_query][:, None] == rows.unit[~is_query]
        scores = scores.masked_fill(~same_unit, float("-inf"))
        own = same_unit & (group[is_query][:, None] == group[~is_query])
        logprobs = scores.log_softmax(-1)[own]
        first = scores.argmax(-1) == own.float().argmax(-1)
        return Terms(-logprobs.sum() / normaliser, {"recall_at_1": (first.sum(), len(first))})
