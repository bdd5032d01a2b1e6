"""prepare.py: small annotation files in the datasets' own formats and oddities, broken and odd videos."""

import csv
import errno
import faulthandler
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from conftest import flat, frame_numbers, numbered, refusal, run_script, write_video

import data
import video
from tools import prepare


def touch(root, *names):
    """Empty files: finding does not open them."""
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
    """The printed counts of a split."""
    numbers = re.search(rf"^{split} +(.*)$", text, re.M)[1].split()
    return dict(
        zip([*prepare.COUNTS, "paper"], (n if n == "-" else int(n.replace(",", "")) for n in numbers), strict=True)
    )


HEADER = ["label", "youtube_id", "time_start", "time_end", "split"]


def kinetics_files(folder, train, val, val_name="val.csv"):
    write_csv(folder / "train.csv", HEADER, *([*row, "train"] for row in train))
    write_csv(folder / val_name, HEADER, *([*row, "val"] for row in val))
    return folder


def test_kinetics_files_are_found_under_any_of_their_names_and_counted(tmp_path, capfd):
    train = [
        ("washing hands", "-aaaaaaaaaa", 12, 22),
        ("air drumming", "_bbbbbbbbbb", 0, 10),  # its file has no span
        ("air drumming", "gone0000000", 5, 15),
        ("air drumming", "corrupted00", 7, 17),
        ("abseiling, tandem", "-aaaaaaaaaa", 12, 22),  # annotated twice
        ("air drumming", "_bbbbbbbbbb", 30, 40),  # the same file again
        ("air drumming", "validation0", 1, 11),  # also in the validation set
    ]  # fmt: skip
    annotations = kinetics_files(tmp_path / "k", train, [("only in val", "validation0", 1, 11)], "validate.csv")
    videos = touch(
        tmp_path / "v", "train/washing hands/-aaaaaaaaaa_000012_000022.mp4", "train/air_drumming/_bbbbbbbbbb.mkv.webm",
        "fixed/air drumming/corrupted00_000007_000017.mp4", "val/validation0_000001_000011.MP4",
        "replacement/replacement_for_corrupted_k400/corrupted00_000007_000017.mp4",
        "notes/gone0000000_000005_000015.txt", "train/gone0000000_000005_000015.mp4.part",
    )  # fmt: skip
    run_script(prepare, "k400", "--annotations", annotations, "--videos", videos, "--out", tmp_path / "out")
    text = capfd.readouterr().out
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == [
        "abseiling, tandem", "air drumming", "only in val", "washing hands",
    ]  # fmt: skip
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


def test_k710_is_the_union_without_duplicates_and_without_videos_of_any_validation_set(tmp_path, capfd):
    sets = [
        kinetics_files(tmp_path / "400", [("Old name", "a", 0, 10), ("massaging person's head", "b", 0, 10)],
                       [("x", "v4", 0, 10)]),
        kinetics_files(tmp_path / "600", [("new name", "a", 0, 10), ("x", "a", 50, 60)], [("x", "v6", 0, 10)]),
        kinetics_files(
            tmp_path / "700",
            [("new name", "a", 0, 10), ("massaging persons head", "c", 3, 13), ("x", "v4", 0, 10), ("x", "v6", 70, 80)],
            [("x", "v7", 0, 10), ("x", "v4", 0, 10)],
        ),
    ]  # fmt: skip
    clips = ["a_000000_000010", "a_000050_000060", "b_000000_000010", "c_000003_000013", "v4_000000_000010"]
    videos = touch(tmp_path / "v", *(f"{c}.mp4" for c in [*clips, "v6_000070_000080", "v7_000000_000010"]))
    run_script(prepare, "k710", "--annotations", *sets, "--videos", videos, "--out", tmp_path / "out")
    classes = (tmp_path / "out" / "classes.txt").read_text().splitlines()
    assert classes == ["Old name", "massaging persons head", "new name", "x"]
    got = {path: classes[label] for path, label in manifest(tmp_path / "out", videos)}
    assert got == {
        "a_000000_000010.mp4": "new name", "c_000003_000013.mp4": "massaging persons head",
        "a_000050_000060.mp4": "x", "b_000000_000010.mp4": "massaging persons head",
    }  # fmt: skip
    text = capfd.readouterr().out
    want = {"annotated": 8, "found": 4, "missing": 0, "duplicate": 2, "excluded": 2, "written": 4, "paper": 657257}
    assert counts(text) == want
    assert counts(text, "val")["duplicate"] == 1 and counts(text, "val")["missing"] == 1
    assert "three folders" in refusal(capfd, prepare, "k710", "--annotations", *sets[:2], "--videos", videos)


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_templates_lose_their_brackets_and_classes_keep_their_numbers(tmp_path, capfd, prefix):
    labels = {
        "Putting something on something": "1",
        "Approaching something with your camera": "0",
        "Moving part of something": "2",
    }
    write_json(tmp_path / "a" / f"{prefix}labels.json", labels)
    row = {"id": "78687", "label": "putting a cup on a table", "template": "Putting [something] on [something]",
           "placeholders": ["a cup", "a table"]}  # fmt: skip
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
    assert "'Eating something' is no class" in refusal(capfd, prepare, *flags)


