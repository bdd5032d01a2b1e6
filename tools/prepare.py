"""Turn a dataset's annotations, or a folder of your own videos, into manifests.

    python -m tools.prepare k400 --annotations annotations/k400 --videos videos/k400
    python -m tools.prepare k710 --annotations annotations/k400 annotations/k600 annotations/k700 --videos videos/k*
    python -m tools.prepare v3.6m                                 # join data/k710, data/ssv2 and data/panda70m
    python -m tools.prepare folder my_videos --out data/mine      # your own videos

`python -m tools.prepare k400 --help` lists the files that k400 needs and where to get them. The command writes
data/k400/train.csv and val.csv, with one "path label" per line, and classes.txt, whose line n (from 0) names class n.
It prints how many clips of each split are

    annotated   in the annotation files
    found       available as a file
    missing     not available as a file
    duplicate   annotated more than once, or in the same file as an earlier clip
    excluded    training clips that a validation set also has (panda70m: clips shorter than 4 s or longer than 50 s)

tools/transcode.py can then check the videos and make smaller copies of them.

To add a dataset, write a reader and add its row to DATASETS. A reader is a function of the paths given to --annotations
and the folders given to --videos, both lists, and of --split if the dataset has several. It returns the names of the
classes in order, a list of `Sample`, and the files found. Its docstring is the command's --help.
"""

import csv
import functools
import hashlib
import inspect
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import Parser, Progress, fail, require_at_least, write_lines
from data import read_manifest, write_manifest
from tools.transcode import check_video, print_bad, work_through
from video import IMAGE_SUFFIXES, is_clutter

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts"}
CHECKED_CLIP = [16, 4]  # frames and frame step of the clips that `folder` decodes to check a video, as in training
COUNTS = ("annotated", "found", "missing", "duplicate", "excluded")
PANDA70M_CLIPS, V36M_CLIPS = 2_799_959, 3_626_129  # in the paper
SHORTEST, LONGEST = 4, 50  # seconds of a Panda-70M clip (paper, appendix A)
SYNSET = re.compile("n[0-9]{8}")
# Kinetics classes by their old names ("picking fruit" in K400 and K600, the others in K400), and their names in K700.
# The names of K400, K600 and K700 are 724 different ones; with this table, they are the 710 classes of K710. Source:
# the first 400 lines of https://github.com/open-mmlab/mmaction2/blob/main/tools/data/kinetics710/label_map_k710.txt
# are K400's classes in K400's order. (That list keeps the old name of a single class, "throwing ball".)
RENAMED = {
    "balloon blowing": "inflating balloons",
    "changing wheel": "changing wheel (not on bike)",
    "cooking sausages": "cooking sausages (not on barbeque)",
    "drinking": "sipping cup",
    "dying hair": "dyeing hair",
    "garbage collecting": "person collecting garbage",
    "hugging": "hugging (not baby)",
    "making bed": "making the bed",
    "opening bottle": "opening bottle (not wine)",
    "picking fruit": "picking apples",
    "skiing (not slalom or crosscountry)": "skiing mono",
    "sniffing": "smelling feet",
    "throwing ball": "throwing ball (not baseball or American football)",
    "tying tie": "tying necktie",
}


class Sample(NamedTuple):
    """An annotated clip."""

    split: str  # "train" or "val"
    clip: object  # identifies the clip; another sample with the same value is a duplicate
    source: object  # what it is cut from; training samples that share it with a validation sample are excluded
    names: tuple  # names its file may have, without suffix, the most likely one first
    label: str  # name of its class


def whole_video(split, name, label):
    """The `Sample` of a dataset with one clip per video, named by its file."""
    return Sample(split, clip=name, source=name, names=(name,), label=label)


# ---------------------------------------------------------------------------------------------------------------------
# readers: (--annotations, --videos) -> names of the classes in order, samples, {file name without suffix: path}


