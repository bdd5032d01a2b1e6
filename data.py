"""Sources of clips, and the loader that runs them in worker processes.

A source has `batch(numbers)`: sample number n of a run depends only on (seed, n), so the number of workers or processes
and restarts change nothing. `Manifest` reads videos and images, `Synthetic` makes the built-in videos. Clips travel as
uint8 and are normalized on the training device (`normalize`).

Letters: B clips, T frames, H and W pixels. A manifest is V-JEPA's: one "path label" per line, separated by a space,
with paths relative to the manifest. Pretraining needs no labels.
"""

import array
import atexit
import bisect
import ctypes
import functools
import itertools
import math
import mmap
import os
import pickle
import re
import signal
import time
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import video
from cli import fail, rank_and_world, write_lines
from synthetic import synthetic_clips
from video import IMAGE_SUFFIXES, BadVideo, center_crop, random_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA
LIBC = ctypes.CDLL(None)
INTEGER = re.compile(b"-?[0-9]+")
MAX_REPLACEMENTS = 1000  # give up on a sample after this many unreadable replacements


def seed_sequence(purpose, *key):
    """The seed of an independent random stream: for a purpose (a string) and a key of non-negative integers.

    SeedSequence pads keys with zeros, so that without the length (seed, step) and (seed, step, 0) would be one stream.
    """
    return np.random.SeedSequence((zlib.crc32(purpose.encode()), len(key), *key))


def stream_seed(purpose, *key):
    """An integer seed (62 bits) for an independent random stream, for generators that take a single number."""
    return int(seed_sequence(purpose, *key).generate_state(1, np.uint64)[0] >> np.uint64(2))


class Batch(NamedTuple):
    clips: torch.Tensor  # (B, 3, T, H, W) uint8
    labels: torch.Tensor  # (B, L) int64, one column per label of the source; -1: no label
    skipped: list  # "path: reason" for each unreadable video that was tried (training only)
    num_replaced: int  # clips that come from another video because theirs is unreadable
    names: list  # where each clip comes from: a path, or the number of a built-in clip
    waited: float = 0.0  # seconds that the loader's user waited for it


def normalize(clips, device):
    """uint8 clips (B, 3, T, H, W) -> float32 on `device`, normalized with ImageNet's mean and standard deviation.

    The constants stay Python numbers: copying them to a GPU as tensors would wait for all work queued there.
    """
    clips = clips.to(device, non_blocking=True).float()  # a copy
    for channel, mean, std in zip(clips.unbind(1), MEAN, STD, strict=True):
        channel.sub_(255 * mean).div_(255 * std)
    return clips


