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
    """Write files below `root`: {name: text or JSON}. Returns `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return root


def touch(root, *names):
    """Write empty files; a dataset's videos are never opened."""
    return write(root, dict.fromkeys(names, ""))


def written(out, videos):
    """What `data` reads from the manifests: {path relative to `videos`: name of its class} of train and of val."""
    classes, splits = (out / "classes.txt").read_text("utf-8").splitlines(), []
    for split in ("train", "val"):
        paths, labels = data.read_manifest(out / f"{split}.csv")
        names = [classes[label] if label >= 0 else None for label in labels]
        splits.append({os.path.relpath(path, videos): name for path, name in zip(paths, names, strict=True)})
        assert len(splits[-1]) == len(paths)
    return classes, *splits


def run(tmp_path, dataset, *flags, annotations="a", videos="v"):
    """Prepare a dataset from a/ and v/. Returns the classes, the training clips and the validation clips."""
    paths = ("--annotations", tmp_path / annotations, "--videos", tmp_path / videos, "--out", tmp_path / "o")
    run_script(prepare, dataset, *paths, *flags)
    return written(tmp_path / "o", tmp_path / videos)


def counts(text, split="train"):
    """The counts printed for a split, in the order of COUNTS."""
    return [int(n.replace(",", "")) for n in re.search(rf"^{split} +(.*)$", text, re.M)[1].split()]


# ---------------------------------------------------------------------------------------------------------------------
# datasets

HEADER = "label,youtube_id,time_start,time_end,split\n"


def kinetics_files(folder, train, val, val_name="val.csv"):
    """Annotations of clips (label, video, start), each of ten seconds."""
    rows = {
        name: HEADER + "".join(f'"{label}",{video},{start},{start + 10},x\n' for label, video, start in clips)
        for name, clips in (("train.csv", train), (val_name, val))
    }
    return write(folder, rows)


def test_kinetics_finds_files_by_each_of_their_possible_names_and_counts_them(tmp_path, capfd):
    train = [
        ("washing hands", "-aaaaaaaaaa", 12),
        ("air drumming", "_bbbbbbbbbb", 0),  # its file name has no time span
        ("air drumming", "gone0000000", 5),
        ("air drumming", "corrupted00", 7),
        ("abseiling, tandem", "-aaaaaaaaaa", 12),  # annotated twice
        ("air drumming", "_bbbbbbbbbb", 30),  # the same file again
        ("air drumming", "validation0", 1),  # also in the validation set
    ]
    kinetics_files(tmp_path / "a", train, [("only in val", "validation0", 1)], "validate.csv")
    washing = "train/washing hands/-aaaaaaaaaa_000012_000022.mp4"
    drumming = "train/air_drumming/_bbbbbbbbbb.mkv.webm"
    replacement = "replacement/replacement_for_corrupted_k400/corrupted00_000007_000017.mp4"
    val = "val/validation0_000001_000011.MP4"
    touch(tmp_path / "v", washing, drumming, replacement, val, "fixed/air drumming/corrupted00_000007_000017.mp4")
    touch(tmp_path / "v", "notes/gone0000000_000005_000015.txt", "train/gone0000000_000005_000015.mp4.part")
    assert run(tmp_path, "k400") == (
        ["abseiling, tandem", "air drumming", "only in val", "washing hands"],
        {washing: "washing hands", drumming: "air drumming", replacement: "air drumming"},
        {val: "only in val"},
    )
    text = capfd.readouterr().out
    assert counts(text) == [7, 3, 1, 2, 1] and counts(text, "val") == [1, 1, 0, 0, 0]
    assert "4 classes (paper: 400 classes)" in text


