"""The directories that the product writes and reads again: runs, indexes, vectors, models, checkpoints, copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.odd_files.readers import PASSAGES, QUESTIONS, Reader, lines
from pipeline.core.records import Episode, Example, Question, StopReason, Trajectory
from retriever_service.encoding.encoder import EncoderSpec, OnRows, Vectors
from retriever_service.passages.corpus import Passage

TASKS = [Question(row["id"], row["question"], tuple(row["answers"])) for row in QUESTIONS]


def directories() -> list[Reader]:
    return [*runs(), *shards(), *models(), *indexes(), *copies()]


def trajectory(task: Question) -> Trajectory:
    ids = np.arange(6, dtype=np.int32)
    return Trajectory(
        question_id=task.id,
        sample=0,
        policy_version=0,
        token_ids=ids,
        loss_mask=ids > 2,
        logprobs=np.where(ids > 2, np.float32(-0.5), np.float32("nan")),
        answer_start=4,
        steps=(),
        answer="Orvane",
        stop_reason=StopReason.ANSWERED,
        log_likelihoods=(-1.0, -2.0),
    )


# ---------------------------------------------------------------- runs


def runs() -> list[Reader]:
    from pipeline.core.config import Config
    from pipeline.core.config.cluster import TrackingConfig
    from pipeline.core.run import check_directory, write_json
    from pipeline.core.status import run_status
    from pipeline.core.tracking import Tracker

    def make(folder: Path) -> None:
        config = Config().model_dump(mode="json")
        (folder / "config.yaml").write_text(json.dumps(config))
        step = folder / "iterations/0001"
        step.mkdir(parents=True)
        write_json(
            step / "sample.json", {"seconds": 1.0, "generated_tokens": 5, "stop_reasons": {"answered": 3}}
        )
        told = {
            "pid": 1,
            "host": "h",
            "started": "2026-03-01T12:00:00+00:00",
            "updated": "2026-03-01T12:01:00+00:00",
        }
        phase = {"name": "x", "unit": "q", "begun_at": 0, "done": 1, "total": 2, "since": told["started"]}
        write_json(folder / "progress.json", {**told, "state": "running", "phase": phase, "restarts": {}})
        write_json(folder / "mirror.json", {"url": "s3://b/r"})
        (folder / "run.log").write_text("2026-03-01 12:00:00 INFO begins\n")

    def metrics(folder: Path) -> None:
        row = {
            "time": "2026-03-01T12:00:00+00:00",
            "wall_s": 1.0,
            "iteration": 1,
            "phase": "sample",
            "step": None,
        }
        (folder / "metrics.jsonl").write_text(lines([{**row, "values": {"loss": 1.0}}] * 2))

    def rolled_back(folder: Path) -> int:
        with Tracker(folder, TrackingConfig(), "run") as tracker:
            return tracker.rollback(1, "sample")

    def stored(folder: Path) -> int:
        check_directory(folder, Config())
        return 1

    status = ["iterations/0001/sample.json", "progress.json", "mirror.json", "run.log", "config.yaml"]
    return [
        Reader("status of a run", make, lambda folder: len(run_status(folder)), status),
        Reader("configuration of a run", make, stored, ["config.yaml"]),
        Reader("metrics of a run", metrics, rolled_back, ["metrics.jsonl"], may_be_empty=True),
    ]


def shards() -> list[Reader]:
    from pipeline.core.example_files import read_examples, read_outlines, read_outlines_and_overlaps
    from pipeline.core.shards import Shards, generated_tokens, write_examples
    from pipeline.core.weighing import Weighted

    def examples(folder: Path) -> None:
        write_examples(
            folder / "0.parquet", [Example.of(trajectory(task), log_weight=-1.0) for task in TASKS]
        )

    def phase(folder: Path) -> Shards:
        return Shards(TASKS, folder / "rollouts", {"searcher": folder / "examples"}, 2)

    def make(folder: Path) -> None:
        whole = phase(folder)
        whole.resume()
        for number in range(len(whole)):
            members = TASKS[2 * number : 2 * number + 2]
            whole.write(number, [([Episode(t.id, 0, (trajectory(t),))], _weighted(t)) for t in members])

    def _weighted(task: Question) -> Weighted:
        return Weighted({"searcher": [Example.of(trajectory(task), log_weight=-1.0)]}, {})

    def resumed(folder: Path) -> int:
        found = phase(folder)
        found.resume()
        return len(found.complete)

    def outlines(folder: Path) -> int:
        return len(read_outlines(folder / "0.parquet"))

    files = ["rollouts/_000000.json", "rollouts/000000.parquet", "examples/000000.parquet"]
    return [
        Reader("shards of a phase", make, resumed, files, is_native=True),
        Reader(
            "how long questions took",
            make,
            lambda folder: len(generated_tokens(folder / "rollouts")),
            files[:1],
            may_be_empty=True,
        ),
        Reader(
            "training examples",
            examples,
            lambda folder: len(read_examples(folder / "0.parquet")),
            ["0.parquet"],
            is_native=True,
        ),
        Reader(
            "outlines",
            examples,
            lambda folder: len(read_outlines(folder / "0.parquet")),
            ["0.parquet"],
            is_native=True,
        ),
        Reader(
            "outlines and overlaps",
            examples,
            lambda folder: len(read_outlines_and_overlaps(folder / "0.parquet")[1]),
            ["0.parquet"],
            is_native=True,
        ),
    ]


# ---------------------------------------------------------------- models and checkpoints


def models() -> list[Reader]:
    from actors.learner_files import MARKER, facts_of
    from pipeline.core.models import check_export, check_model, load_tokenizer, model_size, write_checksums

    def make(folder: Path) -> None:
        from safetensors.numpy import save_file
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen2Config

        bpe = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="a").save_pretrained(folder)
        Qwen2Config(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        ).save_pretrained(folder)
        save_file({"weight": np.ones((2, 3), np.float32)}, folder / "model.safetensors")
        write_checksums(folder)

    def in_several(folder: Path) -> None:
        make(folder)
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        index = {"metadata": {}, "weight_map": {"weight": "model-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def checked(folder: Path) -> int:
        check_model(str(folder))
        return 1

    def sized(folder: Path) -> int:
        check_model(str(folder))
        return model_size(folder).parameters

    def whole(folder: Path) -> int:
        check_export(folder)
        return 1

    def words(folder: Path) -> int:
        return len(load_tokenizer(str(folder)))

    def shape(folder: Path) -> int:
        from pipeline.core.plan.shape import read_shape

        return read_shape(str(folder)).layers

    def marker(folder: Path) -> None:
        (folder / MARKER).write_text(json.dumps({"slot": "a", "step": 3}))

    return [
        Reader("index of a model's files", in_several, checked, ["model.safetensors.index.json"]),
        Reader("size of a model", make, sized, ["model.safetensors"]),
        Reader("an exported model", make, whole, ["checksums.json", "model.safetensors", "config.json"]),
        Reader(
            "tokenizer of a model", make, words, ["tokenizer.json", "tokenizer_config.json"], is_native=True
        ),
        Reader("architecture of a model", make, shape, ["config.json"]),
        Reader(
            "marker of a checkpoint",
            marker,
            lambda folder: len(facts_of(folder)),
            [MARKER],
            True,
            is_native=True,
        ),
    ]


# ---------------------------------------------------------------- indexes and copies


class Letters:
    """An encoder without a model: counts letters."""

    dimension, pooling = 8, ""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.fingerprint = hashlib.sha256(repr(spec).encode()).hexdigest()

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        counts = [[sum(ord(c) % 8 == n for c in text) + 1 for n in range(8)] for text in queries]
        vectors = np.array(counts, np.float32)
        unit: Vectors = vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True))
        return unit

    def encode_passages(
        self, passages: Iterable[Passage], on_rows: OnRows | None = None
    ) -> Iterator[Vectors]:
        for passage in passages:
            yield self.encode_queries([passage.text])


def load(spec: EncoderSpec, device: str) -> Letters:
    return Letters(spec)


def indexes() -> list[Reader]:
    from retriever_service.building.build import build_index
    from retriever_service.encoding.encode import encode_corpus
    from retriever_service.encoding.vectors import VectorStore
    from retriever_service.index.bm25 import Bm25
    from retriever_service.index.store import open_index, verify_checksums

    spec = EncoderSpec("letters", query_prefix="", passage_prefix="")

    def index(folder: Path) -> None:
        (folder / "corpus.jsonl").write_text(lines(PASSAGES))
        build_index([folder / "corpus.jsonl"], folder / "index", spec, bm25=True, load_encoder=load)

    def vectors(folder: Path) -> None:
        (folder / "corpus.jsonl").write_text(lines(PASSAGES))
        encode_corpus([folder / "corpus.jsonl"], folder / "vectors", spec, load_encoder=load)

    def passages(folder: Path) -> int:
        opened = open_index(folder / "index")
        return sum(segment.ntotal for segment in opened.segments) and len(list(opened.corpus))

    def words(folder: Path) -> int:
        return Bm25.open(folder / "index/bm25-0").count

    def verified(folder: Path) -> int:
        verify_checksums(folder / "index")
        return 1

    def stored(folder: Path) -> int:
        store = VectorStore.open(folder / "vectors")
        store.verify()
        return len(store.read(0, len(store)))

    segment, bm25 = "index/segments/0000", "index/bm25-0"
    parts = [
        f"{bm25}/{name}" for name in ("bm25.json", "terms.arrow", "params.index.json", "indptr.csc.index.npy")
    ]
    whole = ["index/manifest.json", f"{segment}/index.faiss", f"{segment}/passages.arrow", *parts]
    shard = ["vectors/manifest.json", "vectors/passages.arrow", "vectors/shards/00000.npy"]
    return [
        Reader("an index that is opened", index, passages, whole[:3], is_native=True),
        Reader("words of an index", index, words, parts, is_native=True),
        Reader("an index that is verified", index, verified, whole),
        Reader("vectors", vectors, stored, shard),
    ]


def copies() -> list[Reader]:
    from pipeline.core.mirror.lease import LEASE, is_fresh
    from pipeline.core.mirror.manifest import MANIFEST, Entry, ManifestOf, read_manifest, write_manifest
    from pipeline.core.mirror.store import Store

    def make(folder: Path) -> None:
        write_manifest(Store(folder.as_uri()), ManifestOf("w", {"a": Entry(1, "0" * 64, "a", 0.0)}))
        (folder / LEASE).write_text(
            json.dumps({"pid": 1, "host": "h", "run": "r", "time": "2026-03-01T12:00:00+00:00"})
        )

    def manifest(folder: Path) -> int:
        found = read_manifest(Store(folder.as_uri()))
        return 0 if found is None else len(found.files)

    def lease(folder: Path) -> int:
        return is_fresh(Store(folder.as_uri())) is not None

    return [
        Reader("manifest of a copy", make, manifest, [MANIFEST], may_be_empty=True),
        Reader("lease of a copy", make, lease, [LEASE], may_be_empty=True),
    ]
