"""Frozen evaluation: how much of a task can be read off an encoder's tokens by a small attentive probe.

    python probe.py --task synthetic-motion synthetic-shape --checkpoint out/student
    python probe.py --task synthetic-motion --checkpoint out/student --untrained      # the floor: random weights
    python probe.py --task k400                                                       # data/k400/{train,val}.csv
    python probe.py --train-data train.csv --val-data val.csv --num-classes 2 --checkpoint out/student

The paper's fast protocol (appendix D, table 7): one clip and one view per video, 20 epochs, batch 256, AdamW with
learning rate 1e-3 (cosine to 0) and weight decay 0.01, a four-block attentive probe. Training clips are augmented
(place, crop, flip), validation clips are the middle of the video, centre crop. The encoder is frozen and in eval mode.
The built-in tasks are not augmented, so their features are computed once. Writes results.json into --out.
"""

import argparse
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from model import AttentiveProbe, Encoder, load_checkpoint, load_encoder, token_grid
from training import Parser, duration, fail, generator, rank_and_world, require_at_least, resolve_device, write_aside

TASKS = {"k400": 400, "ssv2": 174}  # number of classes; manifests are data/TASK/train.csv and val.csv
SYNTHETIC = {"synthetic-motion": data.MOTIONS, "synthetic-shape": data.SHAPES}
SYNTHETIC_SEED = 2**31  # clips that no training run sees, whatever its --seed below this


def parse_args():
    parser = Parser(__doc__)
    flag = parser.add_argument_group("what is probed").add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--weights", choices=("encoder", "student"), default="encoder", help="an EMA run holds its student as well")
    flag("--untrained", action="store_true", help="the checkpoint's architecture with random weights")
    flag("--task", nargs="+", choices=[*TASKS, *SYNTHETIC], default=[], help="several built-in tasks share features")
    flag("--train-data", nargs="+", metavar="MANIFEST", help="for a task of your own; with --val-data, --num-classes")
    flag("--val-data", nargs="+", metavar="MANIFEST")
    flag("--num-classes", type=int)
    flag("--train-clips", type=int, default=4000, help="of the built-in tasks")
    flag("--val-clips", type=int, default=1000, help="of the built-in tasks")
    flag("--frame-step", type=int, default=4, help="(table 7)")
    flag("--resolution", type=int, help="default: what the encoder was trained at")
    flag("--num-frames", type=int, help="default: what the encoder was trained at")
    flag("--single-frame", action="store_true", help="repeat each clip's middle frame: what can be told without motion")
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes")

    flag = parser.add_argument_group("how the probe learns").add_argument
    flag("--epochs", type=int, default=20, help="(table 7)")
    flag("--batch-size", type=int, default=256, help="(table 7)")
    flag("--lr", type=float, default=1e-3, help="(table 7)")
    flag("--weight-decay", type=float, default=0.01, help="(table 7)")
    flag("--probe-depth", type=int, default=4, help="blocks, the last one cross-attention (appendix D)")
    flag("--probe-heads", type=int, default=16, help="(V-JEPA 2)")
    flag("--standardize", action=argparse.BooleanOptionalAction, default=False,
         help="give the probe tokens of zero mean and unit variance per channel; pays when epochs are few")  # fmt: skip
    flag("--seeds", type=int, default=1, help="probes trained, with different initialisation and order")
    flag("--seed", type=int, default=0, help="of the first probe, and of the untrained encoder")

    flag = parser.add_argument_group("on what, and what it leaves").add_argument
    flag("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on a GPU, else float32")
    flag("--out", type=Path, default=Path("out/probe"))
    args = parser.parse_args()

    resolve_device(args)
    require_at_least(args, 1, "epochs", "batch_size", "train_clips", "val_clips", "seeds", "probe_depth", "frame_step")
    require_at_least(args, 0, "seed", "workers")
    if rank_and_world()[1] > 1:
        fail("the probe runs in one process: start it with python, not torchrun")
    built_in = [task for task in args.task if task in SYNTHETIC]
    own = args.train_data or args.val_data or args.num_classes
    if bool(args.task) == bool(own) or (args.task and len(args.task) > 1 and len(built_in) < len(args.task)):
        fail("give --task (one, or several synthetic ones), or --train-data, --val-data and --num-classes")
    if own and not (args.train_data and args.val_data and args.num_classes):
        fail("--train-data, --val-data and --num-classes are needed together")
    return args


