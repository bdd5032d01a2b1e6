"""Read clips from a video file: find the frames, decode only what they need, crop and scale.

With `frame_step`, a clip shows every frame_step-th frame in the order of presentation, as in decord and V-JEPA. With
`fps`, it is defined by times, and shows the nearest frame of each: the last one that starts at most half a frame later.

Decoding is what costs time, so `read_clips` tries two ways to get the frames:

1. Fast (`_read_needed`): packets, the compressed frames, carry time stamps and can be listed without decoding them. So
   choose the frames first, then decode only these and those they depend on. If in doubt, raise an exception.
2. Careful (`_read_all`), if the fast way fails: decode the whole video and choose among the frames that come out. Slow,
   but works for every file that FFmpeg can decode.

Letters: T frames, H and W pixels. Time stamps are integers in the stream's unit (`_Timeline.unit` seconds).
"""

import contextlib
import itertools
import math
import os
import re
import stat
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
CLUTTER = {"__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir"}  # folders of macOS, Windows and Synology
CROP_AREA, CROP_ASPECT = (0.3, 1.0), (0.75, 1.35)  # paper table 5
LONG_GAP = 10  # seconds between two wanted frames above which to seek rather than read on
MAX_REORDER = 16  # in any codec, at most this many frames are decoded before a frame that is shown earlier
# Antialiased. Without the flags, FFmpeg leaves garbage at the right edge of frames whose width 16 does not divide.
SCALING = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


class BadVideo(ValueError):
    """No clip can be read from a video or image. The message starts with its path and says why."""


def read_clips(path, num_frames, frame_step, places, fps=None, crops=None, resolution=None):
    """Read several clips from one video, which is opened once: for each of `places` one, uint8 (T, 3, H, W).

    A clip has num_frames frames that are frame_step frames apart, or, with fps, 1 / fps seconds. A place in [0, 1]
    positions the clip in the video: 0 first possible, 0.5 middle, 1 last. If the video is too short, the clip repeats
    its last wanted frame. An image is a video of one frame; a folder of numbered images is a video, too. Frames are
    turned upright by their metadata. BadVideo if nothing can be decoded.

    crops: one function per clip, (height, width) -> (top, left, height, width), the box that is cut out and scaled to
    resolution x resolution (bilinear, antialiased). Default: whole frames in their own size. Where color is subsampled,
    as in most videos, FFmpeg rounds the box down to even numbers.
    """
    with bad_video(path):
        if is_folder(path):
            clips = _read_folder(path, num_frames, frame_step, places, fps)
        elif Path(path).suffix.lower() in IMAGE_SUFFIXES:
            clips = [[read_image(path)] * num_frames] * len(places)
        else:
            try:
                clips = _read_needed(path, num_frames, frame_step, places, fps)
            except Exception:  # damaged files raise anything in PyAV
                clips = _read_all(path, num_frames, frame_step, places, fps)
        crops = crops or [None] * len(places)
        return [_to_rgb(frames, crop, resolution) for frames, crop in zip(clips, crops, strict=True)]


@contextlib.contextmanager
def bad_video(path):
    """Turn every exception into a BadVideo of one line: damaged files also raise IndexError, UnicodeDecodeError, ..."""
    try:
        yield
    except BadVideo:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise BadVideo(f"{path}: {getattr(error, 'strerror', None) or text}") from error


def is_folder(path):
    """Whether the path is a folder. BadVideo if it is no regular file either: opening a FIFO blocks."""
    with bad_video(path):
        mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BadVideo(f"{path}: a special file, not a regular one")
    return stat.S_ISDIR(mode)


def is_clutter(name):
    """Whether a file or folder is hidden or left behind by an operating system: ._video.mp4, __MACOSX."""
    return name.startswith(".") or name in CLUTTER


