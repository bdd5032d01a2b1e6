"""Clips hold exactly the frames they should, samples depend on (seed, number) alone, labels say what is in the clip."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import SHARED_DATA, frame_numbers, numbered, write_image, write_video
from torchvision.transforms import v2

import data
import synthetic
import video
from data import Manifest, read_manifest
from synthetic import synthetic_clips, uniforms
from video import BadVideo, read_clip, read_clips

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
def test_a_label_out_of_range_names_its_line(tmp_path, line):
    (tmp_path / "m.csv").write_text(f"a.mp4 2\n\n{line}\n")
    with pytest.raises(ValueError, match=r"m\.csv line 3: .* 0 to 2 .*b\.mp4"):
        read_manifest(tmp_path / "m.csv", num_classes=3)


@pytest.mark.parametrize(
    "name, content, error, says",
    [
        ("m.csv", None, OSError, "m.csv"),
        ("m.csv", b"", ValueError, "names no videos"),
        ("m.csv", b"\n  \n", ValueError, "names no videos"),
        ("m.csv", b"\x89PNG\r\n\x1a\n\xff\xfe", ValueError, "not a text file"),
        ("m.mp4", b"a.mp4 1\n", ValueError, "video or an image"),
        ("m.JPG", b"a.mp4 1\n", ValueError, "video or an image"),
        ("m.csv", "a.mp4 ²\n".encode(), None, None),
        ("m.csv", b"a.mp4 --2\n", None, None),
    ],
)
def test_what_is_no_manifest(tmp_path, name, content, error, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if error is None:  # odd, but a path
        assert read_manifest(tmp_path / name)[1].tolist() == [-1]
        return
    with pytest.raises(error, match=says):
        read_manifest(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# clips

# Containers with and without an index; no B-frames, B-frames; short and long groups of pictures; odd time stamps.
VIDEOS = {
    "every frame a key.mp4": dict(gop=1),
    "gop 12.mp4": dict(gop=12),
    "b-frames.mp4": dict(gop=12, bframes=3),
    "long gop.mp4": dict(gop=250, bframes=2),
    "ntsc.mp4": dict(gop=30, bframes=2, rate="30000/1001"),
    "late start.mp4": dict(gop=12, bframes=2, start=40),
    "matroska.mkv": dict(gop=12, bframes=3),
    "late start.mkv": dict(gop=12, bframes=2, start=40),
    "motion jpeg.avi": dict(codec="mjpeg"),
    "mpeg4.avi": dict(codec="mpeg4"),
    "b-frames.avi": dict(gop=12, bframes=2),  # its time stamps are those of decoding
}
LENGTH = 90


@pytest.fixture(scope="module", params=VIDEOS)
def sample(request, tmp_path_factory):
    options = dict(VIDEOS[request.param])
    options["rate"] = Fraction(options.get("rate", 25))
    path = tmp_path_factory.mktemp("video") / request.param
    write_video(path, map(numbered, range(LENGTH)), **options)
    with av.open(str(path)) as container:  # the truth: decode everything
        frames = video._to_rgb(list(container.decode(video=0)), None, None)
    assert frame_numbers(frames) == list(range(LENGTH))
    return path, frames


def test_read_clip_is_exact(sample):
    path, frames = sample
    for num_frames, step in ((1, 1), (4, 1), (4, 7), (16, 4), (16, 5), (90, 1)):
        room = LENGTH - (num_frames - 1) * step - 1
        for place in (0, 0.3, 0.5, 0.77, 1):
            clip = read_clip(path, num_frames, step, place)
            numbers = frame_numbers(clip)
            assert numbers == list(range(numbers[0], numbers[0] + num_frames * step, step))
            assert abs(numbers[0] - place * room) <= (0 if place in (0, 1) else 0.5 if place == 0.5 else 1)
            assert torch.equal(clip, frames[numbers])


def test_read_clips_is_read_clip_at_every_place(sample):
    path, places = sample[0], [0.5, 0, 1, 0.3, 0.3]
    for place, clip in zip(places, read_clips(path, 4, 3, places), strict=True):
        assert torch.equal(clip, read_clip(path, 4, 3, place))


def test_every_place_is_equally_likely(tmp_path):
    path = write_video(tmp_path / "v.mp4", map(numbered, range(8)))
    first = [frame_numbers(read_clip(path, 2, 3, (i + 0.5) / 100))[0] for i in range(100)]
    assert [first.count(n) for n in range(5)] == [20] * 5


@pytest.mark.parametrize("length, expected", [(1, [0, 0, 0, 0]), (5, [0, 3, 3, 3]), (9, [0, 3, 6, 6])])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_short_videos_repeat_the_last_frame(tmp_path, length, expected, suffix):
    path = write_video(tmp_path / f"v.{suffix}", map(numbered, range(length)))
    assert [frame_numbers(read_clip(path, 4, 3, place)) for place in (0, 0.5, 1)] == [expected] * 3


def test_variable_frame_rate(tmp_path):
    """50 frames in the time of 60, none between 20 and 30: the clip keeps time, at the average rate."""
    pts = [n for n in range(60) if not 20 <= n < 30]
    path = write_video(tmp_path / "v.mp4", map(numbered, pts), pts=pts)
    whole = frame_numbers(read_clip(path, 50, 1, 0))
    assert whole == sorted(whole)
    assert all(abs(shown - (19 if 20 <= n * 1.2 < 29.4 else n * 1.2)) <= 0.61 for n, shown in enumerate(whole))
    for place, first in ((0.5, 20), (0.77, 31), (1, 40)):  # the same after seeking
        assert frame_numbers(read_clip(path, 10, 1, place)) == whole[first : first + 10]


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images(tmp_path, suffix, mode):
    image = torch.arange(24 * 20).view(1, 24, 20).div(2).byte().expand(3, -1, -1)
    picture = PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).convert(mode if suffix == "png" else mode[:3])
    picture.save(tmp_path / f"x.{suffix}")
    clip = read_clip(tmp_path / f"x.{suffix}", 5, 4, 0.5)
    assert clip.shape == (5, 3, 24, 20) and clip.dtype == torch.uint8
    assert (clip.int() - image.int()).abs().max() < (1 if suffix == "png" else 30)


def test_what_is_not_wanted_is_not_decoded(tmp_path, monkeypatch):
    """Bitwise the same frames as decoding all; B-frames that are not wanted, and ends of groups, are passed over."""
    path = write_video(tmp_path / "v.mp4", map(numbered, range(LENGTH)), gop=30, bframes=3)
    decoded, frames = [], video._frames
    monkeypatch.setattr(video, "_frames", lambda stream, *rest: frames(Spy(stream), *rest))

    class Spy:  # a stream whose decoder says what it is fed and gives
        def __init__(self, stream):
            self.codec_context, self.codec = self, stream.codec_context
            self.name, self.open, self.flush_buffers = self.codec.name, self.codec.open, self.codec.flush_buffers

        def decode(self, packet):
            self.codec.skip_frame = self.skip_frame
            found = self.codec.decode(packet)
            decoded.extend(frame.pts for frame in found)
            return found

    assert frame_numbers(read_clip(path, 3, 21, 0)) == [0, 21, 42]  # 21 is such a B-frame, but wanted
    numbers = {pts // 512 for pts in decoded}  # 512 units of time a frame
    assert {0, 21, 30, 42} <= numbers and not numbers & {19, *range(23, 30)} and len(decoded) < 0.55 * 43
    monkeypatch.undo()
    whole = read_clip(path, LENGTH, 1, 0)
    for first in range(LENGTH - 40):
        clip = read_clip(path, 3, 20, (first + 0.5) / (LENGTH - 40))
        assert torch.equal(clip, whole[[first, first + 20, first + 40]])


@pytest.mark.parametrize("rate", [24, 25, 30, 60])
def test_fps_is_time(tmp_path, rate):
    """At any frame rate a clip of --fps shows the same times, to half a frame."""
    path = write_video(tmp_path / "v.mp4", map(numbered, range(3 * rate)), rate=rate)
    shown = np.array(frame_numbers(read_clip(path, 8, None, 0, fps=5))) / rate
    assert np.abs(shown - np.arange(8) / 5).max() <= 0.5 / rate + 1e-9
    last = frame_numbers(read_clip(path, 8, None, 1, fps=5))
    assert abs(last[-1] - (3 * rate - 1)) <= 1 and last[-1] - last[0] == round(7 / 5 * rate)


def test_fps_keeps_time_where_the_frame_rate_varies(tmp_path):
    pts = [*range(30), *range(30, 90, 3)]  # 25 frames a second, then 8.3
    path = write_video(tmp_path / "v.mp4", map(numbered, pts), pts=pts)
    shown = frame_numbers(read_clip(path, 17, None, 0, fps=5))
    assert all(abs(number - 5 * k) <= (0.5 if number < 30 else 2) + 1 for k, number in enumerate(shown))
    assert shown[:6] == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_honored(tmp_path, degrees):
    """A display matrix, written into the header of an mp4, turns the picture clockwise by so many degrees."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (4, 6, 1), np.uint8), np.ones((16, 16, 3), np.uint8))
    path = write_video(tmp_path / "v.mp4", [picture] * 3)
    one, minus = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    cos = {0: one, 90: bytes(4), 180: minus, 270: bytes(4)}[degrees]
    sin, negative = {90: (one, minus), 270: (minus, one)}.get(degrees, (bytes(4), bytes(4)))
    end = bytes(12) + (1 << 30).to_bytes(4, "big")
    content, upright = path.read_bytes(), one + bytes(4) + bytes(4) + bytes(4) + one + end[:0]
    at = content.index(upright, content.index(b"tkhd"))
    matrix = cos + sin + bytes(4) + negative + cos
    path.write_bytes(content[:at] + matrix + content[at + len(matrix) :])
    clip = read_clip(path, 2, 1, 0)
    expected = np.rot90(picture, -degrees // 90)
    assert clip.shape[2:] == expected.shape[:2]
    assert (clip[0].permute(1, 2, 0).int() - torch.from_numpy(expected.copy()).int()).abs().float().mean() < 4


def test_crops_are_antialiased_and_exact(tmp_path):
    """As torchvision's antialiased resized crop in floating point, but for rounding, and the outermost pixels.

    There FFmpeg takes the filter's weight outside the box for the border pixel's, torchvision does not.
    """
    y, x = np.mgrid[:90, :162] / 10
    waves = (128 + 100 * np.sin(np.stack((x * y / 3, x + y, x * x / 8), -1))).astype(np.uint8)
    PIL.Image.fromarray(waves).save(tmp_path / "x.png")
    whole = torch.from_numpy(waves).permute(2, 0, 1).float()
    for box, size in (((10, 20, 64, 128), 24), ((3, 5, 31, 17), 50), ((0, 0, 90, 162), 33), ((1, 1, 80, 80), 64)):
        clip = read_clips(tmp_path / "x.png", 2, 1, [0.5], crops=[lambda height, width, box=box: box], size=size)[0]
        expected = v2.functional.resized_crop(whole, *box, [size, size], antialias=True)
        assert clip.shape == (2, 3, size, size) and (clip[0] - expected).abs().mean() < 0.6
        assert (clip[0] - expected)[:, 1:-1, 1:-1].abs().max() < 1.5
    path = write_video(tmp_path / "w.mp4", [waves[:, :154]] * 2)  # a width that 16 does not divide, to the last column
    assert (read_clip(path, 1, 1, 0)[0, :, :, -9:] - whole[:, :, 145:154]).abs().mean() < 12
    path = write_video(tmp_path / "v.mp4", [waves[:, :160]] * 2)  # subsampled color, odd box
    clip = read_clips(path, 1, 1, [0], crops=[lambda height, width: (11, 21, 63, 127)], size=30)[0][0]
    expected = v2.functional.resized_crop(whole, 10, 20, 62, 126, [30, 30], antialias=True)
    assert (clip - expected).abs().mean() < 6


def test_a_folder_of_numbered_images_is_a_video(tmp_path):
    for n in range(12):
        write_image(torch.from_numpy(numbered(n)).permute(2, 0, 1), str(tmp_path / f"{n + 1}.png"))
    (tmp_path / "notes.txt").write_text("no image")
    assert frame_numbers(read_clip(tmp_path, 4, 3, 0)) == [0, 3, 6, 9]  # 10 comes after 9
    assert frame_numbers(read_clip(tmp_path, 4, 3, 1)) == [2, 5, 8, 11]
    with pytest.raises(BadVideo, match="no time for --fps"):
        read_clip(tmp_path, 4, None, 0, fps=5)


def bad_videos(folder):
    good = write_video(folder / "good.mp4", map(numbered, range(30))).read_bytes()
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    contents = {
        "empty.mp4": b"", "text.mp4": b"not a video\n" * 50, "cut.mp4": good[: len(good) // 2],
        "empty.png": b"", "text.jpg": b"hello", "noise.mp4": np.random.default_rng(0).bytes(5000),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.mp4").mkdir()
    (folder / "folder").mkdir()
    (folder / "folder" / "x.png").write_bytes(b"no number")
    return ["missing.mp4", "missing.png", "audio.mp4", "folder.mp4", "folder", *contents]


def test_bad_videos_are_named(tmp_path):
    for name in bad_videos(tmp_path):
        with pytest.raises(BadVideo) as error:
            read_clip(tmp_path / name, 4, 1, 0.5)
        path, _, reason = str(error.value).partition(": ")
        assert path == str(tmp_path / name) and len(reason) > 5 and "\n" not in reason


def test_normalize():
    clips = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(2, 3, 4, -1, -1)
    x = data.normalize(clips, "cpu")
    assert x.dtype == torch.float32 and torch.equal(data.denormalize(x), clips)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (torch.arange(256).view(16, 16) / 255 - mean) / std
        torch.testing.assert_close(x[1, channel, 3], expected)


# ---------------------------------------------------------------------------------------------------------------------
# samples


def image_manifest(folder, count, name="m.csv", first=0):
    """A manifest of gray images; image n, of label n, has brightness 8 n."""
    for n in range(first, first + count):
        write_image(torch.full((3, 20, 24), 8 * n, dtype=torch.uint8), str(folder / f"{n}.png"))
    (folder / name).write_text("".join(f"{n}.png {n}\n" for n in range(first, first + count)))
    return folder / name


@pytest.mark.parametrize("kind", ["videos", "weights", "several", "synthetic"])
def test_sample_depends_on_seed_and_number_alone(tmp_path, kind):
    if kind == "synthetic":
        make = lambda seed: data.Synthetic(4, 16, seed)  # noqa: E731
    else:
        for n in range(5):
            frames = np.random.default_rng(n).integers(0, 256, (20, 40, 48, 3), np.uint8)
            write_video(tmp_path / f"{n}.mp4", frames)
        (tmp_path / "m.csv").write_text("".join(f"{n}.mp4 {n}\n" for n in range(5)) + "missing.mp4 5\n")
        weights = [1, 2] if kind == "weights" else None
        make = lambda seed: Manifest(  # noqa: E731
            [tmp_path / "m.csv"] * 2, 4, 2, 16, seed, weights=weights, clips_per_video=3 if kind == "several" else 1
        )
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


def test_every_video_once_per_pass(tmp_path):
    one, two = image_manifest(tmp_path, 7, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=7)
    source = Manifest([one, two], 2, 1, 16)
    passes = [source.batch(range(11 * i, 11 * i + 11)).labels.flatten().tolist() for i in range(4)]
    assert all(sorted(labels) == list(range(11)) for labels in passes)
    assert len({tuple(labels) for labels in passes}) == 4
    other = Manifest([one, two], 2, 1, 16, seed=1).batch(range(11)).labels.flatten().tolist()
    assert other != passes[0] and sorted(other) == list(range(11))
    batch = source.batch([100])
    assert (batch.clips == 8 * batch.labels.item()).all()  # the label belongs to the clip


def test_several_clips_of_a_video_are_different_ones(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000])
def test_shuffled_is_an_order_of_its_own_for_every_key(length):
    orders = [
        [data.shuffled(place, length, seed, turn) for place in range(length)] for seed in (0, 1) for turn in (0, 1)
    ]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length == 1000:
        assert len({tuple(order) for order in orders}) == 4
        for order in orders:
            assert abs(np.corrcoef(order, range(length))[0, 1]) < 0.13  # 4 standard errors
            assert 0.3 < (np.diff(order) > 0).mean() < 0.7 and (np.abs(np.diff(order)) == 1).mean() < 0.02


def test_weights_are_shares(tmp_path):
    one, two = image_manifest(tmp_path, 2, "one.csv"), image_manifest(tmp_path, 4, "two.csv", first=2)
    source = Manifest([one, two], 1, 1, 16, weights=[3, 1])
    lines = np.bincount([source.line(n) for n in range(4000)], minlength=6) / 4000
    assert np.abs(lines - np.array([0.375] * 2 + [0.0625] * 4)).max() < 0.04  # 5 standard errors
    with pytest.raises(ValueError, match="2 manifests but 1 weights"):
        Manifest([one, two], 1, 1, 16, weights=[1])


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2]])
def test_weights_that_are_no_shares(tmp_path, weights):
    one, two = image_manifest(tmp_path, 2, "one.csv"), image_manifest(tmp_path, 2, "two.csv", first=2)
    with pytest.raises(ValueError, match="weights"):
        Manifest([one, two], 1, 1, 16, weights=weights)


