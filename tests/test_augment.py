"""The training augmentation of probes: its parameters are V-JEPA 2's, and its randomness depends only on the key."""

import collections

import pytest
import torch

import augment
import data


@pytest.fixture(scope="module")
def clip():
    return torch.randint(0, 256, (4, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_randomness_depends_only_on_the_key(clip):
    """Neither on torch's global generator, which stays untouched, nor on earlier calls."""
    keys = [(0, number, segment) for number in range(20) for segment in range(2)]
    torch.manual_seed(5)
    first = [(augment.random_crop(key, 90, 120), augment.augment(key, clip)) for key in keys]
    undisturbed = torch.rand(3)
    second = [(augment.random_crop(key, 90, 120), augment.augment(key, clip)) for key in reversed(keys)][::-1]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert len({box for box, _ in first}) == 40
    assert len({out.numpy().tobytes() for _, out in first}) > 30  # some are not changed
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), undisturbed)


def test_all_frames_of_a_clip_are_augmented_alike(clip):
    still, changed = clip[:1].repeat(4, 1, 1, 1), 0
    for number in range(60):
        out = augment.augment((0, number, 0), still)
        assert out.dtype == torch.uint8 and out.shape == still.shape and torch.equal(out, out[:1].expand_as(out))
        changed += not torch.equal(out, still)
    assert changed > 40


def test_crops():
    """Areas of 8% to 100% of the frame, aspect ratios of 3/4 to 4/3, anywhere in the frame."""
    height, width = 200, 240
    boxes = torch.tensor([augment.random_crop((0, number, 0), height, width) for number in range(1000)]).double()
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, aspect = h * w / (height * width), w / h
    assert 0.075 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.36
    assert 0.4 < area.mean() < 0.55


def test_number_and_magnitude_of_operations(clip, monkeypatch):
    """Four operations, each with probability 1/2, at a magnitude of 7 with a standard deviation of 0.5."""
    used = []
    operations = [lambda clip, magnitude=magnitude: used.append(magnitude) or clip for magnitude in range(11)]
    monkeypatch.setattr(augment, "OPERATIONS", operations)
    counts, magnitudes = collections.Counter(), collections.Counter()
    for number in range(1000):
        used.clear()
        augment.augment((0, number, 0), clip)
        counts[len(used)] += 1
        magnitudes.update(used)
    for count, probability in enumerate((1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)):
        assert counts[count] / 1000 == pytest.approx(probability, abs=0.05)
    assert magnitudes[7] / magnitudes.total() == pytest.approx(0.683, abs=0.04)  # within one standard deviation
    assert magnitudes.keys() <= {5, 6, 7, 8, 9} and 0.75 < magnitudes[6] / magnitudes[8] < 1.33


def test_magnitudes_are_clipped(clip, monkeypatch):
    monkeypatch.setattr(augment, "MAGNITUDE_STD", 100)
    for number in range(20):
        augment.augment((0, number, 0), clip)


def test_operations_are_those_of_timm():
    """As far as torchvision has them, with timm's values at magnitude 7 of 10 ("inc1")."""
    operation = augment.OPERATIONS[7]
    space = operation._AUGMENTATION_SPACE
    values = {name: magnitudes(operation.num_magnitude_bins, 100, 100) for name, (magnitudes, _) in space.items()}
    values = {name: None if value is None else float(value[operation.magnitude]) for name, value in values.items()}
    enhance = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.63)
    shift = {"ShearX": 0.21, "ShearY": 0.21, "Rotate": 21, "TranslateX": 0.7 * 45.3, "TranslateY": 0.7 * 45.3}
    no_magnitude = dict.fromkeys(("Identity", "AutoContrast", "Equalize"))
    assert values == {
        name: value if value is None else pytest.approx(value, rel=1e-3)
        for name, value in {**enhance, **shift, **no_magnitude, "Posterize": 5, "Solarize": 0.3}.items()
    }
    assert {name for name, (_, signed) in space.items() if signed} == {*enhance, *shift}


def test_random_erasing(clip, monkeypatch):
    """One clip in four gets a box of 2% to 33% of its area in ImageNet's mean color, the same in all frames."""
    monkeypatch.setattr(augment, "PROBABILITY", 0)
    bright = torch.full_like(clip, 255)
    shares = []
    for number in range(400):
        out = augment.augment((0, number, 0), bright)
        erased = (out != bright).any(1)
        assert torch.equal(erased, erased[:1].expand_as(erased))
        if erased.any():
            pixels = data.normalize(out.transpose(0, 1)[None], "cpu")[0].transpose(0, 1).movedim(1, -1)[erased]
            assert pixels.abs().max() < 0.01
            shares.append(erased[0].float().mean())
    assert 70 <= len(shares) <= 130
    assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.36
    assert (bright == 255).all()  # not in place