def kinetics(annotations, videos):
    """Kinetics-400, 600 or 700: 10-second clips of YouTube videos.

    --annotations: folder with train.csv and val.csv (or train.txt, val.txt, validate.csv) from CVDF,
      https://github.com/cvdfoundation/kinetics-dataset:
        https://s3.amazonaws.com/kinetics/400/annotations/{train,val}.csv
        https://s3.amazonaws.com/kinetics/600/annotations/{train,val}.txt (K600's csv files are incomplete)
        https://s3.amazonaws.com/kinetics/700_2020/annotations/{train,val}.csv
      Columns: label,youtube_id,time_start,time_end,split
    --videos: folders with files named ID_000012_000022.mp4 (YouTube id, start and end in seconds) or ID.mp4, in any
      subfolders. K400 has some files twice: the one with "replacement" in its path, for a corrupted one, is used.
    """
    samples = read_kinetics(annotations[0])
    return sorted({s.label for s in samples}), samples, find_files(videos)


def read_kinetics(folder):
    """The samples of one Kinetics set."""
    samples = []
    for split, file in open_splits(folder, ("val.csv", "val.txt", "validate.csv"), ("train.csv", "train.txt")):
        for row in csv.DictReader(file):
            video = row["youtube_id"]
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            clip, names = (video, start, end), (f"{video}_{start:06}_{end:06}", video)
            samples.append(Sample(split, clip, source=clip, names=names, label=row["label"].strip()))
    return samples


def k710(annotations, videos):
    """Kinetics-710: the training sets of Kinetics-400, 600 and 700, merged (paper, appendix A).

    A clip (YouTube id, start, end) that several sets have is used once, with its label in the newest set. A training
    clip is excluded if any of the three validation sets has a clip of the same video. Classes that Kinetics renamed
    (RENAMED in tools/prepare.py) or whose names differ only in case or punctuation are merged. val.csv holds all three
    validation sets.

    --annotations: the three folders of k400, k600 and k700, in this order (see `python -m tools.prepare k400 --help`)
    --videos: the video folders of all three
    """
    names, samples = {}, []
    for folder in reversed(annotations):
        for sample in read_kinetics(folder):
            label = RENAMED.get(sample.label.lower(), sample.label)
            key = re.sub(r"\W+", " ", label.lower().replace("'", "")).strip()
            name = names.setdefault(key, label)
            samples.append(sample._replace(source=sample.clip[0], label=name))
    return sorted(names.values()), samples, find_files(videos)


def ssv2(annotations, videos):
    """Something-Something-v2: 220,847 clips of 174 classes ("templates"), at 12 frames per second.

    --annotations: folder with train.json, validation.json and labels.json (or something-something-v2-train.json, ...),
      from https://www.qualcomm.com/developer/software/something-something-v-2-dataset
    --videos: folder of the extracted archives 20bn-something-something-v2-??, with ID.webm
    """
    prefixes = ("", "something-something-v2-")
    with open_annotations(annotations[0], *(f"{p}labels.json" for p in prefixes)) as file:
        numbers = json.load(file)
    val, train = ([p + name for p in prefixes] for name in ("validation.json", "train.json"))
    samples = []
    for split, file in open_splits(annotations[0], val, train):
        for row in json.load(file):
            label = row["template"].replace("[", "").replace("]", "")  # labels.json has no brackets
            samples.append(whole_video(split, str(row["id"]), label))
    return sorted(numbers, key=lambda label: int(numbers[label])), samples, find_files(videos)


def coin(annotations, videos):
    """COIN: 11,827 instructional videos of 180 tasks, one sample per video.

    --annotations: folder with COIN.json, from https://github.com/coin-dataset/annotations
    --videos: the folder filled by download_videos.py from there, with RECIPE_TYPE/YOUTUBE_ID.mp4

    RECIPE_TYPE is the number of the task; classes are in this order.
    """
    with open_annotations(annotations[0], "COIN.json") as file:
        database = json.load(file)["database"]
    splits = {"training": "train", "testing": "val", "validation": "val"}
    samples = [whole_video(splits[row["subset"]], name, row["class"]) for name, row in database.items()]
    numbers = {row["class"]: int(row["recipe_type"]) for row in database.values()}
    return sorted(numbers, key=numbers.get), samples, find_files(videos)