def denormalize(clips):
    """The inverse of `normalize`, up to rounding: float clips (B, 3, T, H, W) -> uint8."""
    mean, std = (torch.tensor(x, device=clips.device).view(3, 1, 1, 1) for x in (MEAN, STD))
    return ((clips * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


class Paths:
    """The paths of one or more manifests: a sequence of strings, read from the files on access.

    The files are memory-mapped, once for all processes of a node, where each process would copy a list of millions of
    strings. So replace a manifest that is in use with `mv`; never overwrite it.
    """

    def __init__(self, parts):
        self.parts = parts  # per manifest: folder, bytes, start and length of each path in these bytes
        self.ends = list(itertools.accumulate(len(starts) for _, _, starts, _ in parts))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, line):
        part = bisect.bisect_right(self.ends, range(len(self))[line])
        folder, text, starts, lengths = self.parts[part]
        start = starts[line - self.ends[part]]
        return os.path.join(folder, text[start : start + lengths[line - self.ends[part]]].decode())


def read_manifest(path, num_classes=None):
    """Read a manifest: (`Paths`, int32 array of labels); the label is -1 where a line has none.

    With num_classes, each line needs a label from 0 to num_classes - 1. OSError; ValueError naming the file and line.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES | {".mp4", ".webm", ".mkv", ".avi", ".mov"}:
        raise ValueError(f"{path} is a video or an image; --data takes manifests: text files of 'path label' lines")
    starts, lengths, labels = array.array("q"), array.array("i"), array.array("i")
    with open(path, "rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        end = 0
        for number, raw in enumerate(file, start=1):
            start, end = end, end + len(raw)
            line = raw.strip()
            if not line:
                continue
            name, _, label = line.rpartition(b" ")
            if not name or not INTEGER.fullmatch(label):
                name, label = line, b"-1"
            name = name.strip().strip(b'"')
            try:
                name.isascii() or name.decode()
                labels.append(int(label))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not a text file; a manifest has lines of 'path label'") from error
            except OverflowError as error:
                raise ValueError(f"{path} line {number}: the label is too large: {line.decode()!r}") from error
            if num_classes and not 0 <= labels[-1] < num_classes:
                raise ValueError(
                    f"{path} line {number}: a label from 0 to {num_classes - 1} is needed: {line.decode()!r}"
                )
            starts.append(start + raw.index(name))
            lengths.append(len(name))
    if not starts:
        raise ValueError(f"{path} names no videos")
    return Paths([(str(path.parent), text, starts, lengths)]), np.frombuffer(labels, np.int32)


def write_manifest(path, lines):
    """Write a list of (path, label) as a manifest. Ends the script if that fails."""
    write_lines(path, [f"{name} {label}" for name, label in lines])
    print(f"{path}: {len(lines):,} lines")


def shuffled(position, length, seed, epoch):
    """The element at a position of a random permutation of range(length), which `seed` and `epoch` determine.

    Computed for one position at a time, so that no worker has to hold the whole permutation. A Feistel network permutes
    the next larger power of 4; applying it until the result is below `length` restricts it to the range.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)  # bits of each half of a number
    round_keys = seed_sequence("order", seed, epoch).generate_state(6, np.uint64).tolist()
    while True:
        left, right = position >> half, position & ((1 << half) - 1)
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) >> (64 - half))
        position = (left << half) | right
        if position < length:
            return position


def _mix(x):
    """Scramble a 64-bit integer (two rounds of splitmix64's multiply and xor-shift)."""
    x = (x * 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 29)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return x ^ (x >> 29)


