"""Kill a run again and again, and check that this changes nothing: python tests/stress_resume.py --kills 30

Trains a tiny student in two processes, first undisturbed, then with SIGKILL to one process or both at random moments,
every third time while a state is being saved. After each kill, the same command starts the run again. The final weights
and logged metrics must equal those of the undisturbed run to the last bit. pytest does not collect this script.
"""

import argparse
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    "--width 64 --depth 2 --heads 2 --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 32 "
    "--predictor-depth 2 --predictor-heads 2 --batch-size 8 --micro-batch-size 2 --warmup-steps 2 --workers 0 "
    "--device cpu --log-every 1 --clip-grad 1 --lr 3e-3"
)
# Metrics that depend on how fast the machine is.
INEXACT_METRICS = ("clips_per_s", "tokens_per_s", "data_wait", "seconds", "tflops", "peak_memory_gib")


def start(script, log, *flags):
    """Start a script under torchrun, in two processes that print to `log`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / script), *TINY, *map(str, flags)]
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def process_ids(run):
    """The ids of torchrun's two processes, by rank."""
    by_rank = {}
    try:
        for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            if match := re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()):
                by_rank[int(match[1])] = int(pid)
    except OSError:  # a process has just ended
        return []
    return [by_rank[rank] for rank in sorted(by_rank)]


def logged_steps(out):
    """The number of steps in the log."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def modified(file):
    """When a file was last modified; 0 if it does not exist."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0


def is_saving(out, since):
    """Whether a state is being written: an incomplete one that an earlier kill left is older than `since`."""
    return any(modified(path) > since for path in (out / "resume").glob("*.tmp"))


def kill(run, out, rng, while_saving, mean_delay):
    """Wait for a random moment, then kill. Returns a description; None if the run ended first."""
    started, delay, deadline = time.time(), rng.uniform(0, mean_delay), None
    while run.poll() is None:
        if deadline is None and modified(out / "metrics.jsonl") > started:  # it trains
            deadline = time.monotonic() + delay
        if deadline and time.monotonic() > deadline and (is_saving(out, started) or not while_saving):
            break
        time.sleep(0.001)
    pids = process_ids(run)
    victim = rng.choice(["process 0", "process 1", "all"])
    if run.poll() is not None or len(pids) < 2:
        return None
    moment = "while saving" if is_saving(out, started) else "between saves"
    for pid in pids if victim == "all" else [pids[int(victim[-1])]]:
        os.kill(pid, signal.SIGKILL)
    steps = logged_steps(out)
    try:
        run.wait(60)
    except subprocess.TimeoutExpired:
        for pid in (*pids, run.pid):
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"FAILED: killed {victim} {moment}, and 60 s later the others still run")
    return f"killed {victim} {moment}, {steps} steps logged"


def run_with_kills(count, flags, out, log, rng, mean_delay):
    """Start the run until it finishes, and kill it up to `count` times. Returns (number of kills, what went wrong)."""
    kills, problems, started = 0, [], time.monotonic()
    while True:
        log.seek(0)
        log.truncate()
        run = start("train_student.py", log, *flags, "--out", out)
        killed = kill(run, out, rng, kills % 3 == 2, mean_delay) if kills < count else None
        status = run.wait(1800)
        printed = Path(log.name).read_text()
        if "is damaged" in printed:
            problems = ["a state was damaged, though a kill may only leave incomplete ones named .tmp"]
        if killed is None:
            if status:
                sys.exit(f"FAILED: the run cannot be resumed after {kills} kills:\n{printed}")
            return kills, problems
        kills += 1
        resumed = re.search(r"continuing .* at step (\d+) of", printed)
        step = resumed[1] if resumed else 0
        elapsed = time.monotonic() - started
        print(f"{kills:3} at {elapsed:5.0f} s: this start continued at step {step}; {killed}", flush=True)


def read(out):
    """The checkpoint of a run, and the metrics that do not depend on time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in INEXACT_METRICS} for line in lines]
    return torch.load(out / "checkpoint.pt", weights_only=True), metrics


def differences(out, expected):
    """What differs between two finished runs: names of weights, "step", "metrics"."""
    (checkpoint, metrics), (expected_checkpoint, expected_metrics) = read(out), read(expected)
    found = []
    for network in ("encoder", "predictor"):
        for name, x in expected_checkpoint[network].items():
            if not torch.equal(x, checkpoint[network][name]):
                found.append(f"{network}.{name}")
    if checkpoint["step"] != expected_checkpoint["step"]:
        found.append("step")
    if metrics != expected_metrics:
        found.append("metrics")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help="length of the run; default 30 per kill, at least 600")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args()
    steps = args.steps or max(600, 30 * args.kills)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        teacher, undisturbed, killed = (Path(folder) / name for name in ("teacher", "undisturbed", "killed"))
        if start("train_teacher.py", log, "--steps", 3, "--out", teacher).wait(100):
            sys.exit(f"the teacher cannot be trained:\n{Path(log.name).read_text()}")
        flags = ["--steps", steps, "--save-every", 5, "--teacher", teacher]
        started = time.monotonic()
        if start("train_student.py", log, *flags, "--out", undisturbed).wait(1800):
            sys.exit(f"the undisturbed run fails:\n{Path(log.name).read_text()}")
        print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s")
        seconds = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        mean_delay = 0.7 * seconds / args.kills
        kills, problems = run_with_kills(args.kills, flags, killed, log, random.Random(args.seed), mean_delay)
        problems += differences(killed, undisturbed)
        if kills < args.kills:
            problems.append(f"only {kills} kills; more --steps are needed")
    if problems:
        sys.exit(f"FAILED: {', '.join(problems)}")
    print(f"the same to the last bit after {kills} kills")


if __name__ == "__main__":
    main()
