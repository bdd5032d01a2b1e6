"""Official annotations to manifests; checking videos; copies made for training.

    python prepare.py k400 --annotations annotations/k400 --videos videos/k400    # data/k400/*
    python prepare.py k710 --annotations annotations/k400 annotations/k600 annotations/k700 --videos videos/k*
    python prepare.py v3.6m                             # joins data/k710, data/ssv2 and data/panda70m
    python prepare.py check data/k400/train.csv         # opens every video; train.clean.csv, train.check.jsonl
    python prepare.py transcode data/k400/train.csv --out small/k400    # H.264, short side 256, many keyframes

`python prepare.py k400 --help` says which files are expected and where they come from; likewise for the others.
"""

import contextlib
import csv
import errno
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
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, VideoReformatter

import data
import video
from cli import Parser, duration, fail, write_aside

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts"}
PAPER = {("k710", "train"): 657_257, ("ssv2", "train"): 168_913, ("panda70m", "train"): 2_799_959,
         ("v3.6m", "train"): 3_626_129}  # fmt: skip
PAPER_CLASSES = {"k400": 400, "ssv2": 174, "coin": 180, "diving48": 48, "jester": 27, "imagenet1k": 1000}
COUNTS = ("annotated", "found", "missing", "duplicate", "excluded", "written")


class Sample(NamedTuple):
    """A line of an annotation file."""

    split: str  # train or val
    clip: object  # what a second line with the same clip is a duplicate of
    source: object  # a training sample whose source is also one of a validation sample is excluded
    names: tuple  # names that its file may have, without suffix, the likeliest first
    label: str


# ---------------------------------------------------------------------------------------------------------------------
# one function per dataset: an annotation folder -> (names of the classes in order, samples)


def read_lines(folder, *names):
    """The open text of the first of these files that is in `folder`."""
    for name in names:
        if (Path(folder) / name).is_file():
            return open(Path(folder) / name, encoding="utf-8-sig", newline="")
    fail(f"--annotations {folder}: no {' or '.join(names)} there (--help says where to get it)")


def kinetics(folder):
    """Kinetics, one of its three sets: clips of 10 s cut from YouTube videos.

    --annotations: a folder with train.csv and val.csv (or train.txt, val.txt, validate.csv), from CVDF,
      https://github.com/cvdfoundation/kinetics-dataset; K600's csv files there are incomplete, its txt files are whole:
        https://s3.amazonaws.com/kinetics/400/annotations/{train,val}.csv
        https://s3.amazonaws.com/kinetics/600/annotations/{train,val}.txt
        https://s3.amazonaws.com/kinetics/700_2020/annotations/{train,val}.csv
      columns: label,youtube_id,time_start,time_end,split
    --videos: folders, searched to the bottom, with files ID_000012_000022.mp4 (YouTube id, start and end in seconds) or
      ID.mp4; in whatever folders. Where K400 has a file twice, the one under "replacement" (for corrupted files) is
      taken.
    """
    samples = []
    for split, names in (("val", ("val.csv", "val.txt", "validate.csv")), ("train", ("train.csv", "train.txt"))):
        with read_lines(folder, *names) as file:
            for row in csv.DictReader(file):
                video = row["youtube_id"]
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                clip = video, start, end
                samples.append(Sample(split, clip, clip, (f"{video}_{start:06}_{end:06}", video), row["label"].strip()))
    return sorted({s.label for s in samples}), samples


def k710(folders):
    """Kinetics-710: the training sets of Kinetics-400, 600 and 700 together (paper, appendix A).

    A clip (YouTube id, start, end) is taken once, with the label of the newest set that has it; what is cut from a
    video of any of the three validation sets is excluded, whatever its time span. Classes are the union of the names;
    names that differ only in capitals or apostrophes are one class. val.csv has the three validation sets together.
    --annotations: three folders, of k400, k600 and k700, each as `python prepare.py k400 --help` says
    --videos: the folders of all three
    """
    if len(folders) != 3:
        fail("--annotations: k710 takes three folders, of k400, k600 and k700")
    names, samples = {}, []
    for folder in reversed(folders):
        for sample in kinetics(folder)[1]:
            name = names.setdefault(re.sub(r"\W+", " ", sample.label.lower().replace("'", "")).strip(), sample.label)
            samples.append(sample._replace(source=sample.clip[0], label=name))
    return sorted(names.values()), samples


