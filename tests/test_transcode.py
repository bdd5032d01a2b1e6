"""tools/transcode.py: broken and odd videos, processes that die, and copies compared with their originals."""

import errno
import faulthandler
import json
import multiprocessing
import os
import signal
import time

import av
import numpy as np
import pytest
from conftest import frame_numbers, numbered, read_clip, refusal, run_script, set_matrix, write_images, write_video

import data
import video
from tools import transcode


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
    flags = ("check", videos / "all.csv", "--workers", 2, "--timeout", 2)
    run_script(transcode, *flags)
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
    run_script(transcode, *flags)
    assert [label for _, label in manifest(videos / "all.clean.csv", videos)] == [1, 0, 2, -1, 7]
    assert "1 of 5 were done before" in capfd.readouterr().out


def test_check_stops_on_ctrl_c_and_continues_where_it_stopped(videos, capfd, monkeypatch):
    """SIGTERM also raises KeyboardInterrupt in the script; its workers leave both signals to it."""
    (videos / "all.csv").write_text("a.mp4 1\nb.mp4 1\nc.mp4 1\n")
    log, flags, main = videos / "all.check.jsonl", ("check", videos / "all.csv", "--workers", 1), os.getpid()

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
        run_script(transcode, *flags)
    assert stop.value.code == 130 and "2 of 3 are done" in capfd.readouterr().out
    assert not (videos / "all.clean.csv").exists() and not multiprocessing.active_children()
    before = log.read_text().splitlines()
    with open(log, "a") as file:
        file.write('{"path": "cut o')  # an incomplete line, as after a kill
    monkeypatch.undo()
    run_script(transcode, *flags)
    assert log.read_text().splitlines()[:2] == before and len(read_log(log)) == 3
    assert "2 of 3 were done before" in capfd.readouterr().out and len(manifest(videos / "all.clean.csv", videos)) == 3


def test_check_and_copy_say_why_a_file_is_bad(videos):
    """A damaged image in a folder, and what is not a file; a FIFO would block whoever opens it."""
    os.mkfifo(videos / "fifo.mp4")
    write_images(videos / "images", [f"{n}.jpg" for n in range(300)])  # too many for `check` to decode all
    (videos / "images" / "90.jpg").write_bytes(b"")
    errors = {"fifo.mp4": "a special file, not a regular one", "images": f"{videos}/images/90.jpg: "}
    for name, error in errors.items():
        results = (transcode.check_video(f"{videos}/{name}", 16, 4),
                   transcode.copy_video(f"{videos}/{name}", str(videos), str(videos / "out"), 256, 20))  # fmt: skip
        assert all(result["error"].startswith(error) for result in results)
    assert os.listdir(videos / "out") == []


