"""The engine against transformers on the same tiny random model. One shared engine, float32, CPU."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine import VllmEngine
from actors.engine_options import EngineOptions
from actors.weight_transfer import WeightTransferError
from pipeline.core.agents.program import Completion, EngineError, Sampling
from tests.actors.support import EngineFixture, HfModel

pytestmark = pytest.mark.component

SAMPLE = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=40, seed=3, stop=())
GREEDY = replace(SAMPLE, temperature=0.0)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids of the tiny vocabulary's multi-letter tokens: readable text, no broken characters."""
    return np.random.default_rng(seed).integers(258, 300, length).tolist()


def generate(shared: EngineFixture, prompt_ids: list[int], sampling: Sampling) -> Completion:
    return shared.run(shared.engine.generate(prompt_ids, sampling))


def generate_many(
    shared: EngineFixture, prompts: list[list[int]], samplings: list[Sampling]
) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        return await asyncio.gather(
            *(shared.engine.generate(p, s) for p, s in zip(prompts, samplings, strict=True))
        )

    return shared.run(all_at_once())


def score(shared: EngineFixture, token_ids: list[int], start: int) -> float:
    return shared.run(shared.engine.score(token_ids, start))


def test_greedy_completion_is_that_of_transformers(shared_engine: EngineFixture, hf_model: HfModel) -> None:
    ids = prompt(20)
    completion = generate(shared_engine, ids, GREEDY)
    assert completion.token_ids == hf_model.greedy(ids, 40)[: len(completion.token_ids)]


