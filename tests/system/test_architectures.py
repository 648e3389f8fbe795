"""One EM iteration each with random models of four architectures, with a chat template and without; one of them has a
server in place of retriever actors."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.core.config.loading import load_config
from pipeline.core.copies import copies_of
from pipeline.core.display import Display
from pipeline.core.record_tables import examples_from_table, trajectories_from_table
from retriever_service.index.store import read_manifest
from tests.system.conftest import TOKEN, overrides, random_model

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("architecture", "layout", "retriever"),
    [
        pytest.param("Qwen2", "plain", "actors", marks=pytest.mark.chaos),
        ("Qwen3", "chat", "server"),
        pytest.param("Llama", "plain", "actors", marks=pytest.mark.chaos),
        pytest.param("Mistral", "chat", "actors", marks=pytest.mark.chaos),
    ],
)
def test_one_iteration_changes_the_model_and_reports(
    architecture: str,
    layout: str,
    retriever: str,
    world: Path,
    index: Path,
    ray_cluster: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.em import train

    model = random_model(tmp_path / "model", architecture)
    settings = [*overrides(world, index, model), f"agent.layout={layout}", "tracking.profile=true"]
    if retriever == "server":
        # The cluster is up already: its actors do not see this variable.
        monkeypatch.setenv("EXSEARCH_TOKEN", TOKEN)
        settings += ["retriever.index=null", f"retriever.url={request.getfixturevalue('server')}"]
    report = train(load_config(None, settings), tmp_path / "run", Display()).report

    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert set(report["test"]) == {"base", "cold_start", "no_search", "one_search", "best"}
    (row,) = report["iterations"]
    assert row["train"]["questions"] == 8 and row["train"]["likelihood_bound"] < 0
    assert row["learner"]["steps"] == 2 and row["dev"]["n"] == 4
    assert row["push"]["version"] == 1 and row["push"]["tensors"] > 0
    assert sum(row["train"]["stop_reasons"].values()) == 16

    searched = json.loads((tmp_path / "run" / "index.json").read_text())
    assert searched == {"fingerprint": read_manifest(index).fingerprint}
    assert not (tmp_path / "run" / "index").exists()
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "run").glob("*.*"))

    iteration = tmp_path / "run" / "iterations" / "0001"
    assert (iteration / "DONE").exists()
    trajectories = trajectories_from_table(pq.read_table(iteration / "rollouts"))
    examples = examples_from_table(pq.read_table(iteration / "searcher" / "examples"))
    assert len(trajectories) == sum(copies_of(example) for example in examples) == 16
    assert {t.policy_version for t in trajectories} == {0}
    by_id = {f"{trajectory.question_id}/{trajectory.sample}": trajectory for trajectory in trajectories}
    for example in examples:
        trajectory = by_id[example.id]
        context = trajectory.token_ids[: trajectory.answer_start]
        assert (example.token_ids[: trajectory.answer_start] == context).all()
    assert _weights(iteration / "searcher" / "model") != _weights(model)

    trace = json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    names = {it["pid"]: it["args"]["name"].split(" ")[0] for it in trace if it["name"] == "process_name"}
    calls = [(names[it["pid"]], it["name"]) for it in trace if it["ph"] == "X"]
    assert calls.count(("RolloutWorker", "rollout")) >= 8 + 4
    assert {("driver", "1/sample"), ("driver", "1/searcher/train"), ("LearnerRank", "train")} <= set(calls)


def _weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()