def diving48(annotations, videos):
    """Diving-48 with the second version of its labels: 16,997 dives of 48 classes.

    --annotations: folder with Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json, from
      http://www.svcl.ucsd.edu/projects/resound/dataset.html
    --videos: the folder "rgb" of Diving48_rgb.tar.gz from there, with VID_NAME.mp4
    """
    with open_annotations(annotations[0], "Diving48_vocab.json") as file:
        classes = [" ".join(words) for words in json.load(file)]
    samples = []
    for split, file in open_splits(annotations[0], ["Diving48_V2_test.json"], ["Diving48_V2_train.json"]):
        samples += [whole_video(split, row["vid_name"], classes[int(row["label"])]) for row in json.load(file)]
    return classes, samples, find_files(videos)


def jester(annotations, videos):
    """Jester: 148,092 clips of 27 hand gestures, each a folder of images, at 12 frames per second.

    --annotations: folder with jester-v1-train.csv, jester-v1-validation.csv ("id;label" lines) and
      jester-v1-labels.csv, from https://www.qualcomm.com/developer/software/jester-dataset
    --videos: the folder 20bn-jester-v1, with ID/00001.jpg, ...; or a folder of videos made from these, ID.mp4

    A line of the manifests names a folder of images. `python -m tools.transcode copy` turns them into videos.
    """
    with open_annotations(annotations[0], "jester-v1-labels.csv", "labels.csv") as file:
        classes = [line.strip() for line in file if line.strip()]
    val, train = ("jester-v1-validation.csv", "validation.csv"), ("jester-v1-train.csv", "train.csv")
    samples = []
    for split, file in open_splits(annotations[0], val, train):
        for number, line in enumerate(file, start=1):
            clip, _, label = line.strip().partition(";")
            if clip.isdigit() and label:
                samples.append(whole_video(split, clip, label.strip()))
            elif line.strip() and (number > 1 or not label):  # a header has a semicolon, too
                raise ValueError(f"in {file.name} line {number}: expected id;label, not {line.strip()!r}")
    return classes, samples, find_files(videos, frame_folders={s.clip for s in samples})


def ucf101(annotations, videos, split):
    """UCF-101: 13,320 clips of 101 actions; split 1 has 9,537 for training and 3,783 for validation.

    --annotations: the folder ucfTrainTestlist with classInd.txt, trainlist01.txt, testlist01.txt, ..., from
      https://www.crcv.ucf.edu/data/UCF101.php ("Train/Test Splits for Action Recognition")
    --videos: the folder UCF-101 of UCF101.rar from there, with CLASS/v_CLASS_g01_c01.avi

    The validation set is the official test set. Results are often the mean over the three splits: prepare one, probe
    it, then go on with the next.
    """
    with open_annotations(annotations[0], "classInd.txt") as file:
        classes = [line.split()[1] for line in file if line.strip()]  # "1 ApplyEyeMakeup", in order
    samples = []
    for kind, file in open_splits(annotations[0], [f"testlist{split:02}.txt"], [f"trainlist{split:02}.txt"]):
        for line in filter(str.strip, file):  # "CLASS/FILE.avi", followed by the class number in training lists
            label, video = line.split()[0].split("/")
            samples.append(whole_video(kind, video.removesuffix(".avi"), label))
    return classes, samples, find_files(videos)


