"""What a clip is and where it comes from: videos and images named in manifests, or the built-in synthetic videos.

A source answers `source.batch(numbers)`: sample number n of a run is determined by (seed, n) alone, so that workers,
world size and restarts change nothing. `clip_loader` runs a source in worker processes. Clips travel as uint8 and are
normalized on the training device by `normalize`.

Letters: B clips, T frames, H and W pixels. A manifest is V-JEPA's: one "path label" per line, separated by a space,
paths relative to the manifest; the label may be left out for pretraining.
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
import re
import signal
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import video
from cli import fail, rank_and_world
from synthetic import synthetic_clips
from video import IMAGE_SUFFIXES, BadVideo, center_crop, random_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA
LIBC = ctypes.CDLL(None)
INTEGER = re.compile(b"-?[0-9]+")


class Batch(NamedTuple):
    clips: torch.Tensor  # (B, 3, T, H, W) uint8
    labels: torch.Tensor  # (B, L) int64: one column per label of the source; -1 where there is none
    skipped: list  # "path: reason" of every unreadable video that another one stands in for (training only)
    names: list  # what each clip is from: a path, or the number of a built-in clip


def normalize(clips, device):
    """uint8 clips (B, 3, T, H, W) -> float32 on `device`, zero mean and unit variance per channel (ImageNet's).

    The constants are not made tensors of the device: to send them there would wait for all that a GPU has still to do.
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
    """The paths that manifests name, a sequence of strings that are read from the files as they are asked for.

    The files are mapped into memory, once for all processes of a node; a list of millions of strings would be copied by
    every one of them. So a manifest in use may be replaced (mv), but not overwritten.
    """

    def __init__(self, parts):
        self.parts = parts  # of each manifest: folder, bytes, where its paths start in them, how long they are
        self.ends = list(itertools.accumulate(len(starts) for _, _, starts, _ in parts))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, line):
        part = bisect.bisect_right(self.ends, range(len(self))[line])
        folder, text, starts, lengths = self.parts[part]
        start = starts[line - self.ends[part]]
        return os.path.join(folder, text[start : start + lengths[line - self.ends[part]]].decode())


def read_manifest(path, num_classes=None):
    """(`Paths`, labels as an int32 array) of a manifest; label -1 where a line has none.

    With num_classes every line must have a label in 0 .. num_classes - 1. OSError, or ValueError naming file and line.
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


def shuffled(place, length, *key):
    """Which of `length` things is at a place of the order that `key` (integers) stands for; every order has each once.

    Computed for this place alone (a Feistel network, walked until it ends within the range): an array of the order
    would have to be made, and held, by every worker.
    """
    half = max(1, (length - 1).bit_length() + 1 >> 1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64).tolist()
    while True:
        left, right = place >> half, place & (1 << half) - 1
        for k in keys:
            mixed = (right ^ k) * 0x9E3779B97F4A7C15 & 2**64 - 1
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 2**64 - 1
            left, right = right, left ^ mixed >> 64 - half
        place = left << half | right
        if place < length:
            return place


class Manifest:
    """Clips of the videos and images in manifests: augmented for training, centerd and in order for evaluation.

    Training (`train=True`): sample n is video n of an endless sequence of shuffled passes, or, with weights, of a
    manifest drawn by weight; the clip's place, a random resized crop and a flip are drawn from (seed, n). With
    clips_per_video k samples nk to nk + k - 1 are of one video, opened once if they are asked for together. An
    unreadable video is replaced by the next one and reported. Evaluation: sample n is line n, middle clip, center crop;
    an unreadable video is a BadVideo error.
    """

    def __init__(self, manifests, num_frames, frame_step, resolution, seed=0, train=True, weights=None,
                 num_classes=None, fps=None, clips_per_video=1):  # fmt: skip
        if weights and len(weights) != len(manifests):
            raise ValueError(f"{len(manifests)} manifests but {len(weights)} weights")
        if weights and (min(weights) < 0 or not 0 < sum(weights) < math.inf):
            raise ValueError(f"weights {weights} are no shares: not negative, and not all 0")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"--fps {fps}: frames per second are positive")
        paths, labels = zip(*(read_manifest(m, num_classes) for m in manifests), strict=True)
        self.paths, self.labels = Paths([part for p in paths for part in p.parts]), np.concatenate(labels)
        self.weights = np.array(weights) / sum(weights) if weights else None
        self.num_frames, self.frame_step, self.fps, self.resolution = num_frames, frame_step, fps, resolution
        self.seed, self.train, self.clips_per_video = seed, train, clips_per_video

    def __len__(self):
        return len(self.paths)

    def line(self, number):
        """Which line of the manifests (counted through) sample `number` is."""
        if not self.train:
            return number
        number //= self.clips_per_video
        if self.weights is not None:
            rng, ends = np.random.default_rng((self.seed, number)), self.paths.ends
            part = rng.choice(len(ends), p=self.weights)
            return int(rng.integers(ends[part - 1] if part else 0, ends[part]))
        turn, place = divmod(number, len(self))
        return shuffled(place, len(self), self.seed, turn)

    def samples(self, numbers):
        """Of samples that share a video, each: clip (3, T, H, W) uint8, label, skipped, path."""
        line, skipped = self.line(numbers[0]), []
        rngs = [np.random.default_rng((self.seed, number, 1)) for number in numbers]
        crops = [functools.partial(random_crop, rng) if self.train else center_crop for rng in rngs]
        while True:
            places = [rng.random() if self.train else 0.5 for rng in rngs]
            now_reading(line)
            try:
                clips = video.read_clips(
                    self.paths[line], self.num_frames, self.frame_step, places, self.fps, crops, self.resolution
                )
                break
            except BadVideo as error:
                skipped.append(str(error))
                if not self.train or len(skipped) == min(10, len(self)):
                    raise
                line = (line + 1) % len(self)
        flips = [self.train and rng.random() < 0.5 for rng in rngs]
        clips = [clip.flip(3) if flip else clip for clip, flip in zip(clips, flips, strict=True)]
        return [(clip.transpose(0, 1), int(self.labels[line]), skipped, self.paths[line]) for clip in clips]

    def batch(self, numbers):
        """`Batch` of the samples with these numbers."""
        groups = itertools.groupby(numbers, lambda number: number // self.clips_per_video)
        samples = [sample for _, group in groups for sample in self.samples(list(group))]
        clips, labels, skipped, paths = zip(*samples, strict=True)
        skipped = list(itertools.chain(*skipped))
        return Batch(torch.stack(clips), torch.tensor(labels).unsqueeze(1), skipped, list(paths))


class Synthetic:
    """The built-in videos as a source of clips: an endless stream of different ones, or `length` of them."""

    def __init__(self, num_frames, resolution, seed=0, length=None):
        self.num_frames, self.resolution, self.seed, self.length = num_frames, resolution, seed, length

    def __len__(self):
        return self.length

    def batch(self, numbers):
        """`Batch` of the clips with these numbers."""
        clips, labels = synthetic_clips(self.seed, torch.tensor(numbers), self.num_frames, self.resolution)
        return Batch(clips, labels, [], [f"built-in {n}" for n in numbers])


# ---------------------------------------------------------------------------------------------------------------------
# the loader


class LoaderFailed(RuntimeError):
    """A worker process died or hangs; the message says which and what it was reading."""


_FETCHING = weakref.WeakSet()  # the loaders of this process


def loader_failed(error):
    """One line about a DataLoader's error, which torch may raise anywhere, and what the workers were reading."""
    read = [f.source.paths[line] for f in _FETCHING for line in f.reading.tolist() if line >= 0]
    where = f"; its workers are reading {', '.join(read)}" if read else ""
    return f"the loader failed: {str(error).strip().splitlines()[-1]}{where}"


