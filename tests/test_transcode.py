"""tools/transcode.py: broken and odd videos, processes that die, and copies compared with their originals."""

import errno
import faulthandler
import json
import os
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
from tools import transcode


def manifest(path, root):
    """[(path relative to `root`, label)] as data.py reads them."""
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
    write_video(videos / "hangs.mp4", map(numbered, range(30)))
    with open(videos / "all.csv", "a") as file:
        file.write("hangs.mp4 1\n")

    def read_clips(path, *arguments, read=video.read_clips):
        if path.endswith("hangs.mp4"):
            time.sleep(600)
        if path.endswith("b.mp4"):
            faulthandler.disable()  # pytest's
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(path, *arguments)

    monkeypatch.setattr(video, "read_clips", read_clips)
    flags = ("check", videos / "all.csv", "--workers", 2, "--timeout", 2)
    run_script(transcode, *flags)
    log = read_log(videos / "all.check.jsonl")
    good = {"codec": "h264", "width": 32, "height": 32, "frames": 30, "fps": 25.0, "seconds": 1.2}
    assert good.items() <= log["a.mp4"].items() and good.items() <= log["c.mp4"].items()
    assert {n: log[n]["error"] for n in log if "error" in log[n]} == {
        "text.mp4": "Invalid data found when processing input",
        "gone.mp4": "no such file",
        "b.mp4": "the process that read it died (SIGSEGV)",
        "hangs.mp4": "not done after 2 s",
    }
    assert manifest(videos / "all.clean.csv", videos) == [("a.mp4", 1), ("c.mp4", -1), ("a.mp4", 7)]
    assert "2 videos are good, 4 bad" in capfd.readouterr().out

    monkeypatch.undo()
    os.remove(videos / "hangs.mp4")
    write_video(videos / "text.mp4", map(numbered, range(9)))  # repaired; its size is new, so it is read again
    run_script(transcode, *flags)
    assert set(manifest(videos / "all.clean.csv", videos)) == {
        ("a.mp4", 1),
        ("c.mp4", -1),
        ("a.mp4", 7),
        ("text.mp4", 0),
    }
    run_script(transcode, *flags, "--retry")
    assert ("b.mp4", 2) in manifest(videos / "all.clean.csv", videos)


