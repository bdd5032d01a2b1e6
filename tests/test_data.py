"""Manifests, the order of samples, augmentation, and the loader: a sample depends only on (seed, number)."""

import math
import mmap
import os
import select
import signal
import time

import numpy as np
import pytest
import torch
from conftest import frame_numbers, numbered, write_image, write_video

import data
import video
from data import Manifest, read_manifest
from video import BadVideo


def test_normalize():
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(2, 3, 4, -1, -1)
    x = data.normalize(clips, "cpu")
    assert x.dtype == torch.float32 and torch.equal(data.denormalize(x), clips)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (torch.arange(256).view(16, 16) / 255 - mean) / std
        torch.testing.assert_close(x[1, channel, 3], expected)


def test_read_manifest(tmp_path):
    (tmp_path / "m.csv").write_text(
        '\ufeffa.mp4 3\n\n  sub dir/b c.mp4 0  \n"d é.mp4" 12\nno label\n/f.mp4 -1\n"g h.mp4"\r\ni x\nj ²\nv5.mp4,1'
    )
    (tmp_path / "v5.mp4,1").touch()  # looks like another format if it does not exist
    paths, labels = read_manifest(tmp_path / "m.csv")
    expected = ["a.mp4", "sub dir/b c.mp4", "d é.mp4", "no label", "/f.mp4", "g h.mp4", "i x", "j ²", "v5.mp4,1"]
    assert paths == [str(tmp_path / name) for name in expected] and labels == [3, 0, 12, -1, -1, -1, -1, -1, -1]


OTHER = "m.csv line 2: no such file; a line is 'path' or 'path label', with one space"


@pytest.mark.parametrize("content, num_classes, message", [
    (b"\n  \n", None, "m.csv names no videos"), (b"a.mp4 1\n\n\x89PNG\xff\xfe", None, "m.csv line 3: not UTF-8"),
    (b"a.mp4 2\n\nb.mp4 3", 3, "m.csv line 3: a label from 0 to 2 is needed: 'b.mp4 3'"),
    (b"b.mp4", 3, "m.csv line 1: a label from 0 to 2"), (b"v4.mp4\nv5.mp4,1", None, OTHER),
    (b"v4.mp4\nv5.mp4\t1", None, OTHER), (b"v4.mp4\nv5.mp4 300 1", None, OTHER),
    (b"v4.mp4\nv5.mp4 1.0", None, OTHER), (b'v4.mp4\n"v 5.MP4", 1', None, OTHER),
])  # fmt: skip
def test_errors_of_manifests_name_the_line(tmp_path, content, num_classes, message):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "m.csv", num_classes)


def image_manifest(folder, count, name="m.csv", first=0):
    """A manifest of gray images; image n has label n and brightness 8 n."""
    for n in range(first, first + count):
        write_image(torch.full((3, 20, 24), 8 * n, dtype=torch.uint8), str(folder / f"{n}.png"))
    (folder / name).write_text("".join(f"{n}.png {n}\n" for n in range(first, first + count)))
    return folder / name


def test_every_pass_shows_each_video_once(tmp_path):
    one, two = image_manifest(tmp_path, 7, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=7)
    source = Manifest([one, two], 2, 1, 16)
    passes = [source.batch(range(11 * i, 11 * i + 11)).labels.flatten().tolist() for i in range(4)]
    assert all(sorted(labels) == list(range(11)) for labels in passes)
    assert len({tuple(labels) for labels in passes}) == 4
    assert Manifest([one, two], 2, 1, 16, seed=1).batch(range(11)).labels.flatten().tolist() != passes[0]
    batch = source.batch([100])
    assert (batch.clips == 8 * batch.labels.item()).all()  # the label belongs to the clip


@pytest.mark.parametrize("purpose", ["samples", "replacements"])
@pytest.mark.parametrize("weights, expected", [(None, [1 / 6] * 6), ([3, 1], [0.375] * 2 + [0.0625] * 4)])
def test_weights_are_the_manifests_shares_of_the_samples(tmp_path, weights, expected, purpose):
    one, two = image_manifest(tmp_path, 2, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=2)

    def drawn(count, seed=0):
        source = Manifest([one, two], 1, 1, 16, seed, weights=weights)
        if purpose == "samples":
            return [source.line(number) for number in range(count)]
        return [source.random_line("replacement", number, 1) for number in range(count)]

    shares = np.bincount(drawn(4000), minlength=6) / 4000
    assert np.abs(shares - np.array(expected)).max() < 0.04  # 5 standard errors
    assert drawn(50) == drawn(50) != drawn(50, seed=1)


