"""Masks have V-JEPA's distributions, account for every token, and are truncated without its bias to early frames."""

import hashlib
import math
from collections import Counter

import pytest
import torch
from torch.nn.functional import one_hot

import masking
from masking import LONG_RANGE, SHORT_RANGE, sample_masks

GRID, BATCH = (8, 14, 14), 24
ALL = [(name, truncation) for name in masking.STRATEGIES for truncation in ("random", "raster")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_by_blocks(frame, clips, rng, **mask):
    """(clips, h*w), True at tokens inside blocks. With "raster", only clips without any context are redrawn."""
    return ~masking._outside_blocks((1, *frame), clips, rng, rng, "raster", **mask)[0]


def draw_visible(name, grid, batch, seed=0, truncation="random"):
    """The visible tokens of each mask before truncation: a list of (B, N) bool."""
    rng = generator(seed)
    return [visible for visible, _ in masking.STRATEGIES[name].draw(grid, batch, rng, rng, truncation)]


def assert_zero_mean(x, sigmas=5):
    """Check that the mean of x (samples, ...) over independent samples is 0, within `sigmas` standard errors."""
    assert (x.mean(0).abs() <= sigmas * x.std(0) / math.sqrt(len(x)) + 1e-9).all()


@pytest.mark.parametrize("frame", [(14, 14), (10, 24)])
@pytest.mark.parametrize("scale", [SHORT_RANGE["scale"], LONG_RANGE["scale"]])
def test_block_sizes(frame, scale):
    """docs/method.md, section 3: area n = int(h w scale), sqrt(n a) rows, sqrt(n / a) columns, rounded; uniform a."""
    h, w = frame
    n, draws, rng = int(h * w * scale), 3000, generator()
    found = Counter()
    for _ in range(draws):
        hidden = hidden_by_blocks(frame, 1, rng, blocks=1, scale=scale).view(h, w)
        rows, cols = hidden.any(1).sum().item(), hidden.any(0).sum().item()
        assert hidden.sum() == rows * cols  # one rectangle
        found[rows, cols] += 1
    aspects = [0.75 + 0.75 * (i + 0.5) / 20000 for i in range(20000)]
    expected = Counter((min(h, round(math.sqrt(n * a))), min(w, round(math.sqrt(n / a)))) for a in aspects)
    assert found.keys() <= expected.keys()
    for size, count in expected.items():
        p = count / len(aspects)
        assert abs(found[size] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-3, size


@pytest.mark.parametrize("mask", [SHORT_RANGE, LONG_RANGE])
def test_a_mask_is_the_union_of_uniformly_placed_blocks(mask):
    frame, clips = (14, 16), 20_000
    one = hidden_by_blocks(frame, 1, generator(), **(mask | dict(blocks=1))).view(frame)  # same seed, so same size

    def covered(length, size):
        """The probability that each position along one axis lies in a block."""
        starts = torch.arange(length - size + 1)[:, None]
        return ((torch.arange(length) >= starts) & (torch.arange(length) < starts + size)).double().mean(0)

    rows, cols = (covered(n, int(one.any(1 - axis).sum())) for axis, n in enumerate(frame))
    expected = 1 - (1 - rows[:, None] * cols) ** mask["blocks"]
    assert_zero_mean(hidden_by_blocks(frame, clips, generator(), **mask).double() - expected.flatten())


@pytest.mark.parametrize("truncation, fractions", [
    ("raster", [(0.37, 0.23, 0.23), (0.19, 0.065, 0.13)]),  # docs/method.md, section 3
    ("random", [(0.37, 0.255, 0.20), (0.195, 0.072, 0.135)]),
])  # fmt: skip
def test_fractions_of_tokens_and_no_favored_frame(truncation, fractions):
    """Per mask: context of all tokens before and after truncation, and dropped targets of all targets."""
    batches = [sample_masks("multiblock", GRID, BATCH, generator(seed), truncation) for seed in range(250)]
    drawn = [draw_visible("multiblock", GRID, BATCH, seed, truncation) for seed in range(250)]
    columns = zip(zip(*batches, strict=True), zip(*drawn, strict=True), fractions, strict=True)
    for masks, visible, (before, after, target_loss) in columns:
        kept = torch.tensor([m.context_ids.shape[1] for m in masks]) / 1568
        context = torch.stack([v.float().mean() for v in visible])
        targets = torch.tensor([m.target_ids.shape[1] for m in masks]) / 1568
        assert context.mean().item() == pytest.approx(before, abs=0.015)
        assert kept.mean().item() == pytest.approx(after, abs=0.015)
        assert (1 - targets / (1 - context)).mean().item() == pytest.approx(target_loss, abs=0.015)
        if truncation == "random":  # all time steps are kept equally often
            by_step = torch.cat([one_hot(m.context_ids // 196, 8).sum(1) for m in masks]).float()  # (clips, t)
            assert_zero_mean(by_step - by_step.mean(1, keepdim=True))


@pytest.mark.parametrize("name, truncation", ALL)
@pytest.mark.parametrize("grid", [GRID, (2, 3, 3), (2, 4, 4), (2, 3, 7), (4, 6, 4)])
def test_context_is_visible_and_targets_are_hidden(grid, name, truncation):
    for seed in range(5):
        visible = draw_visible(name, grid, BATCH, seed, truncation)
        masks = sample_masks(name, grid, BATCH, generator(seed), truncation)
        assert [mask.index for mask in masks] == list(range(masking.STRATEGIES[name].num_masks))
        for mask, shown in zip(masks, visible, strict=True):
            for ids, pool in (mask.context_ids, shown), (mask.target_ids, ~shown):
                assert ids.dtype == torch.int64 and ids.shape[1] > 0
                assert (ids.diff(dim=1) > 0).all()  # sorted, without repetitions
                assert pool.gather(1, ids).all()  # so context and targets are disjoint
                assert ids.shape[1] == pool.sum(1).min() or (name, truncation) == ("multiblock", "random")


def test_raster_truncation_is_v_jepas():
    """V-JEPA's collator takes the ids in raster order and cuts them to the shortest list of the batch."""
    masks = sample_masks("multiblock", GRID, BATCH, generator(3), "raster")
    for mask, visible in zip(masks, draw_visible("multiblock", GRID, BATCH, 3, "raster"), strict=True):
        for ids, pool in ((mask.context_ids, visible), (mask.target_ids, ~visible)):
            lists = [clip.nonzero()[: pool.sum(1).min(), 0] for clip in pool]
            assert torch.equal(ids, torch.stack(lists))


def test_tube():
    (mask,), (first, second) = (draw_visible(name, GRID, 2000) for name in ("tube", "tube2"))
    for visible in (mask, first, second):
        frame = visible.view(-1, 8, 196)[:, 0].float()
        assert (frame.sum(1) == 20).all()  # round(0.1 * 196)
        assert_zero_mean(frame - 20 / 196)
    both = (first & second).view(-1, 8, 196)[:, 0].sum(1).float()
    assert_zero_mean(both - 20 * 20 / 196)  # independent


@pytest.mark.parametrize("t, steps", [(8, 1), (4, 1), (20, 2)])
def test_causal(t, steps):
    for mask in sample_masks("causal", (t, 3, 5), 2, generator()):
        assert torch.equal(mask.context_ids, torch.arange(steps * 15).expand(2, -1))
        assert torch.equal(mask.target_ids, torch.arange(steps * 15, t * 15).expand(2, -1))


def test_all_micro_batches_of_a_step_keep_equally_many_tokens():
    """Whatever their size. Over many steps, only a few different numbers of tokens occur."""
    lengths = []
    for step in range(60):
        kept = set()
        for batch in (1, 3, 24):
            masks = sample_masks("multiblock", GRID, batch, generator(1000 * step + batch), sizes=generator(step))
            kept.add(tuple((m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks))
        assert len(kept) == 1
        lengths += kept
    short, long = map(set, zip(*lengths, strict=True))
    assert 3 <= len(short) <= 5 and 5 <= len(long) <= 9


@pytest.mark.parametrize("name, truncation", ALL)
def test_masks_per_clip_are_independent(name, truncation):
    once, thrice = (sample_masks(name, GRID, 4, generator(), truncation, masks_per_clip=count) for count in (1, 3))
    assert [mask.index for mask in thrice] == 3 * [mask.index for mask in once]
    ids = [mask.context_ids.tolist() for mask in thrice]
    assert [mask.context_ids.tolist() for mask in once] == ids[: len(once)]
    assert name == "causal" or all(a != b for a, b in zip(ids, ids[len(once) :], strict=False))


@pytest.mark.parametrize("name", masking.STRATEGIES)
def test_a_fraction_of_the_targets_is_random(name):
    """It changes neither the context nor the random numbers, and favors no target."""
    frequency = []
    for seed in range(40):
        masks = [sample_masks(name, GRID, 4, generator(seed), target_fraction=fraction) for fraction in (1, 0.3)]
        for whole, part in zip(*masks, strict=True):
            assert torch.equal(whole.context_ids, part.context_ids)
            kept = (whole.target_ids.unsqueeze(2) == part.target_ids.unsqueeze(1)).any(2)
            assert (kept.sum(1) == part.target_ids.shape[1]).all()
            early, late = kept.float().chunk(2, dim=1)
            frequency.append((early.mean(1) - late.mean(1)).mean())
    assert_zero_mean(torch.stack(frequency))


@pytest.mark.parametrize("fraction, kept", [(0.55, 55), (0.07, 7), (0.301, 31), (0.001, 1), (1, 100)])
def test_a_fraction_is_kept_exactly(fraction, kept):
    """In floating point, 0.55 * 100 is a little more than 55."""
    visible = torch.zeros(2, 101, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    mask = masking.split(0, visible, None, generator(), "random", fraction)
    assert mask.target_ids.shape[1] == kept


def test_masks_never_change():
    """The same generator gives the same masks as in earlier versions, so that old runs can be repeated."""
    digest = hashlib.sha256()
    for name, truncation in ALL:
        for mask in sample_masks(name, GRID, BATCH, generator(), truncation):
            digest.update(mask.context_ids.numpy().tobytes() + mask.target_ids.numpy().tobytes())
    assert digest.hexdigest() == "9428e29f22a1f8f894d9c4bedb561734b815c64c2554ff38a000ca2a547b6a63"


@pytest.mark.parametrize("name, grid", [("multiblock", (8, 2, 2)), ("tube", (8, 1, 1)), ("causal", (1, 14, 14))])
def test_too_small_grids_are_refused(name, grid):
    with pytest.raises(ValueError, match="too small"):
        sample_masks(name, grid, 4, generator())
