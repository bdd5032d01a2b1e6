"""Masks have V-JEPA's distributions, account for every token, and are truncated without its bias to early frames."""

import hashlib
import math
from collections import Counter

import pytest
import torch

import masking
from masking import LONG_RANGE, SHORT_RANGE, sample_masks

GRID, BATCH = (8, 14, 14), 24
STRATEGIES_AND_TRUNCATIONS = [(name, truncation) for name in masking.STRATEGIES for truncation in ("random", "raster")]
every_strategy = pytest.mark.parametrize("name, truncation", STRATEGIES_AND_TRUNCATIONS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_by_blocks(frame, clips, rng, truncation="raster", **mask):
    """(clips, h*w), True at tokens inside blocks. With "raster", no clip is redrawn."""
    return ~masking._outside_blocks((1, *frame), clips, rng, rng, truncation, **mask)[0]


def draw_visible(name, grid, batch, seed=0, truncation="random"):
    """The visible tokens of each mask before truncation: a list of (B, N) bool."""
    rng = generator(seed)
    return [visible for visible, _ in masking.STRATEGIES[name].draw(grid, batch, rng, rng, truncation)]


def is_context(mask, grid):
    """(B, t, h, w) bool: the context tokens that are kept."""
    kept = torch.zeros(len(mask.context_ids), math.prod(grid), dtype=torch.bool)
    return kept.scatter(1, mask.context_ids, True).unflatten(1, grid)


def assert_zero_mean(x, sigmas=5):
    """Check that the mean of x (samples, ...) over independent samples is 0, within `sigmas` standard errors."""
    error = x.std(0) / math.sqrt(len(x))
    assert (x.mean(0).abs() <= sigmas * error + 1e-9).all(), (x.mean(0).abs() / error).max()


# ---------------------------------------------------------------------------------------------------------------------
# blocks


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


def test_block_positions_are_uniform():
    clips = 20_000
    hidden = hidden_by_blocks((9, 12), clips, generator(), blocks=1, scale=0.15).view(clips, 9, 12)
    for line in (hidden.any(2), hidden.any(1)):  # rows, columns
        positions = line.shape[1] - line[0].sum().item() + 1
        first = line.int().argmax(1)
        assert first.max() == positions - 1
        assert_zero_mean(torch.nn.functional.one_hot(first, positions).float() - 1 / positions)


@pytest.mark.parametrize("mask", [SHORT_RANGE, LONG_RANGE])
def test_a_mask_is_the_union_of_equally_large_blocks(mask):
    """The probability that a token is hidden is that of the given number of independent blocks of the same size."""
    one = hidden_by_blocks((14, 14), 4000, generator(), **(mask | dict(blocks=1)))
    many = hidden_by_blocks((14, 14), 4000, generator(), **mask)  # same seed, so same size
    assert one.sum(1).unique().numel() == 1
    p = one.float().mean(0)
    expected = 1 - (1 - p) ** mask["blocks"]
    assert (many.float().mean(0) - expected).abs().max() < 0.06  # 5 standard errors of 4000 clips are 0.04


# ---------------------------------------------------------------------------------------------------------------------
# truncation


@pytest.fixture(scope="module", params=["random", "raster"])
def drawn(request):
    """(truncation, [[short-range mask, long-range mask], ...]) of 250 batches."""
    rng = generator(1)
    return request.param, [sample_masks("multiblock", GRID, BATCH, rng, request.param) for _ in range(250)]


# Fractions, per mask: context of all tokens before and after truncation, and dropped targets of all targets. Those of
# "raster" are in docs/method.md, section 3.
FRACTIONS = {
    "raster": [(0.37, 0.23, 0.23), (0.19, 0.065, 0.13)],
    "random": [(0.37, 0.255, 0.19), (0.195, 0.072, 0.12)],
}


@pytest.mark.parametrize("i", [0, 1])
def test_fractions_of_tokens_before_and_after_truncation(drawn, i):
    """The standard errors of 250 batches are below 0.004; the expected values are rounded to 0.005."""
    truncation, batches = drawn
    (before, after, target_loss), masks = FRACTIONS[truncation][i], [pair[i] for pair in batches]
    kept = torch.tensor([m.context_ids.shape[1] for m in masks]) / 1568
    context = torch.stack([m.context_ids.shape[1] + m.context_lost.float().mean() for m in masks]) / 1568
    targets = torch.tensor([m.target_ids.shape[1] for m in masks])
    lost = torch.stack([m.target_lost.float().mean() for m in masks])
    assert max(x.std().item() for x in (kept, context)) / math.sqrt(250) < 0.004
    assert context.mean().item() == pytest.approx(before, abs=0.015)
    assert kept.mean().item() == pytest.approx(after, abs=0.015)
    assert (lost / (targets + lost)).mean().item() == pytest.approx(target_loss, abs=0.015)


def test_only_raster_truncation_favors_early_frames(drawn):
    """Random truncation keeps all time steps equally often; V-JEPA's keeps the first and drops most of the last."""
    truncation, batches = drawn
    for i in range(2):
        by_step = torch.cat([is_context(pair[i], GRID).flatten(2).float().sum(2) for pair in batches])  # (clips, t)
        if truncation == "random":
            assert_zero_mean(by_step - by_step.mean(1, keepdim=True))
        else:
            before = torch.cat([(p[i].context_ids.shape[1] + p[i].context_lost) / 8 for p in batches])
            kept = by_step.sum(0) / before.sum()  # fraction of each time step
            # One clip in 24, the one with the smallest context, keeps everything.
            assert kept[0] > 0.99 and 1 / 24 * 0.8 < kept[7] < 0.06 and (kept.diff() <= 0).all()


@every_strategy
def test_every_token_is_context_or_target_or_counted_as_lost(name, truncation):
    for seed in range(5):
        visible = draw_visible(name, GRID, BATCH, seed, truncation)
        masks = sample_masks(name, GRID, BATCH, generator(seed), truncation)
        assert len(masks) == len(visible) == masking.STRATEGIES[name].num_masks
        for mask, shown in zip(masks, visible, strict=True):
            parts = (mask.context_ids, mask.context_lost, shown), (mask.target_ids, mask.target_lost, ~shown)
            for ids, lost, pool in parts:
                assert ids.dtype == torch.int64 and (ids.diff(dim=1) > 0).all()  # sorted, without repetitions
                assert pool.gather(1, ids).all()  # so context and targets are disjoint
                assert (ids.shape[1] + lost == pool.sum(1)).all() and lost.min() >= 0
                assert lost.min() == 0 or (name, truncation) == ("multiblock", "random")


def test_raster_truncation_is_v_jepas():
    """V-JEPA's collator takes the ids in raster order and cuts them to the shortest list of the batch."""
    masks = sample_masks("multiblock", GRID, BATCH, generator(3), "raster")
    for mask, visible in zip(masks, draw_visible("multiblock", GRID, BATCH, 3, "raster"), strict=True):
        for ids, pool in ((mask.context_ids, visible), (mask.target_ids, ~visible)):
            lists = [[n for n, flag in enumerate(clip) if flag] for clip in pool.tolist()]
            shortest = min(map(len, lists))
            assert ids.tolist() == [clip[:shortest] for clip in lists]


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
    first, second = sample_masks("causal", (t, 3, 5), 2, generator())
    assert torch.equal(first.context_ids, torch.arange(steps * 15).expand(2, -1))
    assert torch.equal(first.target_ids, torch.arange(steps * 15, t * 15).expand(2, -1))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_all_micro_batches_of_a_step_keep_equally_many_tokens():
    """Whatever their size. Over many steps, only a few different numbers of tokens occur."""
    kept = set()
    for step in range(60):
        kept_in_step = set()
        for batch, seed in ((1, 0), (3, 1), (24, 2)):
            masks = sample_masks("multiblock", GRID, batch, generator(1000 * step + seed), sizes=generator(step))
            kept_in_step.add(tuple((m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks))
        assert len(kept_in_step) == 1
        kept |= kept_in_step
    short, long = ({masks[i] for masks in kept} for i in (0, 1))
    assert 3 <= len(short) <= 5 and 5 <= len(long) <= 9


@pytest.mark.parametrize("mask", [SHORT_RANGE, LONG_RANGE])
def test_only_rare_clips_are_redrawn(mask):
    """RARE is the fraction of clips with too little context, and also of those with too few targets, up to ties."""
    for seed in range(4):
        before = hidden_by_blocks((14, 14), 4000, generator(seed), **mask).sum(1)
        after = hidden_by_blocks((14, 14), 4000, generator(seed), "random", **mask).sum(1)
        for rare in (before < after.min(), before > after.max()):
            assert rare.float().mean() < masking.RARE + 0.02
        assert ((before <= after.min()) | (before >= after.max())).float().mean() > masking.RARE - 0.02


# ---------------------------------------------------------------------------------------------------------------------
# several masks per clip, fewer targets


def same_mask(a, b):
    return a.index == b.index and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


@every_strategy
def test_masks_per_clip_are_independent(name, truncation):
    once, thrice = (
        sample_masks(name, GRID, 4, generator(), truncation, generator(1), masks_per_clip=count) for count in (1, 3)
    )
    types = masking.STRATEGIES[name].num_masks
    assert [mask.index for mask in thrice] == 3 * list(range(types)) and len(once) == types
    assert all(same_mask(a, b) for a, b in zip(once, thrice[:types], strict=True))
    if name != "causal":
        assert not any(same_mask(a, b) for a, b in zip(thrice, thrice[types:], strict=False))


@pytest.mark.parametrize("name", masking.STRATEGIES)
def test_a_fraction_of_the_targets_is_random(name):
    """It changes neither the context nor the random numbers, and favors no target."""
    frequency = []
    for seed in range(40):
        for all_of, some_of in zip(
            *(sample_masks(name, GRID, 4, generator(seed), target_fraction=f) for f in (1, 0.3)), strict=True
        ):
            assert torch.equal(all_of.context_ids, some_of.context_ids)
            assert some_of.target_ids.shape[1] == math.ceil(0.3 * all_of.target_ids.shape[1])
            kept = (all_of.target_ids.unsqueeze(2) == some_of.target_ids.unsqueeze(1)).any(2)
            assert (kept.sum(1) == some_of.target_ids.shape[1]).all()
            assert torch.equal(some_of.target_lost - all_of.target_lost, (~kept).sum(1))
            early, late = kept.float().chunk(2, dim=1)
            frequency.append((early.mean(1) - late.mean(1)).mean())
    assert_zero_mean(torch.stack(frequency))


@pytest.mark.parametrize("fraction, kept", [(0.55, 55), (0.07, 7), (0.301, 31), (0.001, 1), (1, 100)])
def test_a_fraction_is_kept_exactly(fraction, kept):
    """In floating point, 0.55 * 100 is a little more than 55."""
    visible = torch.zeros(2, 101, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    mask = masking.split(0, visible, None, generator(), "random", fraction)
    assert mask.target_ids.shape[1] == kept and (mask.target_lost == 100 - kept).all()


# ---------------------------------------------------------------------------------------------------------------------
# determinism and limits


def test_masks_never_change():
    """The same generator gives the same masks as in earlier versions, so that old runs can be repeated."""
    digest = hashlib.sha256()
    for name, truncation in STRATEGIES_AND_TRUNCATIONS:
        for mask in sample_masks(name, GRID, BATCH, generator(), truncation):
            for ids in (mask.context_ids, mask.target_ids):
                digest.update(ids.numpy().tobytes())
    assert digest.hexdigest() == "9428e29f22a1f8f894d9c4bedb561734b815c64c2554ff38a000ca2a547b6a63"


@every_strategy
@pytest.mark.parametrize("grid", [(2, 3, 3), (2, 4, 4), (2, 3, 7), (4, 6, 4)])
def test_small_grids_have_context_and_targets(grid, name, truncation):
    for seed in range(20):
        for mask in sample_masks(name, grid, 64, generator(seed), truncation):
            assert mask.context_ids.shape[1] > 0 and mask.target_ids.shape[1] > 0


@pytest.mark.parametrize(
    "name, grid", [("multiblock", (8, 2, 2)), ("multiblock", (8, 1, 1)), ("tube", (8, 1, 1)), ("causal", (1, 14, 14))]
)
def test_too_small_grids_are_refused(name, grid):
    with pytest.raises(ValueError, match="too small"):
        sample_masks(name, grid, 4, generator())