def test_k710_merges_three_sets_without_duplicates_and_without_videos_of_any_validation_set(tmp_path, capfd):
    sets = [
        kinetics_files(tmp_path / "400", [("Old name", "a", 0), ("massaging person's head", "b", 0)], [("x", "v4", 0)]),
        kinetics_files(tmp_path / "600", [("new name", "a", 0), ("x", "a", 50)], [("x", "v6", 0)]),
        kinetics_files(
            tmp_path / "700",
            [("new name", "a", 0), ("massaging persons head", "c", 3), ("x", "v4", 0), ("x", "v6", 70)],
            [("x", "v7", 0), ("x", "v4", 0)],
        ),
    ]
    clips = ["a_000000_000010", "a_000050_000060", "b_000000_000010", "c_000003_000013", "v4_000000_000010"]
    videos = touch(tmp_path / "v", *(f"{c}.mp4" for c in [*clips, "v6_000070_000080", "v7_000000_000010"]))
    flags = ("--videos", videos, "--out", tmp_path / "o")
    run_script(prepare, "k710", "--annotations", *sets, *flags)
    classes, train, _ = written(tmp_path / "o", videos)
    assert classes == ["Old name", "massaging persons head", "new name", "x"]
    assert train == {
        "a_000000_000010.mp4": "new name",
        "c_000003_000013.mp4": "massaging persons head",
        "a_000050_000060.mp4": "x",
        "b_000000_000010.mp4": "massaging persons head",
    }
    text = capfd.readouterr().out
    assert counts(text) == [8, 4, 0, 2, 2] and counts(text, "val") == [4, 2, 1, 1, 0]
    error = refusal(capfd, prepare, "k710", "--annotations", *sets[:2], *flags)
    assert "--annotations: expected 3 arguments" in error


def test_k710_merges_the_classes_that_kinetics_renamed(tmp_path):
    """K400's names are torchvision's. The new names are in K700, so that the old ones add no classes."""
    k400 = torchvision.models.video.R3D_18_Weights.KINETICS400_V1.meta["categories"]
    assert len(prepare.RENAMED) == 14 == 724 - 710 and prepare.RENAMED.keys() <= set(k400)
    assert not set(prepare.RENAMED.values()) & set(k400)
    old, new = sorted(prepare.RENAMED), sorted(prepare.RENAMED.values())
    sets = [
        kinetics_files(tmp_path / name, [(label, label, 0) for label in labels], [("vault", name, 0)])
        for name, labels in (("400", old), ("600", ["Picking fruit"]), ("700", new))
    ]
    videos = touch(tmp_path / "v", "400.mp4", *(f"{label}.mp4" for label in [*old, *new]))
    run_script(prepare, "k710", "--annotations", *sets, "--videos", videos, "--out", tmp_path / "o")
    classes, train, _ = written(tmp_path / "o", videos)
    assert sorted(classes) == sorted([*new, "vault"])
    assert train == {f"{k}.mp4": label for k, label in {**prepare.RENAMED, **{name: name for name in new}}.items()}


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_drops_brackets_and_keeps_class_numbers(tmp_path, capfd, prefix):
    labels = {"Putting something on something": "1", "Approaching something": "0", "Moving part of something": "2"}
    row = {
        "id": "78687",
        "label": "putting a cup on a table",
        "template": "Putting [something] on [something]",
        "placeholders": ["a cup", "a table"],
    }
    files = {
        f"{prefix}labels.json": labels,
        f"{prefix}train.json": [row, {"id": "9", "template": "Moving [part] of [something]"}],
        f"{prefix}validation.json": [{"id": "3", "template": "Approaching [something]"}],
    }
    write(tmp_path / "a", files)
    touch(tmp_path / "v" / "20bn-something-something-v2", "78687.webm", "9.webm", "3.webm")
    classes, train, val = run(tmp_path, "ssv2", videos="v/20bn-something-something-v2")
    assert classes == sorted(labels, key=labels.get)
    assert train == {"78687.webm": "Putting something on something", "9.webm": "Moving part of something"}
    assert val == {"3.webm": "Approaching something"}


