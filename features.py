"""The tokens that a frozen encoder computes for a data set, as videos of several clips.

A source yields videos as uint8 clips (B, V, S, 3, T, H, W). `Videos` reads files: S segments, spread over the video's
length, times V views, spread along the long side. `BuiltInVideos` makes the built-in clips, with one segment and one
view. `Tokens` encodes a source on the fly, or once for all epochs.

The positions that a clip can have in a video are divided into S equal shares, one per segment. Validation takes the
middle of each share, training draws a position from it. V-JEPA 2 divides the frames instead: a training clip is drawn
from within its S-th of the video or, if that is shorter than a clip, starts at one of S evenly spaced positions. Here
one rule serves all videos: segments may overlap by up to a clip, and those of short videos vary, too.

Letters: B videos, V views, S segments, N tokens of a clip, D width, L labels of a video; T frames, H and W pixels.
"""

import collections
import contextlib
import functools
import itertools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import augment
import data
import video
from cli import Progress, fail, rank_and_world
from model import Encoder, build, load_checkpoint, token_grid

SINGLE_VIEW_SIDE = 224 / 256  # of the short side: V-JEPA 2 scales it to 256 and takes the center 224 x 224
TOKENS_AT_ONCE = 100_000  # most tokens that pass through the encoder, or a probe, at a time
KEPT_BYTES = 2**32  # most memory of a process for the tokens of one source that are computed once


def load(args):
    """Load the frozen encoder that the flags name, in --dtype. Returns (encoder, training step of the checkpoint)."""
    path = Path(args.checkpoint)
    if (path / "config.json").is_file() and not (path / "checkpoint.pt").is_file():
        fail(f"--checkpoint {path} is a Hugging Face folder; convert it with python -m tools.convert from-hf")
    try:
        checkpoint = load_checkpoint(path)
        config = checkpoint["model"]["encoder"]
        if args.untrained:
            torch.manual_seed(args.seed)
            encoder = Encoder(**config)
        elif args.weights not in checkpoint:
            raise ValueError(f"the checkpoint {path} holds no {args.weights}")
        else:
            encoder = build(Encoder, config, checkpoint[args.weights])
    except (OSError, ValueError) as error:
        fail(f"--checkpoint: {error}")
    depth = len(encoder.blocks)
    if args.layers and not 1 <= min(args.layers) <= max(args.layers) <= depth:
        fail(f"--layers {args.layers}: the encoder has blocks 1 to {depth}")
    encoder = encoder.eval().requires_grad_(False).to(args.device, getattr(torch, args.dtype))
    return encoder, checkpoint["step"]


# ---------------------------------------------------------------------------------------------------------------------
# sources


class VideoBatch(NamedTuple):
    """A batch of whole videos."""

    clips: torch.Tensor  # (B, V, S, 3, T, H, W) uint8
    labels: torch.Tensor  # (B, L) int64
    readable: torch.Tensor  # (B,) bool; the clips of an unreadable video are black
    skipped: list  # "path: reason" for each unreadable video
    names: list