def hmdb51(annotations, videos, split):
    """HMDB51: 6,766 clips of 51 actions; each split has 3,570 for training and 1,530 for validation.

    --annotations: the folder testTrainMulti_7030_splits with CLASS_test_split1.txt, ... (153 files), from
      https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database
    --videos: the folder of the extracted hmdb51_org.rar and the archives in it, with CLASS/*.avi

    The validation set is the official test set; of the three splits, see ucf101.
    """
    end = f"_test_split{split}.txt"
    # In the order of the files' names, in which "sword_exercise" comes before "sword".
    names = sorted(path.name for path in Path(annotations[0]).glob(f"*{end}") if not is_clutter(path.name))
    classes = [name.removesuffix(end) for name in names]
    kinds, samples = {"0": None, "1": "train", "2": "val"}, []  # 0: in neither
    for label in classes or ["CLASS"]:  # without any, the error names one
        with open_annotations(annotations[0], label + end) as file:
            for line in filter(str.strip, file):
                video, kind = line.split()
                if kinds[kind]:
                    samples.append(whole_video(kinds[kind], video.removesuffix(".avi"), label))
    return classes, samples, find_files(videos)


def imagenet1k(annotations, videos):
    """ImageNet-1K (ILSVRC 2012): 1,281,167 training and 50,000 validation images of 1,000 classes.

    --videos: folder with train/SYNSET/*.JPEG and val/SYNSET/*.JPEG, from https://image-net.org (or ILSVRC/Data/CLS-LOC
      from Kaggle)
    --annotations: Kaggle's LOC_val_solution.csv, needed only if val has no SYNSET folders

    Classes are the synsets in alphabetical order.
    """
    files, synsets, samples = find_files(videos, IMAGE_SUFFIXES), {}, []
    if annotations:
        with open_annotations(Path(annotations[0]).parent, Path(annotations[0]).name) as file:
            synsets = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    for name, path in sorted(files.items()):
        folder = Path(path).parent
        if SYNSET.fullmatch(folder.name) and folder.parent.name in ("train", "val"):
            samples.append(whole_video(folder.parent.name, name, folder.name))
        elif folder.name == "val" and not synsets:
            fail(f"{path} is not in a folder named by its synset, so --annotations is needed (see --help)")
    samples += [whole_video("val", name, synset) for name, synset in synsets.items()]
    return sorted({s.label for s in samples}), samples, files


class Dataset(NamedTuple):
    read: Callable
    paper: str = ""  # its size in the paper
    num_annotations: int = 1  # paths that --annotations takes
    needs_annotations: bool = True
    splits: tuple = ()  # numbers of its official splits, if there are several


DATASETS = {
    "k400": Dataset(kinetics, "400 classes"),
    "k600": Dataset(kinetics),
    "k700": Dataset(kinetics),
    "k710": Dataset(k710, "710 classes, 657,257 clips to train on", num_annotations=3),
    "ssv2": Dataset(ssv2, "174 classes, 168,913 clips to train on"),
    "coin": Dataset(coin, "180 classes"),
    "diving48": Dataset(diving48, "48 classes"),
    "jester": Dataset(jester, "27 classes"),
    "ucf101": Dataset(ucf101, splits=(1, 2, 3)),
    "hmdb51": Dataset(hmdb51, splits=(1, 2, 3)),
    "imagenet1k": Dataset(imagenet1k, "1000 classes", needs_annotations=False),
}


# ---------------------------------------------------------------------------------------------------------------------
# annotations and files


def open_annotations(folder, *names):
    """Open the first of these files that `folder` has, as text."""
    for name in names:
        if (Path(folder) / name).is_file():
            return open(Path(folder) / name, encoding="utf-8-sig", newline="")
    fail(f"--annotations: no {' or '.join(names)} in {folder} (--help says where to get it)")


def open_splits(folder, val, train):
    """Yield ("val", file), then ("train", file); val and train are the names that the files may have."""
    for split, names in (("val", val), ("train", train)):
        with open_annotations(folder, *names) as file:
            yield split, file