def test_training_replaces_a_block_of_missing_files_by_all_other_videos_and_evaluation_raises(tmp_path):
    images = image_manifest(tmp_path, 10).read_text()
    (tmp_path / "m.csv").write_text("".join(f"missing/{n}.png -1\n" for n in range(50)) + images)
    batch = Manifest([tmp_path / "m.csv"], 2, 1, 16).batch(range(600))
    counts = np.bincount(batch.labels.flatten(), minlength=10)
    assert (counts > 20).all() and counts.max() < 130, counts  # 60 each
    assert batch.num_replaced == 500
    assert {s[: s.index(": ")] for s in batch.skipped} == {f"{tmp_path}/missing/{n}.png" for n in range(50)}
    with pytest.raises(BadVideo, match=r"missing/3\.png: "):
        Manifest([tmp_path / "m.csv"], 2, 1, 16, train=False).batch([59, 3])


def test_training_crops_and_flips(tmp_path):
    """Red encodes a pixel's column in the image, green its row. Crops are table 5's; half of all clips are flipped."""
    size = 128
    ramp = (torch.arange(size) * 2).byte()
    noise = torch.randint(0, 256, (size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_image(torch.stack((ramp.expand(size, -1), ramp[:, None].expand(-1, size), noise)), str(tmp_path / "x.png"))
    (tmp_path / "m.csv").write_text("x.png\n")
    count, pixels = 400, 16
    clips = Manifest([tmp_path / "m.csv"], 3, 1, pixels).batch(range(count)).clips
    assert (clips == clips[:, :, :1]).all()  # the same crop and flip for all frames
    assert not torch.equal(Manifest([tmp_path / "m.csv"], 3, 1, pixels, seed=1).batch([0]).clips, clips[:1])
    x, y = clips[:, 0, 0].float().mean(1), clips[:, 1, 0].float().mean(2)  # (count, pixels)
    flipped = (x[:, 0] > x[:, -1]).float().mean().item()
    assert abs(flipped - 0.5) < 5 * 0.5 / math.sqrt(count) and (y[:, 0] < y[:, -1]).all()
    # The centers of the first and the last of 16 pixels are 15/16 of the crop apart.
    width, height = (((a[:, 0] - a[:, -1]).abs() / (2 * size) * pixels / (pixels - 1)) for a in (x, y))
    area, aspect = width * height, width / height
    assert 0.27 < area.min() < 0.35 and 0.9 < area.max() < 1.05 and 0.55 < area.mean() < 0.68
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.42
    assert (x.min(1).values / 256).std() > 0.05 and (y.min(1).values / 256).std() > 0.05  # positions vary


def test_evaluation_reads_the_middle_clip_and_center_crop(tmp_path):
    write_video(tmp_path / "v.mp4", map(numbered, range(40)))
    ramp = (torch.arange(100) * 2).byte().expand(3, 60, -1).contiguous()
    write_image(ramp, str(tmp_path / "x.png"))
    (tmp_path / "m.csv").write_text("x.png 0\nv.mp4 1\n")
    source = Manifest([tmp_path / "m.csv"], 4, 3, 30, train=False)
    batch = source.batch(range(2))
    assert len(source) == 2 and batch.labels.tolist() == [[0], [1]]  # in order
    # 100x60 becomes 50x30, of which columns 10 to 39 are the center: columns 20 to 79 of the image
    assert batch.clips[0, 0, 0, 15].tolist() == pytest.approx([2 * (20.5 + 2 * i) for i in range(30)], abs=2)
    assert frame_numbers(batch.clips[1].transpose(0, 1)) == [15, 18, 21, 24]


@pytest.mark.parametrize("kind", ["videos", "weights", "synthetic"])
def test_samples_depend_only_on_seed_and_number(tmp_path, kind):
    for n in range(5):
        write_video(tmp_path / f"{n}.mp4", np.random.default_rng(n).integers(0, 256, (20, 40, 48, 3), np.uint8))
    (tmp_path / "m.csv").write_text("".join(f"{n}.mp4 {n}\n" for n in range(5)) + "missing.mp4 5\n")

    def make(seed):
        if kind == "synthetic":
            return data.Synthetic(4, 16, seed)
        return Manifest([tmp_path / "m.csv"] * 2, 4, 2, 16, seed, weights=[1, 2] if kind == "weights" else None)

    numbers = list(range(30))
    state = torch.get_rng_state()
    whole = make(3).batch(numbers)
    assert torch.equal(torch.get_rng_state(), state)
    backward = numbers[::-1]
    batches = [backward[:7], backward[7:8], backward[8:13], *([n] for n in backward[13:])]
    for workers in (0, 2):
        parts = list(data.clip_loader(make(3), batches, workers))
        assert torch.equal(torch.cat([p.clips for p in parts]), whole.clips[backward])
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels[backward])
        assert sorted(s for p in parts for s in p.skipped) == sorted(whole.skipped)
        assert all(p.waited > 0 for p in parts)
    assert not torch.equal(make(4).batch(numbers).clips, whole.clips)
    assert whole.clips.dtype == torch.uint8 and whole.clips.shape == (30, 3, 4, 16, 16)


@pytest.fixture
def workers(monkeypatch):
    """The worker processes that are started in a test."""
    started, start = [], data._start_worker
    monkeypatch.setattr(data, "_start_worker", lambda *args: started.append(start(*args)) or started[-1])
    return started


def test_workers_need_no_dev_shm_make_two_batches_ahead_and_end_with_the_loader(workers, monkeypatch):
    class Counting(data.Synthetic):
        made = mmap.mmap(-1, 100)  # shared

        def batch(self, numbers):
            self.made[numbers[0]] = 1
            return super().batch(numbers)

    pinned = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda clips: pinned.append(clips.shape) or clips)
    loader = data.clip_loader(Counting(2, 16), ([n] for n in range(100)), 2)
    batches = [next(loader), next(loader)]
    with open("/proc/self/maps") as maps:
        shared = [line for line in maps if "memfd:clips" in line or "/dev/shm" in line]
    lines = [line for line in shared if "/sem." not in line]  # tqdm's lock
    assert len(lines) == 2 and all("memfd:clips" in line for line in lines)
    end = time.monotonic() + 20
    while sum(Counting.made[:]) < 6 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sum(Counting.made[:]) == 6
    assert pinned == [batch.clips.shape for batch in batches]
    loader.close()
    assert not any(os.path.exists(f"/proc/{worker.pid}") for worker in workers) and len(workers) == 2


