"""tools/prepare.py: annotations in each dataset's own format, with the irregularities of the real ones; own folders."""

import json
import os
import re

import pytest
import torchvision
from conftest import SHARED_DATA, flat, refusal, run_script, write_video

import data
from tools import prepare


def write(root, files):
    """Write files below `root`: {name: text, bytes or JSON}. Returns `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def fill(root, *names, content=b""):
    """Write the same bytes to all these paths below `root`. A dataset's videos are never opened, and may be empty."""
    return write(root, dict.fromkeys(names, content))


def written(out, videos):
    """The names of the classes, and {path relative to `videos`: name of its class} of train and of val."""
    classes, splits = (out / "classes.txt").read_text("utf-8").splitlines(), []
    for split in ("train", "val"):
        paths, labels = data.read_manifest(out / f"{split}.csv")
        names = [classes[label] if label >= 0 else None for label in labels]
        splits.append({os.path.relpath(path, videos): name for path, name in zip(paths, names, strict=True)})
    return classes, *splits


def run(tmp_path, dataset, *flags):
    """Prepare a dataset from a/ and v/. Returns the classes, the training clips and the validation clips."""
    paths = ("--annotations", tmp_path / "a", "--videos", tmp_path / "v", "--out", tmp_path / "o")
    run_script(prepare, dataset, *paths, *flags)
    return written(tmp_path / "o", tmp_path / "v")


def counts(text, split="train"):
    """The counts printed for a split, in the order of COUNTS."""
    return [int(n.replace(",", "")) for n in re.findall(r"[0-9][0-9,]*", re.search(rf"^{split}: .*$", text, re.M)[0])]


def kinetics_files(folder, train, val, val_name="val.csv"):
    """Annotations of clips (label, video, start), each of ten seconds; of `val`, only the videos are given."""

    def rows(clips):
        header = "label,youtube_id,time_start,time_end,split\n"
        return header + "".join(f'"{label}",{video},{start},{start + 10},x\n' for label, video, start in clips)

    return write(folder, {"train.csv": rows(train), val_name: rows(("x", video, 0) for video in val)})


def test_kinetics_finds_files_by_each_of_their_possible_names_and_counts_them(tmp_path, capfd):
    train = [
        ("washing hands", "-aaaaaaaaaa", 12),
        ("air drumming", "_bbbbbbbbbb", 0),  # its file name has no time span
        *[("air drumming", "gone0000000", 5)] * 2,
        ("air drumming", "corrupted00", 7),
        ("abseiling, tandem", "-aaaaaaaaaa", 12),  # annotated twice
        ("air drumming", "_bbbbbbbbbb", 30),  # the same file again
        ("air drumming", "validation0", 0),  # also in the validation set
    ]
    kinetics_files(tmp_path / "a", train, ["validation0"], "validate.csv")
    train = {
        "train/washing hands/-aaaaaaaaaa_000012_000022.mp4": "washing hands",
        "train/air_drumming/_bbbbbbbbbb.mkv.webm": "air drumming",
        "replacement/replacement_for_corrupted_k400/corrupted00_000007_000017.mp4": "air drumming",
    }
    val = {"val/validation0_000000_000010.MP4": "x"}
    fill(tmp_path / "v", *train, *val, "fixed/corrupted00_000007_000017.mp4", "gone0000000_000005_000015.mp4.part")
    assert run(tmp_path, "k400") == (["abseiling, tandem", "air drumming", "washing hands", "x"], train, val)
    text = capfd.readouterr().out
    assert counts(text) == [8, 3, 1, 3, 1] and counts(text, "val") == [1, 1, 0, 0, 0]


