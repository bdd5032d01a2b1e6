"""Turn a dataset's annotations, or a folder of your own videos, into manifests.

    python -m tools.prepare k400 --annotations annotations/k400 --videos videos/k400
    python -m tools.prepare k710 --annotations annotations/k400 annotations/k600 annotations/k700 --videos videos/k*
    python -m tools.prepare folder my_videos --out data/mine      # your own videos

`python -m tools.prepare k400 --help` lists the files that k400 needs and where to get them. The command writes
data/k400/train.csv and val.csv, with one "path label" per line, and classes.txt, whose line n (from 0) names class n.
It prints how many clips of each split are

    annotated   in the annotation files
    found       available as a file
    missing     not available as a file
    duplicate   annotated more than once, or in the same file as an earlier clip
    excluded    training clips that a validation set also has (panda70m: clips shorter than 4 s or longer than 50 s)

To add a dataset, write a reader and add its row to DATASETS. A reader is a function of --annotations and --videos, and
of --split if the dataset has several. It returns the names of the classes in order, a list of `Sample`, and the files
found. Its docstring is the command's --help.
"""

import csv
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

from cli import Parser, fail, require_at_least, write_lines
from tools.check import check_videos, write_manifest
from video import IMAGE_SUFFIXES, is_clutter

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".3gp", ".ts"}
COUNTS = ("annotated", "found", "missing", "duplicate", "excluded")
SHORTEST, LONGEST = 4, 50  # seconds of a Panda-70M clip (paper, appendix A)
# Kinetics classes by their old names, and their names in K700. It makes the 724 names of K400, K600 and K700 the 710
# classes of K710, as in https://github.com/open-mmlab/mmaction2/blob/main/tools/data/kinetics710/label_map_k710.txt
# (which keeps the old name of a single class, "throwing ball").
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
    split: str  # "train" or "val"
    clip: object  # identifies the clip; another sample with the same value is a duplicate
    source: object  # what it is cut from; training samples that share it with a validation sample are excluded
    names: tuple  # names its file may have, without suffix, the most likely one first
    label: str  # name of its class


def whole_video(split, name, label):  # of a dataset with one clip per video, named by its file
    return Sample(split, clip=name, source=name, names=(name,), label=label)


# ---------------------------------------------------------------------------------------------------------------------
# readers


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
    samples = []
    for split, file in open_splits(annotations[0], ("val.csv", "val.txt", "validate.csv"), ("train.csv", "train.txt")):
        for row in csv.DictReader(file):
            video = row["youtube_id"]
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            clip, names = (video, start, end), (f"{video}_{start:06}_{end:06}", video)
            samples.append(Sample(split, clip, source=clip, names=names, label=row["label"].strip()))
    return sorted({s.label for s in samples}), samples, find_files(videos)