def test_coin_diving48_and_jester_in_their_own_formats(tmp_path):
    def video(kind, number, subset):
        return {"duration": 9.5, "class": kind, "video_url": "https://www.youtube.com/embed/x", "start": 1.5, "end": 8,
                "annotation": [{"id": "212", "segment": [2.0, 3.0], "label": "lift"}], "subset": subset,
                "recipe_type": number}  # fmt: skip

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


@pytest.mark.parametrize("truth", [None, "LOC_val_solution.csv", "synset_labels.txt"])
def test_imagenet_with_validation_images_in_folders_or_flat(tmp_path, truth):
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


def test_panda70m_samples_every_second_of_duration_alike_and_the_same_twice(tmp_path, capfd, monkeypatch):
    spans = [["0:00:00.000", "0:00:03.900"], *(["0:59:58.500", f"1:00:0{i}.000"] for i in (3, 3, 3, 3)),
             ["0:00:01.000", "0:00:51.000"], ["0:00:00.000", "0:00:50.001"],
             ["0:00:10.000", "0:00:20.000"]]  # fmt: skip
    panda_csv(tmp_path / "p.csv", [("-first", spans[:1]), ("second", spans)])
    touch(tmp_path, "v/00000/0000000_00000.mp4", *(f"v/00000/0000001_{i:05}.mp4" for i in range(7)))
    (tmp_path / "v/00000/0000001_00001.json").write_text('{"url": "https://www.youtube.com/watch?v=second"}')
    flags = ("panda70m", "--annotations", tmp_path / "p.csv", "--videos", tmp_path / "v")

    def sample(seed, count=3):
        run_script(prepare, *flags, "--count", count, "--seed", seed, "--out", tmp_path / "o")
        return manifest(tmp_path / "o", tmp_path / "v" / "00000")

    first = sample(0)  # 4.5 s: four clips; 50 s: one; the rest is too short, too long, or not there
    assert len(first) == 3 and ("0000001_00005.mp4", -1) in first
    assert counts(capfd.readouterr().out) == {
        "annotated": 9, "found": 5, "missing": 1, "duplicate": 0, "excluded": 3, "written": 3, "paper": 2799959,
    }  # fmt: skip
    assert sample(0) == first and len({tuple(sample(seed)) for seed in range(8)}) > 1
    assert len(sample(0, count=100)) == 5
    panda_csv(tmp_path / "p.csv", [("-first", spans[:1]), ("other", spans)])
    assert "another file downloaded it" in refusal(capfd, prepare, *flags)


def test_v36m_joins_its_parts(tmp_path, capfd, monkeypatch):
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
    assert paths == [str(tmp_path / "data/k710/a.mp4"), str(tmp_path / "data/k710/b c.mp4"), "/abs/1.webm",
                     str(tmp_path / "data/panda70m/p.mp4")]  # fmt: skip
    text = capfd.readouterr().out
    assert re.search(r"k710 +2 videos, weight 0.5000, 0 duplicates; paper 657,257", text)
    assert re.search(r"panda70m +1 videos, weight 0.2500, 1 duplicates", text) and "3,626,129" in text


