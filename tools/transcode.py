"""Check every video of a manifest, or make small copies of them that are fast to read.

    python -m tools.transcode check data/k400/train.csv                     # writes train.clean.csv, train.check.jsonl
    python -m tools.transcode copy data/k400/train.csv --out small/k400     # H.264, short side 256, many keyframes

Every video is processed in a process that may crash or hang without stopping the others. Results go to a log, one JSON
object per line; a command that was interrupted continues from there.
"""

import contextlib
import errno
import gc
import inspect
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from fractions import Fraction
from multiprocessing.connection import wait
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, VideoReformatter

from cli import Parser, Progress, duration, fail, require_at_least, write_atomically
from data import read_manifest, write_manifest
from video import IMAGE_SUFFIXES, BadVideo, is_folder, open_container, read_clip, video_stream

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Scene changes would add keyframes at other places, and B-frames make every seek decode more. "fastdecode" means no
# CABAC and no deblocking: files are 8% larger but decode in half the time.
X264 = {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "0", "tune": "fastdecode"}


# ---------------------------------------------------------------------------------------------------------------------
# processes that may die


class Worker:
    """A forked process that computes work(path) for one path at a time."""

    def __init__(self, work):
        context = multiprocessing.get_context("fork")  # takes 10 ms; a new interpreter would import torch first
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, child_pipe, self.pipe), daemon=True)
        self.process.start()
        self.usable = True
        child_pipe.close()

    def start(self, path, timeout):
        """Start on a path; `timeout` is in seconds."""
        self.path, self.timeout, self.deadline = path, timeout, time.monotonic() + timeout
        self.pipe.send(path)

    def result(self):
        """The result; {"error": reason} if the process died or took too long; None while it is working."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self.usable = False
                self.process.join()
                code = self.process.exitcode
                cause = signal.Signals(-code).name if code < 0 else code
                return {"error": f"the process that read it died ({cause})"}
        if time.monotonic() < self.deadline:
            return None
        self.usable = False
        self.process.kill()  # without waiting for its end, which a broken file system may delay
        return {"error": f"not done after {self.timeout:g} s"}


def _serve(work, pipe, parent_pipe):
    """The loop of a worker process, which ends with the parent. Signals are left to the parent."""
    gc.freeze()  # never free the parent's objects here: a decoder's threads exist only in the parent
    parent_pipe.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(work(pipe.recv()))


def in_processes(work, paths, num_workers, timeout):
    """Yield (path, result) for each path, in order of completion (see `Worker.result`)."""
    paths, idle, busy = iter(paths), [], []
    try:
        while True:
            for path in itertools.islice(paths, num_workers - len(busy)):
                worker = idle.pop() if idle else Worker(work)
                busy.append(worker)
                worker.start(path, timeout)
            if not busy:
                return
            wait([worker.pipe for worker in busy], timeout=1)
            for worker in list(busy):
                result = worker.result()
                if result is None:
                    continue
                busy.remove(worker)
                if worker.usable:
                    idle.append(worker)
                yield worker.path, result
    finally:
        for worker in idle + busy:
            worker.process.kill()
            worker.process.join()


# ---------------------------------------------------------------------------------------------------------------------
# every video of a manifest, with a log of the results


def work_through(args, paths, work, settings, log, copy_of=None):
    """Compute work(path) for all paths, in processes, except for those that an earlier run has in `log`.

    Returns {path: record} and appends each record to the log when it is done. A record is what `work` returned (it has
    "error" if the video is bad) with the path, the file's size in bytes and the settings. Ends the script on Ctrl-C and
    SIGTERM, and if a result has "stop", which is a reason that no other video would succeed either.
    """
    records, total = earlier_records(log, set(paths), settings, args.retry, copy_of), len(set(paths))
    todo = [path for path in dict.fromkeys(paths) if path not in records]
    if records:
        print(f"{len(records):,} of {total:,} were done before ({log})")
    progress, done, bad = Progress(), 0, 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records.values())
        write_atomically(log, lambda temporary: temporary.write_text(lines, "utf-8"))
        results = in_processes(work, todo, args.workers, args.timeout)
        with open(log, "a", encoding="utf-8") as file, contextlib.closing(results):
            for path, result in results:
                if "stop" in result:
                    fail(f"{result['stop']}; the same command continues from here")
                records[path] = {"path": path, "bytes": size_in_bytes(path), "settings": settings, **result}
                file.write(json.dumps(records[path]) + "\n")
                file.flush()
                done, bad = done + 1, bad + ("error" in result)
                rate = done / (time.monotonic() - progress.started)
                text = f"{done:,}/{len(todo):,} videos, {bad:,} bad, {rate:.1f}/s, {progress.left(done, len(todo))}"
                progress.show(text, last=done == len(todo))
    except KeyboardInterrupt:
        print(f"\nstopped; {len(records):,} of {total:,} are done, and the same command continues from here")
        sys.exit(130)
    except OSError as error:
        fail(f"{log}: {error.strerror}")
    return records


def earlier_records(log, paths, settings, retry, copy_of):
    """{path: record} of the records in a log that are still valid.

    Not valid are records made with other settings or from a file of another size, those of a good video whose copy is
    gone (copy_of(path), if there are copies), and, with `retry`, those of bad videos.
    """
    records = {}
    if not log.is_file():
        return records
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # an incomplete line, if the script was killed
            continue
        path = record["path"]
        if path not in paths or record["settings"] != settings or record["bytes"] != size_in_bytes(path):
            continue
        if "error" in record and retry:
            continue
        if "error" not in record and copy_of and not os.path.isfile(copy_of(path)):
            continue
        records[path] = record
    return records


def size_in_bytes(path):
    """The size of a file; None for a folder or a missing file."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def read_absolute(manifest):
    """The absolute paths of a manifest, and its labels."""
    try:
        paths, labels = read_manifest(manifest)
    except (OSError, ValueError) as error:
        fail(str(error))
    return list(map(os.path.abspath, paths)), labels