def test_coin_diving48_and_jester(tmp_path):
    def video(kind, number, subset):
        annotation = [{"id": "212", "segment": [2.0, 3.0], "label": "lift"}]
        return {"duration": 9.5, "class": kind, "annotation": annotation, "subset": subset, "recipe_type": number}

    database = {
        "-t1": video("MakeTea", 7, "training"),
        "v1": video("MakeTea", 7, "testing"),
        "t2": video("AssembleBed", 12, "training"),
    }
    write(tmp_path / "a", {"COIN.json": {"database": database}})
    touch(tmp_path / "v", "7/-t1.mp4", "7/v1.mp4", "12/t2.mp4.webm")
    train = {"7/-t1.mp4": "MakeTea", "12/t2.mp4.webm": "AssembleBed"}
    assert run(tmp_path, "coin") == (["MakeTea", "AssembleBed"], train, {"7/v1.mp4": "MakeTea"})

    dive = {"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 92}
    files = {
        "Diving48_vocab.json": [["Back", "15som", "05Twis", "FREE"], ["Back", "Dive", "NoTwis", "PIKE"]],
        "Diving48_V2_train.json": [dive, {**dive, "vid_name": "gone"}],
        "Diving48_V2_test.json": [{**dive, "vid_name": "x_00001", "label": 0}],
    }
    write(tmp_path / "a", files)
    touch(tmp_path / "rgb", "_8Vy3dlHg2w_00000.mp4", "x_00001.mp4")
    classes = ["Back 15som 05Twis FREE", "Back Dive NoTwis PIKE"]
    train, val = {"_8Vy3dlHg2w_00000.mp4": classes[1]}, {"x_00001.mp4": classes[0]}
    assert run(tmp_path, "diving48", videos="rgb") == (classes, train, val)

    files = {
        "jester-v1-labels.csv": "Swiping Left\nDoing other things\n",
        "jester-v1-train.csv": "34870;Doing other things\n56557;Swiping Left\n",
        "jester-v1-validation.csv": "9223;Swiping Left\n",
    }
    write(tmp_path / "a", files)
    touch(tmp_path / "20bn-jester-v1", "34870/00001.jpg", "56557.mp4", "9223/00001.jpg")
    train, val = {"34870": "Doing other things", "56557.mp4": "Swiping Left"}, {"9223": "Swiping Left"}
    classes = ["Swiping Left", "Doing other things"]
    assert run(tmp_path, "jester", videos="20bn-jester-v1") == (classes, train, val)


def test_ucf101_reads_the_official_split_that_is_asked_for(tmp_path):
    yoyo = [f"YoYo/v_YoYo_g{group}_c01.avi" for group in ("01", "08", "09")]
    handstand = "HandstandPushups/v_HandStandPushups_g02_c01.avi"  # as in the real files
    files = {  # lines end as in Windows; the training lists have class numbers
        "classInd.txt": "1 YoYo\r\n2 HandstandPushups\r\n",
        "trainlist01.txt": f"{yoyo[1]} 1\r\n{handstand} 2\r\n",
        "testlist01.txt": f"{yoyo[0]}\r\n",
        "trainlist02.txt": f"{yoyo[0]} 1\r\n{yoyo[2]} 1\r\n",
        "testlist02.txt": f"{yoyo[1]}\r\n{handstand}\r\n",
    }
    write(tmp_path / "a", files)
    touch(tmp_path / "v", *yoyo, handstand)
    classes = ["YoYo", "HandstandPushups"]  # in the order of classInd.txt
    assert run(tmp_path, "ucf101") == (classes, {yoyo[1]: "YoYo", handstand: "HandstandPushups"}, {yoyo[0]: "YoYo"})
    train, val = {yoyo[0]: "YoYo", yoyo[2]: "YoYo"}, {yoyo[1]: "YoYo", handstand: "HandstandPushups"}
    assert run(tmp_path, "ucf101", "--split", 2) == (classes, train, val)


def test_hmdb51_leaves_out_the_videos_that_a_split_does_not_use(tmp_path):
    files = {
        "wave_test_split1.txt": "a_wave_f_0.avi 1 \nb_wave_f_0.avi 2 \n#c(!)_wave_f_0.avi 0 \n",
        "brush_hair_test_split1.txt": "d_brush_hair_u_0.avi 2 \ne_brush_hair_u_0.avi 1 \n",
        "wave_test_split3.txt": "a_wave_f_0.avi 2 \nb_wave_f_0.avi 0 \n#c(!)_wave_f_0.avi 1 \n",
        "brush_hair_test_split3.txt": "d_brush_hair_u_0.avi 1 \ne_brush_hair_u_0.avi 0 \n",
    }
    write(tmp_path / "a", files)
    a, b, c = (f"wave/{name}_wave_f_0.avi" for name in ("a", "b", "#c(!)"))
    d, e = (f"brush_hair/{name}_brush_hair_u_0.avi" for name in "de")
    touch(tmp_path / "v", a, b, c, d, e)
    classes = ["brush_hair", "wave"]
    assert run(tmp_path, "hmdb51") == (classes, {e: "brush_hair", a: "wave"}, {d: "brush_hair", b: "wave"})
    assert run(tmp_path, "hmdb51", "--split", 3) == (classes, {d: "brush_hair", c: "wave"}, {a: "wave"})


@pytest.mark.parametrize("truth", [None, "LOC_val_solution.csv", "synset_labels.txt"])
def test_imagenet1k_with_validation_images_in_folders_or_in_one_folder(tmp_path, truth):
    names, synsets = [f"ILSVRC2012_val_0000000{i}" for i in (1, 2)], ["n02000000", "n01440764"]
    boxes = [f"{names[1]},{synsets[1]} 1 2 3 4 ", f"{names[0]},{synsets[0]} 111 108 331 266 {synsets[0]} 1 2 3 4 "]
    if truth:
        lines = ["ImageId,PredictionString", *boxes] if truth.endswith(".csv") else synsets
        write(tmp_path, {truth: "\n".join(lines) + "\n"})
    val = {f"val/{n}.JPEG" if truth else f"val/{s}/{n}.JPEG": s for s, n in zip(synsets, names, strict=True)}
    train = {"train/n01440764/n01440764_10026.JPEG": synsets[1], "train/n02000000/n02000000_1.JPEG": synsets[0]}
    touch(tmp_path, *train, *val, "test/ILSVRC2012_test_1.JPEG")
    flags = ["--annotations", tmp_path / truth] if truth else []
    run_script(prepare, "imagenet1k", "--videos", tmp_path, *flags, "--out", tmp_path / "o")
    assert written(tmp_path / "o", tmp_path) == (sorted(synsets), train, val)


def test_panda70m_samples_all_durations_evenly_and_reproducibly(tmp_path, capfd):
    spans = [
        ["0:00:00.000", "0:00:03.900"],
        *(["0:59:58.500", f"1:00:0{i}.000"] for i in (3, 3, 3, 3)),
        ["0:00:01.000", "0:00:51.000"],
        ["0:00:00.000", "0:00:50.001"],
        ["0:00:10.000", "0:00:20.000"],
    ]
    captions = "['a cat']" * 20_000  # longer than csv's default limit
    header = "videoID,url,timestamp,caption,matching_score\n"
    rows = f'-first,u,"{spans[:1]}",{captions},[0.43]\nsecond,u,"{spans}",{captions},[0.43]\n'
    write(tmp_path, {"p.csv": header + rows})
    touch(tmp_path / "v/00000", "0000000_00000.mp4", *(f"0000001_{i:05}.mp4" for i in range(7)))
    write(tmp_path / "v/00000", {"0000001_00001.json": '{"url": "https://www.youtube.com/watch?v=second"}'})
    flags = ("panda70m", "--annotations", tmp_path / "p.csv", "--videos", tmp_path / "v")

    def sample(seed, count=3):
        run_script(prepare, *flags, "--count", count, "--seed", seed, "--out", tmp_path / "o")
        paths, labels = data.read_manifest(tmp_path / "o/train.csv")
        assert set(labels) == {-1}
        return [os.path.basename(path) for path in paths]

    first = sample(0)  # four clips of 4.5 s, one of 50 s; the others are too short, too long or missing
    assert counts(capfd.readouterr().out) == [9, 5, 1, 0, 3]
    assert len(first) == 3 and "0000001_00005.mp4" in first
    assert sample(0) == first and len({tuple(sample(seed)) for seed in range(8)}) > 1
    assert len(sample(0, count=100)) == 5
    write(tmp_path, {"p.csv": header + rows.replace("second", "other")})
    assert "was downloaded with another csv file" in refusal(capfd, prepare, *flags)


def test_v36m_joins_three_manifests(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = {"k710": "a.mp4 3\nb c.mp4 5\n", "ssv2": "/abs/1.webm 3\n", "panda70m": "p.mp4 -1\np.mp4 -1\n"}
    write(tmp_path / "data", {f"{name}/train.csv": text for name, text in lines.items()})
    run_script(prepare, "v3.6m")
    paths, labels = map(list, data.read_manifest("data/v3.6m/train.csv"))
    folder = tmp_path / "data"
    assert paths == [
        *map(str, (folder / "k710/a.mp4", folder / "k710/b c.mp4", "/abs/1.webm", folder / "panda70m/p.mp4"))
    ]
    assert labels == [-1] * 4
    assert "data/panda70m/train.csv: 1 videos, and 1 duplicates" in capfd.readouterr().out


@pytest.mark.parametrize(
    "dataset, files, what",
    [
        ("ssv2", {}, "no labels.json or something-something-v2-labels.json in"),
        ("k400", {"train.csv": "some,table\n1,2\n"}, "not in k400's format: KeyError 'youtube_id'"),
        ("k400 --annotations x y", {}, "unrecognized arguments"),
        ("k400 --videos nowhere", {}, "nowhere: No such file"),
        ("panda70m --annotations {a}/train.csv", {}, "no columns videoID, url and timestamp"),
        ("panda70m --count 0", {}, "--count 0: must be at least 1"),
        ("imagenet1k --annotations {a}/x.txt", {}, "no x.txt in"),
        ("ucf101 --split 4", {}, "--split: invalid choice: 4"),
        ("ucf101", {"classInd.txt": "1 YoYo\n", "testlist01.txt": "v_g01_c01.avi\n"}, "not in ucf101's format"),
        ("hmdb51 --split 2", {}, "no CLASS_test_split2.txt in"),
        ("hmdb51", {"wave_test_split1.txt": "a_wave_f_0.avi 3\n"}, "not in hmdb51's format"),
        (
            "jester",
            {"labels.csv": "a\n", "validation.csv": "1,a\n"},
            "validation.csv line 1: expected id;label, not '1,a'",
        ),
        ("jester", {"labels.csv": "a\n", "validation.csv": "id;label\nx;a\n"}, "line 2: expected id;label, not 'x;a'"),
        (
            "ssv2",
            {"labels.json": {}, "train.json": [], "validation.json": [{"id": 1, "template": "Eating [it]"}]},
            "'Eating it' is not a class of ssv2",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, capfd, dataset, files, what):
    a, videos = kinetics_files(tmp_path / "a", [("run", "a", 0)], [("run", "b", 0)]), touch(tmp_path / "v", "x.mp4")
    write(a, files)
    name, *flags = dataset.format(a=a).split()
    assert what in refusal(capfd, prepare, name, "--annotations", a, "--videos", videos, *flags)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_clips_is_an_error_and_nothing_is_written(tmp_path, capfd, split):
    """Not even if an earlier call wrote that split."""
    annotations = kinetics_files(tmp_path / "a", [("run", "a", 0)], [("run", "b", 0)])
    videos = touch(tmp_path / "v", "a.mp4", "b.mp4")
    run(tmp_path, "k400")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    (videos / {"train": "a.mp4", "val": "b.mp4"}[split]).unlink()
    flags = ("k400", "--annotations", annotations, "--videos", videos, "--out", tmp_path / "o")
    error = refusal(capfd, prepare, *flags)
    assert f"no {split} clips: of 1 annotated, 1 are missing, 0 are duplicate, 0 are excluded" in error
    write(annotations, {f"{split}.csv": HEADER})
    assert f"--annotations: no {split} clips in them" in refusal(capfd, prepare, *flags)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()} == before


def test_help_says_which_files_are_needed_and_where_to_get_them(capfd):
    for name in (*prepare.DATASETS, "panda70m"):
        with pytest.raises(SystemExit) as stop:
            run_script(prepare, name, "--help")
        text = capfd.readouterr().out
        assert stop.value.code == 0
        assert "http" in text or name == "k710"  # k710 refers to k400
        assert all(f"{flag}: " in text for flag in ("--annotations", "--videos"))


def test_links_in_circles_and_names_that_a_manifest_cannot_hold(tmp_path, capfd):
    touch(tmp_path, "a/1.mp4", "b/1.mp4", "a/line\nbreak.mp4", "a/2.jpg")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    (tmp_path / os.fsdecode(b"latin\xe4.mp4")).touch()
    paths, others = prepare.list_files(tmp_path)
    assert paths == [f"{tmp_path}/a/1.mp4", f"{tmp_path}/b/1.mp4"] and others == {".jpg": 1}
    assert capfd.readouterr().out.count("is left out: a manifest cannot hold this name") == 2
    assert prepare.find_files([tmp_path]) == {"1": f"{tmp_path}/a/1.mp4"}


# ---------------------------------------------------------------------------------------------------------------------
# your own videos


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A readable video's bytes."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [flat(i) for i in range(4)]).read_bytes()


def make_videos(root, clip, *names):
    """Write the same video to each of these paths below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip)
    return root


def folder_flags(videos, out, *more):
    return ("folder", videos, "--out", out, "--workers", 1, *more)


def test_class_folders_become_labels_and_unreadable_videos_are_reported_and_left_out(tmp_path, clip, capfd):
    names = {f"{kind}/{i}.mp4": kind.split("/")[0] for kind in ("walk", "run fast", "Jump/deep/er") for i in range(5)}
    videos = make_videos(tmp_path / "v", clip, *names)
    make_videos(videos, clip[:100], "walk/broken.MOV", "walk/notes.txt")
    run_script(prepare, *folder_flags(videos, tmp_path / "o"))
    text = capfd.readouterr().out
    classes, train, val = written(tmp_path / "o", videos)
    assert classes == ["Jump", "run fast", "walk"] and train | val == names
    assert sorted(val.values()) == classes and sorted(train.values()) == sorted(classes * 4)
    assert "16 videos in" in text and "ignored by suffix: .txt 1" in text
    assert "walk/broken.MOV: Invalid data" in text and "15 videos are good, 1 bad" in text
    assert "3 classes, each with 4 to 4 train and 1 to 1 val videos\n" in text


def test_a_folder_without_class_folders_gives_unlabeled_manifests(tmp_path, clip, capfd):
    videos = make_videos(tmp_path / "v", clip, *(f"{i}.mp4" for i in range(4)))
    run_script(prepare, *folder_flags(videos, tmp_path / "o", "--val-fraction", 0.5))
    classes, train, val = written(tmp_path / "o", videos)
    assert classes == [] and {*train.values(), *val.values()} == {None} and len(train) == len(val) == 2
    make_videos(videos, clip, "a/5.mp4")
    error = refusal(capfd, prepare, *folder_flags(videos, tmp_path / "o2"))
    assert "4 videos, such as 0.mp4, are in no class folder, but others are" in error
    run_script(prepare, *folder_flags(videos, tmp_path / "o2", "--unlabeled"))
    classes, train, val = written(tmp_path / "o2", videos)
    assert classes == [] and (train | val)["a/5.mp4"] is None


def test_the_split_is_the_same_in_another_place_and_keeps_sources_together(tmp_path, clip):
    names, splits = [f"{kind}/{kind}_g{g:02}_c{c}.mp4" for kind in "ab" for g in range(10) for c in range(2)], []
    for place in ("here", "there"):
        videos = make_videos(tmp_path / place, clip, *names)
        flags = ("--group", r"g(\d+)", "--val-fraction", 0.3)
        run_script(prepare, *folder_flags(videos, tmp_path / place / "o", *flags))
        splits.append(written(tmp_path / place / "o", videos))
    assert splits[0] == splits[1]
    train, val = ({name.split("_")[1] for name in paths} for paths in splits[0][1:])
    assert len(val) == 3 and len(train) == 7 and not val & train


@pytest.mark.parametrize(
    "group, sources", [("g(..)", ["01", "02"]), ("g..", ["g01", "g02"]), ("g(01)|g..", ["01", "g02"])]
)
def test_a_source_is_the_first_group_or_the_whole_match_in_the_file_name(group, sources):
    assert prepare.find_sources(["g/xg01.mp4", "g/xg02.mp4"], group) == sources


def test_the_validation_set_has_the_right_fraction_of_each_class():
    """Also if classes and sources differ in size, and sources have several classes."""
    sources = [(f"s{i}", label, number) for i in range(100) for label, number in (("abc"[i % 3], i % 5), ("a", 2))]
    videos = [prepare.Video("", source, label) for source, label, number in sources for _ in range(number)]
    for fraction in (0.1, 0.5):
        chosen = prepare.choose_sources(videos, fraction)
        for label in "abc":
            members = [v.source in chosen for v in videos if v.label == label]
            assert abs(sum(members) - fraction * len(members)) <= 5
    pairs = [prepare.Video(f"{label}{i}", f"{label}{i}", label) for label in "abcdefgh" for i in range(2)]
    assert sorted(name[0] for name in prepare.choose_sources(pairs, 0.01)) == list("abcdefgh")  # at least one of each
    videos = [prepare.Video("", f"{i}.mp4", "") for i in range(10)]
    assert prepare.choose_sources(videos, 0.2) == {"7.mp4", "8.mp4"}  # in every version of this project


def test_mistakes_about_a_folder_are_reported_in_one_line_and_write_no_manifest(tmp_path, clip, capfd):
    names = [f"{kind}/{kind}_g{g}.mp4" for kind in "ab" for g in range(3)]
    videos, out = make_videos(tmp_path / "v", clip, *names, "b/b_x.mp4"), tmp_path / "o"
    lonely = make_videos(tmp_path / "lonely", clip, *names, "c/1.mp4")
    make_videos(make_videos(tmp_path / "broken", clip, "b/1.mp4", "b/2.mp4"), b"", "a/1.mp4", "a/2.mp4")
    make_videos(tmp_path / "text", b"", "a/1.txt", "a/2")
    for arguments, what in [
        ((tmp_path / "nowhere", out), "nowhere: No such file"),
        ((videos / names[0], out), "Not a directory"),
        ((tmp_path / "text", out), "in it; ignored by suffix: .txt 1, none 1"),
        ((tmp_path / "broken", tmp_path / "checked"), "class a: 0 videos for train and 0 for val, from 0 sources"),
        ((lonely, out), "class c: 0 videos for train and 1 for val, from 1 sources; add"),
        ((videos, out, "--group", r"g\d"), "does not match 1 of 7 file names, such as b/b_x.mp4"),
        ((videos, out, "--group", "^(a|b)"), "class a: 3 videos for train and 0 for val, from 1 sources; add"),
        ((videos, out, "--group", "("), "--group ( is not a regular expression: missing )"),
        ((videos, out, "--val-fraction", 1), "--val-fraction 1.0: must be above 0 and below 1"),
    ]:
        assert what in refusal(capfd, prepare, *folder_flags(*arguments))
    assert not out.exists()  # found before any video was decoded
    assert [path.name for path in (tmp_path / "checked").iterdir()] == ["check.jsonl"]


def test_what_operating_systems_leave_behind_is_no_video_and_no_class(tmp_path, clip, capfd):
    names = {f"{kind}/{i}.mp4": kind for kind in ("run", "walk") for i in range(2)}
    videos = make_videos(tmp_path / "v", clip, *names)
    clutter = ["__MACOSX/walk/._0.mp4", "__MACOSX/1.mp4", "walk/._0.mp4", "walk/.DS_Store", ".DS_Store", "._walk"]
    make_videos(videos, b"\0" * 4096, *clutter, ".Trashes/1.mp4", "$RECYCLE.BIN/$R1.mp4")
    run_script(prepare, *folder_flags(videos, tmp_path / "o"))
    assert "4 videos in" in (text := capfd.readouterr().out) and "ignored" not in text and "0 bad" in text
    classes, train, val = written(tmp_path / "o", videos)
    assert classes == ["run", "walk"] and train | val == names
    assert set(prepare.find_files([videos])) == {"0", "1"}
    write(tmp_path / "a", {"run_test_split1.txt": "0.avi 1\n1.avi 2\n", "._run_test_split1.txt": "\0"})
    assert run(tmp_path, "hmdb51")[0] == ["run"]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "dataset, videos, annotated, found",
    [
        ("ucf101", "ucf3", {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}, {1: (290, 104)}),
        ("hmdb51", "jhmdb", {split: (3570, 1530) for split in (1, 2, 3)}, {}),
    ],
)
def test_official_split_files(tmp_path, capfd, dataset, videos, annotated, found):
    for split, expected in annotated.items():
        paths = ("--annotations", SHARED_DATA / "annotations" / dataset, "--videos", SHARED_DATA / videos)
        run_script(prepare, dataset, *paths, "--split", split, "--out", tmp_path)
        text = capfd.readouterr().out
        assert (counts(text)[0], counts(text, "val")[0]) == expected
        assert len(written(tmp_path, SHARED_DATA)[0]) == {"ucf101": 101, "hmdb51": 51}[dataset]
        if split in found:
            assert (counts(text)[1], counts(text, "val")[1]) == found[split]
