"""The recipe `toolret`: what it refuses, what is held out, and a whole run on a tiny encoder, killed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

from pipeline import encoder_run, methods
from pipeline.commands.export import export_model
from pipeline.commands.status import in_words
from pipeline.core.config import Config
from pipeline.core.data.world.writer import write_world
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.shipped import CONFIGS
from pipeline.core.status import run_status
from pipeline.encoder_run import read_data
from pipeline.recipes import toolret
from pipeline.view.pages import Pages
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import read_corpus
from tests.actors.encoders import PEOPLE, TOWNS, build_encoder
from tests.retriever_service.support import write_jsonl

FILLERS = ("", " x", " x y", " x y z")
"""Words that the tiny encoder does not know: different queries of the same meaning."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "tools.jsonl", [{"id": town, "documentation": town} for town in TOWNS])
    rows = [
        {
            "id": f"{person}-{n}",
            "query": f"{person}{filler}",
            "instruction": "arlen" if n else "",
            "labels": json.dumps([{"id": town, "relevance": 1}]),
            "category": "web",
        }
        for person, town in zip(PEOPLE, TOWNS, strict=True)
        for n, filler in enumerate(FILLERS)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [row | {"query": f"{row['query']} again"} for row in rows[::4]])
    return tmp_path


def config_of(data: Path, *overrides: str) -> Config:
    given = [
        "recipe=toolret",
        f"data.root={data}",
        "data.corpus=tools.jsonl",
        "toolret.train.queries=train.jsonl",
        "toolret.test.queries=test.jsonl",
        "toolret.dev_queries=8",
        "toolret.negatives=2",
        "toolret.margin=null",
        "toolret.epochs=4",
        "toolret.learning_rate=3e-3",
        "toolret.temperature=0.05",
        "toolret.checkpoint_steps=20",
        "toolret.iterations=2",
        "tracking.tensorboard=false",
    ]
    return methods.load(None, [*given, *overrides])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["toolret.tempreature=1"], "configuration key toolret.tempreature; did you mean toolret.temperature?"),
        (["learner.epochs=2"], "learner says nothing to the recipe toolret"),
        (["data.train_limit=5"], "data.train_limit says nothing to the recipe toolret"),
        (['toolret.query_format="{text}"'], "configuration key toolret.query_format: should have the field {query}"),
        (["toolret.dtype=float16"], "toolret.dtype: float16 needs a GPU"),
        (["toolret.train=null"], "toolret.train is empty"),
        (["data.corpus=[]"], "data.corpus is empty"),
        (["data.root=/nowhere"], "/nowhere does not exist"),
        (["toolret.dev.queries=test.jsonl"], "toolret.dev_queries are held out where there is no toolret.dev"),
        (["toolret.train.queries=none.jsonl"], "none.jsonl does not exist"),
        (["toolret.dev_queries=32"], "no training query is left"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    data: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((UserError, RetrieverError)) as refused:
        methods.train(config_of(data, *overrides), data / "run", Display())
    assert message in str(refused.value)
    assert not (data / "run").exists()


def test_commands_of_language_models_are_refused(data: Path) -> None:
    config = config_of(data)
    for ask in (methods.answering, methods.policies):
        with pytest.raises(UserError, match="trains a sentence encoder, which answers no question"):
            ask(config)


# ---------------------------------------------------------------- the data


def test_dev_queries_are_held_out_and_what_is_asked_later_is_not_trained_on(data: Path) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    write_jsonl(data / "test.jsonl", [*rows[:3]])
    found = read_data(config_of(data))
    assert len(found.dev.queries) == 8
    trained = {query.text for query in found.train.queries}
    asked = {query.text for of in (found.dev, found.test) if of for query in of.queries}
    assert not trained & asked
    assert len(trained) + found.asked_elsewhere == 24
    assert read_data(config_of(data)) == found


def test_rows_of_toolrets_training_set_bring_their_own_tools(data: Path) -> None:
    rows = [{"query": "ada", "prompt": "arlen", "pos": ["{'name': 'a'}"], "neg": ["{'name': 'b'}"]}] * 2
    write_jsonl(data / "rows.jsonl", rows)
    overrides = (
        "toolret.train.queries=rows.jsonl",
        "toolret.dev.queries=test.jsonl",
        "toolret.dev_queries=200",
    )
    found = read_data(config_of(data, *overrides))
    assert found.tools is not None and [tool.text for tool in found.tools] == [
        "{'name': 'a'}",
        "{'name': 'b'}",
    ]
    (first, _) = found.train.queries
    assert (first.text, first.instruction, first.relevant) == ("ada", "arlen", [found.tools[0].id])
    with pytest.raises(UserError, match="give toolret"):
        read_data(config_of(data, "toolret.train.queries=rows.jsonl"))


def test_the_shipped_cpu_configuration_finds_its_data_in_a_generated_world(tmp_path: Path) -> None:
    write_world(tmp_path / "world", seed=0, size="small")
    config = methods.load(CONFIGS / "methods" / "toolret-cpu.yaml", [f"data.root={tmp_path / 'world'}"])
    toolret.check(config)
    found = read_data(config)
    assert found.test is not None
    for of, number in ((found.dev, 100), (found.test, 200)):
        assert len(of.queries) == number and all(query.instruction for query in of.queries)
    assert len(found.train.queries) + found.asked_elsewhere == 300
    tools = {passage.id for passage in read_corpus([tmp_path / "world" / "corpus.jsonl"])}
    assert all(id_ in tools for query in found.train.queries for id_ in query.relevant)


# ---------------------------------------------------------------- a run


class Killed(BaseException):
    """As a kill: nothing catches it."""


def scores_of(report: dict[str, Any]) -> Any:
    """Without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(of) for key, of in value.items() if key not in ("seconds", "run")}
        return [timeless(of) for of in value] if isinstance(value, list) else value

    return timeless(report)


@pytest.mark.component
def test_a_run_that_is_killed_ends_with_the_report_of_one_that_is_not(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = f"toolret.encoder={build_encoder(data / 'encoder')}"
    config = config_of(data, encoder)
    whole = methods.train(config, data / "whole", Display()).report
    train, killed_at = encoder_run.train_encoder, [27]

    def killing(phase: Any, on_progress: Any) -> Any:
        def told(done: int, total: int) -> None:
            on_progress(done, total)
            if killed_at and done == killed_at[0] and "0002" in phase.out:
                del killed_at[0]
                raise Killed

        return train(phase, told)

    monkeypatch.setattr(encoder_run, "train_encoder", killing)
    with pytest.raises(Killed):
        methods.train(config, data / "killed", Display())
    assert not (data / "killed" / "report.json").exists()
    resumed = methods.train(config, data / "killed", Display()).report
    assert scores_of(resumed) == scores_of(whole)
    assert not killed_at
    ours, theirs = (
        SentenceTransformer(str(data / run / "iterations/0002/encoder/model"), device="cpu").state_dict()
        for run in ("whole", "killed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    # What a run is: it learns, on queries that it has not seen, and counts.
    best = whole["best_iteration"]
    assert best > 0 and whole["models"] == {"encoder": f"iterations/{best:04d}/encoder/model"}
    assert whole["test"]["best"]["scores"]["ndcg@10"] > whole["test"]["start"]["scores"]["ndcg@10"] + 10
    assert set(whole["start"]["evaluation"]) == {"scores", "without", "with", "difference", "seconds"}
    assert whole["start"]["evaluation"]["with"].items() <= whole["start"]["evaluation"]["scores"].items()
    first = whole["iterations"][0]
    assert (first["mine"]["rows"], first["mine"]["left_out"], first["mine"]["filled"]) == (24, 0, 0)
    assert first["encoder/train"]["steps"] > 0
    assert whole["data"]["train"]["queries"] == 24 and whole["data"]["asked_elsewhere"] == 0
    assert not (data / "whole" / "encoded").exists()

    # The rows are as the encoder sees them, with instructions where there are some.
    rows = pq.read_table(data / "whole/iterations/0001/encoder/rows.parquet").to_pylist()
    assert set(rows[0]) == {"anchor", "positive", "negative_1", "negative_2"}
    anchors = {row["anchor"] for row in rows}
    assert any(text.startswith("Instruct: arlen\nQuery: ") for text in anchors)
    assert all(text.split("Query: ")[-1].split()[0] in PEOPLE for text in anchors)
    assert not any(text.startswith("Instruct: \n") for text in anchors)

    # It is looked at as other runs are.
    said = list(in_words(run_status(data / "whole")))
    best_score = whole["iterations"][best - 1]["evaluation"]["scores"]["ndcg@10"]
    assert any(
        line.startswith(f"  {best}: ndcg@10 {best_score:.1f} (") and line.endswith("the best")
        for line in said
    )
    assert Pages([data / "whole"], live=False).page("run/0")["report"]["best_iteration"] == best
    with pytest.raises(UserError, match="is a sentence encoder and needs nothing beside it"):
        export_model(data / "whole", data / "out", "best", None, None, False, Display())

    # Finished steps are not done again, and not mixed with other data.
    monkeypatch.setattr(encoder_run, "train_encoder", None)
    display = Display()
    outcome = methods.train(config, data / "whole", display)
    assert scores_of(outcome.report) == scores_of(whole)
    display.outcome(outcome)
    write_jsonl(data / "tools.jsonl", [{"id": town, "documentation": f"{town} x"} for town in TOWNS])
    with pytest.raises(UserError, match="holds a run that searched another input"):
        methods.train(config, data / "whole", display)
