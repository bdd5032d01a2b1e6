"""tools/prepare.py: small annotation files in each dataset's own format, with the irregularities of the real ones."""

import csv
import json
import os
import re

import pytest
import torchvision
from conftest import refusal, run_script

import data
from tools import prepare


def touch(root, *names):
    """Create empty files; `prepare` never opens videos."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_csv(path, *rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def manifest(folder, root, split="train"):
    """[(path relative to `root`, label)] as data.py reads them."""
    paths, labels = data.read_manifest(folder / f"{split}.csv")
    return [(os.path.relpath(p, root), label) for p, label in zip(paths, labels, strict=True)]


def counts(text, split="train"):
    """The counts that were printed for a split."""
    numbers = re.search(rf"^{split} +(.*)$", text, re.M)[1].split()
    return dict(
        zip([*prepare.COUNTS, "paper"], (n if n == "-" else int(n.replace(",", "")) for n in numbers), strict=True)
    )


HEADER = ["label", "youtube_id", "time_start", "time_end", "split"]


def kinetics_files(folder, train, val, val_name="val.csv"):
    write_csv(folder / "train.csv", HEADER, *([*row, "train"] for row in train))
    write_csv(folder / val_name, HEADER, *([*row, "val"] for row in val))
    return folder


def test_kinetics_finds_files_by_each_of_their_possible_names_and_counts_them(tmp_path, capfd):
    train = [
        ("washing hands", "-aaaaaaaaaa", 12, 22),
        ("air drumming", "_bbbbbbbbbb", 0, 10),  # its file name has no time span
        ("air drumming", "gone0000000", 5, 15),
        ("air drumming", "corrupted00", 7, 17),
        ("abseiling, tandem", "-aaaaaaaaaa", 12, 22),  # annotated twice
        ("air drumming", "_bbbbbbbbbb", 30, 40),  # the same file again
        ("air drumming", "validation0", 1, 11),  # also in the validation set
    ]
    annotations = kinetics_files(tmp_path / "k", train, [("only in val", "validation0", 1, 11)], "validate.csv")
    videos = touch(
        tmp_path / "v",
        "train/washing hands/-aaaaaaaaaa_000012_000022.mp4",
        "train/air_drumming/_bbbbbbbbbb.mkv.webm",
        "fixed/air drumming/corrupted00_000007_000017.mp4",
        "val/validation0_000001_000011.MP4",
        "replacement/replacement_for_corrupted_k400/corrupted00_000007_000017.mp4",
        "notes/gone0000000_000005_000015.txt",
        "train/gone0000000_000005_000015.mp4.part",
    )
    run_script(prepare, "k400", "--annotations", annotations, "--videos", videos, "--out", tmp_path / "out")
    text = capfd.readouterr().out
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == [
        "abseiling, tandem",
        "air drumming",
        "only in val",
        "washing hands",
    ]
    assert manifest(tmp_path / "out", videos) == [
        ("train/washing hands/-aaaaaaaaaa_000012_000022.mp4", 3),
        ("train/air_drumming/_bbbbbbbbbb.mkv.webm", 1),
        ("replacement/replacement_for_corrupted_k400/corrupted00_000007_000017.mp4", 1),
    ]
    assert manifest(tmp_path / "out", videos, "val") == [("val/validation0_000001_000011.MP4", 2)]
    assert counts(text) == {
        "annotated": 7,
        "found": 3,
        "missing": 1,
        "duplicate": 2,
        "excluded": 1,
        "written": 3,
        "paper": "-",
    }
    assert "(paper: 400)" in text


def test_k710_merges_three_sets_without_duplicates_and_without_videos_of_any_validation_set(tmp_path, capfd):
    sets = [
        kinetics_files(
            tmp_path / "400", [("Old name", "a", 0, 10), ("massaging person's head", "b", 0, 10)], [("x", "v4", 0, 10)]
        ),
        kinetics_files(tmp_path / "600", [("new name", "a", 0, 10), ("x", "a", 50, 60)], [("x", "v6", 0, 10)]),
        kinetics_files(
            tmp_path / "700",
            [("new name", "a", 0, 10), ("massaging persons head", "c", 3, 13), ("x", "v4", 0, 10), ("x", "v6", 70, 80)],
            [("x", "v7", 0, 10), ("x", "v4", 0, 10)],
        ),
    ]
    clips = ["a_000000_000010", "a_000050_000060", "b_000000_000010", "c_000003_000013", "v4_000000_000010"]
    videos = touch(tmp_path / "v", *(f"{c}.mp4" for c in [*clips, "v6_000070_000080", "v7_000000_000010"]))
    run_script(prepare, "k710", "--annotations", *sets, "--videos", videos, "--out", tmp_path / "out")
    classes = (tmp_path / "out" / "classes.txt").read_text().splitlines()
    assert classes == ["Old name", "massaging persons head", "new name", "x"]
    got = {path: classes[label] for path, label in manifest(tmp_path / "out", videos)}
    assert got == {
        "a_000000_000010.mp4": "new name",
        "c_000003_000013.mp4": "massaging persons head",
        "a_000050_000060.mp4": "x",
        "b_000000_000010.mp4": "massaging persons head",
    }
    text = capfd.readouterr().out
    want = {"annotated": 8, "found": 4, "missing": 0, "duplicate": 2, "excluded": 2, "written": 4, "paper": 657257}
    assert counts(text) == want
    assert counts(text, "val")["duplicate"] == 1 and counts(text, "val")["missing"] == 1
    assert "--annotations: expected 3 arguments" in refusal(
        capfd, prepare, "k710", "--annotations", *sets[:2], "--videos", videos
    )


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_drops_brackets_and_keeps_class_numbers(tmp_path, capfd, prefix):
    labels = {
        "Putting something on something": "1",
        "Approaching something with your camera": "0",
        "Moving part of something": "2",
    }
    write_json(tmp_path / "a" / f"{prefix}labels.json", labels)
    row = {
        "id": "78687",
        "label": "putting a cup on a table",
        "template": "Putting [something] on [something]",
        "placeholders": ["a cup", "a table"],
    }
    write_json(tmp_path / "a" / f"{prefix}train.json", [row, {"id": "9", "template": "Moving [part] of [something]"}])
    write_json(
        tmp_path / "a" / f"{prefix}validation.json",
        [{"id": "3", "template": "Approaching [something] with your camera"}],
    )
    videos = touch(tmp_path / "20bn-something-something-v2", "78687.webm", "9.webm", "3.webm")
    run_script(prepare, "ssv2", "--annotations", tmp_path / "a", "--videos", videos, "--out", tmp_path / "o")
    assert manifest(tmp_path / "o", videos) == [("78687.webm", 1), ("9.webm", 2)]
    assert manifest(tmp_path / "o", videos, "val") == [("3.webm", 0)]
    assert (tmp_path / "o" / "classes.txt").read_text().splitlines() == sorted(labels, key=labels.get)
    text = capfd.readouterr().out
    assert counts(text)["paper"] == 168913 and "3 classes (paper: 174)" in text
    write_json(tmp_path / "a" / f"{prefix}train.json", [{"id": "9", "template": "Eating [something]"}])
    flags = ("ssv2", "--annotations", tmp_path / "a", "--videos", videos, "--out", tmp_path / "o2")
    assert "'Eating something' is not a class" in refusal(capfd, prepare, *flags)


def test_coin_diving48_and_jester(tmp_path):
    def video(kind, number, subset):
        return {
            "duration": 9.5,
            "class": kind,
            "video_url": "https://www.youtube.com/embed/x",
            "start": 1.5,
            "end": 8,
            "annotation": [{"id": "212", "segment": [2.0, 3.0], "label": "lift"}],
            "subset": subset,
            "recipe_type": number,
        }

    database = {
        "-t1": video("MakeTea", 7, "training"),
        "v1": video("MakeTea", 7, "testing"),
        "t2": video("AssembleBed", 12, "training"),
    }
    write_json(tmp_path / "coin" / "COIN.json", {"database": database})
    videos = touch(tmp_path / "coin", "videos/7/-t1.mp4", "videos/7/v1.mp4", "videos/12/t2.webm")
    run_script(prepare, "coin", "--annotations", tmp_path / "coin", "--videos", videos, "--out", tmp_path / "coin")
    assert manifest(tmp_path / "coin", videos) == [("videos/7/-t1.mp4", 0), ("videos/12/t2.webm", 1)]
    assert manifest(tmp_path / "coin", videos, "val") == [("videos/7/v1.mp4", 0)]

    diving = tmp_path / "diving"
    write_json(
        diving / "Diving48_vocab.json", [["Back", "15som", "05Twis", "FREE"], ["Back", "Dive", "NoTwis", "PIKE"]]
    )
    dive = {"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 92}
    write_json(diving / "Diving48_V2_train.json", [dive, {**dive, "vid_name": "gone"}])
    write_json(diving / "Diving48_V2_test.json", [{**dive, "vid_name": "x_00001", "label": 0}])
    touch(diving, "rgb/_8Vy3dlHg2w_00000.mp4", "rgb/x_00001.mp4")
    run_script(prepare, "diving48", "--annotations", diving, "--videos", diving / "rgb", "--out", diving)
    assert manifest(diving, diving) == [("rgb/_8Vy3dlHg2w_00000.mp4", 1)]
    assert (diving / "classes.txt").read_text() == "Back 15som 05Twis FREE\nBack Dive NoTwis PIKE\n"

    jester = tmp_path / "jester"
    write_csv(jester / "jester-v1-labels.csv", ["Swiping Left"], ["Doing other things"])
    write_csv(jester / "jester-v1-train.csv", ["34870", "Doing other things"], ["56557", "Swiping Left"], delimiter=";")
    write_csv(jester / "jester-v1-validation.csv", ["9223", "Swiping Left"], delimiter=";")
    touch(jester, "20bn-jester-v1/34870/00001.jpg", "20bn-jester-v1/56557.mp4", "20bn-jester-v1/9223/00001.jpg")
    run_script(prepare, "jester", "--annotations", jester, "--videos", jester / "20bn-jester-v1", "--out", jester)
    assert manifest(jester, jester) == [("20bn-jester-v1/34870", 1), ("20bn-jester-v1/56557.mp4", 0)]
    assert manifest(jester, jester, "val") == [("20bn-jester-v1/9223", 0)]


def write_split_files(folder, split, train, val):
    """UCF-101's lists of a split; the training list has class numbers, and lines end as in Windows."""
    folder.mkdir(exist_ok=True)
    (folder / "classInd.txt").write_bytes(b"1 YoYo\r\n2 HandstandPushups\r\n")
    numbers = {"YoYo": 1, "HandstandPushups": 2}
    lines = [f"{name}.avi {numbers[name.split('/')[0]]}\r\n" for name in train]
    (folder / f"trainlist0{split}.txt").write_bytes("".join(lines).encode())
    (folder / f"testlist0{split}.txt").write_bytes("".join(f"{name}.avi\r\n" for name in val).encode())