def list_frames(folder):
    """The paths of the images in a folder that is a video, in the order of all numbers in their names.

    BadVideo if two have the same numbers, or if names differ in more: these may be pictures and their optical flow.
    """
    frames, patterns = [], set()  # frames: (numbers, name)
    for name in os.listdir(folder):
        stem, suffix = os.path.splitext(name)
        numbers = list(map(int, re.findall("[0-9]+", stem)))
        if suffix.lower() in IMAGE_SUFFIXES and numbers and not is_clutter(name):
            patterns.add(re.sub("[0-9]+", "*", stem) + suffix.lower())
            frames.append((numbers, name))
    if not frames:
        raise BadVideo(f"{folder}: a folder without numbered images")
    if len(patterns) > 1:
        raise BadVideo(f"{folder}: the images have several name patterns: {', '.join(sorted(patterns)[:5])}")
    frames.sort()
    for (numbers, name), (others, other) in itertools.pairwise(frames):
        if numbers == others:
            raise BadVideo(f"{folder}: {name} and {other} have the same number")
    return [os.path.join(folder, name) for _, name in frames]


def read_image(path):
    """The decoded frame of an image. BadVideo if there is none."""
    with bad_video(path):
        is_folder(path)  # raises BadVideo if it is a special file
        with open_container(path) as container:
            for frame in container.decode(video_stream(path, container)):
                return frame
    raise BadVideo(f"{path}: no frame can be decoded")


def open_container(path, **options):
    """`av.open` for reading. Text that is not UTF-8, such as a title, is no error."""
    return av.open(str(path), metadata_errors="replace", **options)


def video_stream(path, container):
    """The first video stream of an open file that is no cover, to be decoded in this thread. BadVideo if none."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise BadVideo(f"{path}: no video stream")
    if streams[0].codec_context is None:
        raise BadVideo(f"{path}: unknown codec, or encrypted")
    streams[0].codec_context.thread_count = 1  # the loader's workers are the parallelism
    return streams[0]


def random_crop(rng, height, width):
    """Draw a random box (top, left, height, width) with table 5's area and aspect ratio, as RandomResizedCrop does."""
    low, high = CROP_ASPECT
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))  # for very tall or very wide frames
    return (height - h) // 2, (width - w) // 2, h, w


def square_crop(side, position, height, width):
    """The square box (top, left, height, width) of `side` times the short side, at a position in [0, 1].

    The position is along the long side, 0.5 is the center. Below a side of 1 it holds for both directions.
    """
    length = round(side * min(height, width))
    return round((height - length) * position), round((width - length) * position), length, length


# ---------------------------------------------------------------------------------------------------------------------
# which frames a clip shows


def wanted_frames(place, num_frames, step, length):
    """The frame numbers of a clip (array of num_frames) in a video of `length` frames; fractional if `step` is."""
    room = max(0, math.floor(length - 1 - (num_frames - 1) * step))
    wanted = min(int(place * (room + 1)), room) + step * np.arange(num_frames)
    return wanted[np.minimum(np.arange(num_frames), (wanted < max(length - 0.5, 1)).sum() - 1)]


class _Timeline(NamedTuple):
    """When a video shows its frames."""

    start: int  # time stamp of the first frame
    duration: float  # average duration of a frame, in time-stamp units
    length: int  # number of frames
    unit: Fraction  # seconds per time-stamp unit; None if unknown
    shown: np.ndarray | None = None  # the time stamps of all frames, in order; None: `duration` apart

    @classmethod
    def from_time_stamps(cls, shown, unit):
        shown = np.sort(shown)
        start, length = int(shown[0]), len(shown)
        return cls(start, (int(shown[-1]) - start) / max(1, length - 1) or 1, length, unit, shown)

    def clip_times(self, path, num_frames, frame_step, places, fps):
        """The times of each clip, one array of num_frames per place. It shows the last frame that starts no later."""
        if fps and not self.unit:
            raise BadVideo(f"{path}: no time stamps for --fps; --frame-step is needed")
        step = 1 / (fps * self.duration * float(self.unit)) if fps else frame_step
        clips = [wanted_frames(place, num_frames, step, self.length) for place in places]
        if fps or self.shown is None:
            return [self.start + self.duration * clip + self.duration / 2 for clip in clips]
        return [self.shown[clip] for clip in clips]


