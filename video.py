"""Clips out of one video file: what is decoded, cropped, scaled."""

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
CROP_AREA, CROP_ASPECT = (0.3, 1.0), (0.75, 1.35)  # paper table 5
MAX_REORDER = 16  # frames that are shown later but may be decoded earlier than another one, in any codec
TURNS = {90: [("transpose", "cclock")], 180: [("hflip", None), ("vflip", None)], 270: [("transpose", "clock")]}
# Antialiased, as all of FFmpeg's. What it does faster leaves rubbish at the right edge where 16 does not divide widths.
SCALING = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


# ---------------------------------------------------------------------------------------------------------------------
# real videos


class BadVideo(ValueError):
    """A video or image that gives no clip; the message names it and says why."""


def read_clips(path, num_frames, frame_step, places, fps=None, crops=None, size=None):
    """Clips of one video, opened once: for each of `places` one, uint8 (T, 3, H, W).

    A clip is num_frames frames, frame_step apart, or, with fps, 1 / fps seconds. A place in [0, 1] says where it lies
    in the room that the video leaves: 0 first, 0.5 middle, 1 last. The last frame repeats if the video is short. Images
    are videos of one frame; a folder of numbered images is a video too. Rotation metadata is honored, alpha dropped.

    crops: for each clip a function of the frame's height and width that gives top, left, height and width of what is
    cut out and scaled to size x size, antialiased bilinear; without, whole frames. Boxes in videos with subsampled
    color are widened to even borders by the last pixel at most.

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
        stream.codec_context.thread_count = 1  # parallelizm is the loader's
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


def center_crop(height, width):
    """Top, left, height and width of the square in the middle."""
    side = min(height, width)
    return round((height - side) / 2), round((width - side) / 2), side, side