def test_ucf101_reads_the_official_split_that_is_asked_for(tmp_path, capfd):
    yoyo = [f"YoYo/v_YoYo_g{group}_c01" for group in ("01", "08", "09")]
    handstand = "HandstandPushups/v_HandStandPushups_g02_c01"  # as in the real files
    write_split_files(tmp_path / "a", 1, train=[yoyo[1], handstand], val=[yoyo[0]])
    write_split_files(tmp_path / "a", 2, train=[yoyo[0], yoyo[2]], val=[yoyo[1], handstand])
    videos = touch(tmp_path / "UCF-101", *(f"{name}.avi" for name in (*yoyo, handstand)))
    flags = ("ucf101", "--annotations", tmp_path / "a", "--videos", videos, "--out", tmp_path / "o")
    run_script(prepare, *flags)
    assert manifest(tmp_path / "o", videos) == [(f"{yoyo[1]}.avi", 0), (f"{handstand}.avi", 1)]
    assert manifest(tmp_path / "o", videos, "val") == [(f"{yoyo[0]}.avi", 0)]
    assert (tmp_path / "o" / "classes.txt").read_text() == "YoYo\nHandstandPushups\n"  # in the order of classInd.txt
    run_script(prepare, *flags, "--split", 2)
    assert manifest(tmp_path / "o", videos) == [(f"{yoyo[0]}.avi", 0), (f"{yoyo[2]}.avi", 0)]
    assert manifest(tmp_path / "o", videos, "val") == [(f"{yoyo[1]}.avi", 0), (f"{handstand}.avi", 1)]
    assert "no testlist03.txt in" in refusal(capfd, prepare, *flags, "--split", 3)
    assert "--split: invalid choice: 4" in refusal(capfd, prepare, *flags, "--split", 4)
    (tmp_path / "a" / "testlist01.txt").write_text("v_YoYo_g01_c01.avi\n")
    assert "not in ucf101's format" in refusal(capfd, prepare, *flags)


