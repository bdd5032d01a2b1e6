"""Manifests, the order of samples, augmentation, and the loader: a sample depends only on (seed, number)."""

import itertools
import math
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, frame_numbers, numbered, write_image, write_video

import data
import video
from data import Manifest, read_manifest
from video import BadVideo, read_clip


def test_normalize():
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(2, 3, 4, -1, -1)
    x = data.normalize(clips, "cpu")
    assert x.dtype == torch.float32 and torch.equal(data.denormalize(x), clips)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (torch.arange(256).view(16, 16) / 255 - mean) / std
        torch.testing.assert_close(x[1, channel, 3], expected)


# ---------------------------------------------------------------------------------------------------------------------
# manifests


def test_read_manifest(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text('a.mp4 3\n\n  sub dir/b c.mp4 0  \n"d e.mp4" 12\nno label.mp4\n/abs/f.mp4 -1\n"g h.mp4"\r\n')
    paths, labels = read_manifest(file)
    expected = ["a.mp4", "sub dir/b c.mp4", "d e.mp4", "no label.mp4", "/abs/f.mp4", "g h.mp4"]
    assert list(paths) == [str(tmp_path / name) for name in expected]
    assert labels.tolist() == [3, 0, 12, -1, -1, -1]


@pytest.mark.parametrize("line", ["b.mp4 3", "b.mp4 -1", "b.mp4", "b.mp4 x"])
def test_a_label_out_of_range_is_an_error_that_names_the_line(tmp_path, line):
    (tmp_path / "m.csv").write_text(f"a.mp4 2\n\n{line}\n")
    with pytest.raises(ValueError, match=r"m\.csv line 3: .* 0 to 2 .*b\.mp4"):
        read_manifest(tmp_path / "m.csv", num_classes=3)


@pytest.mark.parametrize("line", ["a.mp4 ²", "a.mp4 --2"])
def test_what_is_not_an_integer_belongs_to_the_path(tmp_path, line):
    (tmp_path / "m.csv").write_text(f"{line}\n")
    paths, labels = read_manifest(tmp_path / "m.csv")
    assert list(paths) == [str(tmp_path / line)] and labels.tolist() == [-1]


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("m.csv", None, OSError, "m.csv"),
        ("m.csv", b"", ValueError, "names no videos"),
        ("m.csv", b"\n  \n", ValueError, "names no videos"),
        ("m.csv", b"\x89PNG\r\n\x1a\n\xff\xfe", ValueError, "not a text file"),
        ("m.mp4", b"a.mp4 1\n", ValueError, "video or an image"),
        ("m.JPG", b"a.mp4 1\n", ValueError, "video or an image"),
    ],
)
def test_files_that_are_not_manifests(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_manifest(tmp_path / name)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is missing")
@pytest.mark.parametrize("name", ["train.csv", "val.csv"])
def test_surveillance_manifest(name):
    paths, labels = read_manifest(SHARED_DATA / "surveillance" / name, num_classes=2)
    assert set(labels) == {0, 1} and all(Path(p).is_file() for p in paths)
    assert read_clip(paths[0], 4, 4, 0.5).shape[:2] == (4, 3)


def image_manifest(folder, count, name="m.csv", first=0):
    """A manifest of gray images; image n has label n and brightness 8 n."""
    for n in range(first, first + count):
        write_image(torch.full((3, 20, 24), 8 * n, dtype=torch.uint8), str(folder / f"{n}.png"))
    (folder / name).write_text("".join(f"{n}.png {n}\n" for n in range(first, first + count)))
    return folder / name


# ---------------------------------------------------------------------------------------------------------------------
# which samples


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000])
def test_shuffled_is_a_different_permutation_for_every_key(length):
    orders = [
        [data.shuffled(position, length, seed, epoch) for position in range(length)]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length == 1000:
        assert len({tuple(order) for order in orders}) == 4
        for order in orders:
            assert abs(np.corrcoef(order, range(length))[0, 1]) < 0.13  # 4 standard errors
            assert 0.3 < (np.diff(order) > 0).mean() < 0.7 and (np.abs(np.diff(order)) == 1).mean() < 0.02


def test_every_pass_shows_each_video_once(tmp_path):
    one, two = image_manifest(tmp_path, 7, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=7)
    source = Manifest([one, two], 2, 1, 16)
    passes = [source.batch(range(11 * i, 11 * i + 11)).labels.flatten().tolist() for i in range(4)]
    assert all(sorted(labels) == list(range(11)) for labels in passes)
    assert len({tuple(labels) for labels in passes}) == 4
    other = Manifest([one, two], 2, 1, 16, seed=1).batch(range(11)).labels.flatten().tolist()
    assert other != passes[0] and sorted(other) == list(range(11))
    batch = source.batch([100])
    assert (batch.clips == 8 * batch.labels.item()).all()  # the label belongs to the clip


def test_weights_are_the_manifests_shares_of_the_samples(tmp_path):
    one, two = image_manifest(tmp_path, 2, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=2)
    source = Manifest([one, two], 1, 1, 16, weights=[3, 1])
    lines = np.bincount([source.line(n) for n in range(4000)], minlength=6) / 4000
    assert np.abs(lines - np.array([0.375] * 2 + [0.0625] * 4)).max() < 0.04  # 5 standard errors
    with pytest.raises(ValueError, match="2 manifests but 1 weights"):
        Manifest([one, two], 1, 1, 16, weights=[1])


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2]])
def test_invalid_weights(tmp_path, weights):
    one, two = image_manifest(tmp_path, 2, "one.csv"), image_manifest(tmp_path, 2, "two.csv", first=2)
    with pytest.raises(ValueError, match="weights"):
        Manifest([one, two], 1, 1, 16, weights=weights)


