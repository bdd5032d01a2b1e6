"""A training run and its folder: what it logs and saves, and how it resumes.

    run = Run("teacher", args, {"encoder": encoder, "predictor": predictor}, optimizer)
    for step in range(run.start_step, args.steps):
        for g, clips in run.micro_batches(loader, step):
            run.record_masks(masks)
            ...
        run.end_step(step, loss=loss, grad_norm=grad_norm)
    run.finish()

--out holds args.json (flags, model, versions), metrics.jsonl (one line per logged step), checkpoint.pt (what
`model.load_checkpoint` reads) and resume/ (the states to continue from).
"""

import fcntl
import itertools
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import data
import flops
import training
from cli import clip_grid, duration, fail, plain_flags, rank_and_world, write_atomically
from model import CHECKPOINT_FORMAT

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense bfloat16, SXM modules
RECORD_KEYS = {
    "step",
    "kind",
    "model",
    "args",
    "seconds",
    "flops",
    "counted",
    "teacher",
    "files",
}  # of a state's run.json


class StepRecord(NamedTuple):
    """A step that is not logged yet. Its tensors are read only when it is, so that no step waits for the device."""

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    clip_names: list


class Run:
    """A training run and its folder.

    kind: "teacher", "student" or "ema". networks: what is saved, by name: "encoder" (what a checkpoint is loaded for),
    "predictor", and whatever else resuming needs. teacher: the network that makes the targets, if there is one.
    teacher_identity: path, stage, step and fingerprint of a frozen teacher; a run never continues with another one.
    Restores networks and optimizer in place if --out holds an earlier part of this run; `start_step` is the step to
    continue with.
    """

    def __init__(self, kind, args, networks, optimizer, teacher=None, teacher_identity=None):
        self.kind, self.args, self.networks, self.optimizer = kind, args, networks, optimizer
        self.model = {name: networks[name].config for name in ("encoder", "predictor")}
        self.teacher_config = teacher.config if teacher else None
        self.teacher_identity = teacher_identity
        self.rank, self.world = rank_and_world()
        self.device = torch.device(args.device)
        self.num_tokens = math.prod(clip_grid(args))
        self.num_micro_batches = len(data.micro_batch_indices(args))  # per step and process
        self.start_step, self.seconds, self.flops = 0, 0.0, 0.0
        self.samples, self.bad_samples, self.reported = 0, 0, set()  # of this process since it started
        self.earlier_samples, self.earlier_bad_samples = 0, 0  # of all processes before
        self.metrics_file, self.resume_folder = args.out / "metrics.jsonl", args.out / "resume"
        self.received_signal, self.stop, self.agreed_step, self.tensorboard = 0, 0, -1, None
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
        self.peak_tflops = next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)
        try:
            self._open_folder()
        except OSError as error:
            fail(f"--out {args.out}: {error.strerror}")
        if not self._resume() and self.rank == 0:
            self._describe()
        if args.tensorboard and self.rank == 0:
            self._open_tensorboard()
        self._start_window()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    # -- inside a step

    def micro_batches(self, loader, step):
        """Yield (g, clips) for each micro-batch of this process in a step.

        g counts the step's micro-batches over all processes. clips: (B, 3, T, H, W) float32, normalized, on the device.
        """
        self.clip_names, numbers = [], data.micro_batch_indices(self.args)
        for g in numbers:
            started = time.perf_counter()
            batch = data.next_batch(loader)
            self.waited += time.perf_counter() - started
            self.clip_names += batch.names
            self._count_bad(batch)
            training.set_last_micro_batch(self.networks.values(), g == numbers[-1])
            started = time.perf_counter()
            yield g, data.normalize(batch.clips, self.device)
            if step == self.start_step and g == numbers[0] and self.rank == 0:
                self._warn_if_slow(time.perf_counter() - started)

    def _warn_if_slow(self, seconds):
        """Without a GPU, print how long the run will take if that is more than a day. seconds: of one micro-batch."""
        days = seconds * self.num_micro_batches * (self.args.steps - self.start_step) / 86400
        if self.device.type == "cpu" and days > 1:
            print(
                f"WARNING: this run will take about {days:.1f} days without a GPU; shorten it with a smaller --model, "
                "--steps, --batch-size, --resolution or --num-frames",
                flush=True,
            )

    def _count_bad(self, batch):
        """Count unreadable videos, and report each one once."""
        self.samples += len(batch.clips)
        self.bad_samples += batch.num_replaced
        for reason in sorted(set(batch.skipped) - self.reported):
            print(f"unreadable, replaced by another video: {reason}", file=sys.stderr, flush=True)
        self.reported.update(batch.skipped)

    def record_masks(self, masks):
        """Count the tokens and FLOPs of a micro-batch with these masks for the next logged line."""
        counts = [(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks]
        clips = len(masks[0].context_ids)
        self.window_clips += clips
        self.window_flops += clips * flops.step_flops(
            self.model["encoder"], self.model["predictor"], counts, self.teacher_config, self.num_tokens
        )
        self.tokens["context_kept"] += clips * sum(context for context, _ in counts)
        self.tokens["target_kept"] += clips * sum(target for _, target in counts)
        self.tokens["context_lost"] += sum(mask.context_lost.sum().item() for mask in masks)
        self.tokens["target_lost"] += sum(mask.target_lost.sum().item() for mask in masks)

    # -- at the end of a step

    def is_log_step(self, step):
        """Whether `end_step` logs this step: every --log-every steps, and whenever the run saves or stops.

        All processes must call it, and then agree on whether to stop: a signal may reach only one of them.
        """
        if step != self.agreed_step:
            stop = torch.tensor(self.received_signal)
            if dist.is_initialized():
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            self.stop, self.agreed_step = stop.item(), step
        return self._saves(step) or (step + 1) % self.args.log_every == 0

    def end_step(self, step, loss, grad_norm, **metrics):
        """Log and save when due. End the run if a step was not finite, too many videos are bad, or a signal came.

        loss, grad_norm: what `training.update` returns. Of the steps since the last line, the mean loss is logged, the
        last gradient norm, and the last value of any other metric (a float or a tensor of one element).
        """
        done = step + 1
        self.steps.append(StepRecord(step, loss, grad_norm, self.clip_names))
        if self.is_log_step(step):
            self._log(done, metrics)
        if self._saves(step):
            self.save(done, snapshot=self._snapshots(step))
        if self.stop:
            if self.rank == 0:
                name = signal.Signals(self.stop).name
                print(
                    f"{name}: saved and stopped after step {done} of {self.args.steps}; rerun the same command to "
                    "continue",
                    flush=True,
                )
            self._leave()
            sys.exit(128 + self.stop)  # as if killed, so that no script goes on with an unfinished run

    def _snapshots(self, step):
        return bool(self.args.snapshot_every) and (step + 1) % self.args.snapshot_every == 0

    def _saves(self, step):
        last = step + 1 == self.args.steps
        return bool(self.stop) or last or self._snapshots(step) or (step + 1) % self.args.save_every == 0

    def _receive(self, number, frame):
        """Signal handler: finish the step, save, stop."""
        self.received_signal = number

    # -- logging

    def _start_window(self):
        """Start to collect what the next logged line averages or sums."""
        self.started, self.waited, self.window_clips, self.window_flops = time.perf_counter(), 0.0, 0, 0.0
        self.tokens = dict.fromkeys(("context_kept", "context_lost", "target_kept", "target_lost"), 0)
        self.steps = []

    def _log(self, done, metrics):
        """Write a line of metrics.jsonl, and print a shorter one."""
        losses, grad_norms = self._read_steps()
        line = {
            "step": done,
            "loss": sum(losses) / len(losses),
            "grad_norm": grad_norms[-1],
            "lr": training.learning_rate(done - 1, self.args),
            "weight_decay": training.weight_decay(done - 1, self.args),
            **{name: float(value) for name, value in metrics.items()},
            **self._usage(),
        }
        seconds_per_step = (time.perf_counter() - self.started) / len(losses)
        self._start_window()
        samples, bad = self.counted
        if samples >= 100 and bad > self.args.max_bad * samples:
            limit = f"--max-bad {self.args.max_bad:.0%}"
            fail(f"{bad} of {samples} samples are unreadable, more than {limit}: check --data", agreed=True)
        if self.rank == 0:
            self._write(line, duration((self.args.steps - done) * seconds_per_step))

    def _read_steps(self):
        """Losses and gradient norms since the last line. Ends the run if one of them is not finite."""
        values = torch.stack([torch.stack((s.loss, s.grad_norm)) for s in self.steps]).double().tolist()
        for record, (loss, norm) in zip(self.steps, values, strict=True):
            if not math.isfinite(loss + norm):
                lr = training.learning_rate(record.step, self.args)
                fail(
                    f"step {record.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, lr {lr:.3g}; the weights "
                    "were not updated and the last checkpoint is kept; a lower --lr may help. Clips of process "
                    f"{self.rank}: {', '.join(record.clip_names)}"
                )
        return zip(*values, strict=True)

    def _usage(self):
        """Speed, cost, tokens and bad videos since the last line, over all processes, for the log."""
        sums = [self.samples, self.bad_samples, self.window_clips, self.window_flops, *self.tokens.values()]
        sums = torch.tensor(sums, dtype=torch.float64)
        memory = torch.tensor(training.peak_memory(self.device))
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        samples, bad, clips, window_flops, *tokens = sums.tolist()
        self.counted = int(samples) + self.earlier_samples, int(bad) + self.earlier_bad_samples
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        self.flops += window_flops
        usage = {
            "clips_per_s": clips / seconds,
            "tokens_per_s": clips / seconds * self.num_tokens,
            "data_wait": self.waited / seconds,
            "seconds": self.seconds,
            "flops": self.flops,
            "tflops": window_flops / seconds / 1e12,
            "peak_memory_gib": memory.item() / 2**30,
            **{name: count / clips for name, count in zip(self.tokens, tokens, strict=True)},  # per clip, all masks
            "bad_videos": self.counted[1],
        }
        if self.peak_tflops and self.args.dtype == "bfloat16":
            usage["model_flops_utilization"] = usage["tflops"] / (self.world * self.peak_tflops)
        return usage

    def _write(self, line, time_left):
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard:
            for name, value in line.items():
                self.tensorboard.add_scalar(name, value, line["step"])
        print(
            f"{self.kind} {line['step']}/{self.args.steps}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  grad "
            f"{line['grad_norm']:.3f}  {line['clips_per_s']:.0f} clips/s  waiting for data {line['data_wait']:.0%}  "
            f"{time_left} left",
            flush=True,
        )

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("--tensorboard needs a package: pip install tensorboard")
        self.tensorboard = SummaryWriter(self.args.out / "tensorboard", purge_step=self.start_step + 1)

    # -- saving

    def save(self, step, snapshot=False):
        """Write checkpoint.pt, and the state in resume/ to continue from; with `snapshot`, checkpoint-STEP.pt too."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = {name: get_model_state_dict(network, options=options) for name, network in self.networks.items()}
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "kind": self.kind,
            "step": step,
            "model": self.model,
            "encoder_is": self.kind,
            **weights,
            "args": plain_flags(self.args),
            "stage": self.args.stage,
            "teacher": self.teacher_identity,
        }
        names = ["checkpoint.pt"]
        if snapshot:
            names.append(f"checkpoint-{step:06}.pt")
        folder = self.resume_folder / f"step-{step:08}"
        temporary = folder.with_suffix(".tmp")
        try:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                # Before the state: then a run that resumes from a state has written its checkpoints.
                for name in names:
                    write_atomically(self.args.out / name, lambda path: torch.save(checkpoint, path))
            self._save_state(step, temporary, folder)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # torch.save: RuntimeError on a full disk
            if training.lost_a_process(error):
                raise
            reason = str(error).strip().splitlines()[-1]
            fail(
                f"step {step} could not be saved in {self.args.out}, the previous one is kept; is the disk full? "
                f"{reason}"
            )
        if dist.is_initialized():
            dist.barrier()

    def _save_state(self, step, temporary, folder):
        """Write resume/step-N: every process writes its shards; the folder is renamed when it is complete."""
        if dist.is_initialized():
            dist.barrier()
        dcp.save(self._state()[1], checkpoint_id=temporary)
        if self.rank == 0:
            record = {
                "step": step,
                "kind": self.kind,
                "model": self.model,
                "args": plain_flags(self.args),
                "seconds": self.seconds,
                "flops": self.flops,
                "counted": self.counted,
                "teacher": self.teacher_identity,
                "files": {path.name: checksum(path) for path in sorted(temporary.iterdir())},
            }
            (temporary / "run.json").write_text(json.dumps(record))
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            for old in self._states()[self.args.keep :]:
                shutil.rmtree(old)

    def _state(self):
        """(all networks as one module, the sharded tensors of the networks and of the optimizer)."""
        networks = nn.ModuleDict(self.networks)
        optimizer = get_optimizer_state_dict(networks, self.optimizer)["state"]
        return networks, {"networks": get_model_state_dict(networks), "optimizer": optimizer}

    def _states(self):
        """The folders of complete states, newest first."""
        return sorted((p for p in self.resume_folder.glob("step-*") if p.suffix != ".tmp"), reverse=True)

    def finish(self):
        """Print what the run has produced, and leave the process group."""
        if self.rank == 0:
            print(
                f"{self.kind} done: {self.args.steps} steps in {duration(self.seconds)}, "
                f"{self.flops:.3g} FLOPs; {self.args.out / 'checkpoint.pt'}",
                flush=True,
            )
        self._leave()

    def _leave(self):
        """End the run but not the process: release the folder, the signals and the process group."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if self.tensorboard:
            self.tensorboard.close()
        if self.rank == 0:
            self.lock.close()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    # -- starting and resuming

    def _open_folder(self):
        out = self.args.out
        if self.rank == 0:
            self._lock()
            if self.args.fresh and (out / "args.json").exists():
                older = next(p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.{i}")).exists())
                shutil.move(out, older)
                print(f"--fresh: moved the earlier run in {out} to {older}")
                self._lock()
            self.resume_folder.mkdir(exist_ok=True)
        if dist.is_initialized():
            dist.barrier()

    def _lock(self):
        """Keep other runs out of the folder while this process lives."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.args.out / "lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            fail(f"{self.args.out} is in use by another run ({self.lock.read()}); choose another --out")
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def _describe(self):
        """Write args.json and an empty log, and print what is trained."""
        versions = {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__}
        record = {
            "kind": self.kind,
            "args": plain_flags(self.args),
            "model": self.model,
            "world_size": self.world,
            "versions": versions,
            "git_commit": git_commit(),
        }
        write_atomically(self.args.out / "args.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        self.metrics_file.write_text("")
        encoder, predictor = (sum(p.numel() for p in self.networks[name].parameters()) / 1e6 for name in self.model)
        print(
            f"{self.kind}: encoder of {encoder:.2f}M parameters, predictor of {predictor:.2f}M; "
            f"{self.args.steps} steps into {self.args.out}",
            flush=True,
        )

    def _resume(self):
        """Restore the newest undamaged state. Returns whether there was one."""
        folder, record = self._newest_state()
        if folder is None:
            return False
        if record["kind"] != self.kind or record["model"] != self.model:
            fail(f"{self.args.out} holds a run of another kind or model; choose another --out, or --fresh", agreed=True)
        self._check_teacher(record["teacher"])
        networks, state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(networks, state["networks"])
        groups = get_optimizer_state_dict(networks, self.optimizer)["param_groups"]
        set_optimizer_state_dict(networks, self.optimizer, {"state": state["optimizer"], "param_groups": groups})
        self.start_step, self.seconds, self.flops = record["step"], record["seconds"], record["flops"]
        self.earlier_samples, self.earlier_bad_samples = record["counted"]
        if self.rank == 0:
            self._discard_after(folder)
            self._announce_resume(record["args"])
        return True

    def _check_teacher(self, earlier):
        """End the run if its teacher is not the one it began with."""
        now = self.teacher_identity
        if now and now["sha256"] != earlier["sha256"]:
            fail(
                f"{self.args.out} was trained with another teacher: {earlier['path']} at step {earlier['step']}, now "
                f"{now['path']} at step {now['step']}; restore that teacher, or start over with --fresh",
                agreed=True,
            )

    def _newest_state(self):
        """(folder, record) of the newest undamaged state, (None, None) if the run has not saved anything yet."""
        for folder in self._states():
            try:
                return folder, self._verified(folder)
            except (OSError, ValueError, AttributeError, TypeError) as error:
                if self.rank == 0:
                    print(f"{folder} is damaged ({error}); trying the previous one", file=sys.stderr, flush=True)
        interrupted = any(self.resume_folder.iterdir())  # while it saved for the first time
        if self._states() or ((self.args.out / "checkpoint.pt").exists() and not interrupted):
            fail(
                f"{self.args.out} holds a run, but no undamaged state to continue from; --fresh starts over",
                agreed=True,
            )
        return None, None

    def _verified(self, folder):
        """The record of a state whose files have their recorded checksums; ValueError if one has not."""
        record = json.loads((folder / "run.json").read_text())
        if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
            raise ValueError("run.json is incomplete")
        mine = sorted(record["files"])[self.rank :: self.world]  # the processes share the reading
        bad = [name for name in mine if checksum(folder / name) != record["files"][name]]
        count = torch.tensor(len(bad))
        if dist.is_initialized():
            dist.all_reduce(count)
        if count:
            raise ValueError(f"{count.item()} of its files differ from what was written")
        return record

    def _discard_after(self, folder):
        """Remove the states and the log lines that are newer than the state in `folder`."""
        for newer in self._states():
            if newer > folder:
                shutil.rmtree(newer)
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        # A killed process may leave its last line unfinished.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.start_step]
        write_atomically(self.metrics_file, lambda path: path.write_text("".join(line + "\n" for line in kept)))

    def _announce_resume(self, earlier_args):
        print(f"continuing {self.args.out} at step {self.start_step} of {self.args.steps}")
        unimportant = ("fresh", "out", "schedule_steps", "teacher")
        changed = [
            name
            for name, value in plain_flags(self.args).items()
            if name not in unimportant and earlier_args.get(name) != value
        ]
        if changed:
            print("  flags that changed: " + ", ".join("--" + name.replace("_", "-") for name in changed))


def checksum(path):
    """[size in bytes, CRC-32] of a file; None if it cannot be read."""
    size = crc = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    except OSError:
        return None
    return [size, crc]


def git_commit():
    """The commit of this code, with a "+" if files differ from it; None outside a git checkout."""
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