def test_hmdb51_leaves_out_the_videos_that_a_split_does_not_use(tmp_path, capfd):
    for name, lines in {
        "wave_test_split1": ["a_wave_f_0.avi 1 ", "b_wave_f_0.avi 2 ", "#c(!)_wave_f_0.avi 0 "],
        "brush_hair_test_split1": ["d_brush_hair_u_0.avi 2 ", "e_brush_hair_u_0.avi 1 "],
        "wave_test_split3": ["a_wave_f_0.avi 2 ", "b_wave_f_0.avi 0 ", "#c(!)_wave_f_0.avi 1 "],
        "brush_hair_test_split3": ["d_brush_hair_u_0.avi 1 ", "e_brush_hair_u_0.avi 0 "],
    }.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    files = [f"wave/{name}_wave_f_0.avi" for name in ("a", "b", "#c(!)")]
    files += [f"brush_hair/{name}_brush_hair_u_0.avi" for name in "de"]
    videos = touch(tmp_path / "v", *files)
    flags = ("hmdb51", "--annotations", tmp_path, "--videos", videos, "--out", tmp_path / "o")
    run_script(prepare, *flags)
    assert sorted(manifest(tmp_path / "o", videos)) == [(files[4], 0), (files[0], 1)]
    assert sorted(manifest(tmp_path / "o", videos, "val")) == [(files[3], 0), (files[1], 1)]
    assert (tmp_path / "o" / "classes.txt").read_text() == "brush_hair\nwave\n"
    run_script(prepare, *flags, "--split", 3)
    assert sorted(manifest(tmp_path / "o", videos)) == [(files[3], 0), (files[2], 1)]
    assert manifest(tmp_path / "o", videos, "val") == [(files[0], 1)]
    assert "no CLASS_test_split2.txt in" in refusal(capfd, prepare, *flags, "--split", 2)
    (tmp_path / "wave_test_split1.txt").write_text("a_wave_f_0.avi 3\n")
    assert "not in hmdb51's format" in refusal(capfd, prepare, *flags)


