"""Read clips from a video file: find the frames, decode only what they need, crop and scale.

With `frame_step`, a clip shows every frame_step-th frame in the order of presentation, as in decord and V-JEPA. With
`fps`, it is defined by times, and shows the nearest frame of each: the last one that starts at most half a frame later.

Decoding is what costs time, so `read_clips` tries two ways to get the frames:

1. Fast (`_read_needed`): packets, the compressed frames, carry time stamps and can be listed without decoding them. So
   choose the frames first, then decode only these and the frames they depend on, from the keyframe before them. This
   relies on what the file says about itself. If something does not add up (no time stamps, a seek to the wrong place,
   a frame that does not come out), it returns None.
2. Careful (`_read_all`): decode the whole video and choose among the frames that come out. Slow, but works for every
   file that FFmpeg can decode. Used only if the fast way returns None or fails.

To find frame number n, the fast way trusts the header's frame rate only if the file's index has evenly spaced time
stamps. Otherwise it lists the time stamps of all packets, for which it has to read the whole file (see `_timeline`).

Letters: T frames, H and W pixels. Time stamps are integers in the unit of the video stream (`_Timeline.unit` seconds).
"""

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

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
CROP_AREA, CROP_ASPECT = (0.3, 1.0), (0.75, 1.35)  # paper table 5
LONG_GAP = 10  # seconds between two wanted frames above which to seek rather than read on
MAX_REORDER = 16  # in any codec, at most this many frames are decoded before a frame that is shown earlier
# What is not a file: opening a FIFO blocks until another process writes to it, and a device may never end.
SPECIAL_FILES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
# FFmpeg filters that turn a frame upright, by its rotation metadata in degrees.
TURNS = {90: [("transpose", "cclock")], 180: [("hflip", None), ("vflip", None)], 270: [("transpose", "clock")]}
# FFmpeg scales with antialiasing. Without these flags, its faster code leaves garbage at the right edge of frames whose
# width is not a multiple of 16.
SCALING = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


class BadVideo(ValueError):
    """No clip can be read from a video or image. The message starts with its path and says why."""


def read_clips(path, num_frames, frame_step, places, fps=None, crops=None, size=None):
    """Read several clips from one video, which is opened once: for each of `places` one, uint8 (T, 3, H, W).

    A clip has num_frames frames that are frame_step frames apart, or, with fps, 1 / fps seconds. A place in [0, 1]
    positions the clip in the video: 0 first possible, 0.5 middle, 1 last. If the video is too short, its last frame
    repeats. An image is a video of one frame; a folder of numbered images is a video, too. Frames are turned upright by
    their rotation metadata. Alpha is dropped.

    crops: one function per clip, (height, width) -> (top, left, height, width), the box that is cut out and scaled to
    size x size (bilinear, antialiased). Default: whole frames in their own size. Where color is subsampled, as in most
    videos, FFmpeg rounds the box down to even numbers.

    BadVideo if nothing can be decoded.
    """
    crops = crops or [None] * len(places)
    for read_video in (_read_needed, _read_all):
        try:
            if is_folder(path):
                clips = _read_folder(Path(path), num_frames, frame_step, places, fps)
            elif Path(path).suffix.lower() in IMAGE_SUFFIXES:
                clips = [[_read_image(path)] * num_frames] * len(places)
            else:
                clips = read_video(path, num_frames, frame_step, places, fps)
            if clips:
                return [_to_rgb(frames, crop, size) for frames, crop in zip(clips, crops, strict=True)]
        except BadVideo:
            raise
        except Exception as error:  # damaged files also raise IndexError, UnicodeDecodeError, ... in PyAV
            if read_video is _read_all:
                raise BadVideo(f"{path}: {reason(error)}") from error
    raise BadVideo(f"{path}: no frame can be decoded")


def read_clip(path, num_frames, frame_step, place, fps=None):
    """Read one clip of whole frames; see `read_clips`."""
    return read_clips(path, num_frames, frame_step, [place], fps)[0]


def is_folder(path):
    """Whether the path is a folder (True) or a regular file (False). BadVideo if it is neither."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise BadVideo(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise BadVideo(f"{path}: {reason(error)}") from error
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise BadVideo(f"{path}: is {SPECIAL_FILES.get(kind, 'a special file')}, not a regular file")
    return kind == stat.S_IFDIR


def reason(error):
    """An exception's message in one line, with its type if it is none of ours, FFmpeg's or the system's."""
    if getattr(error, "strerror", None):
        return error.strerror
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, BadVideo) else f"{type(error).__name__}: {text}"


def open_container(path, **options):
    """`av.open` for reading. Text that is not UTF-8, such as a title, is no error."""
    return av.open(str(path), metadata_errors="replace", **options)


