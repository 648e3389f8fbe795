"""What a person sees of `make setup` while pip works."""

from __future__ import annotations

from scripts.setup_steps import Steps

PIP = """\
Looking in indexes: https://pypi.org/simple, https://download.pytorch.org/whl/cpu
Collecting torch==2.13.0
  Downloading https://download.pytorch.org/whl/cpu/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (190.3 MB)
Collecting typer==0.15.1
  Obtaining dependency information for typer==0.15.1
  Downloading typer-0.15.1-py3-none-any.whl.metadata (15 kB)
Processing /wheels/torch_extra-1.0%2Bcpu-py3-none-any.whl
Requirement already satisfied: rich==13.9 in ./.venv/lib/python3.11/site-packages (13.9)
"""


def test_large_downloads_are_named_and_how_far_it_is_is_said_now_and_then() -> None:
    said: list[str] = []
    steps = Steps(said.append, lambda: 1)
    steps.tell(15.0)
    assert said == [], "nothing is known yet"
    lines = PIP.splitlines(keepends=True)
    for line in lines[:-1]:
        steps.saw(line)
    steps.tell(30.0)
    steps.saw(lines[-1])
    steps.tell(45.1)
    steps.saw("Installing collected packages: typer, torch\n")
    steps.tell(60.0)
    assert said == [
        "  downloading torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl (190.3 MB)",
        "  3 looked at after 30 s, now torch_extra-1.0+cpu-py3-none-any.whl",
        "  4 looked at after 45 s, now rich==13.9",
        "  all are here; installing 2",
        "  1 of 2 installed after 60 s",
    ]
