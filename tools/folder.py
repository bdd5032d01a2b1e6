"""The command `folder` of tools/prepare.py: manifests of your own videos.

    python -m tools.prepare folder my_videos --out data/mine
    python -m tools.prepare folder my_videos --out data/mine --group 'g(\\d+)'      # keeps a source's videos together

Finds the videos, decodes clips of them (tools/transcode.py), splits them into train and val, and writes the manifests.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from cli import fail, write_lines
from data import write_manifest
from tools.transcode import check_video, print_bad, work_through

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts"}
CLIP = [16, 4]  # frames and frame step of the clips that are decoded to check a video, as in training


class Video(NamedTuple):
    path: str  # absolute
    source: str  # all videos with the same source go to the same split
    label: str  # name of the class; "" if unlabeled


def write_folder(args):
    """Your own videos, in one folder; its subfolders, if any, are the classes.

    Finds the videos in VIDEOS and all its subfolders by their suffixes. A video in VIDEOS/running/2024/ has the class
    "running". Classes are numbered in alphabetical order. Videos directly in VIDEOS, or all with --unlabeled, get the
    label -1, which is enough for pretraining.

    Decodes the first, middle and last clip of every video, and leaves out those that fail. check.jsonl in --out has one
    line per video: its properties, or why it is bad. After Ctrl-C, the same command continues where it stopped.

    About --val-fraction of each class's videos, at least one, go to val.csv and the others to train.csv. The choice is
    random, but the same every time. Without --group, it is made by file. If several videos are cut from the same
    recording, that makes validation too easy. --group 'g(\\d+)' keeps those together whose file names have the same
    number after a "g", whatever their class: a source is the first group of the regular expression's first match in the
    file name, or the whole match.
    """
    if not 0 < args.val_fraction < 1:
        fail(f"--val-fraction {args.val_fraction}: must be above 0 and below 1")
    videos = list_videos(args.videos, args.group, args.unlabeled)
    labels = sorted({v.label for v in videos})
    split(videos, labels, args.val_fraction)  # to fail now rather than after decoding
    log = args.out / "check.jsonl"
    records = work_through(args, [v.path for v in videos], lambda path: check_video(path, *CLIP), CLIP, log)
    print_bad(records, log)
    good = [v for v in videos if "error" not in records[v.path]]
    splits = split(good, labels, args.val_fraction)

    classes = [label for label in labels if label]
    numbers = {"": -1, **{label: number for number, label in enumerate(classes)}}
    for name, members in splits.items():
        write_manifest(args.out / f"{name}.csv", [(v.path, numbers[v.label]) for v in members])
    write_lines(args.out / "classes.txt", classes)
    sizes = {name: Counter(v.label for v in members).values() for name, members in splits.items()}
    ranges = " and ".join(f"{min(size):,} to {max(size):,} {name}" for name, size in sizes.items())
    contents = f"{len(classes)} classes, each with {ranges} videos" if classes else "no classes, so all labels are -1"
    print(f"{args.out / 'classes.txt'}: {contents}")
    if args.group:
        print("sources: " + ", ".join(f"{len({v.source for v in members})} {name}" for name, members in splits.items()))


def list_videos(folder, group, unlabeled):
    """The videos of a folder, sorted by path. Ends the script if there are none, or if their classes are unclear."""
    paths, others = find_videos(folder)
    suffixes = ", ".join(f"{suffix or 'none'} {count:,}" for suffix, count in others.most_common(8))
    ignored = f"; ignored by suffix: {suffixes}" if others else ""
    if not paths:
        fail(f"{folder}: no files with the suffixes {' '.join(sorted(VIDEO_SUFFIXES))} in it{ignored}")
    print(f"{len(paths):,} videos in {folder}{ignored}")
    sources = find_sources(paths, group)
    labels = [Path(path).parts[0] if os.sep in path and not unlabeled else "" for path in paths]
    if len(set(labels)) > 1 and "" in labels:
        loose = paths[labels.index("")]
        fail(
            f"{folder}: {labels.count(''):,} videos, such as {loose}, are in no class folder, but others are; "
            "move them into one, or give --unlabeled"
        )
    root = os.path.abspath(folder)
    return [Video(os.path.join(root, p), s, label) for p, s, label in zip(paths, sources, labels, strict=True)]


def find_videos(root):
    """The sorted paths, relative to `root`, of all files with a video's suffix; and a Counter of the other suffixes."""

    def unreadable(error):
        fail(f"{error.filename}: {error.strerror}")

    paths, others, seen = [], Counter(), set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders.sort()
        if os.path.realpath(folder) in seen:  # symbolic links may form circles
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in names:
            path, suffix = os.path.relpath(os.path.join(folder, name), root), os.path.splitext(name)[1].lower()
            if suffix not in VIDEO_SUFFIXES:
                others[suffix] += 1
            elif path.isprintable():
                paths.append(path)
            else:  # line breaks, or bytes that are not UTF-8
                print(f"  {path!a} is left out: a manifest cannot hold this name")
    return sorted(paths), others


def find_sources(paths, group):
    """The source of each path: what the regular expression `group` finds in its file name; without one, the path."""
    if group is None:
        return paths
    try:
        matches = [re.search(group, os.path.basename(path)) for path in paths]
    except re.error as error:
        fail(f"--group {group} is not a regular expression: {error}")
    if None in matches:
        first = paths[matches.index(None)]
        fail(f"--group {group} does not match {matches.count(None):,} of {len(paths):,} file names, such as {first}")
    return [match[1] if match.re.groups and match[1] is not None else match[0] for match in matches]


def choose_sources(videos, fraction):
    """The sources of the validation set.

    Visits the sources in a random order that depends on their names only. Chooses a source if that brings the numbers
    of validation videos of its classes closer to `fraction` of each class, at least one.
    """
    sizes = defaultdict(Counter)  # of each source: the number of its videos in each class
    for video in videos:
        sizes[video.source][video.label] += 1
    totals = Counter(video.label for video in videos)
    missing = {label: max(1, fraction * total) for label, total in totals.items()}  # from the validation set
    chosen = set()
    for source in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sizes[source]
        if sum(abs(missing[label] - n) for label, n in size.items()) < sum(abs(missing[label]) for label in size):
            chosen.add(source)
            for label, n in size.items():
                missing[label] -= n
    return chosen


def split(videos, labels, fraction):
    """{"train": videos, "val": videos}. Ends the script if one of the labels is not in both."""
    chosen = choose_sources(videos, fraction)
    splits = {
        "train": [v for v in videos if v.source not in chosen],
        "val": [v for v in videos if v.source in chosen],
    }
    train, val = (Counter(v.label for v in members) for members in splits.values())
    for label in labels:
        if not train[label] or not val[label]:
            name, sources = f"class {label}" if label else "the folder", {v.source for v in videos if v.label == label}
            fail(
                f"{name}: {train[label]} videos for train and {val[label]} for val, from {len(sources)} sources; "
                "add readable videos, change --val-fraction or --group, or leave the class out"
            )
    return splits
