"""Clips hold exactly the frames they should, from any file that FFmpeg can decode; what they cannot read they name."""

import functools
import os
import types
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from av.stream import Disposition
from conftest import SHARED_DATA, frame_numbers, numbered, read_clip, set_matrix, write_images, write_video
from torchvision.transforms import v2

import video
from video import BadVideo, read_clips

# Containers with and without an index; with and without B-frames; short and long groups of pictures; odd time stamps.
VIDEOS = {
    "keyframes only.mp4": dict(gop=1),
    "b-frames.mp4": dict(gop=12, bframes=3),
    "long gop.mp4": dict(gop=250, bframes=2),
    "ntsc.mp4": dict(gop=30, bframes=2, rate="30000/1001"),
    "open gop.mp4": dict(gop=12, bframes=3, open_gop=True),  # frames after a keyframe that are shown before it
    "late start.mp4": dict(gop=12, bframes=2, start=40),
    "matroska.mkv": dict(gop=12, bframes=3),
    "late start.mkv": dict(gop=12, bframes=2, start=40),
    "motion jpeg.avi": dict(codec="mjpeg"),
    "mpeg4.avi": dict(codec="mpeg4"),
    "b-frames.avi": dict(gop=12, bframes=2),  # time stamps in decoding order
}
LENGTH = 90


@pytest.fixture(scope="module", params=VIDEOS)
def sample(request, tmp_path_factory):
    """A video's path, and all its frames."""
    options = dict(VIDEOS[request.param])
    options["rate"] = Fraction(options.get("rate", 25))
    path = tmp_path_factory.mktemp("video") / request.param
    write_video(path, map(numbered, range(LENGTH)), **options)
    with av.open(str(path)) as container:
        frames = video._to_rgb(list(container.decode(video=0)), None, None)
    assert frame_numbers(frames) == list(range(LENGTH))
    return path, frames


def gradients(height, width):
    """A smooth RGB image (H, W, 3) that differs everywhere."""
    y, x = np.mgrid[:height, :width] / 10
    return (128 + 100 * np.sin(np.stack((x * y / 3, x + y, x * x / 8), -1))).astype(np.uint8)


def test_clips_have_exactly_the_wanted_frames(sample, monkeypatch):
    path, frames = sample
    careful, read_all = [], video._read_all
    monkeypatch.setattr(video, "_read_all", lambda *args: careful.append(args) or read_all(*args))
    places = (0.5, 0, 1, 0.3, 0.3, 0.77)
    for num_frames, step in ((1, 1), (4, 1), (4, 7), (16, 4), (16, 5), (90, 1)):
        room = LENGTH - (num_frames - 1) * step - 1
        for place, clip in zip(places, read_clips(path, num_frames, step, places), strict=True):
            numbers = frame_numbers(clip)
            assert numbers == list(range(numbers[0], numbers[0] + num_frames * step, step))
            assert abs(numbers[0] - place * room) <= {0: 0, 0.5: 0.5, 1: 0}.get(place, 1)
            assert torch.equal(clip, frames[numbers]) and torch.equal(clip, read_clip(path, num_frames, step, place))
    assert len(careful) <= {"b-frames.avi": 42, "open gop.mp4": 4}.get(path.name, 0)


def test_all_first_frames_are_equally_likely():
    first = [video.wanted_frames((i + 0.5) / 100, 2, 3, length=8)[0] for i in range(100)]
    assert [first.count(n) for n in range(5)] == [20] * 5


@pytest.mark.parametrize("length, expected", [(1, [0, 0, 0, 0]), (5, [0, 3, 3, 3]), (9, [0, 3, 6, 6])])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_short_videos_repeat_the_last_frame(tmp_path, length, expected, suffix):
    path = write_video(tmp_path / f"v.{suffix}", map(numbered, range(length)))
    assert [frame_numbers(read_clip(path, 4, 3, place)) for place in (0, 0.5, 1)] == [expected] * 3


IRREGULAR = {
    "variable rate": [0, 1, 2, 3, 4, 5, 10, 15, 16, 17, 18, 19, 20, 22, 24, 26, *range(40, 48), *range(60, 65), 70],
    "gap of one hour": [*range(40), *range(90_000, 90_040)],
    "half of the frames at half the rate": [*range(30), *range(30, 90, 2)],
}