def list_files(root, suffixes=VIDEO_SUFFIXES, frame_folders=frozenset()):
    """List all files below `root` with these suffixes: their sorted absolute paths, and a Counter of other suffixes.

    A folder named in `frame_folders` counts as a file. Follows symbolic links, but searches no folder twice. Leaves out
    clutter, and reports paths that a manifest cannot hold. Ends the script if a folder cannot be read.
    """

    def unreadable(error):
        fail(f"{error.filename}: {error.strerror}")

    paths, others, searched, progress = [], Counter(), set(), Progress()
    for parent, folders, names in os.walk(os.path.abspath(root), followlinks=True, onerror=unreadable):
        if os.path.realpath(parent) in searched:  # symbolic links may form circles
            folders.clear()
            continue
        searched.add(os.path.realpath(parent))
        names += frame_folders.intersection(folders)
        folders[:] = sorted(name for name in folders if name not in frame_folders and not is_clutter(name))
        for name in names:
            if is_clutter(name):
                continue
            path, suffix = os.path.join(parent, name), os.path.splitext(name)[1].lower()
            if suffix not in suffixes and name not in frame_folders:
                others[suffix] += 1
            elif path.isprintable():
                paths.append(path)
            else:  # line breaks, or bytes that are not UTF-8
                print(f"  {path!a} is left out: a manifest cannot hold this name")
        progress.show(f"{len(paths):,} files")
    return sorted(paths), others


def find_files(folders, suffixes=VIDEO_SUFFIXES, frame_folders=frozenset()):
    """Find the files in all these folders, as `list_files` does: {name without suffix: path}.

    Of several files with the same name, one with "replacement" in its path is used (for K400's corrupted files), else
    the first in alphabetical order. Some downloaders write ID.mp4.webm: the name is ID.
    """
    paths = [path for folder in folders for path in list_files(folder, suffixes, frame_folders)[0]]
    found = {}
    for path in sorted(paths, key=lambda path: ("replacement" not in path, path)):
        name = os.path.basename(path)
        while name not in frame_folders and os.path.splitext(name)[1].lower() in suffixes:
            name = os.path.splitext(name)[0]
        found.setdefault(name, path)
    print(f"{len(found):,} files in {', '.join(map(str, folders))}")
    return found


def select(samples, files):
    """Select the samples that have a file and are neither duplicate nor excluded.

    Returns {split: [(path, label)]} and {split: Counter of COUNTS}.
    """
    chosen, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    clips, val_sources, used = set(), set(), set()
    for sample in sorted(samples, key=lambda s: s.split != "val"):  # validation first
        count = counts[sample.split]
        count["annotated"] += 1
        path = next((files[name] for name in sample.names if name in files), None)
        if sample.split == "train" and sample.source in val_sources:
            count["excluded"] += 1
        elif sample.clip in clips:
            count["duplicate"] += 1
        elif not path:
            count["missing"] += 1
        elif path in used:  # another time span of the same video, if files are whole videos (ID.mp4)
            count["duplicate"] += 1
        else:
            count["found"] += 1
            chosen[sample.split].append((path, sample.label))
            used.add(path)
        clips.add(sample.clip)
        if sample.split == "val":
            val_sources.add(sample.source)
    return chosen, counts


def print_counts(counts):
    """Print {split: Counter} as a table."""
    print(" " * 8 + "".join(f"{name:>12}" for name in COUNTS))
    for split, count in counts.items():
        print(f"{split:8}" + "".join(f"{count[name]:>12,}" for name in COUNTS))


# ---------------------------------------------------------------------------------------------------------------------
# commands