def test_clips_of_one_video_differ(tmp_path, monkeypatch):
    for n in range(4):
        write_video(tmp_path / f"{n}.mp4", map(numbered, range(40)))
    (tmp_path / "m.csv").write_text("".join(f"{n}.mp4 {n}\n" for n in range(4)))
    opened, read = [], video.read_clips
    monkeypatch.setattr(video, "read_clips", lambda path, *rest: opened.append(path) or read(path, *rest))
    source = Manifest([tmp_path / "m.csv"], 2, 3, 16, clips_per_video=3)
    batch = source.batch(range(12))
    assert len(opened) == 4 and sorted(batch.labels[::3].flatten().tolist()) == [0, 1, 2, 3]
    assert (batch.labels.view(4, 3) == batch.labels[::3]).all()
    assert len({clip.numpy().tobytes() for clip in batch.clips}) > 9


def test_training_replaces_unreadable_videos_and_evaluation_raises(tmp_path):
    file = image_manifest(tmp_path, 6)
    (tmp_path / "3.png").write_bytes(b"")
    batch = Manifest([file], 2, 1, 16).batch(range(6))
    labels = sorted(batch.labels.flatten().tolist())
    assert len(labels) == 6 and set(labels) == {0, 1, 2, 4, 5}  # 3 is replaced by one of the others
    assert len(batch.skipped) == 1 and batch.skipped[0].startswith(f"{tmp_path / '3.png'}: ")
    with pytest.raises(BadVideo, match=r"3\.png: "):
        Manifest([file], 2, 1, 16, train=False).batch([2, 3])
    for n in range(6):
        (tmp_path / f"{n}.png").unlink(missing_ok=True)
    with pytest.raises(BadVideo):
        Manifest([file], 2, 1, 16).batch([0])


def write_block_of_missing_files(folder):
    """A manifest whose first 50 videos are missing; 10 images follow."""
    images = image_manifest(folder, 10, "images.csv")
    (folder / "m.csv").write_text("".join(f"missing/{n}.png -1\n" for n in range(50)) + images.read_text())
    return folder / "m.csv"


