"""Runs of several processes, and what may happen to them: kills, signals, full disks, hanging loaders, NaN.

Most runs are started by a server that forks processes which have imported torch already; torchrun takes its time to.
"""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import pkgutil
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, refusal, run_script, write_image
from torch.distributed.tensor import DTensor

import data
import run
import train_ema_baseline
import train_student
import train_teacher
import training
import video
from model import load_checkpoint

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # of every process that is started here
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_distributed"])

FIGURES = ("step", "loss", "grad_norm", "lr", "weight_decay", "context_kept", "context_lost", "target_kept", "flops")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def one_process(rank, world, nodes, port, script, flags, patch):
    """What torchrun does for each process; patch(rank) is called before the script's main()."""
    local = world // nodes
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
        sys.excepthook(*sys.exc_info())  # which multiprocessing would not call
        sys.exit(1)


def start(world, script, *flags, patch=None, nodes=1):
    port, flags = free_port(), [str(flag) for flag in flags]
    what = (world, nodes, port, script.__name__, flags, patch)
    processes = [SERVER.Process(target=one_process, args=(rank, *what)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def end(processes, seconds=60):
    """The exit status of each process; minus the signal's number if one killed it."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, f"still running after {seconds} s: {codes}"
    return codes


def train(world, script, *flags, out, **rest):
    """A run that must succeed. Returns its folder."""
    codes = end(start(world, script, *flags, "--out", out, **rest))
    assert codes == [0] * world, "".join(said(out, rank) for rank in range(world))
    return out


def said(out, rank, where="err"):
    return Path(f"{out}.{rank}.{where}").read_text()


def metrics(out, *names):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names or FIGURES] for line in lines]


def same(a, b):
    """Whether two finished runs agree to the last bit."""
    a_weights, b_weights = load_checkpoint(a), load_checkpoint(b)
    parts = {"encoder", "predictor", "student"} & a_weights.keys()
    return metrics(a) == metrics(b) and a_weights["step"] == b_weights["step"] and all(
        torch.equal(x, b_weights[part][name]) for part in parts for name, x in a_weights[part].items()
    )  # fmt: skip


def states(out):
    return sorted(path.name for path in (out / "resume").iterdir())


def agree(a, b, rel=1e-4):
    assert len(metrics(a)) == len(metrics(b))
    for one, other in zip(metrics(a), metrics(b), strict=True):
        assert one == pytest.approx(other, rel=rel)


# -- patches, each called in a process before it trains


def when_called(where, call, action, after=False):
    """Have action() called at, or after, the call-th call of a function."""
    owner, name = where.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), itertools.count(1)

    def watched(*args, **kwargs):
        now = next(calls) == call
        if now and not after:
            action()
        result = original(*args, **kwargs)
        if now and after:
            action()
        return result

    setattr(owner, name, watched)


def signalled(number, ranks, where, call, after, rank):
    if rank in ranks:
        when_called(where, call, lambda: os.kill(os.getpid(), number), after)


def killed(ranks, where, call, after=False):
    return functools.partial(signalled, signal.SIGKILL, ranks, where, call, after)


def waits_for(path, rank):
    """In step 2."""

    def wait():
        Path(f"{path}.waits").touch()
        while not path.exists():
            time.sleep(0.05)

    when_called("training.update", 2, wait)


def cannot_write(ranks, where, call, after, rank):
    """Files stop growing at 20 kB, as on a full disk."""
    if rank in ranks:
        when_called(where, call, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)), after)


def spoilt(how, rank):
    """The loss of step 3 in process 1."""
    original, calls = train_teacher.pixel_loss, itertools.count(1)

    def pixel_loss(*args):
        loss, *vectors = original(*args)
        if rank == 1 and torch.is_grad_enabled() and args[-1] == 0 and next(calls) == 3:
            if how == "gradients":
                loss.register_hook(lambda gradient: gradient * math_nan)
            else:
                loss = loss * math_nan if how == "nan" else loss + float("inf")
        return loss, *vectors

    math_nan = float("nan")
    train_teacher.pixel_loss = pixel_loss


def placed(shares, rank):
    """Checks, at the end, which share of each prepared network and of its optimizer state this process holds."""
    prepared, prepare, finish = [], training.compile_and_shard, run.Run.finish

    def remember(*args, **kwargs):
        prepared.append(prepare(*args, **kwargs))
        return prepared[-1]

    def check(run):
        for network, share in zip(prepared, shares, strict=True):
            sizes = [(p.numel(), local(p).numel()) for p in network.parameters()]
            assert all(part == whole * share for whole, part in sizes if whole >= 500), sizes
            assert sum(whole >= 500 for whole, _ in sizes) >= 5
        for p, state in run.optimizer.state.items():
            assert local(p).numel() == local(state["exp_avg"]).numel() == local(state["exp_avg_sq"]).numel()
            assert p.dtype == state["exp_avg"].dtype == torch.float32
        if "student" in run.networks:
            teacher, student = (list(run.networks[name].parameters()) for name in ("encoder", "student"))
            assert [(p.placements, p.device_mesh) for p in teacher] == [(p.placements, p.device_mesh) for p in student]
        finish(run)
        print("all is placed as it should be")

    training.compile_and_shard, run.Run.finish = remember, check


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------------------------
# one run, whatever it runs on

EIGHT = [*TINY, "--batch-size", 8, "--micro-batch-size", 1, "--steps", 20, "--warmup-steps", 4, "--save-every", 20]


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory):
    """The folder of a one-process run of a script, 8 micro-batches a step."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda script: train(1, script, *EIGHT, *own(script, teacher), out=folder / script.__name__))


def own(script, teacher):
    ema = ("--ema-momentum", 0.9)
    return {train_teacher: (), train_student: ("--teacher", teacher), train_ema_baseline: ema}[script]


@pytest.mark.parametrize(
    "script, world, flags",
    [
        (train_teacher, 2, ""),
        (train_teacher, 4, ""),
        (train_teacher, 2, "--replicate"),
        (train_student, 2, ""),
        (train_student, 2, "--shard-teacher --activation-checkpointing"),
        (train_student, 4, "--shard-teacher"),
        (train_ema_baseline, 2, ""),
        (train_ema_baseline, 4, ""),
    ],
)
def test_a_run_is_the_same_on_any_number_of_processes(script, world, flags, alone, teacher, tmp_path):
    flags = [*EIGHT, *own(script, teacher), *flags.split()]
    agree(alone(script), train(world, script, *flags, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["world_size"] == world


def test_checkpointed_activations_change_nothing(alone, tmp_path):
    flags = [*EIGHT, "--activation-checkpointing", "--out", tmp_path]
    run_script(train_teacher, *flags)
    agree(alone(train_teacher), tmp_path, rel=1e-6)


@pytest.mark.slow
def test_hybrid_on_two_nodes(alone, teacher, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_id=salt",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]  # fmt: skip
    flags = [*EIGHT, *own(train_ema_baseline, teacher), "--hybrid", "--out", tmp_path / "run"]
    command = [str(part) for part in (*torchrun, train_ema_baseline.__file__, *flags)]
    nodes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [node.communicate(timeout=100)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert json.loads((tmp_path / "run" / "args.json").read_text())["world_size"] == 4
    agree(alone(train_ema_baseline), tmp_path / "run")


@pytest.mark.parametrize(
    "script, world, nodes, flags, shares",
    [
        (train_teacher, 2, 1, "", [1 / 2, 1 / 2]),
        (train_teacher, 2, 1, "--replicate", [1, 1]),
        (train_student, 2, 1, "", [1, 1 / 2, 1 / 2]),
        (train_student, 2, 1, "--shard-teacher", [1 / 2, 1 / 2, 1 / 2]),
        (train_ema_baseline, 2, 1, "", [1 / 2, 1 / 2, 1 / 2]),
        (train_ema_baseline, 4, 2, "--hybrid", [1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_what_each_process_holds(script, world, nodes, flags, shares, teacher, tmp_path):
    flags = [*TINY, *own(script, teacher), *flags.split(), "--steps", 3]
    out = train(world, script, *flags, out=tmp_path / "run", nodes=nodes, patch=functools.partial(placed, shares))
    assert all("placed as it should be" in said(out, rank, "out") for rank in range(world))


# ---------------------------------------------------------------------------------------------------------------------
# killed, stopped, continued


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """The folder of an undisturbed run of two processes that saves after steps 2, 4 and 6."""
    return train(2, train_student, *TINY, "--teacher", teacher, out=tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize(
    "patch",
    [
        killed((1,), "training.update", 3),
        killed((0, 1), "training.update", 3),
        killed((1,), "run.dcp.save", 2),
        killed((0, 1), "run.dcp.save", 2, after=True),
        killed((0,), "run.checksum", 4),  # before the first one of the second save
        killed((0,), "run.write_atomically", 3),  # between a state and its checkpoint.pt
        killed((0,), "run.Run.finish", 1),
    ],
    ids=["one", "all", "one-saves", "all-saved", "checksums", "between-files", "finish"],
)
def test_a_killed_run_continues_as_if_nothing_had_happened(patch, whole, teacher, tmp_path):
    flags = [*TINY, "--teacher", teacher, "--out", tmp_path / "run"]
    codes = end(start(2, train_student, *flags, patch=patch), 20)
    victims = patch.args[1]
    assert [code == -signal.SIGKILL for code in codes] == [rank in victims for rank in range(2)]
    for rank in {0, 1} - set(victims):
        if codes[rank]:
            assert said(tmp_path / "run", rank).startswith(f"process {rank} ends: it lost another process")
            assert "Traceback" not in said(tmp_path / "run", rank)
    newest = max(name for name in states(tmp_path / "run") if not name.endswith(".tmp"))
    out = train(2, train_student, *flags[:-2], out=tmp_path / "run")
    assert f"at step {int(newest[5:])} of 6" in said(out, 0, "out")
    assert same(out, whole) and states(out) == ["step-00000004", "step-00000006"]


def test_a_kill_between_the_last_state_and_its_checkpoint_loses_no_checkpoint(teacher, tmp_path):
    """write_atomically: args.json, then checkpoint.pt of steps 2, 4 and 6."""
    flags = [*TINY, "--out", tmp_path / "run"]
    assert end(start(1, train_teacher, *flags, patch=killed((0,), "run.write_atomically", 4))) == [-signal.SIGKILL]
    assert same(train(1, train_teacher, *flags[:-2], out=tmp_path / "run"), teacher)


def test_a_kill_loses_no_snapshot(tmp_path):
    flags = [*TINY, "--snapshot-every", 2, "--out", tmp_path / "run"]
    assert end(start(1, train_teacher, *flags, patch=killed((0,), "run.write_atomically", 5))) == [-signal.SIGKILL]
    train(1, train_teacher, *flags[:-2], out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*.pt")) == [
        f"checkpoint-00000{step}.pt" for step in (2, 4, 6)
    ]


@pytest.mark.parametrize(
    "script, before, after", [(train_student, 2, 1), (train_student, 4, 2), (train_ema_baseline, 1, 4)]
)
def test_a_run_continues_on_another_number_of_processes(script, before, after, alone, teacher, tmp_path):
    flags = [*EIGHT, *own(script, teacher), "--save-every", 4]
    patch = killed(range(before), "training.update", 11)
    assert end(start(before, script, *flags, "--out", tmp_path / "run", patch=patch)) == [-signal.SIGKILL] * before
    out = train(after, script, *flags, out=tmp_path / "run")
    assert "at step 8 of 20" in said(out, 0, "out")
    agree(out, alone(script))


@pytest.mark.parametrize("world, ranks", [(1, (0,)), (2, (1,)), (2, (0,))])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step(world, ranks, number, whole, teacher, tmp_path):
    flags = [*TINY, "--teacher", teacher]
    undisturbed = whole if world == 2 else train(1, train_student, *flags, out=tmp_path / "whole")
    patch = functools.partial(signalled, number, ranks, "training.update", 3, False)
    out = train(world, train_student, *flags, out=tmp_path / "run", patch=patch)
    line = f"{number.name}: saved and stopped after step 3 of 6; rerun the same command to continue\n"
    assert said(out, 0, "out").endswith(line) and said(out, 0) == ""
    assert load_checkpoint(out)["step"] == 3 and states(out) == ["step-00000002", "step-00000003"]
    assert metrics(out, "step") == [[1], [2], [3]]
    train(world, train_student, *flags, out=out)
    assert "at step 3 of 6" in said(out, 0, "out") and same(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_of_a_run_with_loader_processes(number, tmp_path):
    flags = [*TINY, "--steps", 300, "--save-every", 1000, "--out", tmp_path / "run"]
    command = [sys.executable, train_teacher.__file__, *map(str, flags), "--workers", "1"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in run.stdout:
        if line.startswith("teacher 5/"):
            os.killpg(run.pid, number)
    assert run.wait(30) == 0 and run.stderr.read() == ""
    step = int(re.fullmatch(rf"{number.name}: saved and stopped after step (\d+) of 300; .*\n", line)[1])
    assert 5 <= step < 300 and states(tmp_path / "run") == [f"step-{step:08}"]
    run_script(train_teacher, *flags)
    run_script(train_teacher, *flags[:-1], tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["", "fresh"])
def test_two_runs_do_not_share_a_folder(flags, teacher, tmp_path, capfd):
    out, go = tmp_path / "run", tmp_path / "go"
    first = start(1, train_teacher, *TINY, "--out", out, patch=functools.partial(waits_for, go))
    until = time.monotonic() + 30
    while not Path(f"{go}.waits").exists() and time.monotonic() < until:
        time.sleep(0.05)
    try:
        error = refusal(capfd, train_teacher, *TINY, "--out", out, *flags)
        assert f"{out} is in use by another run (process {first[0].pid} on {socket.gethostname()})" in error
    finally:
        go.touch()
        codes = end(first)
    assert codes == [0] and same(out, teacher)


# ---------------------------------------------------------------------------------------------------------------------
# faults


def wrapped(path, patch):
    """A script that trains a teacher after a line of this module was run, for those that start scripts."""
    path.write_text(f"import os, signal, test_distributed, train_teacher, video\n{patch}\ntrain_teacher.main()\n")
    return path


def bad_video(path, *_):
    raise video.BadVideo(f"{path}: cannot be decoded")


@pytest.mark.slow
@pytest.mark.parametrize(
    "patch, says",
    [
        ("killed((1,), 'training.update', 3)(1)", ["Signal 9 (SIGKILL)", "local_rank: 1"]),
        ("video.read_clips = test_distributed.bad_video", ["unreadable, and no other video to replace it"]),
    ],
    ids=["killed", "bad-data"],
)
def test_one_process_that_fails_ends_all_with_its_cause(patch, says, tmp_path):
    manifest(tmp_path, 12)
    script = wrapped(tmp_path / "wrapped.py", f"if os.environ['RANK'] == '1': test_distributed.{patch}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    flags = [*TINY, "--data", tmp_path / "m.csv", "--steps", 2000, "--save-every", 1000, "--out", tmp_path / "run"]
    command = [str(part) for part in (*torchrun, *flags)]
    started = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode and time.monotonic() - started < 40  # of which half is torchrun's and torch's start
    assert all(what in run.stderr for what in says), run.stderr
    assert "training.py" not in run.stderr  # no traceback of ours


def manifest(folder, count):
    for n in range(count):
        write_image(torch.full((3, 40, 40), 9 * n, dtype=torch.uint8), str(folder / f"{n}.png"))
    (folder / "m.csv").write_text("".join(f"{n}.png\n" for n in range(count)))


@pytest.mark.parametrize("how, loss, norm", [("nan", "nan", "nan"), ("inf", "inf", None), ("gradients", None, "nan")])
def test_a_loss_or_gradient_that_is_not_finite_in_one_process_ends_the_run(how, loss, norm, tmp_path):
    manifest(tmp_path, 12)
    flags = [*TINY, "--data", tmp_path / "m.csv"]
    train(2, train_teacher, *flags, "--steps", 6, out=tmp_path / "whole")
    out = tmp_path / "run"
    assert end(start(2, train_teacher, *flags, "--out", out, patch=functools.partial(spoilt, how)), 20) == [2, 2]
    source = data.Manifest([tmp_path / "m.csv"], 4, 4, 32)
    for rank in range(2):
        found = re.fullmatch(
            r"train_teacher.py: step 3: loss (\S+), gradient norm (\S+), lr 0.003; .*"
            rf"Clips of process {rank}: (.*)\n",
            said(out, rank),
        )
        assert loss in (None, found[1]) and norm in (None, found[2]), found[0]
        assert found[3] == ", ".join(source.paths[source.line(n)] for n in range(8 + 2 * rank, 10 + 2 * rank))
    assert load_checkpoint(out)["step"] == 2 and states(out) == ["step-00000002"]
    assert all(x.isfinite().all() for x in load_checkpoint(out)["encoder"].values())
    assert same(train(2, train_teacher, *flags, out=out), tmp_path / "whole")  # nothing of step 3 stayed


def loader_refusal(tmp_path, patch, *flags):
    """What a run with loader processes whose read_clips is patched says as it ends, and after how long."""
    manifest(tmp_path, 12)
    script = wrapped(tmp_path / "wrapped.py", f"test_distributed.{patch}")
    flags = [*TINY, "--data", tmp_path / "m.csv", "--workers", 2, "--out", tmp_path / "run", *flags]
    run = subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("wrapped.py: the loader failed: ")
    return run.stderr


def reads(path, action):
    """Patch: action() when this file is read."""
    read_clips = video.read_clips

    def patched(file, *rest):
        if file == str(path):
            action()
        return read_clips(file, *rest)

    video.read_clips = patched


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run(tmp_path):
    kill = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
    error = loader_refusal(tmp_path, f"reads({str(tmp_path / '7.png')!r}, {kill})")
    assert "7.png" in error


@pytest.mark.slow
def test_a_loader_that_hangs_ends_the_run(tmp_path):
    started = time.monotonic()
    hang = "lambda: test_distributed.time.sleep(300)"
    error = loader_refusal(tmp_path, f"reads({str(tmp_path / '7.png')!r}, {hang})", "--loader-timeout", 3)
    assert "7.png" in error and "3 seconds" in error
    assert time.monotonic() - started < 60  # of which a good part is torch's start


@pytest.mark.parametrize(
    "world, ranks, where, after",
    [
        (1, (0,), "run.dcp.save", False),
        (1, (0,), "run.dcp.save", True),  # the next step's checkpoint.pt
        (2, (1,), "run.dcp.save", False),
        (2, (0, 1), "run.dcp.save", False),
    ],
    ids=["alone", "checkpoint", "one", "all"],
)
def test_a_full_disk_costs_nothing_that_was_saved(world, ranks, where, after, whole, teacher, tmp_path):
    flags, out = [*TINY, "--teacher", teacher], tmp_path / "run"
    patch = functools.partial(cannot_write, ranks, where, 2, after)
    codes = end(start(world, train_student, *flags, "--out", out, patch=patch), 20)
    assert all(codes[rank] == 2 for rank in ranks), codes
    for rank in ranks:
        assert said(out, rank).startswith(f"train_student.py: step {6 if after else 4} could not be saved in ")
        assert said(out, rank).count("\n") == 1 and "is the disk full?" in said(out, rank), said(out, rank)
    assert load_checkpoint(out)["step"] == 4 and f"step-0000000{4 if after else 2}" in states(out)
    undisturbed = whole if world == 2 else train(1, train_student, *flags, out=tmp_path / "whole")
    assert same(train(world, train_student, *flags, out=out), undisturbed)


class Runs:
    """What, unpickled, leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_checkpoint_runs_code(teacher, tmp_path, capfd):
    torch.save({"format": "salt-1", "encoder": Runs(tmp_path / "ran")}, tmp_path / "evil.pt")
    flags = [*TINY, "--out", tmp_path / "run", "--teacher", tmp_path / "evil.pt"]
    assert "cannot be read" in refusal(capfd, train_student, *flags)
    run = shutil.copytree(teacher, tmp_path / "copy")
    for state in (run / "resume").iterdir():
        (state / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    run_ends = start(1, train_teacher, *TINY, "--out", run)
    assert end(run_ends) == [2] and "no undamaged state" in said(run, 0)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what is kept


def test_checksums(tmp_path):
    file = tmp_path / "x"
    assert run.checksum(file) is None
    file.write_bytes(b"123456789")
    assert run.checksum(file) == [9, 0xCBF43926]  # the check value of CRC-32
    file.write_bytes(b"123456788")
    assert run.checksum(file)[1] != 0xCBF43926


@pytest.mark.parametrize("keep", [1, 2, 10])
def test_the_newest_states_are_kept(keep, tmp_path):
    run_script(train_teacher, *TINY, "--save-every", 1, "--keep", keep, "--out", tmp_path)
    assert states(tmp_path) == [f"step-{step:08}" for step in range(1, 7)][-keep:]


def test_what_a_state_is_made_of(whole, teacher):
    for out, world in ((teacher, 1), (whole, 2)):
        for folder in (out / "resume").iterdir():
            parts = {f"__{rank}_0.distcp" for rank in range(world)}
            assert {path.name for path in folder.iterdir()} == {".metadata", "run.json"} | parts
            record = json.loads((folder / "run.json").read_text())
            assert set(record["files"]) == {".metadata"} | parts and record["step"] == int(folder.name[5:])
