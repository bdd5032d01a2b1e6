"""synthetic.py: its random numbers, the clips and their labels, and what happens in the physics pairs."""

import math

import pytest
import torch

import physics
import synthetic
from synthetic import synthetic_clips, synthetic_pair, uniforms


def test_uniforms_are_uniform_and_independent():
    n = 4000
    u = uniforms(7, torch.arange(n), 64)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / n)
    counts = torch.stack([column.histc(16, 0, 1) for column in u.unbind(1)])
    # Chi-square with 15 degrees of freedom: each of the 64 columns exceeds 45 with probability 1e-4.
    assert ((counts - n / 16).square() / (n / 16)).sum(1).max() < 45
    neighbors = torch.cat((u[1:], u[:-1]), dim=1)  # the columns of each number and of the next number
    correlation = torch.corrcoef(neighbors.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_uniforms_depend_only_on_seed_and_number():
    u = uniforms(7, torch.arange(4000), 64)
    assert torch.equal(uniforms(7, torch.tensor([3000, 5]), 64), u[[3000, 5]])
    for seed in (8, 7 + 2**31):
        assert (uniforms(seed, torch.arange(4000), 64) == u).float().mean() < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# clips


def test_labels_are_uniform_and_independent():
    motions, shapes = len(synthetic.MOTIONS), len(synthetic.SHAPES)
    assert (motions, shapes) == (8, 6)
    motion, shape = synthetic_clips(0, torch.arange(4800), 1, 2)[1].unbind(1)
    table = torch.bincount(motion * shapes + shape, minlength=48).float()
    assert ((table - 100).square() / 100).sum() < 83  # chi-square with 47 degrees of freedom: 99.9%


@pytest.mark.parametrize("num_frames, resolution", [(1, 8), (3, 24), (16, 64)])
def test_clips_of_any_size(num_frames, resolution):
    numbers = torch.tensor([4, 2, 9])
    clips, labels = synthetic_clips(1, numbers, num_frames, resolution)
    assert clips.shape == (3, 3, num_frames, resolution, resolution) and clips.dtype == torch.uint8
    assert torch.equal(labels, synthetic_clips(1, numbers, 2, 8)[1])  # labels do not depend on the size
    assert clips.float().flatten(1).std(1).min() > 3  # not blank
    assert not torch.equal(clips, synthetic_clips(2, numbers, num_frames, resolution)[0])


def test_clips_look_the_same_at_any_resolution():
    """A clip at half the resolution is the clip shrunk, except for the grain, which is drawn per pixel."""
    views = [synthetic_clips(0, torch.arange(12), 2, size)[0].float().flatten(1, 2) for size in (32, 64)]
    small, large = (torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) for x in views)
    similarity = torch.corrcoef(torch.cat((small, large)))[:12, 12:]
    assert similarity.diag().min() > 0.8 and (similarity.argmax(1) == torch.arange(12)).all()


