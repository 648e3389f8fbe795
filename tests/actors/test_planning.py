"""Plans of the shipped configurations, and the check before a local Ray starts. Nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from actors import planning
from actors.planning import check_memory, plan_run
from pipeline import methods
from pipeline.core.config import Config
from pipeline.core.config.loading import load_config
from pipeline.core.errors import UserError
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.machine import Node, Nodes, gpu_nodes
from pipeline.core.plan.memory import GIB
from pipeline.core.plan.run_plan import RunPlan
from pipeline.em import searcher_of
from tests.pipeline.core.plan.shapes import LLAMA_8B, QWEN_7B, in_gib

ROOT = Path(__file__).resolve().parents[2]
TINY = f"model.path={ROOT / 'models' / 'tiny-searcher'}"


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    """An override that names a directory with nothing but the model's config.json."""
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path)
    return f"model.path={tmp_path}"


@pytest.fixture
def llama(tmp_path: Path) -> str:
    LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path)
    return f"model.path={tmp_path}"


def config(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / name, overrides)


def plan(of: Config, nodes: Nodes, *, gpu_packages: bool = True) -> RunPlan:
    return plan_run(of, [searcher_of(of)], nodes, Assumptions(), gpu_packages=gpu_packages)


def test_qwen_on_eight_shared_gpus(qwen: str) -> None:
    made = plan(config("qwen2.5-7b-8gpu.yaml", qwen), gpu_nodes(1, 8, 79.6, None))

    assert (made.layout.shared, made.layout.take_turns, made.refusals(), made.warnings()) == (
        True,
        True,
        [],
        [],
    )
    sampling, training = made.gpus()
    # The engine's share, log-probabilities of what is scored, and what the learner leaves there.
    assert in_gib(sampling.bytes) == pytest.approx(0.7 * 79.6 + 0.9 + 1.8 + 2, abs=0.1)
    assert in_gib(training.bytes) == pytest.approx(34, abs=1)
    (searcher,) = made.policies
    assert searcher.engine is not None
    assert searcher.engine.cache.tokens == pytest.approx(722_000, rel=0.01)
    assert in_gib(searcher.push_bytes) == pytest.approx(14.2, abs=0.05)
    assert (searcher.engines, searcher.ranks, searcher.transport) == (8, 8, "ipc")
    assert [(t.kind, t.number) for t in made.layout.nodes[0]] == [
        (kind, number) for kind in ("engine", "rank") for number in range(8)
    ]


def test_at_once_on_the_same_gpus_qwen_has_little_room_for_its_agents(qwen: str) -> None:
    """The reference table's layout: both on a GPU, 0.45 of it for the engine: 348,000 tokens for 256 agents."""
    both = config(
        "qwen2.5-7b-8gpu.yaml",
        qwen,
        "cluster.take_turns=false",
        "rollout.gpu_memory_utilization=0.45",
        "rollout.concurrency=256",
    )
    made = plan(both, gpu_nodes(1, 8, 79.6, None))

    (gpu,) = made.gpus()
    assert 66 <= in_gib(gpu.bytes) <= 72
    (warning,) = made.warnings()
    assert "1,363 for each of rollout.concurrency=256 agents" in warning


def test_llama_on_four_nodes_that_share_all_gpus(llama: str) -> None:
    made = plan(config("llama3.1-8b-4x8gpu.yaml", llama), gpu_nodes(4, 8, 79.6, 1024))

    assert (made.layout.shared, made.layout.take_turns, made.refusals(), made.warnings()) == (
        True,
        True,
        [],
        [],
    )
    sampling, training = made.gpus()
    assert in_gib(sampling.bytes) == pytest.approx(0.7 * 79.6 + 0.5 + 2, rel=0.02)
    # As in the reference table, with 32 ranks in place of 16.
    assert in_gib(training.bytes) == pytest.approx(25 - (0.9 + 5.6 + 1.9) / 2 + 2, rel=0.1)
    (searcher,) = made.policies
    assert (searcher.engines, searcher.ranks, searcher.transport) == (32, 32, "ipc")
    assert [[(t.kind, t.number) for t in node] for node in made.layout.nodes] == [
        [(kind, 8 * number + k) for kind in ("engine", "rank") for k in range(8)] for number in range(4)
    ]


def test_llama_on_four_nodes_apart(llama: str) -> None:
    made = plan(config("llama3.1-8b-4x8gpu-apart.yaml", llama), gpu_nodes(4, 8, 79.6, 1024))

    assert (made.layout.shared, made.layout.take_turns, made.refusals()) == (False, False, [])
    engine, rank = made.gpus()
    assert in_gib(engine.bytes) == pytest.approx(71.6, rel=0.1)
    assert in_gib(rank.bytes) == pytest.approx(25, rel=0.1)
    assert made.policies[0].transport == "nccl"
    # Packed: two nodes generate, two learn.
    kinds = [{tenant.kind for tenant in node} for node in made.layout.nodes]
    assert kinds == [{"engine"}, {"engine"}, {"rank"}, {"rank"}]
    (warning,) = made.warnings()
    assert "idle" in warning and "cluster.colocate=yes" in warning


