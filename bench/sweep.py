"""Benchmark: how the cost of a training step grows with its shapes, and device hours of the paper's runs (table 11).

    python -m bench.sweep --time-budget 480 --model vit_l --batch-size 24

Times the step that the flags describe, then steps that differ from it in model size, frames, resolution or batch size,
then the steps of the paper's runs. Whatever does not fit into --time-budget or memory is extrapolated by its FLOPs.
All flags of the training scripts apply.
"""

import argparse
import contextlib
import gc
import math
import time
from typing import NamedTuple

import torch

import cli
import flops
import training
from bench import step as bench_step
from bench.step import WARMUP_STEPS, Ours
from model import SIZES

PAPER_NUM_FRAMES = 16
PAPER_TEACHER = ("teacher", "vit_l", 224, 80_000)
PAPER_RUNS = [  # name, [(kind, size, resolution, steps), ...], hours of one A100 (paper table 11)
    ("V-JEPA 2 L", [("ema", "vit_l", 256, 240_000)], 9800),
    ("V-JEPA 2 H", [("ema", "vit_h", 256, 240_000)], 14377),
    ("V-JEPA 2 g", [("ema", "vit_g", 256, 240_000)], 18708),
    ("SALT L", [PAPER_TEACHER, ("student", "vit_l", 224, 160_000)], 8263),
    ("SALT H", [PAPER_TEACHER, ("student", "vit_h", 224, 160_000)], 9574),
    ("SALT g", [PAPER_TEACHER, ("student", "vit_g", 224, 160_000)], 10476),
    ("SALT G", [PAPER_TEACHER, ("student", "vit_G", 224, 160_000)], 12379),
]


class Cell(NamedTuple):
    """One kind of step and its shapes: what a row of the tables describes."""

    kind: str
    model: str
    num_frames: int
    resolution: int
    batch_size: int  # in one micro-batch
    teacher: str | None  # size of a student's teacher; None for the other kinds


class Cost(NamedTuple):
    """What a step costs."""

    flops: float
    seconds: float | None = None  # None: not measured
    memory: float | None = None  # bytes; None: not measured
    reason: str = ""  # why it was not measured


class TimeBudget:
    """Predicts whether there is time for another cell. peak: the most FLOP/s that the device can reach."""

    def __init__(self, seconds, peak):
        self.end, self.peak = time.perf_counter() + seconds, peak
        self.last_seconds, self.last_flops = 0.0, math.inf

    def allows(self, work):
        """Whether a cell with this many FLOPs probably finishes in time.

        It is expected to take as long as the last cell, including setup, and proportionally longer with more FLOPs.
        """
        expected = max(self.last_seconds * max(1.0, work / self.last_flops), work / self.peak)
        return time.perf_counter() + expected < self.end

    def record(self, seconds, work):
        """Remember how long a cell with this many FLOPs took."""
        self.last_seconds, self.last_flops = seconds, work


