"""tools/check.py: broken and odd videos, processes that die, and continuing where it stopped."""

import faulthandler
import json
import multiprocessing
import os
import signal
import time

import pytest
from conftest import numbered, refusal, run_script, write_images, write_video

import data
import video
from tools import check


def manifest(path, root):
    """[(path relative to `root`, label)]."""
    paths, labels = data.read_manifest(path)
    return [(os.path.relpath(p, root), label) for p, label in zip(paths, labels, strict=True)]


@pytest.fixture
def videos(tmp_path):
    """Three good videos of 30 numbered frames, a text file, a missing file, and a manifest of them."""
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", map(numbered, range(30)))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "all.csv").write_text("a.mp4 1\ntext.mp4 0\nb.mp4 2\ngone.mp4 0\nc.mp4 -1\na.mp4 7\n")
    return tmp_path


def read_log(path):
    return {os.path.basename(r["path"]): r for r in map(json.loads, path.read_text().splitlines())}


def test_check_reports_videos_that_are_broken_hang_or_crash_the_decoder(videos, capfd, monkeypatch):
    def read_clips(path, *arguments, read=video.read_clips):
        if path.endswith("c.mp4"):
            time.sleep(600)
        if path.endswith("b.mp4"):
            faulthandler.disable()  # pytest's
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(path, *arguments)

    monkeypatch.setattr(video, "read_clips", read_clips)
    flags = (videos / "all.csv", "--workers", 2, "--timeout", 2)
    run_script(check, *flags)
    log = read_log(videos / "all.check.jsonl")
    assert {"width": 32, "height": 32}.items() <= log["a.mp4"].items()
    assert {n: log[n]["error"] for n in log if "error" in log[n]} == {
        "text.mp4": "Invalid data found when processing input",
        "gone.mp4": "No such file or directory",
        "b.mp4": "the process that read it died (SIGSEGV)",
        "c.mp4": "not done after 2 s",
    }
    assert manifest(videos / "all.clean.csv", videos) == [("a.mp4", 1), ("a.mp4", 7)]
    assert "1 videos are good, 4 bad" in capfd.readouterr().out

    monkeypatch.undo()
    write_video(videos / "text.mp4", map(numbered, range(9)))  # repaired; b.mp4 and c.mp4 are also tried again
    run_script(check, *flags)
    assert [label for _, label in manifest(videos / "all.clean.csv", videos)] == [1, 0, 2, -1, 7]
    assert "1 of 5 were done before" in capfd.readouterr().out
    run_script(check, *flags, "--frame-step", 2)  # other clips
    assert "were done before" not in capfd.readouterr().out


def test_check_stops_on_ctrl_c_and_continues_where_it_stopped(videos, capfd, monkeypatch):
    """SIGTERM also raises KeyboardInterrupt in the script; its workers leave both signals to it."""
    (videos / "all.csv").write_text("a.mp4 1\nb.mp4 1\nc.mp4 1\n")
    log, flags, main = videos / "all.check.jsonl", (videos / "all.csv", "--workers", 1), os.getpid()

    def read_clips(path, *arguments, read=video.read_clips):
        if path.endswith("c.mp4"):
            while log.read_text().count("\n") < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(main, signal.SIGTERM)
            time.sleep(600)
        return read(path, *arguments)

    monkeypatch.setattr(video, "read_clips", read_clips)
    with pytest.raises(SystemExit) as stop:
        run_script(check, *flags)
    assert stop.value.code == 130 and "2 of 3 are done" in capfd.readouterr().out
    assert not (videos / "all.clean.csv").exists() and not multiprocessing.active_children()
    before = log.read_text().splitlines()
    with open(log, "a") as file:
        file.write('{"path": "cut o')  # an incomplete line, as after a kill
    monkeypatch.undo()
    run_script(check, *flags)
    assert log.read_text().splitlines()[:2] == before and len(read_log(log)) == 3
    assert "2 of 3 were done before" in capfd.readouterr().out and len(manifest(videos / "all.clean.csv", videos)) == 3


def test_check_says_why_a_file_is_bad(tmp_path):
    """A damaged image in a folder, and what is not a file; a FIFO would block whoever opens it."""
    os.mkfifo(tmp_path / "fifo.mp4")
    write_images(tmp_path / "images", [f"{n}.jpg" for n in range(300)])  # too many to decode all
    (tmp_path / "images" / "90.jpg").write_bytes(b"")
    errors = {"fifo.mp4": "a special file, not a regular one", "images": f"{tmp_path}/images/90.jpg: "}
    for name, error in errors.items():
        assert check.check_video(f"{tmp_path}/{name}", 16, 4)["error"].startswith(error)


def test_mistakes_are_reported_in_one_line(videos, capfd):
    assert "no.csv" in refusal(capfd, check, videos / "no.csv")
    assert "--frame-step 0" in refusal(capfd, check, videos / "all.csv", "--frame-step", 0)
    (videos / "all.clean.csv").mkdir()
    assert "all.clean.csv: " in refusal(capfd, check, videos / "all.csv", "--workers", 1)