@pytest.mark.parametrize("truth", [None, "LOC_val_solution.csv", "synset_labels.txt"])
def test_imagenet1k_with_validation_images_in_folders_or_in_one_folder(tmp_path, truth):
    names = [f"ILSVRC2012_val_0000000{i}" for i in (1, 2)]
    synsets = ["n02000000", "n01440764"]
    flags = []
    if truth is None:
        touch(tmp_path, *(f"val/{s}/{n}.JPEG" for s, n in zip(synsets, names, strict=True)))
    else:
        touch(tmp_path, *(f"val/{n}.JPEG" for n in names))
        flags = ["--annotations", tmp_path / truth]
    if truth == "LOC_val_solution.csv":
        rows = [[names[1], f"{synsets[1]} 1 2 3 4 "], [names[0], f"{synsets[0]} 111 108 331 266 {synsets[0]} 1 2 3 4 "]]
        write_csv(tmp_path / truth, ["ImageId", "PredictionString"], *rows)
    elif truth:
        (tmp_path / truth).write_text("\n".join(synsets) + "\n")
    touch(
        tmp_path,
        "train/n01440764/n01440764_10026.JPEG",
        "train/n02000000/n02000000_1.JPEG",
        "test/ILSVRC2012_test_1.JPEG",
    )
    run_script(prepare, "imagenet1k", "--videos", tmp_path, *flags, "--out", tmp_path / "o")
    assert manifest(tmp_path / "o", tmp_path) == [
        ("train/n01440764/n01440764_10026.JPEG", 0),
        ("train/n02000000/n02000000_1.JPEG", 1),
    ]
    val = {os.path.basename(path): label for path, label in manifest(tmp_path / "o", tmp_path, "val")}
    assert val == {f"{names[0]}.JPEG": 1, f"{names[1]}.JPEG": 0}