def load(args):
    """The frozen encoder that the flags name."""
    try:
        if args.untrained:
            torch.manual_seed(args.seed)
            encoder = Encoder(**load_checkpoint(args.checkpoint)["model"]["encoder"]).eval()
        else:
            encoder = load_encoder(args.checkpoint, args.weights)
    except (OSError, ValueError) as error:
        fail(f"--checkpoint: {error}")
    return encoder.requires_grad_(False).to(args.device)


def sources(args, encoder):
    """(training source, validation source, {task: (label column, number of classes)})."""
    num_frames = args.num_frames or encoder.config["num_frames"]
    resolution = args.resolution or encoder.config["resolution"]
    try:
        token_grid((num_frames, resolution, resolution), encoder.tubelet_size, encoder.patch_size)
    except ValueError as error:
        fail(str(error))
    if args.task and args.task[0] in SYNTHETIC:
        columns = {task: (list(SYNTHETIC).index(task), len(SYNTHETIC[task])) for task in args.task}
        train = data.Synthetic(num_frames, resolution, SYNTHETIC_SEED, args.train_clips)
        return train, data.Synthetic(num_frames, resolution, SYNTHETIC_SEED + 2, args.val_clips), columns
    task = args.task[0] if args.task else "own"
    if args.task:
        args.train_data, args.val_data = [f"data/{task}/train.csv"], [f"data/{task}/val.csv"]
        for name in (*args.train_data, *args.val_data):
            if not Path(name).is_file():
                fail(f"--task {task} needs {name}, lines of 'path label' for the {TASKS[task]} classes "
                     "(README, 'Probing', says how to make it)")  # fmt: skip
    classes = TASKS.get(task, args.num_classes)
    common = num_frames, args.frame_step, resolution
    try:
        train = data.Manifest(args.train_data, *common, num_classes=classes)
        return train, data.Manifest(args.val_data, *common, train=False, num_classes=classes), {task: (0, classes)}
    except (OSError, ValueError) as error:
        fail(str(error))


def tokens_of(args, encoder, source, numbers):
    """Yields (tokens (B, N, D), labels (B, L)) of the samples with these numbers, in their order."""
    batches = [numbers[i : i + args.batch_size] for i in range(0, len(numbers), args.batch_size)]
    for batch in data.clip_loader(source, batches, args.workers):
        for reason in batch.skipped:
            print(f"unreadable, another training video stands in: {reason}", file=sys.stderr)
        clips = data.normalise(batch.clips, args.device)
        if args.single_frame:
            middle = clips.shape[2] // 2
            clips = clips[:, :, middle : middle + 1].expand_as(clips)
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            tokens = encoder(clips)
        # Out of inference mode, so that the probe's backward pass may save them.
        yield tokens.clone(), batch.labels.to(args.device)


def all_tokens(args, encoder, source, what):
    """The tokens and labels of a whole source, kept in memory: (M, N, D), (M, L)."""
    parts, started = [], time.perf_counter()
    for part in tokens_of(args, encoder, source, range(len(source))):
        parts.append(part)
        done = min(len(source), len(parts) * args.batch_size)
        left = (time.perf_counter() - started) * (len(source) - done) / done
        print(f"\r{what} features {done}/{len(source)}, {duration(left)} left  ", end="", flush=True)
    print()
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([labels for _, labels in parts])


class Standardize(torch.nn.Module):
    """Zero mean and unit variance per channel, measured once on tokens (..., D)."""

    def __init__(self, tokens):
        super().__init__()
        tokens = tokens.float().flatten(0, -2)
        self.register_buffer("mean", tokens.mean(0))
        self.register_buffer("std", tokens.std(0) + 1e-6)

    def forward(self, tokens):
        return (tokens - self.mean) / self.std


def train_probe(args, probe, epochs, steps, column):
    """Train a probe, `steps` batches in all; epochs(epoch) iterates over (tokens, labels). Yields (epoch, loss)."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for epoch in range(args.epochs):
        for tokens, labels in epochs(epoch):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = F.cross_entropy(probe(tokens).float(), labels[:, column])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield epoch, loss.item()


@torch.inference_mode()
def count_correct(args, probe, batches, column):
    """(videos classified right, videos) over batches of (tokens, labels)."""
    right = total = 0
    for tokens, labels in batches:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            right += (probe(tokens).argmax(1) == labels[:, column]).sum().item()
        total += len(labels)
    return right, total


def interval95(right, total):
    """Wilson's 95% interval of a proportion, in percent."""
    z, p = 1.96, right / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return [100 * (centre - half) / (1 + z * z / total), 100 * (centre + half) / (1 + z * z / total)]


