"""What the commands of the retriever share: options, sizes, how a command ends, progress bars."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperGroup

from retriever_service.bars import Bars
from retriever_service.choices import Method, StoreDtype, WeightsDtype
from retriever_service.errors import RetrieverError
from retriever_service.interrupts import Interrupted, interruptible

if TYPE_CHECKING:
    from retriever_service.encoding.encoder import EncoderSpec
    from retriever_service.index.store import Manifest


class Commands(TyperGroup):
    """Turns what the user can mend into one message and exit code 2, and Ctrl-C or SIGTERM into advice."""

    mendable: tuple[type[Exception], ...] = (RetrieverError,)
    failures: tuple[type[Exception], ...] = ()
    """Of these the message is enough as well; the exit code is 1."""
    resumable: tuple[str, ...] = ("build", "encode", "encode-with-ray", "import")

    def invoke(self, ctx: Any) -> Any:
        try:
            with interruptible():
                return super().invoke(ctx)
        except self.mendable as error:
            say(f"error: {_own_words(error)}", style="bold red")
            raise typer.Exit(2) from error
        except self.failures as error:
            say(f"error: {_own_words(error)}{self._advice(ctx)}", style="bold red")
            raise typer.Exit(1) from error
        except Interrupted as interrupt:
            say(f"error: interrupted by {interrupt.name}{self._advice(ctx)}", style="bold red")
            raise typer.Exit(interrupt.exit_code) from interrupt

    def _advice(self, ctx: Any) -> str:
        if ctx.invoked_subcommand not in self.resumable:
            return ""
        return f"; what was finished is kept, go on with: {_this_command(ctx)}"


def _own_words(error: Exception) -> object:
    """Ray wraps what an actor raised."""
    return getattr(error, "cause", error)


def _this_command(ctx: Any) -> str:
    """As it was called, for a shell."""
    program = ctx.find_root().info_name  # without its folder, or "python -m MODULE"
    if " " not in program and shutil.which(program) is None:
        program = sys.argv[0]
    return f"{program} {shlex.join(sys.argv[1:])}"


def say(text: str, style: str | None = None) -> None:
    Console(stderr=True).print(text, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)


def size_in_bytes(text: str) -> int:
    """Bytes, from a size as people write it: 800M, 2GiB, 1.5e9."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 800MiB or 2GiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


CorpusSources = Annotated[
    list[str],
    typer.Option("--corpus", help="File or folder of passages, or hf:NAME; several times for a union."),
]
IndexDir = Annotated[Path, typer.Option("--index", help="Index directory.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write.")]
EncoderName = Annotated[str, typer.Option(help="minilm, or any sentence-transformers model.")]
QueryPrefix = Annotated[str | None, typer.Option(help="In front of queries (default: the family's).")]
PassagePrefix = Annotated[str | None, typer.Option(help="In front of passages (default: the family's).")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Cut texts at so many tokens (default: the model's limit).")
]
EncoderDtype = Annotated[
    WeightsDtype | None,
    typer.Option(help="Of the encoder's weights (default: bfloat16 where the device computes in it)."),
]
VectorsDtype = Annotated[StoreDtype, typer.Option("--dtype", help="Of the stored vectors.")]
Device = Annotated[str, typer.Option(help="Torch device that encodes.")]
Workers = Annotated[int | None, typer.Option(help="Processes that encode (default: what suits the machine).")]
Memory = Annotated[
    int | None,
    typer.Option("--memory", parser=size_in_bytes, metavar="SIZE", help="Most memory to use, e.g. 2GiB."),
]
Factory = Annotated[str, typer.Option(help="FAISS index factory string: Flat, SQ8, IVF4096,SQ8, HNSW32, ...")]
SearchParameters = Annotated[
    str, typer.Option(help="Of an approximate index, e.g. nprobe=64 or efSearch=128 (default: as tuned).")
]
TargetRecall = Annotated[
    float, typer.Option(help="Share of the exact top 10 that an approximate index is tuned to find.")
]
PassageTemplate = Annotated[
    str | None,
    typer.Option(help="How {title} and {text} were put together (default: the usual one that fits)."),
]
Normalise = Annotated[
    bool | None,
    typer.Option("--normalise/--no-normalise", help="To length 1 (default: as the family does)."),
]
MethodName = Annotated[Method, typer.Option(help="How to search.")]
Reranker = Annotated[str | None, typer.Option("--rerank", help="Cross-encoder that orders the best anew.")]
Candidates = Annotated[int, typer.Option(help="How many of the best the cross-encoder orders anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for programs.")]


def encoder_spec(
    encoder: str,
    query_prefix: str | None,
    passage_prefix: str | None,
    max_tokens: int | None,
    dtype: WeightsDtype | None,
) -> EncoderSpec:
    """Its directory may be relative to the current one, whoever loads it."""
    from retriever_service.encoding.encoder import EncoderSpec, lasting_name

    model = lasting_name(encoder)
    return EncoderSpec(model, query_prefix, passage_prefix, max_length=max_tokens, dtype=dtype)


def say_built(out: Path, manifest: Manifest) -> None:
    """What an index is, and how much of an exact search it finds."""
    say(f"{out}: {manifest.count:,} passages, {manifest.dimension} dimensions, {manifest.factory}")
    for point in manifest.recall:
        chosen = " (chosen)" if point.search_parameters == manifest.search_parameters else ""
        found = ", ".join(f"{share:.3f} at {cutoff}" for cutoff, share in point.recall.items())
        say(f"  recall {found}  {point.search_parameters}{chosen}")


class _Rate(ProgressColumn):
    """Steps per second of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


class _Advance:
    """Moves a progress bar to (done, total)."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress(what: str, unit: str) -> Iterator[_Advance]:
    """A bar with rate and time left; afterwards one line with how long it took."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Bars(*columns, console=Console(stderr=True)) as bar:
        yield _Advance(bar, bar.add_task(what, total=None, unit=unit))
    say(f"{what}: {time.perf_counter() - start:.1f} s")
