"""Masking strategies: which tokens the encoder sees (context) and which ones the predictor predicts (targets).

The paper trains with "multiblock", V-JEPA's short-range and long-range masks. The other strategies belong to its
ablation of teacher masks (table 15). To add one, write a function and add a row to STRATEGIES.

All clips of a batch must keep equally many tokens, but unions of random blocks differ in size, so most clips drop some
tokens. A dropped token is neither context nor target. V-JEPA cuts every clip to the smallest of its batch, in raster
order, and so drops mostly late frames: of the short-range context it keeps 23% of the tokens out of 37%, and almost
nothing of the last time step (docs/method.md, section 3). We keep a random subset instead. Its size depends only on the
size of the blocks: 95% of all clips have at least that many tokens, and the few that have fewer are redrawn. So no
frame is favored, and all processes of a step get sequences of the same length.

Letters: B clips; grid = (t, h, w), the token grid; N = t*h*w tokens; Kc, Kt context and target tokens kept per clip.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# Paper table 5 and V-JEPA: number of blocks, and the area of a block as a fraction of the frame.
SHORT_RANGE = dict(blocks=8, scale=0.15)
LONG_RANGE = dict(blocks=2, scale=0.7)
ASPECT_RATIO = (0.75, 1.5)
RARE = 0.05  # fraction of clips that are redrawn because their context is too small, and likewise their targets
KEEP = 0.1  # fraction of tokens that the tube and causal strategies leave visible


class Mask(NamedTuple):
    """One mask for each clip of a batch. Ids are sorted; context and targets are disjoint."""

    index: int  # its number in the strategy's list of masks, each of which has its own mask token in the predictor
    context_ids: torch.Tensor  # (B, Kc) int64
    target_ids: torch.Tensor  # (B, Kt) int64

    def to(self, device):
        """Move the ids to a device, without waiting for the work that is queued on it."""
        ids = self.context_ids, self.target_ids
        if torch.device(device).type == "cuda":
            ids = (x.pin_memory() for x in ids)
        return Mask(self.index, *(x.to(device, non_blocking=True) for x in ids))


def sample_masks(
    strategy, grid, batch, generator, truncation="random", sizes=None, masks_per_clip=1, target_fraction=1.0,
    device="cpu",
):  # fmt: skip
    """Draw the masks of a batch and move them to a device: a list with masks_per_clip `Mask`s per mask type.

    strategy: a key of STRATEGIES. truncation: "random", or "raster" for V-JEPA's. generator, sizes: on the CPU; `sizes`
    is for block sizes, which all micro-batches of a step share; default `generator`. target_fraction: the fraction of
    the targets to keep, chosen at random. ValueError if the grid is too small.
    """
    masks = []
    for _ in range(masks_per_clip):
        drawn = STRATEGIES[strategy].draw(grid, batch, generator, sizes or generator, truncation)
        if any(visible.all() for visible, _ in drawn):
            raise ValueError(f"a grid of {'x'.join(map(str, grid))} tokens is too small: {strategy} masks hide nothing")
        for index, (visible, counts) in enumerate(drawn):
            masks.append(split(index, visible, counts, generator, truncation, target_fraction).to(device))
    return masks


# ---------------------------------------------------------------------------------------------------------------------
# Strategies. Each returns a list with one (visible, counts) per mask: visible (B, N) is True at context tokens; counts
# is (Kc, Kt), the tokens to keep per clip, or None to keep as many as the smallest clip of the batch has.


def multiblock(grid, batch, generator, sizes, truncation):
    """V-JEPA: hide the union of 8 small blocks in one mask, of 2 large blocks in the other, in every frame."""
    return [_outside_blocks(grid, batch, generator, sizes, truncation, **mask) for mask in (SHORT_RANGE, LONG_RANGE)]


def tube(grid, batch, generator, *_):
    """One mask: a random 10% of the spatial positions stay visible in every frame."""
    t, h, w = grid
    rank = torch.rand(batch, h * w, generator=generator).argsort(dim=1).argsort(dim=1)
    return [((rank < max(1, round(KEEP * h * w))).repeat(1, t), None)]


def tube2(*arguments):
    """Two independent tube masks."""
    return tube(*arguments) + tube(*arguments)


def causal(grid, batch, generator, *_):
    """Two equal masks: the first tenth of the time steps is visible, the rest is predicted."""
    t, h, w = grid
    visible = torch.arange(t * h * w) < max(1, round(KEEP * t)) * h * w
    return [(visible.expand(batch, -1), None)] * 2


class Strategy(NamedTuple):
    draw: Callable
    num_masks: int  # per clip; the predictor has a mask token for each


STRATEGIES = {
    "multiblock": Strategy(multiblock, 2),
    "tube": Strategy(tube, 1),
    "tube2": Strategy(tube2, 2),
    "causal": Strategy(causal, 2),
}


def _outside_blocks(grid, batch, generator, sizes, truncation, blocks, scale):
    """One multi-block mask: True outside the union of `blocks` random rectangles. Returns (visible, counts)."""
    t, h, w = grid
    low, high = ASPECT_RATIO
    aspect = low + (high - low) * torch.rand((), generator=sizes).item()
    area = int(h * w * scale)  # as in V-JEPA, all clips of a batch share one block size
    rows, cols = min(h, round(math.sqrt(area * aspect))), min(w, round(math.sqrt(area / aspect)))
    frame = h, w, rows, cols, blocks
    fewest, most = (1, h * w) if truncation == "raster" else _usual_areas(*frame)
    visible = _draw_blocks(*frame, batch, generator)
    while (rare := (visible.sum(1) < fewest) | (visible.sum(1) > most)).any():
        visible = torch.where(rare[:, None], _draw_blocks(*frame, batch, generator), visible)
    return visible.repeat(1, t), None if truncation == "raster" else (t * fewest, t * (h * w - most))


def _draw_blocks(h, w, rows, cols, blocks, batch, generator):
    """(B, h*w), True outside `blocks` rectangles of rows x cols at random positions in the frame."""
    top = torch.randint(h - rows + 1, (batch, blocks, 1), generator=generator)
    left = torch.randint(w - cols + 1, (batch, blocks, 1), generator=generator)
    y, x = torch.arange(h), torch.arange(w)
    in_rows = (y >= top) & (y < top + rows)  # (B, blocks, h)
    in_cols = (x >= left) & (x < left + cols)  # (B, blocks, w)
    return ~(in_rows[..., :, None] & in_cols[..., None, :]).any(1).flatten(1)


@functools.cache
def _usual_areas(h, w, rows, cols, blocks):
    """(fewest, most) visible positions of a frame, leaving out the RARE smallest and the RARE largest fraction."""
    areas = _draw_blocks(h, w, rows, cols, blocks, 4000, torch.Generator().manual_seed(0)).sum(1)
    areas = areas[areas > 0].sort().values.tolist()
    rare = round(RARE * len(areas))
    return areas[rare], areas[-1 - rare]


def split(index, visible, counts, generator, truncation, target_fraction):
    """Turn visible (B, N) into a `Mask` that keeps `counts` (Kc, Kt) tokens of each clip; None: the smallest clip's.

    Of the targets it keeps only target_fraction, rounded up.
    """
    N = visible.shape[1]
    order = torch.rand(visible.shape, generator=generator) if truncation == "random" else torch.arange(N) / N
    ids = []
    for i, (chosen, fraction) in enumerate(((visible, 1.0), (~visible, target_fraction))):
        count = counts[i] if counts else int(chosen.sum(1).min())
        keep = math.ceil(fraction * count - 1e-9)  # 55 of 100 at 0.55
        first = torch.where(chosen, order, 2.0).topk(keep, dim=1, largest=False, sorted=False).indices
        ids.append(first.sort(dim=1).values)
    return Mask(index, *ids)
