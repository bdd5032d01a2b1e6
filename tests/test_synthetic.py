"""synthetic.py: its random numbers, the clips and their labels, and what happens in the physics pairs."""

import math

import torch

import physics
from synthetic import PROPERTIES, SIZES, synthetic_clips, synthetic_pair, uniforms


def test_uniforms_are_uniform_independent_and_depend_only_on_seed_and_number():
    n = 4000
    u = uniforms(7, torch.arange(n), 64)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / n)
    counts = torch.stack([column.histc(16, 0, 1) for column in u.unbind(1)])
    # Chi-square with 15 degrees of freedom: each of the 64 columns exceeds 45 with probability 1e-4.
    assert ((counts - n / 16).square() / (n / 16)).sum(1).max() < 45
    neighbors = torch.cat((u[1:], u[:-1]), dim=1)  # the columns of each number and of the next number
    assert torch.corrcoef(neighbors.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)
    assert torch.equal(uniforms(7, torch.tensor([3000, 5]), 64), u[[3000, 5]])
    for seed in (8, 7 + 2**31):
        assert (uniforms(seed, torch.arange(n), 64) == u).float().mean() < 1e-3


def test_clips_are_the_ones_of_all_earlier_runs():
    """Numbers of an earlier version. Another CPU may round a pixel to the next gray level."""
    clips, labels = synthetic_clips(1, torch.tensor([4, 2, 9]), 3, 24)
    assert clips.shape == (3, 3, 3, 24, 24) and clips.dtype == torch.uint8
    assert labels[:, :2].tolist() == [[6, 3], [4, 5], [7, 0]]
    found = clips[:, :, 1:, 12, 5].flatten().tolist()
    expected = [98, 90, 96, 62, 57, 44, 203, 125, 169, 132, 158, 123, 107, 115, 25, 22, 75, 106]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1
    assert torch.equal(labels, synthetic_clips(1, torch.tensor([4, 2, 9]), 2, 8)[1])  # whatever the size


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


def test_size_label_orders_the_shapes_by_their_area():
    clips, labels = synthetic_clips(0, torch.arange(600), 1, 64)
    gray = clips.float().mean((1, 2)).flatten(1)  # the shape is brighter and covers less than half of the frame
    area = (gray > (gray.quantile(0.1, dim=1) + gray.quantile(0.9, dim=1))[:, None] / 2).float().mean(1)
    areas = torch.stack([area[labels[:, 2] == size].mean() for size in range(SIZES)])
    assert (areas.diff() > 0.02).all()


def test_pairs_are_identical_until_the_event_and_differ_from_each_other():
    firsts = set()
    for number in range(12):
        property, possible, impossible = synthetic_pair(0, number, 24, 32)
        assert property == PROPERTIES[number % 3] and possible.shape == impossible.shape == (24, 3, 32, 32)
        event = physics.shared_frames(possible, impossible)
        changed = (possible[event:].int() - impossible[event:].int()).abs().amax((1, 2, 3))
        assert 8 <= event < 16 and changed.min() > 40  # visible in each frame from the event on
        firsts.add(tuple(possible[0].flatten().tolist()))
    assert len(firsts) == 12


def object_rows(video):
    """The bright object in each frame: its number of pixels and its height in [0, 1], both (T,)."""
    gray = video.float().mean(1)
    bright = gray > gray.flatten(1).median(1).values[:, None, None] + 45
    rows, count = (torch.arange(video.shape[2]) + 0.5) / video.shape[2], bright.flatten(1).sum(1)
    return count, (bright.sum(2) * rows).sum(1) / count


def test_what_happens_in_pairs():
    (_, a, b), (_, c, d) = synthetic_pair(0, 0, 24, 64), synthetic_pair(0, 3, 24, 64)
    counts = [object_rows(video)[0] for video in (a, b, c, d)]
    assert counts[0].min() > 50 and counts[1][0] > 50 and counts[1][-1] < 20  # vanishes
    assert counts[2].max() < 20 and counts[3][0] < 20 and counts[3][-1] > 50  # appears
    for number in (2, 5, 8):
        moves, jumps = (object_rows(video)[1] for video in synthetic_pair(0, number, 24, 64)[1:])
        assert moves.diff().abs().max() < 0.08 and jumps.diff().abs().max() > 0.25
