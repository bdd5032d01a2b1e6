"""Check every video of a manifest, or make small copies of them that are fast to read.

    python -m tools.transcode check data/k400/train.csv                     # writes train.clean.csv, train.check.jsonl
    python -m tools.transcode copy data/k400/train.csv --out small/k400     # H.264, short side 256, many keyframes

Every video is processed in a process that may crash or hang without stopping the others. Results go to a log of JSON
lines, from which an interrupted command continues.
"""

import contextlib
import errno
import functools
import gc
import inspect
import itertools
import json
import multiprocessing
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path

import av
import pebble
from av.video.reformatter import ColorRange

import video
from cli import Parser, Progress, fail, require_at_least, write_lines
from data import read_manifest
from video import BadVideo, bad_video, is_folder, list_frames

# Scene changes would add keyframes at other places, and B-frames make every seek decode more. "fastdecode" means no
# CABAC and no deblocking: files are 8% larger but decode in half the time.
X264 = {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "0", "tune": "fastdecode"}
FOLDER_RATE = Fraction(12)  # frames per second of the copy of a folder of images


# ---------------------------------------------------------------------------------------------------------------------
# every video of a manifest, in processes that may die, with a log of the results


def in_processes(work, paths, num_workers, timeout):
    """Yield (path, work(path)) for each path, in order, from forked processes. work: a function that can be pickled.

    The result is {"error": reason} if the process died or took more than `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")  # takes 10 ms; a new interpreter would import torch first
    with pebble.ProcessPool(num_workers, initializer=_start_worker, context=context) as pool:
        try:
            for start in range(0, len(paths), 10_000):
                part = paths[start : start + 10_000]
                results = pool.map(work, part, timeout=timeout).result()
                for path in part:
                    try:
                        result = next(results)
                    except TimeoutError:
                        result = {"error": f"not done after {timeout:g} s"}
                    except pebble.ProcessExpired as error:
                        cause = signal.Signals(-error.exitcode).name if error.exitcode < 0 else error.exitcode
                        result = {"error": f"the process that read it died ({cause})"}
                    yield path, result
        finally:
            pool.stop()


def _start_worker():
    """Leave signals to the parent, and never free its objects here: a decoder's threads exist only there."""
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def work_through(args, paths, work, settings, log, copy_of=None):
    """Compute work(path) for all paths, in processes, except for those that an earlier run has in `log` as good.

    Returns {path: record} and appends each record to the log when it is done. A record is what `work` returned (it has
    "error" if the video is bad) with the path, the file's `state` and the settings. Ends the script on Ctrl-C and
    SIGTERM, and if a result has "stop", which is a reason that no other video would succeed either.
    """
    records, total = earlier_records(log, set(paths), settings, copy_of), len(set(paths))
    todo = [path for path in dict.fromkeys(paths) if path not in records]
    if records:
        print(f"{len(records):,} of {total:,} were done before ({log})")
    progress, bad = Progress(), 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        write_lines(log, map(json.dumps, records.values()))
        results = in_processes(work, todo, args.workers, args.timeout)
        with open(log, "a", encoding="utf-8") as file, contextlib.closing(results):
            for done, (path, result) in enumerate(results, 1):
                if "stop" in result:
                    fail(f"{result['stop']}; the same command continues from here")
                records[path] = {"path": path, "state": state(path), "settings": settings, **result}
                print(json.dumps(records[path]), file=file, flush=True)
                bad += "error" in result
                progress.show(f"{done:,}/{len(todo):,} videos, {bad:,} bad", last=done == len(todo))
    except KeyboardInterrupt:
        print(f"\nstopped; {len(records):,} of {total:,} are done, and the same command continues from here")
        sys.exit(130)
    except OSError as error:
        fail(f"{log}: {error.strerror}")
    return records


def earlier_records(log, paths, settings, copy_of):
    """{path: record} of the good videos in a log that are unchanged, had the same settings, and whose copy exists."""
    records = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # an incomplete line, if the script was killed
            record = json.loads(line)
            path = record["path"]
            usable = path in paths and "error" not in record and record["settings"] == settings
            if usable and record.get("state") == state(path) and (not copy_of or os.path.isfile(copy_of(path))):
                records[path] = record
    return records


