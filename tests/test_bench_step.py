"""bench/step.py: it times the steps of the training scripts, and the peer computes the same losses."""

import itertools
import math
import shlex

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICES, NO_GPU, randomize, run_script
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import cli
import flops
import training
from bench import step as bench_step
from bench.step import HuggingFace, Ours, Result, training_step

# A constant learning rate, large enough for every step to depend on the gradients of the step before.
TINY = shlex.split(
    "--width 24 --depth 2 --heads 2 --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 16 "
    "--predictor-depth 1 --predictor-heads 2 --start-lr 1e-3 --lr 1e-3"
)


def tiny_args(*more, teacher=None, device="cpu"):
    parser = cli.training_flags("", out="out", steps=160_000)
    parser.set_defaults(teacher=teacher, teacher_steps=1)
    args = parser.parse_args([*TINY, "--device", device, *map(str, more)])
    training.setup(args, stage=2)
    torch.set_float32_matmul_precision("highest")
    return args


def tiny_ours(kind, args):
    """Ours, with random values in all weights (mask tokens are initialized to zero)."""
    ours = Ours.build(kind, flops.stages(args)[kind], args)
    randomize(ours.encoder), randomize(ours.predictor)
    return ours


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, teacher", [("teacher", None), ("student", None), ("student", "vit_ti"), ("ema", None)])
def test_ours_sharded_and_peer_take_the_same_steps(kind, teacher, device):
    pytest.importorskip("transformers")
    flags = ["--batch-size", 4, "--micro-batch-size", 2, "--dtype", "float32", "--no-compile"]
    args = tiny_args(*flags, teacher=teacher, device=device)
    ours = tiny_ours(kind, args)
    weights, copies, clips = ours.weights(), ours.weights(), bench_step.random_clips(args)
    peer = HuggingFace.build(ours, weights, compiled=False)
    with bench_step.single_process_group(args):
        sharded = Ours.build(kind, ours.stage, args, ours.weights(), sharded=True)
        assert all(isinstance(p, DTensor) for p in (*sharded.encoder.parameters(), *sharded.predictor.parameters()))
        assert not any(isinstance(p, DTensor) for p in ours.encoder.parameters())
        for step in range(4):  # all but the first depend on the gradients and, for ema, on the moving average
            expected, *others = (training_step(runner, step, clips) for runner in (ours, peer, sharded))
            for other in others:
                torch.testing.assert_close(expected, other, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, copies)  # the runners must not train the weights they were given
    if kind == "ema":
        moved = bench_step.cpu_weights(ours.teacher)["norm.weight"], peer.teacher.layernorm.weight
        torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-4), pytest.param("bfloat16", 2e-2, marks=NO_GPU)])
def test_compiled_steps_equal_eager_steps(dtype, rtol, device):
    """With inductor, as under --compile, and masks of several sizes. Takes a minute on a CPU, so no bfloat16 there."""
    flags = ["--batch-size", 2, "--dtype", dtype]
    args, compiled_args = (tiny_args(*flags, flag, device=device) for flag in ("--no-compile", "--compile"))
    ours, clips = tiny_ours("student", args), bench_step.random_clips(args)
    compiled = Ours.build("student", ours.stage, compiled_args, ours.weights())
    for step in range(4):
        expected, actual = (training_step(runner, step, clips) for runner in (ours, compiled))
        torch.testing.assert_close(expected, actual, rtol=rtol, atol=0)


@NO_GPU
@pytest.mark.parametrize("kind", ["teacher", "student", "ema"])
def test_cuda_steps_equal_cpu_steps_without_synchronization(kind):
    flags = ["--batch-size", 4, "--dtype", "float32", "--no-compile"]
    args, gpu_args = (tiny_args(*flags, device=device) for device in ("cpu", "cuda"))
    ours, clips = tiny_ours(kind, args), bench_step.random_clips(args)
    on_gpu = Ours.build(kind, ours.stage, gpu_args, ours.weights())
    for step in range(4):
        expected = training_step(ours, step, clips)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first allocates and fills RoPE tables
        actual = training_step(on_gpu, step, clips.pin_memory())
        torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(expected, [x.cpu() for x in actual], rtol=1e-3, atol=0)


