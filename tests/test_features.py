"""The tokens of a data set: which clips are encoded, by which encoder, and how often."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from conftest import TINY, flat, frame_numbers, numbered, randomize, refusal, run_script, write_image, write_video

import data
import features
import probe
import train_ema_baseline
from model import Encoder, load_checkpoint, load_encoder
from video import BadVideo


def make_args(**changes):
    """The flags that features.py uses."""
    common = dict(
        checkpoint=None, weights="encoder", untrained=False, seed=0, layers=None, combine="tokens", num_frames=4,
        frame_step=1, resolution=32, num_classes=2, fps=None, segments=1, views=1, flip=True, single_frame=False,
        workers=0, device="cpu", dtype="float32",
    )  # fmt: skip
    return argparse.Namespace(**{**common, **changes})


def tokens_of(args, encoder, source):
    return features.Tokens(args, encoder, source, features.Stopwatch())


# ---------------------------------------------------------------------------------------------------------------------
# the encoder


def test_untrained_is_another_encoder(teacher):
    x = torch.randn(1, 3, 4, 32, 32)
    trained, first, second = (
        features.load(make_args(checkpoint=teacher, untrained=untrained))[0] for untrained in (False, True, True)
    )
    assert torch.equal(trained(x), load_encoder(teacher)(x)) and torch.equal(first(x), second(x))
    assert not torch.allclose(trained(x), first(x), atol=1e-3)
    assert not any(e.training or any(p.requires_grad for p in e.parameters()) for e in (trained, first))


def test_seed_of_the_untrained_encoder(teacher):
    encoders = [features.load(make_args(checkpoint=teacher, untrained=True, seed=seed))[0] for seed in (0, 0, 1)]
    weights = [encoder.patch_embed.weight for encoder in encoders]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[1], weights[2], atol=1e-3)


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ema"
    run_script(train_ema_baseline, *TINY, "--ema-momentum", 0.5, "--out", out)
    return out


def test_weights_of_an_ema_run(ema):
    """Its encoder is the EMA teacher; its student is loaded only on request."""
    x, checkpoint = torch.randn(1, 3, 4, 32, 32), load_checkpoint(ema)
    for weights in ("encoder", "student"):
        encoder = Encoder(**checkpoint["model"]["encoder"])
        encoder.load_state_dict(checkpoint[weights])
        loaded, step = features.load(make_args(checkpoint=ema, weights=weights))
        assert torch.equal(loaded(x), encoder(x)) and not loaded.training and step == checkpoint["step"] == 6
    assert not torch.allclose(checkpoint["encoder"]["patch_embed.weight"], checkpoint["student"]["patch_embed.weight"])


def test_hugging_face_folder_is_refused(tmp_path, capfd):
    (tmp_path / "config.json").write_text("{}")
    flags = ("--task", "synthetic-shape", "--checkpoint", tmp_path, "--device", "cpu")
    assert "python -m tools.convert from-hf" in refusal(capfd, probe, *flags)


# ---------------------------------------------------------------------------------------------------------------------
# sources


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """25 fps, 80 frames of 32 x 96: the left third carries the frame number, the middle is gray, the right bright."""
    folder = tmp_path_factory.mktemp("long")
    wide = [np.concatenate([numbered(n), flat(100), flat(200)], axis=1) for n in range(80)]
    write_video(folder / "a.mp4", wide)
    (folder / "list.csv").write_text("a.mp4 1\n")
    return folder / "list.csv"


def test_segments_and_views(long_video, teacher):
    """Middle clips of each share of the length, crops from left to right; a view joins its segments' tokens."""
    args, encoder = make_args(segments=4, views=3), load_encoder(teacher)
    train, val = (features.Videos([long_video], args, augmentation) for augmentation in ("pretrain", "none"))
    views = val.batch([0]).clips[0]
    assert views.shape == (3, 4, 3, 4, 32, 32)
    room = 80 - 4
    for segment, clip in enumerate(views[0]):
        first = round((segment + 0.5) / 4 * room)
        assert frame_numbers(clip.transpose(0, 1))[0] in (first - 1, first, first + 1)
    assert (views[1].float() - 100).abs().mean() < 6 and (views[2].float() - 200).abs().mean() < 6
    (batch,) = next(iter(tokens_of(args, encoder, val).read([torch.arange(1)])))
    clips = data.normalize(views.flatten(0, 1), "cpu")
    torch.testing.assert_close(batch.tokens[0], encoder(clips).unflatten(0, (3, 4)).flatten(1, 2))
    assert batch.labels.tolist() == [[1]] and batch.readable.tolist() == [True]

    views = torch.stack([train.batch([n]).clips[0] for n in range(12)])  # one view of each sample
    assert views.shape == (12, 1, 4, 3, 4, 32, 32)
    assert len({view.numpy().tobytes() for view in views}) == 12