def panda_csv(path, videos):
    rows = [
        [v, f"https://www.youtube.com/watch?v={v}", str(spans), "['a cat']" * 20_000, "[0.43]"] for v, spans in videos
    ]
    write_csv(path, ["videoID", "url", "timestamp", "caption", "matching_score"], *rows)


def test_panda70m_samples_all_durations_evenly_and_reproducibly(tmp_path, capfd):
    spans = [
        ["0:00:00.000", "0:00:03.900"],
        *(["0:59:58.500", f"1:00:0{i}.000"] for i in (3, 3, 3, 3)),
        ["0:00:01.000", "0:00:51.000"],
        ["0:00:00.000", "0:00:50.001"],
        ["0:00:10.000", "0:00:20.000"],
    ]
    panda_csv(tmp_path / "p.csv", [("-first", spans[:1]), ("second", spans)])
    touch(tmp_path, "v/00000/0000000_00000.mp4", *(f"v/00000/0000001_{i:05}.mp4" for i in range(7)))
    (tmp_path / "v/00000/0000001_00001.json").write_text('{"url": "https://www.youtube.com/watch?v=second"}')
    flags = ("panda70m", "--annotations", tmp_path / "p.csv", "--videos", tmp_path / "v")

    def sample(seed, count=3):
        run_script(prepare, *flags, "--count", count, "--seed", seed, "--out", tmp_path / "o")
        return manifest(tmp_path / "o", tmp_path / "v" / "00000")

    first = sample(0)  # four clips of 4.5 s, one of 50 s; the others are too short, too long or missing
    assert len(first) == 3 and ("0000001_00005.mp4", -1) in first
    assert counts(capfd.readouterr().out) == {
        "annotated": 9,
        "found": 5,
        "missing": 1,
        "duplicate": 0,
        "excluded": 3,
        "written": 3,
        "paper": 2799959,
    }
    assert sample(0) == first and len({tuple(sample(seed)) for seed in range(8)}) > 1
    assert len(sample(0, count=100)) == 5
    panda_csv(tmp_path / "p.csv", [("-first", spans[:1]), ("other", spans)])
    assert "it was downloaded with another csv file" in refusal(capfd, prepare, *flags)


