"""Sources of clips, and the loader that runs them in worker processes.

A source has `batch(numbers)`: sample number n of a run depends only on (seed, n), so the number of workers or processes
and restarts change nothing. `Manifest` reads videos and images, `Synthetic` makes the built-in videos. Clips travel as
uint8 and are normalized on the training device (`normalize`).

Letters: B clips, T frames, H and W pixels. A manifest is V-JEPA's: one "path label" per line, separated by a space,
with paths relative to the manifest. Pretraining needs no labels.
"""

import collections
import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing.reduction
import os
import pickle
import re
import signal
import time
import traceback
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import video
from synthetic import synthetic_clips
from video import BadVideo, random_crop, square_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA
INTEGER = re.compile("-?[0-9]{1,9}")
OTHER_FORMAT = re.compile(r'\.[a-z]\w{1,3}"?[,;\t ]\s*-?[0-9.]*$', re.IGNORECASE)  # "v.mp4,1" or "v.mp4 300"
MAX_REPLACEMENTS = 1000  # give up on a sample after this many unreadable replacements
TIMEOUT = 600  # seconds to wait for a loader worker


def seed_sequence(purpose, *key):
    """The seed of an independent random stream: for a purpose (a string) and a key of non-negative integers."""
    # Without the length, the keys (1,) and (1, 0) would give the same stream: SeedSequence pads with zeros.
    return np.random.SeedSequence((zlib.crc32(purpose.encode()), len(key), *key))


def stream_seed(purpose, *key):
    """The same as an integer (62 bits), for generators that take a single number."""
    return int(seed_sequence(purpose, *key).generate_state(1, np.uint64)[0] >> np.uint64(2))


class Batch(NamedTuple):
    clips: torch.Tensor  # (B, 3, T, H, W) uint8
    labels: torch.Tensor  # (B, L) int64, one column per label of the source; -1: no label
    skipped: list  # "path: reason" for each unreadable video that was tried (training only)
    num_replaced: int  # clips that come from another video because theirs is unreadable
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


# ---------------------------------------------------------------------------------------------------------------------
# manifests and sources


def read_manifest(path, num_classes=None):
    """Read a manifest: its paths and their labels, two lists; the label is -1 where a line has none.

    With num_classes, each line needs a label from 0 to num_classes - 1. OSError; ValueError naming the file and line.
    """
    paths, labels, folder = [], [], f"{Path(path).parent}/"
    try:
        text = Path(path).read_text("utf-8-sig")  # skips a byte-order mark
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {number}: not UTF-8; a manifest is a text of 'path label' lines") from error
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line:
            continue
        name, _, label = line.rpartition(" ")
        name, label = (name, int(label)) if name and INTEGER.fullmatch(label) else (line, -1)
        name = name.strip().strip('"')
        name = name if name.startswith("/") else folder + name
        if num_classes and not 0 <= label < num_classes:
            raise ValueError(f"{path} line {number}: a label from 0 to {num_classes - 1} is needed: {line[:200]!r}")
        if OTHER_FORMAT.search(name) and not os.path.exists(name):
            what = "no such file; a line is 'path' or 'path label', with one space and an integer label"
            raise ValueError(f"{path} line {number}: {what}: {line[:200]!r}")
        paths.append(name)
        labels.append(label)
    if not paths:
        raise ValueError(f"{path} names no videos")
    return paths, labels


