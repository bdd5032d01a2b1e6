"""bench_step.py: that it times what it says, and that the peer computes the same."""

import argparse
import itertools
import math
import shlex

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICES, NO_GPU, randomize, refusal, run_script
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import cli
import flops
import training
from bench import step as bench_step

TINY = shlex.split(
    "--width 24 --depth 2 --heads 2 --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 16 "
    "--predictor-depth 1 --predictor-heads 2 --lr 1e-3"
)


def tiny_args(*more, device="cpu"):
    flags = [*TINY, "--device", device, *map(str, more)]
    args = cli.training_flags("", out="out", steps=160_000).parse_args(flags)
    training.setup(args)
    torch.set_float32_matmul_precision("highest")
    return args


def tiny_step(kind, args, teacher=None):
    """Ours, with weights that all matter (mask tokens start at zero)."""
    stages = flops.stages(argparse.Namespace(teacher=teacher, teacher_steps=1), args)
    ours = bench_step.Ours.build(kind, stages[kind], args)
    randomize(ours.encoder), randomize(ours.predictor)
    return ours


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, teacher", [("teacher", None), ("student", None), ("student", "vit_ti"), ("ema", None)])
def test_all_compute_the_same_steps_from_the_same_weights(kind, teacher, device):
    pytest.importorskip("transformers")
    args = tiny_args("--batch-size", 4, "--micro-batch-size", 2, "--dtype", "float32", "--no-compile", device=device)
    ours = tiny_step(kind, args, teacher)
    initial, kept, clips = ours.weights(), ours.weights(), bench_step.random_clips(args)
    peer = bench_step.HuggingFace.build(ours, initial, compiled=False)
    with bench_step.alone(args):
        sharded = bench_step.Ours.build(kind, ours.stage, args, ours.weights(), sharded=True)
        assert all(isinstance(p, DTensor) for p in (*sharded.encoder.parameters(), *sharded.predictor.parameters()))
        assert not any(isinstance(p, DTensor) for p in ours.encoder.parameters())
        for number in range(4):  # of which all but the first depend on the gradients, and for ema on the moving average
            mine, *others = (bench_step.one_step(runner, number, clips) for runner in (ours, peer, sharded))
            for theirs in others:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    torch.testing.assert_close(initial, kept)  # for the next one
    if kind == "ema":
        moved = bench_step.cpu_copy(ours.teacher)["norm.weight"], peer.teacher.layernorm.weight
        torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-4), pytest.param("bfloat16", 2e-2, marks=NO_GPU)])
def test_compiled_steps_are_the_eager_ones(dtype, rtol, device):
    """By inductor, as --compile does; masks of several sizes. A minute on a CPU, hence not there in bfloat16."""
    flags = ["--batch-size", 2, "--dtype", dtype]
    args, compiled = (tiny_args(*flags, f"--{no}compile", device=device) for no in ("no-", ""))
    ours, clips = tiny_step("student", args), bench_step.random_clips(args)
    theirs = bench_step.Ours.build("student", ours.stage, compiled, ours.weights())
    for number in range(4):
        mine, others = (bench_step.one_step(runner, number, clips) for runner in (ours, theirs))
        torch.testing.assert_close(mine, others, rtol=rtol, atol=0)


@NO_GPU
@pytest.mark.parametrize("kind", ["teacher", "student", "ema"])
def test_steps_on_cuda_are_the_cpus_and_never_wait(kind):
    args, gpu = (tiny_args("--batch-size", 4, "--dtype", "float32", "--no-compile", device=d) for d in ("cpu", "cuda"))
    ours, clips = tiny_step(kind, args), bench_step.random_clips(args)
    theirs = bench_step.Ours.build(kind, ours.stage, gpu, ours.weights())
    for number in range(4):
        mine = bench_step.one_step(ours, number, clips)
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one allocates and makes tables
        others = bench_step.one_step(theirs, number, clips.pin_memory())
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(mine, [x.cpu() for x in others], rtol=1e-3, atol=0)


def test_a_peer_that_computes_something_else_is_refused_after_all_is_said(capfd, monkeypatch):
    pytest.importorskip("transformers")
    args = tiny_args("--batch-size", 2)
    assert bench_step.agrees(1.00005, 1.0, 1.0, 1.0, args)
    assert not any(bench_step.agrees(wrong, 1.0, 1.0, 1.0, args) for wrong in (1.001, math.nan))
    loss = bench_step.HuggingFace.loss
    monkeypatch.setattr(bench_step.HuggingFace, "loss", lambda *arguments: 1.001 * loss(*arguments))
    monkeypatch.setattr(bench_step, "matmul_ceiling", lambda args: 5e10)
    with pytest.raises(SystemExit) as stop:
        run_script(bench_step, *TINY, "--device", "cpu", "--batch-size", 2, "--rounds", 1, "--peer", "hf")
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and "computed something else" in error
    assert "NOT THE SAME" in out and out.rstrip().splitlines()[-1].startswith("shares: ")