def test_logprobs_are_the_models_own_before_temperature_and_truncation(
    shared_engine: EngineFixture, hf_model: HfModel
) -> None:
    ids = prompt(20)
    completion = generate(shared_engine, ids, replace(SAMPLE, temperature=0.5, top_p=0.8, top_k=20))
    expected = hf_model.logprobs(ids + completion.token_ids)[len(ids) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_text_is_the_decoded_ids_with_added_tokens(shared_engine: EngineFixture, hf_model: HfModel) -> None:
    samplings = [replace(SAMPLE, seed=seed) for seed in range(64)]
    completions = generate_many(shared_engine, [prompt(10)] * 64, samplings)
    assert any("</answer>" in completion.text for completion in completions)
    for completion in completions:
        decoded = hf_model.tokenizer.decode(completion.token_ids, skip_special_tokens=False)
        # The engine holds back the bytes of a character that was never completed.
        assert decoded.rstrip("\ufffd") == completion.text.rstrip("\ufffd")


def test_stop_string_ends_the_completion_and_stays_in_it(shared_engine: EngineFixture) -> None:
    free = generate_many(shared_engine, [prompt(10)] * 64, [replace(SAMPLE, seed=seed) for seed in range(64)])
    stopping = [replace(SAMPLE, seed=seed, stop=("</answer>", "</think>")) for seed in range(64)]
    stopped = 0
    for full, completion in zip(free, generate_many(shared_engine, [prompt(10)] * 64, stopping), strict=True):
        assert full.token_ids[: len(completion.token_ids)] == completion.token_ids
        assert len(completion.logprobs) == len(completion.token_ids)
        if "</answer>" in full.text:
            stopped += 1
            assert completion.text.endswith("</answer>")
            assert (completion.stop, completion.finish_reason) == ("</answer>", "stop")
        else:
            assert completion.stop is None and completion.finish_reason in ("eos", "length")
    assert stopped


def test_text_stops_inside_the_last_token_but_ids_stay_whole(shared_engine: EngineFixture) -> None:
    full = generate(shared_engine, prompt(20), GREEDY)
    stop = full.text[6:8]
    completion = generate(shared_engine, prompt(20), replace(GREEDY, stop=(stop,)))
    assert completion.text.endswith(stop) and completion.stop == stop
    assert completion.token_ids == full.token_ids[: len(completion.token_ids)]


def test_end_of_sequence_id_is_kept(shared_engine: EngineFixture) -> None:
    samplings = [replace(SAMPLE, seed=seed, max_tokens=100) for seed in range(64)]
    completions = generate_many(shared_engine, [prompt(10)] * 64, samplings)
    ended = [completion for completion in completions if completion.finish_reason == "eos"]
    assert ended
    for completion in completions:
        assert (completion.token_ids[-1] == 1) == (completion.finish_reason == "eos")
        assert completion.text.endswith("<eos>") == (completion.finish_reason == "eos")


def test_seed_gives_the_same_tokens_alone_and_in_company(shared_engine: EngineFixture) -> None:
    ids = prompt(150)
    alone = generate(shared_engine, ids, SAMPLE)
    prompts = [ids] + [prompt(5 + 9 * i, seed=i) for i in range(1, 32)]
    samplings = [SAMPLE] + [replace(SAMPLE, seed=100 + i, max_tokens=10 + 2 * i) for i in range(1, 32)]
    together = generate_many(shared_engine, prompts, samplings)
    assert together[0] == alone
    assert generate_many(shared_engine, prompts[::-1], samplings[::-1])[::-1] == together


def test_different_seeds_give_different_tokens(shared_engine: EngineFixture) -> None:
    first, second = generate_many(shared_engine, [prompt(20)] * 2, [SAMPLE, replace(SAMPLE, seed=4)])
    assert first.token_ids != second.token_ids


def test_completion_is_shortened_to_the_room_that_is_left(shared_engine: EngineFixture) -> None:
    completion = generate(shared_engine, prompt(508), GREEDY)
    assert (len(completion.token_ids), completion.finish_reason) == (4, "length")


@pytest.mark.parametrize("length", [512, 600])
def test_no_room_gives_an_empty_completion(shared_engine: EngineFixture, length: int) -> None:
    assert generate(shared_engine, prompt(length), GREEDY) == Completion([], [], "", None, "length")


def test_score_is_that_of_a_forward_pass(shared_engine: EngineFixture, hf_model: HfModel) -> None:
    ids = prompt(200, seed=11)
    expected = sum(hf_model.logprobs(ids)[149:])
    cold = score(shared_engine, ids, 150)
    assert cold == pytest.approx(expected, abs=1e-4)
    assert score(shared_engine, ids, 150) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("start", [1, 100, 127, 128, 129, 130, 200, 255, 256, 257, 299])
def test_score_does_not_depend_on_where_the_cached_text_ends(
    shared_engine: EngineFixture, hf_model: HfModel, start: int
) -> None:
    ids = prompt(300, seed=12)
    generate(shared_engine, ids, replace(GREEDY, max_tokens=1))
    assert score(shared_engine, ids, start) == pytest.approx(
        sum(hf_model.logprobs(ids)[start - 1 :]), abs=1e-4
    )


def test_score_of_a_new_answer_after_just_generated_text(
    shared_engine: EngineFixture, hf_model: HfModel
) -> None:
    ids = prompt(150, seed=13)
    ids += generate(shared_engine, ids, replace(SAMPLE, max_tokens=150)).token_ids
    gold = prompt(7, seed=14)
    expected = sum(hf_model.logprobs(ids + gold)[len(ids) - 1 :])
    assert score(shared_engine, ids + gold, len(ids)) == pytest.approx(expected, abs=1e-4)


def test_score_of_a_generated_answer_is_the_sum_of_its_logprobs(
    shared_engine: EngineFixture, hf_model: HfModel
) -> None:
    ids = prompt(100, seed=15)
    answer = generate(shared_engine, ids, replace(SAMPLE, max_tokens=200))
    scored = score(shared_engine, ids + answer.token_ids, len(ids))
    assert scored == pytest.approx(sum(answer.logprobs), abs=1e-4)
    assert scored == pytest.approx(sum(hf_model.logprobs(ids + answer.token_ids)[len(ids) - 1 :]), abs=1e-3)


def test_score_of_nothing_is_zero(shared_engine: EngineFixture) -> None:
    assert score(shared_engine, [5, 6, 7], 3) == 0.0


def test_score_refuses_a_start_outside_the_text(shared_engine: EngineFixture) -> None:
    with pytest.raises(ValueError, match=r"start must lie in 1\.\.3"):
        score(shared_engine, [5, 6, 7], 4)


def test_score_refuses_text_that_does_not_fit(shared_engine: EngineFixture) -> None:
    with pytest.raises(EngineError, match="max_model_len is 512"):
        score(shared_engine, prompt(512), 500)


def test_invalid_request_is_an_engine_error_and_harms_nobody(shared_engine: EngineFixture) -> None:
    with pytest.raises(EngineError, match="vLLM failed"):
        generate(shared_engine, [100_000], GREEDY)
    assert generate(shared_engine, prompt(5), GREEDY).token_ids


def test_request_is_bounded_in_time(shared_engine: EngineFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            shared_engine.engine, "options", replace(shared_engine.engine.options, request_timeout_s=0.02)
        )
        with pytest.raises(EngineError, match="did not end within"):
            generate(shared_engine, prompt(5), replace(SAMPLE, max_tokens=500, seed=1))
    assert generate(shared_engine, prompt(5), GREEDY).token_ids


def test_engine_that_was_not_started_refuses() -> None:
    with pytest.raises(EngineError, match="not been started"):
        asyncio.run(VllmEngine(EngineOptions(model="unused")).generate([1], GREEDY))


def test_missing_model_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="could not start"):
        asyncio.run(VllmEngine(EngineOptions(model=str(tmp_path / "nowhere"))).start())