def ssv2(folder):
    """Something-Something-v2: 220,847 clips of 174 templates, 12 frames a second.

    --annotations: a folder with train.json, validation.json and labels.json, or the same with something-something-v2-
      before their names, from https://www.qualcomm.com/developer/software/something-something-v-2-dataset
    --videos: the folder of the extracted 20bn-something-something-v2-?? with ID.webm
    """
    prefixes = ("", "something-something-v2-")
    with read_lines(folder, *(f"{p}labels.json" for p in prefixes)) as file:
        labels = json.load(file)
    samples = []
    for split, name in (("val", "validation.json"), ("train", "train.json")):
        with read_lines(folder, *(p + name for p in prefixes)) as file:
            for row in json.load(file):  # labels.json has the template without its brackets
                video, label = str(row["id"]), row["template"].replace("[", "").replace("]", "")
                samples.append(Sample(split, video, video, (video,), label))
    return sorted(labels, key=lambda label: int(labels[label])), samples


def coin(folder):
    """COIN: 11,827 instructional videos of 180 tasks.

    --annotations: a folder with COIN.json, from https://github.com/coin-dataset/annotations
    --videos: the folder that its download_videos.py fills: TASK/YOUTUBE_ID.mp4
    Samples are whole videos; classes are in the order of COIN's task number (recipe_type).
    """
    with read_lines(folder, "COIN.json") as file:
        videos = json.load(file)["database"]
    splits = {"training": "train", "testing": "val", "validation": "val"}
    samples = [Sample(splits[v["subset"]], name, name, (name,), v["class"]) for name, v in videos.items()]
    order = {v["class"]: int(v["recipe_type"]) for v in videos.values()}
    return sorted(order, key=order.get), samples


def diving48(folder):
    """Diving-48, second version of the labels: 16,997 dives of 48 classes.

    --annotations: a folder with Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json, from
      http://www.svcl.ucsd.edu/projects/resound/dataset.html
    --videos: the folder rgb of Diving48_rgb.tar.gz from there, with VID_NAME.mp4
    """
    with read_lines(folder, "Diving48_vocab.json") as file:
        classes = [" ".join(words) for words in json.load(file)]
    samples = []
    for split, name in (("val", "Diving48_V2_test.json"), ("train", "Diving48_V2_train.json")):
        with read_lines(folder, name) as file:
            for row in json.load(file):
                video = row["vid_name"]
                samples.append(Sample(split, video, video, (video,), classes[int(row["label"])]))
    return classes, samples


def jester(folder):
    """Jester: 148,092 clips of 27 hand gestures, as folders of frames, 12 a second.

    --annotations: a folder with jester-v1-train.csv, jester-v1-validation.csv (lines "id;label") and
      jester-v1-labels.csv, from https://www.qualcomm.com/developer/software/jester-dataset
    --videos: the folder 20bn-jester-v1, with ID/00001.jpg, ...; or videos made of them, ID.mp4
    A line of the manifests names a folder. `python prepare.py transcode` makes videos of them.
    """
    with read_lines(folder, "jester-v1-labels.csv", "labels.csv") as file:
        classes = [line.strip() for line in file if line.strip()]
    samples = []
    for split, name in (("val", "validation.csv"), ("train", "train.csv")):
        with read_lines(folder, f"jester-v1-{name}", name) as file:
            for row in csv.reader(file, delimiter=";"):
                if len(row) > 1 and row[0].isdigit():  # some copies have a header
                    samples.append(Sample(split, row[0], row[0], (row[0],), row[1].strip()))
    return classes, samples


def imagenet1k(args):
    """ImageNet-1K (ILSVRC 2012): 1,281,167 images to train and 50,000 to validate, of 1,000 classes.

    --videos: a folder with train/SYNSET/*.JPEG and val/SYNSET/*.JPEG, from https://image-net.org (or Kaggle's
      ILSVRC/Data/CLS-LOC)
    --annotations, if val has no folders of synsets: Kaggle's LOC_val_solution.csv, or a text file with the synset of
      ILSVRC2012_val_00000001.JPEG and following, a line each (the development kit's file of numbers will not do)
    Classes are the synsets, sorted.
    """
    files = find_files(args.videos, video.IMAGE_SUFFIXES)
    synset, truth, samples = re.compile("n[0-9]{8}"), {}, []
    if args.annotations:
        lines = read_lines(*os.path.split(args.annotations[0])).read().splitlines()
        for number, line in enumerate((line for line in lines if not line.startswith("ImageId")), start=1):
            name, _, rest = line.rpartition(",")
            label = synset.match(rest.strip())
            if not label:
                fail(f"--annotations {args.annotations[0]}: {line[:40]!r} names no synset such as n01440764")
            truth[name or f"ILSVRC2012_val_{number:08}"] = label[0]
    for name, path in sorted(files.items()):
        folder = Path(path).parent
        if synset.fullmatch(folder.name) and folder.parent.name in ("train", "val"):
            samples.append(Sample(folder.parent.name, name, name, (name,), folder.name))
        elif folder.name == "val" and not truth:
            fail(f"{path} lies in no folder of a synset: --annotations is needed (--help)")
    samples += [Sample("val", name, name, (name,), label) for name, label in truth.items()]
    return sorted({s.label for s in samples}), samples, files