@pytest.mark.parametrize("name, options", [
    ("v.mp4", {}), ("b-frames.mp4", {"bframes": 2}), ("b-frames.mkv", {"bframes": 2}), ("v.avi", {"codec": "mpeg4"}),
])  # fmt: skip
@pytest.mark.parametrize("pts", IRREGULAR.values(), ids=IRREGULAR.keys())
def test_frame_step_counts_frames_whatever_their_time_stamps_are(tmp_path, monkeypatch, pts, name, options):
    """Without decoding the whole video."""
    if name.endswith("avi") and pts[-1] > 1000:
        pts = [*range(40), *range(80, 120)]  # avi fills a gap with empty frames
    monkeypatch.setattr(video, "_read_all", None)
    path, length = write_video(tmp_path / name, map(numbered, range(len(pts))), pts=pts, **options), len(pts)
    for step in (1, 3):
        room = length - 7 * step - 1
        for place, first in ((0, 0), (0.5, (room + 1) // 2), (1, room)):
            assert frame_numbers(read_clip(path, 8, step, place)) == list(range(first, first + 8 * step, step))


def test_files_with_a_constant_frame_rate_are_not_read_as_a_whole(tmp_path, monkeypatch):
    listed, read = [], video._Timeline.from_time_stamps
    monkeypatch.setattr(video._Timeline, "from_time_stamps", lambda *args: listed.append(args) or read(*args))
    for name, gap, is_read in (("v.mp4", 0, False), ("v.avi", 0, False), ("v.mp4", 1, True), ("v.mkv", 0, True)):
        pts = [n + gap * (n > 20) for n in range(30)]
        codec = "mpeg4" if name == "v.avi" else "libx264"
        path = write_video(tmp_path / name, map(numbered, range(30)), pts=pts, codec=codec)
        listed.clear()
        assert frame_numbers(read_clip(path, 5, 3, 1)) == [17, 20, 23, 26, 29]
        assert bool(listed) == is_read, (name, gap)  # a mkv file has no index of all frames


def test_fps_goes_by_time(tmp_path):
    """50 frames in the time of 60, none between 20 and 30: with fps, the last frame before the gap repeats."""
    pts = [n for n in range(60) if not 20 <= n < 30]
    path = write_video(tmp_path / "v.mp4", map(numbered, pts), pts=pts)
    shown = frame_numbers(read_clip(path, 20, None, 0, fps=25 / 2))
    assert shown == sorted(shown) and 4 <= shown.count(19) <= 6
    assert all(abs(n - 2 * i) <= 1 for i, n in enumerate(shown) if not 20 <= 2 * i < 30)


@pytest.mark.parametrize("rate", [24, 60])
def test_fps_shows_the_same_times_at_any_frame_rate(tmp_path, rate):
    path = write_video(tmp_path / "v.mp4", map(numbered, range(3 * rate)), rate=rate)
    shown = np.array(frame_numbers(read_clip(path, 8, None, 0, fps=5))) / rate
    assert np.abs(shown - np.arange(8) / 5).max() <= 0.5 / rate + 1e-9
    last = frame_numbers(read_clip(path, 8, None, 1, fps=5))
    assert abs(last[-1] - (3 * rate - 1)) <= 1 and last[-1] - last[0] == round(7 / 5 * rate)


@pytest.mark.parametrize("name", ["{}.png", "{}.00000.jpg", "frame{}.JPG", "img_{:05}_3.Jpeg"])
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path, name):
    """Droppings of operating systems, and what is no image or has no number, are no frames."""
    write_images(tmp_path, map(name.format, range(12)))
    for dropping in ("._00001.jpg", ".00002.png", "notes 1.txt", "cover.png"):
        (tmp_path / dropping).write_bytes(b"\0\5\26\7")
    assert [os.path.basename(path) for path in video.list_frames(tmp_path)] == list(map(name.format, range(12)))
    assert frame_numbers(read_clip(tmp_path, 4, 3, 0)) == [0, 3, 6, 9]
    assert frame_numbers(read_clip(tmp_path, 4, 3, 1)) == [2, 5, 8, 11]
    with pytest.raises(BadVideo, match="no time for --fps"):
        read_clip(tmp_path, 4, None, 0, fps=5)


@pytest.mark.parametrize("names, reason", [
    (["img_00001.jpg", "img_00002.jpg", "flow_x_00001.jpg"], r"several name patterns: flow_x_\*.jpg, img_\*.jpg"),
    (["1.jpg", "2.png"], r"several name patterns: \*.jpg, \*.png"),
    (["1.jpg", "01.JPG"], "01.JPG and 1.jpg have the same number"),
    (["x.png"], "a folder without numbered images"), ([], "a folder without numbered images"),
])  # fmt: skip
def test_folders_that_are_no_video(tmp_path, names, reason):
    write_images(tmp_path, names)
    with pytest.raises(BadVideo, match=f"^{tmp_path}: .*{reason}"):
        read_clip(tmp_path, 4, 1, 0)


def test_only_needed_frames_are_decoded(tmp_path, monkeypatch):
    """Not unwanted B-frames, nor the ends of groups of pictures."""
    path = write_video(tmp_path / "v.mp4", map(numbered, range(LENGTH)), gop=30, bframes=3)
    packets, decoded, decode_needed = [], [], video._decode_needed

    class Codec:
        def __init__(self, codec):
            self.codec, self.name, self.open, self.flush_buffers = codec, codec.name, codec.open, codec.flush_buffers

        def decode(self, packet):
            packets.append(packet)
            self.codec.skip_frame = self.skip_frame
            frames = self.codec.decode(packet)
            decoded.extend(frame.pts // 512 for frame in frames)  # a frame lasts 512 time units
            return frames

    monkeypatch.setattr(video, "_decode_needed", lambda codec, *args: decode_needed(Codec(codec), *args))
    assert frame_numbers(read_clip(path, 3, 21, 0)) == [0, 21, 42]  # 21 is a B-frame that no other depends on
    assert {0, 21, 30, 42} <= set(decoded) and not {19, *range(23, 30)} & set(decoded) and len(decoded) < 0.55 * 43
    assert len(packets) < 43 - 5


def test_reading_starts_no_threads(tmp_path, monkeypatch):
    def filter_graph(*arguments, make=video._filter_graph):
        graphs.append(make(*arguments))
        assert len(os.listdir("/proc/self/task")) == before
        return graphs[-1]

    path = write_video(tmp_path / "v.mp4", map(numbered, range(9)))
    graphs, before = [], len(os.listdir("/proc/self/task"))
    monkeypatch.setattr(video, "_filter_graph", filter_graph)
    assert len(read_clip(path, 4, 1, 0.5)) == 4 and graphs


@pytest.mark.parametrize("name, mode", [("x.png", "L"), ("x.png", "RGBA"), ("x.JPEG", "RGB")])
def test_images(tmp_path, name, mode):
    image = torch.arange(24 * 20).view(1, 24, 20).div(2).byte().expand(3, -1, -1)
    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).convert(mode).save(tmp_path / name)
    clip = read_clip(tmp_path / name, 5, 4, 0.5)
    assert clip.shape == (5, 3, 24, 20) and clip.dtype == torch.uint8
    assert (clip.int() - image.int()).abs().max() < (1 if name == "x.png" else 30)


# Display matrices (a, b, c, d) that do to a picture what the EXIF orientations 1 to 8 do.
MATRICES = [
    (1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1),
    (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0),
]  # fmt: skip
BLOCKS = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 1), np.uint8), np.ones((16, 16, 3), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_videos_and_images_are_turned_and_mirrored_as_pillow_does(tmp_path, orientation):
    set_matrix(write_video(tmp_path / "v.mp4", [BLOCKS] * 3), MATRICES[orientation - 1])
    (tmp_path / "folder").mkdir()
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    for name in ("x.jpg", "x.png", "folder/1.jpg"):
        PIL.Image.fromarray(BLOCKS).save(tmp_path / name, exif=exif, quality=98)
    expected = np.array(PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / "x.png")))
    for name in ("v.mp4", "x.jpg", "x.png", "folder"):
        clip = read_clip(tmp_path / name, 2, 1, 0)[1].permute(1, 2, 0)
        assert clip.shape == expected.shape
        assert (clip.int() - torch.from_numpy(expected).int()).abs().float().mean() < 4, name


