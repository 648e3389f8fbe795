"""An agent's search tool that speaks Search-R1's protocol and nothing else, written from its published contract.

POST /retrieve with `queries`, `topk` and `return_scores`; the reply's `result` has one list per query, of documents
with their scores; `contents` holds the title on its first line. It shares no code with the server.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def batch_search(url: str, queries: list[str], topk: int = 3) -> list[str]:
    """What the language model is shown for each query; verl's tool asks in the same way."""
    payload = {"queries": queries, "topk": topk, "return_scores": True}
    return [passages_to_string(result) for result in post(url, payload)["result"]]


def bare_search(url: str, query: str, topk: int = 3) -> list[str]:
    """The dialect of slime and torchtitan, without scores: `contents` at the top level of each document."""
    payload = {"queries": [query], "topk": topk, "return_scores": False}
    return [document["contents"] for document in post(url, payload)["result"][0]]


def singular_search(url: str, query: str, topk: int = 3) -> str:
    """The dialect of SkyRL, with one query: the reply has one inner list."""
    payload = {"query": query, "topk": topk, "return_scores": True}
    (result,) = post(url, payload)["result"]
    return passages_to_string(result)


def passages_to_string(result: list[dict[str, Any]]) -> str:
    text = ""
    for number, item in enumerate(result, start=1):
        title, *lines = item["document"]["contents"].split("\n")
        body = "\n".join(lines)
        text += f"Doc {number}(Title: {title}) {body}\n"
    return text


def post(url: str, payload: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/retrieve", json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
