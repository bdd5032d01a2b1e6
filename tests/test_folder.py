"""tools/folder.py: which videos it finds, which ones it leaves out, and how it splits them."""

import os
from pathlib import Path

import pytest
from conftest import SHARED_DATA, flat, refusal, run_script, write_video

import data
from tools import prepare
from tools.folder import Video, choose_sources, find_sources, find_videos


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A readable video's bytes."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, [flat(i) for i in range(4)]).read_bytes()


def make_videos(root, clip, *names):
    """Write the same video to each of these paths below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(clip)
    return root


def flags(videos, out, *more):
    return ("folder", videos, "--out", out, "--workers", 1, *more)


def written(out, videos):
    """{split: {path relative to `videos`: label}}, and the names of the classes."""
    splits = {}
    for split in ("train", "val"):
        paths, labels = data.read_manifest(out / f"{split}.csv")
        splits[split] = {os.path.relpath(p, videos): label for p, label in zip(paths, labels.tolist(), strict=True)}
    return splits, (out / "classes.txt").read_text().splitlines()


def test_class_folders_become_labels_and_unreadable_videos_are_reported_and_left_out(tmp_path, clip, capfd):
    names = [f"{kind}/{i}.mp4" for kind in ("walk", "run fast", "Jump/deep/er") for i in range(5)]
    videos = make_videos(tmp_path / "v", clip, *names)
    (videos / "walk" / "broken.MOV").write_bytes(clip[:100])
    (videos / "walk" / "notes.txt").touch()
    run_script(prepare, *flags(videos, tmp_path / "o"))
    text = capfd.readouterr().out
    splits, classes = written(tmp_path / "o", videos)
    assert classes == ["Jump", "run fast", "walk"]
    found = splits["train"] | splits["val"]
    assert found == {name: classes.index(name.split("/")[0]) for name in names}
    assert sorted(splits["val"].values()) == [0, 1, 2] and sorted(splits["train"].values()) == sorted([0, 1, 2] * 4)
    assert "16 videos in" in text and "ignored by suffix: .txt 1" in text
    assert "walk/broken.MOV: Invalid data" in text and "15 videos are good, 1 bad" in text
    assert "3 classes, each with 4 to 4 train and 1 to 1 val videos\n" in text


def test_a_folder_without_class_folders_gives_unlabeled_manifests(tmp_path, clip, capfd):
    videos = make_videos(tmp_path / "v", clip, *(f"{i}.mp4" for i in range(4)))
    run_script(prepare, *flags(videos, tmp_path / "o", "--val-fraction", 0.5))
    splits, classes = written(tmp_path / "o", videos)
    assert classes == [] and {*splits["train"].values(), *splits["val"].values()} == {-1}
    assert len(splits["train"]) == len(splits["val"]) == 2
    make_videos(videos, clip, "a/5.mp4")
    error = refusal(capfd, prepare, *flags(videos, tmp_path / "o2"))
    assert "4 videos, such as 0.mp4, are in no class folder, but others are" in error
    run_script(prepare, *flags(videos, tmp_path / "o2", "--unlabeled"))
    splits, classes = written(tmp_path / "o2", videos)
    assert classes == [] and (splits["train"] | splits["val"])["a/5.mp4"] == -1


def test_the_split_is_the_same_in_another_place_and_keeps_sources_together(tmp_path, clip):
    names = [f"{kind}/{kind}_g{g:02}_c{c}.mp4" for kind in "ab" for g in range(10) for c in range(2)]
    splits = []
    for place in ("here", "there"):
        videos = make_videos(tmp_path / place, clip, *names)
        run_script(prepare, *flags(videos, tmp_path / place / "o", "--group", r"g(\d+)", "--val-fraction", 0.3))
        splits.append(written(tmp_path / place / "o", videos)[0])
    assert splits[0] == splits[1]
    groups = {split: {name.split("_")[1] for name in paths} for split, paths in splits[0].items()}
    assert len(groups["val"]) == 3 and len(groups["train"]) == 7 and not groups["val"] & groups["train"]


@pytest.mark.parametrize(
    "group, sources",
    [
        ("g(..)", ["01", "02"]),
        ("g..", ["g01", "g02"]),
        ("g(01)|g..", ["01", "g02"]),
        (None, ["g/xg01.mp4", "g/xg02.mp4"]),
    ],
)
def test_a_source_is_the_first_group_or_the_whole_match_in_the_file_name(group, sources):
    assert find_sources(["g/xg01.mp4", "g/xg02.mp4"], group) == sources


def test_the_validation_set_has_the_right_fraction_of_each_class():
    """Also if classes and sources differ in size, and sources have several classes."""
    sources = [(f"s{i}", label, number) for i in range(100) for label, number in (("abc"[i % 3], i % 5), ("a", 2))]
    videos = [Video("", source, label) for source, label, number in sources for _ in range(number)]
    for fraction in (0.1, 0.5):
        chosen = choose_sources(videos, fraction)
        for label in "abc":
            members = [v.source in chosen for v in videos if v.label == label]
            assert abs(sum(members) - fraction * len(members)) <= 5


def test_each_class_of_two_files_is_in_both_splits():
    videos = [Video(f"{label}{i}", f"{label}{i}", label) for label in "abcdefgh" for i in range(2)]
    chosen = choose_sources(videos, 0.01)
    assert sorted(name[0] for name in chosen) == list("abcdefgh")


def test_the_choice_does_not_change_from_run_to_run():
    assert choose_sources([Video("", f"{i}.mp4", "") for i in range(10)], 0.2) == {"7.mp4", "8.mp4"}


def test_mistakes_are_reported_in_one_line_and_write_no_manifest(tmp_path, clip, capfd):
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
        ((videos, out, "--group", "nothing"), "does not match 7 of 7 file names, such as a/a_g0.mp4"),
        ((videos, out, "--group", "^(a|b)"), "class a: 3 videos for train and 0 for val, from 1 sources; add"),
        ((videos, out, "--group", "("), "--group ( is not a regular expression: missing )"),
        ((videos, out, "--val-fraction", 1), "--val-fraction 1.0: must be above 0 and below 1"),
        ((videos, out, "--val-fraction", 0), "--val-fraction 0.0: must be above 0 and below 1"),
    ]:
        assert what in refusal(capfd, prepare, *flags(*arguments))
    assert not out.exists()  # found before any video was decoded
    assert [path.name for path in (tmp_path / "checked").iterdir()] == ["check.jsonl"]


def test_circular_links_and_names_that_a_manifest_cannot_hold(tmp_path, clip, capfd):
    make_videos(tmp_path, clip, "a/1.mp4", "a/line\nbreak.mp4")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert find_videos(tmp_path)[0] == ["a/1.mp4"]
    assert r"'a/line\nbreak.mp4' is left out" in capfd.readouterr().out


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_real_clips_split_by_group(tmp_path):
    videos = tmp_path / "v"
    for path in (SHARED_DATA / "ucf3").glob("*/*_g0[1-5]_c01.mp4"):
        (videos / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.symlink(path, videos / path.parent.name / path.name)
    run_script(prepare, *flags(videos, tmp_path / "o", "--group", r"g(\d+)"))
    splits, classes = written(tmp_path / "o", videos)
    assert classes == ["BabyCrawling", "Punch", "PushUps"]
    assert sorted(splits["val"].values()) == [0, 1, 2] and len(splits["train"]) == 12
    assert len({Path(name).stem.split("_")[2] for name in splits["val"]}) == 1
