"""Check every video of a manifest: decode its first, middle and last clip.

    python -m tools.check data/k400/train.csv

Writes two files next to the manifest NAME.csv: NAME.clean.csv, a manifest of the good videos, and NAME.check.jsonl,
with one line per video: its size, or why it is bad. Every video is decoded in a process that may crash or hang without
stopping the others; a video that makes it do so is bad. The same command continues where it was stopped, and tries bad
videos again; delete NAME.check.jsonl to check all again.
"""

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pebble

import video
from cli import Parser, fail, progress, require_at_least, write_lines
from data import read_manifest
from video import BadVideo, bad_video, is_folder, list_frames


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


def check_videos(paths, num_frames, frame_step, workers, timeout, log):
    """Check all videos, in processes, except for those that an earlier run has in `log` as good. Prints the bad ones.

    Returns the set of the good paths, and appends a record per video to the log when it is done: what `check_video`
    returned, the path and the clip. Ends the script on Ctrl-C and SIGTERM.
    """
    clip = [num_frames, frame_step]
    records, total = earlier_records(log, set(paths), clip), len(set(paths))
    todo = [path for path in dict.fromkeys(paths) if path not in records]
    if records:
        print(f"{len(records):,} of {total:,} were done before ({log})")
    bad = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        write_lines(log, map(json.dumps, records.values()))
        work = functools.partial(check_video, num_frames=num_frames, frame_step=frame_step)
        results = in_processes(work, todo, workers, timeout)
        with open(log, "a", encoding="utf-8") as file, contextlib.closing(results):
            for path, result in progress(results, total=len(todo), unit=" videos"):
                records[path] = {"path": path, "clip": clip, **result}
                print(json.dumps(records[path]), file=file, flush=True)
                if "error" in result:
                    bad.append(path)
    except KeyboardInterrupt:
        print(f"\nstopped; {len(records):,} of {total:,} are done, and the same command continues from here")
        sys.exit(130)
    except OSError as error:
        fail(f"{log}: {error.strerror}")
    for path in bad[:20]:
        print(f"  {path}: {records[path]['error']}")
    print(f"{total - len(bad):,} videos are good, {len(bad):,} bad; details in {log}")
    return records.keys() - set(bad)


def earlier_records(log, paths, clip):
    """{path: record} of the good videos in a log that were checked with the same clip."""
    records = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # an incomplete line, if the script was killed
            record = json.loads(line)
            if record["path"] in paths and record.get("clip") == clip and "error" not in record:
                records[record["path"]] = record
    return records


def write_manifest(path, pairs):
    write_lines(path, [f"{name} {label}" for name, label in pairs])
    print(f"{path}: {len(pairs):,} lines")


def main():
    parser = Parser(__doc__, prog="python -m tools.check")
    flag = parser.add_argument
    flag("manifest", type=Path, metavar="MANIFEST")
    flag("--num-frames", type=int, default=16, help="frames per clip")
    flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
    flag("--workers", type=int, default=os.cpu_count(), help="number of processes")
    flag("--timeout", type=float, default=120, help="seconds after which a video counts as bad")
    args = parser.parse_args()
    require_at_least(args, 1, "num_frames", "frame_step", "workers", "timeout")
    try:
        paths, labels = read_manifest(args.manifest)
    except (OSError, ValueError) as error:
        fail(str(error))
    paths, log = list(map(os.path.abspath, paths)), args.manifest.with_suffix(".check.jsonl")
    good = check_videos(paths, args.num_frames, args.frame_step, args.workers, args.timeout, log)
    pairs = [pair for pair in zip(paths, labels, strict=True) if pair[0] in good]
    write_manifest(args.manifest.with_suffix(".clean.csv"), pairs)


if __name__ == "__main__":
    main()