def test_crops_are_exact_and_antialiased(tmp_path):
    """They equal torchvision's antialiased resized crop in floating point, up to rounding and the outermost pixels.

    There FFmpeg's filter repeats the box's border pixel where torchvision leaves out what lies outside the box.
    """
    image = gradients(90, 162)
    PIL.Image.fromarray(image).save(tmp_path / "x.png")
    whole = torch.from_numpy(image).permute(2, 0, 1).float()
    for box, size in (((10, 20, 64, 128), 24), ((3, 5, 31, 17), 50), ((0, 0, 90, 162), 33), ((1, 1, 80, 80), 64)):
        clip = read_clips(tmp_path / "x.png", 2, 1, [0.5], None, [lambda h, w, box=box: box], size)[0]
        expected = v2.functional.resized_crop(whole, *box, [size, size], antialias=True)
        assert clip.shape == (2, 3, size, size) and (clip[0] - expected).abs().mean() < 0.6
        assert (clip[0] - expected)[:, 1:-1, 1:-1].abs().max() < 1.5


def test_crops_where_color_is_subsampled(tmp_path):
    """FFmpeg rounds boxes down to even numbers. No garbage at the right edge if 16 does not divide the width."""
    image = gradients(90, 154)
    path, whole = write_video(tmp_path / "v.mp4", [image] * 2), torch.from_numpy(image).permute(2, 0, 1).float()
    assert (read_clip(path, 1, 1, 0)[0, :, :, -9:] - whole[:, :, -9:]).abs().mean() < 12
    clip = read_clips(path, 1, 1, [0], None, [lambda height, width: (11, 21, 63, 127)], 30)[0][0]
    expected = v2.functional.resized_crop(whole, 10, 20, 62, 126, [30, 30], antialias=True)
    assert (clip - expected).abs().mean() < 6