@pytest.mark.parametrize("options", [{}, {"clips_per_video": 4}, {"weights": [1]}])
def test_a_block_of_missing_files_is_replaced_by_all_other_videos(tmp_path, options):
    source = Manifest([write_block_of_missing_files(tmp_path)], 2, 1, 16, **options)
    batch = source.batch(range(600))
    counts = np.bincount(batch.labels.flatten(), minlength=10)
    assert (counts > 20).all() and counts.max() < 130, counts  # 60 each; clips of one video come in fours
    assert len(set(batch.skipped)) == 50 and all("missing/" in reason for reason in batch.skipped)


def test_replacements_are_random_lines_that_depend_on_seed_and_number(tmp_path):
    one, two = image_manifest(tmp_path, 2, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=2)

    def drawn(count, **options):
        source = Manifest([one, two], 1, 1, 16, **options)
        return [source.replacement(number, attempt) for number in range(count) for attempt in range(5)]

    for weights, expected in ((None, [1 / 6] * 6), ([3, 1], [0.375] * 2 + [0.0625] * 4)):
        shares = np.bincount(drawn(800, weights=weights), minlength=6) / 4000
        assert np.abs(shares - np.array(expected)).max() < 0.04  # 5 standard errors
    assert drawn(20) == drawn(20) != drawn(20, seed=1)


def test_only_a_manifest_without_any_readable_video_ends_the_loader(tmp_path, monkeypatch):
    file = write_block_of_missing_files(tmp_path)
    for n in range(1, 10):
        (tmp_path / f"{n}.png").unlink()
    assert (Manifest([file], 2, 1, 16).batch(range(20)).labels == 0).all()  # the only image left
    (tmp_path / "0.png").unlink()
    opened, read = [], video.read_clips
    monkeypatch.setattr(video, "read_clips", lambda path, *rest: opened.append(path) or read(path, *rest))
    with pytest.raises(video.BadVideo, match="no such file"):
        next(data.clip_loader(Manifest([file], 2, 1, 16), [range(2)]))
    assert len(opened) == len(set(opened)) == 60  # each video was tried once


# ---------------------------------------------------------------------------------------------------------------------
# augmentation


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
    other = Manifest([tmp_path / "m.csv"], 3, 1, pixels, seed=1).batch(range(10)).clips
    assert all(not torch.equal(a, b) for a, b in zip(other, clips, strict=False))
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
    path = write_video(tmp_path / "v.mp4", map(numbered, range(40)))
    ramp = (torch.arange(100) * 2).byte().expand(3, 60, -1).contiguous()
    write_image(ramp, str(tmp_path / "x.png"))
    (tmp_path / "m.csv").write_text("x.png 0\nv.mp4 1\n")
    source = Manifest([tmp_path / "m.csv"], 4, 3, 30, train=False)
    batch = source.batch(range(2))
    assert len(source) == 2 and batch.labels.tolist() == [[0], [1]]  # in order
    # 100x60 becomes 50x30, of which columns 10 to 39 are the center: columns 20 to 79 of the image
    assert batch.clips[0, 0, 0, 15].tolist() == pytest.approx([2 * (20.5 + 2 * i) for i in range(30)], abs=2)
    assert frame_numbers(batch.clips[1].transpose(0, 1)) == [15, 18, 21, 24]
    assert frame_numbers(read_clip(path, 4, 3, 0.5)) == [15, 18, 21, 24]


# ---------------------------------------------------------------------------------------------------------------------
# the loader


def source_maker(kind, folder):
    """A function that makes a source with a given seed."""
    if kind == "synthetic":
        return lambda seed: data.Synthetic(4, 16, seed)
    for n in range(5):
        write_video(folder / f"{n}.mp4", np.random.default_rng(n).integers(0, 256, (20, 40, 48, 3), np.uint8))
    (folder / "m.csv").write_text("".join(f"{n}.mp4 {n}\n" for n in range(5)) + "missing.mp4 5\n")
    options = {"videos": {}, "weights": {"weights": [1, 2]}, "several clips per video": {"clips_per_video": 3}}[kind]
    return lambda seed: Manifest([folder / "m.csv"] * 2, 4, 2, 16, seed, **options)


