"""The retriever of a run, from the configuration's point of view."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.display import Display
from pipeline.errors import UserError
from retriever_service.encoder import EncoderSpec
from retriever_service.index import build_index, read_manifest


def encoder_spec(config: Config) -> EncoderSpec:
    retriever = config.retriever
    return EncoderSpec(
        model=retriever.encoder,
        query_prefix=retriever.query_prefix,
        passage_prefix=retriever.passage_prefix,
        max_length=retriever.max_tokens,
    )


def corpus_paths(config: Config) -> list[str]:
    """`data.corpus` with `data.root` in front of relative paths."""
    root = Path(config.data.root)
    return [source if source.startswith("hf:") else str(root / source) for source in config.data.corpus]


def prepare_index(config: Config, default: Path, display: Display) -> Path:
    """The directory of the index to search: the configured one, else one built from the corpus at `default`.

    Raises:
        UserError, RetrieverError: no corpus and no index, a bad corpus, or an index of another encoder.
    """
    if config.retriever.index is not None:
        index = Path(config.retriever.index)
        read_manifest(index)
        return index
    if not config.data.corpus:
        raise UserError("there is nothing to search: set data.corpus, or retriever.index to a built index")
    with display.progress("encoding the corpus", None, "passages") as advance:
        build_index(
            corpus_paths(config),
            default,
            encoder_spec(config),
            factory=config.retriever.factory,
            device="cuda" if config.retriever.device == "cuda" else "cpu",
            on_progress=advance.to,
        )
    return default
