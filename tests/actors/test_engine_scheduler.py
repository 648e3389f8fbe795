"""Tokens that are held back: none is lost or changed, and none is kept for longer than the text surely goes on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import RequestStatus

from actors.engine_scheduler import HoldingScheduler

pytestmark = pytest.mark.component

TEXTS = ["a", " the", "</", "think", ">", "k>", " >a", "\ufffd"]
"""What the tokens of the tests write."""
MAY_END = [4, 5, 6, 7]
"""Those behind which `</think>` may be whole."""
A, B = "a request", "another one"


class Script(Scheduler):
    """A vLLM scheduler that needs no model: what it gives out at each step is given."""

    def __init__(self, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> None:
        params = SamplingParams(stop=["</think>"], output_kind=kind)
        request = SimpleNamespace(sampling_params=params)
        self.requests = {A: request, B: request}
        tokenizer = SimpleNamespace(decode=lambda ids: TEXTS[ids[0]])
        self.structured_output_manager = SimpleNamespace(tokenizer=tokenizer)

    def update_from_output(self, outputs: list[EngineCoreOutput], _: None) -> dict[int, EngineCoreOutputs]:
        return {0: EngineCoreOutputs(outputs=outputs)}

    def finish_requests(self, ids: list[str], status: RequestStatus) -> list[SimpleNamespace]:
        return [SimpleNamespace(request_id=id_) for id_ in ids]


class Holding(HoldingScheduler, Script):
    """The one under test, above the script."""


def step(request: str, token: int, *, ends: bool = False) -> EngineCoreOutput:
    """A step's output; the log-probability is told by the token."""
    ids = np.array([[token]])
    return EngineCoreOutput(
        request_id=request,
        new_token_ids=[token],
        new_logprobs=LogprobsLists(ids, -ids.astype(np.float32), ids[0], None),
        finish_reason=FinishReason.LENGTH if ends else None,
    )


def given_out(scheduler: Holding, *outputs: EngineCoreOutput) -> list[EngineCoreOutput]:
    return scheduler.update_from_output(list(outputs), None)[0].outputs


@given(
    steps=st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, len(TEXTS) - 1)), min_size=1),
    kind=st.sampled_from([RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA]),
)
def test_every_token_comes_out_once_and_in_order_with_its_logprob(
    steps: list[tuple[str, int]], kind: RequestOutputKind
) -> None:
    scheduler = Holding(kind)
    last = {request: number for number, (request, _) in enumerate(steps)}
    came: dict[str, list[int]] = {A: [], B: []}
    for number, (request, token) in enumerate(steps):
        for output in given_out(scheduler, step(request, token, ends=number == last[request])):
            assert output.new_logprobs is not None
            assert output.new_logprobs.logprob_token_ids[:, 0].tolist() == output.new_token_ids
            assert output.new_logprobs.logprobs[:, 0].tolist() == [
                -float(id_) for id_ in output.new_token_ids
            ]
            assert output.new_logprobs.sampled_token_ranks.tolist() == output.new_token_ids
            came[output.request_id] += output.new_token_ids
        # All is out as soon as it may be the end; and always where somebody waits for every token.
        if token in MAY_END or number == last[request] or kind is RequestOutputKind.DELTA:
            assert came[request] == [id_ for asked, id_ in steps[: number + 1] if asked == request]
    assert came == {asked: [id_ for request, id_ in steps if request == asked] for asked in (A, B)}


def test_tokens_are_held_back_while_the_text_surely_goes_on() -> None:
    scheduler = Holding()
    assert [given_out(scheduler, step(A, token)) for token in (0, 1, 2, 3)] == [[], [], [], []]
    (output,) = given_out(scheduler, step(A, 4))
    assert output.new_token_ids == [0, 1, 2, 3, 4]


def test_how_a_request_ended_comes_with_all_its_tokens() -> None:
    scheduler = Holding()
    assert not given_out(scheduler, step(A, 0), step(B, 1))
    (output,) = given_out(scheduler, step(B, 2), step(A, 0, ends=True))
    assert (output.request_id, output.new_token_ids, output.finish_reason) == (A, [0, 0], FinishReason.LENGTH)


def test_nothing_is_kept_of_a_request_that_nobody_waits_for_any_more() -> None:
    scheduler = Holding()
    given_out(scheduler, step(A, 0))
    scheduler.finish_requests([A], RequestStatus.FINISHED_ABORTED)
    (output,) = given_out(scheduler, step(A, 4))
    assert output.new_token_ids == [4]