def state(path):
    """What changes with a video: number of files (images of a folder), bytes, last modification. None: unreadable."""
    try:
        files = [os.stat(file) for file in (list_frames(path) if os.path.isdir(path) else [path])]
    except (BadVideo, OSError, ValueError):
        return None
    return [len(files), sum(file.st_size for file in files), max(file.st_mtime_ns for file in files)]


def print_bad(records, log):
    """Print the first bad videos with the reason, and how many are good and bad."""
    bad = [record for record in records.values() if "error" in record]
    for record in bad[:20]:
        print(f"  {record['path']}: {record['error']}")
    print(f"{len(records) - len(bad):,} videos are good, {len(bad):,} bad; details in {log}")


def write_manifest(path, pairs):
    write_lines(path, [f"{name} {label}" for name, label in pairs])
    print(f"{path}: {len(pairs):,} lines")


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def check_video(path, num_frames, frame_step):
    """Decode a video's first, middle and last clip. Returns its height and width, or {"error": reason}."""
    try:
        with bad_video(path):
            for image in list_frames(path) if is_folder(path) else ():  # clips leave out most images
                if not os.path.getsize(image):
                    raise BadVideo(f"{image}: an empty file")
        for place in (0, 0.5, 1):
            (clip,) = video.read_clips(path, num_frames, frame_step, [place])
        return {"height": clip.shape[2], "width": clip.shape[3]}
    except BadVideo as error:
        return {"error": str(error).removeprefix(f"{path}: ")}


def check(args, paths, labels):
    """Decode the first, middle and last clip of every video of a manifest.

    Writes two files next to the manifest NAME.csv: NAME.clean.csv, a manifest of the good videos, and NAME.check.jsonl,
    with one line per video: its size, or why it is bad. A video is also bad if it hangs or crashes the decoder. The
    same command continues where it was stopped, and tries bad and changed videos again.
    """
    log, settings = args.manifest.with_suffix(".check.jsonl"), [args.num_frames, args.frame_step]
    work = functools.partial(check_video, num_frames=args.num_frames, frame_step=args.frame_step)
    records = work_through(args, paths, work, settings, log)
    print_bad(records, log)
    good = [pair for pair in zip(paths, labels, strict=True) if "error" not in records[pair[0]]]
    write_manifest(args.manifest.with_suffix(".clean.csv"), good)


