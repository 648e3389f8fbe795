"""Mutations of the method's formulas: each still finds its place, and one that no test notices is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.mutate_theory import MUTATIONS, ROOT, Mutation, report

SUM = Mutation("a difference, not a sum", "pipeline/total.py", "a + b", "a - b")
SAME = Mutation("the other way round", "pipeline/total.py", "a + b", "b + a")
BROKEN = Mutation("no Python", "pipeline/total.py", "a + b", "a +")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_changes_one_place_of_the_code_as_it_is(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    compile(mutation.of(text), mutation.file, "exec")


def test_no_two_mutations_have_a_name_in_common() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one formula and one test of it."""
    for folder in ("pipeline", "retriever_service", "tests/theory"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (tmp_path / "pipeline/total.py").write_text("def total(a, b):\n    return a + b\n")
    (tmp_path / "tests/theory/test_total.py").write_text(
        "from pipeline.total import total\n\ndef test_a_total_is_a_sum():\n    assert total(1, 2) == 3\n"
    )
    return tmp_path


def test_a_mutation_is_shown_with_the_tests_that_fail_under_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([SUM], project) == 0
    assert "| a difference, not a sum | test_a_total_is_a_sum |" in capsys.readouterr().out
    assert "a + b" in (project / "pipeline/total.py").read_text()


def test_a_mutation_that_no_test_notices_is_named_and_is_a_failure(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([SUM, SAME], project) == 1
    shown = capsys.readouterr()
    assert "| the other way round | **none** |" in shown.out
    assert shown.err == "no test fails under: the other way round\n"


def test_code_that_does_not_run_is_no_proof(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report([BROKEN], project)
    assert "SyntaxError" in capsys.readouterr().err


def test_tests_that_fail_anyway_prove_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "pipeline/total.py").write_text("def total(a, b):\n    return a + b + 1\n")
    assert report([SUM], project) == 2
    assert "fails without any mutation: test_a_total_is_a_sum" in capsys.readouterr().err
