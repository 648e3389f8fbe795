"""The command line: what is refused, with which words and exit code, and that nothing is touched by it.

Most commands run in this process, with a hashing encoder and without Ray; the tests marked `component` start it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.core.config import Config
from pipeline.core.config_loading import load_config
from pipeline.core.records import trajectories_from_table
from pipeline.core.report import exsearch_outcome
from pipeline.core.run import RunDirectory
from retriever_service.building.build import build_index
from retriever_service.encoding.encoder import EncoderSpec
from tests.retriever_service.fake_engine import ANIMALS
from tests.retriever_service.scripted_server import ScriptedServer
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def passage(number: int, **other: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "title": f"Maker {number}",
        "text": f"Maker {number} was founded by Ada.",
    } | other


def question(name: str) -> dict[str, Any]:
    hop = {
        "question": "Who founded Maker 1?",
        "answer": "Ada",
        "evidence": "Ada founded it.",
        "supporting_id": "p1",
    }
    return {"id": name, "question": f"Question {name}?", "answers": ["Ada"], "decomposition": [hop]}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user: data, a model and a configuration that go together."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "corpus.jsonl", [passage(i) for i in range(4)])
    for split in ("train", "dev", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [question(f"{split}{i}") for i in range(3)])
    model = tmp_path / "model"
    model.mkdir()
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    sections = {
        "model": {"path": "model"},
        "data": {"corpus": "corpus.jsonl", "train": "train.jsonl", "dev": "dev.jsonl"},
        "cold_start": {"questions": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path


@pytest.fixture
def run_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command; Ray and real encoders are out of reach."""

    def expensive(*_: object, **__: object) -> None:
        raise AssertionError("something expensive was started")

    monkeypatch.setattr("actors.cluster.ray.init", expensive)
    monkeypatch.setattr(
        "retriever_service.building.build.build_index", partial(build_index, load_encoder=load_hash_encoder)
    )
    monkeypatch.setattr(
        "pipeline.core.retrieval.build_index", partial(build_index, load_encoder=load_hash_encoder)
    )
    monkeypatch.setattr(
        "retriever_service.encoding.encoder.Encoder.load", lambda spec, device="cpu": HashEncoder(spec)
    )
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def refused(run_command: Any, folder: Path) -> Any:
    """Runs a command that must be refused with exit code 2 and leave everything as it was; gives the message."""

    def run(*arguments: object) -> str:
        before = contents(folder)
        result: Result = run_command(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert contents(folder) == before
        return result.stderr

    return run


TRAIN = ("train", "--config", "config.yaml", "--run", "run")
COLD_START = ("cold-start", "--config", "config.yaml", "--out", "cold_start.parquet")

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
    "not JSON": (["{"], r"train.jsonl:1: not JSON"),
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


@pytest.fixture
def index(folder: Path) -> Path:
    spec = EncoderSpec("minilm", query_prefix="")
    build_index([folder / "corpus.jsonl"], folder / "index", spec, load_encoder=load_hash_encoder)
    return folder / "index"


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
    message = refused(*command, NOBODY)
    assert "retriever.url: no answer from http://127.0.0.1:1" in message
    assert message.strip().count("\n") == 0


@pytest.mark.parametrize("command", [TRAIN, COLD_START, EVALUATE, ASK], ids=lambda command: command[0])
def test_settings_that_a_server_does_not_heed(refused: Any, command: tuple[str, ...]) -> None:
    assert "retriever.replicas=1" in refused(*command, NOBODY, "retriever.replicas=2")


def test_a_server_and_no_corpus_to_take_gold_passages_from(refused: Any) -> None:
    assert "set data.corpus" in refused(*TRAIN, NOBODY, "data.corpus=[]")


def test_a_question_for_a_server_and_an_index(refused: Any) -> None:
    assert "retriever.url=null" in refused(*ASK, NOBODY, "--index", "index")


def test_a_question_with_nothing_to_search(refused: Any) -> None:
    assert "give --index DIR, or retriever.url=ADDRESS" in refused(*ASK)


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


# ---------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "run", "--config", "config.yaml"), "give --run or --config, not both"),
        (("--run", "run"), "run is not a run directory"),
        (
            ("--config", "config.yaml", "--split", "validation"),
            "--split is validation; choose train, dev or test",
        ),
        (("--config", "config.yaml", "--split", "test"), "data.test is empty"),
        (("--config", "config.yaml"), "give --run, or retriever.index=DIR"),
        (("--config", "config.yaml", "--model", "./nothing"), "./nothing does not exist"),
    ],
)
def test_an_evaluation_that_cannot_be_done(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("evaluate", *arguments)


def test_an_evaluation_leaves_the_run_as_it_is(refused: Any, folder: Path) -> None:
    RunDirectory(folder / "run", load_config(folder / "config.yaml"))
    message = refused(
        "evaluate", "--run", "run", "--split", "test", "rollout.workers=2", "agent.max_searches=1"
    )
    assert "data.test is empty" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./nothing", "--index", "index"), "./nothing does not exist"),
        (("--model", "model", "--index", "model"), "model is not a built index"),
    ],
)
def test_a_question_that_cannot_be_asked(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("ask", "Who?", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--out", "world", "--size", "gigantic"),
            "size 'gigantic' is unknown; choose one of small, medium, large",
        ),
        (("--out", "model"), "model"),
        (("--out", "corpus.jsonl"), "corpus.jsonl is not a directory"),
    ],
)
def test_a_world_that_cannot_be_made(refused: Any, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("world", *arguments)


@pytest.mark.parametrize(
    "arguments", [("train", "--no-such-option"), ("no-such-command",), ("index", "search")]
)
def test_a_command_that_does_not_exist(refused: Any, arguments: tuple[str, ...]) -> None:
    assert "Usage" in refused(*arguments)


def test_the_resolved_configuration_is_printed(run_command: Any, folder: Path) -> None:
    arguments = ("config", "--config", "config.yaml", "weighting=uniform")
    expected = load_config(folder / "config.yaml", ["weighting=uniform"])
    assert Config.model_validate(yaml.safe_load(run_command(*arguments).stdout)) == expected
    assert Config.model_validate(json.loads(run_command(*arguments, "--json").stdout)) == expected


COMMANDS = [
    [],
    ["train"],
    ["demo"],
    ["world"],
    ["index"],
    ["index", "build"],
    ["index", "search"],
    ["cold-start"],
]


@pytest.mark.parametrize("command", [*COMMANDS, ["evaluate"], ["ask"], ["config"]], ids=" ".join)
def test_every_command_explains_itself(run_command: Any, command: list[str]) -> None:
    result = run_command(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


# ---------------------------------------------------------------- how a command ends

REPORT = {"run": "run", "iterations": [], "best_iteration": 0, "warm_up": None, "test": {}}


@pytest.mark.parametrize(("given", "path"), [(("--run", "a/b"), "a/b"), ((), "runs/config")])
def test_training_says_where_the_report_is(
    run_command: Any, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], path: str
) -> None:
    seen = []
    monkeypatch.setattr(
        "pipeline.em.train",
        lambda config, run, display: seen.append((config, run)) or exsearch_outcome(REPORT),
    )
    result = run_command("train", "--config", "config.yaml", *given, "seed=3")
    assert result.exit_code == 0, result.output
    assert f"report: {path}/report.json" in result.stderr
    ((config, run),) = seen
    assert (config.seed, run) == (3, Path(path))


def test_an_interrupted_command_says_how_to_go_on(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.em.train", interrupted)
    result = run_command(*TRAIN)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


def test_an_interrupted_question_promises_nothing(
    run_command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.commands.ask.ask", interrupted)
    result = run_command("ask", "--model", folder / "model", "--index", folder / "index", "who?")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr and "goes on" not in result.stderr


def test_a_failure_that_is_not_the_users_is_not_hidden(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipeline.em.train", broken)
    result = run_command(*TRAIN)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, in the checkout."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_exit_codes_of_real_processes(folder: Path) -> None:
    good = process("config", "--config", str(folder / "config.yaml"), "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["cold_start"]["questions"] == 2
    bad = process("config", "em.iteration=2")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == "error: unknown configuration key em.iteration; did you mean em.iterations?\n"


def test_a_real_process_refuses_a_bad_corpus(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text('{"id": "a", "text": "Fine."}\nnot json\n')
    corpus, out = folder / "corpus.jsonl", folder / "index"
    result = process("index", "build", "--corpus", str(corpus), "--out", str(out))
    assert result.returncode == 2
    assert f"error: {corpus}:2: not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


# ---------------------------------------------------------------- with Ray


@pytest.mark.component
def test_training_refuses_a_bad_corpus_before_anything_is_encoded(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("not json\n")
    overrides = (f"data.root={folder}", f"model.path={folder / 'model'}")
    run = folder / "run"
    result = process("train", "--config", str(folder / "config.yaml"), "--run", str(run), *overrides)
    assert result.returncode == 2, result.stderr
    assert "corpus.jsonl:1: not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "index").exists()


@pytest.mark.component
def test_training_refuses_more_ranks_than_the_machine_has(folder: Path, index: Path) -> None:
    overrides = (
        f"data.root={folder}",
        f"model.path={folder / 'model'}",
        f"retriever.index={index}",
        "learner.num_ranks=5000",
    )
    run = folder / "run"
    result = process("train", "--config", str(folder / "config.yaml"), "--run", str(run), *overrides)
    assert result.returncode == 2, result.stderr
    assert "learner.num_ranks is 5000, but the cluster has" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "iterations").exists()
