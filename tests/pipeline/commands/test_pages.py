"""Every command and every block of Python of README.md and docs/: run here, or else parsed by the program that it
calls and listed with the reason why it is not run.

What is run, is run in this process, page by page in the order of the page, in a folder with small files under the names
that the pages use, with a hashing encoder and without Ray. A new command on a page is run from then on, unless it
fits a line of ONLY_PARSED.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import faiss
import numpy as np
import pytest
from transformers import Qwen2Config

from pipeline.core.config import RetrieverConfig
from pipeline.core.display import Display
from pipeline.core.retrieval import await_servers
from retriever_service.building.importing import import_index
from retriever_service.encoding.encode import encode_corpus
from retriever_service.encoding.encoder import EncoderSpec
from retriever_service.passages.corpus import read_corpus
from retriever_service.service.client import RetrieverHttpClient
from tests.pipeline.core.data.fetch import layouts
from tests.pipeline.core.plan.shapes import QWEN_7B
from tests.pipeline.run_support import finished_run
from tests.retriever_service.scripted_server import ScriptedServer
from tests.retriever_service.support import HashEncoder, load_hash_encoder, write_jsonl
from tests.shown import OF_OTHERS, PAGES, ROOT, blocks, check, commands_in, each_page, parsed, saved_files

ONLY_PARSED = {
    r"exsearch (train|demo|ask|serve)\b|python -m pipeline\.cli train\b|exsearch evaluate --run": (
        "an engine, minutes: tests/system, tests/pipeline/serve"
    ),
    r"exsearch experiment (?!.*--(dry-run|table))": "makes many runs: tests/pipeline/commands/test_experiment.py",
    r"exsearch view (?!.*--export)": "serves until Ctrl-C: tests/pipeline/view",
    r"exsearch index serve\b": "serves until SIGTERM: tests/retriever_service/service",
    r"python my_retriever\.py\b": "serves until it is ended: the test of servers below",
    r"exsearch data fetch (?!.*--from)|exsearch export .*--push": "the network",
    r"exsearch status s3:": "a store: tests/system/test_storage.py",
    r"exsearch .*(\bDIR\b|/data\b)|exsearch index evaluate --index scifact": "data sets that are not here",
    r"make ": "sets up, or takes minutes to hours; the command of its recipe is parsed as well",
    r"python -m bench|python scripts/": "measures or trains for minutes to hours: tests/bench, tests/scripts",
    r"python -m pytest ": "a test",
    rf"({'|'.join(OF_OTHERS)}) |deploy/|\.venv/bin/python -m pip ": "not a program of ours",
}
"""Beginnings of commands, as regular expressions."""

PYTHON_ELSEWHERE = {
    "actions.md": "tests/pipeline/core/agents/test_actions.py",
    "own-retriever.md": "the test of servers below",
    "recipes.md": "tests/system/test_recipes.py",
    "retriever.md": "the test of servers below",
    "rewards.md": "tests/pipeline/core/test_rewards.py",
    "serve.md": "an engine: tests/pipeline/serve",
}
"""Blocks of the other pages are run here."""

TAKE_LONG = ("experiments.md", "mair.md", "retriever.md")
"""Pages whose commands take more than a few seconds."""

SMALLER = {"IVF4096,SQ8": "IVF4,SQ8", "nprobe=64": "nprobe=2", "21000000": "21000", "cuda": "cpu"}
"""Words that are too large for a test, and what is given in their place."""

ROWS = [{"id": f"p{n}", "title": f"Harp {n}", "text": f"Harp {n} was made in {n % 40}."} for n in range(300)]


def text_of(words: Sequence[str]) -> str:
    return shlex.join(words).replace("'", "")


def why_only_parsed(words: Sequence[str]) -> str | None:
    return next((why for pattern, why in ONLY_PARSED.items() if re.match(pattern, text_of(words))), None)


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "bash"):
        yield from commands_in(block)


# ---------------------------------------------------------------- the folder


def write_faiss_index(path: Path) -> None:
    vectors = np.concatenate(
        list(HashEncoder(EncoderSpec("minilm")).encode_passages(read_corpus(["corpus.jsonl"])))
    )
    index = faiss.index_factory(vectors.shape[1], "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    path.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path))


def prepare_retriever() -> None:
    write_faiss_index(Path("e5_Flat.index"))
    write_faiss_index(Path("indexes/e5_IVF4096_SQ8.index"))
    write_faiss_index(Path("indexes/faiss-flat.wiki/index"))
    Path("indexes/faiss-flat.wiki/docid").write_text("".join(f"{row['id']}\n" for row in ROWS))
    for name in ("small.jsonl", "wiki.jsonl", "wiki-18.jsonl"):
        write_jsonl(Path(name), ROWS)
    write_jsonl(Path("new.jsonl"), [{"id": "new", "title": "Lyre", "text": "A lyre."}])
    write_jsonl(Path("queries.jsonl"), [{"id": "q1", "question": "Harp 7"}])
    Path("qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp7\t1\n")


def prepare_data() -> None:
    for name, write in (("hotpot", layouts.hotpot_originals), ("musique", layouts.musique_originals)):
        folder = Path("downloads") / name
        folder.mkdir(parents=True)
        write(folder)
    write_jsonl(Path("wiki.jsonl"), ROWS)
    write_jsonl(Path("questions.jsonl"), [{"id": f"q{n}"} for n in range(250)])


def prepare_evaluation() -> None:
    Path("downloads").mkdir()
    layouts.hotpot_originals(Path("downloads"))
    Path("downloads/hotpot_dev_distractor_v1.json").rename("hotpot_dev_distractor_v1.json")
    Path("scores.predictions.json").write_text(json.dumps({"answer": {"5a3": "Ada 3"}, "sp": {}}))


def prepare_experiments() -> None:
    """The numbers of its runs, as they are published."""
    shutil.copytree(ROOT / "docs" / "figures", "docs/figures")
    shutil.copy(ROOT / "docs" / "results.md", "docs")


def prepare_tasks() -> None:
    write_jsonl(Path("queries.jsonl"), [{"_id": "q1", "text": "Harp 7"}, {"_id": "q2", "text": "Harp 8"}])
    Path("qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp7\t1\nq2\tp8\t2\n")


PREPARE: dict[str, Callable[[], None]] = {
    "mair.md": prepare_tasks,
    "retriever.md": prepare_retriever,
    "data.md": prepare_data,
    "evaluation.md": prepare_evaluation,
    "experiments.md": prepare_experiments,
}


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader of a page: shipped files, and what pages have told to save."""
    write_jsonl(folder / "corpus.jsonl", ROWS)
    (folder / "manuals").mkdir()
    (folder / "manuals/harps.md").write_text("# Harps\n\nThe Silver Harp is made by Orvane.\n")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "models").mkdir()
    (folder / "models/tiny-searcher").symlink_to(ROOT / "models/tiny-searcher")
    Qwen2Config(**QWEN_7B).save_pretrained(folder / "qwen")
    for name, text in saved_files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, function in (("encoding.encode", encode_corpus), ("building.importing", import_index)):
        with_hashes: Any = partial(function, load_encoder=load_hash_encoder)
        monkeypatch.setattr(f"retriever_service.{name}.{function.__name__}", with_hashes)
    return folder


