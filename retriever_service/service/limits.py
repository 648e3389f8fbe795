"""How much one HTTP request may ask for: checked where it is read, and told in the OpenAPI schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from retriever_service.errors import RetrieverError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a request; more is refused with 413 (body) or 422."""

    max_body_bytes: int = 8 * 2**20
    """Longest request body, in bytes. Larger additions are sent in parts."""
    max_queries: int = 4_096
    """Queries in one request. Search-R1's agents send those of a whole training batch."""
    max_query_chars: int = 8_192
    """Characters of one query. Encoders read some hundred tokens of it."""
    max_k: int = 1_000
    """Passages per query, and candidates of a re-ranker."""
    max_hits: int = 65_536
    """Passages per request."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise RetrieverError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")

    def check(self, queries: Sequence[str], k: int, rerank: int = 0) -> None:
        """Refuse what is over a limit.

        Raises:
            RetrieverError: names the limit.
        """
        if len(queries) > self.max_queries:
            raise RetrieverError(
                f"{len(queries)} queries in one request; at most {self.max_queries} are allowed"
            )
        longest = max(map(len, queries))
        if longest > self.max_query_chars:
            raise RetrieverError(
                f"a query of {longest} characters; at most {self.max_query_chars} are allowed"
            )
        if k > self.max_k:
            raise RetrieverError(f"{k} passages per query; at most {self.max_k} are allowed")
        if len(queries) * k > self.max_hits:
            raise RetrieverError(
                f"{len(queries)} queries with {k} passages each; at most {self.max_hits} passages are given at a time"
            )
        if rerank > self.max_k:
            raise RetrieverError(f"{rerank} candidates to re-rank; at most {self.max_k} are allowed")

    def describe(self, openapi: dict[str, Any]) -> None:
        """Write the limits into an OpenAPI schema with the requests of `wire`."""
        schemas = openapi["components"]["schemas"]
        query = {"maxLength": self.max_query_chars}
        for name in ("SearchRequest", "RetrieveRequest"):
            properties = schemas[name]["properties"]
            properties["query"] |= query
            properties["queries"]["items"] |= query
            properties["queries"]["maxItems"] = self.max_queries
        schemas["SearchRequest"]["properties"]["k"]["maximum"] = self.max_k
        schemas["SearchRequest"]["properties"]["rerank"]["maximum"] = self.max_k
        schemas["RetrieveRequest"]["properties"]["topk"]["anyOf"][0]["maximum"] = self.max_k
        for parameter in openapi["paths"]["/api/search"]["get"]["parameters"]:
            parameter["schema"] |= {"maximum": self.max_k} if parameter["name"] == "k" else query
