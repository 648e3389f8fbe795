"""Objects under an fsspec URL: whole or absent, by names relative to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.core.errors import UserError

T = TypeVar("T")

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocols whose package is an extra of ours."""


class StoreError(Exception):
    """The store refused, failed or was out of reach. Trying again may help."""


class Store:
    """What lies under a URL.

    Credentials, endpoints and the like come from the environment and the files that the protocol's own package reads
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, fsspec's `~/.config/fsspec`).

    Raises:
        UserError: nothing is installed that speaks the protocol.
    """

    def __init__(self, url: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = url.rstrip("/")
        protocol = url.split(":", 1)[0]
        try:
            # Others write there too: what was listed once is not remembered.
            self._fs, root = fsspec.url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            package = f"exsearch[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else "the package that it names"
            raise UserError(f"storage.url: {url} cannot be used ({error}); install {package}") from error
        except ValueError as error:
            raise UserError(f"storage.url: {url} cannot be used: {error}") from error
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        if self._is_local:
            self._fs.auto_mkdir = True

    def read(self, name: str) -> bytes | None:
        """An object; None if there is none."""
        try:
            content: bytes = self._told(lambda: self._fs.cat_file(self._at(name)))
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replace an object."""
        if not self._is_local:
            self._told(lambda: self._fs.pipe_file(self._at(name), content))
            return
        self._told(lambda: self._fs.pipe_file(self._at(f"{name}.tmp"), content))
        self._told(lambda: self._fs.mv(self._at(f"{name}.tmp"), self._at(name)))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one; whether it was written."""
        try:
            self._told(lambda: self._fs.pipe_file(self._at(name), content, mode="create"))
        except StoreError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def upload(self, path: Path, name: str) -> None:
        """Replace an object by a file."""
        self._told(lambda: self._fs.put_file(str(path), self._at(name)))

    def download(self, name: str, path: Path) -> None:
        """Write an object into a file."""
        self._told(lambda: self._fs.get_file(self._at(name), str(path)))

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        try:
            self._told(lambda: self._fs.rm_file(self._at(name)))
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _told(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:  # each protocol's package has errors of its own, by no common class
            raise StoreError(f"{self.url}: {type(error).__name__}: {error}") from error