class Manifest:
    """Clips of the videos and images in manifests: augmented for training, center crops in order for evaluation.

    Training (train=True): an endless sequence of shuffled passes over the videos, or, with weights, of videos from a
    manifest drawn by weight. The position of a clip in its video, its random resized crop and its flip depend on
    (seed, sample number). With clips_per_video = k, samples nk to nk + k - 1 come from one video, which is opened once.
    An unreadable video is replaced by a random one and reported in `Batch.skipped`.

    Evaluation: sample n is the middle clip of line n, center-cropped. An unreadable video raises BadVideo.
    """

    def __init__(
        self,
        manifests,
        num_frames,
        frame_step,
        resolution,
        seed=0,
        train=True,
        weights=None,
        num_classes=None,
        fps=None,
        clips_per_video=1,
    ):
        if weights and len(weights) != len(manifests):
            raise ValueError(f"{len(manifests)} manifests but {len(weights)} weights")
        if weights and (min(weights) < 0 or not 0 < sum(weights) < math.inf):
            raise ValueError(f"weights {weights}: none may be negative, and not all may be 0")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"--fps {fps}: must be positive")
        paths, labels = zip(*(read_manifest(m, num_classes) for m in manifests), strict=True)
        self.paths, self.labels = Paths([part for p in paths for part in p.parts]), np.concatenate(labels)
        self.weights = np.array(weights) / sum(weights) if weights else None
        self.num_frames, self.frame_step, self.fps, self.resolution = num_frames, frame_step, fps, resolution
        self.seed, self.train, self.clips_per_video = seed, train, clips_per_video

    def __len__(self):
        return len(self.paths)

    def line(self, number):
        """The line of sample `number`, counted over all manifests."""
        if not self.train:
            return number
        number //= self.clips_per_video
        if self.weights is not None:
            rng, ends = np.random.default_rng(seed_sequence("mixture", self.seed, number)), self.paths.ends
            part = rng.choice(len(ends), p=self.weights)
            return int(rng.integers(ends[part - 1] if part else 0, ends[part]))
        epoch, position = divmod(number, len(self))
        return shuffled(position, len(self), self.seed, epoch)

    def replacement(self, number, attempt):
        """The line that replaces sample `number` after `attempt` earlier replacements: that of a random sample.

        Not the next line, because a missing folder is a block of unreadable lines.
        """
        video_number = number // self.clips_per_video  # the same for all clips of a video
        return self.line(stream_seed("replacement", self.seed, video_number, attempt))

    def lines(self, number):
        """The line of sample `number`; for training, then those of its replacements, each line once."""
        tried = {self.line(number)}
        yield from tried
        for attempt in range(MAX_REPLACEMENTS if self.train else 0):
            line = self.replacement(number, attempt)
            if line not in tried:
                tried.add(line)
                yield line
            if len(tried) == len(self):
                return

    def samples(self, numbers):
        """Samples of one video: [(clip (3, T, H, W) uint8, label, skipped, path), ...]."""
        skipped = []
        rngs = [np.random.default_rng(seed_sequence("crop", self.seed, number)) for number in numbers]
        crops = [functools.partial(random_crop, rng) if self.train else center_crop for rng in rngs]
        for line in self.lines(numbers[0]):
            places = [rng.random() if self.train else 0.5 for rng in rngs]
            note_reading(line)
            try:
                clips = video.read_clips(
                    self.paths[line], self.num_frames, self.frame_step, places, self.fps, crops, self.resolution
                )
                break
            except BadVideo as error:
                skipped.append(str(error))
        else:
            raise BadVideo(skipped[-1])
        flips = [self.train and rng.random() < 0.5 for rng in rngs]
        clips = [clip.flip(3) if flip else clip for clip, flip in zip(clips, flips, strict=True)]
        return [(clip.transpose(0, 1), int(self.labels[line]), skipped, self.paths[line]) for clip in clips]

    def batch(self, numbers):
        """The `Batch` of the samples with these numbers."""
        groups = itertools.groupby(numbers, lambda number: number // self.clips_per_video)
        samples = [sample for _, group in groups for sample in self.samples(list(group))]
        clips, labels, skipped, paths = zip(*samples, strict=True)
        num_replaced, skipped = sum(map(bool, skipped)), list(itertools.chain(*skipped))
        return Batch(torch.stack(clips), torch.tensor(labels).unsqueeze(1), skipped, num_replaced, list(paths))


class Synthetic:
    """The built-in videos as a source: an endless stream of different clips, or `length` of them."""

    def __init__(self, num_frames, resolution, seed=0, length=None):
        self.num_frames, self.resolution, self.seed, self.length = num_frames, resolution, seed, length

    def __len__(self):
        return self.length

    def batch(self, numbers):
        """The `Batch` of the clips with these numbers."""
        clips, labels = synthetic_clips(self.seed, torch.tensor(numbers), self.num_frames, self.resolution)
        return Batch(clips, labels, [], 0, [f"built-in {n}" for n in numbers])


# ---------------------------------------------------------------------------------------------------------------------
# the loader


class LoaderFailed(RuntimeError):
    """A worker process died or hangs; the message names the files that the workers were reading."""


_DATASETS = weakref.WeakSet()  # of the loaders of this process


class _Batches(torch.utils.data.Dataset):
    """Lets DataLoader fetch a whole batch from a source with one call."""

    def __init__(self, source, workers):
        self.source = source
        self.reading = torch.full((max(1, workers),), -1).share_memory_()  # the manifest line each worker is reading
        _DATASETS.add(self)

    def __getitems__(self, numbers):
        batch = self.source.batch(numbers)
        if torch.utils.data.get_worker_info():  # the training process would need that memory again at once
            release_memory()
        return batch


def release_memory():
    """Return freed memory to the system: glibc keeps fragments, and a worker would grow by megabytes per minute."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def note_reading(line):
    """In a worker, record the manifest line it is about to read, for `_failure`."""
    worker = torch.utils.data.get_worker_info()
    if worker:
        worker.dataset.reading[worker.id] = line


def _failure(error):
    """One line for an error of DataLoader: what happened, and which files its workers were reading."""
    reason = (str(error).strip().splitlines() or [f"a worker process died ({type(error).__name__})"])[-1]
    files = [d.source.paths[line] for d in _DATASETS for line in d.reading.tolist() if line >= 0]
    where = f"; its workers are reading {', '.join(files)}" if files else ""
    return f"the loader failed: {reason}{where}"


def _is_dead_worker(error):
    """Whether torch raised this error because a loader worker died or hangs."""
    signs = ("timed out", "exited unexpectedly", "killed by signal")
    message = str(error)
    return isinstance(error, RuntimeError) and message.startswith("DataLoader ") and any(s in message for s in signs)


def _identity(batch):
    return batch


def _start_worker(_):
    """Leave termination signals to the training process, which still needs its workers to finish the step."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kill the workers. At exit, Python would send them SIGTERM and wait, forever if one hangs."""
    for worker in torch.multiprocessing.active_children():
        worker.kill()


_awaited = []  # the worker processes of the loader that the main thread is waiting for


def _raise_if_worker_died(*_):
    """SIGCHLD handler: raise a RuntimeError if a worker died, but only while waiting for its loader's next batch.

    torch's own handler raises it anywhere in the main thread, for example in an `except` clause or during a save.
    """
    for worker in _awaited:
        code = worker.exitcode  # None: alive, 0: finished
        if code:
            how = f"killed by signal {-code}" if code < 0 else f"exited unexpectedly with status {code}"
            raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}")


