"""The outside peer without TRL: the agents that it runs on a transformers model, and what it hands over and notes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench.lock_step import LockStep, Writer
from bench.trl_grpo import Peer, arguments_of, import_trl, load_model
from pipeline import methods
from pipeline.core.agents.program import GREEDY, Sampling
from pipeline.core.config import AgentConfig, Config
from pipeline.core.errors import UserError
from pipeline.core.models import load_tokenizer
from pipeline.core.records import Question
from pipeline.core.renderer import Renderer
from pipeline.core.report import step_report
from retriever_service.passages.corpus import Passage
from retriever_service.passages.hits import Hit

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-searcher")
QUESTIONS = [
    Question(f"q{n}", text, ("Mara Velin",))
    for n, text in enumerate(
        ("Who founded Orvane?", "Who founded the maker of the Silver Harp?", "Where is Orvane?")
    )
]
PASSAGE = "Orvane was founded by Mara Velin."


class Engine:
    """Finds the same for every query, and keeps what it was asked at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.asked.append(len(queries))
        passage = Passage("p", "Orvane", PASSAGE)
        return [[Hit(passage, 1.0)] * k for _ in queries]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer(MODEL), AgentConfig(documents=1, max_searches=2))


def test_contexts_of_all_lengths_go_on_together_as_alone_and_end_at_their_own_ends(
    model: Any, renderer: Renderer
) -> None:
    writer = Writer(model, renderer)
    turns = [
        (renderer.prompt_ids(question.text), Sampling(0.0, max_tokens=limit, stop=stop))
        for question, limit, stop in zip(
            QUESTIONS * 2, (40, 40, 5, 40, 40, 5), [renderer.stop] * 3 + [("</think>",)] * 3, strict=True
        )
    ]
    together = writer.write(turns)
    assert together == [completion for turn in turns for completion in writer.write([turn])]
    for completion in together:
        assert renderer.decode(completion.token_ids).startswith(completion.text)
        if completion.finish_reason == "stop":
            assert completion.stop is not None and completion.text.endswith(completion.stop)
            assert completion.text.count(completion.stop) == 1
    assert [c.finish_reason for c in together] == ["stop", "stop", "length"] * 2
    assert len(together[2].token_ids) == 5


def test_agents_in_lock_step_do_what_they_do_alone_and_search_at_once(model: Any, renderer: Renderer) -> None:
    engine = Engine()
    agents = LockStep(model, renderer, cast(Any, engine), 1024)
    together = agents.run([(question, 0) for question in QUESTIONS], GREEDY)
    assert engine.asked[0] == len(QUESTIONS)
    for question, trajectory in zip(QUESTIONS, together, strict=True):
        (alone,) = agents.run([(question, 0)], GREEDY)
        assert alone.token_ids.tolist() == trajectory.token_ids.tolist()
        assert (alone.answer, alone.stop_reason) == (trajectory.answer, trajectory.stop_reason)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for split in ("train", "dev", "test"):
        rows = [
            {"id": f"{split}{q.id}", "question": f"{q.text[:-1]} {split.title()}?", "answers": q.answers}
            for q in QUESTIONS
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "dev", "test")]
    settings = ["recipe=grpo", f"model.path={MODEL}", "model.max_length=1024", "rollout.samples=2"]
    return methods.load(None, [*settings, *paths, "agent.documents=1", "grpo.iterations=1"])


def test_what_trl_gets_is_what_was_sampled_with_the_model_s_own_tokens_marked(
    config: Config, model: Any, renderer: Renderer, tmp_path: Path
) -> None:
    model.train()
    torch.manual_seed(0)
    searched: list[bool] = []
    peer = Peer(config, model, renderer, cast(Any, Engine()), tmp_path / "out")
    prompts = [question.id for question in peer.train for _ in range(2)]
    handed = peer.rollout(prompts, None)
    assert model.training  # TRL tells training from evaluation by it
    assert handed["logprobs"] is None
    for name, prompt, completion, mask, reward in zip(
        prompts, *(handed[key] for key in ("prompt_ids", "completion_ids", "env_mask", "reward")), strict=True
    ):
        (question,) = (q for q in peer.train if q.id == name)
        assert prompt == renderer.prompt_ids(question.text)
        assert len(mask) == len(completion)
        own = renderer.decode([t for t, is_own in zip(completion, mask, strict=True) if is_own])
        others = renderer.decode([t for t, is_own in zip(completion, mask, strict=True) if not is_own])
        assert (PASSAGE in others) == ("</think>" in own)
        assert 0.0 <= reward <= 1.0
        searched.append("</think>" in own)
    assert any(searched)
    peer.end_iteration()
    peer.test_both()

    report = step_report(peer.files, "trl_grpo", config.seed, peer.settings)
    (row,) = report["iterations"]
    assert row["sample"]["trajectories"] == len(prompts)
    assert row["sample"]["generated_tokens"] >= np.sum([np.sum(mask) for mask in handed["env_mask"]])
    assert row["sample"]["reward"] == pytest.approx(np.mean(handed["reward"]))
    assert row["searcher/train"]["seconds"] > 0
    assert row["evaluation"]["scores"]["n"] == report["start"]["evaluation"]["scores"]["n"] == 3
    assert report["test"].keys() == {"start", "best"}


def test_settings_are_those_of_the_recipe(config: Config, tmp_path: Path) -> None:
    overrides = (
        "grpo.questions_per_step=8",
        "grpo.mean_over=sequence",
        "grpo.scale=none",
        "learner.epochs=2",
    )
    path = config.data.train[0]
    own = methods.load(
        None,
        ["recipe=grpo", f"data.train={path}", "rollout.samples=4", "learner.batch_size=16", *overrides],
    )
    arguments = arguments_of(own, 100, tmp_path)
    assert (arguments["steps_per_generation"], arguments["num_iterations"]) == (2, 2)
    assert arguments["max_steps"] == own.of_recipe.iterations * 4
    assert (arguments["loss_type"], arguments["scale_rewards"]) == ("grpo", "none")
    with pytest.raises(UserError, match=r"12 trajectories .* are no multiple of learner\.batch_size, 16"):
        arguments_of(own, 3, tmp_path)


def test_without_trl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"bench\.trl_grpo needs TRL.*pip install --no-deps trl==1\.16\.0"):
        import_trl()