def _read_folder(folder, num_frames, frame_step, places, fps):
    images = list_frames(folder)
    if fps:
        raise BadVideo(f"{folder}: a folder of images has no time for --fps; --frame-step is needed")
    clips = [wanted_frames(place, num_frames, frame_step, len(images)) for place in places]
    frames = {n: read_image(images[n]) for n in set(np.concatenate(clips).tolist())}
    return [[frames[n] for n in clip.tolist()] for clip in clips]


def _read_all(path, num_frames, frame_step, places, fps):
    """The careful way: decode the whole video, twice, because all frames may not fit in memory."""
    with open_container(path) as container:
        stream = video_stream(path, container)
        unit, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        shown = [frame.pts for frame in container.decode(stream)]
    if not shown:
        raise BadVideo(f"{path}: no frame can be decoded")
    if None in shown or any(a >= b for a, b in itertools.pairwise(shown)):  # useless time stamps: number the frames
        shown, unit = np.arange(len(shown)), 1 / rate if rate else None
    clips = _Timeline.from_time_stamps(shown, unit).clip_times(path, num_frames, frame_step, places, fps)
    clips = [(np.searchsorted(shown, clip, side="right") - 1).tolist() for clip in clips]
    wanted = set(itertools.chain(*clips))
    with open_container(path) as container:
        decoded = enumerate(container.decode(video_stream(path, container)))
        frames = {n: frame for n, frame in decoded if n in wanted}
    return [[frames[n] for n in clip] for clip in clips]


# ---------------------------------------------------------------------------------------------------------------------
# the fast way: decode only the needed packets


def _read_needed(path, num_frames, frame_step, places, fps):
    """Decode as few packets as possible. Returns the decoded frames of each clip; any exception if in doubt."""
    # skip_frame: opening would decode the first frames for details not needed here, half the time of a short clip.
    with open_container(path, options={"skip_frame": "all"}) as container:
        stream = video_stream(path, container)
        timeline = _timeline(container, stream, fps)
        clips = timeline.clip_times(path, num_frames, frame_step, places, fps)
        times, frames = np.unique(np.concatenate(clips)), {}
        for part in np.split(times, np.flatnonzero(np.diff(times) * float(timeline.unit) > LONG_GAP) + 1):
            frames.update(zip(part.tolist(), _decode(container, stream, part, timeline.duration), strict=True))
    return [[frames[time] for time in clip.tolist()] for clip in clips]


def _timeline(container, stream, fps):
    """The timeline that the file's header states, else that of its packets, for which the whole file is read.

    The header states only the average frame rate: enough for `fps`, and for a constant rate, which an index shows.
    """
    rate = stream.average_rate or stream.guessed_rate
    if stream.frames and rate:
        duration = float(1 / (rate * stream.time_base))
        if fps or _is_evenly_spaced(stream, duration):
            return _Timeline(stream.start_time or 0, duration, stream.frames, stream.time_base)
    shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    return _Timeline.from_time_stamps(np.array(shown, int), stream.time_base)  # TypeError without time stamps


def _is_evenly_spaced(stream, duration):
    """Whether the index has all frames of the stream, each within a quarter of a frame of n * duration.

    An index (mp4, mov, avi) has decoding times, with the same gaps as the times of presentation.
    """
    entries = stream.index_entries  # of edited mp4 files some are cut (discard), of avi files some empty (size 0)
    times = np.array([entry.timestamp for entry in entries if entry.size and not entry.is_discard])
    if not len(times) == len(entries) == stream.frames:
        return False
    return np.abs(times - times[0] - duration * np.arange(len(times))).max() <= duration / 4


def _decode(container, stream, times, duration):
    """For each of these increasing times, decode the last frame that starts no later. Any exception if in doubt."""
    container.seek(int(times[0]), stream=stream)  # to the keyframe before
    packets, beyond = [], 0
    for packet in container.demux(stream):
        if not packet.size or beyond > MAX_REORDER:
            break
        packets.append(packet)
        beyond += packet.pts > times[-1]
    shown = np.sort([packet.pts for packet in packets if not packet.is_discard])
    if shown[0] > times[0] or shown[-1] < times[-1] - 2 * duration:
        raise ValueError("the seek went too far, or the video ends too early")
    chosen = shown[np.searchsorted(shown, times, side="right") - 1].tolist()
    frames = _decode_needed(stream.codec_context, packets, set(chosen))
    return [frames[pts] for pts in chosen]  # KeyError if one did not come out


