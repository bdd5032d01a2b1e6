"""A training run and its folder: what is logged, saved, resumed."""

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
from torch.distributed.fsdp import FSDPModule

import data
import flops
import masking
from cli import clip_grid, duration, fail, rank_and_world, write_aside
from data import micro_batch_indices, next_batch
from model import CHECKPOINT_FORMAT
from training import (
    effective_rank,
    fixed_batch,
    generator,
    last_micro_batch,
    learning_rate,
    lost_a_process,
    peak_memory,
    weight_decay,
)

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # bfloat16, dense, of the SXM modules


def checksum(path):
    """[bytes, CRC-32] of a file; None if it cannot be read."""
    size = crc = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    except OSError:
        return None
    return [size, crc]


def git_commit():
    """The commit of the code that runs, "+" if files were changed; None outside a git checkout."""
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Run:
    """A training run and its folder: restores what an earlier start saved, logs, saves.

    kind: "teacher", "student" or "ema". networks: what is saved, by name: "encoder" (what a checkpoint is loaded for),
    "predictor", and whatever else is needed to go on. source: the training data. teacher: what makes the targets, if
    anything does. Networks and optimizer are restored in place where --out holds an earlier part of this run.
    `start_step` is where to go on.
    """

    RECORDED = {"step", "kind", "model", "args", "seconds", "flops", "counted", "files"}  # in run.json

    def __init__(self, kind, args, networks, optimizer, source, teacher=None):
        self.kind, self.args, self.networks, self.optimizer = kind, args, networks, optimizer
        self.model = {name: networks[name].config for name in ("encoder", "predictor")}
        self.teacher_config = teacher.config if teacher else None
        self.rank, self.world = rank_and_world()
        self.device = torch.device(args.device)
        self.grid = clip_grid(args)
        self.num_micro_batches = len(micro_batch_indices(args))  # per step, of this process
        self.start_step, self.seconds, self.flops = 0, 0.0, 0.0
        self.samples, self.num_bad, self.bad = 0, 0, set()  # of this process, since it started
        self.samples_before, self.num_bad_before = 0, 0  # of all processes, before
        self.metrics_file, self.resume_folder = args.out / "metrics.jsonl", args.out / "resume"
        self.stop_signal, self.tensorboard = 0, None
        name = torch.cuda.get_device_name() if args.device == "cuda" else ""
        self.peak_tflops = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)
        try:  # whether the grid takes such masks; they may be too large for it
            masking.sample_masks(args.mask, self.grid, 1, generator(args.seed))
        except ValueError as error:
            fail(f"--mask {args.mask}: {error}")
        self.fixed = fixed_batch(source, args)
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
            signal.signal(number, self._remember)

    # -- what a step sees

    def micro_batches(self, loader, step):
        """Yields this process's micro-batches of a step: clips, normalized (B, 3, T, H, W) on the device, and masks."""
        self.names, args = [], self.args
        for g in micro_batch_indices(args):
            started = time.perf_counter()
            batch = next_batch(loader)
            self.waited += time.perf_counter() - started
            self.names += batch.names
            self._count_bad(batch)
            rng, sizes, truncation = generator(args.seed, step, g), generator(args.seed, step), args.mask_truncation
            masks = masking.sample_masks(args.mask, self.grid, len(batch.clips), rng, truncation, sizes)
            self._count_tokens(masks)
            last_micro_batch(self.networks.values(), g == micro_batch_indices(args)[-1])
            yield data.normalize(batch.clips, self.device), [mask.to(self.device) for mask in masks]

    def _count_bad(self, batch):
        self.samples += len(batch.clips)
        self.num_bad += len(batch.skipped)
        for reason in sorted(set(batch.skipped) - self.bad):
            print(f"unreadable, another video stands in: {reason}", file=sys.stderr, flush=True)
        self.bad.update(batch.skipped)

    def _count_tokens(self, masks):
        counts = [(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks]
        clips = len(masks[0].context_ids)
        self.window_clips += clips
        self.window_flops += clips * flops.step_flops(
            self.model["encoder"], self.model["predictor"], counts, self.teacher_config, math.prod(self.grid)
        )
        for i, name in enumerate(("context", "target")):
            lost = sum(mask[i + 2].sum().item() for mask in masks)
            self.tokens[f"{name}_kept"] += clips * sum(count[i] for count in counts)
            self.tokens[f"{name}_lost"] += lost

    # -- what it says and saves

    def _start_window(self):
        """Figures are averages since the last logged step."""
        self.started, self.waited, self.window_clips, self.window_flops = time.perf_counter(), 0.0, 0, 0.0
        self.tokens = dict.fromkeys(("context_kept", "context_lost", "target_kept", "target_lost"), 0)
        self.steps = []  # (step, loss, gradient norm, names of the clips): read when logged, so that no step waits

    def end_step(self, step, loss, grad_norm, losses_of):
        """Log and save where it is time; end the run where it cannot or shall not go on.

        Takes `update`'s loss and norm. losses_of(clips, masks), which yields every mask's loss, predictions and targets
        (B, Kt, D), is called with the fixed batch.
        """
        args, done = self.args, step + 1
        self.steps.append((step, loss, grad_norm, self.names))
        stop = torch.tensor(self.stop_signal)
        if dist.is_initialized():  # a signal reaches the processes at different steps, or only one of them
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        snapshot = args.snapshot_every and done % args.snapshot_every == 0
        saving = stop or snapshot or done % args.save_every == 0 or done == args.steps
        if saving or done % args.log_every == 0:
            self._log(done, losses_of)
        if saving:
            self.save(done, snapshot)
        if stop:
            if self.rank == 0:
                name = signal.Signals(stop.item()).name
                print(
                    f"{name}: saved and stopped after step {done} of {args.steps}; the same command continues",
                    flush=True,
                )
            self._leave()
            sys.exit(0)

    def _remember(self, number, frame):
        self.stop_signal = number

    def _read_steps(self):
        """The losses and gradient norms since the last logged step; ends the run if one is not finite."""
        figures = torch.stack([torch.stack((loss, norm)) for _, loss, norm, _ in self.steps]).double().tolist()
        for (step, _, _, names), (loss, norm) in zip(self.steps, figures, strict=True):
            if not math.isfinite(loss + norm):
                fail(f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, lr "
                     f"{learning_rate(step, self.args):.3g}; not updated, the last checkpoint is kept; a lower --lr "
                     f"may help. Clips of process {self.rank}: {', '.join(names)}")  # fmt: skip
        return zip(*figures, strict=True)

    @torch.no_grad()
    def _watch(self, losses_of):
        """What a collapse shows in first, on the fixed batch: spread and rank of targets and predictions."""
        clips, masks, held_out = self.fixed
        clips, masks = data.normalize(clips, self.device), [mask.to(self.device) for mask in masks]
        with torch.compiler.set_stance("force_eager"):  # so that nothing is compiled for this
            losses, *vectors = zip(*losses_of(clips, masks), strict=True)
        for module in nn.ModuleDict(self.networks).modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward pass does it
        line = {"held_out_loss": torch.stack(losses).mean().item()} if held_out else {}
        for name, x in zip(("prediction", "target"), vectors, strict=True):
            x = x[-1].float().flatten(0, 1)  # the last mask's
            x = x[:: math.ceil(len(x) / 4096)]
            line |= {f"{name}_std": x.std(0).mean().item(), f"{name}_rank": effective_rank(x)}
        return line

    def _log(self, done, losses_of):
        args = self.args
        losses, norms = self._read_steps()
        watched = self._watch(losses_of)
        sums = [self.samples, self.num_bad, self.window_clips, self.window_flops, *self.tokens.values()]
        sums = torch.tensor(sums, dtype=torch.float64)  # of this process
        if dist.is_initialized():
            dist.all_reduce(sums)
        samples, bad, clips, window_flops, *tokens = sums.tolist()
        memory = torch.tensor(peak_memory(self.device))
        if dist.is_initialized():
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        self.counted = int(samples) + self.samples_before, int(bad) + self.num_bad_before
        loss, grad_norm = sum(losses) / len(losses), norms[-1]
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        self.flops += window_flops
        line = {
            "step": done,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate(done - 1, args),
            "weight_decay": weight_decay(done - 1, args),
            **watched,
            "clips_per_s": clips / seconds,
            "tokens_per_s": clips / seconds * math.prod(self.grid),
            "data_wait": self.waited / seconds,
            "seconds": self.seconds,
            "flops": self.flops,
            "tflops": window_flops / seconds / 1e12,
            "peak_memory_gib": memory.item() / 2**30,
            # tokens of a clip, summed over its masks
            **{name: count / clips for name, count in zip(self.tokens, tokens, strict=True)},
            "bad_videos": self.counted[1],
        }
        if self.peak_tflops and args.dtype == "bfloat16":
            line["model_flops_utilization"] = line["tflops"] / (self.world * self.peak_tflops)
        self._start_window()
        samples, bad = self.counted
        if samples >= 100 and bad > self.args.max_bad * samples:
            fail(
                f"{bad} of {samples} samples are unreadable, more than --max-bad {self.args.max_bad:.0%}: check --data",
                agreed=True,
            )
        if self.rank == 0:
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.tensorboard:
                for name, value in line.items():
                    self.tensorboard.add_scalar(name, value, done)
            left = duration((args.steps - done) * seconds / len(losses))
            print(f"{self.kind} {done}/{args.steps}  loss {loss:.4f}  lr {line['lr']:.1e}  grad {grad_norm:.3f}  "
                  f"{line['clips_per_s']:.0f} clips/s  waiting for data {line['data_wait']:.0%}  {left} left",
                  flush=True)  # fmt: skip

    def _state(self):
        """(all networks as one module, what resume/ holds of them and of the optimizer: sharded tensors only)."""
        networks = nn.ModuleDict(self.networks)
        optimizer = get_optimizer_state_dict(networks, self.optimizer)["state"]
        return networks, {"networks": get_model_state_dict(networks), "optimizer": optimizer}

    def save(self, step, snapshot=False):
        """Write checkpoint.pt for others and resume/ for this run; with `snapshot`, a checkpoint that stays as well."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = {name: get_model_state_dict(network, options=whole) for name, network in self.networks.items()}
        shared = {"format": CHECKPOINT_FORMAT, "kind": self.kind, "step": step, "model": self.model,
                  "encoder_is": self.kind, **weights, "args": self._plain_args()}  # fmt: skip
        folder = self.resume_folder / f"step-{step:08}"
        aside = folder.with_suffix(".tmp")
        try:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                # Before the state: a run that goes on from a state has written its checkpoints.
                for name in ["checkpoint.pt", f"checkpoint-{step:06}.pt"][: 2 if snapshot else 1]:
                    write_aside(self.args.out / name, lambda path: torch.save(shared, path))
            self._save_state(step, aside, folder)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # RuntimeError: torch.save, a full disk
            if lost_a_process(error):
                raise
            reason = str(error).strip().splitlines()[-1]
            fail(
                f"step {step} could not be saved in {self.args.out}, the one before is kept; is the disk full? {reason}"
            )
        if dist.is_initialized():
            dist.barrier()

    def _save_state(self, step, aside, folder):
        """resume/step-N: every process writes its part; the folder gets its name when it is whole."""
        if dist.is_initialized():
            dist.barrier()
        dcp.save(self._state()[1], checkpoint_id=aside)
        if self.rank == 0:
            record = {"step": step, "kind": self.kind, "model": self.model, "args": self._plain_args(),
                      "seconds": self.seconds, "flops": self.flops, "counted": self.counted,
                      "files": {path.name: checksum(path) for path in sorted(aside.iterdir())}}  # fmt: skip
            (aside / "run.json").write_text(json.dumps(record))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            for old in self._states()[self.args.keep :]:
                shutil.rmtree(old)

    def finish(self):
        """Say what there is now, and leave the process group."""
        if self.rank == 0:
            print(f"{self.kind} done: {self.args.steps} steps in {duration(self.seconds)}, "
                  f"{self.flops:.3g} FLOPs; {self.args.out / 'checkpoint.pt'}", flush=True)  # fmt: skip
        self._leave()

    def _leave(self):
        """The end of the run, not of the process: let others have the folder, the signals, the process group."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if self.tensorboard:
            self.tensorboard.close()
        if self.rank == 0:
            self.lock.close()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    # -- how it starts

    def _open_folder(self):
        out = self.args.out
        if self.rank == 0:
            self._lock()
            if self.args.fresh and (out / "args.json").exists():
                older = next(p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.{i}")).exists())
                shutil.move(out, older)
                print(f"--fresh: the run that was in {out} is now in {older}")
                self._lock()
            self.resume_folder.mkdir(exist_ok=True)
        if dist.is_initialized():
            dist.barrier()

    def _lock(self):
        """Keep other runs out of the folder for as long as this process lives."""
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
        versions = {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__}
        record = {"kind": self.kind, "args": self._plain_args(), "model": self.model, "world_size": self.world,
                  "versions": versions, "git_commit": git_commit()}  # fmt: skip
        write_aside(self.args.out / "args.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        self.metrics_file.write_text("")
        sizes = [sum(p.numel() for p in self.networks[name].parameters()) / 1e6 for name in self.model]
        print(f"{self.kind}: encoder {sizes[0]:.2f}M parameters, predictor {sizes[1]:.2f}M; "
              f"{self.args.steps} steps into {self.args.out}", flush=True)  # fmt: skip

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("--tensorboard needs a package: pip install tensorboard")
        self.tensorboard = SummaryWriter(self.args.out / "tensorboard", purge_step=self.start_step + 1)

    def _states(self):
        """The folders to continue from, the newest first."""
        return sorted((p for p in self.resume_folder.glob("step-*") if p.suffix != ".tmp"), reverse=True)

    def _resume(self):
        """Restore the newest whole state; whether there is one."""
        for folder in self._states():
            try:
                record = self._verified(folder)
                break
            except (OSError, ValueError, AttributeError, TypeError) as error:
                if self.rank == 0:
                    print(f"{folder} is damaged ({error}); trying the one before", file=sys.stderr, flush=True)
        else:
            begun = any(self.resume_folder.iterdir())  # the first save was cut off
            if self._states() or ((self.args.out / "checkpoint.pt").exists() and not begun):
                fail(
                    f"{self.args.out} holds a run, but no whole state to continue it from; --fresh starts anew",
                    agreed=True,
                )
            return False
        if record["kind"] != self.kind or record["model"] != self.model:
            fail(f"{self.args.out} holds a run of another kind or model; choose another --out, or --fresh", agreed=True)
        networks, state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(networks, state["networks"])
        groups = get_optimizer_state_dict(networks, self.optimizer)["param_groups"]
        set_optimizer_state_dict(networks, self.optimizer, {"state": state["optimizer"], "param_groups": groups})
        self.start_step, self.seconds, self.flops = record["step"], record["seconds"], record["flops"]
        self.samples_before, self.num_bad_before = record["counted"]
        if self.rank == 0:
            for newer in self._states():
                if newer > folder:
                    shutil.rmtree(newer)
            lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
            # A killed process may leave its last line unfinished.
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.start_step]
            write_aside(self.metrics_file, lambda path: path.write_text("".join(line + "\n" for line in kept)))
            print(f"continuing {self.args.out} at step {self.start_step} of {self.args.steps}")
            silent, before = ("fresh", "out", "schedule_steps"), record["args"]
            changed = [k for k, v in self._plain_args().items() if k not in silent and before.get(k) != v]
            if changed:
                print("  with other flags than before: " + ", ".join("--" + k.replace("_", "-") for k in changed))
        return True

    def _verified(self, folder):
        """The record of a state's folder whose files are as they were written; ValueError if one is not."""
        record = json.loads((folder / "run.json").read_text())
        if not isinstance(record, dict) or not record.keys() >= self.RECORDED:
            raise ValueError("run.json says too little")
        mine = sorted(record["files"])[self.rank :: self.world]  # the processes share the reading
        bad = [name for name in mine if checksum(folder / name) != record["files"][name]]
        count = torch.tensor(len(bad))
        if dist.is_initialized():
            dist.all_reduce(count)
        if count:
            raise ValueError(f"{count.item()} of its files are not as they were written")
        return record

    def _plain_args(self):
        def plain(value):
            return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in vars(self.args).items()}