def prepare_runs(words: Sequence[str]) -> None:
    """The runs that a command looks at, as far as there are none yet."""
    given = parsed(words).parameters
    named = [given.get("run"), given.get("run_a"), given.get("run_b"), *(given.get("runs") or [])]
    for path in (Path(name) for name in named if name is not None):
        if not path.exists():
            finished_run(path, Path("model"))


def smaller(words: Sequence[str]) -> list[str]:
    """A command with words that fit a test, and with a model that is there."""
    found = [SMALLER.get(word, re.sub("^/(shared|elsewhere)/", r"\1/", word)) for word in words]
    if found[1:2] == ["plan"]:
        return [*found, f"model.path={'qwen' if '--gpus' in found else 'models/tiny-searcher'}"]
    if found[1:3] == ["benchmark", "constraints"]:
        return [*found, "constraints.questions=3", "bootstrap_samples=10"]
    if found[1:2] == ["cold-start"]:
        return [*found, "model.path=models/tiny-searcher", "agent.layout=plain"]
    return found


def test_there_are_no_reasons_without_a_command() -> None:
    texts = [text_of(words) for page in PAGES for words in commands(page)]
    assert [p for p in ONLY_PARSED if not any(re.match(p, text) for text in texts)] == []
    assert [name for name in PYTHON_ELSEWHERE if not blocks(ROOT / "docs" / name, "python")] == []