def test_size_and_format_may_change_within_a_clip():
    """Frames of another size are scaled to the first frame's before they are cropped."""
    frames = []
    for height, width, format, value in ((48, 64, "yuv420p", 40), (30, 100, "yuv420p", 120), (30, 100, "yuv444p", 200)):
        image = np.full((height, width, 3), value, np.uint8)
        image[:, width // 2 :] += 50
        frames.append(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=format))
    whole = video._to_rgb(frames, None, None)
    right = video._to_rgb(frames, lambda height, width: (0, width // 2, height, width // 2), 16)
    assert whole.shape == (3, 3, 48, 64) and right.shape == (3, 3, 16, 16)
    for t, value in enumerate((40, 120, 200)):
        assert (whole[t, :, :, :28].int() - value).abs().max() < 3
        assert (right[t, :, :, 2:].int() - value - 50).abs().max() < 3


def write_audio(path):
    """Write an mp4 file of sound with a cover."""
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    sound.rate = 44100
    with av.open(str(path), "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=44100)
        cover = container.add_stream("png", rate=1, width=32, height=32, pix_fmt="rgb24")
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered(255), format="rgb24")
        for stream, frame in ((audio, sound), (cover, picture)):
            container.mux([*stream.encode(frame), *stream.encode()])


def test_a_cover_is_no_video(tmp_path):
    write_audio(tmp_path / "cover.mp4")
    path = write_video(tmp_path / "v.mp4", map(numbered, range(9)))
    with av.open(str(tmp_path / "cover.mp4")) as sound, av.open(str(path)) as container:
        streams = [*sound.streams.video, *container.streams.video]
        both = types.SimpleNamespace(streams=types.SimpleNamespace(video=streams))
        assert len(streams) == 2 and video.video_stream("v.mp4", both) is streams[1]


def test_errors_name_the_file_and_the_reason(tmp_path):
    """Without opening what is no file: a FIFO would block."""
    good = write_video(tmp_path / "good.mp4", map(numbered, range(30))).read_bytes()
    contents = {
        "empty.mp4": b"", "text.mp4": b"not a video\n" * 50, "cut.mp4": good[: len(good) // 2], "empty.png": b"",
        "no frame.gif": b"GIF89a" + bytes(7) + b";", "unknown.mp4": good.replace(b"avc1", b"zzzz"),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "fifos").mkdir()
    for name in ("fifo.mp4", "fifo.png", "fifos/1.png"):
        os.mkfifo(tmp_path / name)
    write_audio(tmp_path / "cover.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    reasons = {
        **dict.fromkeys((*contents, "null\0byte.mp4")),
        **{"unknown.mp4": "unknown codec, or encrypted", "cover.mp4": "no video stream"},
        **dict.fromkeys(("fifo.mp4", "fifo.png", "fifos/1.png", "device.mp4"), "a special file, not a regular one"),
        **dict.fromkeys(("missing.mp4", "missing.png"), "No such file or directory"),
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(BadVideo) as error:
            read_clip(tmp_path / name.replace("/1.png", ""), 4, 1, 0.5)
        path, _, found = str(error.value).partition(": ")
        assert path == str(tmp_path / name) and len(found) > 5 and "\n" not in found
        assert reason in (None, found), name


def test_text_that_is_not_utf8_is_no_error(tmp_path):
    path = write_video(tmp_path / "v.mp4", map(numbered, range(10)))
    content = path.read_bytes()
    assert b"VideoHandler" in content
    path.write_bytes(content.replace(b"VideoHandler", b"Vid\xe4oHandler"))
    assert frame_numbers(read_clip(path, 4, 2, 0)) == [0, 2, 4, 6]


def test_unexpected_errors_name_their_type():
    with pytest.raises(BadVideo, match="^v.mp4: IndexError: pop from empty list$"), video.bad_video("v.mp4"):
        [].pop()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is missing")
def test_odd_videos_of_other_projects():
    """Each gives a clip or the reason why not."""
    files = [f for f in sorted((SHARED_DATA / "odd_videos").rglob("*")) if f.is_file() and f.suffix != ".csv"]
    assert len(files) > 50
    bad = []
    for file in files:
        try:
            clip = read_clips(file, 8, 2, [0.5], None, [functools.partial(video.square_crop, 1, 0.5)], 48)[0]
            assert clip.shape == (8, 3, 48, 48) and clip.dtype == torch.uint8, file
        except BadVideo as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            bad.append(file.name)
    truncated = {"trunc_90pct.mp4", "trunc_half.mp4", "trunc_half_faststart.mp4"}
    assert set(bad) == {"empty.mp4", "text.mp4", "audio_only.mp4", "doc_medias__result.webm"} | truncated
