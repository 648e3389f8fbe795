"""What README and docs/ say exists: links, files, commands, options, configuration keys, shapes of files."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from pipeline.cli import app
from pipeline.commands.plan import make_plan
from pipeline.core.benchmarks.spec import read_benchmark
from pipeline.core.config import Config, RetrieverConfig
from pipeline.core.config.loading import all_keys, load_config
from pipeline.core.evaluation import evaluate
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.machine import gpu_nodes
from pipeline.core.question_scores import SCORE_SCHEMA
from pipeline.core.record_tables import EXAMPLE_SCHEMA, TRAJECTORY_SCHEMA
from pipeline.core.records import Question, StopReason
from pipeline.core.run import RunDirectory
from pipeline.core.status import run_status
from pipeline.core.weighting import WeightingSummary
from pipeline.em_report import em_report
from pipeline.methods import load
from retriever_service.index.store import Manifest
from scripts.generate_configuration_docs import PAGE, render
from tests.shown import ROOT, each_page, parsed

CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "methods").glob("*.yaml")])
GPU_CONFIGS = sorted((ROOT / "configs").glob("*gpu.yaml"))


def test_the_configuration_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python scripts/generate_configuration_docs.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.name)
def test_a_configuration_for_gpus_names_its_index_and_the_command_that_builds_it(path: Path) -> None:
    text = re.sub(r"\\\n *#", "", path.read_text(encoding="utf-8"))
    (command,) = re.findall(r"# +exsearch (index build .*)", text)
    given, config = parsed(shlex.split(command)).parameters, load(path)
    assert (str(given["out"]), given["encoder"]) == (config.retriever.index, config.retriever.encoder)
    assert tuple(given["corpus"]) == config.data.corpus
    assert config.retriever.factory == RetrieverConfig().factory  # that of the index is in the command


def test_the_demo_is_described_as_it_is_configured() -> None:
    demo = load_config(ROOT / "configs" / "demo.yaml")
    readme, quickstart = (
        " ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/quickstart.md")
    )
    assert f"{demo.em.iterations} EM iterations on {demo.data.train_limit} of the questions" in readme
    assert f"with {demo.rollout.samples} trajectories per question" in readme
    assert f"{demo.cold_start.questions} trajectories are synthesised" in quickstart
    assert (
        f"{demo.em.iterations} iterations: sample and weight {demo.rollout.samples} trajectories"
        in quickstart
    )
    assert f"for each of {demo.data.train_limit} questions" in quickstart


@each_page
def test_pages_are_plain_ascii(page: Path) -> None:
    assert page.read_text(encoding="utf-8").isascii()


@each_page
def test_relative_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target, _, anchor in (link.partition("#") for link in relative_links(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(file), f"{page.name}: {target}#{anchor}"


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "actors|bench|configs|deploy|docs|models|pipeline|retriever_service|scripts|tests"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_configuration_keys_that_are_named_exist(page: Path) -> None:
    sections = "|".join(Config.model_fields)
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:=[^`]*|: [^`]*)?`", page.read_text(encoding="utf-8"))
    keys = [
        name for name in named if Path(name).suffix not in (".json", ".jsonl", ".py", ".yaml", ".parquet")
    ]
    known = all_keys(Config)
    assert [key for key in keys if not any(k == key or k.startswith(f"{key}.") for k in known)] == []


@each_page
def test_configurations_that_are_shown_load(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        if "tasks" in yaml.safe_load(block):
            read_benchmark(path)
        else:
            load_config(path)


@each_page
def test_commands_that_are_named_exist_with_their_options(page: Path) -> None:
    """Those of a line of text may be a part only; those of blocks are parsed, and run: commands/test_pages.py."""
    for words in named_commands(page):
        check_command(words, where=page.name)


@each_page
def test_make_targets_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    if named:
        targets = set(
            re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        )
        assert named <= targets


def test_the_documented_columns_are_those_of_the_shards() -> None:
    assert documented_rows("trajectory-columns") == TRAJECTORY_SCHEMA.names
    assert documented_rows("example-columns") == EXAMPLE_SCHEMA.names
    assert documented_rows("scores-by-question") == SCORE_SCHEMA.names


def test_the_documented_report_has_the_shape_of_a_real_one(tmp_path: Path) -> None:
    documented = documented_json("reportjson")
    (row,) = documented["iterations"]
    config = load_config(ROOT / "configs" / "demo.yaml")
    run = RunDirectory(tmp_path / "demo", config)
    steps = {
        "sample": row["train"],
        "searcher/train": row["learner"],
        "evaluation": {"scores": row["dev"]},
    }
    for number in (0, 1):
        for step, result in steps.items():
            run.once(f"{number}/{step}", partial(dict, result))
    run.once("test/best", partial(dict, documented["test"]["best"]))
    report = em_report(run, config)
    assert report.keys() == documented.keys()
    assert report["iterations"][0].keys() == row.keys()
    assert report["cold_start"].keys() == documented["cold_start"].keys()


def test_the_documented_scores_and_statistics_are_those_that_are_computed() -> None:
    documented = documented_json("reportjson")
    question = Question("q", "?", ("a",), type="bridge", hops=2, supporting_ids=("p",))
    (row,) = documented["iterations"]
    scores = evaluate([question], [], bootstrap_samples=2)
    assert keys_of(scores) == keys_of(row["dev"])
    assert scores.keys() | {"iteration", "seconds"} == documented["test"]["best"].keys()
    assert {field.name for field in fields(WeightingSummary)} < row["train"].keys()
    assert set(row["train"]["stop_reasons"]) == {reason.value for reason in StopReason}


def test_the_documented_status_is_that_of_a_run(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", load_config(ROOT / "configs" / "demo.yaml"))
    documented, found = documented_json("output-for-programs"), run_status(tmp_path / "run")
    assert list(found) == list(documented)
    for part in ("process", "iterations", "rates", "failures"):
        assert list(found[part]) == list(documented[part])


def test_the_documented_plan_is_that_of_a_run() -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", [f"model.path={ROOT / 'models' / 'tiny-searcher'}"])
    documented = re.search(
        r"`exsearch plan --json`.*?\n\n(.*?)\n\n", section("output-for-programs"), re.DOTALL
    )
    assert documented is not None
    made = make_plan(config, gpu_nodes(1, 2, 79.6, None), Assumptions())
    told = json.dumps(made.as_json())
    assert all(f'"{name}"' in told for name in re.findall(r'"(\w+)"', documented[1]))
    assert all(f'"{name}"' in documented[1] for name in made.as_json())


def test_the_documented_manifest_is_that_of_an_index() -> None:
    assert documented_json("index-directory").keys() == {field.name for field in fields(Manifest)}


# ---------------------------------------------------------------- reading the pages


def relative_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {anchor(title) for title in titles}


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def named_commands(page: Path) -> Iterator[list[str]]:
    """Words behind `exsearch` in a line of text, and as servers of tools in JSON."""
    text = page.read_text(encoding="utf-8")
    for words in re.findall(r"`exsearch ([^`\n]+)`", text):
        yield shlex.split(words, comments=True)
    for block in re.findall(r"```json\n(\{\"mcpServers\".*?)```", text, re.DOTALL):
        for server in json.loads(block)["mcpServers"].values():
            assert server["command"] == "exsearch", f"{page.name}: {server}"
            yield server["args"]


def check_command(words: list[str], where: str) -> None:
    command = typer.main.get_command(app)
    rest = list(words)
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{where}: no command {rest[0]} in {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    for previous, word in zip(["", *rest], rest, strict=False):
        if previous.startswith("-"):
            continue  # the option's value
        if word.startswith("-"):
            assert word in options, f"{where}: no option {word} in {' '.join(words)}"
        elif command.name != "benchmark" and (override := re.match(r"([a-z_]+(?:\.[a-z_]+)*)=", word)):
            known = {*all_keys(Config), *Config.model_fields}
            assert override[1] in known, f"{where}: no key {override[1]} in {' '.join(words)}"


def section(title_anchor: str) -> str:
    """Text of a section of docs/formats.md, up to the next heading."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return next(
        body for title, body in zip(parts[1::2], parts[2::2], strict=True) if anchor(title) == title_anchor
    )


def documented_rows(title_anchor: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", section(title_anchor), re.MULTILINE)


def documented_json(title_anchor: str) -> Any:
    block = re.search(r"```json\n(.*?)```", section(title_anchor), re.DOTALL)
    assert block is not None
    return json.loads(block[1])


def keys_of(scores: dict[str, Any]) -> set[str]:
    """Keys of scores, and of their break-down by hops (the groups themselves depend on the data)."""
    (group,) = scores["by_hops"].values()
    return {*scores, *(f"by_hops.{key}" for key in group)}