def save_manifest(path, lines):
    """Write a list of (path, label) as a manifest. Ends the script if that fails."""
    try:
        write_manifest(path, lines)
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def write_dataset(args):
    """Write the manifests of one of DATASETS."""
    dataset, split = DATASETS[args.command], [args.split] if "split" in args else []
    try:
        classes, samples, files = dataset.read(args.annotations, args.videos, *split)
        numbers = {label: number for number, label in enumerate(classes)}
        for sample in samples:
            if sample.label not in numbers:
                raise ValueError(f"{sample.label!r} is not in its list of classes")
    except (KeyError, ValueError, TypeError, IndexError, csv.Error) as error:
        reason = f"{type(error).__name__} {error}"
        fail(f"--annotations: not in {args.command}'s format: {reason} (--help lists the files)")
    chosen, counts = select(samples, files)
    for split, count in counts.items():  # before anything is written: an older manifest must not pass for a new one
        if not chosen[split]:
            reasons = ", ".join(f"{count[name]:,} are {name}" for name in ("missing", "duplicate", "excluded"))
            fail(
                f"no {split} clips in --videos: of {count['annotated']:,} annotated, {reasons} (--help lists the files)"
            )
    for split, lines in chosen.items():
        save_manifest(args.out / f"{split}.csv", [(path, numbers[label]) for path, label in lines])
    write_lines(args.out / "classes.txt", classes)
    print(f"{args.out / 'classes.txt'}: {len(classes)} classes" + (dataset.paper and f" (paper: {dataset.paper})"))
    print_counts(counts)


def panda70m(args):
    """Panda-70M: a random sample of clips, stratified by duration from 4 to 50 s (paper, appendix A).

    --annotations: the csv file that the videos were downloaded with: panda70m_training_full.csv, _10m.csv or _2m.csv,
      from https://github.com/snap-research/Panda-70M/tree/main/dataset_dataloading
    --videos: the folder filled by video2dataset from there, with SHARD/ROW_CLIP.mp4: 0000012_00003.mp4 is the fourth
      clip of the csv file's 13th row. Files named VIDEOID_00003.mp4 are found too.

    Each second of duration is a stratum. All strata contribute equally many clips; a stratum with too few contributes
    all it has. The labels are -1. The default of --count is the paper's number. The sample depends on which files are
    there, on --count and on --seed.
    """
    strata, count = read_panda70m(Path(args.annotations), find_files(args.videos))
    chosen = draw_evenly(strata, args.count, np.random.default_rng(args.seed))
    if not chosen:
        fail(f"--videos {' '.join(args.videos)}: none of the {count['annotated']:,} clips is there")
    save_manifest(args.out / "train.csv", [(path, -1) for *_, path in sorted(chosen)])
    print(f"clips found per second of duration, from {SHORTEST} s: " + ", ".join(f"{len(s):,}" for s in strata))
    print_counts({"train": count})


def read_panda70m(path, files):
    """The clips found, by duration: a list with one list of (row, clip, path) per second. And a Counter of COUNTS."""
    strata, count, checked = [[] for _ in range(LONGEST - SHORTEST)], Counter(), False
    csv.field_size_limit(2**31 - 1)  # one field has the captions of all clips of a video
    with open_annotations(path.parent, path.name) as file:
        rows = csv.DictReader(file)
        if not {"videoID", "url", "timestamp"} <= set(rows.fieldnames or ()):
            fail(f"--annotations {path}: no columns videoID, url and timestamp (--help lists the files)")
        for number, row in enumerate(rows):
            for clip, seconds in enumerate(clip_durations(row["timestamp"])):
                count["annotated"] += 1
                file_path = files.get(f"{number:07}_{clip:05}") or files.get(f"{row['videoID']}_{clip:05}")
                if not file_path:
                    count["missing"] += 1
                    continue
                metadata = Path(file_path).with_suffix(".json")  # video2dataset writes one beside each clip
                if not checked and metadata.is_file():
                    checked = True
                    if row["videoID"] not in metadata.read_text(encoding="utf-8"):
                        fail(f"--annotations {path}: {file_path} was downloaded with another csv file")
                if SHORTEST <= seconds <= LONGEST:
                    count["found"] += 1
                    strata[min(int(seconds), LONGEST - 1) - SHORTEST].append((number, clip, file_path))
                else:
                    count["excluded"] += 1
    return strata, count


