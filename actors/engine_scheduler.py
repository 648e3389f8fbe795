"""The scheduler of a vLLM engine that gives out the tokens of a request together, and not one at a time.

Ours wait for whole completions (`RequestOutputKind.FINAL_ONLY`), yet vLLM sends every token, with arrays of its own for
its log-probability, to the process that asked, once a step. There stop strings are looked for. So tokens are held back
until one of them may end the text: until the request has ended, or until a token writes what a stop string ends with.
The other process sees the same tokens, some later, and finds the same end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

_INCOMPLETE = "\ufffd"
"""In place of bytes that are no whole character. With the next token's they may be any."""


class HoldingScheduler(Scheduler):
    """Of engines on CPUs, where the two processes share the cores."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held: dict[str, list[EngineCoreOutput]] = {}
        self._texts: dict[int, str] = {}

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, without what is held back."""
        per_client: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        for client in per_client.values():
            client.outputs = [ready for one in client.outputs if (ready := self._or_hold(one)) is not None]
        return per_client

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """As vLLM's. Nobody waits for tokens of these any more."""
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._held.pop(request.request_id, None)
        return finished

    def _or_hold(self, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """All that was generated since the last time; None if it is held back."""
        held = self._held.setdefault(output.request_id, [])
        held.append(output)
        if not output.finished and not self._may_end(output):
            return None
        del self._held[output.request_id]
        return _together(held) if len(held) > 1 else output

    def _may_end(self, output: EngineCoreOutput) -> bool:
        params = self.requests[output.request_id].sampling_params
        if params is None or params.output_kind is not RequestOutputKind.FINAL_ONLY:
            return True
        ends = {_INCOMPLETE, *(text[-1] for text in params.stop or ())}
        return any(not ends.isdisjoint(self._text(token)) for token in output.new_token_ids)

    def _text(self, token: int) -> str:
        if (text := self._texts.get(token)) is None:
            text = self._texts[token] = self.structured_output_manager.tokenizer.decode([token])
        return text


def _together(outputs: Sequence[EngineCoreOutput]) -> EngineCoreOutput:
    """One output in place of those of several steps of a request."""
    first, last = outputs[0], outputs[-1]
    last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
    parts = [output.new_logprobs[:3] for output in outputs if output.new_logprobs is not None]
    if parts:
        last.new_logprobs = LogprobsLists(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    last.events = [event for output in outputs for event in output.events or ()] or None
    last.prefill_stats = first.prefill_stats
    last.new_prompt_logprobs_tensors = first.new_prompt_logprobs_tensors
    return last
