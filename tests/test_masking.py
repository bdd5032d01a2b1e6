"""The masks have V-JEPA's distributions, lose no token silently, and are cut without its bias."""

import math
from collections import Counter

import pytest
import torch

import masking
from masking import LONG_RANGE, SHORT_RANGE, sample_masks

GRID, BATCH = (8, 14, 14), 24
ALL = [(name, truncation) for name in masking.STRATEGIES for truncation in ("random", "raster")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks_hide(frame, clips, rng, truncation="raster", **mask):
    """(clips, h*w) True in blocks; "raster": every clip as it was drawn."""
    return ~masking._outside_blocks((1, *frame), clips, rng, rng, truncation, **mask)[0]


def strategy(name, grid, batch, seed=0, truncation="random"):
    rng = generator(seed)
    return [visible for visible, _ in masking.STRATEGIES[name].draw(grid, batch, rng, rng, truncation)]


def is_context(mask, grid):
    """(B, t, h, w) bool: what is left as context after the cut."""
    kept = torch.zeros(len(mask.context_ids), math.prod(grid), dtype=torch.bool)
    return kept.scatter(1, mask.context_ids, True).unflatten(1, grid)


def assert_zero_mean(x, sigmas=5):
    """Every column of x (samples, ...) has mean 0, within `sigmas` standard errors (the samples are independent)."""
    error = x.std(0) / math.sqrt(len(x))
    assert (x.mean(0).abs() <= sigmas * error + 1e-9).all(), (x.mean(0).abs() / error).max()


# ---------------------------------------------------------------------------------------------------------------------
# blocks


@pytest.mark.parametrize("frame", [(14, 14), (10, 24)])
@pytest.mark.parametrize("scale", [SHORT_RANGE["scale"], LONG_RANGE["scale"]])
def test_block_sizes(frame, scale):
    """method.md section 3: n = int(h w scale); rows round(sqrt(n a)), columns round(sqrt(n / a)), a uniform."""
    h, w = frame
    n, draws, rng = int(h * w * scale), 3000, generator()
    found = Counter()
    for _ in range(draws):
        hidden = blocks_hide(frame, 1, rng, blocks=1, scale=scale).view(h, w)
        rows, cols = hidden.any(1).sum().item(), hidden.any(0).sum().item()
        assert hidden.sum() == rows * cols  # one rectangle
        found[rows, cols] += 1
    aspects = [0.75 + 0.75 * (i + 0.5) / 20000 for i in range(20000)]
    expected = Counter((min(h, round(math.sqrt(n * a))), min(w, round(math.sqrt(n / a)))) for a in aspects)
    assert found.keys() <= expected.keys()
    for size, count in expected.items():
        p = count / len(aspects)
        assert abs(found[size] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-3, size


def test_block_places_are_uniform():
    clips = 20_000
    hidden = blocks_hide((9, 12), clips, generator(), blocks=1, scale=0.15).view(clips, 9, 12)
    for line in (hidden.any(2), hidden.any(1)):  # rows, columns
        room = line.shape[1] - line[0].sum().item() + 1
        first = line.int().argmax(1)
        assert first.max() == room - 1
        assert_zero_mean(torch.nn.functional.one_hot(first, room).float() - 1 / room)


@pytest.mark.parametrize("mask", [SHORT_RANGE, LONG_RANGE])
def test_union_of_blocks_and_one_size_per_batch(mask):
    """A place is hidden as often as the stated number of blocks of the batch's size hide it."""
    one = blocks_hide((14, 14), 4000, generator(), **(mask | dict(blocks=1)))
    many = blocks_hide((14, 14), 4000, generator(), **mask)  # the same seed: the same size
    assert one.sum(1).unique().numel() == 1
    p = one.float().mean(0)
    expected = 1 - (1 - p) ** mask["blocks"]
    assert (many.float().mean(0) - expected).abs().max() < 0.06  # 5 standard errors of 4000 clips are 0.04


def test_masks_last_the_whole_clip_before_the_cut():
    for name in ("multiblock", "tube", "tube2"):
        for visible in strategy(name, GRID, BATCH):
            assert (visible.view(BATCH, 8, 196) == visible.view(BATCH, 8, 196)[:, :1]).all()


# ---------------------------------------------------------------------------------------------------------------------
# what is left of them


@pytest.fixture(scope="module", params=["random", "raster"])
def drawn(request):
    """250 batches of the two multi-block masks: (truncation, [[short, long], ...])."""
    rng = generator(1)
    return request.param, [sample_masks("multiblock", GRID, BATCH, rng, request.param) for _ in range(250)]


SHARES = {  # of the context before and after the cut, of the targets lost; raster: method.md section 3
    "raster": [(0.37, 0.23, 0.23), (0.19, 0.065, 0.13)],
    "random": [(0.37, 0.255, 0.19), (0.195, 0.072, 0.12)],  # half as many clips as RARE says have little context
}


@pytest.mark.parametrize("i", [0, 1])
def test_context_shares(drawn, i):
    """250 batches: the standard errors are below 0.004, the figures are rounded to 0.005."""
    (before, after, target_loss), masks = SHARES[drawn[0]][i], [pair[i] for pair in drawn[1]]
    kept = torch.tensor([m.context_ids.shape[1] for m in masks]) / 1568
    whole = torch.stack([m.context_ids.shape[1] + m.context_lost.float().mean() for m in masks]) / 1568
    targets = torch.tensor([m.target_ids.shape[1] for m in masks])
    lost = torch.stack([m.target_lost.float().mean() for m in masks])
    assert max(x.std().item() for x in (kept, whole)) / math.sqrt(250) < 0.004
    assert whole.mean().item() == pytest.approx(before, abs=0.015)
    assert kept.mean().item() == pytest.approx(after, abs=0.015)
    assert (lost / (targets + lost)).mean().item() == pytest.approx(target_loss, abs=0.015)


def test_time_steps_of_the_context(drawn):
    """The default keeps all time steps alike, V-JEPA's cut keeps the first of them and loses the last."""
    truncation, batches = drawn
    for i in range(2):
        by_step = torch.cat([is_context(pair[i], GRID).flatten(2).float().sum(2) for pair in batches])  # (clips, t)
        if truncation == "random":
            assert_zero_mean(by_step - by_step.mean(1, keepdim=True))
        else:
            whole = torch.cat([(p[i].context_ids.shape[1] + p[i].context_lost) / 8 for p in batches])
            share = by_step.sum(0) / whole.sum()
            # One clip in 24, the shortest, keeps everything.
            assert share[0] > 0.99 and 1 / 24 * 0.8 < share[7] < 0.06 and (share.diff() <= 0).all()


def test_visibility_is_symmetric(drawn):
    truncation, batches = drawn
    if truncation == "raster":
        pytest.skip("raster order is not symmetric, that is its point")
    for i in range(2):
        places = torch.cat([is_context(pair[i], GRID).float().mean(1) for pair in batches])  # (clips, h, w)
        assert_zero_mean(places - places.flip(1))
        assert_zero_mean(places - places.flip(2))
        assert places.mean(0)[7, 7] < places.mean(0)[0, 0]  # blocks lie inside the frame, so corners are seen most


@pytest.mark.parametrize("name, truncation", ALL)
def test_context_targets_and_lost_are_everything(name, truncation):
    for seed in range(5):
        visible = strategy(name, GRID, BATCH, seed, truncation)
        masks = sample_masks(name, GRID, BATCH, generator(seed), truncation)
        assert len(masks) == len(visible) == masking.STRATEGIES[name].num_masks
        for mask, seen in zip(masks, visible, strict=True):
            wanted = (mask.context_ids, mask.context_lost, seen), (mask.target_ids, mask.target_lost, ~seen)
            for ids, lost, pool in wanted:
                assert ids.dtype == torch.int64 and (ids.diff(dim=1) > 0).all()  # sorted, no repetition
                assert pool.gather(1, ids).all()  # so context and targets are disjoint
                assert (ids.shape[1] + lost == pool.sum(1)).all() and lost.min() >= 0
                assert lost.min() == 0 or (name, truncation) == ("multiblock", "random")


def test_raster_is_v_jepas_cut():
    """A loop that does what V-JEPA's collator does: ids in raster order, cut to the shortest list of the batch."""
    masks = sample_masks("multiblock", GRID, BATCH, generator(3), "raster")
    for mask, visible in zip(masks, strategy("multiblock", GRID, BATCH, 3, "raster"), strict=True):
        for ids, pool in ((mask.context_ids, visible), (mask.target_ids, ~visible)):
            lists = [[n for n, flag in enumerate(clip) if flag] for clip in pool.tolist()]
            shortest = min(map(len, lists))
            assert ids.tolist() == [clip[:shortest] for clip in lists]


def test_tube():
    (mask,), (first, second) = (strategy(name, GRID, 2000) for name in ("tube", "tube2"))
    for visible in (mask, first, second):
        places = visible.view(-1, 8, 196)[:, 0].float()
        assert (places.sum(1) == 20).all()  # round(0.1 * 196)
        assert_zero_mean(places - 20 / 196)
    both = (first & second).view(-1, 8, 196)[:, 0].sum(1).float()
    assert_zero_mean(both - 20 * 20 / 196)  # independent


@pytest.mark.parametrize("t, steps", [(8, 1), (4, 1), (20, 2)])
def test_causal(t, steps):
    first, second = sample_masks("causal", (t, 3, 5), 2, generator())
    assert torch.equal(first.context_ids, torch.arange(steps * 15).expand(2, -1))
    assert torch.equal(first.target_ids, torch.arange(steps * 15, t * 15).expand(2, -1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_sizes_of_a_step_do_not_depend_on_its_clips():
    """Batches of a step, of any size, share the sizes of the blocks and the number of tokens kept; few sizes occur."""
    kept = set()
    for step in range(60):
        of_step = set()
        for batch, seed in ((1, 0), (3, 1), (24, 2)):
            masks = sample_masks("multiblock", GRID, batch, generator(1000 * step + seed), sizes=generator(step))
            of_step.add(tuple((m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks))
        assert len(of_step) == 1
        kept |= of_step
    short, long = ({masks[i] for masks in kept} for i in (0, 1))
    assert 3 <= len(short) <= 5 and 5 <= len(long) <= 9


@pytest.mark.parametrize("mask", [SHORT_RANGE, LONG_RANGE])
def test_only_rare_clips_are_drawn_again(mask):
    """Of the clips as they are drawn, RARE have less context than is kept, and RARE fewer targets, or a tie's worth."""
    for seed in range(4):
        frame = (14, 14), 4000
        as_drawn = blocks_hide(*frame, generator(seed), **mask).sum(1)
        usual = blocks_hide(*frame, generator(seed), "random", **mask).sum(1)
        for rare in (as_drawn < usual.min(), as_drawn > usual.max()):
            assert rare.float().mean() < masking.RARE + 0.02
        assert ((as_drawn <= usual.min()) | (as_drawn >= usual.max())).float().mean() > masking.RARE - 0.02


# ---------------------------------------------------------------------------------------------------------------------
# determinism and limits


@pytest.mark.parametrize("name, truncation", ALL)
def test_the_seed_decides(name, truncation):
    a, b, c = (sample_masks(name, GRID, 4, generator(seed), truncation) for seed in (5, 5, 6))
    assert all(torch.equal(x, y) for m, n in zip(a, b, strict=True) for x, y in zip(m, n, strict=True))
    if name != "causal":
        assert a[0].context_ids.tolist() != c[0].context_ids.tolist()


@pytest.mark.parametrize("name, truncation", ALL)
@pytest.mark.parametrize("grid", [(2, 3, 3), (2, 4, 4), (2, 3, 7), (4, 6, 4)])
def test_small_grids_have_context_and_targets(grid, name, truncation):
    for seed in range(20):
        for mask in sample_masks(name, grid, 64, generator(seed), truncation):
            assert mask.context_ids.shape[1] > 0 and mask.target_ids.shape[1] > 0


@pytest.mark.parametrize(
    "name, grid", [("multiblock", (8, 2, 2)), ("multiblock", (8, 1, 1)), ("tube", (8, 1, 1)), ("causal", (1, 14, 14))]
)
def test_too_small_grids(name, grid):
    with pytest.raises(ValueError, match="too small"):
        sample_masks(name, grid, 4, generator())


def test_unknown_truncation():
    with pytest.raises(ValueError, match="truncation"):
        sample_masks("tube", GRID, 4, generator(), "middle")