def test_k710_merges_three_sets_without_duplicates_and_without_videos_of_any_validation_set(tmp_path, capfd):
    train = [("picking apples", "a", 0), ("massaging persons head", "c", 3), ("x", "v4", 0), ("x", "v6", 70)]
    sets = [
        kinetics_files(tmp_path / "400", [("Picking fruit", "a", 0), ("massaging person's head", "b", 0)], val=["v4"]),
        kinetics_files(tmp_path / "600", [("Old name", "a", 0), ("x", "a", 50)], val=["v6"]),
        kinetics_files(tmp_path / "700", train, val=["v7", "v4"]),
    ]
    clips = ("a_000000", "a_000050", "b_000000", "c_000003", "v4_000000", "v6_000070", "v7_000000")
    videos = fill(tmp_path / "v", *(f"{clip}_0000{int(clip[-2:]) + 10}.mp4" for clip in clips))
    run_script(prepare, "k710", "--annotations", *sets, "--videos", videos, "--out", tmp_path / "o")
    classes, train, _ = written(tmp_path / "o", videos)
    assert classes == ["Old name", "massaging persons head", "picking apples", "x"]
    assert train == {
        "a_000000_000010.mp4": "picking apples",
        "c_000003_000013.mp4": "massaging persons head",
        "a_000050_000060.mp4": "x",
        "b_000000_000010.mp4": "massaging persons head",
    }
    assert counts(capfd.readouterr().out) == [8, 4, 0, 2, 2]


def test_k710_renames_classes_of_kinetics_400():
    """K400's names are torchvision's. The new names are in K700, so that the old ones add no classes."""
    k400 = torchvision.models.video.R3D_18_Weights.KINETICS400_V1.meta["categories"]
    assert len(prepare.RENAMED) == 724 - 710 and prepare.RENAMED.keys() <= set(k400)


