"""Flashbacks: which questions are old, what is kept of them, and how they get into every optimiser step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from actors.planning import plan_run
from pipeline import methods
from pipeline.core.agents.program import Completion
from pipeline.core.agents.transcript import Transcript
from pipeline.core.config import Config
from pipeline.core.errors import RunError, UserError
from pipeline.core.example_files import read_examples
from pipeline.core.flashbacks import FLASHBACK, Flashbacks, in_turns, old_and_new
from pipeline.core.latent_tasks import LatentTasks, gates_of
from pipeline.core.losses.divergence import Divergence
from pipeline.core.losses.joint import Joint
from pipeline.core.losses.likelihood import WeightedNll
from pipeline.core.losses.loss import Outputs, Rows
from pipeline.core.packing import plan_epoch
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.machine import Node, gpu_nodes
from pipeline.core.plan.memory import GIB
from pipeline.core.records import Episode, Example, Question, StopReason
from pipeline.core.run import Json
from pipeline.core.shards import write_examples
from pipeline.recipes import flashback
from pipeline.recipes.flashback import check, flashbacks_beside, gates_of_questions, loss_of
from pipeline.run import Run
from tests.pipeline.core.plan.shapes import LLAMA_8B

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "methods" / "flashback-cpu.yaml"
GPU_CONFIG = ROOT / "configs" / "methods" / "flashback-8gpu.yaml"


def config(*overrides: str) -> Config:
    return methods.load(
        CONFIG, [f"model.path={ROOT / 'models' / 'tiny-searcher'}", "data.root=world", *overrides]
    )


def question(name: str, hops: int | None) -> Question:
    return Question(name, f"{name}?", ("Ada",), hops=hops)


def test_old_questions_are_prompts_alone_and_no_new_one_is_old() -> None:
    questions = [question(f"q{k}", (1, 2, None)[k % 3]) for k in range(30)]
    old, new = old_and_new(questions, [1], 4, np.random.default_rng(0))
    assert len(old) == 4 and {q.hops for q in old} == {1}
    assert new == [q for q in questions if q.hops != 1]
    again, _ = old_and_new(questions, [1], 4, np.random.default_rng(0))
    other, _ = old_and_new(questions, [1], 4, np.random.default_rng(7))
    assert again == old != other


@pytest.mark.parametrize("hops", [[1, 1], [2, 3], [None, None]])
def test_tasks_of_one_kind_alone_are_refused(hops: list[int | None]) -> None:
    questions = [question(f"q{k}", number) for k, number in enumerate(hops)]
    with pytest.raises(UserError, match=r"flashback\.old_hops is \[1\]: of 2 training questions"):
        old_and_new(questions, [1], 4, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["flashback.per_step=32"], r"leaves no room for new tasks in learner\.batch_size \(32\)"),
        (["flashback.project_conflicts=true", "learner.zero_stage=3"], r"zero_stage of 2 at most"),
        (["flashback.coefficient=0", "flashback.project_conflicts=true"], r"coefficient is 0, and without"),
        (["flashback.coefficient=0", "flashback.latent.tasks=4"], r"coefficient is 0, and without"),
        (["cold_start.mix=0.1"], r"cold_start\.mix"),
    ],
)
def test_settings_that_make_no_flashbacks_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config(*overrides))


def test_more_nearest_tasks_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"nearest \(3\) is more than all tasks \(2\)"):
        config("flashback.latent.tasks=2", "flashback.latent.nearest=3")


# ---------------------------------------------------------------- configurations, policies, plan


def test_the_shipped_configurations_are_sound() -> None:
    for path in (CONFIG, GPU_CONFIG):
        check(methods.load(path, ["data.root=world"]))
    of_gpus = methods.load(GPU_CONFIG, ["data.root=world"])
    (searcher,) = methods.policies(of_gpus)
    assert searcher.latent == LatentTasks(tasks=24, rank=8)
    assert (searcher.keeps_reference, searcher.parts_apart) == (True, 2)
    (searcher,) = methods.policies(config("flashback.coefficient=0"))
    assert (searcher.keeps_reference, searcher.parts_apart, searcher.latent) == (False, 0, None)


def test_a_plan_makes_room_for_increments_and_for_gradients_apart() -> None:
    def rank(*overrides: str) -> Any:
        settings = config("learner.zero_stage=0", *overrides)
        node = (Node(2, 0, 0, 8 * GIB),)
        made = plan_run(settings, methods.policies(settings), node, Assumptions(), gpu_packages=False)
        return made.policies[0]

    plain, latent = rank(), rank("flashback.latent={tasks: 6, rank: 2}")
    # Of the tiny model's four layers: 12 channels of 256 inputs and 256 outputs.
    assert latent.rank.of("Adam") - plain.rank.of("Adam") == 8 * 4 * 12 * (256 + 256)
    apart = rank("flashback.project_conflicts=true")
    # Of each of two parts, what is left of one, and their sum.
    assert apart.rank.of("gradients of the parts") == 4 * 4 * plain.shape.parameters
    assert plain.rank.of("gradients of the parts") == 0


def test_the_paper_s_configuration_fits_eight_gpus(tmp_path: Path) -> None:
    LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path)
    settings = methods.load(GPU_CONFIG, ["data.root=world", f"model.path={tmp_path}"])
    nodes = gpu_nodes(1, 8, 79.6, None)
    made = plan_run(settings, methods.policies(settings), nodes, Assumptions(), gpu_packages=True)
    assert (made.refusals(), made.layout.take_turns) == ([], True)


# ---------------------------------------------------------------- what is kept


def episode(reason: StopReason) -> Episode:
    transcript = Transcript()
    transcript.append_environment([1, 2])
    transcript.append_model(Completion([3, 4], [-0.5, -1.0], "", None, "stop"))
    transcript.append_environment([5, 6])
    transcript.append_model(Completion([7], [-0.25], "", None, "stop"))
    turn = transcript.trajectory(
        question_id="q", sample=0, role="searcher", policy_version=0, stop_reason=reason, answer="wrong"
    )
    return Episode("q", 0, (turn,))


def test_what_the_old_model_wrote_is_kept_whether_it_is_right_or_not() -> None:
    weighted = Flashbacks()(question("q", 1), [episode(StopReason.ANSWERED)])
    (kept,) = weighted.examples[FLASHBACK]
    assert kept.role == FLASHBACK
    # Neither the prompt nor what was found is the old model's.
    assert kept.loss_mask.tolist() == [False, False, True, True, False, False, True]


def test_what_the_infrastructure_ended_is_not_kept() -> None:
    assert Flashbacks()(question("q", 1), [episode(StopReason.ENGINE_ERROR)]).examples[FLASHBACK] == []


def test_the_report_says_how_many_are_kept_and_a_run_with_none_ends_with_the_reason() -> None:
    weigh, reasons = Flashbacks(), (StopReason.ANSWERED, StopReason.ENGINE_ERROR, StopReason.MALFORMED)
    rows = [weigh(question("q", 1), [episode(reason)]).statistics for reason in reasons]
    found = weigh.summarise(rows)
    assert found["flashbacks"] == 2
    assert {reason: n for reason, n in found["stop_reasons"].items() if n} == dict.fromkeys(reasons, 1)
    with pytest.raises(RunError, match=r"nothing to keep\. It ended with engine_error \(1\)"):
        weigh.summarise(rows[1:2])


class Directory:
    """In place of a run: where things lie in it, and which steps are finished."""

    def __init__(self, path: Path, settings: Config) -> None:
        self.path, self.config = path, settings
        self.done: dict[str, Json] = {}
        self.files = SimpleNamespace(forget=lambda step: self.done.pop(step, None))
        self.display = SimpleNamespace(status=lambda text: nullcontext())

    def at(self, step: str) -> Path:
        return self.path / step

    def shards(self, t: int, name: str) -> list[Path]:
        return sorted(self.at(f"{t}/{name}/examples").glob("*.parquet"))

    def fresh(self, step: str) -> Path:
        self.at(step).mkdir(parents=True, exist_ok=True)
        return self.at(step)

    def once(self, step: str, work: Callable[[], Json]) -> Json:
        if step not in self.done:
            self.at(step).parent.mkdir(exist_ok=True)
            self.done[step] = work()
        return self.done[step]


def made(number: int, role: str) -> list[Example]:
    return [Example.supervised(f"{role}{k}", role, [1], [2]) for k in range(number)]


@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 7))
def test_every_optimiser_step_has_so_many_flashbacks_and_they_take_turns(
    tmp_path_factory: pytest.TempPathFactory, weighted: int, kept: int, per_step: int
) -> None:
    settings = config(f"flashback.per_step={per_step}", "learner.batch_size=8")
    run = Directory(tmp_path_factory.mktemp("run"), settings)
    new = run.path / "1/searcher/examples/000000.parquet"
    for shard, role, number in (
        (run.path / f"0/{FLASHBACK}/examples/000000.parquet", FLASHBACK, kept),
        (new, "searcher", weighted),
    ):
        shard.parent.mkdir(parents=True)
        write_examples(shard, made(number, role))
    found = read_examples(flashbacks_beside(cast(Run, run), settings.of_recipe, 1, [new]))
    examples = [*read_examples(new), *found]
    steps = plan_epoch(
        [e.length for e in examples],
        batch_size=8,
        world_size=1,
        token_budget=100,
        seed=(0, 0),
        units=[e.unit for e in examples],
        kinds=[int(e.role == FLASHBACK) for e in examples],
    )
    assert len(steps) == math.ceil(weighted / (8 - per_step))
    for step in steps:
        assert sum(k >= weighted for k in step.examples) == per_step


def test_each_flashback_comes_as_often_as_the_others() -> None:
    kept = [Example.supervised(f"o{k}", FLASHBACK, [1], [2 + k]) for k in range(3)]
    found = in_turns(kept, 24, per_step=4, batch_size=8, rng=np.random.default_rng(0))
    assert sorted(Counter(int(e.token_ids[-1]) for e in found).values()) == [8, 8, 8]
    assert len({e.id for e in found}) == len({e.unit for e in found}) == 24
    assert in_turns(kept, 0, per_step=4, batch_size=8, rng=np.random.default_rng(0)) == []


# ---------------------------------------------------------------- latent tasks


class Letters:
    """In place of a sentence encoder: texts that begin alike are alike."""

    calls = 0

    @classmethod
    def load(cls, spec: Any) -> Letters:
        return cls()

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        Letters.calls += 1
        return np.array([[1.0, ord(text[0]) - ord("a")] for text in texts], np.float32)


def test_latent_tasks_are_found_once_and_again_where_their_file_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashback, "Encoder", Letters)
    settings = config("flashback.latent={tasks: 5, nearest: 2}")
    run = Directory(tmp_path, settings)
    old, new = [question(name, 1) for name in "ab"], [question(name, 2) for name in "cdef"]

    def found() -> dict[str, list[float]]:
        streams = gates_of_questions(cast(Run, run), settings.of_recipe.latent, old, new)
        return {name: gates_of(own, 5).tolist() for name, own in streams.items()}

    gates = found()
    assert list(gates) == list("abcdef")
    assert all(sum(gate > 0 for gate in own) == 2 for own in gates.values())
    assert run.done["0/latent_tasks"]["tasks"] == 5
    calls = Letters.calls
    assert found() == gates and Letters.calls == calls
    run.at("0/latent_tasks.parquet").unlink()
    assert found() == gates and Letters.calls == calls + 1


# ------------------------------------------------- what the released code has otherwise


def test_both_directions_of_the_divergence_count() -> None:
    """The released trainer adds the forward one twice."""
    joint = loss_of(config("flashback.coefficient=0.5"), old_model="f")
    assert isinstance(joint, Joint)
    _, kept = joint.parts
    p, q = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[3.0, 0.5, 0.0]])
    numbers: dict[str, Any] = {}
    rows = Rows(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), numbers, {})
    found = kept.coefficient * float(kept.loss.terms(Outputs(p, q), rows, 1.0).loss)
    a, b = (x.softmax(-1).double().numpy()[0] for x in (p, q))
    forward, reverse = (float(np.sum(x * np.log(x / y))) for x, y in ((b, a), (a, b)))
    assert abs(forward - reverse) > 0.01
    assert found == pytest.approx(0.5 * (forward + reverse), rel=1e-5)


def test_the_old_model_is_as_far_from_itself_as_can_be_told() -> None:
    joint = loss_of(config(), old_model="f")
    assert isinstance(joint, Joint)
    rows = Rows(torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long), {}, {})
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, -1.0, 0.0]])
    assert float(joint.parts[1].loss.terms(Outputs(logits, logits), rows, 1.0).loss) == 0


def test_without_a_coefficient_the_loss_is_that_of_exsearch() -> None:
    settings = config("flashback.coefficient=0")
    assert loss_of(settings, old_model="f") == WeightedNll(settings.learner.negligible_weight)


def test_a_prompt_of_an_old_task_has_no_label_and_its_own_tokens_do_not_count() -> None:
    """The released trainer's divergence is over the prompt as well."""
    weighted = Flashbacks()(question("q", 1), [episode(StopReason.ANSWERED)])
    (kept,) = weighted.examples[FLASHBACK]
    assert dict(kept.streams) == {}
    assert Divergence("symmetric", "f").prepare([kept]).sizes == [3]