def test_death_of_the_engine_process_is_an_engine_error(shared_engine: EngineFixture) -> None:
    async def scenario() -> None:
        engine = VllmEngine(shared_engine.engine.options)
        await engine.start()
        try:
            request = asyncio.create_task(engine.generate(prompt(5), replace(SAMPLE, max_tokens=500)))
            await asyncio.sleep(0.1)
            assert engine._llm is not None
            os.kill(engine._llm.engine_core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
            with pytest.raises(EngineError):
                await request
            with pytest.raises(EngineError, match="died"):
                await engine.generate(prompt(5), GREEDY)
        finally:
            engine.shutdown()

    asyncio.run(scenario())


@pytest.mark.chaos
def test_death_of_the_engine_process_ends_a_push_long_before_its_deadline(
    shared_engine: EngineFixture,
) -> None:
    async def scenario() -> None:
        engine = VllmEngine(shared_engine.engine.options)
        await engine.start()
        try:
            await engine.init_weight_transfer_engine({})
            assert engine._llm is not None
            process = engine._llm.engine_core.resources.engine_manager.processes[0].pid
            os.kill(process, signal.SIGSTOP)
            push = asyncio.create_task(engine.start_weight_update(1, timeout_s=300.0))
            await asyncio.sleep(1.0)
            assert not push.done()
            os.kill(process, signal.SIGKILL)
            with pytest.raises(WeightTransferError, match="the engine process died"):
                await asyncio.wait_for(push, 60)
        finally:
            engine.shutdown()

    asyncio.run(scenario())


def test_the_shared_memory_of_an_engine_has_no_name_that_could_outlive_it(
    shared_engine: EngineFixture,
) -> None:
    processes = psutil.Process().children(recursive=True)
    assert processes  # else there is nothing to look at
    mapped = {mapping.path for process in processes for mapping in process.memory_maps()}
    assert [path for path in mapped if path.startswith("/dev/shm/") and Path(path).exists()] == []


def test_an_engine_on_cpus_is_one_process_beside_its_own(shared_engine: EngineFixture) -> None:
    """A second one would have the first spin on a core while it waits."""
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    assert sum(name.startswith("VLLM::") for name in names) == 1


class ScriptedEngine(VllmEngine):
    """Answers scoring requests with given (cached tokens, rows of log-probabilities), one after the other."""

    def __init__(self, *answers: tuple[int, list[float]]) -> None:
        super().__init__(EngineOptions(model="none", max_model_len=64))
        self._most_rows = 64
        self.answers = list(answers)
        self.salted: list[bool] = []

    async def _request(self, prompt_ids: Any, params: Any, salt: str | None = None) -> Any:
        cached, rows = self.answers.pop(0)
        self.salted.append(salt is not None)
        return SimpleNamespace(num_cached_tokens=cached, prompt_logprobs=SimpleNamespace(logprobs=rows))


WHOLE = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7]
"""Rows of a prompt of eight tokens: of all but the first."""
GARBAGE = [9.0] * 3