def test_mistakes_are_told_in_a_line(tmp_path, capfd):
    videos = touch(tmp_path / "v", "x.mp4")
    kinetics = kinetics_files(tmp_path / "k", [("run", "a", 0, 10)], [("run", "b", 0, 10)])
    for flags, what in [
        (["ssv2", "--annotations", kinetics, "--videos", videos], "no labels.json or something-something-v2-labels"),
        (["k400", "--annotations", kinetics, "--videos", tmp_path / "nowhere"], "nowhere: No such file"),
        (["k400", "--annotations", kinetics, "--videos", videos, "--out", tmp_path / "o"], "none of the 2 annotated"),
        (["panda70m", "--annotations", kinetics / "train.csv", "--videos", videos], "no columns videoID"),
        (["check", tmp_path / "no.csv"], "no.csv"),
        (["check", kinetics / "train.csv", "--workers", 0], "--workers must be positive"),
    ]:  # fmt: skip
        assert what in refusal(capfd, prepare, *flags)
    write_csv(kinetics / "train.csv", ["some", "table"], ["1", "2"])
    assert "not in k400's format" in refusal(capfd, prepare, "k400", "--annotations", kinetics, "--videos", videos)


def test_help_says_what_is_expected_and_where_it_comes_from(capfd):
    for name in ("k400", "k600", "k700", "k710", "ssv2", "panda70m", "coin", "diving48", "jester", "imagenet1k"):
        with pytest.raises(SystemExit) as stop:
            run_script(prepare, name, "--help")
        text = capfd.readouterr().out
        assert (
            stop.value.code == 0
            and ("http" in text or name == "k710")
            and "--annotations" in text
            and "--videos" in text
        )


