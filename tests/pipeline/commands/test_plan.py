"""`exsearch plan`: what a user sees, and what a program gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from pipeline.core.plan.machine import Node
from pipeline.core.plan.memory import GIB
from tests.pipeline.commands_support import TRAIN
from tests.pipeline.core.plan.shapes import QWEN_7B

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def qwen(folder: Path) -> list[str]:
    """Arguments that plan for the shipped configuration of eight GPUs; of the model there is config.json alone."""
    Qwen2Config(**QWEN_7B).save_pretrained(folder / "qwen")
    return ["plan", "--config", str(ROOT / "configs" / "qwen2.5-7b-8gpu.yaml"), "model.path=qwen"]


def test_a_person_sees_placement_memory_work_and_assumptions(run_command: Any, qwen: list[str]) -> None:
    result = run_command(*qwen, "--gpus", 8, "--assume", "questions=50000")

    assert result.exit_code == 0, result.output
    for text in (
        "engines and learner ranks share GPUs and take turns",
        "7,615.6 million parameters",
        "GPU while searcher is trained",
        "M-step",
        "push of searcher: 14.2 GiB to each engine (8) by ipc",
        "assumed (--assume KEY=VALUE): questions 50000",
    ):
        assert text in " ".join(result.stdout.split())


def test_a_program_gets_one_json_object(run_command: Any, qwen: list[str]) -> None:
    result = run_command(*qwen, "--gpus", 8, "--json")

    told = json.loads(result.stdout)
    assert (told["refusals"], told["layout"]["device"], told["assumptions"]["questions"]) == ([], "gpu", 3)


def test_what_cannot_fit_ends_with_the_exit_code_of_a_mistake(run_command: Any, qwen: list[str]) -> None:
    result = run_command(*qwen, "--gpus", 8, "--gpu-memory-gib", 24, "--json")

    assert result.exit_code == 2
    told = json.loads(result.stdout)["refusals"]
    assert result.stderr.splitlines() == ["error: this run does not fit:", *(f"  {line}" for line in told)]
    assert "GPU while searcher is trained: 34.8 GiB of 24.0 GiB" in result.stderr


def test_too_few_gpus_are_refused(refused: Any, qwen: list[str]) -> None:
    assert "need 8 GPUs even when engines and ranks share, but the cluster has 4" in refused(
        *qwen, "--gpus", 4
    )


def test_a_machine_that_is_too_small_is_refused_with_the_way_to_plan_for_others(
    run_command: Any, qwen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = (Node(cpus=2, gpus=0, gpu_memory=0, memory=GIB),)
    monkeypatch.setattr("pipeline.commands.plan.this_machine", lambda: machine)
    monkeypatch.setattr("pipeline.commands.plan.has_gpu_packages", lambda: False)

    result = run_command(*qwen, "data.train=nothing.jsonl")
    assert result.exit_code == 2
    assert "rollout.workers is 8, but the cluster has 2 CPUs" in result.stderr
    assert result.stderr.endswith("to plan for other machines than this one, name their --gpus\n")


def test_a_training_that_this_machine_cannot_hold_is_refused_before_ray_starts(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray.init` would fail the test, and so would a run directory."""
    machine = (Node(cpus=2, gpus=0, gpu_memory=0, memory=GIB),)
    monkeypatch.setattr("actors.planning.this_machine", lambda: machine)
    monkeypatch.setattr("actors.planning.has_gpu_packages", lambda: False)
    monkeypatch.setattr("actors.planning.cluster_address", lambda address: None)

    message = refused(*TRAIN, f"model.path={ROOT / 'models' / 'tiny-searcher'}", "cold_start.questions=0")
    assert "error: this run does not fit:\n  host 0: " in message
    assert "of memory are needed, it has 1.0 GiB (1 x engine of searcher" in message


@pytest.mark.parametrize(("override", "questions"), [((), 100_000), (("data.train_limit=400",), 400)])
def test_questions_that_cannot_be_read_are_assumed_and_it_says_so(
    run_command: Any,
    qwen: list[str],
    caplog: pytest.LogCaptureFixture,
    override: tuple[str, ...],
    questions: int,
) -> None:
    result = run_command(*qwen, "--gpus", 8, "--json", "data.train=nothing.jsonl", *override)

    assert json.loads(result.stdout)["assumptions"]["questions"] == questions
    assert "data.train is not read, and a number of questions assumed" in caplog.text


def test_a_model_out_of_reach_is_refused_with_one_reason(
    refused: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer is out of reach as well."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("plan", "--config", "config.yaml", "model.path=nobody/nothing", "--gpus", 1)
    assert message.count("couldn't find them in the cached files") == 1 and not caplog.records


def test_an_assumption_that_is_none_is_refused(refused: Any, qwen: list[str]) -> None:
    assert "--assume speed=2: give KEY=VALUE; keys are questions" in refused(*qwen, "--assume", "speed=2")


def test_the_policies_of_other_recipes_are_planned_for(run_command: Any, folder: Path) -> None:
    tiny = f"model.path={ROOT / 'models' / 'tiny-searcher'}"
    result = run_command(
        "plan", "--config", ROOT / "configs" / "dro-demo.yaml", tiny, "--json", "cluster.devices=cpu"
    )

    told = json.loads(result.stdout)
    assert [policy["name"] for policy in told["policies"]] == ["selector", "generator"]
    assert told["phases"] == []


def test_a_plan_counts_the_questions_that_an_iteration_samples(run_command: Any, folder: Path) -> None:
    tiny = f"model.path={ROOT / 'models' / 'tiny-searcher'}"
    command = ["plan", "--config", ROOT / "configs" / "grpo-demo.yaml", tiny, "--json", "cluster.devices=cpu"]
    command += ["--assume", "questions=400"]
    some, everything = (
        json.loads(run_command(*command, f"grpo.questions_per_step={number}").stdout)
        for number in (80, "null")
    )
    assert [policy["name"] for policy in some["policies"]] == ["searcher"]
    assert everything["disk"]["shards"] == pytest.approx(5 * some["disk"]["shards"], rel=1e-6)