class Videos(data.Manifest):
    """Whole videos of a manifest.

    Training, augmentation "vjepa2" or "pretrain": one view; everything random depends on (seed, sample number). vjepa2
    augments every segment by itself (augment.py). pretrain draws one random resized crop for all segments, as in
    pretraining. With --flip, half of the segments (vjepa2) or videos (pretrain) are mirrored. An unreadable video is
    replaced by a random one.

    Evaluation, augmentation "none": sample n is line n. The views of --views, or the centered one only. An unreadable
    video raises BadVideo; with skip_bad, it is returned as not readable.
    """

    def __init__(self, manifests, args, augmentation="none", centered=False, skip_bad=False):
        shape, train = (args.num_frames, args.frame_step, args.resolution), augmentation != "none"
        super().__init__(manifests, *shape, train=train, num_classes=args.num_classes, fps=args.fps)
        self.augmentation, self.flip, self.skip_bad = augmentation, args.flip, skip_bad
        self.segments, self.views = args.segments, 1 if train or centered else args.views
        self.side = SINGLE_VIEW_SIDE if args.views == 1 else 1  # of the views, as a fraction of the short side

    def batch(self, numbers):
        """The `VideoBatch` of the samples with these numbers."""
        clips, labels, readable, skipped, paths = zip(*map(self.sample, numbers), strict=True)
        labels, skipped = torch.tensor(labels).unsqueeze(1), list(itertools.chain(*skipped))
        return VideoBatch(torch.stack(clips), labels, torch.tensor(readable), skipped, list(paths))

    def sample(self, number):
        """One video: (clips (V, S, 3, T, H, W) uint8, label, readable, skipped, path)."""
        skipped = []
        for line in self.lines(number):
            data.note_reading(line)
            try:
                clips = self._training_clips(line, number) if self.train else self._evaluation_clips(line)
                return clips, int(self.labels[line]), True, skipped, self.paths[line]
            except video.BadVideo as error:
                skipped.append(str(error))
        if not self.skip_bad:
            raise video.BadVideo(skipped[-1])
        shape = self.views, self.segments, 3, self.num_frames, self.resolution, self.resolution
        return torch.zeros(shape, dtype=torch.uint8), int(self.labels[line]), False, skipped, self.paths[line]

    def _training_clips(self, line, number):
        """The augmented clips (1, S, 3, T, H, W) of the video on a line, for a sample number."""
        offsets = np.random.default_rng(data.seed_sequence("segment", self.seed, number)).random(self.segments)
        if self.augmentation == "vjepa2":
            keys = [(self.seed, number, segment) for segment in range(self.segments)]
            crops = [functools.partial(augment.random_crop, key) for key in keys]
        else:
            keys = [(self.seed, number)] * self.segments
            crops = [functools.partial(pretraining_crop, key) for key in keys]
        clips = self._read(line, offsets, crops)
        if self.augmentation == "vjepa2":
            clips = [augment.augment(key, clip) for key, clip in zip(keys, clips, strict=True)]
        if self.flip:
            clips = [clip.flip(-1) if is_mirrored(key) else clip for key, clip in zip(keys, clips, strict=True)]
        return torch.stack(clips).transpose(1, 2)[None]

    def _evaluation_clips(self, line):
        """The clips (V, S, 3, T, H, W) of the video on a line."""
        positions = [view / (self.views - 1) for view in range(self.views)] if self.views > 1 else [0.5]
        crops = [functools.partial(square, self.side, position) for position in positions for _ in range(self.segments)]
        clips = self._read(line, np.full(self.segments, 0.5), crops)
        return torch.stack(clips).unflatten(0, (self.views, self.segments)).transpose(2, 3)

    def _read(self, line, offsets, crops):
        """Read the segments at `offsets` in [0, 1] of their shares, once per view: a clip (T, 3, H, W) per crop."""
        places = ((np.arange(self.segments) + offsets) / self.segments).tolist() * self.views
        path, shape = self.paths[line], (self.num_frames, self.frame_step)
        return video.read_clips(path, *shape, places, self.fps, crops, self.resolution)


def square(side, position, height, width):
    """The square box (top, left, height, width) of `side` times the short side, at a position in [0, 1].

    The position is along the long side, 0.5 is the center. Below a side of 1 it holds for both directions.
    """
    length = round(side * min(height, width))
    return round((height - length) * position), round((width - length) * position), length, length


def pretraining_crop(key, height, width):
    """The random box that pretraining would draw; the same for the same key, a tuple, and frame size."""
    return video.random_crop(np.random.default_rng(data.seed_sequence("crop", *key)), height, width)


def is_mirrored(key):
    """Whether --flip mirrors the clips of this key."""
    return np.random.default_rng(data.seed_sequence("flip", *key)).random() < 0.5


class BuiltInVideos(data.Synthetic):
    """The built-in clips as videos of one segment and one view, the same in every epoch."""

    train, views = False, 1

    def batch(self, numbers):
        """The `VideoBatch` of the clips with these numbers."""
        batch = super().batch(numbers)
        readable = torch.ones(len(numbers), dtype=torch.bool)
        return VideoBatch(batch.clips[:, None, None], batch.labels, readable, batch.skipped, batch.names)


