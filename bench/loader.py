"""The loader: clips per second and core, against decord as V-JEPA uses it.

    python bench.py loader                                        # on videos it makes itself, in out/bench
    python bench.py loader --data videos.csv --copies copies.csv  # yours, and what prepare.py transcode made of them
    python bench.py loader --memory 5000 --lines 3600000          # does a worker grow; a manifest of millions

The peer is V-JEPA's way: `get_batch` on the same indices, float32 whole frames, crop, `interpolate`, normalize.
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

import av
import numpy as np
import torch

import cli
import data
import video


def flags(parser):
    flag = parser.add_argument
    flag("--data", nargs="+", metavar="MANIFEST", help="videos; without, some are made")
    flag("--copies", nargs="+", metavar="MANIFEST", help="the same videos, line by line, made for training")
    flag("--num-frames", type=int, default=16)
    flag("--frame-step", type=int, default=4)
    flag("--resolution", type=int, default=224)
    flag("--clips", type=int, default=40, help="of each kind of files")
    flag("--memory", type=int, metavar="CLIPS", help="instead: the memory of a process that makes that many clips")
    flag("--lines", type=int, help="instead, or also: start on a made manifest of that many lines, with 4 workers")
    flag("--out", type=Path, default=Path("out/bench"), help="where files are made, and kept for the next time")


def run(args):
    """Time our clips against V-JEPA's, or measure memory."""
    cli.require_at_least(args, 1, "num_frames", "frame_step", "resolution", "clips")
    if bool(args.copies) > bool(args.data):
        cli.fail("--copies needs --data, the videos that they are copies of")
    torch.set_num_threads(1)
    try:
        if args.lines:
            start_on_lines(args)
        sets = [] if args.lines and not args.memory else file_sets(args)
    except (OSError, ValueError) as error:
        cli.fail(str(error))
    if args.memory:
        watch_memory(args, sets[0][1])
    elif sets:
        if not importlib.util.find_spec("decord"):
            cli.fail("the peer is missing: pip install decord (on Python or machines it has no wheel for, decord2)")
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one core
        for name, ours, theirs in sets:
            compare(args, name, ours, theirs)


def file_sets(args):
    """What is compared: (name, paths that we read, paths that the peer reads)."""
    if args.data:
        originals = data.Manifest(args.data, 1, 1, 1).paths
        copies = args.copies and data.Manifest(args.copies, 1, 1, 1).paths
        if copies and len(copies) != len(originals):
            raise ValueError(f"--copies: {len(copies)} lines, --data: {len(originals)}")
        return [("your files", originals, originals)] + ([("copies", copies, originals)] if copies else [])
    args.out.mkdir(parents=True, exist_ok=True)
    sets, copy = [], {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "0"}
    for height, width in ((256, 340), (720, 1280)):
        original = args.out / f"{width}x{height}.mp4"
        write(original, lambda height=height, width=width: scene(height, width, 300), {"g": "250"})
        sets.append((f"{width}x{height}, groups of 250", [original], [original]))
        short = round(width * 256 / height / 2) * 2, 256
        for name, options in (("groups of 12", copy), ("and fastdecode", copy | {"tune": "fastdecode"})):
            path = args.out / f"{width}x{height} {name}.mp4"
            write(path, functools.partial(shrunk, original, *short), options)
            sets.append((f"its copy, {name}", [path], [original]))
    return sets


def scene(height, width, num_frames):
    """Frames of a textured scene that the camera pans over, with three moving objects and grain."""
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft2(rng.standard_normal((3, 2 * height, 2 * width)))
    frequency = np.hypot(np.fft.fftfreq(2 * height)[:, None], np.fft.rfftfreq(2 * width))
    texture = np.fft.irfft2(spectrum / (frequency + 1 / height) ** 1.2).transpose(1, 2, 0)  # as natural images have
    texture = (128 + 45 * texture / texture.std()).clip(0, 255).astype(np.uint8)
    grain, side = rng.integers(-4, 5, (8, height, width, 1), np.int16), height // 4
    for t in range(num_frames):
        y, x = int(height * (0.5 + 0.3 * np.sin(t / 40))), int(width * (0.5 + 0.3 * np.cos(t / 55)))
        frame = texture[y : y + height, x : x + width] + grain[t % 8]
        for k in range(3):
            y, x = int(0.35 * height * (1 + np.sin(2 * k + t / 45))), int(0.35 * width * (1 + np.cos(k + t / 35)))
            frame[y : y + side, x : x + side] = texture[-side * (k + 1) : -side * k or None, -side:]
        yield av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")


