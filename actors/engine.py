"""One vLLM engine: token ids in, token ids out. Plain class, no Ray; a rollout actor wraps it.

Guarantees:

- The ids of a completion are exactly those that the model produced, an end-of-sequence id included; its
  log-probabilities are the model's own, before temperature and truncation (but see `record_proposal`).
- A request's seed decides its tokens: alone or among others, the same (float32 on CPU).
- `score` equals the sum of a plain forward pass' log-probabilities, whether or not the prefix cache held the text. It
  takes the log-probabilities of few positions at once, however long the text is (`scored_rows`).
- While a push of weights is under way, or after one failed, nothing is served (`EngineError`); cached keys and values
  never outlive the weights they were computed with.
- Every wait is bounded; what goes wrong inside vLLM comes out as `EngineError` or `WeightTransferError`.

CPU and GPU share this code. What differs is in `actors.engine_options`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from actors.engine_options import (
    EngineOptions,
    agents_that_fit,
    create_llm,
    release_memory,
    set_environment,
)
from actors.engine_use import EngineUse, UseCounter
from actors.weight_bucket import Segment
from actors.weight_transfer import WeightTransferError
from pipeline.core.agents.program import Completion, EngineError, Sampling
from pipeline.core.plan.engine import scored_rows

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 1.0
LOOK_EVERY_S = 0.5
"""How often it is looked whether the engine process has died during a push, in seconds."""


@dataclass(frozen=True, slots=True)
class WeightState:
    """Which weights an engine serves. `digest` is "" for those it was started with."""

    version: int
    digest: str
    refusal: str
    """Why nothing is served at the moment; empty while serving."""


class VllmEngine:
    """A vLLM engine with its own engine process.

    vLLM is configured through the environment in places, so a process should hold one engine, or several with the same
    options.

    Example:
        engine = VllmEngine(EngineOptions(model="models/tiny-searcher"))
        await engine.start()
        completion = await engine.generate([1, 2, 3], sampling)
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._llm: AsyncLLM | None = None
        self._request_numbers = itertools.count()
        self._version = 0
        self._digest = ""
        self._refusal = "the engine has not been started"
        self._pushed_version = 0
        self._push_deadline = 0.0
        self._must_be_woken = False
        self._most_rows = 0
        self._ids_of_stops: dict[tuple[str, ...], list[int]] = {}
        self._counter = UseCounter()
        self._segment = Segment()

    async def start(self, version: int = 0) -> None:
        """Loads the model, which holds weight version `version`.

        Raises:
            EngineError: vLLM could not start (the cause is in its log and in `__cause__`) or took too long.
        """
        set_environment(self.options)
        # The engine process and its workers check VLLM_ENGINE_READY_TIMEOUT_S themselves: the thread below ends.
        try:
            llm = await asyncio.to_thread(create_llm, self.options, self._counter)
            async with asyncio.timeout(self.options.start_timeout_s):
                await llm.update_weight_version(str(version))
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"vLLM could not start with {self.options.model}: {error}") from error
        self._most_rows = scored_rows(llm.model_config.get_vocab_size())
        self._llm, self._version, self._digest, self._refusal = llm, version, "", ""

    @property
    def agents_that_fit(self) -> int:
        """Into the cache of keys and values that the started engine has."""
        assert self._llm is not None
        tokens = self._llm.vllm_config.cache_config.kv_cache_size_tokens
        return agents_that_fit(tokens, self.options.max_model_len)

    @property
    def use(self) -> EngineUse:
        """Since the start."""
        return self._counter.use

    def shutdown(self) -> None:
        """Ends the engine process. Requests under way fail."""
        self._refusal = "the engine was shut down"
        if self._llm is not None:
            from vllm.utils.async_utils import cancel_task_threadsafe

            if (
                self._llm.output_handler is not None
                and not self._llm.output_processor.has_unfinished_requests()
            ):
                # It would report the end of the process as an error, of which nobody has to hear.
                cancel_task_threadsafe(self._llm.output_handler)
            # On CPUs its process never ends by itself: it is waited for that long, and killed.
            self._llm.shutdown(timeout=_SHUTDOWN_S)
            # Its destructor calls this again, and fails if that is at the end of the interpreter.
            self._llm.shutdown = lambda timeout=None: None
            self._llm = None

    # ------------------------------------------------------------ requests

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Samples one continuation.

        Args:
            prompt_ids: the context. Where it leaves fewer than `sampling.max_tokens` of room in `max_model_len`, the
                completion is that much shorter; with no room at all it is empty, with finish_reason "length".

        Returns:
            Its `text` ends right after a matched stop string; the ids are whole tokens, so the last one may reach past
            it.

        Raises:
            EngineError: the engine died, serves nothing at the moment, refused the request or took too long.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self.options.max_model_len - len(prompt_ids)
        max_tokens = min(sampling.max_tokens, room)
        if max_tokens <= 0:
            return Completion([], [], "", None, "length")
        output = await self._request(
            prompt_ids,
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                max_tokens=max_tokens,
                stop=list(sampling.stop),
                stop_token_ids=self._stop_ids(sampling.stop),
                include_stop_str_in_output=True,
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            ),
        )
        return _completion(output)

    def _stop_ids(self, stop: tuple[str, ...]) -> list[int]:
        """Ids of the stop strings that are tokens of their own.

        The engine ends a request at these itself. Of any other end it is told, some steps later, by the process that
        reads the text.
        """
        if (ids := self._ids_of_stops.get(stop)) is None:
            tokenizer = self._serving().get_tokenizer()
            encoded = [tokenizer.encode(text, add_special_tokens=False) for text in stop]
            ids = [
                one[0] for one, text in zip(encoded, stop, strict=True) if tokenizer.decode(one[:1]) == text
            ]
            self._ids_of_stops[stop] = ids
        return ids

    async def score(self, token_ids: Sequence[int], start: int) -> float:
        """log p(token_ids[start:] | token_ids[:start]): the sum of `token_logprobs`."""
        return sum(await self.token_logprobs(token_ids, start))

    async def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) for each i >= start, reading the prefix cache.

        Args:
            token_ids: context and continuation; one token shorter than `max_model_len` at most.
            start: index of the first token that is scored, at least 1.

        Raises:
            EngineError: as `generate`; also where the ids do not fit into the engine.
        """
        num_tokens = len(token_ids)
        if not 1 <= start <= num_tokens:
            raise ValueError(f"start must lie in 1..{num_tokens}, the number of ids; it is {start}")
        if num_tokens >= self.options.max_model_len:
            raise EngineError(
                f"{num_tokens} ids cannot be scored: max_model_len is {self.options.max_model_len} and vLLM needs room "
                "for one more"
            )
        if start == num_tokens:
            return []
        # Row i of a prompt's log-probabilities comes from position i - 1, so positions that were read from the cache
        # have none for the token after them: those that were cached before, and those of a request that was preempted.
        # Under a salt of its own a text finds nothing in the cache.
        logprobs: list[float] = []
        for salt in (None, f"score {next(self._request_numbers)}"):
            logprobs = await self._in_pieces(token_ids, start, salt)
            if len(logprobs) == num_tokens - start:
                return logprobs
        raise EngineError(f"vLLM gave {len(logprobs)} of {num_tokens - start} log-probabilities")

    async def _in_pieces(self, token_ids: Sequence[int], start: int, salt: str | None) -> list[float]:
        """`token_logprobs` up to the first piece of which too few came.

        vLLM takes the log-probabilities of every position that it computes for such a request. So where the text is
        long, what lies before `start` is computed by a request of its own, and the rest a piece after the other.
        """
        if len(token_ids) > self._most_rows and start > 1:
            await self._request(token_ids[: start - 1], _one_token(), salt)
        logprobs: list[float] = []
        while (first := start + len(logprobs)) < len(token_ids):
            # An odd end is the end of no block: else its last position would be cached for the next piece.
            end = min((first + self._most_rows) | 1, len(token_ids))
            found = await self._prompt_logprobs(token_ids[:end], salt)
            logprobs += [float(logprob) for logprob in found[-(end - first) :]]
            if len(found) < end - first:
                break
        return logprobs

    async def _prompt_logprobs(self, token_ids: Sequence[int], salt: str | None) -> Sequence[float]:
        """Of the last tokens of the prompt, as far as they were not read from the cache."""
        output = await self._request(token_ids, _one_token(prompt_logprobs=0), salt)
        logprobs: Sequence[float] = output.prompt_logprobs.logprobs
        return logprobs[max(0, (output.num_cached_tokens or 0) + 1 - len(token_ids) + len(logprobs)) :]

    async def _request(
        self, prompt_ids: Sequence[int], params: SamplingParams, salt: str | None = None
    ) -> RequestOutput:
        from vllm.exceptions import VLLMError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self._serving()
        prompt = tokens_input([int(i) for i in prompt_ids], cache_salt=salt)
        output = None
        try:
            async with asyncio.timeout(self.options.request_timeout_s):
                async for latest in llm.generate(prompt, params, str(next(self._request_numbers))):
                    output = latest
        except TimeoutError as error:
            raise EngineError(
                f"a request of {len(prompt_ids)} prompt tokens did not end within {self.options.request_timeout_s} s"
            ) from error
        except EngineDeadError as error:
            self._refusal = "the engine process died"
            raise EngineError(self._refusal) from error
        except (VLLMError, ValueError) as error:
            cause = error.__cause__ or error
            raise EngineError(
                f"vLLM failed on a request of {len(prompt_ids)} prompt tokens: {cause}"
            ) from error
        if output is None or output.outputs[0].finish_reason not in ("stop", "length"):
            reason = output.outputs[0].finish_reason if output is not None else "no output"
            raise EngineError(f"vLLM gave up a request of {len(prompt_ids)} prompt tokens: {reason}")
        return output

    def _serving(self) -> AsyncLLM:
        if self._refusal or self._llm is None:
            raise EngineError(self._refusal)
        return self._llm

    async def ping(self) -> None:
        """Answers when the engine process has: between two of its steps.

        Raises:
            EngineError: the engine died, or was not started.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm is None:
            raise EngineError(self._refusal)
        try:
            await self._llm.get_weight_version()
        except EngineDeadError as error:
            raise EngineError("the engine process died") from error

    # ------------------------------------------------------------ weights

    async def reload(self, model: str, version: int, timeout_s: float) -> None:
        """Loads weight version `version` from a model directory of the same architecture, without a learner.

        Raises:
            WeightTransferError: it took too long or failed; nothing is served from then on.
        """
        self._refusal = f"weight version {version} is being loaded from {model}"
        self._pushed_version = version
        self._push_deadline = asyncio.get_running_loop().time() + timeout_s
        async with self._push_step("reloading") as llm:
            await self._wake(llm, "weights", "kv_cache")
            await llm.pause_generation(mode="wait", clear_cache=True)
            await llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
            await llm.collective_rpc("refresh_tied_heads")
            await llm.update_weight_version(str(version))
            if not await llm.reset_prefix_cache():
                raise WeightTransferError("the prefix cache could not be dropped: requests are still running")
            await llm.resume_generation()
        self._version, self._digest, self._refusal = version, "", ""

    async def sleep(self, timeout_s: float) -> None:
        """Gives its memory to others: drops the weights and all cached keys and values.

        Running requests end first. Nothing is served until the next push or `reload`, which wakes the engine:
        the memory of the weights before they arrive, that of the cache when they are whole.

        Raises:
            WeightTransferError: it took too long or failed; nothing is served from then on.
        """
        self._refusal = "the engine is asleep"
        self._push_deadline = asyncio.get_running_loop().time() + timeout_s
        async with self._push_step("falling asleep") as llm:
            self._must_be_woken = await release_memory(llm)

    async def _wake(self, llm: AsyncLLM, *parts: str) -> None:
        if self._must_be_woken:
            self._must_be_woken = not await llm.wake_up(list(parts))

    @property
    def is_dead(self) -> bool:
        """True once the engine process has died; it does not come back."""
        return self._llm is not None and self._llm.errored

    @property
    def weights(self) -> WeightState:
        """What is served at the moment."""
        return WeightState(self._version, self._digest, self._refusal)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any], timeout_s: float = 300.0) -> None:
        """Meets the sender (see `actors.weight_transfer`). Once per learner, before its first push."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._push_deadline = asyncio.get_running_loop().time() + timeout_s
        async with self._push_step("meeting the learner") as llm:
            await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def start_weight_update(self, version: int, timeout_s: float) -> None:
        """Stops serving, waits for running requests and drops the cached keys and values.

        Requests that vLLM still holds in its queue are served after the push, by the new weights.

        Args:
            version: what is going to be pushed.
            timeout_s: from now until the end of the whole push, in seconds.
        """
        self._refusal = f"weight version {version} is being pushed"
        self._pushed_version = version
        self._push_deadline = asyncio.get_running_loop().time() + timeout_s
        async with self._push_step("pausing") as llm:
            await self._wake(llm, "weights")
            await llm.pause_generation(mode="wait", clear_cache=True)
            await llm.collective_rpc("discard_weight_update")
            await llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any], payload: Any = None) -> None:
        """Loads one bucket.

        Args:
            update_info: what the transport's sender says about it.
            payload: uint8[nbytes], the bucket's bytes where the sender's shared memory is on another node.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._push_step("loading") as llm:
            if payload is None:
                await llm.update_weights(WeightTransferUpdateRequest(update_info))
                return
            self._segment.room(len(payload)).numpy()[:] = payload
            await llm.update_weights(WeightTransferUpdateRequest({**update_info, "path": self._segment.path}))

    async def finish_weight_update(self, version: int, digest: str) -> WeightState:
        """Checks that exactly what was sent has arrived, and serves it.

        Args:
            version: as in `start_weight_update`.
            digest: of all tensors as they were sent.

        Raises:
            WeightTransferError: another digest, missing parameters, another version, or the deadline has passed.
                Nothing is served from then on.
        """
        async with self._push_step("finishing") as llm:
            if version != self._pushed_version:
                raise WeightTransferError(f"version {self._pushed_version} was being pushed, not {version}")
            for receipt in await llm.collective_rpc("weight_receipt"):
                _check_receipt(receipt, digest)
            await llm.finish_weight_update(weight_version=str(version))
            await self._wake(llm, "kv_cache")
            if not await llm.reset_prefix_cache():
                raise WeightTransferError("the prefix cache could not be dropped: requests are still running")
            await llm.resume_generation()
        self._version, self._digest, self._refusal = version, digest, ""
        return self.weights

    @asynccontextmanager
    async def _push_step(self, step: str) -> AsyncIterator[AsyncLLM]:
        """Bounds one step by the push's deadline and turns every failure into a refusal to serve."""
        if self._llm is None:
            raise WeightTransferError(self._refusal)
        try:
            async with asyncio.timeout_at(self._push_deadline) as limit:
                watch = asyncio.create_task(self._cut_short(limit))
                try:
                    yield self._llm
                finally:
                    watch.cancel()
        # Whatever vLLM or a transport raises here leaves the weights in an unknown state: this is the one place where
        # it becomes a refusal, and nothing may slip past it.
        except Exception as error:
            reason = str(error)
            if isinstance(error, TimeoutError):
                reason = "the engine process died" if self.is_dead else "the deadline has passed"
            self._refusal = f"push of weight version {self._pushed_version} failed while {step}: {reason}"
            raise WeightTransferError(self._refusal) from error

    async def _cut_short(self, limit: asyncio.Timeout) -> None:
        """End the wait when the engine process has died: calls of this kind that are under way never hear of it."""
        while not self.is_dead:
            await asyncio.sleep(LOOK_EVERY_S)
        limit.reschedule(0)