# ---------------------------------------------------------------------------------------------------------------------
# what the datasets share: finding, counting, writing


def find_files(folders, suffixes=VIDEO_SUFFIXES, frame_folders=frozenset()):
    """{name without suffix: path} of all files with these suffixes in and under the folders, in one walk.

    Folders named in `frame_folders` count as files. Of two files with one name, one under a folder "replacement" wins
    (K400's corrupted files), then the first in alphabetical order.
    """
    found, seen, stack, shown = {}, set(), [os.path.abspath(folder) for folder in folders], 0
    while stack:
        folder = stack.pop()
        if os.path.realpath(folder) in seen:  # a link back
            continue
        seen.add(os.path.realpath(folder))
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name, suffix = os.path.splitext(entry.name)
                    if entry.name in frame_folders:
                        name = entry.name
                    elif suffix.lower() not in suffixes:
                        if entry.is_dir():
                            stack.append(entry.path)
                        continue
                    elif os.path.splitext(name)[1].lower() in suffixes:  # ID.mp4.webm, as some downloaders leave it
                        name = os.path.splitext(name)[0]
                    if not entry.path.isprintable():  # a manifest cannot hold a line break, nor what is not UTF-8
                        continue
                    if name not in found or _rank(entry.path) < _rank(found[name]):
                        found[name] = entry.path
        except OSError as error:
            fail(f"--videos {folder}: {error.strerror}")
        if len(found) > shown + 100_000:
            shown = len(found)
            print(f"\r{shown:,} files  ", end="", flush=True)
    print(f"\r{len(found):,} files under {', '.join(map(str, folders))}")
    return found


def _rank(path):
    return "replacement" not in path, path


def select(samples, files):
    """({split: [(path, label)]}, {split: counts}): the samples whose file is there and new; validation comes first."""
    chosen, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    clips, sources, used = set(), set(), set()
    for sample in sorted(samples, key=lambda s: s.split != "val"):
        count = counts[sample.split]
        count["annotated"] += 1
        path = next((files[name] for name in sample.names if name in files), None)
        if sample.split == "train" and sample.source in sources:
            count["excluded"] += 1
        elif sample.clip in clips:
            count["duplicate"] += 1
        elif not path:
            count["missing"] += 1
        elif path in used:  # two spans of one video whose file has no span in its name
            count["duplicate"] += 1
        else:
            count["found"] += 1
            chosen[sample.split].append((path, sample.label))
            used.add(path)
        clips.add(sample.clip)
        if sample.split == "val":
            sources.add(sample.source)
    return chosen, counts


def write_manifest(path, lines):
    """Write (path, label) pairs as a manifest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda aside: aside.write_text("".join(f"{p} {label}\n" for p, label in lines), "utf-8"))
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    print(f"{path}: {len(lines):,} lines")


def report(task, counts):
    """Print the counts, the paper's beside them."""
    print(f"{'':8}" + "".join(f"{name:>12}" for name in COUNTS) + f"{'paper':>12}")
    for split, count in counts.items():
        paper = f"{PAPER[task, split]:,}" if (task, split) in PAPER else "-"
        print(f"{split:8}" + "".join(f"{count[name]:>12,}" for name in COUNTS) + f"{paper:>12}")


