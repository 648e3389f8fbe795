"""The files that the product makes of data and reads again: what it fetched, generated and synthesised."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from bench.odd_files.directories import TASKS, trajectory
from bench.odd_files.readers import HOTPOTQA, Reader, lines


def made_of_data() -> list[Reader]:
    return [*fetched(), generated(), *synthesised()]


def fetched() -> list[Reader]:
    from pipeline.core.data.fetch.fetching import MANIFEST, fetch

    alias = {"Q_id": "Q1", "aliases": ["O."], "demonyms": []}
    row = {
        **HOTPOTQA[0],
        "answer_id": "Q1",
        "evidences": [["a", "b", "c"]],
        "evidences_id": [["Q1", "P1", "Q2"]],
    }

    def own(folder: Path) -> None:
        copy = folder / "copy"
        copy.mkdir()
        (copy / "dev.json").write_text(json.dumps([row]))
        (copy / "id_aliases.json").write_text(lines([alias]))

    def whole(folder: Path) -> None:
        own(folder)
        again(folder)
        # It names the place of its source, and is read in a copy of the folder.
        text = (folder / "out" / MANIFEST).read_text()
        (folder / "out" / MANIFEST).write_text(text.replace(str(folder), "FOLDER"))

    def again(folder: Path) -> int:
        manifest = folder / "out" / MANIFEST
        if manifest.is_file():
            manifest.write_bytes(manifest.read_bytes().replace(b"FOLDER", str(folder).encode()))
        made = fetch("2wikimultihopqa", folder / "out", str(folder / "copy"))
        return sum(split["questions"] for split in made["splits"].values())

    return [
        Reader("a data set to fetch", own, again, ["copy/dev.json", "copy/id_aliases.json"]),
        Reader("a fetched data set", whole, again, [f"out/{MANIFEST}", "out/dev.jsonl"]),
    ]


def generated() -> Reader:
    from pipeline.core.data.world.writer import write_world

    def read(folder: Path) -> int:
        return write_world(folder / "world", seed=0, size="small").num_passages

    def make(folder: Path) -> None:
        read(folder)

    return Reader("a generated world", make, read, ["world/world.json"])


def synthesised() -> list[Reader]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pipeline.core.config import AgentConfig
    from pipeline.core.data.cold_start import read_trajectories, write_trajectories
    from pipeline.core.data.rewriter import Rewriter
    from pipeline.core.renderer import Renderer

    bpe = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    renderer = Renderer(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="a"), AgentConfig())

    def trajectories(folder: Path) -> None:
        write_trajectories(folder / "cold.parquet", [trajectory(task) for task in TASKS], renderer)

    def kept(folder: Path) -> None:
        (folder / "kept.jsonl").write_text(lines([{"key": "k", "content": "[]"}]))

    async def opened(folder: Path) -> int:
        async with Rewriter("http://127.0.0.1:9/v1", "model", folder / "kept.jsonl"):
            return 1

    return [
        Reader(
            "cold-start trajectories",
            trajectories,
            lambda folder: len(read_trajectories(folder / "cold.parquet", renderer)),
            ["cold.parquet"],
            is_native=True,
        ),
        Reader(
            "kept answers of an endpoint", kept, lambda folder: asyncio.run(opened(folder)), ["kept.jsonl"]
        ),
    ]
