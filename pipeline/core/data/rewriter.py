"""Rewrites gold steps through an OpenAI-compatible endpoint: the paper's GPT-4o step, with any model.

Guarantees: at most `concurrency` requests at once, each with a deadline and bounded retries; every accepted
answer is kept in a JSON Lines cache, so a second run asks nothing twice; only wording changes - the number of
steps, their passages and the answer that each states stay.

Source of the idea: EXSEARCH, App. D.4; of the request format: the OpenAI chat completions API.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from pipeline.core.data.supervision import GoldStep, Unusable, states
from pipeline.core.errors import UserError
from pipeline.core.records import Question
from retriever_service.backoff import Backoff
from retriever_service.files import json_object

logger = logging.getLogger(__name__)

_INSTRUCTIONS = """\
You improve training data for a search agent. You get a question, its answer, and the steps that lead to it: \
a search query and a fact found with it. Rewrite each query as a short natural question that a person could \
ask at that point, and each fact as one clear sentence. A query may use only the question and earlier facts. \
Keep every name, number and date exactly as it is written. Reply with nothing but a JSON array of one object \
per step, in order: [{"query": "...", "evidence": "..."}]"""


_NOT_AS_ASKED = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
"""What shows that an answer is not the one that was asked for."""


class RewriteError(UserError):
    """The endpoint could not be used: unreachable, refusing, or failing in every attempt."""


class Rewriter:
    """Client of one endpoint. Use as an async context manager.

    Args:
        endpoint: base URL, up to and including `/v1`. The key is read from OPENAI_API_KEY, if set.
        model: model name at the endpoint.
        cache: JSON Lines file of accepted answers; created if missing.
        concurrency: most requests at once.
        timeout_s: deadline of one request, in seconds.
        max_attempts: requests per question, failed and unusable ones counted.
        backoff_s: mean wait before the second attempt, in seconds; it doubles each time.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        cache: Path,
        *,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        max_attempts: int = 4,
        backoff_s: float = 1.0,
    ) -> None:
        self.url = f"{endpoint.rstrip('/')}/chat/completions"
        self.model = model
        self.max_attempts = max_attempts
        self._backoff = Backoff(backoff_s)
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(timeout=timeout_s, headers=headers)
        self._slots = asyncio.Semaphore(concurrency)
        self._cache = _Cache(cache)

    async def __aenter__(self) -> Rewriter:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._cache.close()
        await self._client.aclose()

    async def rewrite(self, question: Question, steps: Sequence[GoldStep]) -> list[GoldStep]:
        """The same steps in better words.

        Raises:
            RewriteError: the endpoint refused the request or could not be reached in all attempts.
            Unusable: it did answer, but never as asked; another question may do better.
        """
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": _INSTRUCTIONS},
                {"role": "user", "content": _description(question, steps)},
            ],
        }
        key = hashlib.blake2b(json.dumps(body).encode(), digest_size=16).hexdigest()
        content = self._cache.get(key)
        if content is not None:
            try:
                return _apply(content, steps)
            except _NOT_AS_ASKED as error:
                logger.warning(
                    f"the kept answer for question {question.id} is damaged, it is asked for again: {error!r}"
                )
        async with self._slots:
            content, rewritten = await self._ask(body, steps)
        self._cache.put(key, content)
        return rewritten

    async def _ask(self, body: Mapping[str, Any], steps: Sequence[GoldStep]) -> tuple[str, list[GoldStep]]:
        failure: Exception | None = None
        for attempt in range(self.max_attempts):
            await asyncio.sleep(self._backoff.pause_s(attempt))
            try:
                # A greedy answer that was of no use would only come again.
                response = await self._client.post(
                    self.url, json={**body, "temperature": 0.7 if attempt else 0}
                )
                response.raise_for_status()
                content = response.json()["choices"][0]["message"]["content"]
                return content, _apply(content, steps)
            except httpx.HTTPError as error:
                failure = error
                if _is_final(error):
                    break
            except _NOT_AS_ASKED as error:
                failure = error
            logger.warning(f"{self.url}, attempt {attempt + 1} of {self.max_attempts}: {failure!r}")
        if isinstance(failure, httpx.HTTPError):
            raise RewriteError(
                f"{self.url} does not serve rewriting; the last failure: {failure!r}"
            ) from failure
        raise Unusable("endpoint gave no usable rewriting") from failure


def _is_final(error: httpx.HTTPError) -> bool:
    """True if asking again cannot help: the server understood and refused (wrong key, model or address)."""
    if not isinstance(error, httpx.HTTPStatusError):
        return False
    return error.response.is_client_error and error.response.status_code not in (408, 429)


def _description(question: Question, steps: Sequence[GoldStep]) -> str:
    listed = [{"query": step.query, "evidence": step.evidence} for step in steps]
    return (
        f"Question: {question.text}\nAnswer: {question.answers[0]}\n"
        f"Steps: {json.dumps(listed, ensure_ascii=False, indent=1)}"
    )


def _apply(content: str, steps: Sequence[GoldStep]) -> list[GoldStep]:
    """The steps with the wording of an endpoint's answer.

    Raises:
        ValueError, KeyError, TypeError: not a JSON array with a query and an evidence for each step, or an
            evidence that no longer states the step's answer.
    """
    start, end = content.find("["), content.rfind("]")
    rows = json.loads(content[start : end + 1])
    if not isinstance(rows, list) or len(rows) != len(steps):
        raise ValueError(f"expected {len(steps)} steps, got {content[:200]!r}")
    rewritten = []
    for row, step in zip(rows, steps, strict=True):
        query, evidence = row["query"], row["evidence"]
        if not all(isinstance(text, str) and text.strip() for text in (query, evidence)):
            raise ValueError(f"a step without query or evidence: {row!r}")
        if states(step.evidence, step.answer) and not states(evidence, step.answer):
            raise ValueError(f"the fact lost its answer {step.answer!r}: {row!r}")
        rewritten.append(replace(step, query=query.strip(), evidence=evidence.strip()))
    return rewritten


class _Cache:
    """Accepted answers by request, appended to a JSON Lines file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._contents: dict[str, str] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); remove it, or name another output"
            ) from error
        for line in content.splitlines():
            try:
                row = json_object(line)
                self._contents[row["key"]] = row["content"]
            except (ValueError, KeyError, TypeError):
                logger.warning(f"{path}: ignored a damaged line; that answer will be asked for again")
        self._file = path.open("a", encoding="utf-8")
        if content and not content.endswith(b"\n"):
            self._file.write("\n")

    def get(self, key: str) -> str | None:
        return self._contents.get(key)

    def put(self, key: str, content: str) -> None:
        self._contents[key] = content
        self._file.write(json.dumps({"key": key, "content": content}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