def decode(path):
    """All frames, and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return frames, [frame.time - frames[0].time for frame in frames]


def copy_of(path, short_side=256):
    """Copy a video. Returns the path of the copy and the record."""
    folder, out = str(path.parent), str(path.parent / "out")
    record = transcode.copy_video(str(path), folder, out, short_side, crf=4)
    assert "frames" in record, record
    return transcode.copy_path(str(path), folder, out), record


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_copy_keeps_frames_and_time_stamps_and_has_a_keyframe_every_12_frames(tmp_path, suffix):
    times = [0, 1, 2, 5, 6, 7, 20, 21, *range(30, 60)]  # a variable frame rate, and a start other than 0
    source = write_video(tmp_path / f"v.{suffix}", map(numbered, range(len(times))), 50, 3, start=17, pts=times)
    copied, record = copy_of(source)
    frames, copied_times = decode(copied)
    assert record["frames"] == len(frames) == len(times) and frames[0].pts == 0
    assert copied_times == pytest.approx([t / 25 for t in times], abs=1e-3)
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 12, 24, 36]
    assert {"?IPB"[int(frame.pict_type)] for frame in frames} == {"I", "P"}
    if suffix == "mp4":  # Matroska's frame rate is rounded
        with av.open(source) as one, av.open(copied) as other:
            assert one.streams.video[0].average_rate == other.streams.video[0].average_rate
    assert os.listdir(tmp_path / "out") == [os.path.basename(copied)]


@pytest.mark.parametrize("size, short_side, copied", [
    ((51, 35), 256, (50, 34)), ((96, 60), 32, (52, 32)), ((40, 90), 32, (32, 72)), ((1, 1), 256, (2, 2)),
])  # fmt: skip
def test_copy_is_scaled_to_the_short_side_never_enlarged_and_has_even_sides(tmp_path, size, short_side, copied):
    """Colors stay, here of BT.709."""
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"qp": "2", "g": "5"})
        (stream.height, stream.width), stream.pix_fmt = size, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1  # BT.709, limited
        picture = np.full((*size, 3), (200, 60, 20), np.uint8)
        for frame in (*[av.VideoFrame.from_ndarray(picture, format="rgb24")] * 8, None):
            file.mux(stream.encode(frame))
    copied_path, _ = copy_of(tmp_path / "v.mp4", short_side)
    before, after = (read_clip(path, 1, 1, 0)[0].float() for path in (tmp_path / "v.mp4", copied_path))
    assert after.shape[1:] == copied and (after.mean((1, 2)) - before.mean((1, 2))).abs().max() < 4
    assert [frame.key_frame for frame in decode(copied_path)[0]] == [True] + [False] * 7  # not the original's


def test_copy_is_upright(tmp_path):
    picture = np.full((48, 64, 3), 30, np.uint8)
    picture[:24, :32], picture[24:, :32] = (220, 40, 40), (40, 40, 220)
    source = set_matrix(write_video(tmp_path / "v.mp4", [picture] * 3), (0, 1, -1, 0))
    want, copied = (read_clip(path, 1, 1, 0)[0].int() for path in (source, copy_of(source)[0]))
    assert copied.shape == want.shape and (copied - want).abs().float().mean() < 3


def test_copy_writes_a_manifest_and_resumes(videos, capfd, monkeypatch):
    (videos / "sub").mkdir()
    os.rename(videos / "b.mp4", videos / "sub" / "b.avi")
    (videos / "all.csv").write_text("a.mp4 1\ntext.mp4 0\nsub/b.avi 2\nc.mp4 -1\na.mp4 7\n")
    flags = ("copy", videos / "all.csv", "--out", videos / "copy", "--workers", 2)
    run_script(transcode, *flags)
    want = [("a.mp4", 1), ("sub/b.avi.mp4", 2), ("c.mp4", -1), ("a.mp4", 7)]
    assert manifest(videos / "copy" / "all.csv", videos / "copy") == want
    assert "3 videos are good, 1 bad" in capfd.readouterr().out

    os.symlink(videos, videos / "here")
    assert "would replace the originals" in refusal(capfd, transcode, *flags[:3], videos / "here")
    (videos / "all2.csv").write_text("sub/b.avi 1\nsub/b.avi.mp4 1\n")
    assert "would have the same name" in refusal(capfd, transcode, "copy", videos / "all2.csv", *flags[2:])

    log, copy = videos / "copy" / "all.copy.jsonl", videos / "copy" / "c.mp4"
    lines = [line for line in log.read_text().splitlines() if "c.mp4" not in line]
    log.write_text("\n".join(lines) + "\n")  # as if the command had been killed while it wrote c.mp4
    os.rename(copy, f"{copy}.tmp")
    at = os.stat(videos / "copy" / "a.mp4").st_mtime_ns
    for _ in range(2):
        run_script(transcode, *flags)
        assert not os.path.exists(f"{copy}.tmp") and at == os.stat(videos / "copy" / "a.mp4").st_mtime_ns
        copy.unlink()
    run_script(transcode, *flags, "--short-side", 16)
    assert read_clip(videos / "copy" / "a.mp4", 1, 1, 0).shape == (1, 3, 16, 16)


def test_full_disk_stops_the_command_and_marks_no_video_as_bad(videos, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transcode, "write_copy", full)
    flags = ("copy", videos / "all.csv", "--out", videos / "copy", "--workers", 1)
    assert "No space left on device; the same command continues" in refusal(capfd, transcode, *flags)
    assert (videos / "copy" / "all.copy.jsonl").read_text() == ""


def test_folder_of_images_becomes_a_video_of_12_frames_per_second(tmp_path):
    write_images(tmp_path / "images", [f"{n}.JPG" for n in range(37)])
    copied, record = copy_of(tmp_path / "images")
    assert record["frames"] == 37 and decode(copied)[1] == pytest.approx([i / 12 for i in range(37)])
    assert frame_numbers(read_clip(copied, 37, 1, 0)) == list(range(37))


def test_a_changed_folder_is_noticed(tmp_path, capfd):
    """More images, and a repaired image of the same size."""
    (tmp_path / "all.csv").write_text("images 0\n")
    write_images(tmp_path / "images", [f"{n}.png" for n in range(5)])

    def is_done_again():
        capfd.readouterr()
        run_script(transcode, "check", tmp_path / "all.csv", "--workers", 1)
        return "were done before" not in capfd.readouterr().out

    assert is_done_again() and not is_done_again()
    write_images(tmp_path / "images", [f"{n}.png" for n in range(6)])
    assert is_done_again() and not is_done_again()
    os.utime(tmp_path / "images" / "3.png", (2**31, 2**31))
    assert is_done_again()


def test_mistakes_are_reported_in_one_line(videos, capfd):
    assert "no.csv" in refusal(capfd, transcode, "check", videos / "no.csv")
    flags = ("copy", videos / "all.csv", "--out", videos / "copy", "--short-side", 0)
    assert "--short-side 0" in refusal(capfd, transcode, *flags)
    (videos / "all.clean.csv").mkdir()
    assert "all.clean.csv: " in refusal(capfd, transcode, "check", videos / "all.csv", "--workers", 1)