@pytest.mark.parametrize("fault, message", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), r"died \(status or signal 9\)"),
    (lambda: 1 / 0, r"died \(status or signal 1\)"), (lambda: time.sleep(60), "made no batch for 1 seconds"),
], ids=["killed", "error", "hanging"])  # fmt: skip
def test_a_worker_that_dies_or_hangs_is_reported_with_its_video(fault, message, tmp_path, monkeypatch):
    file, read = image_manifest(tmp_path, 6), video.read_clips
    monkeypatch.setattr(data, "TIMEOUT", 1)
    monkeypatch.setattr(video, "read_clips", lambda path, *args: fault() if "4.png" in path else read(path, *args))
    loader = data.clip_loader(Manifest([file], 2, 1, 16, train=False), [[n] for n in range(6)], 2)
    assert [next(loader).labels.item() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(data.LoaderFailed, match=rf"^the loader failed: .* {message} while it read .*4\.png$"):
        next(loader)


def test_a_worker_that_is_dead_before_it_is_asked_is_reported(workers):
    loader = data.clip_loader(data.Synthetic(2, 16), ([n] for n in range(20)), 2)
    next(loader)
    os.kill(workers[0].pid, signal.SIGKILL)
    os.waitid(os.P_PID, workers[0].pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(data.LoaderFailed, match=r"died \(status or signal 9\)$"):
        list(loader)


def test_signals_to_a_whole_run_leave_its_workers_alone(workers):
    loader = data.clip_loader(data.Synthetic(2, 16), ([n] for n in range(10)), 2)
    next(loader), next(loader)  # both have started
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert len(list(loader)) == 8


def test_workers_end_when_their_parent_is_killed():
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            loader = data.clip_loader(data.Synthetic(2, 16), ([n] for n in range(100)), 3)
            next(loader)
            os.write(write, b"started")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    os.wait()
    assert os.read(read, 100) == b"started"
    assert select.select([read], [], [], 10)[0] and os.read(read, 1) == b""  # no process holds the pipe any more
