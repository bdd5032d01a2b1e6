"""Runs of several processes, and their faults: kills, signals, full disks, hanging loaders, NaN.

Most runs are started by a server that forks processes with torch already imported, which is much faster than torchrun.
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
from conftest import (
    EXACT_METRICS,
    TINY,
    extra_flags,
    read_metrics,
    refusal,
    run_script,
    same_checkpoints,
    saved_states,
    write_image,
)
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
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # for all processes started here
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_distributed"])

# ---------------------------------------------------------------------------------------------------------------------
# starting runs


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_process(rank, world, nodes, port, script, flags, patch):
    """Do what torchrun does in each process: call patch(rank), then the script's main()."""
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
        sys.excepthook(*sys.exc_info())  # multiprocessing would not call it
        sys.exit(1)


def start(world, script, *flags, patch=None, nodes=1):
    """Start the processes of a run. Each calls patch(rank) first. Process N prints to OUT.N.out and OUT.N.err."""
    port, flags = free_port(), [str(flag) for flag in flags]
    args = (world, nodes, port, script.__name__, flags, patch)
    processes = [SERVER.Process(target=run_process, args=(rank, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def wait(processes, seconds=120):
    """Wait for the processes to end. Returns their exit statuses, minus the signal's number for a killed process."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert None not in codes, f"still running after {seconds} s: {codes}"
    return codes


def train(world, script, *flags, out, code=0, **rest):
    """Run a script that must end with exit status `code`. Returns its folder."""
    codes = wait(start(world, script, *flags, "--out", out, **rest))
    assert codes == [code] * world, "".join(printed(out, rank) for rank in range(world))
    return out


def printed(out, rank, stream="err"):
    """What a process of a run has printed."""
    return Path(f"{out}.{rank}.{stream}").read_text()


def same_runs(a, b):
    """Whether two finished runs agree to the last bit."""
    return read_metrics(a, *EXACT_METRICS) == read_metrics(b, *EXACT_METRICS) and same_checkpoints(a, b)


def assert_close_runs(a, b, rel=1e-4):
    """Check that all metrics of two finished runs agree up to rounding.

    The gradient of an absolute error jumps where the error changes its sign, so its norm may differ by up to 5% (2.7%
    on a CPU with AVX-512).
    """
    for line, other in zip(read_metrics(a, *EXACT_METRICS), read_metrics(b, *EXACT_METRICS), strict=True):
        norm = EXACT_METRICS.index("grad_norm")
        assert line.pop(norm) == pytest.approx(other.pop(norm), rel=max(0.05, rel))
        assert line == pytest.approx(other, rel=rel)


# ---------------------------------------------------------------------------------------------------------------------
# patches, which disturb a process: `start` calls them with its rank before it trains


def do_at_call(function, call, action, after=False):
    """Call action() before, or after, the call-th call of a function, given as "module.name"."""
    owner, name = function.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), itertools.count(1)

    def patched(*args, **kwargs):
        due = next(calls) == call
        if due and not after:
            action()
        result = original(*args, **kwargs)
        if due and after:
            action()
        return result

    setattr(owner, name, patched)


def send_signal(number, ranks, function, call, after, rank):
    """Signal the processes `ranks` at the call-th call of a function."""
    if rank in ranks:
        do_at_call(function, call, lambda: os.kill(os.getpid(), number), after)


def kill(ranks, function, call, after=False):
    """A patch that kills the processes `ranks` at the call-th call of a function."""
    return functools.partial(send_signal, signal.SIGKILL, ranks, function, call, after)


def pause(path, rank):
    """Create PATH.waits in step 2, and go on when `path` exists."""

    def wait_for_file():
        Path(f"{path}.waits").touch()
        while not path.exists():
            time.sleep(0.05)

    do_at_call("training.update", 2, wait_for_file)


def fill_disk(ranks, function, call, after, rank):
    """Limit files to 20 kB from the call-th call of a function on; writing fails as on a full disk."""
    if rank in ranks:
        do_at_call(function, call, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)), after)


def break_loss(how, rank):
    """Make the loss or the gradients of step 3 in process 1 not finite."""
    original, calls, nan = train_teacher.pixel_loss, itertools.count(1), float("nan")

    def pixel_loss(*args):
        loss, *vectors = original(*args)
        if rank == 1 and torch.is_grad_enabled() and args[-1].index == 0 and next(calls) == 3:
            if how == "gradients":
                loss.register_hook(lambda gradient: gradient * nan)
            else:
                loss = loss * nan if how == "nan" else loss + float("inf")
        return loss, *vectors

    train_teacher.pixel_loss = pixel_loss


def check_sharding(fractions, rank):
    """Check at the end of the run which fraction of each network and of its optimizer state this process holds."""
    networks, compile_and_shard, finish = [], training.compile_and_shard, run.Run.finish

    def compile_and_remember(*args, **kwargs):
        networks.append(compile_and_shard(*args, **kwargs))
        return networks[-1]

    def check_and_finish(run):
        for network, fraction in zip(networks, fractions, strict=True):
            sizes = [(p.numel(), local(p).numel()) for p in network.parameters()]
            assert all(part == whole * fraction for whole, part in sizes if whole >= 500), sizes
            assert sum(whole >= 500 for whole, _ in sizes) >= 5
        for p, state in run.optimizer.state.items():
            assert local(p).numel() == local(state["exp_avg"]).numel() == local(state["exp_avg_sq"]).numel()
            assert p.dtype == state["exp_avg"].dtype == torch.float32
        if "student" in run.networks:
            teacher, student = (list(run.networks[name].parameters()) for name in ("encoder", "student"))
            assert [(p.placements, p.device_mesh) for p in teacher] == [(p.placements, p.device_mesh) for p in student]
        finish(run)
        print("sharding is correct")

    training.compile_and_shard, run.Run.finish = compile_and_remember, check_and_finish


def local(tensor):
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------------------------
# any number of processes

EIGHT = [*TINY, "--batch-size", 8, "--micro-batch-size", 1, "--steps", 20, "--warmup-steps", 4, "--save-every", 20]


@pytest.fixture(scope="module")
def single(teacher, tmp_path_factory):
    """A function: script -> folder of its run in a single process, with 8 micro-batches per step."""
    folder = tmp_path_factory.mktemp("single")

    @functools.cache
    def run_single(script):
        return train(1, script, *EIGHT, *extra_flags(script, teacher), out=folder / script.__name__)

    return run_single


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
def test_a_run_is_the_same_on_any_number_of_processes(script, world, flags, single, teacher, tmp_path):
    flags = [*EIGHT, *extra_flags(script, teacher), *flags.split()]
    assert_close_runs(single(script), train(world, script, *flags, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["world_size"] == world


def test_activation_checkpointing_changes_nothing(single, tmp_path):
    flags = [*EIGHT, "--activation-checkpointing", "--out", tmp_path]
    run_script(train_teacher, *flags)
    assert_close_runs(single(train_teacher), tmp_path, rel=1e-6)


@pytest.mark.slow
def test_hybrid_sharding_on_two_nodes(single, teacher, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_id=salt",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]  # fmt: skip
    flags = [*EIGHT, *extra_flags(train_ema_baseline, teacher), "--hybrid", "--out", tmp_path / "run"]
    command = [str(part) for part in (*torchrun, train_ema_baseline.__file__, *flags)]
    nodes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert json.loads((tmp_path / "run" / "args.json").read_text())["world_size"] == 4
    assert_close_runs(single(train_ema_baseline), tmp_path / "run")


@pytest.mark.parametrize(
    "script, world, nodes, flags, fractions",
    [
        (train_teacher, 2, 1, "", [1 / 2, 1 / 2]),
        (train_teacher, 2, 1, "--replicate", [1, 1]),
        (train_student, 2, 1, "", [1, 1 / 2, 1 / 2]),
        (train_student, 2, 1, "--shard-teacher", [1 / 2, 1 / 2, 1 / 2]),
        (train_ema_baseline, 2, 1, "", [1 / 2, 1 / 2, 1 / 2]),
        (train_ema_baseline, 4, 2, "--hybrid", [1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_each_process_holds_its_shard(script, world, nodes, flags, fractions, teacher, tmp_path):
    flags = [*TINY, *extra_flags(script, teacher), *flags.split(), "--steps", 3]
    out = train(
        world, script, *flags, out=tmp_path / "run", nodes=nodes, patch=functools.partial(check_sharding, fractions)
    )
    assert all("sharding is correct" in printed(out, rank, "out") for rank in range(world))


# ---------------------------------------------------------------------------------------------------------------------
# kills, signals and resuming


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
    """The folder of an undisturbed run of two processes that saves after steps 2, 4 and 6."""
    return train(2, train_student, *TINY, "--teacher", teacher, out=tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.mark.parametrize(
    "patch",
    [
        kill((1,), "training.update", 3),
        kill((0, 1), "training.update", 3),
        kill((1,), "run.dcp.save", 2),
        kill((0, 1), "run.dcp.save", 2, after=True),
        kill((0,), "run.checksum", 4),  # before the first checksum of the second save
        kill((0,), "run.write_atomically", 3),  # before the second checkpoint.pt is written
        kill((0,), "run.Run.finish", 1),
    ],
    ids=["one", "all", "one-saving", "all-saved", "checksums", "checkpoint", "finishing"],
)
def test_a_killed_run_resumes_exactly(patch, undisturbed, teacher, tmp_path):
    flags = [*TINY, "--teacher", teacher, "--out", tmp_path / "run"]
    codes = wait(start(2, train_student, *flags, patch=patch))
    victims = patch.args[1]
    assert [code == -signal.SIGKILL for code in codes] == [rank in victims for rank in range(2)]
    for rank in {0, 1} - set(victims):
        if codes[rank]:
            assert printed(tmp_path / "run", rank).startswith(f"process {rank} ends: it lost another process")
            assert "Traceback" not in printed(tmp_path / "run", rank)
    newest = max(name for name in saved_states(tmp_path / "run") if not name.endswith(".tmp"))
    out = train(2, train_student, *flags[:-2], out=tmp_path / "run")
    assert f"at step {int(newest[5:])} of 6" in printed(out, 0, "out")
    assert same_runs(out, undisturbed) and saved_states(out) == ["step-00000004", "step-00000006"]


def test_a_kill_before_the_last_checkpoint_is_written_loses_nothing(teacher, tmp_path):
    """The calls of write_atomically are args.json, then checkpoint.pt of steps 2, 4 and 6."""
    flags = [*TINY, "--out", tmp_path / "run"]
    assert wait(start(1, train_teacher, *flags, patch=kill((0,), "run.write_atomically", 4))) == [-signal.SIGKILL]
    assert same_runs(train(1, train_teacher, *flags[:-2], out=tmp_path / "run"), teacher)


def test_a_kill_loses_no_snapshot(tmp_path):
    flags = [*TINY, "--snapshot-every", 2, "--out", tmp_path / "run"]
    assert wait(start(1, train_teacher, *flags, patch=kill((0,), "run.write_atomically", 5))) == [-signal.SIGKILL]
    train(1, train_teacher, *flags[:-2], out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*.pt")) == [
        f"checkpoint-00000{step}.pt" for step in (2, 4, 6)
    ]


@pytest.mark.parametrize(
    "script, before, after", [(train_student, 2, 1), (train_student, 4, 2), (train_ema_baseline, 1, 4)]
)
def test_a_run_resumes_on_another_number_of_processes(script, before, after, single, teacher, tmp_path):
    flags = [*EIGHT, *extra_flags(script, teacher), "--save-every", 4]
    patch = kill(range(before), "training.update", 11)
    assert wait(start(before, script, *flags, "--out", tmp_path / "run", patch=patch)) == [-signal.SIGKILL] * before
    out = train(after, script, *flags, out=tmp_path / "run")
    assert "at step 8 of 20" in printed(out, 0, "out")
    assert_close_runs(out, single(script))


@pytest.mark.parametrize("world, ranks", [(1, (0,)), (2, (1,)), (2, (0,))])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step(world, ranks, number, undisturbed, teacher, tmp_path):
    flags = [*TINY, "--teacher", teacher]
    expected = undisturbed if world == 2 else train(1, train_student, *flags, out=tmp_path / "undisturbed")
    patch = functools.partial(send_signal, number, ranks, "training.update", 3, False)
    out = train(world, train_student, *flags, out=tmp_path / "run", patch=patch, code=128 + number)
    line = f"{number.name}: saved and stopped after step 3 of 6; rerun the same command to continue\n"
    assert printed(out, 0, "out").endswith(line) and printed(out, 0) == ""
    assert load_checkpoint(out)["step"] == 3 and saved_states(out) == ["step-00000002", "step-00000003"]
    assert read_metrics(out, "step") == [[1], [2], [3]]
    train(world, train_student, *flags, out=out)
    assert "at step 3 of 6" in printed(out, 0, "out") and same_runs(out, expected)


@pytest.mark.slow
def test_a_signal_to_a_run_and_its_loader_processes_ends_it_after_its_step(tmp_path):
    number = signal.SIGTERM
    flags = [*TINY, "--steps", 300, "--save-every", 1000, "--out", tmp_path / "run"]
    command = [sys.executable, train_teacher.__file__, *map(str, flags), "--workers", "1"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in run.stdout:
        if line.startswith("teacher 5/"):
            os.killpg(run.pid, number)
    assert run.wait(30) == 128 + number and run.stderr.read() == ""
    step = int(re.fullmatch(rf"{number.name}: saved and stopped after step (\d+) of 300; .*\n", line)[1])
    assert 5 <= step < 300 and saved_states(tmp_path / "run") == [f"step-{step:08}"]
    run_script(train_teacher, *flags)
    run_script(train_teacher, *flags[:-1], tmp_path / "undisturbed")
    assert same_runs(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["", "fresh"])
def test_two_runs_do_not_share_a_folder(flags, teacher, tmp_path, capfd):
    out, go = tmp_path / "run", tmp_path / "go"
    first = start(1, train_teacher, *TINY, "--out", out, patch=functools.partial(pause, go))
    deadline = time.monotonic() + 30
    while not Path(f"{go}.waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        error = refusal(capfd, train_teacher, *TINY, "--out", out, *flags)
        assert f"{out} is in use by another run (process {first[0].pid} on {socket.gethostname()})" in error
    finally:
        go.touch()
        codes = wait(first)
    assert codes == [0] and same_runs(out, teacher)


# ---------------------------------------------------------------------------------------------------------------------
# faults


def write_patched_script(path, patch):
    """Write a script that runs `patch`, a line of code, and then trains a teacher."""
    path.write_text(f"import os, signal, test_distributed, train_teacher, video\n{patch}\ntrain_teacher.main()\n")
    return path


def bad_video(path, *_):
    raise video.BadVideo(f"{path}: cannot be decoded")


@pytest.mark.slow
@pytest.mark.parametrize(
    "patch, messages",
    [
        ("kill((1,), 'training.update', 3)(1)", ["Signal 9 (SIGKILL)", "local_rank: 1"]),
        ("video.read_clips = test_distributed.bad_video", ["unreadable, and no other video to replace it"]),
    ],
    ids=["killed", "bad-data"],
)
def test_a_failing_process_ends_the_run_and_its_error_is_printed(patch, messages, tmp_path):
    write_manifest(tmp_path, 12)
    script = write_patched_script(tmp_path / "patched.py", f"if os.environ['RANK'] == '1': test_distributed.{patch}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    flags = [*TINY, "--data", tmp_path / "m.csv", "--steps", 2000, "--save-every", 1000, "--out", tmp_path / "run"]
    command = [str(part) for part in (*torchrun, *flags)]
    started = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert run.returncode and time.monotonic() - started < 120  # half of that is the start of torchrun and torch
    assert all(message in run.stderr for message in messages), run.stderr
    assert "training.py" not in run.stderr  # no traceback of our code


def write_manifest(folder, count):
    """Write `count` images of one gray value each, and m.csv, their manifest."""
    for n in range(count):
        write_image(torch.full((3, 40, 40), 9 * n, dtype=torch.uint8), str(folder / f"{n}.png"))
    (folder / "m.csv").write_text("".join(f"{n}.png\n" for n in range(count)))


@pytest.mark.parametrize("how, loss, norm", [("nan", "nan", "nan"), ("inf", "inf", None), ("gradients", None, "nan")])
def test_a_loss_or_gradient_that_is_not_finite_in_one_process_ends_the_run(how, loss, norm, tmp_path):
    write_manifest(tmp_path, 12)
    flags = [*TINY, "--data", tmp_path / "m.csv"]
    train(2, train_teacher, *flags, "--steps", 6, out=tmp_path / "undisturbed")
    out = tmp_path / "run"
    assert wait(start(2, train_teacher, *flags, "--out", out, patch=functools.partial(break_loss, how))) == [2, 2]
    source = data.Manifest([tmp_path / "m.csv"], 4, 4, 32, data.stream_seed("data", 1, 0))
    for rank in range(2):
        found = re.fullmatch(
            r"train_teacher.py: step 3: loss (\S+), gradient norm (\S+), lr 0.003; .*"
            rf"Clips of process {rank}: (.*)\n",
            printed(out, rank),
        )
        assert loss in (None, found[1]) and norm in (None, found[2]), found[0]
        assert found[3] == ", ".join(source.paths[source.line(n)] for n in range(8 + 2 * rank, 10 + 2 * rank))
    assert load_checkpoint(out)["step"] == 2 and saved_states(out) == ["step-00000002"]
    assert all(x.isfinite().all() for x in load_checkpoint(out)["encoder"].values())
    assert same_runs(train(2, train_teacher, *flags, out=out), tmp_path / "undisturbed")  # step 3 changed nothing


def loader_error(tmp_path, patch, *flags):
    """The error of a run with loader processes in which `patch`, a line of code, breaks the reading of videos."""
    write_manifest(tmp_path, 12)
    script = write_patched_script(tmp_path / "patched.py", f"test_distributed.{patch}")
    flags = [*TINY, "--data", tmp_path / "m.csv", "--workers", 2, "--out", tmp_path / "run", *flags]
    run = subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True, text=True, timeout=180)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("patched.py: the loader failed: ")
    return run.stderr


def do_on_reading(path, action):
    """Call action() when this file is read."""
    read_clips = video.read_clips

    def patched(file, *rest):
        if file == str(path):
            action()
        return read_clips(file, *rest)

    video.read_clips = patched


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run(tmp_path):
    action = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
    error = loader_error(tmp_path, f"do_on_reading({str(tmp_path / '7.png')!r}, {action})")
    assert "7.png" in error


@pytest.mark.slow
def test_a_loader_that_hangs_ends_the_run(tmp_path):
    started = time.monotonic()
    action = "lambda: test_distributed.time.sleep(300)"
    error = loader_error(tmp_path, f"do_on_reading({str(tmp_path / '7.png')!r}, {action})", "--loader-timeout", 3)
    assert "7.png" in error and "3 seconds" in error
    assert time.monotonic() - started < 150  # much of that is the start of torch


@pytest.mark.parametrize(
    "world, ranks, function, after",
    [
        (1, (0,), "run.dcp.save", False),
        (1, (0,), "run.dcp.save", True),  # the next step's checkpoint.pt
        (2, (1,), "run.dcp.save", False),
        (2, (0, 1), "run.dcp.save", False),
    ],
    ids=["single", "checkpoint", "one", "all"],
)
def test_a_full_disk_loses_nothing_that_was_saved(world, ranks, function, after, undisturbed, teacher, tmp_path):
    flags, out = [*TINY, "--teacher", teacher], tmp_path / "run"
    patch = functools.partial(fill_disk, ranks, function, 2, after)
    codes = wait(start(world, train_student, *flags, "--out", out, patch=patch))
    assert all(codes[rank] == 2 for rank in ranks), codes
    for rank in ranks:
        assert printed(out, rank).startswith(f"train_student.py: step {6 if after else 4} could not be saved in ")
        assert printed(out, rank).count("\n") == 1 and "is the disk full?" in printed(out, rank), printed(out, rank)
    assert load_checkpoint(out)["step"] == 4 and f"step-0000000{4 if after else 2}" in saved_states(out)
    expected = undisturbed if world == 2 else train(1, train_student, *flags, out=tmp_path / "undisturbed")
    assert same_runs(train(world, train_student, *flags, out=out), expected)


class CreatesFolder:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_or_state_is_not_run(teacher, tmp_path, capfd):
    torch.save({"format": "salt-1", "encoder": CreatesFolder(tmp_path / "ran")}, tmp_path / "evil.pt")
    flags = [*TINY, "--out", tmp_path / "run", "--teacher", tmp_path / "evil.pt"]
    assert "cannot be read" in refusal(capfd, train_student, *flags)
    run = shutil.copytree(teacher, tmp_path / "copy")
    for state in (run / "resume").iterdir():
        (state / ".metadata").write_bytes(pickle.dumps(CreatesFolder(tmp_path / "ran")))
    assert wait(start(1, train_teacher, *TINY, "--out", run)) == [2] and "no undamaged state" in printed(run, 0)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# states


def test_checksum(tmp_path):
    file = tmp_path / "x"
    assert run.checksum(file) is None
    file.write_bytes(b"123456789")
    assert run.checksum(file) == [9, 0xCBF43926]  # the check value of CRC-32
    file.write_bytes(b"123456788")
    assert run.checksum(file)[1] != 0xCBF43926


@pytest.mark.parametrize("keep", [1, 2, 10])
def test_the_newest_states_are_kept(keep, tmp_path):
    run_script(train_teacher, *TINY, "--save-every", 1, "--keep", keep, "--out", tmp_path)
    assert saved_states(tmp_path) == [f"step-{step:08}" for step in range(1, 7)][-keep:]


def test_contents_of_a_state(undisturbed, teacher):
    for out, world in ((teacher, 1), (undisturbed, 2)):
        for folder in (out / "resume").iterdir():
            parts = {f"__{rank}_0.distcp" for rank in range(world)}
            assert {path.name for path in folder.iterdir()} == {".metadata", "run.json"} | parts
            record = json.loads((folder / "run.json").read_text())
            assert set(record["files"]) == {".metadata"} | parts and record["step"] == int(folder.name[5:])