def shrunk(path, width, height):
    """The frames of a video in another size."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(width, height)


def write(path, make_frames, options):
    """Encode frames, libx264 with its defaults but for `options`, unless an earlier run has done so."""
    if path.exists():
        return
    aside = path.with_suffix(".part.mp4")
    with av.open(str(aside), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        for t, frame in enumerate(make_frames()):
            if t == 0:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base, frame.pict_type = t, Fraction(1, 30), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    aside.rename(path)


def our_clip(args, path, rng):
    """A training clip, as `data.Manifest` makes them."""
    place, crop = rng.random(), functools.partial(video.random_crop, rng)
    return video.read_clips(path, args.num_frames, args.frame_step, [place], None, [crop], args.resolution)[0]


def their_clip(args, path, rng):
    """The same as V-JEPA makes it: decord, whole frames as float32, crop, interpolate, normalize, on the CPU."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    wanted = video.wanted_frames(rng.random(), args.num_frames, args.frame_step, len(reader))
    frames = torch.tensor(reader.get_batch(wanted).asnumpy(), dtype=torch.float32).permute(3, 0, 1, 2)
    top, left, height, width = video.random_crop(rng, *frames.shape[2:])
    clip = frames[:, :, top : top + height, left : left + width]
    clip = torch.nn.functional.interpolate(clip, (args.resolution, args.resolution), mode="bilinear")
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (data.MEAN, data.STD))
    return (clip / 255 - mean) / std


def compare(args, name, ours, theirs):
    """Print clips per second of CPU time, which other work on the machine leaves alone, and where our time goes."""
    parts = {"av.open": "open", "_packets": "seek", "_frames": "decode", "_to_rgb": "convert and crop"}
    seconds, originals = collections.Counter(), {}
    for part in parts:
        owner = video.av if part == "av.open" else video
        function = originals[part] = getattr(owner, part.removeprefix("av."))

        def timed(*arguments, part=part, function=function, **options):
            started = time.process_time()
            result = function(*arguments, **options)
            seconds[parts[part]] += time.process_time() - started
            return result

        setattr(owner, part.removeprefix("av."), timed)
    for n in range(-1, args.clips):  # the first is for warming up
        for who, clip, paths in (("ours", our_clip, ours), ("theirs", their_clip, theirs)):
            started = time.process_time()
            clip(args, str(paths[n % len(paths)]), np.random.default_rng(max(n, 0)))
            seconds[who] += time.process_time() - started
        if n < 0:
            seconds.clear()
    for part, function in originals.items():
        setattr(video.av if part == "av.open" else video, part.removeprefix("av."), function)
    shares = ", ".join(f"{part} {1000 * seconds[part] / args.clips:.1f}" for part in parts.values())
    print(f"{name}: ours {args.clips / seconds['ours']:.1f} clips/s, theirs {args.clips / seconds['theirs']:.1f}, "
          f"ratio {seconds['theirs'] / seconds['ours']:.2f}; ours in ms: {shares}, "
          f"all {1000 * seconds['ours'] / args.clips:.1f}", flush=True)  # fmt: skip


def watch_memory(args, paths):
    """Print the resident memory of this process as it makes clips."""
    for n in range(args.memory + 1):
        if n % max(1, args.memory // 10) == 0:
            print(f"after {n} clips: {memory('/proc/self/statm'):.1f} MB", flush=True)
        with contextlib.suppress(video.BadVideo):  # broken files must not leak either
            our_clip(args, str(paths[n % len(paths)]), np.random.default_rng(n))
        if n % 24 == 0:  # as loader processes do after a batch
            data.give_back_memory()


def memory(statm):
    """Resident memory in MB, as Linux says."""
    return int(Path(statm).read_text().split()[1]) * resource.getpagesize() / 1e6


def start_on_lines(args):
    """Print how long a source of that many lines takes to open, and the memory of 4 workers that use it."""
    args.out.mkdir(parents=True, exist_ok=True)
    manifest = args.out / "lines.csv"
    with open(manifest, "w") as file:
        file.writelines(
            f"/data/class_{n % 710:03d}/video_{n:08d}_000010_000020.mp4 {n % 710}\n" for n in range(args.lines)
        )
    before, started, cpu = memory("/proc/self/statm"), time.perf_counter(), time.process_time()
    source = data.Manifest([manifest], args.num_frames, args.frame_step, args.resolution)
    source.paths[source.line(0)]
    print(f"{args.lines} lines, {manifest.stat().st_size / 1e6:.0f} MB: {time.perf_counter() - started:.1f} s "
          f"({time.process_time() - cpu:.1f} of CPU), memory {before:.0f} -> {memory('/proc/self/statm'):.0f} MB, "
          f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")  # fmt: skip
    workers = []
    for first in range(4):  # what loader processes do: forked, each asks for samples of its own
        pid = os.fork()
        if pid == 0:
            for n in range(first, 20_000, 4):
                source.paths[source.line(n)]
            time.sleep(600)
        workers.append(pid)
    time.sleep(20)
    shares = [proportional(pid) for pid in (os.getpid(), *workers)]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(f"memory of this process and 4 workers, what they share divided among them: "
          f"{' + '.join(f'{share:.0f}' for share in shares)} = {sum(shares):.0f} MB")  # fmt: skip


def proportional(pid):
    """Memory of a process in MB, with what it shares divided by how many share it, as Linux says."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def main():
    parser = cli.Parser(__doc__)
    flags(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