def prepare(args):
    """Everything but panda70m and v3.6m: read the annotations, find the files, write manifests and classes."""
    try:
        if args.command == "imagenet1k":
            classes, samples, files = imagenet1k(args)
        else:
            read = {"k710": k710, "ssv2": ssv2, "coin": coin, "diving48": diving48, "jester": jester}
            whole = args.annotations if args.command == "k710" else args.annotations[0]
            classes, samples = read.get(args.command, kinetics)(whole)
            folders = {name for s in samples for name in s.names} if args.command == "jester" else frozenset()
            files = find_files(args.videos, frame_folders=folders)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        fail(f"--annotations: not in {args.command}'s format: {type(error).__name__} {error} (--help names the files)")
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = next((s.label for s in samples if s.label not in numbers), None)
    if unknown is not None:
        fail(f"--annotations: {unknown!r} is no class of {args.command}")
    chosen, counts = select(samples, files)
    out = args.out or Path("data") / args.command
    for split, lines in chosen.items():
        counts[split]["written"] = len(lines)
        if lines:
            write_manifest(out / f"{split}.csv", [(path, numbers[label]) for path, label in lines])
    if not any(chosen.values()):
        fail(f"--videos {' '.join(map(str, args.videos))}: none of the {len(samples):,} annotated files is there")
    write_aside(out / "classes.txt", lambda aside: aside.write_text("".join(f"{c}\n" for c in classes), "utf-8"))
    paper = PAPER_CLASSES.get(args.command)
    print(f"{out / 'classes.txt'}: {len(classes)} classes" + (f" (paper: {paper})" if paper else ""))
    report(args.command, counts)


def panda70m(args):
    """Panda-70M: a sample of its clips, stratified over their duration from 4 to 50 s (paper, appendix A).

    --annotations: panda70m_training_full.csv, _10m.csv or _2m.csv, from
      https://github.com/snap-research/Panda-70M/tree/main/dataset_dataloading (the one that was downloaded by)
    --videos: the folder that the video2dataset there fills: SHARD/ROW_CLIP.mp4, 0000012_00003.mp4 is the fourth clip of
      the csv file's 13th row; VIDEOID_00003.mp4 will do too
    A stratum is a second of duration; every stratum gives equally many clips, those that have fewer give all of theirs.
    No labels. --count is the paper's; the sample depends on the files that are there, on --count and on --seed.
    """
    files, count = find_files(args.videos), Counter()
    strata, checked = [[] for _ in range(46)], False
    csv.field_size_limit(2**31 - 1)  # a row has all captions of a video
    with read_lines(*os.path.split(args.annotations[0])) as file:
        rows = csv.DictReader(file)
        if not {"videoID", "url", "timestamp"} <= set(rows.fieldnames or ()):
            fail(f"--annotations {args.annotations[0]}: no columns videoID, url and timestamp (--help names the files)")
        for number, row in enumerate(rows):
            times = [
                int(h) * 3600 + int(m) * 60 + float(s)
                for h, m, s in re.findall(r"(\d+):(\d+):([\d.]+)", row["timestamp"])
            ]
            for clip, seconds in enumerate(end - start for start, end in zip(times[::2], times[1::2], strict=True)):
                count["annotated"] += 1
                path = files.get(f"{number:07}_{clip:05}") or files.get(f"{row['videoID']}_{clip:05}")
                if path and not checked and os.path.isfile(aside := os.path.splitext(path)[0] + ".json"):
                    checked = True  # rows of another csv file would give each clip another one's duration
                    if row["videoID"] not in Path(aside).read_text(encoding="utf-8"):
                        fail(f"--annotations: {path} is not of video {row['videoID']}; another file downloaded it")
                count["missing" if not path else "found" if 4 <= seconds <= 50 else "excluded"] += 1
                if path and 4 <= seconds <= 50:
                    strata[min(int(seconds) - 4, 45)].append((number, clip, path))
    rng, chosen = np.random.default_rng(args.seed), []
    for left, stratum in zip(range(46, 0, -1), sorted(strata, key=len), strict=True):  # the smallest give all they have
        share = min(len(stratum), (args.count - len(chosen)) // left)
        chosen += [stratum[i] for i in rng.choice(len(stratum), share, replace=False)]
    count["written"] = len(chosen)
    if not chosen:
        fail(f"--videos {' '.join(map(str, args.videos))}: none of the {count['annotated']:,} clips is there")
    write_manifest((args.out or Path("data/panda70m")) / "train.csv", [(path, -1) for *_, path in sorted(chosen)])
    print("clips per second of duration: " + ", ".join(f"{len(s):,}" for s in strata) + " (found, from 4 s)")
    report("panda70m", {"train": count})


def v36m(args):
    """V-3.6M: K710, SSv2 and the sample of Panda-70M in one manifest (paper, table 2).

    --manifests: the three, as the commands of their names write them. Without weights training sees every video once
    per pass, so each part has the weight of its size; labels, which mean something else in each part, become -1.
    """
    counts, lines = {}, {}
    for manifest in args.manifests:
        try:
            paths = data.read_manifest(manifest)[0]
        except (OSError, ValueError) as error:
            fail(f"--manifests: {error}")
        new = [path for path in dict.fromkeys(map(os.path.abspath, paths)) if path not in lines]
        lines.update(dict.fromkeys(new, -1))
        counts[Path(manifest).parent.name] = len(new), len(paths) - len(new)
    out = (args.out or Path("data/v3.6m")) / "train.csv"
    write_manifest(out, list(lines.items()))
    for name, (size, duplicates) in [*counts.items(), ("v3.6m", (len(lines), sum(d for _, d in counts.values())))]:
        paper = f"{PAPER[name, 'train']:,}" if (name, "train") in PAPER else "-"
        print(f"{name:12}{size:>12,} videos, weight {size / len(lines):.4f}, {duplicates:,} duplicates; paper {paper}")
    print(f"train on it with --data {out}")


# ---------------------------------------------------------------------------------------------------------------------
# work on every video of a manifest, in processes that may die


def _serve(work, pipe, parents_end):
    """A worker: does what comes through the pipe, until the parent is gone. Ctrl-C is the parent's to answer."""
    parents_end.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(work(pipe.recv()))


def in_processes(work, paths, workers, timeout):
    """Yields (path, work(path)) as they come. Where the process dies or takes over `timeout` s: {"error": ...}."""
    context = multiprocessing.get_context("fork")  # a process costs 10 ms, not an import of torch
    idle, busy, paths = [], {}, iter(paths)
    try:
        while True:
            for path in itertools.islice(paths, workers - len(busy)):
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(work, theirs, ours), daemon=True)
                    process.start()
                    theirs.close()
                    idle.append((ours, process))
                pipe, process = idle.pop()
                pipe.send(path)
                busy[pipe] = process, path, time.monotonic() + timeout
            if not busy:
                return
            ready = wait(list(busy), timeout=1)
            for pipe, (process, path, deadline) in list(busy.items()):
                if pipe not in ready and time.monotonic() < deadline:
                    continue
                del busy[pipe]
                if pipe in ready:
                    try:
                        result = pipe.recv()
                        idle.append((pipe, process))
                    except (EOFError, ConnectionResetError):
                        process.join()
                        died = signal.Signals(-process.exitcode).name if process.exitcode < 0 else process.exitcode
                        result = {"error": f"the process that read it died ({died})"}
                else:
                    process.kill()
                    result = {"error": f"not done after {timeout:g} s"}
                yield path, result
    finally:
        for process in [p for _, p in idle] + [p for p, *_ in busy.values()]:
            process.kill()
            process.join()