def print_bad(records, log):
    """Print the first bad videos with the reason, and how many are good and bad."""
    bad = [record for record in records.values() if "error" in record]
    for record in bad[:20]:
        print(f"  {record['path']}: {record['error']}")
    print(f"{len(records) - len(bad):,} videos are good, {len(bad):,} bad; details in {log}")


def open_video(path):
    """Open a video, or a folder of images (00001.jpg, ...), which is read as a video of 12 frames per second."""
    if not is_folder(path):
        return open_container(path)
    names = os.listdir(path)
    suffix = next((s for s in (".jpg", ".jpeg", ".png") if any(name.endswith(s) for name in names)), ".jpg")
    pattern = re.sub(r"([\[\]*?\\{}%])", r"\\\1", path) + "/*" + suffix
    return open_container(pattern, format="image2", options={"pattern_type": "glob", "framerate": "12"})


def reason(error, path):
    """Why a video is bad, in one line, without its path."""
    if isinstance(error, BadVideo):
        return str(error).removeprefix(f"{path}: ")
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------------------------------
# check


def check_video(path, num_frames, frame_step):
    """Decode a video's first, middle and last clip. Returns its properties, or {"error": reason}."""
    try:
        properties = read_properties(path)
        for place in (0, 0.5, 1):
            read_clip(path, num_frames, frame_step, place)
    except Exception as error:  # damaged files raise anything in PyAV
        return {"error": reason(error, path)}
    return properties


def read_properties(path):
    """What a video's header says. BadVideo if no stream of the file can be decoded."""
    with open_video(path) as container:
        stream = video_stream(path, container)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return {
            "codec": stream.codec_context.name,
            "pix_fmt": stream.codec_context.pix_fmt,
            "width": stream.width,
            "height": stream.height,
            "fps": round(float(stream.average_rate), 3) if stream.average_rate else None,
            "frames": stream.frames,
            "seconds": seconds,
        }


def check(args):
    """Decode the first, middle and last clip of every video of a manifest.

    Writes two files next to the manifest NAME.csv: NAME.clean.csv, a manifest of the good videos, and NAME.check.jsonl,
    with one line per video: its properties, or why it is bad. A video is also bad if it hangs or crashes the decoder.
    After Ctrl-C, the same command continues where it stopped.
    """
    paths, labels = read_absolute(args.manifest)
    log, settings = args.manifest.with_suffix(".check.jsonl"), [args.num_frames, args.frame_step]
    records = work_through(args, paths, lambda path: check_video(path, *settings), settings, log)
    good = {path: record for path, record in records.items() if "error" not in record}
    print_properties(good.values())
    print_bad(records, log)
    lines = [(path, label) for path, label in zip(paths, labels, strict=True) if path in good]
    write_manifest(args.manifest.with_suffix(".clean.csv"), lines)


def print_properties(records):
    """Print the most frequent codecs, pixel formats and frame rates, and the distribution of sizes and lengths."""
    for key in ("codec", "pix_fmt", "fps"):
        most_common = Counter(str(record[key]) for record in records).most_common(8)
        print(f"{key}: " + ", ".join(f"{value} {count:,}" for value, count in most_common))
    for key in ("width", "height", "frames", "seconds"):
        values = [record[key] or 0 for record in records] or [0]
        percentiles = " / ".join(f"{x:g}" for x in np.percentile(values, [0, 5, 50, 95, 100]).round(2))
        print(f"{key}: {percentiles} (minimum, 5%, median, 95%, maximum)")


