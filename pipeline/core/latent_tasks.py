"""Latent tasks: increments of a model's weights that inputs share as far as they are alike.

    W(x) = W + 1/P sum_n g_n(x) B_n A_n          n = 1 .. P; A_n [r, inputs], B_n [outputs, r], B_n = 0 at first

of the output projection of every attention layer (Joint Flashback Adaptation, arXiv 2505.15467). Task n has a key c_n,
a point between an old input and a new one. An input x has open gates at its k nearest keys by the cosine, in proportion
to it:

    u_n(x) = cos(x, c_n) / sum over the k nearest of cos(x, c_m)       at these, else 0
    g_n(x) = u_n(x) / mean of u_n, over the old inputs and over the new ones half each

so that an old input and a new one near the same key train the same increment. Keys and gates are constants; A and B are
trained. The mean of every gate is 1: with all gates at 1 the weights are the mean of W(x) over the inputs, and that one
matrix is what engines and model directories get (as the adapters of AdaMix are averaged, arXiv 2205.12410).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.arrow_lists import arrays_of, list_array
from pipeline.core.records import Numbers

Vectors = npt.NDArray[np.floating[Any]]
_GATE = "gate/"


@dataclass(frozen=True, slots=True)
class LatentTasks:
    """How many latent tasks a model has, P, and the rank r of their increments."""

    tasks: int
    rank: int


def gates_between(
    old: Vectors, new: Vectors, tasks: int, nearest: int, rng: np.random.Generator
) -> tuple[Numbers, Numbers]:
    """Gates g [n, P] and [m, P] of old inputs [n, D] and of new ones [m, D], whose keys are between them.

    A latent task that no input is near to has closed gates.

    Args:
        tasks: P.
        nearest: k.
    """
    keys = keys_between(old, new, tasks, rng)
    of_old, of_new = (mixtures(inputs, keys, nearest) for inputs in (old, new))
    mean = (of_old.mean(axis=0) + of_new.mean(axis=0)) / 2
    mean[mean == 0] = 1
    return of_old / mean, of_new / mean


def keys_between(old: Vectors, new: Vectors, tasks: int, rng: np.random.Generator) -> Vectors:
    """Keys [P, D] of length 1, each somewhere on the way from an old input to a new one; these take turns."""
    ends = [_unit(inputs)[_in_turns(len(inputs), tasks, rng)] for inputs in (old, new)]
    share = rng.random((tasks, 1))
    return _unit((1 - share) * ends[0] + share * ends[1])


def mixtures(inputs: Vectors, keys: Vectors, nearest: int) -> Numbers:
    """u [n, P] of inputs [n, D]: how much of each latent task they have. Rows sum to 1."""
    cosines = _unit(inputs) @ keys.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :nearest]
    # An input that points away even from its nearest keys has them alike.
    chosen = np.maximum(np.take_along_axis(cosines, order, axis=1), 1e-6).astype(np.float64)
    found = np.zeros(cosines.shape)
    np.put_along_axis(found, order, chosen / chosen.sum(axis=1, keepdims=True), axis=1)
    return found


def gates_of(streams: Mapping[str, Numbers], tasks: int) -> npt.NDArray[np.float32]:
    """The gates [P] that an example's streams say. Where they say nothing all are closed."""
    gates = np.zeros(tasks, dtype=np.float32)
    for name, values in streams.items():
        if name.startswith(_GATE):
            gates[int(name.removeprefix(_GATE))] = values[0]
    return gates


def most_gates(streams: Iterable[str]) -> int:
    """The least number of latent tasks that a model must have for an example with these streams."""
    return max((1 + int(name.removeprefix(_GATE)) for name in streams if name.startswith(_GATE)), default=0)


def streams_of(gates: Numbers) -> dict[str, Numbers]:
    """The streams of an example with these gates [P]; closed ones need none."""
    return {f"{_GATE}{n}": np.array([gates[n]], dtype=np.float64) for n in np.flatnonzero(gates).tolist()}


def gates_to_table(ids: Sequence[str], gates: Numbers) -> pa.Table:
    """Columns `id` and `gates`: of each input its gates [P]."""
    return pa.table({"id": pa.array(ids, pa.string()), "gates": list_array(list(gates), pa.float64())})


def gates_from_table(table: pa.Table) -> dict[str, Numbers]:
    """Inverse of `gates_to_table`, by id."""
    gates = arrays_of(table["gates"].combine_chunks())
    return dict(zip(table["id"].to_pylist(), gates, strict=True))


def _unit(vectors: Vectors) -> Vectors:
    """The same [n, D] of length 1; what has none stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = vectors / np.where(lengths > 0, lengths, 1)
    return scaled


def _in_turns(count: int, places: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Of `count` things one for each place; none comes twice before all others came once."""
    rounds = [rng.permutation(count) for _ in range(-(-places // count))]
    return np.concatenate(rounds)[:places]