@pytest.mark.parametrize("kind", ["videos", "weights", "several clips per video", "synthetic"])
def test_samples_depend_only_on_seed_and_number(tmp_path, kind):
    make = source_maker(kind, tmp_path)
    numbers = list(range(30))
    state = torch.get_rng_state()
    whole = make(3).batch(numbers)
    assert torch.equal(torch.get_rng_state(), state)
    for source, batch in ((make(3), [17, 2, 29]), (make(3), [29]), (make(3), numbers[::-1])):
        part = source.batch(batch)
        assert torch.equal(part.clips, whole.clips[batch]) and torch.equal(part.labels, whole.labels[batch])
    batches = [numbers[:7], numbers[7:8], numbers[8:]]
    for workers in (0, 2):
        parts = list(data.clip_loader(make(3), batches, workers))
        assert torch.equal(torch.cat([p.clips for p in parts]), whole.clips)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert [s for p in parts for s in p.skipped] == whole.skipped
    assert not torch.equal(make(4).batch(numbers).clips, whole.clips)
    assert whole.clips.dtype == torch.uint8 and whole.clips.shape == (30, 3, 4, 16, 16)


def started_loader(**options):
    """A loader that has yielded one batch of an endless sequence, and its worker processes."""
    others = torch.multiprocessing.active_children()
    batches = (range(4 * n, 4 * n + 4) for n in itertools.count())
    loader = data.clip_loader(data.Synthetic(2, 16), batches, **options)
    next(loader)
    workers = [worker for worker in torch.multiprocessing.active_children() if worker not in others]
    return loader, sorted(workers, key=lambda worker: worker.pid)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's temporary files
def test_a_killed_worker_always_ends_in_loader_failed():
    """Kill a worker at a random moment while batches are being read, 20 times: nothing hangs or raises another error.

    Depending on the moment, torch learns of the death by a signal, a broken connection or a poll.
    """
    rng = random.Random(0)
    for _ in range(20):
        loader, workers = started_loader(workers=2, timeout=20)
        for _ in range(rng.randrange(20)):
            next(loader)
        victim = rng.choice(workers)
        kill = threading.Timer(rng.uniform(0, 0.03), os.kill, (victim.pid, signal.SIGKILL))
        kill.start()
        with pytest.raises(data.LoaderFailed, match="^the loader failed: (?!.*timed out)"):
            while True:
                next(loader)
        kill.join()
    data.end_workers()


def test_a_dead_worker_is_reported_by_the_next_batch():
    """Not as soon as it dies, where torch's RuntimeError could interrupt anything."""
    loader, workers = started_loader(workers=2)
    workers[0].kill()
    workers[0].join()
    with pytest.raises(data.LoaderFailed, match="killed by signal|exited unexpectedly"):
        next(loader)


def test_a_hanging_worker_ends_in_loader_failed():
    class Hanging(data.Synthetic):
        def batch(self, numbers):
            threading.Event().wait()

    with pytest.raises(data.LoaderFailed, match="timed out after 1 seconds") as error:
        next(data.clip_loader(Hanging(2, 16), [range(2)], workers=1, timeout=1))
    data.end_workers()  # torch would wait for the worker when `error` is freed
    del error


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_living_worker_are_raised_as_they_are(workers):
    class Failing(data.Synthetic):
        def batch(self, numbers):
            raise RuntimeError("the disk timed out")

    with pytest.raises(RuntimeError, match="the disk timed out") as error:
        next(data.clip_loader(Failing(2, 16), [range(2)], workers))
    assert not isinstance(error.value, data.LoaderFailed)
