"""What of a run stays, and where."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pipeline.core.config.section import Section


class StorageConfig(Section):
    """Models that are needed stay in any case: the newest, the best on dev, and those of iteration 0."""

    keep_last: int | None = Field(None, ge=1)
    """Exported models of so many of the last iterations stay; those of others are removed when an iteration ends.
    Null: all stay."""
    keep_best: int = Field(1, ge=1)
    """With `keep_last`: those of so many of the best iterations on dev stay as well."""
    keep_states: int = Field(1, ge=1)
    """Learner checkpoints of so many of a policy's last versions stay. Training goes on from the last one."""
    url: str | None = None
    """Where a copy of the run directory is kept while the run goes on, such as `s3://BUCKET/runs/NAME` or
    `gs://BUCKET/runs/NAME` (docs/clusters.md). An empty run directory is filled from it. Null: nowhere."""

    @field_validator("url")
    @classmethod
    def _has_no_password(cls, url: str | None) -> str | None:
        if url is not None and not urlsplit(url).scheme:
            raise ValueError(f"{url} names no store; begin it with s3://, gs:// or file://")
        if url is not None and "@" in urlsplit(url).netloc:
            raise ValueError(
                "it is written into the run directory and must not hold a password: use the environment"
            )
        return url