def _decode_needed(codec, packets, wanted):
    """Decode the frames with the time stamps `wanted`: {time stamp: frame}. Any exception if in doubt.

    Go backward to find the packets that these depend on: those from a wanted frame to the keyframe before it, or to an
    earlier one if the wanted frame is shown before that keyframe (open group of pictures).
    """
    needed, earliest = [], math.inf  # earliest: time stamp of the first wanted frame since decoding starts
    for packet in reversed(packets):
        if packet.pts in wanted:
            needed += [] if earliest < math.inf else [None]  # None: decode what the decoder still holds
            earliest = min(earliest, packet.pts)
        if earliest < math.inf:
            needed.append(packet)
        if packet.is_keyframe and packet.pts <= earliest:
            earliest = math.inf
    if earliest < math.inf:
        raise ValueError("no keyframe to start at")
    frames, previous = {}, -math.inf
    skips = codec.name == "h264"  # its headers mark frames that no other depends on; the decoder can skip these
    codec.open(strict=False)
    codec.flush_buffers()
    for packet in reversed(needed):
        codec.skip_frame = "NONREF" if skips and packet and packet.pts not in wanted else "DEFAULT"
        for frame in codec.decode(packet):
            if frame.pts <= previous:
                raise ValueError("time stamps in decoding order, as in AVI files")
            previous = frame.pts
            if frame.pts in wanted:
                frames[frame.pts] = frame
        if packet is None:
            codec.flush_buffers()
    return frames


# ---------------------------------------------------------------------------------------------------------------------
# from decoded frames to RGB


def _to_rgb(frames, crop, resolution):
    """Convert decoded frames to RGB, uint8 (T, 3, H, W), upright, cropped and scaled.

    Frames of another size than the first one are scaled to it first.
    """
    (height, width), _ = _upright(frames[0])
    top, left, h, w = crop(height, width) if crop else (0, 0, height, width)
    out = np.empty((len(frames), 3, resolution or h, resolution or w), np.uint8)
    to_rgb = [("crop", f"{w}:{h}:{left}:{top}"), ("scale", f"{out.shape[3]}:{out.shape[2]}:flags={SCALING}")]
    kind = last = None
    for t, frame in enumerate(frames):
        if frame is not last:  # else the end of a short video
            size, turns = _upright(frame)
            if kind != (size, turns, frame.format.name):  # these may change within a video
                kind = size, turns, frame.format.name
                rescaling = [("scale", f"{width}:{height}")] if size != (height, width) else []
                graph = _filter_graph(frame, [*turns, *rescaling, *to_rgb, ("format", "gbrp")])
            graph.push(frame)
            picture, last = graph.pull(), frame
        for channel, plane in zip((1, 2, 0), picture.planes, strict=True):  # green, blue, red
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            out[t, channel] = pixels[: picture.height, : picture.width]
    return torch.from_numpy(out)


def _upright(frame):
    """A frame's (height, width) when upright, and FFmpeg's filters that turn it by its display matrix or EXIF."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # PyAV 18 cannot list side data if a type is new to it, such as EXIF: remove these
        graph = _filter_graph(frame, [("sidedata", f"mode=delete:type={n}") for n in range(len(SideData), 40)])
        graph.push(frame)
        matrix = graph.pull().side_data.get(SideData.DISPLAYMATRIX)
    size, filters = (frame.height, frame.width), []
    # The decoded pixel (x, y) is shown at (a x + c y, b x + d y), up to scale and shift.
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):  # x and y are swapped
        size, filters, a, d = size[::-1], [("transpose", "cclock_flip")], c, b
    return size, filters + [("vflip", None)] * (d < 0) + [("hflip", None)] * (a < 0)


def _filter_graph(frame, filters):
    """A chain of FFmpeg filters for frames like this one."""
    graph = av.filter.Graph()
    graph.threads = 1  # FFmpeg would start one per core for each clip
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    graph.link_nodes(source, *(graph.add(*filter) for filter in filters), graph.add("buffersink")).configure()
    return graph
