"""Which tokens the encoder sees (context) and which ones are predicted (targets).

Every strategy is a pure function of (grid, batch, generator) and draws for all clips of a batch at once. `sample_masks`
picks one by name. The paper trains with "multiblock" (V-JEPA's short- and long-range masks); the others are its
ablation of teacher masks (table "Teacher masking strategy").

Letters: B clips; grid = (t, h, w), the token grid; N = t*h*w; Kc and Kt, context and target tokens kept per clip.
"""

import math
from typing import NamedTuple

import torch

# Paper table 5 and V-JEPA: number of blocks, area of a block as a share of the frame.
SHORT_RANGE = dict(blocks=8, scale=0.15)
LONG_RANGE = dict(blocks=2, scale=0.7)
ASPECT_RATIO = (0.75, 1.5)
KEEP = 0.1  # share of tokens that the tube and causal ablations leave visible


class Mask(NamedTuple):
    """One mask for each clip of a batch. Ids are sorted and disjoint."""

    context_ids: torch.Tensor  # (B, Kc) int64
    target_ids: torch.Tensor  # (B, Kt) int64
    context_lost: torch.Tensor  # (B,) context tokens cut because the clips of a batch must have equally many
    target_lost: torch.Tensor  # (B,) target tokens cut, likewise; a token that is cut is neither context nor target

    def to(self, device):
        # From pinned memory, or the copy would wait for what the GPU is doing.
        pinned = (x.pin_memory() if torch.device(device).type == "cuda" else x for x in self)
        return Mask(*(x.to(device, non_blocking=True) for x in pinned))


def sample_masks(name, grid, batch, generator, truncation="random"):
    """The masks of a batch, a list of one or two `Mask`s, drawn on the generator's device.

    name: a key of STRATEGIES; truncation: "random" or "raster" (V-JEPA's), see `split`.
    ValueError if the grid is too small for the strategy.
    """
    visible = STRATEGIES[name](grid, batch, generator)
    if any(mask.all() for mask in visible):
        raise ValueError(f"a grid of {'x'.join(map(str, grid))} tokens is too small: {name} masks hide nothing")
    return [split(mask, generator, truncation) for mask in visible]


def multiblock(grid, batch, generator):
    """V-JEPA's two masks: the union of 8 small blocks, and that of 2 large ones; they last the whole clip.

    Returns two boolean tensors (B, N), True where the context is.
    """
    return [_outside_blocks(grid, batch, generator, **mask) for mask in (SHORT_RANGE, LONG_RANGE)]


def tube(grid, batch, generator):
    """One mask: a random 10% of the places stay visible, for all time. Returns one boolean tensor (B, N)."""
    t, h, w = grid
    order = torch.rand(batch, h * w, generator=generator, device=generator.device).argsort(dim=1)
    rank = order.argsort(dim=1)
    return [(rank < max(1, round(KEEP * h * w))).repeat(1, t)]


def tube2(grid, batch, generator):
    """Two independent tube masks."""
    return tube(grid, batch, generator) + tube(grid, batch, generator)


def causal(grid, batch, generator):
    """Two equal masks: the first tenth of the time steps is visible, the future is predicted."""
    t, h, w = grid
    visible = torch.arange(t * h * w, device=generator.device) < max(1, round(KEEP * t)) * h * w
    return [visible.expand(batch, -1)] * 2


STRATEGIES = {"multiblock": multiblock, "tube": tube, "tube2": tube2, "causal": causal}
NUM_MASKS = {"multiblock": 2, "tube": 1, "tube2": 2, "causal": 2}


def _block_size(h, w, scale, generator):
    """Rows and columns of a block; one size for a batch, as in V-JEPA."""
    low, high = ASPECT_RATIO
    aspect = low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()
    area = int(h * w * scale)
    return min(h, round(math.sqrt(area * aspect))), min(w, round(math.sqrt(area / aspect)))


def _outside_blocks(grid, batch, generator, blocks, scale):
    """(B, N) True outside the union of `blocks` random rectangles; clips left without context are drawn again."""
    t, h, w = grid
    device = generator.device
    rows, cols = _block_size(h, w, scale, generator)
    if rows * cols == 0 or (rows == h and cols == w):
        raise ValueError(f"a frame of {h}x{w} tokens is too small for multi-block masks (a block of {rows}x{cols})")

    def draw():
        top = torch.randint(h - rows + 1, (batch, blocks, 1), generator=generator, device=device)
        left = torch.randint(w - cols + 1, (batch, blocks, 1), generator=generator, device=device)
        y, x = torch.arange(h, device=device), torch.arange(w, device=device)
        in_rows = (y >= top) & (y < top + rows)  # (B, blocks, h)
        in_cols = (x >= left) & (x < left + cols)  # (B, blocks, w)
        return ~(in_rows[..., :, None] & in_cols[..., None, :]).any(1).flatten(1)  # (B, h*w)

    visible = draw()
    while (empty := ~visible.any(1, keepdim=True)).any():
        visible = torch.where(empty, draw(), visible)
    return visible.repeat(1, t)


def split(visible, generator, truncation):
    """Boolean masks (B, N), True where visible -> `Mask`, every clip cut to the smallest context and target count.

    A batch is a rectangle, unions of blocks are not. V-JEPA keeps the first ids in "raster" order, which throws away
    the late frames of most clips (method.md section 3: of the short-range context 37% of the tokens become 23%, and the
    last time step keeps next to nothing). "random" cuts as many tokens, but anywhere.
    """
    if truncation not in ("random", "raster"):
        raise ValueError(f"truncation is 'random' or 'raster', not {truncation!r}")
    N = visible.shape[1]
    if truncation == "random":
        order = torch.rand(visible.shape, generator=generator, device=visible.device)
    else:
        order = torch.arange(N, device=visible.device).expand_as(visible) / N
    ids, lost = [], []
    for wanted in (visible, ~visible):
        count = wanted.sum(1)
        keep = int(count.min())
        first = torch.where(wanted, order, 2.0).topk(keep, dim=1, largest=False).indices
        ids.append(first.sort(dim=1).values)
        lost.append(count - keep)
    return Mask(*ids, *lost)
