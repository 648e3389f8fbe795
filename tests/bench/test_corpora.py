"""Made vectors of benchmarks' large corpora."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bench.corpora import made_vectors
from retriever_service.building.calibration import clustered_vectors

POOL = clustered_vectors(64, 16, seed=0)
IDS = st.lists(st.text(min_size=1), min_size=1, max_size=20)


@given(ids=IDS)
def test_a_made_vector_has_length_one_and_depends_on_its_id_alone(ids: list[str]) -> None:
    together = made_vectors(POOL, ids)

    alone = np.concatenate([made_vectors(POOL, [one]) for one in ids])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)
