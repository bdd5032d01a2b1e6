"""A frozen encoder's tokens of a data set."""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import video
from cli import duration, fail, rank_and_world, write_aside
from model import Encoder, load_checkpoint, load_encoder, token_grid

TOKENS_AT_ONCE = 100_000  # that go through the encoder, or a probe, at a time


def load(args):
    """The frozen encoder that the flags name, in the compute dtype."""
    if (Path(args.checkpoint) / "config.json").is_file() and not (Path(args.checkpoint) / "checkpoint.pt").is_file():
        fail(f"--checkpoint {args.checkpoint} is a Hugging Face folder: python convert.py from-hf makes it one of ours")
    try:
        if args.untrained:
            torch.manual_seed(args.seed)
            encoder = Encoder(**load_checkpoint(args.checkpoint)["model"]["encoder"]).eval()
        else:
            encoder = load_encoder(args.checkpoint, args.weights)
    except (OSError, ValueError) as error:
        fail(f"--checkpoint: {error}")
    depth = len(encoder.blocks)
    if args.layers and not 1 <= min(args.layers) <= max(args.layers) <= depth:
        fail(f"--layers {args.layers}: the encoder has blocks 1 to {depth}")
    return encoder.requires_grad_(False).to(args.device, getattr(torch, args.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# videos -> tokens


class Videos(data.Manifest):
    """Whole videos for evaluation: sample n is (V, S, 3, T, H, W), from the places that the top of this file describes.

    Training (`train=True`): V is 1; an unreadable video is replaced by the next one, with its label, and reported.
    Validation: sample n is line n. An unreadable video is a BadVideo error, or with skip_bad a black one whose label
    is given as -1 - label, to be counted as a miss.
    """

    def __init__(self, manifests, args, train):
        super().__init__(manifests, args.num_frames, args.frame_step, args.resolution, train=train,
                         num_classes=args.num_classes, fps=args.fps)  # fmt: skip
        self.segments, self.views, self.skip_bad = args.segments, 1 if train else args.views, args.skip_bad
        self.flip = args.flip

    def samples(self, numbers):
        """Of one video: views (V, S, 3, T, H, W) uint8, label, skipped, path."""
        (number,), skipped = numbers, []
        line, rng = self.line(number), np.random.default_rng((self.seed, number, 1))
        if self.train:
            crops = [functools.cache(functools.partial(video.random_crop, rng))]  # cache: one box for all clips
        else:
            crops = [functools.partial(view_crop, view, self.views) for view in range(self.views)]
        while True:
            shares = rng.random(self.segments) if self.train else np.full(self.segments, 0.5)
            places = ((np.arange(self.segments) + shares) / self.segments).tolist()
            data.now_reading(line)
            try:
                clips = video.read_clips(
                    self.paths[line], self.num_frames, self.frame_step, places * len(crops), self.fps,
                    [crop for crop in crops for _ in places], self.resolution,
                )  # fmt: skip
                break
            except video.BadVideo as error:
                skipped.append(str(error))
                if not self.train and self.skip_bad:
                    black = torch.zeros(self.views, self.segments, 3, self.num_frames, *2 * [self.resolution])
                    return [(black.byte(), -1 - int(self.labels[line]), skipped, self.paths[line])]
                if not self.train or len(skipped) == min(10, len(self)):
                    raise
                line = (line + 1) % len(self)
        views = torch.stack(clips).unflatten(0, (self.views, self.segments)).transpose(2, 3)
        flip = self.train and self.flip and rng.random() < 0.5
        return [(views.flip(5) if flip else views, int(self.labels[line]), skipped, self.paths[line])]


def view_crop(view, views, height, width):
    """Top, left, height and width of the square that is view number `view` of so many, spread along the long side."""
    side, share = min(height, width), view / (views - 1) if views > 1 else 0.5
    return round((height - side) * share), round((width - side) * share), side, side


class Stopwatch(collections.Counter):
    """Seconds spent in each part, and clips encoded."""

    @contextlib.contextmanager
    def __call__(self, part):
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[part] += time.perf_counter() - started


class Tokens:
    """The frozen encoder's tokens of a source, computed as they are asked for or, after `keep`, once.

    read(batches)  batches of sample numbers -> for each an iterator over this process's part of it, in micro-batches:
                   (numbers (B,), tokens (B, V, S * N, D), labels (B, L)), on the device
    """

    def __init__(self, args, encoder, source, spent):
        self.args, self.encoder, self.source, self.spent, self.kept = args, encoder, source, spent, None
        grid = token_grid((args.num_frames, args.resolution, args.resolution), encoder.tubelet_size, encoder.patch_size)
        self.shape = (
            args.segments * math.prod(grid),
            encoder.width * (len(args.layers) if args.layers and args.combine == "concat" else 1),
        )
        views = getattr(source, "views", 1)
        self.clips_at_once = max(1, TOKENS_AT_ONCE // math.prod(grid))
        self.at_once = max(1, TOKENS_AT_ONCE // (self.shape[0] * views))

    def encode(self, clips):
        """uint8 (B, V, S, 3, T, H, W), or (B, 3, T, H, W) of one view and segment -> tokens (B, V, S * N, D)."""
        num_videos, clips = len(clips), clips.reshape(-1, *clips.shape[-4:])
        parts = []
        for part in clips.split(self.clips_at_once):
            part = data.normalize(part, self.args.device).to(getattr(torch, self.args.dtype))
            if self.args.single_frame:
                middle = part.shape[2] // 2
                part = part[:, :, middle : middle + 1].expand_as(part)
            with torch.inference_mode():
                parts.append(self.features(part))
        self.spent["clips"] += len(clips)
        # Out of inference mode, so that the probes' backward pass may save them.
        return torch.cat(parts).clone().view(num_videos, -1, *self.shape)

    def features(self, clips):
        """The last block's tokens (M, N, D), or those of --layers, each normed, side by side or averaged."""
        if not self.args.layers:
            return self.encoder(clips)
        found, blocks = [], [self.encoder.blocks[n - 1] for n in sorted(self.args.layers)]
        hooks = [block.register_forward_hook(lambda _, __, x: found.append(self.encoder.norm(x))) for block in blocks]
        self.encoder(clips)
        for hook in hooks:
            hook.remove()
        return torch.cat(found, dim=-1) if self.args.combine == "concat" else torch.stack(found).mean(0)

    def read(self, batches):
        rank, world = rank_and_world()
        if self.kept:
            tokens, labels = self.kept
            for batch in batches:  # a process keeps every world-th sample
                mine = batch[batch % world == rank].split(self.at_once)
                yield (
                    (ids, tokens[ids // world].to(self.args.device), labels[ids // world]) for ids in mine if len(ids)
                )
            return
        parts = [batch[rank::world].split(self.at_once) for batch in batches]
        parts = [[part for part in batch if len(part)] for batch in parts]  # of a small batch some get nothing
        loader = data.clip_loader(self.source, [p.tolist() for p in itertools.chain(*parts)], self.args.workers)
        for batch in parts:
            yield (self._next(loader, part) for part in batch)

    def _next(self, loader, ids):
        with self.spent("loader"):
            batch = next(loader)
        for reason in batch.skipped:
            stands_in = "another training video stands in" if getattr(self.source, "train", False) else "a miss"
            print(f"unreadable, {stands_in}: {reason}", file=sys.stderr)
        with self.spent("encoder"):
            return ids, self.encode(batch.clips), batch.labels.to(self.args.device)

    def keep(self, what):
        """Compute this process's samples' features now, into memory, or into --cache, or find them there."""
        rank, world = rank_and_world()
        ids = torch.arange(len(self.source))
        shape, dtype = (len(ids[rank::world]), 1, *self.shape), getattr(torch, self.args.dtype)
        file = None
        if self.args.cache:
            key = hashlib.sha256(f"{fingerprint(self.args, self.encoder, self.source)} {rank} {world}".encode())
            file = self.args.cache / f"{key.hexdigest()[:32]}.features"
            whole = file.is_file() and file.stat().st_size == math.prod(shape) * dtype.itemsize
            if whole and file.with_suffix(".labels").is_file():  # written last
                labels = torch.load(file.with_suffix(".labels"), weights_only=True)
                tokens = torch.from_file(str(file), size=math.prod(shape), dtype=dtype)
                self.kept = tokens.view(shape), labels.to(self.args.device)
                return print(f"{what} features: {file}")
            file.parent.mkdir(parents=True, exist_ok=True)
            tokens = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        else:
            tokens = torch.empty(shape, dtype=dtype, device=self.args.device)
        labels, started, done = [], time.perf_counter(), 0
        for _, found, label in itertools.chain(*self.read(ids.split(self.at_once * world))):
            tokens[done : done + len(found)] = found
            labels.append(label)
            done += len(found)
            left = (time.perf_counter() - started) * (len(tokens) - done) / done
            say(f"\r{what} features {done}/{len(tokens)}, {duration(left)} left  ", end="")
        say("")
        self.kept = tokens, torch.cat(labels) if labels else torch.empty(0, 1, dtype=torch.long)
        if file:
            write_aside(file.with_suffix(".labels"), lambda path: torch.save(self.kept[1].cpu(), path))


def say(*words, **how):
    if rank_and_world()[0] == 0:
        print(*words, **how, flush=True)


def fingerprint(args, encoder, source):
    """sha256 of all that the features of a source depend on: weights, clips (files by size and time), flags, code."""
    found = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    how = (args.num_frames, args.frame_step, args.fps, args.resolution, args.segments, args.views, args.single_frame,
           args.layers, args.combine, args.dtype, args.augment)  # fmt: skip
    found.update(json.dumps([encoder.config, how, torch.__version__]).encode())
    code = [Path(module.__file__) for module in (data, sys.modules[Encoder.__module__])] + [Path(__file__)]
    found.update(b"".join(path.read_bytes() for path in code))
    if not isinstance(source, Videos):
        found.update(f"{source.seed} {source.length}".encode())
    for line in range(len(source) if isinstance(source, Videos) else 0):
        path, label = Path(source.paths[line]), source.labels[line]
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        found.update(f"{path.absolute()} {label} {stats}".encode())
    return found.hexdigest()


def moments(args, tokens, batch):
    """Mean and standard deviation per channel, (2, D), of the tokens of a batch of sample numbers."""
    sums = torch.zeros(3, tokens.shape[1], dtype=torch.float64, device=args.device)
    for _, x, _ in itertools.chain(*tokens.read([batch])):
        x = x.flatten(0, -2).double()
        sums += torch.stack((x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))))
    total, squares, count = all_reduce(sums)
    mean = total / count
    return torch.stack((mean, ((squares - count * mean**2) / (count - 1)).clamp(min=0).sqrt() + 1e-6)).float()


def all_reduce(tensor):
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def collect(tokens, function, shape, dtype=torch.long):
    """function(tokens, labels) -> (B, *shape) of all videos of a source in order, each from just one process."""
    found = torch.zeros(len(tokens.source), *shape, dtype=dtype, device=tokens.args.device)
    counted = torch.zeros(len(found), dtype=torch.long, device=tokens.args.device)
    shown = time.perf_counter()
    for ids, x, labels in itertools.chain(*tokens.read([torch.arange(len(found))])):
        if time.perf_counter() > shown + 1:
            shown = time.perf_counter()
            say(f"\revaluating video {ids[0]}/{len(found)}  ", end="")
        with tokens.spent("probes"), torch.inference_mode():
            result = function(x, labels).to(dtype)
        ids = ids.to(found.device)
        found[ids] = result
        counted[ids] += 1
    assert (all_reduce(counted) == 1).all(), "every video counts once"
    return all_reduce(found).cpu()