def test_unreadable_videos(tmp_path):
    file = image_manifest(tmp_path, 6)
    (tmp_path / "3.png").write_bytes(b"")
    batch = Manifest([file], 2, 1, 16).batch(range(6))
    assert sorted(batch.labels.flatten().tolist()) == [0, 1, 2, 4, 4, 5]  # the next one stands in
    assert len(batch.skipped) == 1 and batch.skipped[0].startswith(f"{tmp_path / '3.png'}: ")
    with pytest.raises(BadVideo, match=r"3\.png: "):
        Manifest([file], 2, 1, 16, train=False).batch([2, 3])
    for n in range(6):
        (tmp_path / f"{n}.png").unlink(missing_ok=True)
    with pytest.raises(BadVideo):
        Manifest([file], 2, 1, 16).batch([0])


def test_training_crops(tmp_path):
    """Red says where a pixel was across the image, green down. Table 5's crops, flipped half the time."""
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
    # The outermost of 16 pixels are 15/16 of the crop apart.
    width, height = (((a[:, 0] - a[:, -1]).abs() / (2 * size) * pixels / (pixels - 1)) for a in (x, y))
    area, aspect = width * height, width / height
    assert 0.27 < area.min() < 0.35 and 0.9 < area.max() < 1.05 and 0.55 < area.mean() < 0.68
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.42
    assert (x.min(1).values / 256).std() > 0.05 and (y.min(1).values / 256).std() > 0.05  # places vary