def test_motion_label_is_the_direction_of_the_shapes():
    """Shift a frame's edges in each of the 8 directions: the labeled one matches later frames best, for most clips.

    The background's direction does not depend on the label, so it favors no other direction.
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


def trained_accuracy(network, x, y, train, epochs, lr=2e-3):
    """Validation accuracy of a network trained on the first `train` samples of (x, y)."""
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
    """An accuracy above this is better than chance with 99.95% confidence."""
    p = 1 / classes
    return p + 3.3 * math.sqrt(p * (1 - p) / count)


def conv_net(*widths):
    """Convolutions of stride 2 with these widths, pooling, and a classifier of 8 classes."""
    layers = []
    for in_width, out_width in zip(widths[:-1], widths[1:], strict=True):
        conv = torch.nn.Conv2d(in_width, out_width, 3, 2, 1)
        layers += [conv, torch.nn.BatchNorm2d(out_width), torch.nn.ReLU()]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(widths[-1], 8)]
    return torch.nn.Sequential(*layers, *head)


@pytest.mark.slow
def test_one_frame_does_not_reveal_the_motion_nor_color_the_shape():
    torch.manual_seed(0)
    train, total = 3000, 4500
    parts = [synthetic_clips(0, torch.arange(i, i + 500), 5, 32) for i in range(0, total, 500)]
    clips, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    x = clips.float() / 128 - 1

    one_frame = trained_accuracy(conv_net(3, 24, 48, 64), x[:, :, 2], labels[:, 0], train, 8)
    # The same network does recognize the motion from two frames.
    two_frames = trained_accuracy(conv_net(6, 24, 48, 64), x[:, :, 2:4].flatten(1, 2), labels[:, 0], train, 8)
    color = torch.cat((x.mean((2, 3, 4)), x.mean((3, 4)).flatten(1), x.std((2, 3, 4))), dim=1)
    mlp = torch.nn.Sequential(
        torch.nn.BatchNorm1d(color.shape[1]),
        torch.nn.Linear(color.shape[1], 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 8),
    )
    shape = trained_accuracy(mlp, color, labels[:, 1], train, 20)
    assert two_frames > 0.5
    assert one_frame < chance_limit(8, total - train)
    assert shape < chance_limit(6, total - train)


# ---------------------------------------------------------------------------------------------------------------------
# physics pairs


def find_object(video):
    """The pixels of the object (L, R, R), and its center x (L,) and y (L,) in frame widths; nan where there is none."""
    video = video.float() / 255
    mask = video.amax(1) - video.amin(1) > 0.45  # only the object is colorful
    centers = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1]
    count = mask.sum((1, 2))
    return mask, (mask.sum(1) * centers).sum(1) / count, (mask.sum(2) * centers).sum(1) / count


def built_in_pairs(property, count, resolution=64):
    """The first pairs of a property, (possible, impossible) each."""
    first, step = synthetic.PROPERTIES.index(property), len(synthetic.PROPERTIES)
    pairs = [synthetic_pair(0, first + step * n, 24, resolution) for n in range(count)]
    assert all(name == property for name, *_ in pairs)
    return [(possible, impossible) for _, possible, impossible in pairs]


@pytest.mark.parametrize("property", synthetic.PROPERTIES)
def test_pairs_are_identical_until_the_event(property):
    for possible, impossible in built_in_pairs(property, 6, resolution=32):
        assert possible.shape == impossible.shape == (24, 3, 32, 32)
        pair = physics.make_pair(property, "", possible, impossible)
        differs = (possible != impossible).flatten(1).any(1)
        assert not differs[: pair.same].any() and differs[pair.same]
        assert 7 < pair.same <= pair.event < 18 and pair.event - pair.same < 4
        assert (possible[0] != possible[1]).any()  # grain


@pytest.mark.parametrize("property", synthetic.PROPERTIES)
def test_pairs_are_reproducible_and_differ(property):
    (first, _), (possible, impossible) = built_in_pairs(property, 2)
    again = built_in_pairs(property, 2)[1]
    assert torch.equal(again[0], possible) and torch.equal(again[1], impossible)
    assert not torch.equal(first, possible)


def test_permanence():
    for n, videos in enumerate(built_in_pairs("permanence", 4)):
        visible = [find_object(video)[0].any((1, 2)) for video in videos]
        goes_in = n % 2 == 0
        assert [v[0] for v in visible] == [goes_in, goes_in]
        assert [v[-1] for v in visible] == [goes_in, not goes_in]  # only in the possible video, what goes in comes out
        assert not visible[0][12]  # behind the occluder


@pytest.mark.parametrize("property", ["shape", "color"])
def test_shape_and_color(property):
    for possible, impossible in built_in_pairs(property, 4):
        a, b = find_object(possible)[0][-1], find_object(impossible)[0][-1]
        different = (a ^ b).sum() / a.sum()
        hues = [video[-1][:, a & b].float().mean(1).argsort().tolist() for video in (possible, impossible)]
        if property == "shape":
            assert different > 0.2 and hues[0] == hues[1]
        else:
            assert different < 0.1 and hues[0] != hues[1]


def test_continuity():
    for videos in built_in_pairs("continuity", 4):
        steps = [find_object(video)[2].diff().abs().max() for video in videos]
        assert steps[0] < 0.02 and steps[1] > 0.25


def test_solidity():
    for videos in built_in_pairs("solidity", 4):
        (_, bounces, _), (mask, passes, _) = (find_object(video) for video in videos)
        assert abs(bounces[-1] - bounces[0]) < 0.45 < 0.6 < abs(passes[-1] - passes[0])
        assert (bounces - bounces[0]).abs().max() > abs(bounces[-1] - bounces[0]) + 0.1  # it comes back
        assert passes.diff().sign().unique().numel() == 1
        area = mask.sum((1, 2))
        assert area[1:-1].min() > 0.8 * area.max()  # visible all the way through the wall


def test_gravity():
    for videos in built_in_pairs("gravity", 4):
        falls, rises = (find_object(video)[2] for video in videos)
        assert falls[-1] > 0.8 and rises[-1] < 0.2 and abs(falls[0] - 0.5) < 0.04