def clip_durations(timestamps):
    """Seconds of each clip of a video; timestamps is "[['0:00:01.5', '0:00:10.0'], ...]"."""
    times = [int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in re.findall(r"(\d+):(\d+):([\d.]+)", timestamps)]
    return [end - start for start, end in zip(times[::2], times[1::2], strict=True)]


def draw_evenly(strata, count, rng):
    """Draw `count` elements without replacement, equally many from each list; short lists contribute all they have."""
    chosen = []
    for i, stratum in enumerate(sorted(strata, key=len)):  # shortest first: the longer ones make up for them
        share = min(len(stratum), (count - len(chosen)) // (len(strata) - i))
        chosen += [stratum[k] for k in rng.choice(len(stratum), share, replace=False)]
    return chosen


def v36m(args):
    """V-3.6M: the manifests of K710, SSv2 and the Panda-70M sample joined into one (paper, table 2).

    --manifests: the three manifests, as the commands k710, ssv2 and panda70m write them

    Training visits every video of the joined manifest once per pass, so each part is weighted by its size. Labels
    become -1, because the same number means a different class in each part.
    """
    joined = {}  # a dictionary drops duplicates and keeps the order
    for manifest in args.manifests:
        try:
            paths = list(map(os.path.abspath, read_manifest(manifest)[0]))
        except (OSError, ValueError) as error:
            fail(f"--manifests: {error}")
        before = len(joined)
        joined.update(dict.fromkeys(paths, -1))
        added = len(joined) - before
        print(f"{manifest}: {added:,} videos, and {len(paths) - added:,} duplicates")
    save_manifest(args.out / "train.csv", list(joined.items()))
    print(f"the paper has {V36M_CLIPS:,}; to train on these: --data {args.out / 'train.csv'}")


# ---------------------------------------------------------------------------------------------------------------------
# the command `folder`: your own videos


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
    paths, log = [v.path for v in videos], args.out / "check.jsonl"
    work = functools.partial(check_video, num_frames=CHECKED_CLIP[0], frame_step=CHECKED_CLIP[1])
    records = work_through(args, paths, work, CHECKED_CLIP, log)
    print_bad(records, log)
    good = [v for v in videos if "error" not in records[v.path]]
    splits = split(good, labels, args.val_fraction)

    classes = [label for label in labels if label]
    numbers = {"": -1, **{label: number for number, label in enumerate(classes)}}
    for name, members in splits.items():
        save_manifest(args.out / f"{name}.csv", [(v.path, numbers[v.label]) for v in members])
    write_lines(args.out / "classes.txt", classes)
    sizes = {name: Counter(v.label for v in members).values() for name, members in splits.items()}
    ranges = " and ".join(f"{min(size):,} to {max(size):,} {name}" for name, size in sizes.items())
    contents = f"{len(classes)} classes, each with {ranges} videos" if classes else "no classes, so all labels are -1"
    print(f"{args.out / 'classes.txt'}: {contents}")
    if args.group:
        print("sources: " + ", ".join(f"{len({v.source for v in members})} {name}" for name, members in splits.items()))


def list_videos(folder, group, unlabeled):
    """The videos of a folder, sorted by path. Ends the script if there are none, or if their classes are unclear.

    The source of a video is what the regular expression `group` finds in its file name; without one, its path.
    """
    absolute, others = list_files(folder)
    paths = [os.path.relpath(path, folder) for path in absolute]
    suffixes = ", ".join(f"{suffix or 'none'} {count:,}" for suffix, count in others.most_common(8))
    ignored = f"; ignored by suffix: {suffixes}" if others else ""
    if not paths:
        fail(f"{folder}: no files with the suffixes {' '.join(sorted(VIDEO_SUFFIXES))} in it{ignored}")
    print(f"{len(paths):,} videos in {folder}{ignored}")
    sources = paths
    if group is not None:
        try:
            matches = [re.search(group, os.path.basename(path)) for path in paths]
        except re.error as error:
            fail(f"--group {group} is not a regular expression: {error}")
        if None in matches:
            first = paths[matches.index(None)]
            fail(
                f"--group {group} does not match {matches.count(None):,} of {len(paths):,} file names, such as {first}"
            )
        sources = [match[1] if match.re.groups and match[1] is not None else match[0] for match in matches]
    labels = [Path(path).parts[0] if os.sep in path and not unlabeled else "" for path in paths]
    if len(set(labels)) > 1 and "" in labels:
        loose = (
            f"{labels.count(''):,} videos, such as {paths[labels.index('')]}, are in no class folder, but others are"
        )
        fail(f"{folder}: {loose}; move them into one, or give --unlabeled")
    return [Video(*video) for video in zip(absolute, sources, labels, strict=True)]


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
    chosen, splits = choose_sources(videos, fraction), {"train": [], "val": []}
    for video in videos:
        splits["val" if video.source in chosen else "train"].append(video)
    train, val = (Counter(v.label for v in members) for members in splits.values())
    for label in labels:
        if not train[label] or not val[label]:
            name, sources = f"class {label}" if label else "the folder", {v.source for v in videos if v.label == label}
            fail(
                f"{name}: {train[label]} videos for train and {val[label]} for val, from {len(sources)} sources; "
                "add readable videos, change --val-fraction or --group, or leave the class out"
            )
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def parse_args():
    parser = Parser(__doc__, prog="python -m tools.prepare")
    commands = parser.add_subparsers(dest="command", required=True, metavar="DATASET")

    def add_command(name, documented, run):
        text = inspect.getdoc(documented)
        command = commands.add_parser(name, description=text, help=text.splitlines()[0])
        command.set_defaults(run=run)
        command.add_argument("--out", type=Path, default=Path("data") / name, help="folder for the manifests")
        return command.add_argument

    for name, dataset in DATASETS.items():
        flag = add_command(name, dataset.read, write_dataset)
        required, number = dataset.needs_annotations, dataset.num_annotations
        flag("--annotations", nargs=number, required=required, metavar="PATH", help="see above")
        flag("--videos", nargs="+", required=True, metavar="DIR", help="see above")
        if dataset.splits:
            flag("--split", type=int, choices=dataset.splits, default=1, help="which of the official splits")
    flag = add_command("panda70m", panda70m, panda70m)
    flag("--annotations", required=True, metavar="FILE", help="see above")
    flag("--videos", nargs="+", required=True, metavar="DIR", help="see above")
    flag("--count", type=int, default=PANDA70M_CLIPS, help="number of clips to sample")
    flag("--seed", type=int, default=0, help="of the sample")
    flag = add_command("v3.6m", v36m, v36m)
    parts = [f"data/{name}/train.csv" for name in ("k710", "ssv2", "panda70m")]
    flag("--manifests", nargs="+", default=parts, metavar="MANIFEST", help="the manifests to join")
    flag = add_command("folder", write_folder, write_folder)
    flag("videos", type=Path, metavar="VIDEOS", help="the folder of videos")
    flag("--val-fraction", type=float, default=0.2, help="fraction of each class's videos to validate on")
    flag("--group", metavar="REGEX", help="keep the videos of a source together; see above")
    flag("--unlabeled", action="store_true", help="subfolders are no classes: all labels are -1")
    flag("--workers", type=int, default=os.cpu_count(), help="number of processes that try to decode the videos")
    flag("--timeout", type=float, default=120, help="seconds after which a video counts as bad")
    flag("--retry", action="store_true", help="try the videos again that were bad before")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.command == "panda70m":
        require_at_least(args, 1, "count")
    if args.command == "folder":
        require_at_least(args, 1, "workers", "timeout")
    args.run(args)


if __name__ == "__main__":
    main()