SSV2 = {
    "labels.json": {"Putting something on something": "1", "Moving part of something": "2", "Approaching": "0"},
    "train.json": [
        {"id": "78687", "label": "putting a cup on a table", "template": "Putting [something] on [something]"},
        {"id": "9", "label": "moving the hand of a clock", "template": "Moving [part] of [something]"},
    ],
    "validation.json": [{"id": "3", "label": "approaching", "template": "Approaching"}],
}
COIN = {
    "-t1": {"class": "MakeTea", "recipe_type": 7, "subset": "training", "duration": 9.5},
    "v1": {"class": "MakeTea", "recipe_type": 7, "subset": "testing", "duration": 9.5},
    "t2": {"class": "AssembleBed", "recipe_type": 12, "subset": "training", "duration": 9.5},
}
DIVE = {"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 92}
DIVING48 = {
    "Diving48_vocab.json": [["Back", "15som", "05Twis", "FREE"], ["Back", "Dive", "NoTwis", "PIKE"]],
    "Diving48_V2_train.json": [DIVE],
    "Diving48_V2_test.json": [{**DIVE, "vid_name": "x_00001", "label": 0}],
}
JESTER = {
    "jester-v1-labels.csv": "Swiping Left\nDoing other things\n",
    "jester-v1-train.csv": "34870;Doing other things\n56557;Swiping Left\n",
    "jester-v1-validation.csv": "9223;Swiping Left\n",
}
UCF101 = {  # lines end as in Windows; the training lists have class numbers; a class is spelled in two ways
    "classInd.txt": "1 YoYo\r\n2 HandstandPushups\r\n",
    "trainlist02.txt": "YoYo/v_YoYo_g01_c01.avi 1\r\nYoYo/v_YoYo_g09_c01.avi 1\r\n",
    "testlist02.txt": "HandstandPushups/v_HandStandPushups_g02_c01.avi\r\n",
}
HMDB51 = {  # in the order of these files: earlier versions have it
    "sword_exercise_test_split1.txt": "d.avi 2 \n#e(!).avi 1 \n",
    "sword_test_split1.txt": "a.avi 1 \nb.avi 2 \n#c(!).avi 0 \n",
    "._sword_test_split1.txt": "\0",
}


@pytest.mark.parametrize(
    "dataset, annotations, classes, train, val",
    [
        ("ssv2", SSV2, ["Approaching", *list(SSV2["labels.json"])[:2]], {"78687.webm": 1, "9.webm": 2}, {"3.webm": 0}),
        ("coin", {"COIN.json": {"database": COIN}}, ["MakeTea", "AssembleBed"],
         {"7/-t1.mp4": 0, "12/t2.mp4.webm": 1}, {"7/v1.mp4": 0}),
        ("diving48", DIVING48, ["Back 15som 05Twis FREE", "Back Dive NoTwis PIKE"],
         {"rgb/_8Vy3dlHg2w_00000.mp4": 1}, {"rgb/x_00001.mp4": 0}),
        ("jester", JESTER, ["Swiping Left", "Doing other things"], {"34870": 1, "56557.mp4": 0}, {"9223": 0}),
        ("ucf101 --split 2", UCF101, ["YoYo", "HandstandPushups"],
         {"YoYo/v_YoYo_g01_c01.avi": 0, "YoYo/v_YoYo_g09_c01.avi": 0},
         {"HandstandPushups/v_HandStandPushups_g02_c01.avi": 1}),
        ("hmdb51", HMDB51, ["sword_exercise", "sword"], {"#e(!).avi": 0, "a.avi": 1}, {"d.avi": 0, "b.avi": 1}),
    ],
)  # fmt: skip
def test_readers(tmp_path, dataset, annotations, classes, train, val):
    write(tmp_path / "a", annotations)
    fill(tmp_path / "v", "#c(!).avi", *(name if "." in name else f"{name}/00001.jpg" for name in (*train, *val)))
    assert run(tmp_path, *dataset.split()) == (classes, *({k: classes[v] for k, v in s.items()} for s in (train, val)))


def test_imagenet1k_with_validation_images_in_folders_or_in_one_folder(tmp_path):
    train = {"train/n01440764/t1.JPEG": "n01440764", "train/n02000000/t2.JPEG": "n02000000"}
    in_folders = {"val/n02000000/v1.JPEG": "n02000000", "val/n01440764/v2.JPEG": "n01440764"}
    in_one = {"val/v1.JPEG": "n02000000", "val/v2.JPEG": "n01440764"}
    solution = "ImageId,PredictionString\nv2,n01440764 1 2 3 4 \nv1,n02000000 111 108 331 266 n02000000 1 2 3 4 \n"
    flags = ("--annotations", write(tmp_path, {"s.csv": solution}) / "s.csv")
    for name, val, more in (("a", in_folders, ()), ("b", in_one, flags)):
        root = fill(tmp_path / name, *train, *val, "test/ILSVRC2012_test_1.JPEG")
        run_script(prepare, "imagenet1k", "--videos", root, "--out", root / "o", *more)
        assert written(root / "o", root) == (["n01440764", "n02000000"], train, val)


def test_panda70m_samples_all_durations_evenly_and_reproducibly(tmp_path, capfd):
    spans = [["0:00:00.000", "0:00:03.900"], *(["0:59:58.500", f"1:00:0{i}.000"] for i in (3, 3, 3, 3))]
    spans += [["0:00:01.0", "0:00:51.0"], ["0:00:00.0", "0:00:50.001"], ["0:00:10.0", "0:00:20.0"]]
    captions = "['a cat']" * 20_000  # longer than csv's default limit
    rows = f'videoID,url,timestamp,caption\n-first,u,"{spans[:1]}",{captions}\nsecond,u,"{spans}",{captions}\n'
    write(tmp_path, {"p.csv": rows})
    fill(tmp_path / "v/00000", "0000000_00000.mp4", *(f"0000001_{i:05}.mp4" for i in range(7)))
    write(tmp_path / "v/00000", {"0000001_00001.json": '{"url": "https://www.youtube.com/watch?v=second"}'})
    flags = ("panda70m", "--annotations", tmp_path / "p.csv", "--videos", tmp_path / "v")

    def sample(seed, count=3):
        run_script(prepare, *flags, "--count", count, "--seed", seed, "--out", tmp_path / "o")
        return [os.path.basename(line) for line in (tmp_path / "o/train.csv").read_text().splitlines()]

    first = sample(0)  # four clips of 4.5 s, one of 50 s; the others are too short, too long or missing
    assert counts(capfd.readouterr().out) == [9, 5, 1, 0, 3]
    assert len(first) == 3 and "0000001_00005.mp4 -1" in first
    assert sample(0) == first != sample(1) and len(sample(0, count=100)) == 5
    write(tmp_path, {"p.csv": rows.replace("second", "other")})
    assert "was downloaded with another csv file" in refusal(capfd, prepare, *flags)


@pytest.mark.parametrize(
    "dataset, files, what",
    [
        ("ssv2", {}, "no labels.json or something-something-v2-labels.json in"),
        ("k400", {"train.csv": "some,table\n1,2\n"}, "not in k400's format: KeyError 'youtube_id'"),
        ("k400 --videos nowhere", {}, "nowhere"),
        ("k400 --videos {a}", {}, "no train clips found in --videos"),
        ("k400", {}, "no val clips found in --videos"),
        ("panda70m --annotations {a}/train.csv", {}, "no columns videoID, url and timestamp"),
        ("panda70m --count 0", {}, "--count 0: must be at least 1"),
        ("hmdb51 --split 2", {}, "no CLASS_test_split2.txt in"),
        ("jester", JESTER | {"jester-v1-train.csv": "1,Swiping Left\n"}, "not in jester's format: ValueError"),
        ("ssv2", {f"something-something-v2-{k}": v for k, v in (SSV2 | {"labels.json": {}}).items()},
         "not in ssv2's format: KeyError 'Approaching'"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line_and_nothing_is_written(tmp_path, capfd, dataset, files, what):
    a, out = kinetics_files(tmp_path / "a", [("run", "a", 0)], ["b"]), tmp_path / "o"
    write(a, files)
    name, *flags = dataset.format(a=a).split()
    paths = ("--annotations", a, "--videos", fill(tmp_path / "v", "a.mp4"), "--out", out)
    assert what in refusal(capfd, prepare, name, *paths, *flags)
    assert not out.exists()  # nor is an earlier call's manifest replaced


def test_docstrings_say_which_files_are_needed_and_where_to_get_them():
    for reader in (prepare.panda70m, *(dataset.read for dataset in prepare.DATASETS.values())):
        assert "http" in reader.__doc__ or reader is prepare.k710  # which refers to k400
        assert "--annotations: " in reader.__doc__ and "--videos: " in reader.__doc__


def test_links_and_names_that_a_manifest_cannot_hold(tmp_path, capfd):
    root = fill(tmp_path / "v", "a/1.mp4", "b/1.mp4", "a/line\nbreak.mp4", "a/2.jpg")
    os.symlink(root, root / "a" / "up")  # a circle
    os.symlink(fill(tmp_path / "elsewhere", "3.mp4"), root / "link")
    (root / os.fsdecode(b"latin\xe4.mp4")).touch()
    assert prepare.list_files(root) == [f"{root}/{name}" for name in ("a/1.mp4", "b/1.mp4", "link/3.mp4")]
    assert capfd.readouterr().out.count("is left out: a manifest cannot hold this name") == 2
    assert prepare.find_files([root]) == {"1": f"{root}/a/1.mp4", "3": f"{root}/link/3.mp4"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A readable video's bytes."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [flat(i) for i in range(4)]).read_bytes()


def test_class_folders_become_labels_and_unreadable_videos_and_clutter_are_left_out(tmp_path, clip, capfd):
    names = {f"{kind}/{i}.mp4": kind.split("/")[0] for kind in ("walk", "run fast", "Jump/deep/er") for i in range(5)}
    videos = fill(tmp_path / "v", *names, content=clip)
    clutter = ["__MACOSX/1.mp4", "walk/._0.mp4", "walk/.DS_Store", "._walk", ".Trashes/1.mp4", "$RECYCLE.BIN/1.mp4"]
    fill(videos, "walk/broken.MOV", "walk/notes.txt", *clutter, content=clip[:99])
    run_script(prepare, "folder", videos, "--out", tmp_path / "o", "--workers", 1)
    text = capfd.readouterr().out
    classes, train, val = written(tmp_path / "o", videos)
    assert classes == ["Jump", "run fast", "walk"] and train | val == names
    assert sorted(val.values()) == classes and sorted(train.values()) == sorted(classes * 4)
    assert "16 videos in" in text and "walk/broken.MOV: Invalid data" in text and "15 videos are good, 1 bad" in text


def test_a_folder_without_class_folders_gives_unlabeled_manifests(tmp_path, clip, capfd):
    videos = fill(tmp_path / "v", *(f"{i}.mp4" for i in range(4)), "a/5.mp4", content=clip)
    flags = ("folder", videos, "--out", tmp_path / "o", "--workers", 1)
    assert "4 videos are in no class folder, such as 0.mp4" in refusal(capfd, prepare, *flags)
    run_script(prepare, *flags, "--unlabeled", "--val-fraction", 0.4)
    classes, train, val = written(tmp_path / "o", videos)
    assert (classes, len(train), len(val)) == ([], 3, 2) and {*train.values(), *val.values()} == {None}


def test_sources_stay_together(tmp_path):
    names = [f"{kind}/{kind}_g{g:02}_c{c}.mp4" for kind in "ab" for g in range(10) for c in range(2)]
    videos = prepare.list_videos(fill(tmp_path / "v", *names), r"g(\d+)", False)
    train, val = ({v.source for v in members} for members in prepare.split(videos, ["a", "b"], 0.3).values())
    assert len(val) == 3 and len(train) == 7 and not val & train
    few = prepare.list_videos(fill(tmp_path / "few", "g/xg01.mp4", "g/xg02.mp4"), "g(01)|g..", False)
    assert [video.source for video in few] == ["01", "g02"]


def test_the_validation_set_has_the_right_fraction_of_each_class():
    def chosen(sources, fraction):  # of (source, label, number of videos)
        videos = [prepare.Video("", source, label) for source, label, number in sources for _ in range(number)]
        return videos, {video.source for video in prepare.split(videos, [], fraction)["val"]}

    mixed = [(f"s{i}", label, number) for i in range(100) for label, number in (("abc"[i % 3], i % 5), ("a", 2))]
    for fraction in (0.1, 0.5):
        videos, val = chosen(mixed, fraction)
        for label in "abc":
            members = [v.source in val for v in videos if v.label == label]
            assert abs(sum(members) - fraction * len(members)) <= 5
    pairs = [(f"{label}{i}", label, 1) for label in "abcdefgh" for i in range(2)]
    assert sorted(name[0] for name in chosen(pairs, 0.01)[1]) == list("abcdefgh")  # at least one of each
    alike = [(f"{i}.mp4", "", 1) for i in range(10)]
    assert chosen(alike, 0.2)[1] == {"7.mp4", "8.mp4"}  # in every version of this project


def test_mistakes_about_a_folder_are_reported_in_one_line_and_write_no_manifest(tmp_path, clip, capfd):
    names = [f"{kind}/{kind}_g{g}.mp4" for kind in "ab" for g in range(3)]
    videos, out = fill(tmp_path / "v", *names, "b/b_x.mp4", content=clip), tmp_path / "o"
    lonely = fill(tmp_path / "lonely", *names, "c/1.mp4", content=clip)
    broken = fill(tmp_path / "broken", "a/1.mp4", "a/2.mp4")
    for folder, flags, what in [
        (fill(tmp_path / "text", "a/1.txt", "a/2"), (), "no files with the suffixes"),
        (lonely, (), "class c: 0 videos for train and 1 for val; add"),
        (videos, ("--group", r"g\d"), "does not match 1 file names, such as b/b_x.mp4"),
        (videos, ("--group", "("), "--group (: missing )"),
        (videos, ("--val-fraction", 1), "--val-fraction 1.0: must be above 0 and below 1"),
    ]:
        assert what in refusal(capfd, prepare, "folder", folder, "--out", out, *flags)
    assert not out.exists()  # found before any video was decoded
    error = refusal(capfd, prepare, "folder", broken, "--out", out, "--workers", 1)
    assert "class a: 0 videos for train and 0 for val" in error and os.listdir(out) == ["check.jsonl"]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "dataset, videos, num_classes, sizes",
    [("ucf101", "ucf3", 101, [(9537, 3783), (9586, 3734), (9624, 3696)]), ("hmdb51", "jhmdb", 51, [(3570, 1530)] * 3)],
)
def test_official_split_files(tmp_path, capfd, dataset, videos, num_classes, sizes):
    paths = ("--annotations", SHARED_DATA / "annotations" / dataset, "--videos", SHARED_DATA / videos)
    for split, size in enumerate(sizes, start=1):
        run_script(prepare, dataset, *paths, "--split", split, "--out", tmp_path)
        text = capfd.readouterr().out
        assert (counts(text)[0], counts(text, "val")[0]) == size and f"{num_classes} classes" in text