class Manifest:
    """Clips of the videos and images in manifests: augmented for training, center crops in order for evaluation.

    Training (train=True): an endless sequence of shuffled passes over the videos, or, with weights, of videos from a
    manifest drawn by weight. The position of a clip in its video, its random resized crop and its flip depend on
    (seed, sample number). An unreadable video is replaced by a random one and reported in `Batch.skipped`.

    Evaluation: sample n is the middle clip of line n, center-cropped. An unreadable video raises BadVideo.
    """

    def __init__(self, manifests, num_frames, frame_step, resolution, seed=0, train=True, weights=None,
                 num_classes=None, fps=None):  # fmt: skip
        if weights and len(weights) != len(manifests):
            raise ValueError(f"{len(manifests)} manifests but {len(weights)} weights")
        if weights and (min(weights) < 0 or not 0 < sum(weights) < math.inf):
            raise ValueError(f"weights {weights}: none may be negative, and not all may be 0")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"--fps {fps}: must be positive")
        paths, labels = zip(*(read_manifest(m, num_classes) for m in manifests), strict=True)
        # Arrays, because forked workers would copy a list page by page: reading an object writes its reference count.
        self.paths = np.array([*itertools.chain(*paths)], np.dtypes.StringDType())
        self.labels = np.array([*itertools.chain(*labels)], np.int32)
        self.bounds = np.cumsum([0, *map(len, paths)])  # manifest m has the lines from bounds[m] to bounds[m + 1] - 1
        self.shuffled, weights = not weights, weights or [len(p) for p in paths]
        self.weights = np.array(weights) / sum(weights)
        self.num_frames, self.frame_step, self.fps, self.resolution = num_frames, frame_step, fps, resolution
        self.seed, self.train, self.epoch, self.order = seed, train, None, None

    def __len__(self):
        return len(self.paths)

    def line(self, number):
        """The line of sample `number`, counted over all manifests."""
        if not self.train:
            return number
        if not self.shuffled:
            return self.random_line("mixture", number)
        epoch, position = divmod(number, len(self))
        if epoch != self.epoch:
            rng = np.random.default_rng(seed_sequence("order", self.seed, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self))
        return int(self.order[position])

    def random_line(self, purpose, *key):
        """A random line of a manifest that is drawn by weight, which depends on (purpose, seed, key)."""
        rng = np.random.default_rng(seed_sequence(purpose, self.seed, *key))
        part = rng.choice(len(self.weights), p=self.weights)
        return int(rng.integers(self.bounds[part], self.bounds[part + 1]))

    def lines(self, number):
        """The line of sample `number`; for training, then random ones, one of which replaces it if it is unreadable.

        Not the next line, because a missing folder is a block of unreadable lines. Notes each line in `_reading`.
        """
        tried = set()
        for attempt in range(MAX_REPLACEMENTS if self.train else 1):
            line = self.random_line("replacement", number, attempt) if attempt else self.line(number)
            if line not in tried:
                _reading[0] = line
                yield line
            tried.add(line)

    def sample(self, number):
        """One sample: (clip (3, T, H, W) uint8, label, "path: reason" of each unreadable video)."""
        skipped, rng = [], np.random.default_rng(seed_sequence("crop", self.seed, number))
        crop = functools.partial(random_crop, rng) if self.train else functools.partial(square_crop, 1, 0.5)
        shape = self.num_frames, self.frame_step
        for line in self.lines(number):
            place = rng.random() if self.train else 0.5
            try:
                (clip,) = video.read_clips(self.paths[line], *shape, [place], self.fps, [crop], self.resolution)
            except BadVideo as error:
                skipped.append(str(error))
                continue
            clip = clip.flip(3) if self.train and rng.random() < 0.5 else clip
            return clip.transpose(0, 1), int(self.labels[line]), skipped
        raise BadVideo(skipped[-1])

    def batch(self, numbers):
        """The `Batch` of the samples with these numbers."""
        clips, labels, skipped = zip(*map(self.sample, numbers), strict=True)
        num_replaced, skipped = sum(map(bool, skipped)), list(itertools.chain(*skipped))
        return Batch(torch.stack(clips), torch.tensor(labels).unsqueeze(1), skipped, num_replaced)


class Synthetic:
    """The built-in videos as a source: an endless stream of different clips, or `length` of them."""

    def __init__(self, num_frames, resolution, seed=0, length=None):
        self.num_frames, self.resolution, self.seed, self.length = num_frames, resolution, seed, length

    def __len__(self):
        return self.length

    def batch(self, numbers):
        """The `Batch` of the clips with these numbers."""
        clips, labels = synthetic_clips(self.seed, torch.tensor(numbers), self.num_frames, self.resolution)
        return Batch(clips, labels, [], 0)


# ---------------------------------------------------------------------------------------------------------------------
# the loader


class LoaderFailed(RuntimeError):
    """A worker process died or hangs; the message names the video that it was reading."""