def test_sharing_all_gpus_makes_an_iteration_twice_as_fast(llama: str) -> None:
    """The figures in the comments of both files."""

    def minutes(name: str) -> list[int]:
        phases = plan(config(name, llama), gpu_nodes(4, 8, 79.6, None)).phases
        return [round(phase.seconds / 60) for phase in phases if phase.name in ("E-step", "M-step")]

    assert minutes("llama3.1-8b-4x8gpu.yaml") == [26, 142]
    assert minutes("llama3.1-8b-4x8gpu-apart.yaml") == [48, 284]


def test_a_model_that_a_gpu_cannot_hold_is_refused(llama: str) -> None:
    small = config("llama3.1-8b-4x8gpu-apart.yaml", llama, "learner.zero_stage=1")

    with pytest.raises(UserError, match=r"GPU of a learner rank: .* of 23.6 GiB .*learner.zero_stage=3"):
        plan(small, gpu_nodes(4, 8, 23.6, None)).check()


def test_an_engine_larger_than_a_node_is_refused(llama: str) -> None:
    wide = config(
        "llama3.1-8b-4x8gpu-apart.yaml", llama, "rollout.tensor_parallel_size=8", "rollout.workers=2"
    )

    with pytest.raises(UserError, match="no room for 8 GPUs in one"):
        plan(wide, gpu_nodes(8, 4, 79.6, None))


def test_the_demo_fits_a_small_machine() -> None:
    made = plan(config("demo.yaml", TINY), (Node(2, 0, 0, 8 * GIB),), gpu_packages=False)

    assert (made.layout.device, made.refusals(), made.warnings()) == ("cpu", [], [])
    assert [phase.name for phase in made.phases] == ["cold start", "E-step", "M-step", "push", "dev", "test"]


def test_samples_of_dev_questions_take_disk() -> None:
    def shards(*overrides: str) -> int:
        demo = config("demo.yaml", TINY, "em.iterations=3", *overrides)
        assumed = Assumptions(questions=100, dev_questions=50)
        return plan_run(
            demo, [searcher_of(demo)], (Node(2, 0, 0, 8 * GIB),), assumed, gpu_packages=False
        ).disk.shards

    # Of 100 questions 4 in 3 iterations; of 50 dev questions 2 after the cold start and each of these.
    assert shards("em.dev_samples=2") / shards() == pytest.approx((1200 + 400) / 1200, rel=1e-6)
    assert shards("em.further_samples=4", "rollout.samples=2") / shards("rollout.samples=2") == 3


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_recipe_whose_loss_has_a_reference_makes_room_for_it(kl: float) -> None:
    grpo = methods.load(ROOT / "configs" / "grpo-demo.yaml", [TINY, f"grpo.kl_coefficient={kl}"])

    made = plan_run(
        grpo, methods.policies(grpo), (Node(2, 0, 0, 8 * GIB),), Assumptions(), gpu_packages=False
    )

    (searcher,) = made.policies
    assert searcher.rank is not None
    assert searcher.rank.of("reference") == (4 * searcher.shape.parameters if kl else 0)


# ---------------------------------------------------------------- before a local Ray


def machine(monkeypatch: pytest.MonkeyPatch, memory: int, cluster: tuple[str, str] | None = None) -> None:
    monkeypatch.setattr(planning, "this_machine", lambda: (Node(2, 0, 0, memory),))
    monkeypatch.setattr(planning, "has_gpu_packages", lambda: False)
    monkeypatch.setattr(planning, "cluster_address", lambda configured: cluster)


def check(of: Config) -> None:
    check_memory(of, [searcher_of(of)])


def test_a_run_that_this_machine_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch, qwen: str) -> None:
    machine(monkeypatch, 64 * GIB)
    with pytest.raises(UserError, match=r"host 0: .* of memory are needed, it has 64.0 GiB"):
        check(config("demo.yaml", qwen))


def test_this_machine_says_nothing_about_a_cluster(monkeypatch: pytest.MonkeyPatch, qwen: str) -> None:
    machine(monkeypatch, GIB, cluster=("10.0.0.1:6379", "RAY_ADDRESS"))
    check(config("demo.yaml", qwen))


def test_a_run_that_fits_goes_on_without_a_word(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    machine(monkeypatch, 12 * GIB)
    check(config("demo.yaml", TINY))
    assert caplog.text == ""


def test_a_model_of_unknown_shape_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    machine(monkeypatch, GIB)
    check(config("demo.yaml", f"model.path={tmp_path}"))
    assert "whether the memory is enough is not known: model.path: the configuration of" in caplog.text