def _await_batch(batches):
    """The next batch of a DataLoader's iterator, None at the end. RuntimeError if a worker died since the last one."""
    try:
        _awaited.extend(getattr(batches, "_workers", []))
        _raise_if_worker_died()
        return next(batches, None)
    finally:
        _awaited.clear()


def clip_loader(source, batches, workers=0, pin_memory=False, timeout=0):
    """Yield a `Batch` for each list of sample numbers in `batches`, made by worker processes.

    LoaderFailed if a worker dies, or if a batch takes longer than `timeout` seconds (0: wait forever).
    """
    loader = torch.utils.data.DataLoader(
        _Batches(source, workers),
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=timeout if workers else 0,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )
    try:
        loaded = iter(loader)  # starts the workers
        if workers:
            signal.signal(signal.SIGCHLD, _raise_if_worker_died)
        while True:
            started = time.perf_counter()
            batch = _await_batch(loaded)
            if batch is None:
                return
            yield batch._replace(waited=time.perf_counter() - started) if isinstance(batch, Batch) else batch
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        # A worker that dies while it hands over a tensor breaks the connection: EOFError, ConnectionResetError,
        # FileNotFoundError, ... Exceptions that a living worker raises say so in their message.
        raised_by_worker = not workers or "in DataLoader worker process" in str(error)
        if raised_by_worker or (isinstance(error, RuntimeError) and not _is_dead_worker(error)):
            raise
        message = _failure(error)
        end_workers()  # torch would wait for a hanging worker
        raise LoaderFailed(message) from error


# ---------------------------------------------------------------------------------------------------------------------
# the training data of a run


def clip_source(args):
    """The training data that the flags name. Ends the script if a manifest cannot be read."""
    seed = stream_seed("data", args.stage, args.seed)
    if not args.data:
        if rank_and_world()[0] == 0:
            print("no --data: training on the built-in synthetic videos")
        return Synthetic(args.num_frames, args.resolution, seed)
    try:
        return Manifest(
            args.data,
            args.num_frames,
            args.frame_step,
            args.resolution,
            seed,
            weights=args.data_weights,
            fps=args.fps,
        )
    except (OSError, ValueError) as error:
        fail(f"--data: {error}")


def micro_batch_indices(args):
    """The micro-batches of a step that this process computes, numbered over all processes."""
    rank, world = rank_and_world()
    return range(rank, args.batch_size // args.micro_batch_size, world)


def training_loader(source, args, start_step):
    """An iterator over the `Batch`es of this process from start_step to the end of the run."""
    size = args.micro_batch_size
    numbers = (
        range(first, first + size)
        for step in range(start_step, args.steps)
        for first in (step * args.batch_size + g * size for g in micro_batch_indices(args))
    )
    return clip_loader(source, numbers, args.workers, args.device == "cuda", timeout=600)