def k710(annotations, videos):
    """Kinetics-710: the training sets of Kinetics-400, 600 and 700, merged (paper, appendix A).

    A clip (YouTube id, start, end) that several sets have is used once, with its label in the newest set. A training
    clip is excluded if any of the three validation sets has a clip of the same video. Classes that Kinetics renamed
    (RENAMED in tools/prepare.py) or whose names differ only in case or punctuation are merged. val.csv holds all three
    validation sets. The paper has 710 classes and 657,257 clips to train on.

    --annotations: the three folders of k400, k600 and k700, in this order (see `python -m tools.prepare k400 --help`)
    --videos: the video folders of all three
    """
    names, samples = {}, []
    for folder in reversed(annotations):
        for sample in kinetics([folder], [])[1]:
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
    --videos: the folder filled by download_videos.py from there, with RECIPE_TYPE/YOUTUBE_ID.mp4. RECIPE_TYPE is the
      number of the task; classes are in this order.
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

    A line of the manifests names a folder of images.
    """
    with open_annotations(annotations[0], "jester-v1-labels.csv") as file:
        classes = [line.strip() for line in file if line.strip()]
    samples = []
    for split, file in open_splits(annotations[0], ["jester-v1-validation.csv"], ["jester-v1-train.csv"]):
        for line in filter(str.strip, file):
            clip, label = line.split(";")
            samples.append(whole_video(split, clip.strip(), label.strip()))
    return classes, samples, find_files(videos, frame_folders={s.clip for s in samples})


def ucf101(annotations, videos, split):
    """UCF-101: 13,320 clips of 101 actions; split 1 has 9,537 for training and 3,783 for validation (the test set).

    --annotations: the folder ucfTrainTestlist with classInd.txt, trainlist01.txt, testlist01.txt, ..., from
      https://www.crcv.ucf.edu/data/UCF101.php ("Train/Test Splits for Action Recognition")
    --videos: the folder UCF-101 of UCF101.rar from there, with CLASS/v_CLASS_g01_c01.avi
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
    """HMDB51: 6,766 clips of 51 actions; each split has 3,570 for training and 1,530 for validation (the test set).

    --annotations: the folder testTrainMulti_7030_splits with CLASS_test_split1.txt, ... (153 files), from
      https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database
    --videos: the folder of the extracted hmdb51_org.rar and the archives in it, with CLASS/*.avi
    """
    end = f"_test_split{split}.txt"
    # In the order of the files' names, in which "sword_exercise" comes before "sword".
    files = sorted(path.name for path in Path(annotations[0]).glob(f"*{end}") if not is_clutter(path.name))
    classes = [name.removesuffix(end) for name in files]
    kinds, samples = {"0": None, "1": "train", "2": "val"}, []  # 0: in neither
    for label in classes or ["CLASS"]:  # without any, the error names one
        with open_annotations(annotations[0], label + end) as file:
            for line in filter(str.strip, file):
                video, kind = line.split()
                if kinds[kind]:
                    samples.append(whole_video(kinds[kind], video.removesuffix(".avi"), label))
    return classes, samples, find_files(videos)