def test_v36m_joins_three_manifests(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, lines in (
        ("k710", "a.mp4 3\nb c.mp4 5\n"),
        ("ssv2", "/abs/1.webm 3\n"),
        ("panda70m", "p.mp4 -1\np.mp4 -1\n"),
    ):
        touch(tmp_path, f"data/{name}/train.csv").joinpath(f"data/{name}/train.csv").write_text(lines)
    run_script(prepare, "v3.6m")
    paths, labels = map(list, data.read_manifest("data/v3.6m/train.csv"))
    assert labels == [-1] * 4
    assert paths == [
        str(tmp_path / "data/k710/a.mp4"),
        str(tmp_path / "data/k710/b c.mp4"),
        "/abs/1.webm",
        str(tmp_path / "data/panda70m/p.mp4"),
    ]
    text = capfd.readouterr().out
    assert re.search(r"k710 +2 videos, weight 0.5000, 0 duplicates; paper 657,257", text)
    assert re.search(r"panda70m +1 videos, weight 0.2500, 1 duplicates", text) and "3,626,129" in text


def test_mistakes_are_reported_in_one_line(tmp_path, capfd):
    videos = touch(tmp_path / "v", "x.mp4")
    kinetics = kinetics_files(tmp_path / "k", [("run", "a", 0, 10)], [("run", "b", 0, 10)])
    for flags, what in [
        (["ssv2", "--annotations", kinetics, "--videos", videos], "no labels.json or something-something-v2-labels"),
        (["k400", "--annotations", kinetics, "--videos", tmp_path / "nowhere"], "nowhere: No such file"),
        (
            ["k400", "--annotations", kinetics, "--videos", videos, "--out", tmp_path / "o"],
            "no train clips: of 1 annotated, 1 are missing, 0 are duplicate, 0 are excluded",
        ),
        (["panda70m", "--annotations", kinetics / "train.csv", "--videos", videos], "no columns videoID"),
        (["panda70m", "--annotations", "x", "--videos", videos, "--count", 0], "--count 0: must be at least 1"),
        (["k400", "--annotations", kinetics, kinetics, "--videos", videos], "unrecognized arguments"),
        (["imagenet1k", "--annotations", tmp_path / "x.txt", "--videos", videos], "no x.txt in"),
        (["v3.6m", "--manifests", tmp_path / "no.csv"], "no.csv"),
    ]:
        assert what in refusal(capfd, prepare, *flags)
    write_csv(kinetics / "train.csv", ["some", "table"], ["1", "2"])
    assert "not in k400's format" in refusal(capfd, prepare, "k400", "--annotations", kinetics, "--videos", videos)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_clips_is_an_error_and_nothing_is_written(tmp_path, capfd, split):
    """Not even if an earlier call wrote that split."""
    annotations = kinetics_files(tmp_path / "k", [("run", "a", 0, 10)], [("run", "b", 0, 10)])
    videos = touch(tmp_path / "v", "a.mp4", "b.mp4")
    flags = ("k400", "--annotations", annotations, "--videos", videos, "--out", tmp_path / "o")
    run_script(prepare, *flags)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    assert written.keys() == {"train.csv", "val.csv", "classes.txt"}
    (videos / {"train": "a.mp4", "val": "b.mp4"}[split]).unlink()
    assert f"no {split} clips: of 1 annotated, 1 are missing" in refusal(capfd, prepare, *flags)
    write_csv(annotations / f"{split}.csv", HEADER)
    assert f"--annotations: no {split} clips in them" in refusal(capfd, prepare, *flags)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()} == written