def test_a_peer_with_another_loss_is_refused_after_everything_is_printed(capfd, monkeypatch):
    pytest.importorskip("transformers")
    args, ours = tiny_args("--batch-size", 2), Result(1.0, 1.0, 0, [])
    assert bench_step.same_loss(Result(1.00005, 1.0, 0, []), ours, args)
    assert not any(bench_step.same_loss(Result(wrong, 1.0, 0, []), ours, args) for wrong in (1.001, math.nan))
    loss = HuggingFace.loss
    monkeypatch.setattr(HuggingFace, "loss", lambda *arguments: 1.001 * loss(*arguments))
    monkeypatch.setattr(bench_step, "matmul_peak", lambda args: 5e10)
    with pytest.raises(SystemExit) as stop:
        run_script(bench_step, *TINY, "--device", "cpu", "--batch-size", 2, "--rounds", 1, "--peer", "hf")
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and "computed something else" in error
    assert "NOT THE SAME" in out and out.rstrip().splitlines()[-1].startswith("parts of our step: ")


def test_the_eager_peer_is_ours_without_compilation(monkeypatch, capsys):
    args, compiled = tiny_args("--compile", "--batch-size", 2), []
    args.sharded, args.peer = False, "eager"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    ours, eager = bench_step.build_runners("student", flops.stages(args)["student"], args)
    assert eager.name == "ours, eager" and args.compile
    assert compiled == [block for network in ours._networks().values() for block in network.blocks]
    torch.testing.assert_close(ours.weights(), eager.weights())
    with pytest.raises(SystemExit):
        run_script(bench_step, *TINY, "--device", "cpu", "--peer", "eager")
    assert "add --compile" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["teacher", "student", "ema"])
def test_executed_flops_equal_torchs_count(kind):
    args = tiny_args("--batch-size", 4, "--micro-batch-size", 2)
    ours, clips = tiny_ours(kind, args), bench_step.random_clips(args)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in (3, 4):
            training_step(ours, step, clips)
    assert bench_step.executed_flops(ours.stage, args, (3, 4)) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_marks_divide_a_step_into_its_parts_forward_and_backward():
    args, marks = tiny_args("--batch-size", 2), []
    marked = tiny_ours("ema", args)
    for part in ("teacher", "encoder", "predictor"):
        setattr(marked, part, bench_step.MarkedNetwork(getattr(marked, part), part, marks.append))
    training_step(marked, 0, bench_step.random_clips(args), marks.append)
    mask = ["encoder", "rest", "predictor", "rest", "predictor", "encoder", "rest"]
    assert marks == ["teacher", "rest", *mask, *mask, "optimizer", "moving average", "rest"]


def test_parts_add_up_to_the_step(monkeypatch):
    args, clock = tiny_args("--batch-size", 2), itertools.count()
    monkeypatch.setattr(bench_step, "now", lambda args: next(clock))
    parts = bench_step.seconds_by_part(tiny_ours("student", args), (0, 1), bench_step.random_clips(args))
    # One second from each mark to the next, see the test above; another mark begins the step.
    assert parts == {"teacher": 1, "encoder": 4, "predictor": 4, "optimizer": 1, "rest": 8}


def test_prints_times_ratios_and_parts(capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_step, "matmul_peak", lambda args: 5e10)
    flags = ["--batch-size", 2, "--rounds", 2, "--round-steps", 1, "--device", "cpu"]
    run_script(bench_step, *TINY, *flags, "--kind", "teacher", "--sharded")
    out = capsys.readouterr().out
    assert "ours  " in out and "ours, sharded " in out and out.count("times as long as ours") == 1
    assert not dist.is_initialized()
    run_script(bench_step, *TINY, *flags, "--kind", "student", "--peer", "hf", "--dtype", "bfloat16")
    out = capsys.readouterr().out
    expected = "hf eager", "times as long as ours", "parts of our step: ", "difference from ours", "TFLOP/s"
    assert all(words in out for words in expected)


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
