"""The command line: what is refused, with which words and exit code, and that nothing is touched by it.

Most commands run in this process, with a hashing encoder and without Ray; the tests marked `component` start it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.config.loading import load_config
from pipeline.core.record_tables import trajectories_from_table
from pipeline.core.run import RunDirectory
from tests.pipeline.commands_support import COLD_START, TRAIN, passage, question
from tests.retriever_service.fake_engine import ANIMALS
from tests.retriever_service.scripted_server import ScriptedServer
from tests.retriever_service.support import write_jsonl


def test_help_loads_no_library_that_computes() -> None:
    """Each of them takes longer to load than a person waits gladly for a help text."""
    heavy = {"numpy", "pyarrow", "pydantic", "torch", "faiss", "ray"}
    code = f"import sys, pipeline.cli; print(*{heavy} & {{*sys.modules}})"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == []


# ---------------------------------------------------------------- configuration


def test_an_unknown_key_on_the_command_line(refused: Any) -> None:
    message = refused(*TRAIN, "rollout.sample=2")
    assert message == "error: unknown configuration key rollout.sample; did you mean rollout.samples?\n"


def test_an_unknown_key_in_the_file(refused: Any, folder: Path) -> None:
    with (folder / "config.yaml").open("a") as file:
        file.write("em: {iteration: 2}\n")
    assert "unknown configuration key em.iteration; did you mean em.iterations?" in refused(*TRAIN)


def test_one_trajectory_per_question_with_posterior_weights(refused: Any) -> None:
    message = refused(*TRAIN, "rollout.samples=1", "weighting=posterior")
    assert (
        "rollout.samples of at least 2, not 1; raise rollout.samples or use weighting=likelihood" in message
    )


def test_an_override_that_is_no_assignment(refused: Any) -> None:
    assert "override 'rollout.samples' is not of the form key=value" in refused(*TRAIN, "rollout.samples")


def test_a_configuration_file_that_does_not_exist(refused: Any) -> None:
    assert "no configuration file nothing.yaml" in refused("train", "--config", "nothing.yaml")


# ---------------------------------------------------------------- questions

QUESTION_MISTAKES = {
    "not JSON": (["{"], r"train.jsonl:1: not valid JSON"),
    "no answer": ([json.dumps({"id": "a", "question": "Who?"})], "train.jsonl:1: there is no answers"),
    "an empty answer": (
        [json.dumps({"id": "a", "question": "Who?", "answers": [""]})],
        "train.jsonl:1: answers has no answer or an empty one",
    ),
    "an id twice": (
        [json.dumps(question("a")), json.dumps(question("b")), json.dumps(question("a"))],
        "train.jsonl:3: id 'a' was already used at train.jsonl:1",
    ),
    "nothing at all": ([], "train.jsonl has no questions in it"),
    "trained on and measured": ([json.dumps(question("dev1"))], "data.dev are also in data.train (dev1)"),
}


@pytest.mark.parametrize(("lines", "message"), QUESTION_MISTAKES.values(), ids=QUESTION_MISTAKES)
@pytest.mark.parametrize("command", [TRAIN, COLD_START], ids=["train", "cold-start"])
def test_a_mistake_in_the_questions(
    refused: Any, folder: Path, command: tuple[str, ...], lines: list[str], message: str
) -> None:
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    assert message in refused(*command)


def test_a_question_file_that_does_not_exist(refused: Any) -> None:
    message = refused(*TRAIN, "data.dev=dve.jsonl")
    assert "no question file dve.jsonl; there are corpus.jsonl, dev.jsonl" in message


def test_no_training_questions(refused: Any) -> None:
    assert "data.train is empty; name at least one file of questions" in refused(*TRAIN, "data.train=[]")


# ---------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "model.path: model has no tokenizer"),
        ("config.json", "model.path: model has no config.json"),
        ("model.safetensors", "model.path: model has no weights"),
    ],
)
@pytest.mark.parametrize("command", [TRAIN, COLD_START], ids=["train", "cold-start"])
def test_an_incomplete_model_directory(
    refused: Any, folder: Path, command: tuple[str, ...], missing: str, message: str
) -> None:
    (folder / "model" / missing).unlink()
    assert message in refused(*command)


def test_a_model_that_does_not_exist(refused: Any) -> None:
    assert "model.path: ./modle does not exist" in refused(*TRAIN, "model.path=./modle")


# ---------------------------------------------------------------- corpus and index

CORPUS_MISTAKES = {
    "not JSON": (["{"], "corpus.jsonl:1: not valid JSON"),
    "no text": ([json.dumps({"id": "a"})], "corpus.jsonl:1: no field 'text'"),
    "an id twice": (
        [json.dumps(passage(1)), json.dumps(passage(1, text="Else."))],
        "corpus.jsonl:2: id 'p1' appears twice; first at corpus.jsonl:1",
    ),
    "nothing at all": ([], "corpus.jsonl: no passages; the corpus is empty"),
}


@pytest.mark.parametrize(("lines", "message"), CORPUS_MISTAKES.values(), ids=CORPUS_MISTAKES)
@pytest.mark.parametrize(
    "command",
    [COLD_START, ("index", "build", "--corpus", "corpus.jsonl", "--out", "index")],
    ids=["cold_start", "index"],
)
def test_a_mistake_in_the_corpus(
    refused: Any, folder: Path, command: tuple[str, ...], lines: list[str], message: str
) -> None:
    (folder / "corpus.jsonl").write_text("".join(line + "\n" for line in lines))
    assert message in refused(*command)


def test_no_corpus(refused: Any) -> None:
    assert "set data.corpus, or retriever.index" in refused(*COLD_START, "data.corpus=[]")


def test_a_corpus_that_does_not_exist(refused: Any) -> None:
    assert "corpus passages.jsonl does not exist" in refused(*COLD_START, "data.corpus=passages.jsonl")


def test_an_index_of_another_encoder(refused: Any, index: Path) -> None:
    message = refused(*COLD_START, "retriever.index=index", "retriever.encoder=intfloat/e5-base-v2")
    assert "index was built with encoder 'minilm'" in message
    assert "encoder 'intfloat/e5-base-v2'" in message
    assert "Use the encoder of the index" in message


def test_building_another_index_over_one(refused: Any, index: Path) -> None:
    message = refused("index", "build", "--corpus", "corpus.jsonl", "--out", "index", "--encoder", "other")
    assert "index holds another index" in message


def test_building_an_index_over_something_else(refused: Any) -> None:
    message = refused("index", "build", "--corpus", "corpus.jsonl", "--out", "model")
    assert "model exists and is not an index" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--index", "model"), "model is not a built index"),
        (("--index", "nothing"), "nothing is not a built index"),
        (("--index", "index", "-k", "0"), "k must be a whole number of at least 1, got 0"),
    ],
)
def test_a_search_that_cannot_be_done(
    refused: Any, index: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused("index", "search", "who?", *arguments)


def test_an_index_is_built_and_searched(run_command: Any) -> None:
    built = run_command("index", "build", "--corpus", "corpus.jsonl", "--out", "index")
    assert built.exit_code == 0
    assert "index: 4 passages" in built.stderr
    found = run_command("index", "search", "Maker 2", "--index", "index", "-k", "2", "--json")
    assert found.exit_code == 0
    answer = json.loads(found.stdout)
    assert answer["query"] == "Maker 2"
    assert len(answer["hits"]) == 2
    assert set(answer["hits"][0]) == {"id", "title", "text", "metadata", "score"}
    assert answer["hits"][0]["id"] == "p2"
    shown = run_command("index", "search", "Maker 2", "--index", "index", "-k", "1")
    assert shown.stdout.startswith("[1] ")
    assert "Maker 2 (p2)" in shown.stdout


# ---------------------------------------------------------------- cold start


def test_cold_start_trajectories_are_written(run_command: Any, folder: Path) -> None:
    result = run_command(*COLD_START)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["out"], summary["trajectories"]) == ("cold_start.parquet", 2)
    assert (folder / "cold_start.parquet").is_file()


def test_trajectories_are_written_again_by_a_configuration_that_reads_them(run_command: Any) -> None:
    result = run_command(*COLD_START, "cold_start.trajectories=cold_start.parquet", "cold_start.questions=1")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trajectories"] == 1


def test_nothing_to_synthesise(refused: Any) -> None:
    assert "cold_start.questions is 0" in refused(*COLD_START, "cold_start.questions=0")


@pytest.mark.parametrize("command", [TRAIN, COLD_START], ids=["train", "cold-start"])
def test_a_cold_start_of_questions_without_supervision(refused: Any, folder: Path, command: Any) -> None:
    bare = [{"id": f"b{i}", "question": f"Question {i}?", "answers": ["Ada"]} for i in range(3)]
    write_jsonl(folder / "train.jsonl", bare)
    message = refused(*command)
    assert "cold_start.questions is 2, but none of 3 questions names its supporting passages" in message


def test_missing_cold_start_trajectories(refused: Any) -> None:
    assert "no trajectory file missing.parquet" in refused(*TRAIN, "cold_start.trajectories=missing.parquet")


# ---------------------------------------------------------------- a server in place of an index

NOBODY = "retriever.url=http://127.0.0.1:1"
EVALUATE = ("evaluate", "--config", "config.yaml", "retriever.encoder=minilm")
ASK = ("ask", "Who?", "--model", "model")


@pytest.mark.parametrize("command", [TRAIN, COLD_START, EVALUATE, ASK], ids=lambda command: command[0])
def test_a_server_that_is_not_there(refused: Any, command: tuple[str, ...]) -> None:
    *told, message = refused(*command, NOBODY).strip().splitlines()
    assert "retriever.url: no answer from http://127.0.0.1:1" in message
    assert told == [] or (command is ASK and "has no agent.json" in "".join(told))


@pytest.mark.parametrize("command", [TRAIN, COLD_START, EVALUATE, ASK], ids=lambda command: command[0])
def test_settings_that_a_server_does_not_heed(refused: Any, command: tuple[str, ...]) -> None:
    assert "retriever.replicas=1" in refused(*command, NOBODY, "retriever.replicas=2")


def test_a_server_and_no_corpus_to_take_gold_passages_from(refused: Any) -> None:
    assert "set data.corpus" in refused(*TRAIN, NOBODY, "data.corpus=[]")


def test_a_question_for_a_server_and_an_index(refused: Any) -> None:
    assert "retriever.url=null" in refused(*ASK, NOBODY, "--index", "index")


def test_a_question_with_nothing_to_search(refused: Any) -> None:
    assert "give --index DIR, or --url ADDRESS" in refused(*ASK)


@pytest.mark.parametrize("dialect", ["native", "search-r1"])
def test_cold_start_trajectories_are_searched_for_on_a_server(
    run_command: Any, folder: Path, dialect: str
) -> None:
    server = ScriptedServer()
    try:
        settings = (f"retriever.url={server.url}", f"retriever.dialect={dialect}", "agent.documents=3")
        result = run_command(*COLD_START, *settings)
    finally:
        server.close()
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["gold_passages_inserted"] == 2
    for trajectory in trajectories_from_table(pq.read_table(folder / "cold_start.parquet")):
        (step,) = trajectory.steps
        ids = [hit.passage.id for hit in step.hits]
        assert len(ids) == 3 and "p1" in ids and set(ids) - {"p1"} <= {passage.id for passage in ANIMALS}


# ---------------------------------------------------------------- the run directory


def test_a_run_directory_that_holds_something_else(refused: Any, folder: Path) -> None:
    assert "model is not empty and holds no run" in refused(
        "train", "--config", "config.yaml", "--run", "model"
    )


def test_a_run_with_another_configuration(refused: Any, folder: Path) -> None:
    run = RunDirectory(folder / "run", load_config(folder / "config.yaml", ["rollout.samples=8"]))
    run.once("0/cold_start", dict)
    message = refused(*TRAIN)
    assert "rollout.samples: 8 -> 4" in message
    assert "another --run directory" in message