@pytest.mark.parametrize("header", [[], [["id", "label"]]])
def test_jester_lists_with_commas_are_an_error(tmp_path, capfd, header):
    write_csv(tmp_path / "labels.csv", ["Swiping Left"])
    for name in ("train", "validation"):
        write_csv(tmp_path / f"{name}.csv", *header, ["1", "Swiping Left"], delimiter=";")
    videos = touch(tmp_path / "v", "1.mp4", "2.mp4")
    flags = ("jester", "--annotations", tmp_path, "--videos", videos, "--out", tmp_path / "o")
    write_csv(tmp_path / "train.csv", *header, ["2", "Swiping Left"], delimiter=";")
    run_script(prepare, *flags)
    assert manifest(tmp_path / "o", videos) == [("2.mp4", 0)]
    write_csv(tmp_path / "train.csv", *header, ["2", "Swiping Left"])
    assert "train.csv line 1: expected id;label, not " in refusal(capfd, prepare, *flags)
    write_csv(tmp_path / "train.csv", ["2", "Swiping Left"], ["x", "Swiping Left"], delimiter=";")
    assert "train.csv line 2: expected id;label, not 'x;Swiping Left'" in refusal(capfd, prepare, *flags)


def test_k710_merges_the_classes_that_kinetics_renamed(tmp_path, capfd):
    """K400's names are torchvision's. The new names are in K700, so that the old ones add no classes."""
    k400 = torchvision.models.video.R3D_18_Weights.KINETICS400_V1.meta["categories"]
    assert len(prepare.RENAMED) == 14 == 724 - 710 and prepare.RENAMED.keys() <= set(k400)
    assert not set(prepare.RENAMED.values()) & set(k400)
    old, new = sorted(prepare.RENAMED), sorted(prepare.RENAMED.values())
    sets = [
        kinetics_files(tmp_path / name, [(label, label, 0, 10) for label in labels], [("vault", name, 0, 10)])
        for name, labels in (("400", old), ("600", ["Picking fruit"]), ("700", new))
    ]
    videos = touch(tmp_path / "v", "400.mp4", *(f"{label}.mp4" for label in [*old, *new]))
    run_script(prepare, "k710", "--annotations", *sets, "--videos", videos, "--out", tmp_path / "out")
    classes = (tmp_path / "out" / "classes.txt").read_text().splitlines()
    assert sorted(classes) == sorted([*new, "vault"])
    labels = {path.removesuffix(".mp4"): classes[label] for path, label in manifest(tmp_path / "out", videos)}
    assert labels == {**prepare.RENAMED, **{name: name for name in new}}
    assert "15 classes (paper: 710)" in capfd.readouterr().out


def test_help_says_which_files_are_needed_and_where_to_get_them(capfd):
    for name in (*prepare.DATASETS, "panda70m"):
        with pytest.raises(SystemExit) as stop:
            run_script(prepare, name, "--help")
        text = capfd.readouterr().out
        assert stop.value.code == 0
        assert "http" in text or name == "k710"  # k710 refers to k400
        assert all(f"{flag}: " in text for flag in ("--annotations", "--videos"))


def test_find_files_survives_circular_links_and_names_that_a_manifest_cannot_hold(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/1.mp4", "a/line\nbreak.mp4", "a/2.jpg")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    (tmp_path / os.fsdecode(b"latin\xe4.mp4")).touch()
    assert prepare.find_files([tmp_path]) == {"1": str(tmp_path / "a" / "1.mp4")}


def test_adding_a_dataset_takes_one_reader_and_one_row(tmp_path, capfd, monkeypatch):
    def pets(annotations, videos):
        """Pets: three videos."""
        with prepare.open_annotations(annotations[0], "pets.txt") as file:
            samples = [prepare.whole_video(*line.split()) for line in file]
        return ["cat", "dog"], samples, prepare.find_files(videos)

    monkeypatch.setitem(prepare.DATASETS, "pets", prepare.Dataset(pets, classes=2))
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "v/1.mp4", "v/2.mp4", "v/3.mp4")
    (tmp_path / "pets.txt").write_text("train 2 dog\ntrain 1 cat\nval 3 cat\n")
    run_script(prepare, "pets", "--annotations", tmp_path, "--videos", "v")
    assert manifest(tmp_path / "data" / "pets", tmp_path / "v") == [("2.mp4", 1), ("1.mp4", 0)]
    assert "2 classes (paper: 2)" in capfd.readouterr().out
