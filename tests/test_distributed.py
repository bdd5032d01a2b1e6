"""Runs in processes of their own: any number of them, kills, signals, full disks, dead loaders, NaN.

Most runs are started by a server that forks processes with torch already imported, which is much faster than torchrun.
"""

import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import EXACT_METRICS, TINY, extra_flags, read_metrics, same_checkpoints, saved_states
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import train_ema_baseline
import train_student
import train_teacher
import training
from model import Encoder, load_checkpoint

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # for all processes started here
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_distributed"])
EVERY_STEP = ("--save-minutes", 0)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def run_process(rank, world, port, script, flags, patch):
    """Do what torchrun does in each process, with --hybrid on two nodes: call patch(rank), then the script's main()."""
    local = world // 2 if "--hybrid" in flags else world
    variables = dict(RANK=rank, LOCAL_RANK=rank % local, WORLD_SIZE=world, LOCAL_WORLD_SIZE=local,
                     MASTER_ADDR="localhost", MASTER_PORT=port)  # fmt: skip
    os.environ.update({name: str(value) for name, value in variables.items()})
    out = flags[flags.index("--out") + 1]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [f"{script}.py", *flags]
    try:
        if patch:
            patch(rank)
        importlib.import_module(script).main()
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing would not call it
        sys.exit(1)


