"""Benchmark of the loader: clips per second of one core, compared to decord as V-JEPA uses it.

    python -m bench.loader                                        # on videos that it makes itself, in out/bench
    python -m bench.loader --data videos.csv --copies copies.csv  # on your videos, and their copies by tools.transcode
    python -m bench.loader --memory 5000                          # does a loader process grow over 5000 clips?
    python -m bench.loader --lines 3600000                        # time and memory of a manifest with millions of lines

The peer works like V-JEPA's loader: decord's `get_batch` of the same frames, whole frames to float32, crop,
`interpolate`, normalize. Needs `pip install decord`.
"""

import collections
import contextlib
import functools
import importlib.util
import os
import resource
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import av
import numpy as np
import torch

import cli
import data
import training
import video

NUM_WORKERS, SAMPLES_PER_WORKER = 4, 5000  # for --lines
WORKER_SECONDS = 20  # until the workers have opened their samples
# The parts of our time: a name, and the function that does it.
PARTS = {
    "open": (av, "open"),
    "seek": (video, "_packets"),
    "decode": (video, "_frames"),
    "crop and scale": (video, "_to_rgb"),
}


class Videos(NamedTuple):
    """One comparison: what we read and what the peer reads, which is the same video unless ours is a copy."""

    name: str
    ours: list  # of paths
    theirs: list


# ---------------------------------------------------------------------------------------------------------------------
# the videos


def manifest_videos(args):
    """The videos of --data, and also their --copies if given. ValueError if the manifests do not match."""
    originals = data.Manifest(args.data, 1, 1, 1).paths
    videos = [Videos("your videos", originals, originals)]
    if args.copies:
        copies = data.Manifest(args.copies, 1, 1, 1).paths
        if len(copies) != len(originals):
            raise ValueError(f"--copies has {len(copies)} lines, but --data has {len(originals)}")
        videos.append(Videos("copies", copies, originals))
    return videos


def make_videos(folder):
    """Make videos in two sizes, each with two copies like those of tools.transcode. Keeps what is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "0"}
    copies = {"keyframe every 12": copy, "keyframe every 12, fastdecode": copy | {"tune": "fastdecode"}}
    videos = []
    for height, width in ((256, 340), (720, 1280)):
        original = folder / f"{width}x{height}.mp4"
        write_video(original, functools.partial(render_scene, height, width, 300), {"g": "250"})
        videos.append(Videos(f"{width}x{height}, keyframe every 250", [original], [original]))
        copy_width = round(width * 256 / height / 2) * 2
        for name, options in copies.items():
            path = folder / f"{width}x{height} {name}.mp4"
            write_video(path, functools.partial(resized_frames, original, copy_width, 256), options)
            videos.append(Videos(f"copy with a height of 256, {name}", [path], [original]))
    return videos


def render_scene(height, width, num_frames):
    """Yield frames of a textured scene: the camera pans, three objects move, and there is grain."""
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft2(rng.standard_normal((3, 2 * height, 2 * width)))
    frequency = np.hypot(np.fft.fftfreq(2 * height)[:, None], np.fft.rfftfreq(2 * width))
    # The spectrum of natural images falls off like this.
    texture = np.fft.irfft2(spectrum / (frequency + 1 / height) ** 1.2).transpose(1, 2, 0)
    texture = (128 + 45 * texture / texture.std()).clip(0, 255).astype(np.uint8)
    grain, side = rng.integers(-4, 5, (8, height, width, 1), np.int16), height // 4
    for t in range(num_frames):
        y, x = int(height * (0.5 + 0.3 * np.sin(t / 40))), int(width * (0.5 + 0.3 * np.cos(t / 55)))
        frame = texture[y : y + height, x : x + width] + grain[t % 8]
        for k in range(3):
            y, x = int(0.35 * height * (1 + np.sin(2 * k + t / 45))), int(0.35 * width * (1 + np.cos(k + t / 35)))
            frame[y : y + side, x : x + side] = texture[-side * (k + 1) : -side * k or None, -side:]
        yield av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")


def resized_frames(path, width, height):
    """Yield the frames of a video in another size."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(width, height)


def write_video(path, make_frames, options):
    """Encode frames with libx264 and these options, unless the file exists."""
    if path.exists():
        return
    temporary = path.with_suffix(".part.mp4")
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        for t, frame in enumerate(make_frames()):
            if t == 0:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base, frame.pict_type = t, Fraction(1, 30), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    temporary.rename(path)


# ---------------------------------------------------------------------------------------------------------------------
# speed


def our_clip(args, path, rng):
    """A training clip, made as in `data.Manifest`."""
    place, crop = rng.random(), functools.partial(video.random_crop, rng)
    return video.read_clips(path, args.num_frames, args.frame_step, [place], None, [crop], args.resolution)[0]


