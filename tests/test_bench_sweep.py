"""bench/sweep.py: which steps it measures, and what it extrapolates."""

import math
import shlex

import pytest
from conftest import refusal, run_script
from test_bench_step import TINY, tiny_args

import training
from bench import step as bench_step
from bench import sweep as bench_sweep
from bench.sweep import Cell, Cost, TimeBudget

SWEEP = shlex.split(
    "--model vit_ti --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 16 --predictor-depth 1 "
    "--predictor-heads 2 --device cpu --batch-size 1 --sizes vit_ti --timed-steps 1"
)


def test_unmeasured_steps_are_extrapolated_from_the_nearest_measured_one():
    costs = [Cost(1e9, 2.0), Cost(1e12, 1000.0), Cost(1e12)]
    assert bench_sweep.estimated_seconds(Cost(3e9), costs) == pytest.approx(6.0)
    assert bench_sweep.estimated_seconds(Cost(4e11), costs) == pytest.approx(400.0)
    assert bench_sweep.estimated_seconds(costs[0], costs) == 2.0


def test_time_budget_expects_the_time_of_the_last_cell_and_more_for_more_flops(monkeypatch):
    monkeypatch.setattr(bench_sweep.time, "perf_counter", lambda: 100.0)
    budget = TimeBudget(seconds=10, peak=1e9)
    assert budget.allows(9e9) and not budget.allows(11e9)  # at the device's peak
    budget.record(seconds=4, work=1e9)
    assert budget.allows(1e6) and budget.allows(2e9) and not budget.allows(3e9)
    budget.record(seconds=11, work=1e9)
    assert not budget.allows(1e6)


@pytest.mark.parametrize("kind, teacher", [("teacher", None), ("student", "vit_s"), ("ema", None)])
def test_growth_cells_differ_from_the_first_one_in_one_respect(kind, teacher):
    args = tiny_args("--model", "vit_s", "--resolution", 40, "--batch-size", 3)
    args.kind, args.sizes = kind, ["vit_ti", "vit_s"]
    base, *others = bench_sweep.growth_cells(args)
    assert base == Cell(kind, "vit_s", 4, 40, 3, teacher)
    assert all(sum(a != b for a, b in zip(base, other, strict=True)) == 1 for other in others)
    changed = [next(b for a, b in zip(base, other, strict=True) if a != b) for other in others]
    assert changed == ["vit_ti", 16, 32, 64, 56, 80, 1, 6]  # 56: 1.5 times 40, in patches of 8


def test_prints_measured_rows_and_marks_extrapolated_ones(capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "matmul_peak", lambda args: 1e10)  # so slow that no paper run fits
    run_script(bench_sweep, *SWEEP, "--time-budget", 5)
    growth, paper = capsys.readouterr().out.split("the paper's runs")
    first, *_ = [line.split() for line in growth.splitlines() if line.startswith("vit_ti")]
    assert first[1:4] == ["4", "32", "1"] and "~" not in first
    assert float(first[-2]) * 1e3 == pytest.approx(float(first[4]) * float(first[-3]), rel=0.02)  # TFLOP/s
    assert len(paper.strip().splitlines()) == 2 + len(bench_sweep.PAPER_RUNS) and "~" in paper


def test_hours_of_a_run_are_those_of_its_stages(capsys):
    args = tiny_args("--batch-size", 3)
    stages = {stage for _, stages, _ in bench_sweep.PAPER_RUNS for stage in stages}
    costs = {bench_sweep.paper_cell(stage, args): Cost(1e12, 0.009) for stage in stages}
    bench_sweep.print_paper_runs(costs, args)
    rows = {line[:12].strip(): line[12:].split() for line in capsys.readouterr().out.splitlines()[3:]}
    steps = {"V-JEPA 2 L": 240_000, "SALT g": 80_000 + 160_000}
    for run, paper_hours in (("V-JEPA 2 L", "9,800"), ("SALT g", "10,476")):
        assert rows[run] == [f"{steps[run] * 3072 / 3 * 0.009 / 3600:,.0f}", paper_hours]


@pytest.mark.parametrize("peaks, memory", [((100, 300), 300), ((300, 300), None)])
def test_cpu_memory_is_that_of_a_cell_only_if_it_raises_the_peak_of_the_process(peaks, memory, monkeypatch):
    peaks = iter(peaks)
    monkeypatch.setattr(training, "peak_memory", lambda device: next(peaks))
    args = tiny_args("--batch-size", 1)
    args.timed_steps = 1
    cell = Cell("teacher", "vit_ti", 4, 32, 1, None)
    assert bench_sweep.measure(cell, args, TimeBudget(math.inf, peak=1.0)).memory == memory


def test_mistakes_are_refused_in_one_line(capfd, monkeypatch):
    assert "--width" in refusal(capfd, bench_sweep, *TINY, "--device", "cpu")
    monkeypatch.setattr(bench_step, "matmul_peak", lambda args: 1.0)
    assert "--time-budget 5 is too short" in refusal(capfd, bench_sweep, *SWEEP, "--time-budget", 5)
