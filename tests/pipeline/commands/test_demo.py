"""The demo fits itself to the machine."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from actors.placement import plan_placement
from pipeline.commands.demo import demo_config, run_demo
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.em import searcher_of


@pytest.mark.parametrize(
    ("resources", "size", "transport"),
    [
        ({"CPU": 1}, 1, "shared_memory"),
        ({"CPU": 2}, 2, "shared_memory"),
        ({"CPU": 64}, 2, "shared_memory"),
        ({"CPU": 8, "GPU": 1}, 1, "ipc"),
        ({"CPU": 8, "GPU": 2}, 2, "ipc"),
        ({"CPU": 64, "GPU": 8}, 2, "nccl"),
    ],
)
def test_engines_and_ranks_fit_what_the_machine_has(
    resources: dict[str, float], size: int, transport: str
) -> None:
    devices = int(resources.get("GPU") or resources["CPU"])

    config = demo_config(Path("world"), [], devices)

    assert (config.rollout.workers, config.learner.num_ranks) == (size, size)
    placement = plan_placement(
        [searcher_of(config)], config.cluster, config.retriever, resources, gpu_packages="GPU" in resources
    )
    assert placement.policies["searcher"].transport == transport


def test_a_directory_that_holds_something_else_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        run_demo(run, [], Display())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overrides_win() -> None:
    config = demo_config(Path("world"), ["learner.num_ranks=1", "model.path=mine"], devices=2)

    assert config.learner.num_ranks == 1
    assert config.model.path == "mine"


@pytest.mark.parametrize(
    ("overrides", "seed"), [([], 0), (["seed=3"], 0), (["data.seed=2"], 2), (["data.seed=2", "seed=3"], 2)]
)
def test_the_world_is_that_of_the_data_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], seed: int
) -> None:
    class WorldIsMade(Exception):
        pass

    made: list[int] = []

    def make_world(out: Path, seed: int, size: str, display: Display) -> None:
        made.append(seed)
        raise WorldIsMade

    for name, stand_in in {
        "make_world": make_world,
        "check_memory": lambda *_: None,
        "ray_session": lambda _, say: nullcontext(),
        "count_devices": lambda: 1,
    }.items():
        monkeypatch.setattr(f"pipeline.commands.demo.{name}", stand_in)
    with pytest.raises(WorldIsMade):
        run_demo(tmp_path / "run", overrides, Display())
    assert made == [seed]