def their_clip(args, path, rng):
    """The same clip, made as in V-JEPA: decord, whole frames to float32, crop, interpolate and normalize."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    wanted = video.wanted_frames(rng.random(), args.num_frames, args.frame_step, len(reader))
    frames = torch.tensor(reader.get_batch(wanted).asnumpy(), dtype=torch.float32).permute(3, 0, 1, 2)
    top, left, height, width = video.random_crop(rng, *frames.shape[2:])
    clip = frames[:, :, top : top + height, left : left + width]
    clip = torch.nn.functional.interpolate(clip, (args.resolution, args.resolution), mode="bilinear")
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (data.MEAN, data.STD))
    return (clip / 255 - mean) / std


def timed(function, name, seconds):
    """`function`, made to add the CPU time of each call to seconds[name]."""

    def wrapper(*args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        seconds[name] += time.process_time() - start
        return result

    return wrapper


@contextlib.contextmanager
def timed_parts(seconds):
    """A context in which the CPU time of each of PARTS is added to `seconds`. A profiler would slow them down."""
    with contextlib.ExitStack() as patches:
        for part, (module, name) in PARTS.items():
            patches.enter_context(mock.patch.object(module, name, timed(getattr(module, name), part, seconds)))
        yield


def compare(args, videos):
    """Print clips per second of CPU time, for us and for the peer, and where our time goes."""
    seconds = collections.Counter()
    make_ours, make_theirs = timed(our_clip, "ours", seconds), timed(their_clip, "theirs", seconds)

    def make_clips(n):
        make_ours(args, str(videos.ours[n % len(videos.ours)]), np.random.default_rng(n))
        make_theirs(args, str(videos.theirs[n % len(videos.theirs)]), np.random.default_rng(n))

    with timed_parts(seconds):
        make_clips(0)  # warm up
        seconds.clear()
        for n in range(args.clips):
            make_clips(n)
    parts = ", ".join(f"{part} {1000 * seconds[part] / args.clips:.1f}" for part in PARTS)
    ours, theirs = seconds["ours"] / args.clips, seconds["theirs"] / args.clips  # per clip
    print(
        f"{videos.name}: ours {1 / ours:.1f} clips/s, decord {1 / theirs:.1f}, ratio {theirs / ours:.2f}; "
        f"our milliseconds per clip: {parts}, total {1000 * ours:.1f}",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# memory


def resident_memory():
    """Resident memory of this process in MB, from Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def proportional_memory(pid):
    """Memory of a process in MB, from Linux: each shared page is divided by the number of processes that share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def watch_memory(args, paths):
    """Print how the memory of this process changes as it makes --memory clips."""
    for n in range(args.memory + 1):
        if n % max(1, args.memory // 10) == 0:
            print(f"after {n} clips: {resident_memory():.1f} MB", flush=True)
        with contextlib.suppress(video.BadVideo):  # unreadable videos must not leak memory either
            our_clip(args, str(paths[n % len(paths)]), np.random.default_rng(n))
        if n % 24 == 0:  # as loader processes do after each batch
            data.release_memory()


def measure_manifest(args):
    """Make a manifest of --lines lines. Print the time to open it, and the memory with several workers."""
    args.out.mkdir(parents=True, exist_ok=True)
    manifest = args.out / "lines.csv"
    with open(manifest, "w") as file:
        for n in range(args.lines):
            file.write(f"/data/class_{n % 710:03d}/video_{n:08d}_000010_000020.mp4 {n % 710}\n")
    before, start, cpu_start = resident_memory(), time.perf_counter(), time.process_time()
    source = data.Manifest([manifest], args.num_frames, args.frame_step, args.resolution)
    source.paths[source.line(0)]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    size, peak = manifest.stat().st_size / 1e6, training.peak_memory(torch.device("cpu")) / 1e6
    print(
        f"{args.lines} lines, {size:.0f} MB: {seconds:.1f} s ({cpu_seconds:.1f} s of CPU time); "
        f"memory before {before:.0f} MB, after {resident_memory():.0f} MB, peak {peak:.0f} MB"
    )
    print_worker_memory(source)


def print_worker_memory(source):
    """Fork workers that look up samples of the source, as the loader does, and print the memory of all processes."""
    workers = []
    for first in range(NUM_WORKERS):
        pid = os.fork()
        if pid == 0:
            for n in range(first, NUM_WORKERS * SAMPLES_PER_WORKER, NUM_WORKERS):
                source.paths[source.line(n)]
            time.sleep(600)  # until killed
        workers.append(pid)
    time.sleep(WORKER_SECONDS)
    memory = [proportional_memory(pid) for pid in (os.getpid(), *workers)]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(
        f"memory of this process and {NUM_WORKERS} workers, dividing what they share: "
        f"{' + '.join(f'{megabytes:.0f}' for megabytes in memory)} = {sum(memory):.0f} MB"
    )


def main():
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("--data", nargs="+", metavar="MANIFEST", help="videos to read; default: make some")
    flag("--copies", nargs="+", metavar="MANIFEST", help="transcoded copies of the videos in --data, in the same order")
    flag("--num-frames", type=int, default=16, help="frames per clip")
    flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
    flag("--resolution", type=int, default=224, help="height and width of a clip in pixels")
    flag("--clips", type=int, default=40, help="clips to time for each kind of video")
    flag("--memory", type=int, metavar="CLIPS", help="make that many clips and print the memory of the process instead")
    flag("--lines", type=int, help="open a manifest of that many lines instead, with 4 workers")
    flag("--out", type=Path, default=Path("out/bench"), help="folder for the files it makes; they are reused")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "num_frames", "frame_step", "resolution", "clips")
    if args.copies and not args.data:
        cli.fail("--copies needs --data: the videos they are copies of")
    speed = not args.lines and not args.memory
    if speed and not importlib.util.find_spec("decord"):
        cli.fail(
            "decord, which we compare with, is missing: pip install decord (or decord2, if it has no wheel for "
            "this machine)"
        )
    torch.set_num_threads(1)
    try:
        if args.lines:
            measure_manifest(args)
        if args.memory or speed:
            all_videos = manifest_videos(args) if args.data else make_videos(args.out)
    except (OSError, ValueError) as error:
        cli.fail(str(error))
    if args.memory:
        watch_memory(args, all_videos[0].ours)
    if speed:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one core
        for videos in all_videos:
            compare(args, videos)


if __name__ == "__main__":
    main()