# ---------------------------------------------------------------------------------------------------------------------
# copy


def copy_video(path, out, short_side, crf):
    """Write a copy of a video to the path `out`.

    Returns the copy's "frames", "width", "height" and "bytes_out"; {"error": reason} if the video is bad; {"stop":
    reason} if the disk is full.
    """
    temporary = out + ".tmp"
    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            return {"error": "an image, not a video"}
        os.makedirs(os.path.dirname(out), exist_ok=True)
        with open_video(path) as container:
            record = write_copy(video_stream(path, container), temporary, short_side, crf)
        os.replace(temporary, out)
        return {**record, "bytes_out": os.path.getsize(out)}
    except Exception as error:  # damaged files raise anything in PyAV
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if getattr(error, "errno", None) in DISK_FULL:
            return {"stop": f"{out}: {reason(error, path)}"}
        return {"error": reason(error, path)}


def write_copy(stream, path, short_side, crf):
    """Decode all frames of a video stream and encode them into the file `path`. Returns what to record of the copy."""
    frames = stream.container.decode(stream)
    first = next(frames, None)
    if first is None:
        raise BadVideo("no frame can be decoded")
    with av.open(path, "w", format="mp4") as file:
        writer = CopyWriter(file, stream, first, short_side, crf)
        for frame in itertools.chain([first], frames):
            writer.write(frame)
        writer.finish()
    codec = writer.codec
    return {"frames": writer.frames, "frames_in_header": stream.frames, "width": codec.width, "height": codec.height}


class CopyWriter:
    """Encodes a stream's frames into an open mp4 file. The first frame determines the copy's size and colors."""

    def __init__(self, file, stream, first, short_side, crf):
        self.file, self.reformatter = file, VideoReformatter()
        rate, self.time_base = stream.average_rate or Fraction(25), stream.time_base
        self.stream = file.add_stream("libx264", rate=rate, options={**X264, "crf": str(crf)})
        self.stream.time_base = self.time_base
        self.codec = self.stream.codec_context
        self.codec.time_base, self.codec.thread_count, self.codec.pix_fmt = self.time_base, 1, "yuv420p"
        self.set_picture(stream, first, short_side)
        # All times are in units of the time base.
        self.frame_duration = max(1, round(1 / (rate * self.time_base)))  # where the file does not say
        self.start, self.time = first.pts or 0, -1  # of the first frame in the original, of the last one in the copy
        self.durations = deque()  # of the frames that the encoder has not returned yet
        self.frames = self.packets = 0  # written so far

    def set_picture(self, stream, first, short_side):
        """Set the copy's size, color metadata and aspect ratio."""
        picture = upright(first)
        self.codec.width, self.codec.height = copy_size(picture.width, picture.height, short_side)
        self.codec.color_range = ColorRange.MPEG
        if is_yuv(picture):  # others are converted to BT.601, which is what players assume without metadata
            self.codec.colorspace = first.colorspace
        self.codec.color_primaries, self.codec.color_trc = first.color_primaries, first.color_trc
        if stream.sample_aspect_ratio and picture is first:
            self.codec.sample_aspect_ratio = stream.sample_aspect_ratio

    def write(self, frame):
        """Turn upright, scale and encode a frame."""
        picture = upright(frame)
        source_range = picture.color_range if is_yuv(picture) else None
        size = self.codec.width, self.codec.height
        picture = self.reformatter.reformat(
            picture, *size, "yuv420p", src_color_range=source_range, dst_color_range=ColorRange.MPEG
        )
        time = self.time + self.frame_duration if frame.pts is None else frame.pts - self.start
        self.time = max(time, self.time + 1)  # keeps two frames that have the same time
        picture.pts, picture.time_base = self.time, self.time_base
        picture.pict_type = 0  # lets the encoder place the keyframes
        self.durations.append(self.duration(frame))
        self.frames += 1
        self.mux(self.codec.encode(picture))

    def duration(self, frame):
        """The duration of a frame. Matroska rounds it, which would change the average rate, so one unit is ignored."""
        duration = getattr(frame, "duration", 0) or self.frame_duration
        return duration if abs(duration - self.frame_duration) > 1 else self.frame_duration

    def mux(self, packets):
        """Write encoded packets to the file. Without B-frames, they are in the order of the frames."""
        for packet in packets:
            packet.duration = self.durations.popleft()  # mp4 needs the last one's to compute the average rate
            self.file.mux(packet)
            self.packets += 1

    def finish(self):
        """Write what the encoder still holds."""
        self.mux(self.codec.encode(None))
        if self.packets != self.frames:
            raise RuntimeError(f"{self.frames} frames in, {self.packets} out")


def is_yuv(picture):
    return picture.format.name.startswith("yuv")