def imagenet1k(annotations, videos):
    """ImageNet-1K (ILSVRC 2012): 1,281,167 training and 50,000 validation images of 1,000 classes (sorted synsets).

    --videos: folder with train/SYNSET/*.JPEG and val/SYNSET/*.JPEG, from https://image-net.org (or ILSVRC/Data/CLS-LOC
      from Kaggle)
    --annotations: Kaggle's LOC_val_solution.csv, needed only if val has no SYNSET folders
    """
    files, samples = find_files(videos, IMAGE_SUFFIXES), []
    if annotations:
        with open(annotations[0], encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            samples = [whole_video("val", row["ImageId"], row["PredictionString"].split()[0]) for row in rows]
    for name, path in sorted(files.items()):
        folder = Path(path).parent
        if re.fullmatch("n[0-9]{8}", folder.name) and folder.parent.name in ("train", "val"):
            samples.append(whole_video(folder.parent.name, name, folder.name))
    return sorted({s.label for s in samples}), samples, files


class Dataset(NamedTuple):
    read: Callable
    num_annotations: int = 1  # paths that --annotations takes
    needs_annotations: bool = True
    splits: tuple = ()  # numbers of its official splits, if there are several


DATASETS = {
    "k400": Dataset(kinetics),
    "k600": Dataset(kinetics),
    "k700": Dataset(kinetics),
    "k710": Dataset(k710, num_annotations=3),
    "ssv2": Dataset(ssv2),
    "coin": Dataset(coin),
    "diving48": Dataset(diving48),
    "jester": Dataset(jester),
    "ucf101": Dataset(ucf101, splits=(1, 2, 3)),
    "hmdb51": Dataset(hmdb51, splits=(1, 2, 3)),
    "imagenet1k": Dataset(imagenet1k, needs_annotations=False),
}


# ---------------------------------------------------------------------------------------------------------------------
# annotations and files


def open_annotations(folder, *names):
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
    """List all files below `root` with these suffixes: their absolute paths, sorted. OSError if a folder is unreadable.

    A folder named in `frame_folders` counts as a file. Follows symbolic links, but searches no folder twice. Leaves out
    clutter, and reports paths that a manifest cannot hold.
    """
    paths, searched, folders = [], set(), [os.path.abspath(root)]
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in searched:  # symbolic links may form circles
            continue
        searched.add(os.path.realpath(folder))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
            if is_clutter(entry.name):
                continue
            if entry.is_dir() and entry.name not in frame_folders:
                folders.append(entry.path)
            elif entry.is_dir() or os.path.splitext(entry.name)[1].lower() in suffixes:
                paths.append(entry.path)
    for path in paths:
        if not path.isprintable():  # line breaks, or bytes that are not UTF-8
            print(f"  {path!a} is left out: a manifest cannot hold this name")
    return sorted(filter(str.isprintable, paths))


def find_files(folders, suffixes=VIDEO_SUFFIXES, frame_folders=frozenset()):
    """The files in all these folders: {name without suffix: path}. Some downloaders write ID.mp4.webm: the name is ID.

    Of several files with the same name, one with "replacement" in its path is used (for K400's corrupted files), else
    the first in alphabetical order.
    """
    found, paths = {}, (path for folder in folders for path in list_files(folder, suffixes, frame_folders))
    for path in sorted(paths, key=lambda path: ("replacement" not in path, path)):
        name = os.path.basename(path)
        while name not in frame_folders and os.path.splitext(name)[1].lower() in suffixes:
            name = os.path.splitext(name)[0]
        found.setdefault(name, path)
    return found


def select(samples, files):
    """The samples that have a file, {split: [(path, label)]}, and {split: Counter of COUNTS}."""
    chosen, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    clips, val_sources, used = set(), set(), set()
    for sample in sorted(samples, key=lambda s: s.split != "val"):  # validation first
        count = counts[sample.split]
        count["annotated"] += 1
        path = next((files[name] for name in sample.names if name in files), None)
        if sample.split == "train" and sample.source in val_sources:
            count["excluded"] += 1
        elif sample.clip in clips or path in used:  # a whole video (ID.mp4) is the file of all its time spans
            count["duplicate"] += 1
        elif not path:
            count["missing"] += 1
        else:
            count["found"] += 1
            chosen[sample.split].append((path, sample.label))
            used.add(path)
        clips.add(sample.clip)
        if sample.split == "val":
            val_sources.add(sample.source)
    return chosen, counts


def print_counts(split, count):
    print(f"{split}: " + ", ".join(f"{count[name]:,} {name}" for name in COUNTS))


def write_dataset(args):
    dataset, split = DATASETS[args.command], [args.split] if "split" in args else []
    try:
        classes, samples, files = dataset.read(args.annotations, args.videos, *split)
        numbers = {label: number for number, label in enumerate(classes)}
        samples = [sample._replace(label=numbers[sample.label]) for sample in samples]
    except (KeyError, ValueError, TypeError, IndexError, csv.Error) as error:
        fail(f"--annotations: not in {args.command}'s format: {type(error).__name__} {error} (--help lists the files)")
    chosen, counts = select(samples, files)
    for split, count in counts.items():  # before anything is written: an older manifest must not pass for a new one
        print_counts(split, count)
        if not chosen[split]:
            fail(f"no {split} clips found in --videos (--help lists the files)")
    for split, lines in chosen.items():
        write_manifest(args.out / f"{split}.csv", lines)
    write_lines(args.out / "classes.txt", classes)
    print(f"{args.out / 'classes.txt'}: {len(classes)} classes")


def panda70m(args):
    """Panda-70M: a random sample of clips, stratified by duration from 4 to 50 s (paper, appendix A).

    --annotations: the csv file that the videos were downloaded with: panda70m_training_full.csv, _10m.csv or _2m.csv,
      from https://github.com/snap-research/Panda-70M/tree/main/dataset_dataloading
    --videos: the folder filled by video2dataset from there, with SHARD/ROW_CLIP.mp4: 0000012_00003.mp4 is the fourth
      clip of the csv file's 13th row. Files named VIDEOID_00003.mp4 are found too.

    Each second of duration is a stratum. All strata contribute equally many clips; a stratum with too few contributes
    all it has. The labels are -1. The default of --count is the paper's number.
    """
    strata, count = [[] for _ in range(LONGEST - SHORTEST)], Counter()  # a stratum: list of (row, clip, path)
    files = find_files(args.videos)
    csv.field_size_limit(2**31 - 1)  # one field has the captions of all clips of a video
    with open(args.annotations, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if not {"videoID", "url", "timestamp"} <= set(rows.fieldnames or ()):
            fail(f"--annotations {args.annotations}: no columns videoID, url and timestamp (--help lists the files)")
        for number, row in enumerate(rows):
            # "[['0:00:01.5', '0:00:10.0'], ...]", start and end of each clip
            times = re.findall(r"(\d+):(\d+):([\d.]+)", row["timestamp"])
            seconds = [int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in times]
            for clip, (start, end) in enumerate(zip(seconds[::2], seconds[1::2], strict=True)):
                count["annotated"] += 1
                path = files.get(f"{number:07}_{clip:05}") or files.get(f"{row['videoID']}_{clip:05}")
                if not path:
                    count["missing"] += 1
                elif SHORTEST <= end - start <= LONGEST:
                    count["found"] += 1
                    metadata = Path(path).with_suffix(".json")  # video2dataset writes one beside each clip
                    if count["found"] == 1 and metadata.is_file() and row["videoID"] not in metadata.read_text("utf-8"):
                        fail(f"--annotations {args.annotations}: {path} was downloaded with another csv file")
                    strata[min(int(end - start), LONGEST - 1) - SHORTEST].append((number, clip, path))
                else:
                    count["excluded"] += 1
    chosen, rng = [], np.random.default_rng(args.seed)
    for i, stratum in enumerate(sorted(strata, key=len)):  # shortest first: the longer ones make up for them
        share = min(len(stratum), (args.count - len(chosen)) // (len(strata) - i))
        chosen += [stratum[k] for k in rng.choice(len(stratum), share, replace=False)]
    print_counts("train", count)
    if not chosen:
        fail("no train clips found in --videos (--help lists the files)")
    write_manifest(args.out / "train.csv", [(path, -1) for *_, path in sorted(chosen)])


# ---------------------------------------------------------------------------------------------------------------------
# the command `folder`: your own videos


class Video(NamedTuple):
    path: str  # absolute
    source: str  # all videos with the same source go to the same split
    label: str  # name of the class; "" if unlabeled


def write_folder(args):
    """Your own videos, in one folder; its subfolders, if any, are the classes.

    A video in VIDEOS/running/2024/ has the class "running". Classes are numbered in alphabetical order. Videos directly
    in VIDEOS, or all with --unlabeled, get the label -1, which is enough for pretraining.

    Decodes the first, middle and last clip of every video, and leaves out those that fail. check.jsonl in --out has one
    line per video: its properties, or why it is bad. After Ctrl-C, the same command continues where it stopped.

    About --val-fraction of each class's videos, at least one, go to val.csv, the others to train.csv. The choice is
    random, but the same every time. Videos cut from the same recording must stay together: --group 'g(\\d+)' does so
    by the number after a "g" in their names, the expression's first group; without one, its whole match counts.
    """
    if not 0 < args.val_fraction < 1:
        fail(f"--val-fraction {args.val_fraction}: must be above 0 and below 1")
    videos = list_videos(args.videos, args.group, args.unlabeled)
    labels = sorted({v.label for v in videos})
    split(videos, labels, args.val_fraction)  # to fail now rather than after decoding
    log = args.out / "check.jsonl"
    good = check_videos([v.path for v in videos], 16, 4, args.workers, args.timeout, log)  # clips as in training
    splits = split([v for v in videos if v.path in good], labels, args.val_fraction)
    classes = [label for label in labels if label]
    numbers = {"": -1, **{label: number for number, label in enumerate(classes)}}
    for name, members in splits.items():
        write_manifest(args.out / f"{name}.csv", [(v.path, numbers[v.label]) for v in members])
    write_lines(args.out / "classes.txt", classes)
    print(f"{args.out / 'classes.txt'}: {len(classes)} classes")


def list_videos(folder, group, unlabeled):
    """The videos of a folder, sorted by path."""
    absolute = list_files(folder)
    paths = sources = [os.path.relpath(path, folder) for path in absolute]
    if not paths:
        fail(f"{folder}: no files with the suffixes {' '.join(sorted(VIDEO_SUFFIXES))} in it")
    print(f"{len(paths):,} videos in {folder}")
    if group is not None:
        matches = [re.search(group, os.path.basename(path)) for path in paths]
        if None in matches:
            fail(f"--group does not match {matches.count(None):,} file names, such as {paths[matches.index(None)]}")
        sources = [match[1] if match.re.groups and match[1] is not None else match[0] for match in matches]
    labels = [Path(path).parts[0] if os.sep in path and not unlabeled else "" for path in paths]
    if len(set(labels)) > 1 and "" in labels:
        loose = f"{labels.count(''):,} videos are in no class folder, such as {paths[labels.index('')]}"
        fail(f"{folder}: {loose}; move them into one, or give --unlabeled")
    return [Video(*video) for video in zip(absolute, sources, labels, strict=True)]


def split(videos, labels, fraction):
    """{"train": videos, "val": videos}, with each label in both.

    Visits the sources in a random order that depends on their names only. Chooses a source for "val" if that brings the
    numbers of validation videos of its classes closer to `fraction` of each class, at least one.
    """
    sizes = defaultdict(Counter)  # of each source: the number of its videos in each class
    for video in videos:
        sizes[video.source][video.label] += 1
    totals = Counter(video.label for video in videos)
    missing = {label: max(1, fraction * total) for label, total in totals.items()}  # from the validation set
    chosen = set()
    for source, size in sorted(sizes.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        if sum(abs(missing[label] - n) for label, n in size.items()) < sum(abs(missing[label]) for label in size):
            chosen.add(source)
            for label, n in size.items():
                missing[label] -= n
    splits = {"train": [v for v in videos if v.source not in chosen], "val": [v for v in videos if v.source in chosen]}
    train, val = (Counter(v.label for v in members) for members in splits.values())
    for label in labels:
        if not train[label] or not val[label]:
            name = f"class {label}" if label else "the folder"
            advice = "add readable videos, change --val-fraction or --group, or leave the class out"
            fail(f"{name}: {train[label]} videos for train and {val[label]} for val; {advice}")
    return splits


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
        nargs = dataset.num_annotations
        flag("--annotations", nargs=nargs, required=dataset.needs_annotations, metavar="PATH", help="see above")
        flag("--videos", nargs="+", required=True, metavar="DIR", help="see above")
        if dataset.splits:
            flag("--split", type=int, choices=dataset.splits, default=1, help="which of the official splits")
    flag = add_command("panda70m", panda70m, panda70m)
    flag("--annotations", required=True, metavar="FILE", help="see above")
    flag("--videos", nargs="+", required=True, metavar="DIR", help="see above")
    flag("--count", type=int, default=2_799_959, help="number of clips to sample")
    flag("--seed", type=int, default=0, help="of the sample")
    flag = add_command("folder", write_folder, write_folder)
    flag("videos", type=Path, metavar="VIDEOS", help="the folder of videos")
    flag("--val-fraction", type=float, default=0.2, help="fraction of each class's videos to validate on")
    flag("--group", metavar="REGEX", help="keep the videos of a source together; see above")
    flag("--unlabeled", action="store_true", help="subfolders are no classes: all labels are -1")
    flag("--workers", type=int, default=os.cpu_count(), help="number of processes that try to decode the videos")
    flag("--timeout", type=float, default=120, help="seconds after which a video counts as bad")
    return parser.parse_args()


def main():
    args = parse_args()
    require_at_least(args, 1, *(name for name in ("count", "workers", "timeout") if name in args))
    try:
        args.run(args)
    except re.error as error:
        fail(f"--group {args.group}: {error}")
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