@pytest.mark.parametrize(
    ("answers", "salted"),
    [
        ([(0, WHOLE)], [False]),
        ([(3, GARBAGE + WHOLE[3:])], [False]),  # rows of cached positions come back unset
        ([(3, WHOLE[3:])], [False]),  # or not at all
        ([(5, WHOLE[5:]), (0, WHOLE)], [False, True]),  # the cache reaches into what is scored
        ([(0, WHOLE[6:]), (0, WHOLE)], [False, True]),  # preempted: fewer rows than the cache explains
    ],
)
def test_scores_are_of_all_tokens_asked_for_whatever_was_read_from_the_cache(
    answers: list[tuple[int, list[float]]], salted: list[bool]
) -> None:
    engine = ScriptedEngine(*answers)

    assert asyncio.run(engine.token_logprobs(list(range(8)), 4)) == WHOLE[3:]
    assert engine.salted == salted


def test_a_sum_over_too_few_tokens_is_never_given_out() -> None:
    engine = ScriptedEngine((0, WHOLE[6:]), (0, WHOLE[5:]))

    with pytest.raises(EngineError, match="2 of 4"):
        asyncio.run(engine.score(list(range(8)), 4))


class CachingEngine(VllmEngine):
    """Caches whole blocks as vLLM does, and keeps how many rows each request took. Row i of a text is -i."""

    def __init__(self, most_rows: int, block: int) -> None:
        super().__init__(EngineOptions(model="none", max_model_len=10_000))
        self._most_rows, self.block = most_rows, block
        self.cached: set[tuple[str | None, tuple[int, ...]]] = set()
        self.rows: list[int] = []

    async def _request(self, prompt_ids: Any, params: Any, salt: str | None = None) -> Any:
        ids = tuple(prompt_ids)
        ends = range(self.block, len(ids) + 1, self.block)
        # The last position is always computed, for the token that follows.
        found = max((end for end in ends if (salt, ids[:end]) in self.cached and end < len(ids)), default=0)
        self.cached |= {(salt, ids[:end]) for end in ends}
        if params.prompt_logprobs is None:
            return SimpleNamespace()
        rows = [-float(i) for i in range(found + 1, len(ids))]
        self.rows.append(len(rows))
        return SimpleNamespace(num_cached_tokens=found, prompt_logprobs=SimpleNamespace(logprobs=rows))


@given(
    length=st.integers(2, 300),
    start=st.integers(1, 300),
    seen=st.integers(0, 300),
    most_rows=st.integers(1, 100),
    block=st.sampled_from([2, 16, 128]),
)
def test_however_long_a_text_is_few_log_probabilities_are_taken_at_once(
    length: int, start: int, seen: int, most_rows: int, block: int
) -> None:
    """Also where the cache holds some of it, or all."""
    engine, ids = CachingEngine(most_rows, block), list(range(length))
    start = min(start, length)
    asyncio.run(engine._request(ids[:seen], SimpleNamespace(prompt_logprobs=None)))

    assert asyncio.run(engine.token_logprobs(ids, start)) == [-float(i) for i in range(start, length)]
    assert max(engine.rows, default=0) <= most_rows + 1 + block


