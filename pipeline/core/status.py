"""How a run stands, from its files alone: while it works, and after it has ended, however it did."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.core.config import EXSEARCH, section_of
from pipeline.core.config.loading import read_tree
from pipeline.core.display import LOG_FILE, STARTED
from pipeline.core.errors import UserError
from pipeline.core.mirror.restore import fetch_small_files
from pipeline.core.progress import PROGRESS_FILE, restarts_of
from pipeline.core.records import StopReason
from pipeline.core.report import EVALUATION, best_first
from pipeline.core.run import MIRROR_FILE, Json, RunFiles, is_worked_on, read_json

SHOWN_WARNINGS = 5
TELLING_SECONDS, TELLING_SHARE = 60.0, 0.1
"""How long a phase must have gone on, or how much of it, before its rate says how long the rest will take: what is done
first comes late and all at once."""


def status_of(run: str) -> Json:
    """`run_status` of a run directory, or of the copy of one at a URL (`storage.url`).

    Raises:
        UserError: no run is there, or one of an earlier version; the store is out of reach.
    """
    if "://" not in run:
        return run_status(Path(run))
    with tempfile.TemporaryDirectory() as folder:
        alive = fetch_small_files(run, Path(folder))
        return {**run_status(Path(folder), alive=alive), "run": run}


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The name of each directory, with as many of those above as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in runs) + 1):
        names = ["/".join(path.parts[-depth:]) for path in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(runs, start=1)]


def run_status(path: Path, *, alive: bool | None = None) -> Json:
    """What `exsearch status` knows; its keys are in docs/formats.md.

    Args:
        alive: whether a process works on it; None: its lock tells.

    Raises:
        UserError: no run directory, or one of an earlier version; one of its files is damaged.
    """
    try:
        return _status(path, alive)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: one of the files that say how it stands is damaged ({error!r:.200}); copy them back from where "
            "they are whole, or run the same command again"
        ) from error


def _status(path: Path, alive: bool | None) -> Json:
    run = RunFiles(path)
    run.check_is_run()
    stored = run.path / "config.yaml"
    config = read_tree(stored)
    recipe = str(config.get("recipe", EXSEARCH))
    settings = config.get(section_of(recipe))
    if not isinstance(settings, dict):
        raise UserError(
            f"{stored} has no settings of its recipe ({recipe}); copy it back from where it is whole"
        )
    process = read_json(run.path / PROGRESS_FILE) or {}
    alive = is_worked_on(run.path) if alive is None else alive
    iterations = _iterations(run)
    finished = run.finished_iterations()
    phase = _phase(process, alive)
    starts, warnings = _log(run.path / LOG_FILE)
    return {
        "run": str(run.path),
        "recipe": recipe,
        "state": _state(process, alive, begun=bool(iterations)),
        "reason": process.get("reason"),
        "process": {key: process.get(key) for key in ("pid", "host", "started", "updated")},
        "phase": phase,
        "iterations": {"finished": finished, "of": settings.get("iterations")},
        "seconds_left": _seconds_left(iterations, finished, settings.get("iterations"), phase),
        "steps": {
            f"{t}/{name}": step.get("seconds") for t in iterations for name, step in iterations[t].items()
        },
        "dev": _dev(iterations, settings.get("select_by", "em")),
        "rates": _rates(iterations),
        "failures": _failures(run, iterations),
        "restarts": restarts_of(process),
        "removed_models": run.removed_models(),
        "mirror": read_json(run.path / MIRROR_FILE),
        "starts": starts,
        "warnings": len(warnings),
        "last_warnings": warnings[-SHOWN_WARNINGS:],
    }


def _iterations(run: RunFiles) -> dict[int, dict[str, Json]]:
    """The finished steps of each iteration, in the order in which they were done."""
    numbers = sorted(int(path.name) for path in run.path.glob("iterations/[0-9]*"))
    found = {number: run.steps(number) for number in numbers}

    def finished_at(number: int, step: str) -> float:
        return run.at(f"{number}/{step}.json").stat().st_mtime

    return {
        number: dict(sorted(steps.items(), key=lambda item: finished_at(number, item[0])))
        for number, steps in found.items()
    }


def _dev(iterations: dict[int, dict[str, Json]], select_by: str) -> list[Json]:
    """The dev scores of each iteration that has them; the best one is that which the run would choose now."""
    scored = {
        t: steps[EVALUATION]["scores"]
        for t, steps in iterations.items()
        if "scores" in steps.get(EVALUATION, {})
    }
    best = next(iter(best_first({t: scores[select_by] for t, scores in scored.items()})), None)
    names = ["n", "em", "em_interval", "f1", "f1_interval", "accuracy"]
    if select_by not in names:
        names = ["n", select_by, f"{select_by}_interval"]
    return [
        {"iteration": t, **{name: scores.get(name) for name in names}, "is_best": t == best}
        for t, scores in scored.items()
    ]


def _state(process: Json, alive: bool | None, *, begun: bool) -> str:
    """The lock tells what a process that was killed could not. Without the file of its progress, of a run that was
    copied in parts, all that is known is whether it had begun."""
    told = str(process.get("state", "unknown" if begun else "not started"))
    if alive:
        return "running" if told in ("running", "unknown", "not started") else "starting"
    return "killed" if alive is False and told == "running" else told


def _phase(process: Json, alive: bool | None) -> Json | None:
    if (phase := process.get("phase")) is None:
        return None
    until = datetime.now(UTC) if alive else datetime.fromisoformat(process["updated"])
    seconds = (until - datetime.fromisoformat(phase["since"])).total_seconds()
    done, total = phase["done"], phase["total"]
    here = done - phase.get("begun_at", 0)  # of this process, whose seconds these are
    rate = here / seconds if here > 0 and seconds > 0 else None
    tells = seconds >= TELLING_SECONDS or (total and here >= TELLING_SHARE * total)
    left = (total - done) / rate if alive and rate and total and tells else None
    return {**phase, "seconds": seconds, "rate_per_s": rate, "seconds_left": left}


def _seconds_left(
    iterations: dict[int, dict[str, Json]], finished: int, total: int | None, phase: Json | None
) -> float | None:
    """Of the whole run, as far as iterations take as long as those before; None before the first has ended.

    Tests at the end are not in it, and the run may stop early (`patience`).
    """
    whole = [seconds_of(steps.values()) for t, steps in iterations.items() if 0 < t <= finished]
    if not whole or total is None or finished >= total:
        return None
    begun = seconds_of(iterations.get(finished + 1, {}).values()) + (phase["seconds"] if phase else 0.0)
    mean = sum(whole) / len(whole)
    return max(0.0, mean - begun) + (total - finished - 1) * mean


def seconds_of(steps: Iterable[Json]) -> float:
    """That the run took for them: of one that went on beside others, those in which it was waited for."""
    return sum(float(step.get("seconds_waited", step.get("seconds")) or 0.0) for step in steps)


def _rates(iterations: dict[int, dict[str, Json]]) -> Json:
    """Of the last steps that tell: tokens that were generated and tokens that were trained, per second."""
    rates: Json = {"generated_tokens_per_s": None, "trained_tokens_per_s": None}
    for steps in iterations.values():
        for step in steps.values():
            if step.get("generated_tokens") and step.get("seconds"):
                rates["generated_tokens_per_s"] = step["generated_tokens"] / step["seconds"]
            if step.get("trained_tokens_per_s"):
                rates["trained_tokens_per_s"] = step["trained_tokens_per_s"]
    return rates


def _failures(run: RunFiles, iterations: dict[int, dict[str, Json]]) -> Json:
    """Trajectories that were lost to infrastructure, and those that were excluded for any reason; of all samplings, and
    of the complete shards of one that is not finished."""
    samplings = [step for steps in iterations.values() for step in steps.values() if "stop_reasons" in step]
    begun = [
        _of_task(row) for t, steps in iterations.items() if "sample" not in steps for row in _tasks(run, t)
    ]
    lost = [reason.value for reason in StopReason if reason.is_infrastructure]
    counts = {name: sum(int(s["stop_reasons"].get(name, 0)) for s in (*samplings, *begun)) for name in lost}
    return counts | {"excluded": sum(int(s.get("excluded", 0)) for s in (*samplings, *begun))}


def _tasks(run: RunFiles, t: int) -> Iterator[Json]:
    """What the side-cars of the shards of a sampling say of each task (pipeline.core.shards)."""
    for path in sorted(run.at(f"{t}/rollouts").glob("_*.json")):
        yield from (read_json(path) or {}).get("tasks", [])


def _of_task(row: Json) -> Json:
    statistics = row["statistics"]
    left_out = sum(statistics.get(reason, 0) for reason in ("too_long_to_score", "nothing_to_compare"))
    excluded = row["infrastructure_failures"] + left_out
    return {"stop_reasons": statistics.get("stop_reasons", {}), "excluded": excluded}


def _log(path: Path) -> tuple[int, list[str]]:
    """How many processes have worked on the run, and the warnings and errors of all of them."""
    if not path.exists():
        return 0, []
    with path.open(encoding="utf-8", errors="replace") as lines:
        told = [line.rstrip("\n") for line in lines if re.match(r"\S+ \S+ (INFO|WARNING|ERROR) ", line)]
    warnings = [line for line in told if line.split(" ", 3)[2] != "INFO"]
    return sum(line.endswith(STARTED) for line in told), warnings