class _Fetch(torch.utils.data.Dataset):
    """Lets DataLoader fetch a whole batch with one call."""

    def __init__(self, source, workers):
        self.source = source
        self.reading = torch.full((max(1, workers),), -1).share_memory_()  # the manifest line that each worker reads
        _FETCHING.add(self)

    def __getitems__(self, numbers):
        batch = self.source.batch(numbers)
        if torch.utils.data.get_worker_info():  # the training process would only have to ask for it again
            give_back_memory()
        return batch


def give_back_memory():
    """Return to the system what was freed: glibc keeps it in pieces, and a worker would grow by megabytes a minute."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def now_reading(line):
    """In a loader process: note the manifest line that it turns to, for `loader_failed`."""
    worker = torch.utils.data.get_worker_info()
    if worker:
        worker.dataset.reading[worker.id] = line


def _as_it_is(batch):
    return batch


def _start_worker(_):
    """A signal that asks a whole job to stop is the training process's to answer; it still needs its workers then."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """What Python does at exit, ask workers to end by SIGTERM and wait, would wait for ever for one that hangs."""
    for worker in torch.multiprocessing.active_children():
        worker.kill()


def clip_loader(source, batches, workers=0, pin_memory=False, timeout=0):
    """Yields `Batch`es, one for each list of sample numbers in `batches`, made by worker processes.

    LoaderFailed if a worker dies, or gives nothing for `timeout` seconds (0: waits for ever).
    """
    dataset = _Fetch(source, workers)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin_memory,
        timeout=timeout if workers else 0, worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    try:
        yield from loader
    except RuntimeError as error:
        if not any(word in str(error) for word in ("timed out", "exited unexpectedly", "killed by signal")):
            raise
        raise LoaderFailed(loader_failed(error)) from error


def clip_source(args):
    """The training data that the flags name. Ends the script if a manifest cannot be used."""
    if not args.data:
        if rank_and_world()[0] == 0:
            print("no --data: training on the built-in synthetic videos")
        return Synthetic(args.num_frames, args.resolution, args.seed)
    try:
        return Manifest(
            args.data, args.num_frames, args.frame_step, args.resolution, args.seed, weights=args.data_weights,
            fps=args.fps, clips_per_video=args.clips_per_video,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        fail(f"--data: {error}")


def micro_batch_indices(args):
    """Which of a step's micro-batches, counted over all processes, this process computes."""
    rank, world = rank_and_world()
    return range(rank, args.batch_size // args.micro_batch_size, world)


def training_loader(source, args, start_step):
    """An iterator over the `Batch`es of this process, from start_step to the end of the run."""
    size = args.micro_batch_size
    numbers = (
        range(first, first + size)
        for step in range(start_step, args.steps)
        for first in (step * args.batch_size + g * size for g in micro_batch_indices(args))
    )
    return clip_loader(source, numbers, args.workers, args.device == "cuda", args.loader_timeout)


def next_batch(loader):
    """The loader's next `Batch`; ends the script where there is none to be had."""
    try:
        return next(loader)
    except BadVideo as error:  # its last line; before it, a worker's traceback
        fail(f"unreadable, and nothing stands in: {str(error).splitlines()[-1]}")
    except LoaderFailed as error:
        fail(str(error))