def copy_video(path, folder, out, short_side, crf):
    """Write a copy of a video to its `copy_path`. Returns the copy's height, width and number of frames.

    Or {"error": reason} if the video is bad; {"stop": reason} if the disk is full.
    """
    target = copy_path(path, folder, out)
    temporary = target + ".tmp"
    try:
        with bad_video(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if is_folder(path):
                frames = (video.read_image(image) for image in list_frames(path))
                record = write_copy(frames, FOLDER_RATE, None, temporary, short_side, crf)
            else:
                with video.open_container(path) as container:
                    stream = video.video_stream(path, container)
                    rate, frames = stream.average_rate or Fraction(25), container.decode(stream)
                    record = write_copy(frames, rate, stream.time_base, temporary, short_side, crf)
            os.replace(temporary, target)
        return record
    except BadVideo as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        text = str(error).removeprefix(f"{path}: ")
        full = getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        return {"stop": f"{target}: {text}"} if full else {"error": text}


def write_copy(frames, rate, unit, path, short_side, crf):
    """Encode frames into the file `path`. Returns what to record of the copy. BadVideo if it lacks frames.

    rate: frames per second. unit: seconds per unit of the frames' time stamps; None: without these, at this rate.
    """
    first = next(frames, None)
    if first is None:
        raise BadVideo("no frame can be decoded")
    (height, width), _ = video.upright(first)
    scale = min(1, short_side / min(width, height))
    size = [max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (height, width)]  # even, for yuv420p
    time_base = unit or 1 / rate
    frame_duration = max(1, round(1 / (rate * time_base)))  # where the file does not say; all times in time_base
    start, previous, num_packets, durations = (unit and first.pts) or 0, -1, 0, []
    with av.open(path, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options={**X264, "crf": str(crf)})
        codec = stream.codec_context
        stream.time_base = codec.time_base = time_base
        codec.thread_count, codec.pix_fmt, codec.color_range = 1, "yuv420p", ColorRange.MPEG
        codec.height, codec.width = size
        colors = ":out_range=tv"
        if first.format.name.startswith("yuv"):  # others become BT.601, which players assume without metadata
            codec.colorspace = first.colorspace
            colors += f":out_color_matrix={int(first.colorspace)}"
        pictures = video.convert(itertools.chain([first], frames), None, size, "yuv420p", colors)
        for picture in itertools.chain(pictures, [None]):  # None: what the encoder still holds
            if picture is not None:
                time_stamp = previous + frame_duration if not unit or picture.pts is None else picture.pts - start
                previous = max(time_stamp, previous + 1)  # keeps two frames that have the same time
                picture.pts, picture.time_base, picture.pict_type = previous, time_base, 0  # 0: the encoder chooses
                own = getattr(picture, "duration", 0) or frame_duration
                durations.append(own if abs(own - frame_duration) > 1 else frame_duration)  # Matroska rounds them
            for packet in codec.encode(picture):  # in the order of the frames, without B-frames
                packet.duration = durations[num_packets]  # mp4 needs the last one's to compute the average rate
                file.mux(packet)
                num_packets += 1
    if num_packets != len(durations):
        raise BadVideo(f"{len(durations)} frames in, {num_packets} out")
    return {"frames": num_packets, "width": size[1], "height": size[0]}


def copy(args, paths, labels):
    """Make copies of a manifest's videos for training: small, fast to seek in, without sound.

    H.264 in yuv420p with a keyframe every 12 frames and no B-frames. The short side becomes --short-side pixels;
    smaller videos keep their size. All frames are kept, with their time stamps counted from the first frame. Videos are
    rotated and mirrored as their metadata says.

    DIR gets the copies, a manifest of them named like the original NAME.csv, and NAME.copy.jsonl, with one line per
    video: the copy's size, or why it failed. The same command continues as `check` does.
    """
    folder = os.path.dirname(os.path.abspath(args.manifest))
    targets = {path: copy_path(path, folder, args.out) for path in paths}
    if len(set(targets.values())) < len(targets):
        fail(f"{args.manifest}: lists both FILE and FILE.mp4, whose copies would have the same name")
    if os.path.realpath(args.out) in (os.path.realpath(folder), os.sep):
        fail(f"--out {args.out}: the copies would replace the originals there")
    settings = {"short_side": args.short_side, "crf": args.crf}
    log = args.out / f"{args.manifest.stem}.copy.jsonl"
    work = functools.partial(copy_video, folder=folder, out=args.out, **settings)
    records = work_through(args, paths, work, settings, log, targets.get)
    print_bad(records, log)
    good = [pair for pair in zip(paths, labels, strict=True) if "error" not in records[pair[0]]]
    copies = [(os.path.relpath(targets[path], args.out), label) for path, label in good]
    write_manifest(args.out / args.manifest.name, copies)


def copy_path(path, folder, out):
    """Where to copy a video of a manifest in `folder`: at the same relative path in `out`, or at its absolute path."""
    name = os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path.lstrip(os.sep)
    return os.path.join(os.path.abspath(out), name if name.endswith(".mp4") else name + ".mp4")


def main():
    parser = Parser(__doc__, prog="python -m tools.transcode")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    flags = {}
    for run, timeout in ((check, 120), (copy, 1800)):
        text = inspect.getdoc(run)
        command = commands.add_parser(run.__name__, description=text, help=text.splitlines()[0])
        command.set_defaults(run=run)
        flags[run] = flag = command.add_argument
        flag("manifest", type=Path, metavar="MANIFEST")
        flag("--workers", type=int, default=os.cpu_count(), help="number of processes")
        flag("--timeout", type=float, default=timeout, help="seconds after which a video counts as bad")
    flag = flags[check]
    flag("--num-frames", type=int, default=16, help="frames per clip")
    flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
    flag = flags[copy]
    flag("--out", type=Path, required=True, metavar="DIR", help="folder for the copies")
    flag("--short-side", type=int, default=256, help="pixels; smaller videos keep their size")
    flag("--crf", type=int, default=20, help="quality of x264: lower is better and larger")
    args = parser.parse_args()
    own_flags = ("num_frames", "frame_step") if args.command == "check" else ("short_side",)
    require_at_least(args, 1, "workers", "timeout", *own_flags)
    try:
        paths, labels = read_manifest(args.manifest)
    except (OSError, ValueError) as error:
        fail(str(error))
    args.run(args, list(map(os.path.abspath, paths)), labels)


if __name__ == "__main__":
    main()