# ---------------------------------------------------------------------------------------------------------------------
# tokens


class Stopwatch:
    """Seconds spent in each part of the evaluation."""

    def __init__(self):
        self.seconds = collections.Counter()

    @contextlib.contextmanager
    def measure(self, part):
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - started


class TokenBatch(NamedTuple):
    """The tokens of a micro-batch of videos, on the device."""

    numbers: torch.Tensor  # (B,) sample numbers, on the CPU
    tokens: torch.Tensor  # (B, V, S * N, D)
    labels: torch.Tensor  # (B, L)
    readable: torch.Tensor  # (B,) bool


class Tokens:
    """The frozen encoder's tokens of a source: computed at every `read`, or once by `keep`, if they `fit`."""

    def __init__(self, args, encoder, source, stopwatch):
        self.args, self.encoder, self.source, self.stopwatch = args, encoder, source, stopwatch
        self.kept = None  # this process's share as one TokenBatch
        self.scale = None  # (2, D): mean and standard deviation per channel with which `read` standardizes
        self.num_clips = 0  # encoded so far
        grid = token_grid((args.num_frames, args.resolution, args.resolution), encoder.tubelet_size, encoder.patch_size)
        longer = len(args.layers) if args.layers and args.combine == "tokens" else 1
        wider = len(args.layers) if args.layers and args.combine == "concat" else 1
        self.shape = args.segments * math.prod(grid) * longer, encoder.width * wider  # of a view
        self.clips_at_once = max(1, TOKENS_AT_ONCE // math.prod(grid))
        self.videos_at_once = max(1, TOKENS_AT_ONCE // (self.shape[0] * source.views))

    def fit(self):
        """Whether this process's share of the tokens takes at most KEPT_BYTES."""
        count = math.ceil(len(self.source) / rank_and_world()[1]) * self.source.views * math.prod(self.shape)
        return count * getattr(torch, self.args.dtype).itemsize <= KEPT_BYTES

    def read(self, batches):
        """For each batch of sample numbers, yield an iterator over this process's share in `TokenBatch`es."""
        rank, world = rank_and_world()
        if self.kept is not None:  # every world-th sample
            for batch in batches:
                shares = batch[batch % world == rank].split(self.videos_at_once)
                yield (self._standardize(self._find(numbers)) for numbers in shares if len(numbers))
            return
        shares = [batch[rank::world].split(self.videos_at_once) for batch in batches]
        shares = [[numbers for numbers in share if len(numbers)] for share in shares]  # a small batch may leave none
        number_lists = [numbers.tolist() for numbers in itertools.chain(*shares)]
        loader = data.clip_loader(self.source, number_lists, self.args.workers)
        for share in shares:
            yield (self._standardize(self._encode_next(loader, numbers)) for numbers in share)

    def _find(self, numbers):
        """The kept tokens of these samples."""
        rows = numbers // rank_and_world()[1]
        return TokenBatch(numbers, self.kept.tokens[rows], self.kept.labels[rows], self.kept.readable[rows])

    def _encode_next(self, loader, numbers):
        """Take the next batch, whose sample numbers these are, from the loader and encode it."""
        with self.stopwatch.measure("loader"):
            batch = next(loader)
        consequence = "replaced by another training video" if self.source.train else "counts as a miss"
        for reason in batch.skipped:
            print(f"unreadable, {consequence}: {reason}", file=sys.stderr)
        with self.stopwatch.measure("encoder"):
            labels, readable = batch.labels.to(self.args.device), batch.readable.to(self.args.device)
            return TokenBatch(numbers, self.encode(batch.clips), labels, readable)

    def encode(self, clips):
        """uint8 clips (B, V, S, 3, T, H, W) -> tokens (B, V, S * N, D)."""
        num_videos, num_views = clips.shape[:2]
        clips, tokens = clips.flatten(0, 2), []
        for part in clips.split(self.clips_at_once):
            part = data.normalize(part, self.args.device).to(getattr(torch, self.args.dtype))
            if self.args.single_frame:
                middle = part.shape[2] // 2
                part = part[:, :, middle : middle + 1].expand_as(part)
            with torch.inference_mode():
                tokens.append(self._features(part))
        self.num_clips += len(clips)
        # A clone outside inference mode may be saved for the backward pass of the probes.
        return torch.cat(tokens).clone().view(num_videos, num_views, *self.shape)

    def _features(self, clips):
        """Tokens (B, N, D) of normalized clips: the last block's, or those of --layers as --combine says."""
        if not self.args.layers:
            return self.encoder(clips)
        outputs = self.encoder.intermediate(clips, self.args.layers)
        if self.args.combine == "mean":
            return torch.stack(outputs).mean(0)
        return torch.cat(outputs, dim=1 if self.args.combine == "tokens" else 2)

    def _standardize(self, batch):
        if self.scale is None:
            return batch
        mean, std = self.scale
        return batch._replace(tokens=((batch.tokens - mean) / std).to(batch.tokens.dtype))

    def keep(self, description):
        """Compute this process's share of the tokens now; from then on, `read` takes them from memory."""
        rank, world = rank_and_world()
        numbers = torch.arange(len(self.source))
        mine = numbers[rank::world]
        shape = len(mine), self.source.views, *self.shape
        tokens = torch.empty(shape, dtype=getattr(torch, self.args.dtype), device=self.args.device)
        labels, readable, progress, done = [], [], Progress(silent=rank > 0), 0
        for batch in itertools.chain(*self.read(numbers.split(self.videos_at_once * world))):
            tokens[done : done + len(batch.tokens)] = batch.tokens
            labels.append(batch.labels)
            readable.append(batch.readable)
            done += len(batch.tokens)
            text = f"{description} features {done}/{len(mine)}, {progress.left(done, len(mine))}"
            progress.show(text, last=done == len(mine))
        if len(mine):
            self.kept = TokenBatch(mine, tokens, torch.cat(labels), torch.cat(readable))
        else:  # fewer samples than processes
            self.kept = TokenBatch(mine, tokens, torch.empty(0, 1), torch.empty(0))


def say(*words, **options):
    """print, in the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, **options, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# over all processes


def all_reduce(tensor):
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def moments(tokens, numbers):
    """Mean and standard deviation per channel, (2, D), of the tokens of the samples `numbers`."""
    sums = torch.zeros(3, tokens.shape[1], dtype=torch.float64, device=tokens.args.device)
    for batch in itertools.chain(*tokens.read([numbers])):
        x = batch.tokens.flatten(0, -2).double()
        sums += torch.stack((x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))))
    total, squares, count = all_reduce(sums)
    mean = total / count
    return torch.stack((mean, ((squares - count * mean**2) / (count - 1)).clamp(min=0).sqrt() + 1e-6)).float()


def collect(tokens, column, function, shape, dtype):
    """Apply `function` to the tokens (B, V, S * N, D) of all M videos of a source, each in only one process.

    Returns the results (M, *shape), which `function` returns as (B, *shape); the labels in one column, (M,); and
    which videos are readable, (M,) bool. All in the source's order, on the CPU, the same in every process.
    """
    length, device = len(tokens.source), tokens.args.device
    results = torch.zeros(length, *shape, dtype=dtype, device=device)
    labels, readable, counts = torch.zeros(3, length, dtype=torch.long, device=device)
    progress = Progress(silent=rank_and_world()[0] > 0)
    for batch in itertools.chain(*tokens.read([torch.arange(length)])):
        with tokens.stopwatch.measure("probes"), torch.inference_mode():
            values = function(batch.tokens).to(dtype)
        rows = batch.numbers.to(device)
        results[rows], labels[rows], readable[rows] = values, batch.labels[:, column], batch.readable.long()
        counts[rows] += 1
        progress.show(f"evaluated {int(batch.numbers[-1]) + 1} of {length} videos")
    progress.clear()
    for tensor in (results, labels, readable, counts):
        all_reduce(tensor)
    assert (counts == 1).all(), "every video counts once"
    return results.cpu(), labels.cpu(), readable.cpu().bool()
