"""The GPU check runs part by part on a CPU too, at a small size: the same code, the device by argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import models
from bench.gpu.rows import Row, at_least, at_most


def test_the_parts_are_listed_with_what_they_do() -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--list"], capture_output=True, text=True, check=True
    ).stdout

    assert [line.split()[0] for line in listing.splitlines()] == list(gpu.PARTS)


def test_without_a_gpu_the_check_says_so_and_touches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--device", "cuda", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )

    assert done.returncode == 2
    assert "no GPU" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["limits", "attention"])
def test_a_part_gives_figures_within_their_bounds(part: str, tmp_path: Path) -> None:
    assert gpu.check([part], "cpu", tmp_path) == 0

    found = json.loads((tmp_path / "gpu.json").read_text())["parts"][part]
    assert found["rows"] and not found["error"]


@pytest.mark.parametrize(
    "part",
    [
        *(
            pytest.param(part, marks=[pytest.mark.component, pytest.mark.chaos])
            for part in ("learner", "encoder", "engine", "large", "zero", "push", "sleep", "generation")
        ),
        pytest.param("em", marks=[pytest.mark.system, pytest.mark.chaos]),
    ],
)
def test_a_part_with_real_engines_and_learners_gives_figures_within_their_bounds(
    part: str, tmp_path: Path
) -> None:
    assert gpu.check([part], "cpu", tmp_path) == 0, (tmp_path / f"{part}.log").read_text()[-3000:]


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "fails": gpu.Part("limits:no_such_function", "", 60),
        "hangs": gpu.Part("limits:run", "", 0),
        "limits": gpu.PARTS["limits"],
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    run_part = gpu.run_part

    assert gpu.check(["hangs"], "cpu", tmp_path) == 1
    monkeypatch.setattr(
        gpu, "run_part", lambda name, *a: ([], "boom") if name == "fails" else run_part(name, *a)
    )
    assert gpu.check(["fails", "limits"], "cpu", tmp_path) == 1

    results = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert results["fails"]["error"] == "boom" and results["limits"]["rows"]
    assert "FAILED" in capsys.readouterr().out


def test_bounds_decide_and_are_shown() -> None:
    assert at_most("a", 2.0, "s", 1.0).cells() == ["a", "2 s", "<= 1", "FAILED"]
    assert at_least("a", 2.0, "s", 1.0).cells() == ["a", "2 s", ">= 1", "ok"]
    assert Row("a", 2.0, "s").cells()[-1] == ""


def test_the_shapes_have_about_the_parameters_of_their_names() -> None:
    assert models.all_parameters("0.6b") == pytest.approx(0.596e9, rel=0.01)
    assert models.all_parameters("7b") == pytest.approx(8.19e9, rel=0.01)


def test_training_flops_are_six_per_parameter_and_token_and_attention_over_own_length() -> None:
    examples = models.random_examples("tiny", count=2, shortest=64, longest=64, trained_share=1.0)
    tokens, trained = 128, 2 * 63
    matrices = 6 * (models.linear_parameters("tiny") * tokens + 512 * 128 * trained)
    # Scores and sums: 2 products of 2 FLOPs over half of the square, forward; twice that backward.
    attention = 3 * 2 * (2 * 128 * 64 * 64) * 2 / 2 * 2

    assert models.training_flops("tiny", examples, frozen_base=False) == matrices + attention
