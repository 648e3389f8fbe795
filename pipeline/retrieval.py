"""The retriever of a run, from the configuration's point of view."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.display import Display
from pipeline.errors import UserError
from retriever_service.build import build_index
from retriever_service.encoder import Encoder, EncoderSpec
from retriever_service.index import check_encoder, read_manifest


def encoder_spec(config: Config) -> EncoderSpec:
    retriever = config.retriever
    return EncoderSpec(
        model=retriever.encoder,
        query_prefix=retriever.query_prefix,
        passage_prefix=retriever.passage_prefix,
        max_length=retriever.max_tokens,
        dtype=retriever.encoder_dtype,
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
    spec = encoder_spec(config)
    if config.retriever.index is not None:
        index = Path(config.retriever.index)
        manifest = read_manifest(index)
        if not _asks_for_nothing_else(spec, manifest.encoder):
            # Under another name it may still be the same encoder: a copy in another directory.
            check_encoder(manifest, Encoder.load(spec), index)
        return index
    if not config.data.corpus:
        raise UserError("there is nothing to search: set data.corpus, or retriever.index to a built index")
    # Not what is fastest here: the same command is to give the same run on every machine.
    spec = replace(spec, dtype=spec.dtype or "float32")
    with display.progress("preparing the index", None, "passages") as advance:
        build_index(
            corpus_paths(config),
            default,
            spec,
            factory=config.retriever.factory,
            # This process may be on a node without GPUs, whatever the retriever actors have.
            device=config.retriever.torch_device if torch.cuda.is_available() else "cpu",
            on_progress=advance.to,
        )
    return default


def _asks_for_nothing_else(asked: EncoderSpec, built: EncoderSpec) -> bool:
    """True if every setting is left open or is the one that the index was built with."""
    return all(value in (None, asdict(built)[name]) for name, value in asdict(asked).items())