def probe_tasks(args):
    """Probe the encoder on every task and write results.json. BadVideo if a video cannot be read."""
    encoder = load(args)
    train, val, tasks = sources(args, encoder)
    part = "untrained" if args.untrained else args.weights
    name = f"{args.checkpoint}{'' if part == 'encoder' else f' ({part})'}"
    print(f"probing {name} on {', '.join(tasks)}: {len(train)} training and {len(val)} validation clips, {args.device}")

    started, size = time.perf_counter(), args.batch_size
    augmented = isinstance(train, data.Manifest)  # then every epoch has clips of its own
    if augmented:
        for _ in data.clip_loader(val, [[n] for n in range(len(val))], args.workers):
            pass  # an unreadable validation video is an error: better now than when the probe is trained
        sample = next(iter(tokens_of(args, encoder, train, range(min(size, len(train))))))[0]
    else:
        val_tokens, val_labels = all_tokens(args, encoder, val, "validation")
        train_tokens, train_labels = all_tokens(args, encoder, train, "training")
        sample = train_tokens

    def train_batches(seed, epoch):
        if augmented:
            first = (seed * args.epochs + epoch) * len(train)  # a pass of its own for every seed and epoch
            return tokens_of(args, encoder, train, range(first, first + len(train)))
        order = torch.randperm(len(train), generator=generator(seed, epoch)).to(args.device)
        return ((train_tokens[ids], train_labels[ids]) for ids in order.split(size))

    def val_batches():
        if augmented:
            return tokens_of(args, encoder, val, range(len(val)))
        return zip(val_tokens.split(size), val_labels.split(size), strict=True)

    steps = args.epochs * math.ceil(len(train) / size)
    results, fits, probing = {}, 0, time.perf_counter()
    for task, (column, classes) in tasks.items():
        rights = []
        for seed in range(args.seed, args.seed + args.seeds):
            torch.manual_seed(seed)
            try:
                probe = AttentiveProbe(encoder.width, classes, args.probe_depth, args.probe_heads)
            except ValueError as error:
                fail(f"--probe-heads: {error}")
            if args.standardize:
                probe = torch.nn.Sequential(Standardize(sample), probe)
            probe.to(args.device)
            batches = functools.partial(train_batches, seed)
            for epoch, loss in train_probe(args, probe, batches, steps, column):
                done = fits + (epoch + 1) / args.epochs
                left = (time.perf_counter() - probing) * (len(tasks) * args.seeds - done) / done
                print(f"\r{task} seed {seed} epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}, "
                      f"{duration(left)} left  ", end="", flush=True)  # fmt: skip
            fits += 1
            rights.append(count_correct(args, probe, val_batches(), column)[0])
            print()
        top1 = torch.tensor(rights) * 100 / len(val)
        low, high = interval95(sum(rights) / len(rights), len(val))
        results[task] = {
            "top1": top1.mean().item(), "spread": top1.std().item() if args.seeds > 1 else None,
            "top1_per_seed": top1.tolist(), "interval95": [low, high], "chance": 100 / classes, "num_val": len(val),
        }  # fmt: skip
        spread = f" ± {top1.std():.1f} over {args.seeds} seeds" if args.seeds > 1 else ""
        print(f"{name} {task}: top-1 {top1.mean():.1f}%{spread} (95% interval {low:.1f} to {high:.1f}, "
              f"chance {100 / classes:.1f}, {len(val)} clips)")  # fmt: skip

    step = load_checkpoint(args.checkpoint)["step"]
    record = {"checkpoint": str(args.checkpoint), "step": step, "weights": part, "tasks": results,
              "seconds": time.perf_counter() - started,
              "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}  # fmt: skip
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_aside(args.out / "results.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    print(f"{args.out / 'results.json'}")


def main():
    args = parse_args()
    try:
        probe_tasks(args)
    except data.BadVideo as error:  # its last line; before it, a worker's traceback
        fail(f"unreadable video: {str(error).splitlines()[-1]}")


if __name__ == "__main__":
    main()