def size_in_bytes(path):
    """None for what is not a file."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def work_through(args, paths, work, settings, log, copy_of=None):
    """{path: record} of all paths: what `log` (JSON lines) has from before, and the rest, done now and written there.

    A record is what `work` gives, with an "error" if the video is bad. Records made by other settings, or of a file of
    another size, or of a lost copy_of(path), are not from before. Ends the script at a signal and where `work` says
    "stop", leaving a log to go on from.
    """
    records, wanted = {}, set(paths)
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line, if it was cut off
                record = json.loads(line)
                path, bad = record["path"], "error" in record
                same = record["settings"] == settings and record["bytes"] == size_in_bytes(path)
                kept = not args.retry if bad else copy_of is None or os.path.isfile(copy_of(path))
                if path in wanted and same and kept:
                    records[path] = record
    todo = [path for path in dict.fromkeys(paths) if path not in records]
    if records:
        print(f"{len(records):,} of {len(wanted):,} were done before ({log})")

    def interrupt(*_):
        raise KeyboardInterrupt

    before, started, shown = signal.signal(signal.SIGTERM, interrupt), time.monotonic(), 0
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        write_aside(log, lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in records.values()), "utf-8"))
        results = in_processes(work, todo, args.workers, args.timeout)
        with open(log, "a", encoding="utf-8") as file, contextlib.closing(results):
            for number, (path, result) in enumerate(results, start=1):
                if "stop" in result:
                    fail(f"{result['stop']}; the same command goes on from here")
                records[path] = {"path": path, "bytes": size_in_bytes(path), "settings": settings, **result}
                file.write(json.dumps(records[path]) + "\n")
                file.flush()
                now = time.monotonic() - started
                if now > shown + (1 if sys.stdout.isatty() else 30) or number == len(todo):
                    shown, left = now, now * (len(todo) - number) / number
                    bad = sum("error" in r for r in records.values())
                    print(f"{number:,}/{len(todo):,} videos, {bad:,} bad, {number / now:.1f}/s, {duration(left)} left",
                          end="\r" if sys.stdout.isatty() and number < len(todo) else "\n", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nstopped; {len(records):,} of {len(wanted):,} are done, the same command goes on from here")
        sys.exit(130)
    except OSError as error:
        fail(f"{log}: {error.strerror}")
    finally:
        signal.signal(signal.SIGTERM, before)
    return records


def lines_of(args):
    """(paths, labels) of args.manifest, paths absolute."""
    try:
        paths, labels = data.read_manifest(args.manifest)
    except (OSError, ValueError) as error:
        fail(str(error))
    return list(map(os.path.abspath, paths)), labels


def name_bad(records, log):
    """Print why videos are bad, and the first that are."""
    bad = [record for record in records.values() if "error" in record]
    for record in bad[:20]:
        print(f"  {record['path']}: {record['error']}")
    print(f"{len(records) - len(bad):,} videos are good, {len(bad):,} bad; all of them in {log}")


def open_video(path):
    """av.open; a folder of frames (00001.jpg, ...) is a video of 12 frames a second, as Jester is."""
    if not os.path.isdir(path):
        return av.open(path)
    suffix = next((s for s in (".jpg", ".jpeg", ".png") if any(n.endswith(s) for n in os.listdir(path))), ".jpg")
    pattern = re.sub(r"([\[\]*?\\{}%])", r"\\\1", path) + "/*" + suffix
    return av.open(pattern, format="image2", options={"pattern_type": "glob", "framerate": "12"})


def reason(error):
    """An exception in a line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