def growth_cells(args):
    """The cell that the flags describe, followed by those that differ from it in one respect."""
    teacher = None
    if args.kind == "student":
        teacher = args.teacher or args.model
    base = Cell(args.kind, args.model, args.num_frames, args.resolution, args.batch_size, teacher)
    larger = [math.floor(factor * base.resolution / args.patch_size) * args.patch_size for factor in (1.5, 2)]
    cells = [
        base,
        *(base._replace(model=size) for size in args.sizes),
        *(base._replace(num_frames=num_frames) for num_frames in (16, 32, 64)),
        *(base._replace(resolution=resolution) for resolution in larger),
        *(base._replace(batch_size=batch_size) for batch_size in (max(1, base.batch_size // 2), 2 * base.batch_size)),
    ]
    return list(dict.fromkeys(cells))


def paper_cell(stage, args):
    """The cell of one stage of the PAPER_RUNS, with this benchmark's batch size."""
    kind, model, resolution, _ = stage
    teacher = None
    if kind == "student":
        teacher = "vit_l"
    return Cell(kind, model, PAPER_NUM_FRAMES, resolution, args.batch_size, teacher)


def cell_args(cell, args):
    """A copy of the flags that describes this cell."""
    shapes = cell._asdict() | {"micro_batch_size": cell.batch_size}
    return argparse.Namespace(**(vars(args) | shapes))


def measure(cell, args, budget):
    """The `Cost` of a cell. Without seconds if the `TimeBudget` or the memory does not suffice."""
    args = cell_args(cell, args)
    stage, device = flops.stages(args)[cell.kind], torch.device(args.device)
    steps = range(WARMUP_STEPS, WARMUP_STEPS + args.timed_steps)
    step_flops = bench_step.executed_flops(stage, args, steps) / len(steps)
    work = step_flops * (WARMUP_STEPS + args.timed_steps)
    if not budget.allows(work):
        return Cost(step_flops, reason="no time")
    torch._dynamo.reset()
    start, peak_before = time.perf_counter(), training.peak_memory(device)
    try:
        ours, clips = Ours.build(cell.kind, stage, args), bench_step.random_clips(args)
        memory = bench_step.warm_up(ours, clips).memory
        seconds = bench_step.seconds_per_step(ours, steps, clips)
    except torch.OutOfMemoryError:
        return Cost(step_flops, reason="no memory")
    if args.device == "cpu" and memory == peak_before:  # an earlier cell has needed more
        memory = None
    budget.record(time.perf_counter() - start, work)
    return Cost(step_flops, seconds, memory)


def measure_all(cells, args):
    """Measure cells in this order while there is time: {cell: Cost}."""
    budget, costs = TimeBudget(args.time_budget, bench_step.matmul_peak(args)), {}
    for cell in cells:
        costs[cell] = measure(cell, args, budget)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if not any(cost.seconds for cost in costs.values()):
        cli.fail(
            f"--time-budget {args.time_budget:g} is too short for a single step: increase it, or decrease --model "
            "or --batch-size"
        )
    return costs


def estimated_seconds(cost, costs):
    """Seconds of a step: measured, or extrapolated at the FLOP/s of the measured step with the most similar FLOPs."""
    if cost.seconds:
        return cost.seconds
    measured = [other for other in costs if other.seconds]
    nearest = min(measured, key=lambda other: abs(math.log(other.flops / cost.flops)))
    return nearest.seconds * cost.flops / nearest.flops


def print_growth(cells, costs, args):
    """Print a table with a row for each cell."""
    print(f"\n{args.kind} step, {args.dtype}, {'compiled' if args.compile else 'eager'}; ~ extrapolated by FLOPs")
    print(
        f"{'model':8}{'frames':>7}{'pixels':>7}{'batch':>6}{'GFLOPs/clip':>13}{'ms':>10}{'clips/s':>9}"
        f"{'TFLOP/s':>9}{'GiB':>7}"
    )
    for cell in cells:
        cost = costs[cell]
        seconds = estimated_seconds(cost, costs.values())
        mark = "" if cost.seconds else "~"
        memory = f"{cost.memory / 2**30:7.2f}" if cost.memory else f"  {cost.reason or '-'}"
        print(
            f"{cell.model:8}{cell.num_frames:7}{cell.resolution:7}{cell.batch_size:6}"
            f"{cost.flops / cell.batch_size / 1e9:13.4g}{mark:>2}{1e3 * seconds:8.1f}"
            f"{cell.batch_size / seconds:9.3g}{cost.flops / seconds / 1e12:9.3g}{memory}"
        )


def print_paper_runs(costs, args):
    """Print a table with the hours of each of the paper's runs, here and in the paper."""
    print(
        f"\nthe paper's runs with a batch size of {flops.PAPER_BATCH}, in hours of one device; ~ at least "
        "partly extrapolated by FLOPs"
    )
    print(f"{'run':12}{'here':>9}{'paper, A100':>13}")
    for name, stages, paper_hours in PAPER_RUNS:
        seconds, mark = 0.0, ""
        for stage in stages:
            cost, steps = costs[paper_cell(stage, args)], stage[-1]
            seconds += steps * flops.PAPER_BATCH / args.batch_size * estimated_seconds(cost, costs.values())
            if not cost.seconds:
                mark = "~"
        print(f"{name:12}{mark:>2}{seconds / 3600:7,.0f}{paper_hours:13,}")


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    parser.set_defaults(batch_size=24, teacher_steps=80_000)  # flops.stages needs teacher_steps; times do not
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--time-budget", type=float, default=480, help="seconds; what does not fit is extrapolated")
    flag("--kind", choices=("teacher", "student", "ema"), default="student", help="which training step")
    flag("--teacher", metavar="SIZE", choices=SIZES, help="teacher of the student; default: the size of --model")
    flag("--sizes", nargs="+", choices=SIZES, default=["vit_l", "vit_h", "vit_g", "vit_G"], help="models to compare")
    flag("--timed-steps", type=int, default=4, help="steps to time in each cell, after the warm-up")
    flag("--attention", choices=bench_step.ATTENTION_KERNELS, help="attention kernel to prefer, on a GPU")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "timed_steps")
    if any(value is not None for value in (args.width, args.depth, args.heads)):
        cli.fail("the sweep compares model sizes, so it takes no --width, --depth or --heads")
    training.setup(args, stage=2)
    growth = growth_cells(args)
    paper = [paper_cell(stage, args) for _, stages, _ in PAPER_RUNS for stage in stages]
    try:
        with contextlib.ExitStack() as contexts:
            if args.attention:
                contexts.enter_context(bench_step.prefer_attention(args.attention))
            costs = measure_all(dict.fromkeys([*growth, *paper]), args)
    except ValueError as error:
        cli.fail(str(error))
    print_growth(growth, costs, args)
    print_paper_runs(costs, args)


if __name__ == "__main__":
    main()