def test_evaluation_is_the_middle(tmp_path):
    path = write_video(tmp_path / "v.mp4", map(numbered, range(40)))
    ramp = (torch.arange(100) * 2).byte().expand(3, 60, -1).contiguous()
    write_image(ramp, str(tmp_path / "x.png"))
    (tmp_path / "m.csv").write_text("x.png 0\nv.mp4 1\n")
    source = Manifest([tmp_path / "m.csv"], 4, 3, 30, train=False)
    batch = source.batch(range(2))
    assert len(source) == 2 and batch.labels.tolist() == [[0], [1]]  # in order
    # 100x60 becomes 50x30, of which columns 10 to 39 are the center: 20 to 79 of the image
    assert batch.clips[0, 0, 0, 15].tolist() == pytest.approx([2 * (20.5 + 2 * i) for i in range(30)], abs=2)
    assert frame_numbers(batch.clips[1].transpose(0, 1)) == [15, 18, 21, 24]
    assert frame_numbers(read_clip(path, 4, 3, 0.5)) == [15, 18, 21, 24]


# ---------------------------------------------------------------------------------------------------------------------
# built-in synthetic videos


def test_uniforms():
    n = 4000
    u = uniforms(7, torch.arange(n), 64)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / n)
    counts = torch.stack([c.histc(16, 0, 1) for c in u.unbind(1)])
    assert ((counts - n / 16).square() / (n / 16)).sum(1).max() < 45  # chi-square of 15 degrees: 1e-4 of 64 columns
    neighbors = torch.cat((u[1:], u[:-1]), dim=1)  # columns, and columns of the next number, are uncorrelated
    correlation = torch.corrcoef(neighbors.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(n)
    assert torch.equal(uniforms(7, torch.tensor([3000, 5]), 64), u[[3000, 5]])
    for other in (uniforms(8, torch.arange(n), 64), uniforms(7 + 2**31, torch.arange(n), 64)):
        assert (other == u).float().mean() < 1e-3


def test_synthetic_labels_are_uniform_and_independent():
    count, motions, shapes = 4800, len(synthetic.MOTIONS), len(synthetic.SHAPES)
    assert (motions, shapes) == (8, 6)
    motion, shape = synthetic_clips(0, torch.arange(count), 1, 2)[1].unbind(1)
    table = torch.bincount(motion * shapes + shape, minlength=48).float()
    assert ((table - 100).square() / 100).sum() < 83  # chi-square of 47 degrees, 99.9%


@pytest.mark.parametrize("num_frames, resolution", [(1, 8), (3, 24), (16, 64)])
def test_synthetic_sizes(num_frames, resolution):
    clips, labels = synthetic_clips(1, torch.tensor([4, 2, 9]), num_frames, resolution)
    assert clips.shape == (3, 3, num_frames, resolution, resolution) and clips.dtype == torch.uint8
    assert torch.equal(labels, synthetic_clips(1, torch.tensor([4, 2, 9]), 2, 8)[1])  # not a matter of size
    assert clips.float().flatten(1).std(1).min() > 3  # not blank
    assert not torch.equal(clips, synthetic_clips(2, torch.tensor([4, 2, 9]), num_frames, resolution)[0])


def test_synthetic_resolutions_show_the_same():
    """A video at half the resolution is the video shrunk, up to what is drawn per pixel."""
    views = [synthetic_clips(0, torch.arange(12), 2, size)[0].float().flatten(1, 2) for size in (32, 64)]
    small, large = (torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) for x in views)
    similar = torch.corrcoef(torch.cat((small, large)))[:12, 12:]
    assert similar.diag().min() > 0.8 and (similar.argmax(1) == torch.arange(12)).all()