UNREADABLE = (av.FFmpegError, ValueError, RuntimeError, OSError, MemoryError)


# ---------------------------------------------------------------------------------------------------------------------
# check


def check_video(path, num_frames, frame_step):
    """What the video is, or {"error": why it gives no clip}: its first, middle and last clip are decoded."""
    try:
        with open_video(path) as container:
            if not container.streams.video:
                return {"error": "no video stream"}
            stream = container.streams.video[0]
            rate, seconds = stream.average_rate, stream.duration and float(stream.duration * stream.time_base)
            record = {"codec": stream.codec_context.name, "pix_fmt": stream.codec_context.pix_fmt,
                      "width": stream.width, "height": stream.height, "fps": rate and round(float(rate), 3),
                      "frames": stream.frames, "seconds": seconds or (container.duration or 0) / 1e6}  # fmt: skip
        for place in (0, 0.5, 1):
            video.read_clip(path, num_frames, frame_step, place)
    except UNREADABLE as error:
        return {"error": reason(error).removeprefix(f"{path}: ")}
    return record


def check(args):
    """Decode the first, middle and last clip of every video of a manifest; write a manifest of the good ones.

    Writes NAME.clean.csv and NAME.check.jsonl (a line per video: what it is, or why it is bad) beside NAME.
    A file that hangs or crashes the decoder is a bad one. Ctrl-C stops; the same command goes on.
    """
    paths, labels = lines_of(args)
    log, settings = args.manifest.with_suffix(".check.jsonl"), [args.num_frames, args.frame_step]
    records = work_through(args, paths, lambda path: check_video(path, *settings), settings, log)
    good = {path: record for path, record in records.items() if "error" not in record}
    for what in ("codec", "pix_fmt", "fps"):
        most = Counter(str(record[what]) for record in good.values()).most_common(8)
        print(f"{what}: " + ", ".join(f"{value} {n:,}" for value, n in most))
    for what in ("width", "height", "frames", "seconds"):
        values = [record[what] or 0 for record in good.values()] or [0]
        print(f"{what}: " + " / ".join(f"{v:g}" for v in np.percentile(values, [0, 5, 50, 95, 100]).round(2)),
              "(smallest, 5%, median, 95%, largest)")  # fmt: skip
    name_bad(records, log)
    clean = [(path, label) for path, label in zip(paths, labels, strict=True) if path in good]
    write_manifest(args.manifest.with_suffix(".clean.csv"), clean)