@pytest.mark.slow  # starts a process that imports torch
def test_check_stops_on_sigterm_and_continues_where_it_stopped(videos, capfd):
    (videos / "all.csv").write_text("a.mp4 1\nb.mp4 1\nhangs.mp4 1\n")
    (videos / "hangs.mp4").write_text("hangs")
    log = videos / "all.check.jsonl"
    script = """if True:
        import sys, time
        from tools import transcode
        check_video = transcode.check_video
        transcode.check_video = lambda path, *rest: time.sleep("hangs" in path and 600) or check_video(path, *rest)
        transcode.main()"""
    command = [sys.executable, "-c", script, "check", videos / "all.csv", "--workers", "2"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") == 2) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:  # workers leave signals to the parent
        os.kill(int(child), signal.SIGTERM)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    text = run.communicate(timeout=30)[0]
    assert run.returncode == 130 and "2 of 3 are done" in text
    assert children and not any(os.path.exists(f"/proc/{child}") for child in children)
    assert not (videos / "all.clean.csv").exists()
    with open(log, "a") as file:
        file.write('{"path": "cut o')  # an incomplete line, as after a kill
    write_video(videos / "hangs.mp4", map(numbered, range(5)))
    before = log.read_text().splitlines()[:2]
    run_script(transcode, "check", videos / "all.csv", "--workers", 1)
    assert log.read_text().splitlines()[:2] == before and len(read_log(log)) == 3
    assert "2 of 3 were done before" in capfd.readouterr().out and len(manifest(videos / "all.clean.csv", videos)) == 3


def test_check_and_copy_say_why_a_file_is_bad(videos):
    """An unknown codec, and what is not a file; a FIFO would block whoever opens it."""
    unknown = (videos / "a.mp4").read_bytes().replace(b"avc1", b"zzzz")
    (videos / "unknown.mp4").write_bytes(unknown)
    os.mkfifo(videos / "fifo.mp4")
    (videos / "loop.mp4").symlink_to("loop.mp4")
    (videos / "device.mp4").symlink_to("/dev/zero")
    (videos / "bad.csv").write_text("".join(f"{n}.mp4 0\n" for n in ("unknown", "fifo", "loop", "device", "gone", "a")))
    run_script(transcode, "check", videos / "bad.csv", "--workers", 2)
    run_script(transcode, "copy", videos / "bad.csv", "--out", videos / "out", "--workers", 2)
    for log in (videos / "bad.check.jsonl", videos / "out" / "bad.copy.jsonl"):
        assert {name: record["error"] for name, record in read_log(log).items() if "error" in record} == {
            "unknown.mp4": "unknown codec, or encrypted",
            "fifo.mp4": "a special file, not a regular one",
            "loop.mp4": "Too many levels of symbolic links",
            "device.mp4": "a special file, not a regular one",
            "gone.mp4": "no such file",
        }
    assert manifest(videos / "bad.clean.csv", videos) == [("a.mp4", 0)]


def decode(path):
    """[(seconds since the first frame, picture, is a keyframe, type)] of all frames, and the types of the streams."""
    with av.open(str(path)) as container:
        frames, streams = list(container.decode(video=0)), [s.type for s in container.streams]
    start = frames[0].time
    types = ["?IPB"[int(f.pict_type)] for f in frames]
    pictures = [f.to_ndarray(format="rgb24") for f in frames]
    keyframes = [f.key_frame for f in frames]
    return list(zip([f.time - start for f in frames], pictures, keyframes, types, strict=True)), streams


def copy_of(path, out, short_side=256, crf=4):
    """Copy a video, assert that it worked, and return the record."""
    record = transcode.copy_video(str(path), str(out), short_side, crf)
    assert "error" not in record and "stop" not in record, record
    return record


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_copy_keeps_frames_and_time_stamps_and_has_a_keyframe_every_12_frames(tmp_path, suffix):
    times = [0, 1, 2, 5, 6, 7, 20, 21, *range(30, 60)]  # a variable frame rate, and a start other than 0
    source = write_video(
        tmp_path / f"v.{suffix}", (numbered(i, 64) for i in range(len(times))), gop=50, bframes=3, start=17, pts=times
    )
    record = copy_of(source, tmp_path / "out" / "v.mp4")
    frames, streams = decode(tmp_path / "out" / "v.mp4")
    with av.open(str(tmp_path / "out" / "v.mp4")) as container:
        assert container.streams.video[0].start_time == 0
    assert record["frames"] == len(frames) == len(times) and streams == ["video"]
    assert [t for t, *_ in frames] == pytest.approx([t / 25 for t in times], abs=1e-3)
    assert [i for i, f in enumerate(frames) if f[2]] == [0, 12, 24, 36] and {f[3] for f in frames} == {"I", "P"}
    for step, place in ((1, 0.0), (2, 0.4), (3, 1.0)) if suffix == "mp4" else ():  # Matroska's frame rate is rounded
        clips = [video.read_clip(str(path), 8, step, place) for path in (source, tmp_path / "out" / "v.mp4")]
        assert frame_numbers(clips[0]) == frame_numbers(clips[1])
    assert os.listdir(tmp_path / "out") == ["v.mp4"]


def test_copy_is_scaled_to_the_short_side_never_enlarged_and_has_even_sides(tmp_path):
    for (height, width), want in [
        ((51, 35), (50, 34)),
        ((96, 60), (52, 32)),
        ((40, 90), (32, 72)),
        ((1, 1), (2, 2)),
        ((52, 34), (52, 34)),
    ]:
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


@pytest.mark.parametrize(
    "matrix, expected",
    [
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
    ],
)
def test_copy_is_upright(tmp_path, matrix, expected):
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
    want = expected(picture)
    assert frames[0][1].shape == want.shape
    corners = (slice(4, None, want.shape[0] - 9), slice(4, None, want.shape[1] - 9))
    assert np.abs(frames[0][1][corners].astype(int) - want[corners]).max() < 12


def test_copy_writes_a_manifest_and_resumes(videos, capfd, monkeypatch):
    (videos / "sub").mkdir()
    os.rename(videos / "b.mp4", videos / "sub" / "b.avi")
    (videos / "all.csv").write_text("a.mp4 1\ntext.mp4 0\nsub/b.avi 2\nc.mp4 -1\na.mp4 7\n")
    flags = ("copy", videos / "all.csv", "--out", videos / "copy", "--workers", 2)
    run_script(transcode, *flags)
    want = [("a.mp4", 1), ("sub/b.avi.mp4", 2), ("c.mp4", -1), ("a.mp4", 7)]
    assert manifest(videos / "copy" / "all.csv", videos / "copy") == want
    assert "3 videos are good, 1 bad" in capfd.readouterr().out
    assert sorted(os.listdir(videos / "copy")) == ["a.mp4", "all.copy.jsonl", "all.csv", "c.mp4", "sub"]

    os.symlink(videos, videos / "here")
    assert "would replace the originals" in refusal(capfd, transcode, *flags[:3], videos / "here")
    (videos / "all2.csv").write_text("sub/b.avi 1\nsub/b.avi.mp4 1\n")
    assert "would have the same name" in refusal(capfd, transcode, "copy", videos / "all2.csv", *flags[2:])

    log, copy = videos / "copy" / "all.copy.jsonl", videos / "copy" / "c.mp4"
    lines = [line for line in log.read_text().splitlines() if "c.mp4" not in line]
    log.write_text("\n".join(lines) + "\n")  # as if the command had been killed while it wrote c.mp4
    os.rename(copy, f"{copy}.tmp")
    at = os.stat(videos / "copy" / "a.mp4").st_mtime_ns
    run_script(transcode, *flags)
    assert copy.is_file() and not os.path.exists(f"{copy}.tmp") and at == os.stat(videos / "copy" / "a.mp4").st_mtime_ns
    os.remove(copy)
    run_script(transcode, *flags)
    assert copy.is_file()
    run_script(transcode, *flags, "--short-side", 16)
    assert decode(copy)[0][0][1].shape == (16, 16, 3)


def test_full_disk_stops_the_command_and_marks_no_video_as_bad(videos, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transcode, "write_copy", full)
    flags = ("copy", videos / "all.csv", "--out", videos / "copy", "--workers", 1)
    assert "No space left on device; the same command continues" in refusal(capfd, transcode, *flags)
    assert (videos / "copy" / "all.copy.jsonl").read_text() == ""


def test_folder_of_images_becomes_a_video_of_12_frames_per_second(tmp_path):
    folder = tmp_path / "20bn [jester]" / "34870"
    folder.mkdir(parents=True)
    for i in range(37):
        PIL.Image.fromarray(numbered(i + 1, 64)).save(folder / f"{i + 1:05}.jpg", quality=98)
    copy_of(folder, tmp_path / "34870.mp4")
    frames, _ = decode(tmp_path / "34870.mp4")
    assert [t for t, *_ in frames] == pytest.approx([i / 12 for i in range(37)])
    assert frame_numbers(video.read_clip(str(tmp_path / "34870.mp4"), 16, 2, 0.5)) == list(range(4, 36, 2))


def test_mistakes_are_reported_in_one_line(videos, capfd):
    assert "no.csv" in refusal(capfd, transcode, "check", videos / "no.csv")
    assert "--workers 0: must be at least 1" in refusal(capfd, transcode, "check", videos / "all.csv", "--workers", 0)
    for flag in ("--short-side", "--timeout"):
        flags = ("copy", videos / "all.csv", "--out", videos / "copy", flag, 0)
        assert f"{flag} 0" in refusal(capfd, transcode, *flags)
