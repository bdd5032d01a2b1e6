"""Kills a run again and again and checks that this changes nothing: python tests/stress_resume.py --kills 30

Trains a tiny student with two processes undisturbed, then the same while SIGKILL meets one process or all of them at
random moments, every third one while a state is being saved; the same command starts it again each time. The final
weights and logged figures must be those of the undisturbed run, to the last bit. Not collected by pytest.
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
TIMES = ("clips_per_s", "tokens_per_s", "data_wait", "seconds", "tflops", "peak_memory_gib")


def start(script, log, *flags):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / script), *TINY, *map(str, flags)]
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks(run):
    """The process ids of torchrun's two processes, by rank."""
    try:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        found = {re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()): int(pid) for pid in children}
    except OSError:  # one that just ended
        return []
    return [pid for match, pid in sorted((int(m[1]), pid) for m, pid in found.items() if m)]


def steps(out):
    """How many steps are logged."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def changed(file):
    try:
        return file.stat().st_mtime
    except OSError:
        return 0


def saving(out, began):
    """Whether a state is being written; a kill before may have left one that is not whole."""
    return any(changed(path) > began for path in (out / "resume").glob("*.tmp"))


def kill(run, out, rng, while_saving, average):
    """Wait for the moment, then kill. Returns what was done; None if the run ended before."""
    began, delay, until = time.time(), rng.uniform(0, average), None
    while run.poll() is None:
        if until is None and changed(out / "metrics.jsonl") > began:  # it goes on
            until = time.monotonic() + delay
        if until and time.monotonic() > until and (saving(out, began) or not while_saving):
            break
        time.sleep(0.001)
    pids = ranks(run)
    victim = rng.choice(["process 0", "process 1", "all"])
    if run.poll() is not None or len(pids) < 2:
        return None
    moment = "while saving" if saving(out, began) else "between saves"
    for pid in pids if victim == "all" else [pids[int(victim[-1])]]:
        os.kill(pid, signal.SIGKILL)
    logged = steps(out)
    try:
        run.wait(60)
    except subprocess.TimeoutExpired:
        for pid in (*pids, run.pid):
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"FAILED: killed {victim} {moment}, and 60 s later the others still run")
    return f"killed {victim} {moment}, {logged} steps logged"


def read(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return torch.load(out / "checkpoint.pt", weights_only=True), figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help="of the run; default 30 per kill, 600 at least")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, total = random.Random(args.seed), args.steps or max(600, 30 * args.kills)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        log = open(folder / "log", "w+")  # noqa: SIM115  (as long as this process)
        if start("train_teacher.py", log, "--steps", 3, "--out", folder / "teacher").wait(100):
            sys.exit(f"the teacher cannot be trained:\n{(folder / 'log').read_text()}")
        flags = ["--steps", total, "--save-every", 5, "--teacher", folder / "teacher"]
        before = time.monotonic()
        if start("train_student.py", log, *flags, "--out", folder / "whole").wait(1800):
            sys.exit(f"the undisturbed run fails:\n{(folder / 'log').read_text()}")
        weights, figures = read(folder / "whole")
        print(f"undisturbed: {total} steps in {time.monotonic() - before:.0f} s")

        out, kills, began, failures = folder / "killed", 0, time.monotonic(), 0
        average = json.loads((folder / "whole" / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] / args.kills
        while True:
            log.seek(0)
            log.truncate()
            run = start("train_student.py", log, *flags, "--out", out)
            done = kill(run, out, rng, kills % 3 == 2, 0.7 * average) if kills < args.kills else None
            code = run.wait(1800)
            said = (folder / "log").read_text()
            resumed = re.search(r"continuing .* at step (\d+) of", said)
            resumed = f"this start continued at step {resumed[1]}" if resumed else "this start began at step 0"
            if done is None:
                break
            kills += 1
            damaged = "; a state was damaged" if "is damaged" in said else ""
            print(f"{kills:3} at {time.monotonic() - began:5.0f} s: {resumed}; {done}{damaged}", flush=True)
            failures += bool(damaged)
        if code:
            sys.exit(f"FAILED: it cannot go on after {kills} kills:\n{said}")
        found, found_figures = read(out)
        wrong = [f"{part}.{name}" for part in ("encoder", "predictor") for name, x in weights[part].items()
                 if not torch.equal(x, found[part][name])]  # fmt: skip
        wrong += ["step"] * (found["step"] != weights["step"]) + ["metrics"] * (figures != found_figures)
        wrong += ["a state that was visible but not whole"] * bool(failures)
        wrong += [f"only {kills} kills, for lack of --steps"] * (kills < args.kills)
        print(f"FAILED: {', '.join(wrong)}" if wrong else f"the same to the last bit after {kills} kills; {resumed}")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