# ---------------------------------------------------------------------------------------------------------------------
# transcode


def transcode_video(path, out, short_side, crf):
    """Write the copy `out`; {"frames", "width", "height", "bytes_out"} of it, or "error", or "stop" (a full disk)."""
    aside = out + ".tmp"
    try:
        if Path(path).suffix.lower() in video.IMAGE_SUFFIXES:
            return {"error": "an image, not a video"}
        os.makedirs(os.path.dirname(out), exist_ok=True)
        with open_video(path) as container:
            if not container.streams.video:
                return {"error": "no video stream"}
            record = _transcode(container, aside, short_side, crf)
        os.replace(aside, out)
        return {**record, "bytes_out": os.path.getsize(out)}
    except UNREADABLE as error:
        with contextlib.suppress(OSError):
            os.remove(aside)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return {"stop": f"{out}: {reason(error)}"}
        return {"error": reason(error)}


def upright(frame):
    """The frame as its metadata says that it is to be shown, turned or mirrored; itself where they say nothing."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # PyAV 18 fails if there is side data that it does not know (HEIC's); no mirroring then
        turns = round(frame.rotation / 90) % 4  # counter-clockwise
        a, b, c, d = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turns]
    else:
        a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()
    if a > 0 and d > 0:
        return frame
    picture = frame.to_ndarray(format="rgb24")
    if abs(b) > abs(a):  # what is at x, y is shown at a x + c y, b x + d y
        picture, a, d = picture.swapaxes(0, 1), c, b
    picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


def _transcode(container, aside, short_side, crf):
    """Decode, turn, scale and encode every frame; the frames keep their time stamps, counted from the first."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    rate, base = stream.average_rate or Fraction(25), stream.time_base
    step = max(1, round(1 / (rate * base)))  # ticks from frame to frame, where the file does not say
    reformatter, decoded, encoded, last, durations = VideoReformatter(), 0, 0, -1, deque()
    with av.open(aside, "w", format="mp4") as file:
        # Scene changes would put keyframes elsewhere, and B-frames make every seek decode more.
        options = {
            "crf": str(crf),
            "g": "12",
            "keyint_min": "12",
            "sc_threshold": "0",
            "bf": "0",
            "tune": "fastdecode",
        }  # no CABAC, no deblocking: decoded in half the time, 8% larger
        copy = file.add_stream("libx264", rate=rate, options=options)
        coded = copy.codec_context
        coded.thread_count, coded.pix_fmt = 1, "yuv420p"
        copy.time_base = coded.time_base = base

        def mux(packets):
            for packet in packets:  # in the order of the frames, since there are no B-frames
                packet.duration = durations.popleft()
                file.mux(packet)
            return len(packets)

        for frame in container.decode(stream):
            picture = upright(frame)
            if not decoded:
                first = frame.pts or 0
                scale = min(1, short_side / min(picture.width, picture.height))
                width, height = (  # even, as yuv420p needs it
                    max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (picture.width, picture.height)
                )
                coded.width, coded.height, coded.color_range = width, height, ColorRange.MPEG
                if picture.format.name.startswith("yuv"):  # others become BT.601, which is what untagged means
                    coded.colorspace = frame.colorspace
                coded.color_primaries, coded.color_trc = frame.color_primaries, frame.color_trc
                if stream.sample_aspect_ratio and picture is frame:
                    coded.sample_aspect_ratio = stream.sample_aspect_ratio
            pts = last + step if frame.pts is None else frame.pts - first
            last = max(pts, last + 1)  # two frames of one time remain two frames
            ticks = getattr(frame, "duration", 0) or step
            durations.append(ticks if abs(ticks - step) > 1 else step)  # Matroska's are rounded, which shifts the rate
            full = picture.color_range if picture.format.name.startswith("yuv") else None
            picture = reformatter.reformat(picture, width, height, "yuv420p", src_color_range=full,
                                           dst_color_range=ColorRange.MPEG)  # fmt: skip
            picture.pts, picture.time_base, picture.pict_type = last, base, 0  # keyframes are the encoder's to choose
            decoded, encoded = decoded + 1, encoded + mux(coded.encode(picture))
        if not decoded:
            raise ValueError("no frame can be decoded")
        encoded += mux(coded.encode(None))
    if encoded != decoded:
        raise RuntimeError(f"{decoded} frames in, {encoded} out")
    return {"frames": decoded, "frames_in_header": stream.frames, "width": width, "height": height}


