"""What a clip is and where it comes from: videos and images named in manifests, or the built-in synthetic videos.

A source answers `source.batch(numbers)`: sample number n of a run is determined by (seed, n) alone, so that workers,
world size and restarts change nothing. `clip_loader` runs a source in worker processes. Clips travel as uint8 and are
normalised on the training device by `normalise`.

Letters: B clips, T frames, H and W pixels. A manifest is V-JEPA's: one "path label" per line, separated by a space,
paths relative to the manifest; the label may be left out for pretraining.
"""

import atexit
import functools
import itertools
import math
import re
import signal
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from torchvision.transforms import v2

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA
CROP_AREA, CROP_ASPECT = (0.3, 1.0), (0.75, 1.35)  # paper table 5


class Batch(NamedTuple):
    clips: torch.Tensor  # (B, 3, T, H, W) uint8
    labels: torch.Tensor  # (B, L) int64: one column per label of the source; -1 where there is none
    skipped: list  # "path: reason" of every unreadable video that another one stands in for (training only)
    names: list  # what each clip is from: a path, or the number of a built-in clip


def normalise(clips, device):
    """uint8 clips (B, 3, T, H, W) -> float32 on `device`, zero mean and unit variance per channel (ImageNet's)."""
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1, 1) * 255
    std = torch.tensor(STD, device=device).view(3, 1, 1, 1) * 255
    return (clips.to(device, non_blocking=True).float() - mean) / std