def test_the_walk_survives_links_in_a_circle_and_names_that_a_manifest_cannot_hold(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/1.mp4", "a/line\nbreak.mp4", "a/2.jpg")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    (tmp_path / os.fsdecode(b"latin\xe4.mp4")).touch()
    assert prepare.find_files([tmp_path]) == {"1": str(tmp_path / "a" / "1.mp4")}


# ---------------------------------------------------------------------------------------------------------------------
# check and transcode


@pytest.fixture
def videos(tmp_path):
    """Three good videos of 30 numbered frames, and a file that is none."""
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", map(numbered, range(30)))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "all.csv").write_text("a.mp4 1\ntext.mp4 0\nb.mp4 2\ngone.mp4 0\nc.mp4 -1\na.mp4 7\n")
    return tmp_path


def read_log(path):
    return {os.path.basename(r["path"]): r for r in map(json.loads, path.read_text().splitlines())}


def test_check_names_what_is_broken_hangs_or_kills_its_process(videos, capfd, monkeypatch):
    os.mkfifo(videos / "hangs.mp4")
    with open(videos / "all.csv", "a") as file:
        file.write("hangs.mp4 1\n")

    def read_clip(path, *_, really=video.read_clip):
        if path.endswith("b.mp4"):
            faulthandler.disable()  # pytest's
            os.kill(os.getpid(), signal.SIGSEGV)
        return really(path, *_)

    monkeypatch.setattr(video, "read_clip", read_clip)
    flags = ("check", videos / "all.csv", "--workers", 2, "--timeout", 2)
    run_script(prepare, *flags)
    log = read_log(videos / "all.check.jsonl")
    good = {"codec": "h264", "width": 32, "height": 32, "frames": 30, "fps": 25.0, "seconds": 1.2}
    assert good.items() <= log["a.mp4"].items() and good.items() <= log["c.mp4"].items()
    assert {n: log[n]["error"] for n in log if "error" in log[n]} == {
        "text.mp4": "Invalid data found when processing input", "gone.mp4": "No such file or directory",
        "b.mp4": "the process that read it died (SIGSEGV)", "hangs.mp4": "not done after 2 s",
    }  # fmt: skip
    assert manifest(videos, videos, "all.clean") == [("a.mp4", 1), ("c.mp4", -1), ("a.mp4", 7)]
    assert "2 videos are good, 4 bad" in capfd.readouterr().out

    monkeypatch.undo()
    os.remove(videos / "hangs.mp4")
    write_video(videos / "text.mp4", map(numbered, range(9)))  # repaired: another size, so it is read again
    run_script(prepare, *flags)
    assert set(manifest(videos, videos, "all.clean")) == {("a.mp4", 1), ("c.mp4", -1), ("a.mp4", 7), ("text.mp4", 0)}
    run_script(prepare, *flags, "--retry")
    assert ("b.mp4", 2) in manifest(videos, videos, "all.clean")


@pytest.mark.slow  # starts a process that imports torch
def test_check_stops_at_sigterm_and_continues_where_it_stopped(videos, capfd):
    os.mkfifo(videos / "hangs.mp4")
    (videos / "all.csv").write_text("a.mp4 1\nb.mp4 1\nhangs.mp4 1\n")
    log = videos / "all.check.jsonl"
    command = [sys.executable, "-m", "tools.prepare", "check", videos / "all.csv", "--workers", "2"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") == 2) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:  # a signal to the whole group is the parent's to answer
        os.kill(int(child), signal.SIGTERM)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    text = run.communicate(timeout=30)[0]
    assert run.returncode == 130 and "2 of 3 are done" in text
    assert children and not any(os.path.exists(f"/proc/{child}") for child in children)
    assert not (videos / "all.clean.csv").exists()
    with open(log, "a") as file:
        file.write('{"path": "cut o')  # as a kill leaves it
    os.remove(videos / "hangs.mp4")
    write_video(videos / "hangs.mp4", map(numbered, range(5)))
    before = log.read_text().splitlines()[:2]
    run_script(prepare, "check", videos / "all.csv", "--workers", 1)
    assert log.read_text().splitlines()[:2] == before and len(read_log(log)) == 3
    assert "2 of 3 were done before" in capfd.readouterr().out and len(manifest(videos, videos, "all.clean")) == 3


def decode(path):
    """[(seconds since the first frame, picture, is a keyframe, kind)] of all frames, and the kinds of streams."""
    with av.open(str(path)) as container:
        frames, kinds = list(container.decode(video=0)), [s.type for s in container.streams]
    first = frames[0].time
    return [
        (f.time - first, f.to_ndarray(format="rgb24"), f.key_frame, "?IPB"[int(f.pict_type)]) for f in frames
    ], kinds


def copy_of(path, out, short_side=256, crf=4):
    """A transcoded video; asserts that it worked."""
    record = prepare.transcode_video(str(path), str(out), short_side, crf)
    assert "error" not in record and "stop" not in record, record
    return record


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_copy_has_the_same_frames_at_the_same_times_with_a_keyframe_every_12(tmp_path, suffix):
    times = [0, 1, 2, 5, 6, 7, 20, 21, *range(30, 60)]  # a variable frame rate, and a start other than 0
    source = write_video(
        tmp_path / f"v.{suffix}", (numbered(i, 64) for i in range(len(times))), gop=50, bframes=3, start=17, pts=times
    )
    record = copy_of(source, tmp_path / "out" / "v.mp4")
    frames, kinds = decode(tmp_path / "out" / "v.mp4")
    with av.open(str(tmp_path / "out" / "v.mp4")) as container:
        assert container.streams.video[0].start_time == 0
    assert record["frames"] == len(frames) == len(times) and kinds == ["video"]
    assert [t for t, *_ in frames] == pytest.approx([t / 25 for t in times], abs=1e-3)
    assert [i for i, f in enumerate(frames) if f[2]] == [0, 12, 24, 36] and {f[3] for f in frames} == {"I", "P"}
    for step, place in ((1, 0.0), (2, 0.4), (3, 1.0)) if suffix == "mp4" else ():  # Matroska has a rate of its own
        clips = [video.read_clip(str(path), 8, step, place) for path in (source, tmp_path / "out" / "v.mp4")]
        assert frame_numbers(clips[0]) == frame_numbers(clips[1])
    assert os.listdir(tmp_path / "out") == ["v.mp4"]


def test_a_copy_is_scaled_to_the_short_side_but_never_enlarged_and_has_even_sizes(tmp_path):
    for (height, width), want in [
        ((51, 35), (50, 34)), ((96, 60), (52, 32)), ((40, 90), (32, 72)), ((1, 1), (2, 2)), ((52, 34), (52, 34)),
    ]:  # fmt: skip
        with av.open(str(tmp_path / "v.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25, options={"qp": "2", "g": "5"})
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1  # BT.709, limited
            picture = np.full((height, width, 3), (200, 60, 20), np.uint8)
            for _ in range(8):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
        copy_of(tmp_path / "v.mp4", tmp_path / "copy.mp4", short_side=32 if height > 52 or width > 35 else 256)
        (before, *_), (after, *others) = decode(tmp_path / "v.mp4")[0], decode(tmp_path / "copy.mp4")[0]
        assert after[1].shape[:2] == want
        assert np.abs(after[1].mean((0, 1)) - before[1].mean((0, 1))).max() < 4  # the colors are the same
        assert not any(frame[2] for frame in others)  # the original's keyframes are not the copy's


@pytest.mark.parametrize("matrix, numpy_says", [
    ((0, 1, -1, 0), lambda p: np.rot90(p, -1)), ((0, -1, 1, 0), np.rot90), ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    ((-1, 0, 0, 1), np.fliplr), ((1, 0, 0, -1), np.flipud),
])  # fmt: skip
def test_a_copy_is_upright(tmp_path, matrix, numpy_says):
    picture = flat(30, 64)[:48]
    picture[:24, :32], picture[24:, :32] = (220, 40, 40), (40, 40, 220)
    source = write_video(tmp_path / "v.mp4", [picture] * 3)
    a, b, c, d = (x * 0x10000 for x in matrix)
    head, tkhd, rest = source.read_bytes().partition(b"tkhd")
    identity = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    assert identity in rest
    source.write_bytes(head + tkhd + rest.replace(identity, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000), 1))
    copy_of(source, tmp_path / "copy.mp4")
    frames, _ = decode(tmp_path / "copy.mp4")
    want = numpy_says(picture)
    assert frames[0][1].shape == want.shape
    corners = (slice(4, None, want.shape[0] - 9), slice(4, None, want.shape[1] - 9))
    assert np.abs(frames[0][1][corners].astype(int) - want[corners]).max() < 12


def test_transcode_writes_a_manifest_of_the_copy_and_resumes(videos, capfd, monkeypatch):
    (videos / "sub").mkdir()
    os.rename(videos / "b.mp4", videos / "sub" / "b.avi")
    (videos / "all.csv").write_text("a.mp4 1\ntext.mp4 0\nsub/b.avi 2\nc.mp4 -1\na.mp4 7\n")
    flags = ("transcode", videos / "all.csv", "--out", videos / "copy", "--workers", 2)
    run_script(prepare, *flags)
    want = [("a.mp4", 1), ("sub/b.avi.mp4", 2), ("c.mp4", -1), ("a.mp4", 7)]
    assert manifest(videos / "copy", videos / "copy", "all") == want
    assert "3 videos are good, 1 bad" in capfd.readouterr().out
    assert sorted(os.listdir(videos / "copy")) == ["a.mp4", "all.csv", "all.transcode.jsonl", "c.mp4", "sub"]

    os.symlink(videos, videos / "here")
    assert "would replace the originals" in refusal(capfd, prepare, *flags[:3], videos / "here")
    (videos / "all2.csv").write_text("sub/b.avi 1\nsub/b.avi.mp4 1\n")
    assert "would have one copy" in refusal(capfd, prepare, "transcode", videos / "all2.csv", *flags[2:])

    log, copy = videos / "copy" / "all.transcode.jsonl", videos / "copy" / "c.mp4"
    lines = [line for line in log.read_text().splitlines() if "c.mp4" not in line]
    log.write_text("\n".join(lines) + "\n")  # as if the command had been killed while it wrote c.mp4
    os.rename(copy, f"{copy}.tmp")
    at = os.stat(videos / "copy" / "a.mp4").st_mtime_ns
    run_script(prepare, *flags)
    assert copy.is_file() and not os.path.exists(f"{copy}.tmp") and at == os.stat(videos / "copy" / "a.mp4").st_mtime_ns
    os.remove(copy)
    run_script(prepare, *flags)
    assert copy.is_file()
    run_script(prepare, *flags, "--short-side", 16)
    assert decode(copy)[0][0][1].shape == (16, 16, 3)


def test_a_full_disk_stops_the_command_and_blames_no_video(videos, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "_transcode", full)
    flags = ("transcode", videos / "all.csv", "--out", videos / "copy", "--workers", 1)
    assert "No space left on device; the same command goes on" in refusal(capfd, prepare, *flags)
    assert (videos / "copy" / "all.transcode.jsonl").read_text() == ""


def test_a_folder_of_frames_becomes_a_video_of_12_frames_a_second(tmp_path):
    folder = tmp_path / "20bn [jester]" / "34870"
    folder.mkdir(parents=True)
    for i in range(37):
        PIL.Image.fromarray(numbered(i + 1, 64)).save(folder / f"{i + 1:05}.jpg", quality=98)
    copy_of(folder, tmp_path / "34870.mp4")
    frames, _ = decode(tmp_path / "34870.mp4")
    assert [t for t, *_ in frames] == pytest.approx([i / 12 for i in range(37)])
    assert frame_numbers(video.read_clip(str(tmp_path / "34870.mp4"), 16, 2, 0.5)) == list(range(4, 36, 2))
