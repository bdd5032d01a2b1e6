"""What a clip is and where it comes from: videos and images named in manifests, or the built-in synthetic videos.

A source answers `source.batch(numbers)`: sample number n of a run is determined by (seed, n) alone, so that workers,
world size and restarts change nothing. `clip_loader` runs a source in worker processes. Clips travel as uint8 and are
normalised on the training device by `normalise`.

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
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as V-JEPA
CROP_AREA, CROP_ASPECT = (0.3, 1.0), (0.75, 1.35)  # paper table 5
LIBC = ctypes.CDLL(None)
INTEGER = re.compile(b"-?[0-9]+")
MAX_REORDER = 16  # frames that are shown later but may be decoded earlier than another one, in any codec
TURNS = {90: [("transpose", "cclock")], 180: [("hflip", None), ("vflip", None)], 270: [("transpose", "clock")]}
# Antialiased, as all of FFmpeg's. What it does faster leaves rubbish at the right edge where 16 does not divide widths.
SCALING = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


class Batch(NamedTuple):
    clips: torch.Tensor  # (B, 3, T, H, W) uint8
    labels: torch.Tensor  # (B, L) int64: one column per label of the source; -1 where there is none
    skipped: list  # "path: reason" of every unreadable video that another one stands in for (training only)
    names: list  # what each clip is from: a path, or the number of a built-in clip


def normalise(clips, device):
    """uint8 clips (B, 3, T, H, W) -> float32 on `device`, zero mean and unit variance per channel (ImageNet's).

    The constants are not made tensors of the device: to send them there would wait for all that a GPU has still to do.
    """
    clips = clips.to(device, non_blocking=True).float()  # a copy
    for channel, mean, std in zip(clips.unbind(1), MEAN, STD, strict=True):
        channel.sub_(255 * mean).div_(255 * std)
    return clips


def denormalise(clips):
    """The inverse of `normalise`, up to rounding: float clips (B, 3, T, H, W) -> uint8."""
    mean, std = (torch.tensor(x, device=clips.device).view(3, 1, 1, 1) for x in (MEAN, STD))
    return ((clips * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# real videos


class BadVideo(ValueError):
    """A video or image that gives no clip; the message names it and says why."""


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


def read_clips(path, num_frames, frame_step, places, fps=None, crops=None, size=None):
    """Clips of one video, opened once: for each of `places` one, uint8 (T, 3, H, W).

    A clip is num_frames frames, frame_step apart, or, with fps, 1 / fps seconds. A place in [0, 1] says where it lies
    in the room that the video leaves: 0 first, 0.5 middle, 1 last. The last frame repeats if the video is short. Images
    are videos of one frame; a folder of numbered images is a video too. Rotation metadata is honoured, alpha dropped.

    crops: for each clip a function of the frame's height and width that gives top, left, height and width of what is
    cut out and scaled to size x size, antialiased bilinear; without, whole frames. Boxes in videos with subsampled
    colour are widened to even borders by the last pixel at most.

    BadVideo if there is nothing to decode.
    """
    crops = crops or [None] * len(places)
    for careful in (False, True):
        try:
            if Path(path).is_dir():
                clips = _read_folder(Path(path), num_frames, frame_step, places, fps)
            elif not Path(path).is_file():
                raise BadVideo(f"{path}: no such file")
            elif Path(path).suffix.lower() in IMAGE_SUFFIXES:
                clips = [[_read_image(path)] * num_frames] * len(places)
            else:
                clips = _read_video(path, num_frames, frame_step, places, fps, careful)
            if clips:
                return [_to_rgb(frames, crop, size) for frames, crop in zip(clips, crops, strict=True)]
        except (av.FFmpegError, RuntimeError, OSError) as error:
            if careful:
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                raise BadVideo(f"{path}: {reason}") from error
    raise BadVideo(f"{path}: no frame can be decoded")


def read_clip(path, num_frames, frame_step, place, fps=None):
    """The clip of `read_clips` at one place."""
    return read_clips(path, num_frames, frame_step, [place], fps)[0]


def wanted_frames(place, num_frames, step, length):
    """Which frames a clip takes of a video of `length` frames; fractions of frames where step is no whole number."""
    room = max(0, math.floor(length - 1 - (num_frames - 1) * step))
    wanted = min(int(place * (room + 1)), room) + step * np.arange(num_frames)
    return wanted[np.minimum(np.arange(num_frames), (wanted < max(length - 0.5, 1)).sum() - 1)]


def _read_image(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


def _read_folder(folder, num_frames, frame_step, places, fps):
    """The decoded frames of clips of a folder of numbered images."""
    images = [(re.findall("[0-9]+", f.stem), f) for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
    images = sorted((int(numbers[-1]), f) for numbers, f in images if numbers)
    if not images:
        raise BadVideo(f"{folder}: a folder without numbered images")
    if fps:
        raise BadVideo(f"{folder}: a folder of images has no time for --fps; --frame-step is needed")
    clips = [wanted_frames(place, num_frames, frame_step, len(images)) for place in places]
    frames = {n: _read_image(images[n][1]) for n in set(np.concatenate(clips).tolist())}
    return [[frames[n] for n in clip.tolist()] for clip in clips]


def _read_video(path, num_frames, frame_step, places, fps, careful):
    """The decoded frames of clips of a video: those on screen at the wanted times, give or take half a frame.

    Which frames these are is read from the packets, so that only they, and what they refer to, are decoded. None where
    that cannot be done; `careful` decodes everything.
    """
    # Without the option opening decodes the first frames, for what is not needed here: as long as half a short clip.
    with av.open(str(path), options=None if careful else {"skip_frame": "all"}) as container:
        if not container.streams.video:
            raise BadVideo(f"{path}: no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # parallelism is the loader's
        unit, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        start, length, shown = stream.start_time or 0, stream.frames, None
        if careful:
            shown = [frame.pts for frame in container.decode(stream)]
            if None in shown or any(a >= b for a, b in itertools.pairwise(shown)):  # number the frames
                shown, unit = range(len(shown)), 1 / rate if rate else None
        elif not length or not rate:
            shown = [packet.pts for packet in container.demux(stream) if packet.size]
            if None in shown:
                return None
        if shown is None:
            duration = float(1 / (rate * unit))  # of a frame, in the unit of time stamps
        elif shown:
            start, length = min(shown), len(shown)
            duration = (max(shown) - start) / max(1, length - 1) or 1
        else:
            return None
        if fps and not unit:
            raise BadVideo(f"{path}: no time stamps for --fps; --frame-step is needed")
        step = 1 / (fps * duration * float(unit)) if fps else frame_step
        clips = [start + duration * wanted_frames(place, num_frames, step, length) for place in places]
        times = np.unique(np.concatenate(clips))
        if careful:
            frames = _decode_all(path, np.array(shown), times + duration / 2)
        else:
            far = np.flatnonzero(np.diff(times) * unit > 10) + 1  # seconds that are jumped over, not read through
            parts = [_decode(container, stream, part + duration / 2, duration) for part in np.split(times, far)]
            if None in parts:
                return None
            frames = sum(parts, [])
    frames = dict(zip(times.tolist(), frames, strict=True))
    return [[frames[time] for time in clip.tolist()] for clip in clips]


def _decode_all(path, shown, times):
    """The last frame not after each of these times, of a video whose frames have the time stamps `shown`."""
    chosen = np.searchsorted(shown, times, side="right") - 1
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = {n: frame for n, frame in enumerate(container.decode(video=0)) if n in set(chosen)}
    return [frames[n] for n in chosen]


def _decode(container, stream, times, duration):
    """The last frame not after each of these times (increasing), from as few packets as possible; None if unsure."""
    packets = _packets(container, stream, times)
    if packets is None:
        return None
    shown = np.array(sorted(packet.pts for packet in packets if not packet.is_discard))
    if not len(shown) or shown[0] > times[0] or shown[-1] < times[-1] - 2 * duration:
        return None  # the keyframe sought is another one, or the video ends before its time
    chosen = shown[np.searchsorted(shown, times, side="right") - 1].tolist()
    frames = _frames(stream, packets, set(chosen))
    return [frames[pts] for pts in chosen] if len(frames) == len(set(chosen)) else None


def _packets(container, stream, times):
    """The packets, in decoding order, from the keyframe before the first of these times to the last time."""
    container.seek(int(times[0]), stream=stream)
    packets, beyond = [], 0
    for packet in container.demux(stream):
        if not packet.size:
            break
        if packet.pts is None:
            return None
        packets.append(packet)
        beyond += packet.pts > times[-1]
        if beyond > MAX_REORDER:
            break
    return packets


def _frames(stream, packets, wanted):
    """The frames with the time stamps `wanted`, {time stamp: frame}; some are missing if the video is an odd one."""
    # From the last packet back: what follows the last wanted frame up to the next keyframe is not needed. Frames that
    # are decoded after a keyframe but shown before it (open groups of pictures) refer to what is before it, too.
    runs, run, earliest = [], [], math.inf
    for packet in reversed(packets):
        if packet.pts in wanted:
            earliest = min(earliest, packet.pts)
        if earliest < math.inf:
            run.append(packet)
        if packet.is_keyframe and packet.pts <= earliest < math.inf:
            runs.append(run[::-1])
            run, earliest = [], math.inf
    frames, codec = {}, stream.codec_context
    skips = codec.name == "h264"  # its headers say which frames no other refers to; the decoder passes over these
    codec.open(strict=False)
    before = -math.inf
    for run in reversed(runs):
        codec.flush_buffers()
        for packet in (*run, None):
            codec.skip_frame = "NONREF" if skips and packet and packet.pts not in wanted else "DEFAULT"
            for frame in codec.decode(packet):
                if frame.pts is None or frame.pts <= before:  # AVI's time stamps are in decoding order
                    return {}
                before = frame.pts
                if frame.pts in wanted:
                    frames[frame.pts] = frame
    return frames


def _to_rgb(frames, crop, size):
    """Decoded frames as RGB, uint8 (T, 3, H, W), upright; cut out and scaled in one pass over the decoder's pixels."""
    turn = TURNS.get(frames[0].rotation % 360, ())
    height, width = frames[0].height, frames[0].width
    if frames[0].rotation % 180:
        height, width = width, height
    top, left, h, w = crop(height, width) if crop else (0, 0, height, width)
    out = np.empty((len(frames), 3, size or h, size or w), np.uint8)
    kind = None
    for t, frame in enumerate(frames):
        if t and frame is frames[t - 1]:
            out[t] = out[t - 1]
            continue
        if kind != (frame.width, frame.height, frame.format.name):
            resized = kind and kind[:2] != (frame.width, frame.height)  # size and format may change within a video
            kind = frame.width, frame.height, frame.format.name
            graph = av.filter.Graph()
            chain = [
                graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
            ]
            for name, value in (
                *turn,
                *([("scale", f"{width}:{height}")] if resized else []),
                ("crop", f"{w}:{h}:{left}:{top}"),
                ("scale", f"{out.shape[3]}:{out.shape[2]}:flags={SCALING}"),
                ("format", "gbrp"),
                ("buffersink", None),
            ):
                chain.append(graph.add(name, value))
            graph.link_nodes(*chain).configure()
        chain[0].push(frame)
        for channel, plane in zip((1, 2, 0), (scaled := chain[-1].pull()).planes, strict=True):
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            out[t, channel] = pixels[: scaled.height, : scaled.width]
    return torch.from_numpy(out)


def random_crop(rng, height, width):
    """Top, left, height and width of a random part: table 5's area and aspect, as torchvision's RandomResizedCrop."""
    low, high = CROP_ASPECT
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))  # for very long or very high frames
    return (height - h) // 2, (width - w) // 2, h, w


def centre_crop(height, width):
    """Top, left, height and width of the square in the middle."""
    side = min(height, width)
    return round((height - side) / 2), round((width - side) / 2), side, side


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
    """Clips of the videos and images in manifests: augmented for training, centred and in order for evaluation.

    Training (`train=True`): sample n is video n of an endless sequence of shuffled passes, or, with weights, of a
    manifest drawn by weight; the clip's place, a random resized crop and a flip are drawn from (seed, n). With
    clips_per_video k samples nk to nk + k - 1 are of one video, opened once if they are asked for together. An
    unreadable video is replaced by the next one and reported. Evaluation: sample n is line n, middle clip, centre crop;
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
        crops = [functools.partial(random_crop, rng) if self.train else centre_crop for rng in rngs]
        while True:
            places = [rng.random() if self.train else 0.5 for rng in rngs]
            now_reading(line)
            try:
                clips = read_clips(
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


def shape_outlines(steps=360):
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
    outline, hole = (table.to(device) for table in shape_outlines())
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