def test_a_single_view_is_seven_eighths_of_the_short_side(tmp_path):
    """V-JEPA 2 scales the short side to 256 and takes the center 224 x 224. Three views take the whole short side."""
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 4:60, 20:76] = 255
    write_image(image, tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("a.png 0\n")
    one, three = (features.Videos([tmp_path / "m.csv"], make_args(views=views)).batch([0]).clips[0] for views in (1, 3))
    assert (one > 240).all()
    middle = three[1].float()
    assert middle[..., 16, 16].min() > 240 and max(middle[..., 0, :].max(), middle[..., 0].max()) < 130


def test_centered_view(long_video):
    """Without augmentation, training takes only the middle one of three views."""
    args = make_args(views=3, segments=2)
    train, val = (features.Videos([long_video], args, centered=centered) for centered in (True, False))
    assert train.views == 1 and torch.equal(train.batch([0]).clips[0], val.batch([0]).clips[0, 1:2])


@pytest.mark.parametrize("augmentation", ["pretrain", "vjepa2"])
def test_training_clips_are_placed_at_random_within_their_share(augmentation, long_video, monkeypatch):
    """Each segment's position comes from the generator of its sample."""
    places = []
    monkeypatch.setattr(
        features.video,
        "read_clips",
        lambda path, frames, step, at, *rest: places.append(at) or [torch.zeros(4, 3, 32, 32, dtype=torch.uint8)] * 4,
    )
    train = features.Videos([long_video], make_args(segments=4), augmentation)
    train.batch(range(6))
    for n, found in enumerate(places):
        assert found == pytest.approx(
            (np.arange(4) + np.random.default_rng(data.seed_sequence("segment", 0, n)).random(4)) / 4
        )
        assert all(segment / 4 <= place <= (segment + 1) / 4 for segment, place in enumerate(found))
    assert len(places) == 6


@pytest.fixture(scope="module")
def still_video(tmp_path_factory):
    """The manifest of a video of 40 equal frames that become brighter from left to right."""
    folder = tmp_path_factory.mktemp("still")
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    write_video(folder / "still.mp4", [ramp] * 40)
    (folder / "list.csv").write_text("still.mp4 0\n")
    return folder / "list.csv"


def test_pretraining_augmentation_is_the_same_for_all_segments(still_video):
    """All clips of a training sample of a still video are the same; another sample's clips differ."""
    train = features.Videos([still_video], make_args(segments=3, frame_step=2), "pretrain")
    samples = torch.stack([train.batch([n]).clips[0, 0] for n in range(10)]).float()
    assert (samples[:, :1] - samples).abs().mean() < 1 and (samples[0] - samples[1]).abs().mean() > 3
    rises = (samples[..., -1] - samples[..., 0]).mean((1, 2, 3, 4)) > 0
    assert 0 < rises.sum() < 10  # some are flipped


def test_vjepa2_augments_every_segment_by_itself(still_video, monkeypatch):
    """Crop, RandAugment and flip of each clip depend on its sample number and segment, not on the batch."""
    args = make_args(segments=3, frame_step=2)
    train = features.Videos([still_video], args, "vjepa2")
    batch = train.batch(range(8))
    assert batch.clips.shape == (8, 1, 3, 3, 4, 32, 32) and batch.clips.dtype == torch.uint8
    assert len({clip.numpy().tobytes() for clip in batch.clips.flatten(0, 2)}) == 24
    assert torch.equal(train.batch([5, 2]).clips, batch.clips[[5, 2]])
    assert all((clip.float() - clip[:, :1]).abs().mean() < 2 for clip in batch.clips.flatten(0, 2))  # same per frame
    monkeypatch.setattr(features.augment, "augment", lambda key, clip: clip)
    cropped = train.batch(range(8)).clips
    assert not torch.equal(cropped, batch.clips)
    rises = (cropped[..., -1].float() - cropped[..., 0]).mean((1, 3, 4, 5)) > 0  # (8, 3)
    assert 0 < rises.sum() < 24 and not torch.equal(rises, rises[:, :1].expand_as(rises))


@pytest.mark.parametrize("flip", [True, False])
def test_training_videos_are_mirrored_only_with_flip(flip, tmp_path):
    """Of 40 samples of an image whose left half is dark, count those that are dark on the right."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 255
    write_image(image, tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("a.png 0\n")
    source = features.Videos([tmp_path / "m.csv"], make_args(num_frames=2, flip=flip), "pretrain")
    clips = source.batch(range(40)).clips[:, 0, 0, 0, 0].float()
    mirrored = (clips[..., :16].mean((1, 2)) > clips[..., 16:].mean((1, 2))).sum()
    assert 8 < mirrored < 32 if flip else mirrored == 0


def test_unreadable_videos_are_marked_only_with_skip_bad(tmp_path):
    """The clips are black, the label stays; without skip_bad it is an error, in training another video replaces it."""
    write_image(torch.full((3, 32, 32), 200, dtype=torch.uint8), tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "m.csv").write_text("a.png 0\nb.png 1\n")
    args = make_args(num_frames=2, views=2)
    batch = features.Videos([tmp_path / "m.csv"], args, skip_bad=True).batch([0, 1])
    assert batch.readable.tolist() == [True, False] and batch.labels.tolist() == [[0], [1]]
    assert batch.clips.shape == (2, 2, 1, 3, 2, 32, 32) and (batch.clips[0] > 190).all() and (batch.clips[1] == 0).all()
    assert len(batch.skipped) == 1 and "b.png" in batch.skipped[0]
    with pytest.raises(BadVideo, match="b.png"):
        features.Videos([tmp_path / "m.csv"], args).batch([1])
    batch = features.Videos([tmp_path / "m.csv"], args, "vjepa2").batch(range(10))
    assert batch.readable.all() and (batch.labels == 0).all() and len(batch.skipped) == 5


def test_a_block_of_missing_training_videos_does_not_end_the_run(tmp_path):
    """Each is replaced by a random line, until one is readable."""
    for name in "ab":
        write_image(torch.full((3, 32, 32), 200, dtype=torch.uint8), tmp_path / f"{name}.png")
    missing = "".join(f"missing{n}.mp4 1\n" for n in range(20))
    (tmp_path / "m.csv").write_text(f"{missing}a.png 0\nb.png 0\n")
    train = features.Videos([tmp_path / "m.csv"], make_args(num_frames=2), "vjepa2")
    batch = train.batch(range(22))
    assert (batch.labels == 0).all() and set(batch.names) == {str(tmp_path / "a.png"), str(tmp_path / "b.png")}
    assert len(batch.skipped) >= 20


# ---------------------------------------------------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("single_frame", [False, True])
def test_single_frame(single_frame, teacher):
    """With --single-frame, the encoder sees only the middle frame, at all times."""
    args = make_args(num_frames=6, resolution=16, single_frame=single_frame)
    encoder, seen = load_encoder(teacher), []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    source = features.BuiltInVideos(6, 16, length=20)
    batches = tokens_of(args, encoder, source).read([torch.arange(16), torch.arange(16, 20)])
    assert [len(batch.numbers) for batch in itertools.chain(*batches)] == [16, 4]
    clips, expected = torch.cat(seen), data.normalize(source.batch(range(20)).clips[:, 0, 0], "cpu")
    if single_frame:
        expected = expected[:, :, 3:4].expand(-1, -1, 6, -1, -1)
    torch.testing.assert_close(clips, expected)


@pytest.mark.parametrize("combine", ["tokens", "concat", "mean"])
def test_layers(combine):
    """The outputs of the chosen blocks, each through the encoder's final norm."""
    encoder = randomize(Encoder(16, 3, 2, num_frames=4, resolution=16, patch_size=8))
    source, outputs = features.BuiltInVideos(4, 16, length=2), []
    clips = source.batch([0, 1]).clips
    for depth in (1, 2, 3):
        shallow = Encoder(16, depth, 2, num_frames=4, resolution=16, patch_size=8)
        shallow.load_state_dict({k: encoder.state_dict()[k] for k in shallow.state_dict()})
        outputs.append(shallow(data.normalize(clips[:, 0, 0], "cpu")))
    expected = {
        "tokens": torch.cat(outputs[::2], 1),
        "concat": torch.cat(outputs[::2], 2),
        "mean": (outputs[0] + outputs[2]) / 2,
    }[combine]
    tokens = tokens_of(make_args(layers=[1, 3], combine=combine, resolution=16), encoder, source)
    torch.testing.assert_close(tokens.encode(clips)[:, 0], expected)
    assert tokens.shape == expected.shape[1:]


def test_kept_tokens_are_encoded_once(teacher, monkeypatch):
    """`read` then yields the same as before, in any order."""
    encoded, encode = [], features.Tokens.encode
    monkeypatch.setattr(
        features.Tokens, "encode", lambda self, clips: encoded.append(len(clips)) or encode(self, clips)
    )
    source = features.BuiltInVideos(4, 32, length=10)
    tokens = tokens_of(make_args(), load_encoder(teacher), source)
    order = [torch.tensor([7, 2, 9]), torch.tensor([0, 1])]
    fresh = list(itertools.chain(*tokens.read(order)))
    tokens.keep("training")
    kept = list(itertools.chain(*tokens.read(order)))
    assert sum(encoded) == 15 and len(fresh) == len(kept) == 2
    for a, b in zip(fresh, kept, strict=True):
        assert torch.equal(a.numbers, b.numbers) and torch.equal(a.labels, b.labels) and a.readable.all()
        assert torch.equal(a.readable, b.readable)
        torch.testing.assert_close(a.tokens, b.tokens)


def test_standardize(teacher):
    """With the moments as its scale, `read` yields tokens of zero mean and unit variance per channel."""
    source = features.BuiltInVideos(4, 32, length=50)
    tokens, numbers = tokens_of(make_args(), randomize(load_encoder(teacher)), source), torch.arange(50)
    x = torch.cat([batch.tokens for batch in itertools.chain(*tokens.read([numbers]))]).flatten(0, 2)
    scale = features.moments(tokens, numbers)
    torch.testing.assert_close(scale, torch.stack((x.mean(0), x.std(0))))
    tokens.scale = scale
    x = torch.cat([batch.tokens for batch in itertools.chain(*tokens.read([numbers]))]).flatten(0, 2)
    torch.testing.assert_close(x.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(32), atol=1e-4, rtol=0)


def test_collect_is_in_order(teacher, monkeypatch):
    """Results, labels and flags of all videos, whatever the size of the micro-batches."""
    monkeypatch.setattr(features, "TOKENS_AT_ONCE", 100)  # 3 videos of 32 tokens
    source = features.BuiltInVideos(4, 32, length=10)
    tokens = tokens_of(make_args(), load_encoder(teacher), source)
    means, labels, readable = features.collect(tokens, 1, lambda x: x.mean((1, 2, 3)), (), torch.float32)
    batch = source.batch(range(10))
    torch.testing.assert_close(means, tokens.encode(batch.clips).mean((1, 2, 3)))
    assert torch.equal(labels, batch.labels[:, 1]) and readable.tolist() == [True] * 10
    assert tokens.videos_at_once == 3