def run(world, script, *flags, patch=None, seconds=120):
    """Run a script in processes that call patch(rank) first. Process N prints to OUT.N.out and OUT.N.err.

    Returns their exit statuses, minus the signal's number for a killed process.
    """
    args = (world, free_port(), script.__name__, [str(flag) for flag in flags], patch)
    processes = [SERVER.Process(target=run_process, args=(rank, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, f"still running after {seconds} s: {codes}"
    return codes


def train(world, script, *flags, out, code=0, patch=None):
    """Run a script that must end with exit status `code`. Returns its folder."""
    codes = run(world, script, *flags, "--out", out, patch=patch)
    assert codes == [code] * world, "".join(printed(out, rank) for rank in range(world))
    return out


def printed(out, rank, stream="err"):
    """What a process of a run has printed."""
    return Path(f"{out}.{rank}.{stream}").read_text()


def same_runs(a, b):
    """Whether two finished runs agree to the last bit."""
    return read_metrics(a, *EXACT_METRICS) == read_metrics(b, *EXACT_METRICS) and same_checkpoints(a, b)


def assert_close_runs(a, b):
    """Check that all metrics of two finished runs agree up to rounding.

    The gradient of an absolute error jumps where the error changes its sign, so its norm may differ by up to 5% (2.7%
    on a CPU with AVX-512).
    """
    for line, other in zip(read_metrics(a, *EXACT_METRICS), read_metrics(b, *EXACT_METRICS), strict=True):
        norm = EXACT_METRICS.index("grad_norm")
        assert line.pop(norm) == pytest.approx(other.pop(norm), rel=0.05)
        assert line == pytest.approx(other, rel=1e-4)


def at_call(ranks, function, call, action, after, rank):
    """In the processes `ranks`, do action before, or after, the call-th call of a function, "module.name"."""
    if rank not in ranks:
        return
    owner, name = function.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*args, **kwargs):
        due = next(calls) == call
        if due and not after:
            action(*args)
        result = original(*args, **kwargs)
        if due and after:
            action(*args)
        return result

    setattr(owner, name, patched)


def send_signal(number, times, *_):
    for _ in range(times):
        os.kill(os.getpid(), number)


def limit_files(size, *_):
    """Limit files to so many bytes: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def patch(ranks, function, call, action, *args, after=False):
    """A patch for `run`: see `at_call`."""
    return functools.partial(at_call, ranks, function, call, functools.partial(action, *args), after)


def kill(ranks, function, call, after=False):
    """A patch that kills the processes `ranks` at the call-th call of a function."""
    return patch(ranks, function, call, send_signal, signal.SIGKILL, 1, after=after)


def make_nan(name, optimizer, loss, args):
    """Spoil the loss or a gradient that `training.optimizer_step` gets."""
    (loss if name == "loss" else optimizer.param_groups[0]["params"][0].grad).mul_(float("nan"))


def check_sharding(fraction, rank):
    """Check at the end of the run which fraction of the networks and of the optimizer's state this process holds."""
    save = training.save

    def check_and_save(args, step, networks, optimizer, *rest):
        params = [p for network in networks.values() for p in network.parameters()]
        assert all(local(p).numel() == fraction * p.numel() for p in params if p.numel() >= 500)
        meshes = {p.device_mesh for p in params if isinstance(p, DTensor)}
        assert [mesh.ndim for mesh in meshes] == ([] if args.replicate else [2 if args.hybrid else 1])
        for p, state in optimizer.state.items():
            assert local(p).numel() == local(state["exp_avg"]).numel() == local(state["exp_avg_sq"]).numel()
            assert p.dtype == state["exp_avg"].dtype == torch.float32
        save(args, step, networks, optimizer, *rest)
        print("sharding is correct")

    training.save = check_and_save


def local(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


EIGHT = (*TINY, "--batch-size", 8, "--micro-batch-size", 1, "--steps", 20, "--warmup-steps", 4)


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    """A function: (script, number of processes, flags) -> folder of an undisturbed run."""

    @functools.cache
    def run_undisturbed(script, world=1, flags=tuple(TINY)):
        out = tmp_path_factory.mktemp("undisturbed") / script.__name__
        return train(world, script, *flags, *extra_flags(script, teacher), out=out)

    return run_undisturbed


@pytest.mark.parametrize("script, world, flags, fraction", [
    (train_teacher, 2, "", 1 / 2), (train_teacher, 2, "--replicate", 1),
    (train_student, 2, "--activation-checkpointing", 1 / 2), (train_ema_baseline, 4, "--hybrid", 1 / 2),
])  # fmt: skip
def test_a_run_is_the_same_on_any_number_of_processes(script, world, flags, fraction, undisturbed, teacher, tmp_path):
    flags, out = [*EIGHT, *extra_flags(script, teacher), *flags.split()], tmp_path / "run"
    train(world, script, *flags, out=out, patch=functools.partial(check_sharding, fraction))
    assert_close_runs(undisturbed(script, 1, EIGHT), out)
    assert all("sharding is correct" in printed(out, rank, "out") for rank in range(world))


def test_the_memory_of_a_frozen_sharded_network_does_not_grow():
    """FSDP records every forward pass until a backward pass, which a frozen network never runs."""
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    try:
        network = Encoder(width=32, depth=2, heads=2, num_frames=4, resolution=32, patch_size=8)
        args = training.cli.training_flags("", out="out", steps=1).parse_args(["--device", "cpu"])
        training.compile_and_shard(network.requires_grad_(False), args)
        groups = [m._get_fsdp_state()._fsdp_param_group for m in network.modules() if isinstance(m, FSDPModule)]
        assert len(groups) == 3
        with torch.no_grad():
            for _ in range(5):
                network(torch.zeros(1, 3, 4, 32, 32))
        assert [len(g._post_forward_indices) + len(g.comm_ctx.post_forward_order) for g in groups] == [0, 0, 0]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "script, world, victims, function, call, after, step",
    [
        (train_ema_baseline, 1, (0,), "training.optimizer_step", 5, False, 4),
        (train_student, 2, (1,), "training.optimizer_step", 3, False, 2),
        (train_student, 2, (0, 1), "training.dcp.save", 3, False, 2),  # killed while it saves
        (train_student, 2, (0, 1), "training.dcp.save", 3, True, 2),  # before the state is complete
        (train_student, 2, (0,), "training._write_checkpoint", 4, False, 4),  # after that, before checkpoint.pt
        (train_teacher, 1, (0,), "training._write_checkpoint", 6, False, 6),  # the last one
    ],
    ids=["ema", "one", "saving", "saved", "checkpoint", "last-checkpoint"],
)
def test_a_killed_run_resumes_exactly(
    script, world, victims, function, call, after, step, undisturbed, teacher, tmp_path
):
    flags, out = [*TINY, *extra_flags(script, teacher), *EVERY_STEP, "--snapshot-every", 2], tmp_path / "run"
    codes = run(world, script, *flags, "--out", out, patch=kill(victims, function, call, after))
    assert [code == -signal.SIGKILL for code in codes] == [rank in victims for rank in range(world)]
    for rank in set(range(world)) - set(victims):
        lost = f"{script.__name__}.py: process {rank} ends: it lost another process, whose message says why ("
        assert printed(out, rank).startswith(lost) and printed(out, rank).count("\n") == 1
    train(world, script, *flags, out=out)
    assert f"at step {step} of 6" in printed(out, 0, "out")
    assert same_runs(out, undisturbed(script, world))
    assert saved_states(out) in (["step-00000005", "step-00000006"], ["step-00000006"])
    assert [load_checkpoint(out / f"checkpoint-00000{n}.pt")["step"] for n in (2, 4, 6)] == [2, 4, 6]


@pytest.mark.parametrize("script, before, after", [(train_student, 4, 2), (train_ema_baseline, 1, 4)])
def test_a_run_resumes_on_another_number_of_processes(script, before, after, undisturbed, teacher, tmp_path):
    flags, out = [*EIGHT, *extra_flags(script, teacher), *EVERY_STEP], tmp_path / "run"
    killed = kill(range(before), "training.optimizer_step", 9)
    assert run(before, script, *flags, "--out", out, patch=killed) == [-signal.SIGKILL] * before
    train(after, script, *flags, out=out)
    assert "at step 8 of 20" in printed(out, 0, "out")
    assert_close_runs(out, undisturbed(script, 1, EIGHT))


@pytest.mark.parametrize(
    "world, ranks, number", [(1, (0,), signal.SIGINT), (2, (1,), signal.SIGTERM), (2, (0,), signal.SIGUSR1)]
)
def test_a_signal_ends_a_run_after_its_step(world, ranks, number, undisturbed, teacher, tmp_path):
    flags = [*TINY, "--teacher", teacher]
    signaled = patch(ranks, "training.optimizer_step", 3, send_signal, number, 1)
    out = train(world, train_student, *flags, out=tmp_path / "run", patch=signaled, code=128 + number)
    line = f"{number.name}: saved and stopped; rerun the same command to continue\n"
    assert printed(out, 0, "out").endswith(line) and printed(out, 0) == ""
    assert load_checkpoint(out)["step"] == 3 and saved_states(out) == ["step-00000003"]
    assert read_metrics(out, "step") == [[1], [2], [3]]
    train(world, train_student, *flags, out=out)
    assert "at step 3 of 6" in printed(out, 0, "out") and same_runs(out, undisturbed(train_student, world))


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path):
    twice = patch((0,), "training.optimizer_step", 3, send_signal, signal.SIGINT, 2)
    assert run(1, train_teacher, *TINY, "--out", tmp_path / "run", patch=twice) == [-signal.SIGINT]


@pytest.mark.parametrize("message, lost", [
    ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:42001", True),
    ("[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", True),
    ("NCCL error: invalid usage ... Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 0", False),
    ("[gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth7", False),
])  # fmt: skip
def test_only_a_lost_process_is_reported_as_one(message, lost, capfd, monkeypatch):
    """In either case the original error's last line is printed."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) if lost else contextlib.nullcontext():
        training._exception_hook(RuntimeError, RuntimeError(f"first line\n{message}"), None)
    printed = capfd.readouterr().err
    assert ("lost another process" in printed) == lost and message in printed


@pytest.mark.parametrize("broken, loss, norm", [("loss", "nan", r"\d\S+"), ("gradient", r"\d\S+", "nan")])
def test_a_step_that_is_not_finite_in_one_process_ends_the_run(broken, loss, norm, tmp_path):
    disturbed, out = patch((1,), "training.optimizer_step", 3, make_nan, broken), tmp_path / "run"
    assert run(2, train_teacher, *TINY, *EVERY_STEP, "--out", out, patch=disturbed) == [2, 2]
    line = rf"train_teacher.py: step 3: loss {loss}, gradient norm {norm}, lr 0.003; .*\n"
    assert re.fullmatch(line, printed(out, 0)) and printed(out, 1) == "", printed(out, 0)
    assert load_checkpoint(out)["step"] == 2 and saved_states(out) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    "world, rank, function, step",
    [(1, 0, "training.dcp.save", 2), (1, 0, "training._write_checkpoint", 3), (2, 1, "training.dcp.save", 2)],
)
def test_a_full_disk_loses_nothing_that_was_saved(world, rank, function, step, undisturbed, teacher, tmp_path):
    flags, out = [*TINY, "--teacher", teacher, *EVERY_STEP], tmp_path / "run"
    full = patch((rank,), function, 3, limit_files, 20_000)
    assert run(world, train_student, *flags, "--out", out, patch=full)[rank] == 2
    error = printed(out, rank)
    assert error.startswith("train_student.py: step 3 could not be saved in ") and error.count("\n") == 1, error
    assert load_checkpoint(out)["step"] == 2 and saved_states(out)[-1] == f"step-{step:08}"
    still_full = patch((0,), "training.setup", 1, limit_files, 1500)  # less than args.json has
    assert run(world, train_student, *flags, "--out", out, "--fresh", patch=still_full)[0] == 2
    assert printed(out, 0).startswith(f"train_student.py: {out / 'args.json'}: ") and printed(out, 0).count("\n") == 1
    (older,) = tmp_path.glob("run.[0-9]")
    assert same_runs(train(world, train_student, *flags, out=older), undisturbed(train_student, world))