def _check_receipt(receipt: dict[str, Any], digest: str) -> None:
    if receipt["digest"] != digest:
        raise WeightTransferError(
            f"{receipt['tensors']} tensors arrived with digest {receipt['digest'][:12]}, sent was {digest[:12]}"
        )
    if receipt["incomplete"]:
        names = receipt["incomplete"]
        raise WeightTransferError(f"nobody sent all weights of {len(names)} layers: {', '.join(names[:5])}")


def _completion(output: RequestOutput) -> Completion:
    generated = output.outputs[0]
    reason: Literal["stop", "eos", "length"] = "length"
    stop = None
    if generated.finish_reason == "stop":
        # A matched string, or else an end-of-sequence id (None, or the id itself where a model has several).
        stop = generated.stop_reason if isinstance(generated.stop_reason, str) else None
        reason = "stop" if stop is not None else "eos"
    logprobs = generated.logprobs
    assert logprobs is not None and len(logprobs) == len(generated.token_ids)
    return Completion(list(generated.token_ids), list(logprobs.logprobs), generated.text, stop, reason)


def _one_token(prompt_logprobs: int | None = None) -> SamplingParams:
    """Of a request that is made for its prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # Without detokenize=False vLLM decodes the token ids of cached positions, which it never set. Without the last
    # line it does not read the cache where it is asked for log-probabilities of a prompt.
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=prompt_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=False,
        skip_clone=True,
    )