@pytest.mark.parametrize("kind", ["teacher", "student", "ema"])
def test_executed_flops_are_those_of_the_steps_that_are_timed(kind):
    args = tiny_args("--batch-size", 4, "--micro-batch-size", 2)
    ours, clips = tiny_step(kind, args), bench_step.random_clips(args)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for number in (3, 4):
            bench_step.one_step(ours, number, clips)
    assert bench_step.executed(ours.stage, args, (3, 4)) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_marks_split_a_step_into_its_parts_forward_and_backward():
    args, marks = tiny_args("--batch-size", 2), []
    stamped = tiny_step("ema", args)
    for part in ("teacher", "encoder", "predictor"):
        setattr(stamped, part, bench_step.Stamped(getattr(stamped, part), part, marks.append))
    bench_step.one_step(stamped, 0, bench_step.random_clips(args), marks.append)
    mask = ["encoder", "rest", "predictor", "rest", "predictor", "encoder", "rest"]
    assert marks == ["teacher", "rest", *mask, *mask, "optimizer", "moving average", "rest"]


def test_shares_add_up_to_the_step(monkeypatch):
    args, clock = tiny_args("--batch-size", 2), itertools.count()
    monkeypatch.setattr(bench_step, "now", lambda args: next(clock))
    parts = bench_step.shares(tiny_step("student", args), (0, 1), bench_step.random_clips(args))
    # One second from each mark to the next, see above; one more mark begins a step.
    assert parts == {"teacher": 1, "encoder": 4, "predictor": 4, "optimizer": 1, "rest": 8}


def test_what_was_not_measured_costs_as_much_per_flop_as_the_nearest_that_was():
    costs = [bench_step.Cost(1e9, 2.0), bench_step.Cost(1e12, 1000.0), bench_step.Cost(1e12)]
    assert bench_step.extrapolated(bench_step.Cost(3e9), costs) == pytest.approx(6.0)
    assert bench_step.extrapolated(bench_step.Cost(4e11), costs) == pytest.approx(400.0)
    assert bench_step.extrapolated(costs[0], costs) == 2.0


def test_the_command_prints_times_ratios_and_shares(capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_step, "matmul_ceiling", lambda args: 5e10)
    flags = ["--batch-size", 2, "--rounds", 2, "--round-steps", 1, "--device", "cpu"]
    run_script(bench_step, *TINY, *flags, "--kind", "teacher", "--sharded")
    out = capsys.readouterr().out
    assert "ours  " in out and "ours, sharded " in out and out.count("times as long as ours") == 1
    assert not dist.is_initialized()
    run_script(bench_step, *TINY, *flags, "--kind", "student", "--peer", "hf", "--dtype", "bfloat16")
    out = capsys.readouterr().out
    assert all(word in out for word in ("hf eager", "times as long as ours", "shares: ", "off ours", "TFLOP/s"))


def test_the_sweep_measures_what_fits_and_marks_what_does_not(capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "matmul_ceiling", lambda args: 1e10)  # the paper's runs would take hours
    flags = "--model vit_ti --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 16 --predictor-depth 1 "
    flags = shlex.split(flags + "--predictor-heads 2 --device cpu --batch-size 1 --sizes vit_ti --round-steps 1")
    run_script(bench_step, *flags, "--sweep", "--time-budget", 5)
    growth, paper = capsys.readouterr().out.split("whole runs of the paper")
    first, *_ = [line.split() for line in growth.splitlines() if line.startswith("vit_ti")]
    assert first[1:4] == ["4", "32", "1"] and "~" not in first
    assert float(first[-2]) * 1e3 == pytest.approx(float(first[4]) * float(first[-3]), rel=0.02)  # TFLOP/s
    assert len(paper.strip().splitlines()) == 2 + len(bench_step.PAPER_RUNS) and "~" in paper


@pytest.mark.parametrize("peaks, memory", [((100, 300), 300), ((300, 300), None)])
def test_a_cell_on_the_cpu_has_a_memory_if_the_process_never_needed_as_much(peaks, memory, monkeypatch):
    peaks = iter(peaks)
    monkeypatch.setattr(training, "peak_memory", lambda device: next(peaks))
    own = argparse.Namespace(teacher=None, teacher_steps=1, round_steps=1)
    cell = bench_step.Cell("teacher", "vit_ti", 4, 32, 1, "")
    assert bench_step.measure(cell, own, tiny_args("--batch-size", 1), lambda work: True).memory == memory


def test_mistakes_are_refused_in_one_line(capfd):
    assert "--width" in refusal(capfd, bench_step, *TINY, "--device", "cpu", "--sweep")


@pytest.mark.slow
def test_compilations_and_graph_breaks_are_counted(capsys, monkeypatch):
    flags = [*TINY, "--device", "cpu", "--batch-size", 2, "--compiles", 3, "--compile-backend", "eager"]
    with pytest.raises(SystemExit) as stop:
        run_script(bench_step, *flags)
    out = capsys.readouterr().out
    assert "student: 3 steps, 0 graph breaks" in out and " forward: 3 compilations" in out
    assert stop.value.code == 0
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr("model.F.gelu", lambda x: (torch._dynamo.graph_break(), gelu(x))[1])
    with pytest.raises(SystemExit) as stop:
        run_script(bench_step, *flags)
    assert stop.value.code == 1 and ", 0 graph breaks" not in capsys.readouterr().out