@pytest.mark.parametrize("start", [1, 100, 128, 129, 256, 299])
@pytest.mark.parametrize("seen", [0, 300])
def test_scores_in_pieces_are_those_of_a_forward_pass(
    shared_engine: EngineFixture,
    hf_model: HfModel,
    monkeypatch: pytest.MonkeyPatch,
    start: int,
    seen: int,
) -> None:
    monkeypatch.setattr(shared_engine.engine, "_most_rows", 40)
    ids = prompt(300, seed=1000 + start + seen)
    if seen:
        generate(shared_engine, ids[:seen], replace(GREEDY, max_tokens=1))

    scored = shared_engine.run(shared_engine.engine.token_logprobs(ids, start))

    np.testing.assert_allclose(scored, hf_model.logprobs(ids)[start - 1 :], atol=1e-4)


# ---------------------------------------------------------------- asleep


def test_an_engine_that_sleeps_serves_nothing_and_then_what_it_loads(shared_engine: EngineFixture) -> None:
    engine, ids = shared_engine.engine, prompt(40, seed=77)
    awake, score_awake = generate(shared_engine, ids, SAMPLE), score(shared_engine, ids, 20)

    shared_engine.run(engine.sleep(60.0))
    with pytest.raises(EngineError, match="asleep"):
        generate(shared_engine, ids, SAMPLE)
    shared_engine.run(engine.reload(str(shared_engine.model_path), 0, 60.0))

    assert generate(shared_engine, ids, SAMPLE) == awake
    assert score(shared_engine, ids, 20) == pytest.approx(score_awake, abs=1e-5)


# ---------------------------------------------------------------- what it did


def test_prompt_tokens_and_those_found_in_the_cache_are_counted(shared_engine: EngineFixture) -> None:
    ids, before = prompt(300, seed=78), shared_engine.engine.use
    generate(shared_engine, ids, replace(GREEDY, max_tokens=1))
    generate(shared_engine, ids, replace(GREEDY, max_tokens=1))

    used = shared_engine.engine.use - before
    assert (used.prompt_tokens, used.preemptions) == (600, 0)
    assert used.cached_tokens == 288  # blocks of 32


def test_the_cache_has_room_for_some_agents(shared_engine: EngineFixture) -> None:
    """0.25 GiB for keys and values of 2 layers, one head of 32, float32: 512 bytes a token, 256 tokens an agent."""
    assert shared_engine.engine.agents_that_fit == pytest.approx(2**28 / 512 / 256, rel=0.01)


def test_an_engine_that_records_its_proposal_gives_log_q_of_what_it_sampled_and_scores_log_p(
    shared_engine: EngineFixture, hf_model: HfModel
) -> None:
    recording = VllmEngine(replace(shared_engine.engine.options, record_proposal=True))
    ids, sampling = prompt(20), replace(SAMPLE, temperature=0.5, top_p=0.8, top_k=20)

    async def sampled_and_scored() -> tuple[Completion, list[float]]:
        await recording.start()
        try:
            completion = await recording.generate(ids, sampling)
            return completion, await recording.token_logprobs(ids + completion.token_ids, len(ids))
        finally:
            recording.shutdown()

    completion, scored = shared_engine.run(sampled_and_scored())
    own = hf_model.logprobs(ids + completion.token_ids)[len(ids) - 1 :]
    np.testing.assert_allclose(scored, own, atol=1e-4)
    proposal = hf_model.truncated_logprobs(ids + completion.token_ids, sampling)[len(ids) - 1 :]
    np.testing.assert_allclose(completion.logprobs, proposal, atol=1e-3)
    assert np.abs(np.array(completion.logprobs) - own).max() > 0.1


def test_the_process_of_an_engine_loads_nothing_that_vllm_can_do_without(
    shared_engine: EngineFixture,
) -> None:
    llm = shared_engine.engine._llm
    assert llm is not None
    for process in llm.engine_core.resources.engine_manager.processes:
        libraries = {mapping.path for mapping in psutil.Process(process.pid).memory_maps()}
        assert any("torch" in path for path in libraries)
        assert not any("sklearn" in path or "pandas" in path for path in libraries)