def copy_size(width, height, short_side):
    """Width and height scaled down to this short side and rounded to even numbers, as yuv420p requires."""
    scale = min(1, short_side / min(width, height))
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))


def upright(frame):
    """Rotate and mirror a frame as its metadata says. Returns the frame itself if it is upright."""
    a, b, c, d = display_matrix(frame)
    if a > 0 and d > 0:
        return frame
    picture = frame.to_ndarray(format="rgb24")
    if abs(b) > abs(a):  # x and y are swapped
        picture, a, d = picture.swapaxes(0, 1), c, b
    if d < 0:
        picture = picture[::-1]
    if a < 0:
        picture = picture[:, ::-1]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


def display_matrix(frame):
    """(a, b, c, d), which place a decoded pixel (x, y) at (a x + c y, b x + d y), up to scale and shift."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except (
        ValueError
    ):  # PyAV 18 cannot list side data if a type is new to it (HEIC). The rotation is known, mirroring not.
        quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[quarter_turns]
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return a, b, c, d


def copy(args):
    """Make copies of a manifest's videos for training: small, fast to seek in, without sound.

    H.264 in yuv420p with a keyframe every 12 frames and no B-frames. The short side becomes --short-side pixels;
    smaller videos keep their size. Sides are rounded to even numbers. All frames are kept, with their time stamps
    counted from the first frame, even if the frame rate varies. Videos are rotated and mirrored as their metadata says.

    DIR gets the copies, a manifest of them named like the original NAME.csv, and NAME.copy.jsonl, with one line per
    video: the copy's properties, or why it failed. After Ctrl-C, the same command continues where it stopped.
    """
    paths, labels = read_absolute(args.manifest)
    folder, started = os.path.dirname(os.path.abspath(args.manifest)), time.monotonic()
    targets = {path: copy_path(path, folder, args.out) for path in paths}
    if len(set(targets.values())) < len(targets):
        fail(f"{args.manifest}: lists both FILE and FILE.mp4, whose copies would have the same name")
    if os.path.realpath(args.out) in (os.path.realpath(folder), os.sep):
        fail(f"--out {args.out}: the copies would replace the originals there")
    settings = {"short_side": args.short_side, "crf": args.crf}
    log = args.out / f"{args.manifest.stem}.copy.jsonl"
    records = work_through(
        args, paths, lambda path: copy_video(path, targets[path], **settings), settings, log, targets.get
    )
    for path, record in records.items():
        if "error" in record:  # a killed process leaves its file
            Path(targets[path] + ".tmp").unlink(missing_ok=True)
    good = {path: record for path, record in records.items() if "error" not in record}
    print_bad(records, log)
    before, after = (sum(record[key] or 0 for record in good.values()) / 1e9 for key in ("bytes", "bytes_out"))
    print(f"{before:.3f} GB became {after:.3f} GB in {duration(time.monotonic() - started)}")
    pairs = zip(paths, labels, strict=True)
    lines = [(os.path.relpath(targets[path], args.out), label) for path, label in pairs if path in good]
    write_manifest(args.out / args.manifest.name, lines)


def copy_path(path, folder, out):
    """Where to copy a video of a manifest in `folder`: at the same relative path in `out`, or at its absolute path.

    It depends on nothing else, so that other manifests with the same videos share the copies.
    """
    name = os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path.lstrip(os.sep)
    return os.path.join(os.path.abspath(out), name if name.endswith(".mp4") else name + ".mp4")


# ---------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(__doc__, prog="python -m tools.transcode")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(run, timeout):
        text = inspect.getdoc(run)
        command = commands.add_parser(run.__name__, description=text, help=text.splitlines()[0])
        command.set_defaults(run=run)
        flag = command.add_argument
        flag("manifest", type=Path, metavar="MANIFEST")
        flag("--workers", type=int, default=os.cpu_count(), help="number of processes")
        flag("--timeout", type=float, default=timeout, help="seconds after which a video counts as bad")
        flag("--retry", action="store_true", help="try the videos again that were bad before")
        return flag

    flag = add_command(check, timeout=120)
    flag("--num-frames", type=int, default=16, help="frames per clip")
    flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
    flag = add_command(copy, timeout=1800)
    flag("--out", type=Path, required=True, metavar="DIR", help="folder for the copies")
    flag("--short-side", type=int, default=256, help="pixels; smaller videos keep their size")
    flag("--crf", type=int, default=20, help="quality of x264: lower is better and larger")
    return parser.parse_args()


def main():
    args = parse_args()
    own_flags = {"check": ("num_frames", "frame_step"), "copy": ("short_side",)}
    require_at_least(args, 1, "workers", "timeout", *own_flags[args.command])
    args.run(args)


if __name__ == "__main__":
    main()