_reading = np.full(1, -1)  # the manifest line that is being read; in a worker process, memory shared with its parent
_Worker = collections.namedtuple("_Worker", "pid pipe reading")  # reading: its `_reading`, in shared memory


def _start_worker(source):
    """Fork a process that makes the batches whose sample numbers are sent to it, until its pipe is closed.

    It hands clips over in a memfd: a pipe would copy them twice, and in Docker, /dev/shm has only 64 MB.
    """
    global _reading
    reading, (ours, pipe) = np.frombuffer(mmap.mmap(-1, 8), np.int64), multiprocessing.Pipe()
    reading[0] = -1
    if pid := os.fork():
        return _Worker(pid, ours, reading)
    try:
        _reading = reading
        ours.close()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a run that is stopped finishes its step first
            signal.signal(number, signal.SIG_IGN)
        torch.set_num_threads(1)
        while True:
            try:
                batch = source.batch(pipe.recv())
            except BadVideo as error:
                pipe.send(error)
                continue
            with open(os.memfd_create("clips"), "wb") as file:
                file.write(batch.clips.contiguous().numpy())
                file.flush()
                pipe.send_bytes(pickle.dumps(batch._replace(clips=batch.clips.shape)))
                multiprocessing.reduction.send_handle(pipe, file.fileno(), None)
    except (EOFError, ConnectionError):  # the pipe is closed
        pass
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def _receive(worker, source):
    """The next batch of a worker. BadVideo; LoaderFailed if the worker has died or hangs."""
    try:
        if worker.pipe.poll(TIMEOUT):
            batch = worker.pipe.recv()
            if isinstance(batch, BadVideo):
                raise batch
            file = multiprocessing.reduction.recv_handle(worker.pipe)
            clips = torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8).view(batch.clips)
            os.close(file)
            return batch._replace(clips=clips)
        how = f"made no batch for {TIMEOUT} seconds"
    except (EOFError, ConnectionError):
        how = f"died (status or signal {os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT).si_status})"
    where = f" while it read {source.paths[worker.reading[0]]}" if worker.reading[0] >= 0 else ""
    raise LoaderFailed(f"the loader failed: a worker process {how}{where}")


def _receive_all(source, number_lists, num_workers):
    """The batches in order. Worker w of W makes every W-th batch, from the w-th on, at most two ahead."""
    workers, asked = [], collections.deque()
    try:
        for _ in range(num_workers):
            workers.append(_start_worker(source))
        requests = zip(itertools.cycle(workers), number_lists, strict=False)
        while True:
            # Two per worker while the batch that is received now is used.
            for worker, numbers in itertools.islice(requests, 2 * num_workers + 1 - len(asked)):
                asked.append(worker)
                with contextlib.suppress(ConnectionError):  # a worker that has died: `_receive` will report it
                    worker.pipe.send(numbers)
            if not asked:
                return
            yield _receive(asked.popleft(), source)
    finally:
        for worker in workers:
            worker.pipe.close()
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)


def clip_loader(source, number_lists, workers=0):
    """Yield a batch for each list of sample numbers, made by worker processes or, without any, by this one.

    On a GPU, clips are in pinned memory. LoaderFailed if a worker dies or makes no batch for TIMEOUT seconds.
    """
    started = time.perf_counter()
    for batch in _receive_all(source, number_lists, workers) if workers else map(source.batch, number_lists):
        if torch.cuda.is_initialized():
            batch = batch._replace(clips=batch.clips.pin_memory())
        yield batch._replace(waited=time.perf_counter() - started)
        started = time.perf_counter()


def micro_batch_indices(args):
    """The micro-batches of a step that this process computes, numbered over all processes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, args.batch_size // args.micro_batch_size, world)


def training_loader(source, args, start_step):
    """An iterator over the `Batch`es of this process from start_step to the end of the run."""
    size = args.micro_batch_size
    steps, indices = range(start_step, args.steps), micro_batch_indices(args)
    firsts = (step * args.batch_size + micro * size for step in steps for micro in indices)
    return clip_loader(source, (range(first, first + size) for first in firsts), args.workers)
