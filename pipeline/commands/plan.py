"""What a run will need, in tables. Nothing is started."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.planning import plan_run
from pipeline import methods
from pipeline.core.config import Config
from pipeline.core.errors import UserError
from pipeline.core.packages import has_gpu_packages
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.machine import Nodes, core_tflops, this_machine
from pipeline.core.plan.memory import PLACES, Memory, Where, gib, number_format
from pipeline.core.plan.needs import PolicyNeeds
from pipeline.core.plan.observed import fill, observe
from pipeline.core.plan.run_plan import RunPlan
from pipeline.core.plan.shape import UnknownShape, read_model_config


def make_plan(config: Config, nodes: Nodes | None, assumptions: Assumptions) -> RunPlan:
    """The plan of a run.

    Args:
        nodes: machines with GPUs, which need not be there; None: this machine, with the packages that are installed.

    Raises:
        UserError: too few devices, a model's configuration that cannot be read, or a question file that is wrong.
    """
    policies = methods.policies(config)
    # Without it there is no plan. Looked at first: its tokenizer, which questions are counted with, is out of reach for
    # the same reason, and would be warned of before.
    for path in dict.fromkeys(spec.model.path for spec in policies if spec.head != "embedding"):
        read_model_config(path)
    here = nodes is None
    found: dict[str, float] = {}
    if here and not any(node.gpus for node in this_machine()) and assumptions.peak_tflops is None:
        found["peak_tflops"] = core_tflops(number_format(config.learner.dtype, "cpu"))
    try:
        return plan_run(
            config,
            policies,
            nodes or this_machine(),
            fill(observe(config, assumptions), found),
            gpu_packages=has_gpu_packages() if here else True,
        )
    except UnknownShape:
        raise
    except UserError as error:
        where = "; to plan for other machines than this one, name their --gpus" if here else ""
        raise UserError(f"{error}{where}") from error


def print_plan(plan: RunPlan, console: Console) -> None:
    """Everything for a person."""
    _placement(plan, console)
    for policy in plan.policies:
        _memory(policy, console)
    _machines(plan, console)
    _work(plan, console)
    disk = plan.disk
    lines = [
        f"disk: {disk.models} models of {gib(disk.export)}, {disk.states} checkpoints of {gib(disk.checkpoint)} at a "
        f"time, trajectories up to {gib(disk.shards)}; in all up to {gib(disk.whole_run)}",
        *(
            f"push of {policy.name}: {gib(policy.push_bytes)} to each engine ({policy.engines}) by {policy.transport}"
            for policy in plan.policies
            if policy.push_bytes
        ),
        f"a trajectory is taken to have {plan.trajectory.total:,.0f} tokens, {plan.trajectory.written:,.0f} of them "
        "the model's own",
        "assumed (--assume KEY=VALUE): "
        + ", ".join(f"{name} {value:g}" for name, value in plan.assumptions.model_dump().items()),
        *(f"warning: {line}" for line in plan.warnings()),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _placement(plan: RunPlan, console: Console) -> None:
    layout = plan.layout
    turns = " and take turns with their memory" if layout.take_turns else ""
    how = f"share {layout.device.upper()}s{turns}" if layout.shared else "have GPUs of their own"
    table = _table(f"placement: engines and learner ranks {how}", ("node", "has", "engines", "ranks"))
    for number, (node, tenants) in enumerate(zip(plan.nodes, layout.nodes, strict=True)):
        has = f"{node.gpus} GPUs of {gib(node.gpu_memory)}" if layout.device == "gpu" else f"{node.cpus} CPUs"
        cells = [
            ", ".join(f"{tenant.policy} {tenant.number}" for tenant in tenants if tenant.kind == kind)
            for kind in ("engine", "rank")
        ]
        table.add_row(str(number), has, *map(escape, cells))
    console.print(table)


def _memory(policy: PolicyNeeds, console: Console) -> None:
    size = f"{policy.shape.parameters / 1e6:,.1f} million parameters"
    table = _table(
        f"{policy.name}: {policy.model}, {size}; memory at the peak", ("of", "part", "where", "size")
    )
    if policy.engine is not None:
        whose = "an engine" if policy.tensor_parallel == 1 else "a GPU of an engine"
        _add(table, whose, policy.engine.memory)
        cache = policy.engine.cache
        table.caption = (
            f"KV cache: {cache.tokens:,} tokens, {cache.tokens // max(1, policy.concurrency):,} for each of "
            f"{policy.concurrency} agents"
        )
    if policy.rank is not None:
        _add(table, "a rank", policy.rank)
    console.print(table)


def _add(table: Table, who: str, held: Memory) -> None:
    for number, part in enumerate(held.components):
        table.add_row(who if number == 0 else "", part.name, part.where, gib(part.bytes))
    places: list[Where] = [where for where in PLACES if held.on(where)]
    for where in places:
        table.add_row("", "together", where, gib(held.on(where)), end_section=where == places[-1])


def _machines(plan: RunPlan, console: Console) -> None:
    table = _table("fullest devices", ("what", "holds", "has"))
    for use in plan.gpus():
        table.add_row(escape(use.what), gib(use.bytes), gib(plan.nodes[0].gpu_memory))
    for use, node in zip(plan.hosts(), plan.nodes, strict=True):
        table.add_row(use.what, gib(use.bytes), gib(node.memory) if node.memory else "not known")
    console.print(table)


def _work(plan: RunPlan, console: Console) -> None:
    if not plan.phases:
        console.print("tokens and time are estimated for the recipe exsearch only", highlight=False)
        return
    table = _table(f"work, about {_time(plan.seconds())} in all", ("phase", "times", "tokens", "time of one"))
    for phase in plan.phases:
        table.add_row(phase.name, str(phase.times), f"{phase.tokens:,.0f}", _time(phase.seconds))
    console.print(table)
    console.print(
        "The time is a guess, and rather too long: copies of a trajectory are trained as one, those without weight not "
        "at all. Other work on the same devices comes on top.",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("size", "holds", "times", "tokens") else "left"
        )
    return table


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds >= 1 else f"{seconds:.1f} s"