def transcode(args):
    """Make a copy of a manifest's videos for training: small, quick to seek in, without sound.

    H.264 in yuv420p, short side --short-side (never enlarged; even sizes), a keyframe every 12 frames, no B-frames.
    Every frame is kept, with its time stamp counted from the first frame's, constant frame rate or not; turned upright
    where metadata says that it is to be shown turned. DIR gets the videos, the manifest NAME of the copy and
    NAME.transcode.jsonl (a line per video; why one failed). Ctrl-C stops; the same command goes on.
    """
    paths, labels = lines_of(args)
    base, log = os.path.dirname(os.path.abspath(args.manifest)), args.out / (args.manifest.stem + ".transcode.jsonl")

    def target(path):  # by the path alone, so that another manifest finds the same copy
        name = os.path.relpath(path, base) if path.startswith(base + os.sep) else path.lstrip(os.sep)
        return os.path.join(os.path.abspath(args.out), name if name.endswith(".mp4") else name + ".mp4")

    if len({target(path) for path in paths}) < len(set(paths)):
        fail(f"{args.manifest}: names both FILE and FILE.mp4, which would have one copy")
    if os.path.realpath(args.out) in (os.path.realpath(base), os.sep):
        fail(f"--out {args.out}: copies there would replace the originals")
    settings, started = {"short_side": args.short_side, "crf": args.crf}, time.monotonic()
    records = work_through(
        args, paths, lambda p: transcode_video(p, target(p), **settings), settings, log, copy_of=target
    )
    for path, record in records.items():
        if "error" in record:  # what a killed process left
            Path(target(path) + ".tmp").unlink(missing_ok=True)
    good = {path: record for path, record in records.items() if "error" not in record}
    name_bad(records, log)
    sizes = [sum(record[key] or 0 for record in good.values()) / 1e9 for key in ("bytes", "bytes_out")]
    print(f"{sizes[0]:.3f} GB became {sizes[1]:.3f} GB, {duration(time.monotonic() - started)}")
    copies = [
        (os.path.relpath(target(p), args.out), label) for p, label in zip(paths, labels, strict=True) if p in good
    ]
    write_manifest(args.out / args.manifest.name, copies)


# ---------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, run):
        text = inspect.getdoc(function)
        added = commands.add_parser(name, description=text, help=text.splitlines()[0])
        added.set_defaults(run=run)
        return added.add_argument

    functions = {"k400": kinetics, "k600": kinetics, "k700": kinetics, "k710": k710, "ssv2": ssv2, "panda70m": panda70m,
                 "coin": coin, "diving48": diving48, "jester": jester, "imagenet1k": imagenet1k}  # fmt: skip
    for name, function in functions.items():
        flag = command(name, function, panda70m if name == "panda70m" else prepare)
        flag("--annotations", nargs="+", required=name != "imagenet1k", help="see above")
        flag("--videos", nargs="+", required=True, metavar="DIR", help="see above")
        flag("--out", type=Path, help=f"folder of the manifests; default data/{name}")
        if name == "panda70m":
            flag("--count", type=int, default=PAPER["panda70m", "train"], help="clips to sample")
            flag("--seed", type=int, default=0)
    flag = command("v3.6m", v36m, v36m)
    parts = [f"data/{name}/train.csv" for name in ("k710", "ssv2", "panda70m")]
    flag("--manifests", nargs="+", default=parts, metavar="MANIFEST", help="the parts")
    flag("--out", type=Path, help="folder of the manifest; default data/v3.6m")
    for function, timeout in ((check, 120), (transcode, 1800)):
        flag = command(function.__name__, function, function)
        flag("manifest", type=Path, metavar="MANIFEST")
        flag("--workers", type=int, default=os.cpu_count(), help="processes")
        flag("--timeout", type=float, default=timeout, help="seconds after which a video counts as one that hangs")
        flag("--retry", action="store_true", help="try again what was bad before")
        if function is check:
            flag("--num-frames", type=int, default=16, help="frames of a clip")
            flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
        else:
            flag("--out", type=Path, required=True, metavar="DIR", help="folder of the copy")
            flag("--short-side", type=int, default=256, help="pixels; smaller videos keep their size")
            flag("--crf", type=int, default=20, help="x264's quality: smaller is better and larger")
    args = parser.parse_args()
    for name in ("workers", "count", "num_frames", "frame_step", "short_side", "timeout"):
        if getattr(args, name, 1) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return args


def main():
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
