"""The configuration model: settings that do not go together, and what a person meets who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.core.config import (
    WITH_SERVER,
    AgentConfig,
    Config,
    EmConfig,
    RetrieverConfig,
    Section,
    Tags,
)
from pipeline.core.config.loading import all_keys
from pipeline.methods import load


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def refusal(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**sections)
    return str(caught.value)


def test_the_defaults_are_a_valid_configuration() -> None:
    assert config() == Config()
    assert config().weighting.method == "likelihood"


def test_one_trajectory_per_question_cannot_be_weighted_against_others() -> None:
    message = refusal(rollout={"samples": 1}, weighting="posterior")
    assert "rollout.samples of at least 2, not 1" in message
    assert "weighting=likelihood" in message
    message = refusal(
        rollout={"samples": 1}, weighting={"method": "length_normalised", "self_normalised": True}
    )
    assert "rollout.samples" in message


@pytest.mark.parametrize("method", ["likelihood", "length_normalised", "reward", "uniform"])
def test_one_trajectory_per_question_goes_with_every_other_weighting(method: str) -> None:
    assert config(rollout={"samples": 1}, weighting=method).weighting.method == method


@pytest.mark.parametrize("method", ["likelihood", "length_normalised", "reward", "uniform"])
def test_a_floor_belongs_to_the_posterior(method: str) -> None:
    message = refusal(weighting={"method": method, "floor": 0.1})
    assert f"weighting.floor belongs to method: posterior, not {method}" in message
    assert config(weighting={"method": "posterior", "floor": 0.1}).weighting.floor == 0.1


def test_self_normalisation_belongs_to_the_length_normalised_weights_and_to_rewards() -> None:
    message = refusal(weighting={"method": "posterior", "self_normalised": True})
    assert "weighting.self_normalised belongs to method: length_normalised or reward" in message
    assert config(weighting={"method": "length_normalised", "self_normalised": True})
    assert config(weighting={"method": "reward", "self_normalised": True})
    message = refusal(rollout={"samples": 1}, weighting={"method": "reward", "self_normalised": True})
    assert "rollout.samples of at least 2, not 1" in message


@pytest.mark.parametrize("wants", [{"credit": "turn"}, {"subtract_baseline": True}])
def test_turns_are_scored_only_where_likelihoods_weigh_and_there_are_turns(wants: dict[str, Any]) -> None:
    for method in ("reward", "uniform", "length_normalised"):
        message = refusal(weighting=wants | {"method": method})
        assert f"belongs to method: likelihood or posterior, not {method}" in message
    assert "agent.think is off" in refusal(weighting=wants, agent={"think": False})
    assert config(weighting=wants | {"method": "posterior"})


def test_a_decay_without_turns_to_credit_is_refused() -> None:
    assert "belongs to weighting.credit: turn" in refusal(weighting={"credit_decay": 0.5})
    assert config(weighting={"credit_decay": 0.5, "credit": "turn"})


def test_hints_need_their_correction_and_samples_without_one() -> None:
    corrected = {"correct_proposal": True}
    assert "set weighting.correct_proposal=true" in refusal(em={"hinted": 1})
    assert "must leave some" in refusal(em={"hinted": 2}, rollout={"samples": 2}, weighting=corrected)
    assert config(em={"hinted": 1}, rollout={"samples": 2}, weighting=corrected)


def test_a_packed_row_must_hold_the_longest_example() -> None:
    message = refusal(model={"max_length": 8192}, learner={"tokens_per_microbatch": 4096})
    assert "learner.tokens_per_microbatch (4096)" in message
    assert "model.max_length: 8192" in message
    assert config(model={"max_length": 64}, learner={"tokens_per_microbatch": 64})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_offloaded_only_where_they_are_partitioned(stage: int) -> None:
    message = refusal(learner={"offload_parameters": True, "zero_stage": stage})
    assert "offload_parameters needs zero_stage: 3" in message


def test_optimiser_states_are_offloaded_only_where_they_are_partitioned() -> None:
    message = refusal(learner={"offload_optimizer": True, "zero_stage": 0})
    assert "offload_optimizer needs zero_stage: 1, 2 or 3" in message
    assert config(learner={"offload_parameters": True, "offload_optimizer": True, "zero_stage": 3})


def test_cold_start_examples_can_only_be_mixed_in_where_there_are_some() -> None:
    assert "cold_start.mix needs cold-start examples" in refusal(cold_start={"mix": 0.5})
    assert config(cold_start={"mix": 0.5, "questions": 10})
    assert config(cold_start={"mix": 0.5, "trajectories": "cold_start.parquet"})


def test_no_more_workers_can_be_demanded_than_there_are() -> None:
    assert "min_workers (3) is more than workers (2)" in refusal(rollout={"workers": 2, "min_workers": 3})
    assert config(rollout={"workers": 2, "min_workers": 2})


def test_there_can_be_no_fewer_workers_at_most_than_at_the_start() -> None:
    assert "max_workers (1) is less than workers (2)" in refusal(rollout={"workers": 2, "max_workers": 1})
    assert config().rollout.most_workers == config().rollout.workers
    assert config(rollout={"workers": 2, "max_workers": 3}).rollout.most_workers == 3


def test_where_one_worker_is_enough_no_others_are_demanded_or_asked_for() -> None:
    of_a_cluster = config(rollout={"workers": 4, "min_workers": 2, "max_workers": 8, "samples": 5}).rollout
    one = of_a_cluster.with_one(concurrency=1)
    assert (one.workers, one.min_workers, one.most_workers) == (1, 1, 1)
    assert (one.concurrency, one.samples) == (1, 5)


URL = "http://127.0.0.1:8000"


def test_one_address_may_be_given_without_a_list() -> None:
    assert config(retriever={"url": URL}).retriever.url == (URL,)
    assert config(retriever={"url": [URL, "http://other:1"]}).retriever.url == (URL, "http://other:1")
    assert config(retriever={"url": None}).retriever.url is None


@pytest.mark.parametrize("key", sorted(RetrieverConfig.model_fields.keys() - WITH_SERVER))
def test_settings_of_the_own_retriever_are_not_silently_ignored_beside_a_server(key: str) -> None:
    others = {
        "device": "cuda",
        "encoder_dtype": "bfloat16",
        "gpus_per_replica": 0.5,
        "max_tokens": 64,
        "replicas": 2,
        "max_batch": 2,
        "batch_wait_s": 0.5,
        "threads_per_replica": 2,
        "local_copy": "/nvme",
    }
    message = refusal(retriever={"url": URL, "gpus_per_replica": 1.0} | {key: others.get(key, "other")})
    assert f"retriever.{key}" in message
    default = json.dumps(RetrieverConfig.model_fields[key].default)
    assert f"retriever.{key}={default}" in message


def test_settings_of_searches_go_with_a_server() -> None:
    settings = {"dialect": "search-r1", "timeout_s": 5, "max_attempts": 2}
    assert config(retriever={"url": URL} | settings).retriever.dialect == "search-r1"


@pytest.mark.parametrize(
    ("retriever", "told"),
    [
        ({"dialect": "search-r1"}, "set retriever.url"),
        ({"url": []}, "empty list"),
        ({"url": URL, "dialect": "search-r1", "method": "bm25"}, "Search-R1 server"),
        ({"url": "http://me:secret@host:8000"}, "EXSEARCH_TOKEN"),
    ],
)
def test_addresses_that_make_no_sense(retriever: dict[str, Any], told: str) -> None:
    assert told in refusal(retriever=retriever)


def test_a_copy_on_every_node_needs_a_path_that_is_the_same_on_all() -> None:
    told = refusal(retriever={"local_copy": "indexes"})
    assert "retriever.local_copy: indexes would be another folder on each node" in told
    assert config(retriever={"local_copy": "/nvme/indexes"}).retriever.local_copy == "/nvme/indexes"


@pytest.mark.parametrize(
    "tags",
    [
        {"think": ("<a>", "<a>")},
        {"record": ("<search>", "</record>")},
        {"select": ("<think>", "</select>")},
        {"answer": (" ", "</answer>")},
    ],
)
def test_tags_must_be_told_apart(tags: dict[str, tuple[str, str]]) -> None:
    told = refusal(agent={"tags": tags})
    assert ("must not be empty" if "answer" in tags else f"there is twice: {tags.popitem()[1][0]}") in told


@pytest.mark.parametrize(
    ("keys", "belongs_to"),
    [
        ({"reward": "em"}, "weighting.reward belongs to method: reward, not likelihood"),
        ({"method": "uniform", "temperature": 2.0}, "weighting.temperature belongs to method: likelihood or"),
        ({"method": "reward", "temperature": 2.0}, "weighting.temperature belongs to method: likelihood or"),
        ({"max_ratio": 4.0}, "weighting.max_ratio belongs to weighting.correct_proposal: true"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(keys: dict[str, Any], belongs_to: str) -> None:
    assert belongs_to in refusal(weighting=keys)


def test_tags_can_be_any_strings() -> None:
    agent = AgentConfig(tags=Tags(think=("[SEARCH]", "[/SEARCH]")))
    assert agent.tags.think == ("[SEARCH]", "[/SEARCH]")


def test_nothing_is_selected_of_what_is_not_searched() -> None:
    assert "agent.search is false; remove one of them" in refusal(agent={"select": True, "search": False})
    assert config(agent={"select": True}).agent.selected_documents == 2


def test_a_size_of_selections_without_selections_is_refused() -> None:
    refused = refusal(agent={"selected_documents": 3})
    assert "agent.selected_documents: 3 is for selections" in refused
    assert "set agent.select to true, or remove it" in refused
    assert config(agent={"select": True, "selected_documents": 3}).agent.selected_documents == 3


def test_one_action_may_be_given_without_a_list() -> None:
    assert config(agent={"actions": "calculator:Calculator"}).agent.actions == ("calculator:Calculator",)


def test_a_bare_string_is_short_for_the_weighting_method() -> None:
    assert config(weighting="uniform") == config(weighting={"method": "uniform"})


@pytest.mark.parametrize("given", ["a.jsonl", ["a.jsonl"], ("a.jsonl",)])
def test_one_file_may_be_given_without_a_list(given: Any) -> None:
    assert config(data={"train": given}).data.train == ("a.jsonl",)


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        EmConfig().iterations = 3  # type: ignore[misc]


def test_a_resolved_configuration_reads_back_as_itself() -> None:
    original = config(
        weighting={"method": "posterior", "floor": 0.1},
        learner={"lora": {"rank": 4}},
        data={"train": "a.jsonl"},
        agent={"tags": {"think": ["[S]", "[/S]"]}},
    )
    assert Config.model_validate(original.model_dump(mode="json")) == original


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [model, *(s for sub in model.__subclasses__() for s in sections(sub))]


@pytest.mark.parametrize("section", sections(Section)[1:], ids=lambda section: section.__name__)
def test_every_setting_says_what_it_does(section: type[BaseModel]) -> None:
    undocumented = [
        name
        for name, field in section.model_fields.items()
        if not field.description and not isinstance(field.default, BaseModel)
    ]
    assert undocumented == []


def test_every_key_of_the_configuration_has_its_own_name() -> None:
    keys = all_keys(Config)
    assert len(keys) == len(set(keys)) > 80
    assert {"seed", "agent.tags.think", "learner.lora.rank", "weighting.method"} <= set(keys)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[4].glob("configs/*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load(path).em.iterations >= 1
