"""What actors load that have no use for it costs each of them seconds at every start."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipeline.core.packages import has_gpu_packages

LARGE = {
    "datasets",
    "deepspeed",
    "faiss",
    "sentence_transformers",
    "sklearn",
    "torch",
    "transformers",
    "vllm",
}


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("actors.weighting", set()),
        ("actors.retriever", {"faiss"}),
        ("actors.rollout", {"faiss", "torch"}),
        ("actors.learner_rank", {"torch"}),
    ],
)
def test_an_actor_loads_of_large_libraries_only_those_that_it_needs_from_the_start(
    module: str, needs: set[str]
) -> None:
    code = f"import sys, {module}; print(*{LARGE} & {{*sys.modules}})"

    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=100)

    assert set(loaded.split()) <= needs


def test_the_kind_of_packages_is_known_without_torch_and_as_torch_says_it() -> None:
    assert has_gpu_packages() == (torch.version.cuda is not None)