@each_page
def test_every_command_is_what_its_program_takes(page: Path, place: Path) -> None:
    for words in commands(page):
        check(words)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.component] * (page.name in TAKE_LONG), id=page.name)
        for page in PAGES
    ],
)
def test_every_command_that_needs_no_engine_does_what_it_should(
    page: Path, place: Path, run_command: Any
) -> None:
    PREPARE.get(page.name, lambda: None)()
    for words in commands(page):
        if why_only_parsed(words) is not None:
            continue
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
            continue
        assert words[0] == "exsearch", (
            f"{page.name}: {text_of(words)} is neither run nor listed in ONLY_PARSED"
        )
        prepare_runs(given := smaller(words)[1:])
        result = run_command(*given)
        assert result.exit_code == 0, f"{text_of(words)}\n{result.output}\n{result.exception!r}"


@each_page
def test_python_that_is_shown_can_be_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page, "python")
    for number, block in enumerate(found):
        compile(dedent(block), f"{page.name}, block {number}", "exec")
    if page.name in PYTHON_ELSEWHERE or not found:
        return
    PREPARE.get(page.name, lambda: None)()
    finished_run(Path("runs/demo"), Path("model"))
    world = Path("tutorial/world")
    world.mkdir()
    for name in ("corpus", "train", "dev", "test"):
        shutil.copy(f"{name}.jsonl", world)
    for number, block in enumerate(found):
        file = Path(f"block-{number}.py")
        file.write_text(block, encoding="utf-8")
        runpy.run_path(str(file), run_name="__main__")


# ---------------------------------------------------------------- servers


def client_of(page: str, url: str, query: str) -> str:
    """The block of the page that asks a server, with another address and query."""
    (block,) = [text for text in blocks(ROOT / "docs" / page, "python") if "RetrieverHttpClient(" in text]
    return block.replace("http://127.0.0.1:8000", url).replace("maker of the Silver Harp", query)


def test_the_server_of_the_page_is_searched_by_the_client_of_the_page(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(place / "few.jsonl", [*ROWS[:3], {"id": "lyre", "title": "Lyre", "text": "Made by Orvane."}])
    server = subprocess.Popen(
        [sys.executable, "my_retriever.py", "few.jsonl", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        exec(client_of("own-retriever.md", url, "Who made the lyre?"), {})
        assert capsys.readouterr().out.splitlines()[0].split()[1:] == ["lyre", "Lyre"]
        client = RetrieverHttpClient(url, "search-r1")
        both = client.search(["harp 1", "nothing like it"], k=2)
        assert [[hit.passage.id for hit in hits] for hits in both] == [["p1", "p0"], []]
        servers = await_servers(
            RetrieverConfig(url=(url,), dialect="search-r1"), Display(), documents=3, timeout_s=60
        )
        assert servers is not None and len(servers.clients) == 1
    finally:
        server.kill()
        server.wait()


def test_our_server_is_searched_by_the_client_of_its_page() -> None:
    server = ScriptedServer()
    try:
        found: dict[str, Any] = {}
        exec(client_of("retriever.md", server.url, "lion"), found)
        assert found["hits"][0].passage.title == "Lion"
    finally:
        server.close()


# ---------------------------------------------------------------- what would be noticed


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("exsearch train --no-such-option", "No such option"),
        ("exsearch index search --index small", "Missing argument"),
        ("exsearch plan --gpus many", "valid integer"),
        ("exsearch train em.iteration=2", "did you mean em.iterations"),
        ("exsearch train em.iterations=some", "em.iterations"),
        ("exsearch config --config nowhere.yaml", "no configuration file nowhere.yaml"),
        ("exsearch experiment nothing", "nothing"),
        ("kubectl exec POD -- exsearch stat runs/mine", "No such command"),
        ("sbatch deploy/slurm/exsearch.sbatch trian", "No such command"),
        ("make demonstration", "No rule"),
        ("make demo SPEED=2", "does not look at SPEED"),
        ("make bench ARGS=--no-such-option", "2"),
        ("python -m bench.estep --questions few", "2"),
        ("python -m bench.encode now", "takes no arguments"),
        ("python scripts/mutate_theory.py --every", "2"),
        ("python nowhere.py corpus.jsonl", "no page saves nowhere.py"),
        ("serach", "what is serach"),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_wrong_command_would_be_noticed(command: str, why: str) -> None:
    *_, words = commands_in(command)
    with pytest.raises((Exception, SystemExit)) as raised:
        check(words)
    error: Any = raised.value
    assert why in (error.format_message() if hasattr(error, "format_message") else str(error))