def denormalise(clips):
    """The inverse of `normalise`, up to rounding: float clips (B, 3, T, H, W) -> uint8."""
    mean, std = (torch.tensor(x, device=clips.device).view(3, 1, 1, 1) for x in (MEAN, STD))
    return ((clips * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# real videos


class BadVideo(ValueError):
    """A video or image that gives no clip; the message names it and says why."""


def read_manifest(path, num_classes=None):
    """(paths, labels) of a manifest; label -1 where a line has none.

    With num_classes every line must have a label in 0 .. num_classes - 1. OSError, or ValueError naming file and line.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES | {".mp4", ".webm", ".mkv", ".avi", ".mov"}:
        raise ValueError(f"{path} is a video or an image; --data takes manifests: text files of 'path label' lines")
    paths, labels = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file; a manifest has lines of 'path label'") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        name, _, label = line.rpartition(" ")
        if not name or not re.fullmatch("-?[0-9]+", label):
            name, label = line, -1
        if num_classes and not 0 <= int(label) < num_classes:
            raise ValueError(f"{path} line {number}: a label from 0 to {num_classes - 1} is needed: {line!r}")
        paths.append(str(path.parent / name.strip().strip('"')))
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{path} names no videos")
    return paths, labels


def read_clips(path, num_frames, frame_step, places):
    """Clips of one video, opened once: for each of `places` one, uint8 (T, 3, H, W): num_frames frames, frame_step apart.

    A place in [0, 1] says where the clip lies in the room that the video leaves: 0 first, 0.5 middle, 1 last. The last
    frame repeats if the video is short. Images are videos of one frame. Decoding starts at the keyframe before a clip
    and ends with its last frame; only the frames kept are converted to RGB. BadVideo if there is nothing to decode.
    """
    if not Path(path).is_file():
        raise BadVideo(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadVideo(f"{path}: no video stream")
            container.streams.video[0].codec_context.thread_count = 1  # parallelism is the loader's
            clips = []
            for i, place in enumerate(places):
                if i:
                    container.seek(0)
                clips.append(_decode(container, num_frames, frame_step, place))
    except (av.FFmpegError, RuntimeError, OSError) as error:
        raise BadVideo(f"{path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}") from error
    if not all(clips):
        raise BadVideo(f"{path}: no frame can be decoded")
    return [torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) for frames in clips]


def read_clip(path, num_frames, frame_step, place):
    """The clip of `read_clips` at one place."""
    return read_clips(path, num_frames, frame_step, [place])[0]


def _decode(container, num_frames, frame_step, place):
    """RGB arrays (H, W, 3) of the wanted frames; frames are numbered by their time stamps."""
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    start_time = stream.start_time or 0
    length = stream.frames
    if not length and stream.duration and rate:
        length = int(stream.duration * stream.time_base * rate)
    if not length or not rate:  # no index to seek in: count the frames by decoding them all
        length, rate = sum(1 for _ in container.decode(stream)), None
        container.seek(0)
    span = (num_frames - 1) * frame_step + 1
    first = min(int(place * (max(0, length - span) + 1)), max(0, length - span))
    wanted = range(first, min(first + span, max(length, 1)), frame_step)

    frames, before = [], -1
    if first and rate:
        container.seek(start_time + int((first - 0.5) / (rate * stream.time_base)), stream=stream)
    for frame in container.decode(stream):
        if rate and frame.pts is not None:
            number = round((frame.pts - start_time) * stream.time_base * rate)
        else:
            number = before + 1
        before = number
        # A frame stands for every wanted number up to its own (numbers are missing where the frame rate varies).
        while len(frames) < len(wanted) and number >= wanted[len(frames)]:
            frames.append(frame.to_ndarray(format="rgb24"))
        if len(frames) == len(wanted):
            break
    return frames + frames[-1:] * (num_frames - len(frames))


class Manifest:
    """Clips of the videos and images in manifests: augmented for training, centred and in order for evaluation.

    Training (`train=True`): sample n is video n of an endless sequence of shuffled passes, or, with weights, of a
    manifest drawn by weight; the clip's place, a random resized crop and a flip are drawn from (seed, n). An unreadable
    video is replaced by the next one and reported. Evaluation: sample n is line n, middle clip, centre crop; an
    unreadable video is a BadVideo error.
    """

    def __init__(self, manifests, num_frames, frame_step, resolution, seed=0, train=True, weights=None,
                 num_classes=None):  # fmt: skip
        if weights and len(weights) != len(manifests):
            raise ValueError(f"{len(manifests)} manifests but {len(weights)} weights")
        if weights and (min(weights) < 0 or not 0 < sum(weights) < math.inf):
            raise ValueError(f"weights {weights} are no shares: not negative, and not all 0")
        parts = [read_manifest(m, num_classes) for m in manifests]
        self.paths = [p for paths, _ in parts for p in paths]
        self.labels = [label for _, labels in parts for label in labels]
        self.ends = list(itertools.accumulate(len(paths) for paths, _ in parts))
        self.weights = np.array(weights) / sum(weights) if weights else None
        self.num_frames, self.frame_step, self.seed, self.train = num_frames, frame_step, seed, train
        self.shuffled = -1, None  # (pass, order): the latest pass over the data that was asked for
        if train:
            crop = v2.RandomResizedCrop(resolution, scale=CROP_AREA, ratio=CROP_ASPECT, antialias=True)
            self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
        else:
            self.transform = v2.Compose([v2.Resize(resolution, antialias=True), v2.CenterCrop(resolution)])

    def __len__(self):
        return len(self.paths)

    def line(self, number):
        """Which line of the manifests (counted through) sample `number` is."""
        if not self.train:
            return number
        if self.weights is not None:
            rng = np.random.default_rng((self.seed, number))
            part = rng.choice(len(self.ends), p=self.weights)
            return int(rng.integers(self.ends[part - 1] if part else 0, self.ends[part]))
        turn, place = divmod(number, len(self))
        if turn != self.shuffled[0]:
            self.shuffled = turn, np.random.default_rng((self.seed, turn)).permutation(len(self))
        return int(self.shuffled[1][place])

    def sample(self, number):
        """(clip (3, T, H, W) uint8, label, skipped, path) of one sample."""
        line, skipped = self.line(number), []
        state = np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(state >> np.uint64(1)))
            while True:
                place = torch.rand(()).item() if self.train else 0.5
                _now_reading(line)
                try:
                    frames = read_clip(self.paths[line], self.num_frames, self.frame_step, place)
                    break
                except BadVideo as error:
                    skipped.append(str(error))
                    if not self.train or len(skipped) == min(10, len(self)):
                        raise
                    line = (line + 1) % len(self)
            return self.transform(frames).transpose(0, 1), self.labels[line], skipped, self.paths[line]

    def batch(self, numbers):
        """`Batch` of the samples with these numbers."""
        clips, labels, skipped, paths = zip(*(self.sample(n) for n in numbers), strict=True)
        skipped = list(itertools.chain(*skipped))
        return Batch(torch.stack(clips), torch.tensor(labels).unsqueeze(1), skipped, list(paths))


# ---------------------------------------------------------------------------------------------------------------------
# built-in synthetic videos

MOTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TAU = 2 * math.pi


def uniforms(seed, numbers, count):
    """Independent uniform numbers in [0, 1) determined by (seed, number, column): (B,) int64 -> (B, count) float32.

    A counter-based generator (splitmix64's mixing), so that any sample can be drawn alone, on any device.
    """

    def mix(z):
        z = (z ^ (z >> 30 & (1 << 34) - 1)) * -4658895280553007687  # shifts are arithmetic in torch, hence the masks
        z = (z ^ (z >> 27 & (1 << 37) - 1)) * -7723592293110705685
        return z ^ (z >> 31 & (1 << 33) - 1)

    golden = -7046029254386353131
    seed = mix(torch.tensor(seed, device=numbers.device) + golden)
    column = torch.arange(1, count + 1, device=numbers.device)
    z = mix(mix(seed ^ numbers * golden)[:, None] + column * golden)
    return (z >> 40 & (1 << 24) - 1).float() * 2**-24


def _shape_outlines(steps=360):
    """Radius of every shape as a function of the angle, (6, steps), and of its hole, (6,); all shapes have area pi."""
    angle = torch.arange(steps) * TAU / steps

    def polygon(corners):
        return math.cos(math.pi / corners) / (angle % (TAU / corners) - math.pi / corners).cos()

    circle = torch.ones(steps)
    from_tip = angle % (TAU / 5)
    from_tip = torch.minimum(from_tip, TAU / 5 - from_tip)
    valley = 0.42  # a star's inner radius; its sides are straight lines from tip to valley
    star = valley * math.sin(TAU / 10) / (valley * (TAU / 10 - from_tip).sin() + from_tip.sin())
    from_arm = angle % (TAU / 4)
    from_arm = torch.minimum(from_arm, TAU / 4 - from_arm)
    width = 0.36  # half of a cross's arm
    cross = torch.where(from_arm.tan() < width, 1 / from_arm.cos(), width / from_arm.sin())
    outline = torch.stack((circle, polygon(4), polygon(3), star, cross, circle))
    hole = torch.tensor([0, 0, 0, 0, 0, 0.55])
    scale = (outline.square().mean(1) - hole.square()).rsqrt()
    return outline * scale[:, None], hole * scale


GRAIN_STARTS = 2**20


@functools.cache
def _grain(piece, device):
    """A fixed strip of white noise, from which frames cut pieces that begin at any of GRAIN_STARTS places."""
    return torch.randn(GRAIN_STARTS + piece, generator=torch.Generator().manual_seed(0)).to(device).unfold(0, piece, 1)


def synthetic_clips(seed, numbers, num_frames, resolution):
    """Built-in videos: textured shapes moving over a textured background that moves too. Any device, no files.

    The frame is a wallpaper of one shape, two across and two down; all of them travel together in one of 8 directions,
    at a speed, size, angle and phase of their own. The background (the camera) travels independently of them, and so
    does a disc on top of both. Colours, textures and lighting vary from clip to clip, brightness flickers from frame to
    frame, and there is film grain. Phases are uniform, so that a single frame does not tell the motion; colours do not
    tell the shape. With fewer than 5 frames a step may exceed half the distance of two shapes: the motion is ambiguous.

    numbers: int64 (B,), which clips. Returns clips uint8 (B, 3, T, H, W), and labels int64 (B, 2): motion, shape (the
    indices in MOTIONS and SHAPES), independent of each other.
    """
    T, S, device = num_frames, resolution, numbers.device
    columns = iter(uniforms(seed, numbers, 64 + T).unbind(1))
    time = torch.linspace(0, 1, T, device=device)
    pixel = (torch.arange(S, device=device) + 0.5) / S  # lengths are in frame widths, times in clips

    def draw(low, high, count=None):  # (B,) or (B, count)
        if count is None:
            return next(columns) * (high - low) + low
        return torch.stack([next(columns) for _ in range(count)], dim=1) * (high - low) + low

    def travel(direction, speed):  # x and y of something that moves straight, 2 x (B, T)
        return (direction.cos() * speed)[:, None] * time, (-direction.sin() * speed)[:, None] * time

    def texture(x, y, darkest, waves=2):
        """Plane waves that move with (x, y), in a random colour: (B, 3, T, S, S)."""
        frequency, angle, phase = draw(0.5, 1.5, waves), draw(0, TAU, waves), draw(0, TAU, waves)
        kx, ky = TAU * frequency * angle.cos(), TAU * frequency * angle.sin()
        px = kx[:, None, :, None] * (pixel - x[:, :, None, None]) + phase[:, None, :, None]  # (B, T, waves, S)
        py = ky[:, None, :, None] * (pixel - y[:, :, None, None])
        # cos(px + py) as a matrix product over the waves
        across, down = torch.cat((px.cos(), px.sin()), dim=2), torch.cat((py.cos(), -py.sin()), dim=2)
        field = down.transpose(2, 3) @ across * math.sqrt(2 / waves)  # (B, T, S, S)
        colour, variation = draw(darkest, darkest + 0.15, 3), draw(-0.15, 0.15, 3)
        return colour[:, :, None, None, None] + variation[:, :, None, None, None] * field[:, None]

    def offsets(x, y, across=1):
        """From every pixel to a moving point, or to the nearest of across*across copies: (B, T, 1, S), (B, T, S, 1)."""
        x, y = x + draw(0, 1)[:, None], y + draw(0, 1)[:, None]
        dx, dy = (pixel - x[:, :, None])[:, :, None, :], (pixel - y[:, :, None])[:, :, :, None]
        return dx - (dx * across).round() / across, dy - (dy * across).round() / across

    def cover(inside):  # signed distance inside an edge -> opacity (B, 1, T, S, S), one pixel wide
        return (inside * S + 0.5).clamp(0, 1).unsqueeze(1)

    motion, shape = draw(0, len(MOTIONS)).long(), draw(0, len(SHAPES)).long()
    clips = texture(*travel(draw(0, TAU), draw(0.2, 0.9)), darkest=0.3)

    x, y = travel(motion * (TAU / len(MOTIONS)), draw(0.4, 0.9))
    shapes = texture(x, y, darkest=0.55)
    dx, dy = offsets(x, y, across=2)
    outline, hole = (table.to(device) for table in _shape_outlines())
    steps = outline.shape[1]
    radius, turned = draw(0.16, 0.21)[:, None, None, None], draw(-0.4, 0.4)[:, None, None, None]
    angle = ((torch.atan2(dy, dx) - turned) * (steps / TAU)).long() % steps
    distance = (dx.square() + dy.square()).sqrt()
    edge = outline.flatten()[shape[:, None, None, None] * steps + angle] * radius
    opacity = cover(edge - distance) * cover(distance - hole[shape][:, None, None, None] * radius)
    clips = torch.lerp(clips, shapes, opacity)

    x, y = travel(draw(0, TAU), draw(0, 0.6))
    dx, dy = offsets(x, y)
    disc = draw(0.25, 0.75, 3)[:, :, None, None, None].expand_as(clips)
    clips = torch.lerp(clips, disc, cover(draw(0.05, 0.1)[:, None, None, None] - (dx.square() + dy.square()).sqrt()))

    light = 1 + 0.05 * (TAU * (draw(0, 1)[:, None] + draw(0, 1)[:, None] * time)).sin() + draw(-0.2, 0.2, T)
    start = (uniforms(seed + 1, numbers, T) * GRAIN_STARTS).long()  # of every frame's piece
    grain = _grain(3 * S * S, device)[start].unflatten(2, (3, S, S)).transpose(1, 2)
    clips = (clips * light[:, None, :, None, None] + 0.2 * grain).clamp(0, 1)
    return (clips * 255).round().to(torch.uint8), torch.stack((motion, shape), dim=1)


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


class _Fetch(torch.utils.data.Dataset):
    """Lets DataLoader fetch a whole batch with one call."""

    def __init__(self, source, workers):
        self.source = source
        self.reading = torch.full((max(1, workers),), -1).share_memory_()  # the manifest line that each worker reads

    def __getitems__(self, numbers):
        return self.source.batch(numbers)


def _now_reading(line):
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
        timeout=timeout, worker_init_fn=_start_worker,
    )  # fmt: skip
    try:
        yield from loader
    except RuntimeError as error:
        if not any(word in str(error) for word in ("timed out", "exited unexpectedly", "killed by signal")):
            raise
        reading = [source.paths[line] for line in dataset.reading.tolist() if line >= 0]
        where = f"; its workers are reading {', '.join(reading)}" if reading else ""
        raise LoaderFailed(f"the loader failed: {str(error).splitlines()[-1]}{where}") from error