def video_stream(path, container):
    """The first video stream of an open file, to be decoded in this thread. BadVideo if none can be decoded."""
    if not container.streams.video:
        raise BadVideo(f"{path}: no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadVideo(f"{path}: unknown codec, or encrypted")
    stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
    return stream


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


def center_crop(height, width):
    """The box (top, left, height, width) of the largest square in the middle."""
    side = min(height, width)
    return round((height - side) / 2), round((width - side) / 2), side, side


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


def _clips_at(clip_times, times, frames):
    """One list of frames per clip, from the frame at each of `times`."""
    frames = dict(zip(times.tolist(), frames, strict=True))
    return [[frames[time] for time in clip.tolist()] for clip in clip_times]


# ---------------------------------------------------------------------------------------------------------------------
# images, and videos decoded as a whole


def _read_image(path):
    with open_container(path) as container:
        frame = next(container.decode(video_stream(path, container)), None)
    if frame is None:
        raise BadVideo(f"{path}: no frame can be decoded")
    return frame


def _read_folder(folder, num_frames, frame_step, places, fps):
    """The decoded frames of each clip of a folder of images, ordered by the last number in their names."""
    images = [(re.findall("[0-9]+", f.stem), f) for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
    images = sorted((int(numbers[-1]), f) for numbers, f in images if numbers and not is_folder(f))
    if not images:
        raise BadVideo(f"{folder}: a folder without numbered images")
    if fps:
        raise BadVideo(f"{folder}: a folder of images has no time for --fps; --frame-step is needed")
    clips = [wanted_frames(place, num_frames, frame_step, len(images)) for place in places]
    frames = {n: _read_image(images[n][1]) for n in set(np.concatenate(clips).tolist())}
    return [[frames[n] for n in clip.tolist()] for clip in clips]


def _read_all(path, num_frames, frame_step, places, fps):
    """The careful way: decode the whole video. Returns the decoded frames of each clip, None if there are no frames.

    Decodes twice, first for the time stamps, then for the wanted frames, because all frames may not fit in memory.
    """
    with open_container(path) as container:
        stream = video_stream(path, container)
        unit, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        shown = [frame.pts for frame in container.decode(stream)]
    if not shown:
        return None
    if None in shown or any(a >= b for a, b in itertools.pairwise(shown)):  # useless time stamps: number the frames
        shown, unit = np.arange(len(shown)), 1 / rate if rate else None
    timeline = _Timeline.from_time_stamps(shown, unit)
    clip_times = timeline.clip_times(path, num_frames, frame_step, places, fps)
    times = np.unique(np.concatenate(clip_times))
    chosen = np.searchsorted(timeline.shown, times, side="right") - 1
    wanted = set(chosen)
    with open_container(path) as container:
        stream = video_stream(path, container)
        frames = {n: frame for n, frame in enumerate(container.decode(stream)) if n in wanted}
    return _clips_at(clip_times, times, [frames[n] for n in chosen])


# ---------------------------------------------------------------------------------------------------------------------
# videos of which only the needed packets are decoded


def _read_needed(path, num_frames, frame_step, places, fps):
    """The fast way: decode as few packets as possible. Returns the decoded frames of each clip, None if in doubt."""
    # Opening a file decodes its first frames, for details that are not needed here, and takes half as long as reading a
    # short clip. skip_frame avoids that.
    with open_container(path, options={"skip_frame": "all"}) as container:
        stream = video_stream(path, container)
        timeline = _timeline(container, stream, fps)
        if timeline is None:
            return None
        clip_times = timeline.clip_times(path, num_frames, frame_step, places, fps)
        times = np.unique(np.concatenate(clip_times))
        frames = []
        for part in np.split(times, np.flatnonzero(np.diff(times) * timeline.unit > LONG_GAP) + 1):
            found = _decode(container, stream, part, timeline.duration)
            if found is None:
                return None
            frames += found
    return _clips_at(clip_times, times, frames)


def _timeline(container, stream, fps):
    """The timeline that the file's header states, else that of its packets. None if there are no time stamps.

    The header states only the average frame rate. That is enough for `fps`, which is about times, and for a constant
    frame rate, which the index of mp4, mov and avi files shows without reading the file. Other files are read.
    """
    rate = stream.average_rate or stream.guessed_rate
    if stream.frames and rate:
        duration = float(1 / (rate * stream.time_base))
        if fps or _is_evenly_spaced(stream, duration):
            return _Timeline(stream.start_time or 0, duration, stream.frames, stream.time_base)
    shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    return _Timeline.from_time_stamps(shown, stream.time_base) if shown and None not in shown else None


def _is_evenly_spaced(stream, duration):
    """Whether the index has all frames of the stream, each within a quarter of a frame of n * duration.

    An index has decoding times. Encoders derive these from the times of presentation, so that both have the same gaps.
    """
    entries = stream.index_entries
    if len(entries) != stream.frames:
        return False
    times = np.array([entry.timestamp for entry in entries if entry.size and not entry.is_discard])
    if len(times) != stream.frames:  # an edit list cuts frames, or an avi file has empty ones
        return False
    return bool(np.abs(times - times[0] - duration * np.arange(len(times))).max() <= duration / 4)


def _decode(container, stream, times, duration):
    """For each of these increasing times, decode the last frame that starts no later. None if in doubt."""
    packets = _packets(container, stream, times)
    if packets is None:
        return None
    shown = np.array(sorted(packet.pts for packet in packets if not packet.is_discard))
    if not len(shown) or shown[0] > times[0] or shown[-1] < times[-1] - 2 * duration:
        return None  # the seek went too far, or the video ends too early
    chosen = shown[np.searchsorted(shown, times, side="right") - 1].tolist()
    frames = _frames(stream, packets, set(chosen))
    return [frames[pts] for pts in chosen] if len(frames) == len(set(chosen)) else None


def _packets(container, stream, times):
    """The packets from the keyframe before the first of these times to the last time, in decoding order."""
    container.seek(int(times[0]), stream=stream)
    packets, beyond = [], 0
    for packet in container.demux(stream):
        if not packet.size:
            break
        if packet.pts is None:
            return None
        packets.append(packet)
        if packet.pts > times[-1]:
            beyond += 1
        if beyond > MAX_REORDER:
            break
    return packets


def _frames(stream, packets, wanted):
    """Decode the frames with the time stamps `wanted`: {time stamp: frame}. Incomplete if the video is malformed."""
    frames, codec, previous = {}, stream.codec_context, -math.inf
    skips = codec.name == "h264"  # its headers mark frames that no other depends on; the decoder can skip these
    codec.open(strict=False)
    for run in _needed_runs(packets, wanted):
        codec.flush_buffers()
        for packet in (*run, None):  # None: the frames that the decoder still holds
            codec.skip_frame = "NONREF" if skips and packet and packet.pts not in wanted else "DEFAULT"
            for frame in codec.decode(packet):
                if frame.pts is None or frame.pts <= previous:  # time stamps in decoding order, as in AVI files
                    return {}
                previous = frame.pts
                if frame.pts in wanted:
                    frames[frame.pts] = frame
    return frames


def _needed_runs(packets, wanted):
    """Split off the packets to decode: runs that each start at a keyframe and end at a wanted frame, in decoding order.

    Go backward: the packets between the last wanted frame and the next keyframe are not needed. A keyframe starts a run
    only if no wanted frame of the run is shown before it. Such a frame, decoded after the keyframe but shown before it
    (open group of pictures), also depends on packets before the keyframe.
    """
    runs, run, earliest = [], [], math.inf  # earliest: time stamp of the first wanted frame in this run
    for packet in reversed(packets):
        if packet.pts in wanted:
            earliest = min(earliest, packet.pts)
        if earliest < math.inf:
            run.append(packet)
        if packet.is_keyframe and packet.pts <= earliest < math.inf:
            runs.append(run[::-1])
            run, earliest = [], math.inf
    return runs[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# from decoded frames to RGB


def _to_rgb(frames, crop, size):
    """Convert decoded frames to RGB, uint8 (T, 3, H, W), upright, cropped and scaled."""
    height, width = frames[0].height, frames[0].width
    if frames[0].rotation % 180:
        height, width = width, height
    box = crop(height, width) if crop else (0, 0, height, width)
    out = np.empty((len(frames), 3, size or box[2], size or box[3]), np.uint8)
    kind = None
    for t, frame in enumerate(frames):
        if t and frame is frames[t - 1]:
            out[t] = out[t - 1]
            continue
        if kind != (frame.width, frame.height, frame.format.name):  # these may change within a video
            kind = frame.width, frame.height, frame.format.name
            graph = _filter_graph(frame, frames[0], (height, width), box, out.shape[2:])
        graph.push(frame)
        scaled = graph.pull()
        for channel, plane in zip((1, 2, 0), scaled.planes, strict=True):  # green, blue, red
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            out[t, channel] = pixels[: scaled.height, : scaled.width]
    return torch.from_numpy(out)


def _filter_graph(frame, first, upright, box, size):
    """The FFmpeg filters that turn, crop, scale and convert frames like `frame`, in one pass over the decoder's pixels.

    first: the clip's first frame. A frame of another size is first scaled to that frame's upright (height, width).
    """
    top, left, height, width = box
    filters = list(TURNS.get(first.rotation % 360, ()))
    if (frame.width, frame.height) != (first.width, first.height):
        filters.append(("scale", f"{upright[1]}:{upright[0]}"))
    filters += [
        ("crop", f"{width}:{height}:{left}:{top}"),
        ("scale", f"{size[1]}:{size[0]}:flags={SCALING}"),
        ("format", "gbrp"),
        ("buffersink", None),
    ]
    graph = av.filter.Graph()
    graph.threads = 1  # FFmpeg would start one per core for each clip
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    graph.link_nodes(source, *(graph.add(name, value) for name, value in filters)).configure()
    return graph