def test_motion_label_is_the_direction_of_the_shapes():
    """Of the 8 directions, shifting a frame's edges along the labelled one matches a later frame best, on average.

    The background travels in directions of its own, independent of the label, so they match on no other direction.
    """
    clips, labels = synthetic_clips(0, torch.arange(192), 16, 64)
    gray = clips.float().mean(1)[:, ::5]  # frames 0, 5, 10, 15: a third of the clip apart
    edges = gray - torch.nn.functional.avg_pool2d(gray, 5, 1, 2)
    edges = (edges - edges.mean((2, 3), keepdim=True)) / (edges.std((2, 3), keepdim=True) + 1e-3)
    match = torch.zeros(8, len(clips), 30)
    for k in range(8):
        dx, dy = math.cos(k * math.tau / 8), -math.sin(k * math.tau / 8)
        for i, pixels in enumerate(range(3, 18)):
            shifted = edges.roll((round(dy * pixels), round(dx * pixels)), dims=(2, 3))
            match[k, :, i] = (shifted[:, :-1] * edges[:, 1:])[:, :, 18:-18, 18:-18].mean((1, 2, 3))
    found = match.amax(2).argmax(0)
    assert (found == labels[:, 0]).float().mean() > 0.5  # chance is 0.125


def accuracy(network, x, y, train, epochs, lr=2e-3):
    """Validation accuracy of a network trained on the first `train` of (x, y)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(train / 64))
    for _ in range(epochs):
        for ids in torch.randperm(train).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[ids]), y[ids]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (network.eval()(x[train:]).argmax(1) == y[train:]).float().mean().item()


def chance_limit(classes, count):
    """Above this, accuracy is better than chance at 99.95%."""
    p = 1 / classes
    return p + 3.3 * math.sqrt(p * (1 - p) / count)


@pytest.mark.slow
def test_one_frame_does_not_tell_the_motion_nor_color_the_shape():
    torch.manual_seed(0)
    train, total = 3000, 4500
    parts = [synthetic_clips(0, torch.arange(i, i + 500), 5, 32) for i in range(0, total, 500)]
    clips, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    x = clips.float() / 128 - 1

    def conv(*widths):
        layers = [[torch.nn.Conv2d(a, b, 3, 2, 1), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
                  for a, b in zip(widths, widths[1:], strict=False)]  # fmt: skip
        return torch.nn.Sequential(*sum(layers, []), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                   torch.nn.Linear(widths[-1], 8))  # fmt: skip

    middle = accuracy(conv(3, 24, 48, 64), x[:, :, 2], labels[:, 0], train, 8)
    # The same network on the middle frame and the one after it, to show that it can tell motion.
    pair = accuracy(conv(6, 24, 48, 64), x[:, :, 2:4].flatten(1, 2), labels[:, 0], train, 8)
    color = torch.cat((x.mean((2, 3, 4)), x.mean((3, 4)).flatten(1), x.std((2, 3, 4))), dim=1)
    mlp = torch.nn.Sequential(torch.nn.BatchNorm1d(color.shape[1]), torch.nn.Linear(color.shape[1], 64),
                              torch.nn.ReLU(), torch.nn.Linear(64, 8))  # fmt: skip
    shape = accuracy(mlp, color, labels[:, 1], train, 20)
    assert pair > 0.5
    assert middle < chance_limit(8, total - train)
    assert shape < chance_limit(6, total - train)


# ---------------------------------------------------------------------------------------------------------------------
# files of others


needs_shared = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"there is no {SHARED_DATA}")


@needs_shared
def test_odd_videos_give_a_clip_or_say_why():
    files = [f for f in sorted((SHARED_DATA / "odd_videos").rglob("*")) if f.is_file() and f.suffix != ".csv"]
    assert len(files) > 50
    bad = []
    for file in files:
        try:
            clip = read_clips(file, 8, 2, [0.5], None, [data.center_crop], 48)[0]
            assert clip.shape == (8, 3, 48, 48) and clip.dtype == torch.uint8, file
        except BadVideo as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            bad.append(file.name)
    truncated = {"trunc_90pct.mp4", "trunc_half.mp4", "trunc_half_faststart.mp4"}
    assert set(bad) == {"empty.mp4", "text.mp4", "audio_only.mp4", "doc_medias__result.webm"} | truncated


@needs_shared
@pytest.mark.parametrize("name", ["train.csv", "val.csv"])
def test_surveillance_manifest(name):
    paths, labels = read_manifest(SHARED_DATA / "surveillance" / name, num_classes=2)
    assert set(labels) == {0, 1} and all(Path(p).is_file() for p in paths)
    assert read_clip(paths[0], 4, 4, 0.5).shape[:2] == (4, 3)
