"""Which tokens the encoder sees (context) and which ones are predicted (targets).

Every strategy draws for all clips of a batch at once and depends on its arguments alone. `sample_masks` picks one by
name. The paper trains with "multiblock" (V-JEPA's short- and long-range masks); the others are its ablation of teacher
masks (table "Teacher masking strategy").

A batch is a rectangle, unions of blocks are not: of most clips some tokens are cut and are neither context nor target.
V-JEPA cuts every clip to the shortest of its batch, in raster order, which throws away the late frames of most clips
(method.md section 3: of the short-range context 37% of the tokens become 23%, and the last time step keeps next to
nothing). Our default keeps a random subset, of a size that depends on the size of the blocks alone: what 95% of all
clips have; the few that have less are drawn again. So no bias in time, the same sizes whatever the micro-batch, hence
in all processes of a step, and only a dozen of them in a run.

Letters: B clips; grid = (t, h, w), the token grid; N = t*h*w; Kc and Kt, context and target tokens kept per clip.
"""

import functools
import math
from typing import NamedTuple

import torch

# Paper table 5 and V-JEPA: number of blocks, area of a block as a share of the frame.
SHORT_RANGE = dict(blocks=8, scale=0.15)
LONG_RANGE = dict(blocks=2, scale=0.7)
ASPECT_RATIO = (0.75, 1.5)
RARE = 0.05  # share of clips that have less context, or fewer targets, than is kept
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


def sample_masks(name, grid, batch, generator, truncation="random", sizes=None):
    """The masks of a batch, a list of one or two `Mask`s, drawn on the generator's device.

    name: a key of STRATEGIES. truncation: "random", or "raster" for V-JEPA's. sizes: a generator for what the batches
    of a step are to share, the sizes of the blocks; `generator` without. ValueError if the grid is too small.
    """
    if truncation not in ("random", "raster"):
        raise ValueError(f"truncation is 'random' or 'raster', not {truncation!r}")
    drawn = STRATEGIES[name](grid, batch, generator, sizes or generator, truncation)
    if any(visible.all() for visible, _ in drawn):
        raise ValueError(f"a grid of {'x'.join(map(str, grid))} tokens is too small: {name} masks hide nothing")
    return [split(visible, counts, generator, truncation) for visible, counts in drawn]


def multiblock(grid, batch, generator, sizes, truncation):
    """V-JEPA's two masks: the union of 8 small blocks, and that of 2 large ones; they last the whole clip.

    Returns a list of (visible (B, N), True where the context is; (Kc, Kt), or None: those of the shortest clip).
    """
    return [_outside_blocks(grid, batch, generator, sizes, truncation, **mask) for mask in (SHORT_RANGE, LONG_RANGE)]


def tube(grid, batch, generator, *_):
    """One mask: a random 10% of the places stay visible, for all time. Returns as multiblock."""
    t, h, w = grid
    order = torch.rand(batch, h * w, generator=generator, device=generator.device).argsort(dim=1)
    rank = order.argsort(dim=1)
    return [((rank < max(1, round(KEEP * h * w))).repeat(1, t), None)]


def tube2(*arguments):
    """Two independent tube masks."""
    return tube(*arguments) + tube(*arguments)


def causal(grid, batch, generator, *_):
    """Two equal masks: the first tenth of the time steps is visible, the future is predicted."""
    t, h, w = grid
    visible = torch.arange(t * h * w, device=generator.device) < max(1, round(KEEP * t)) * h * w
    return [(visible.expand(batch, -1), None)] * 2


STRATEGIES = {"multiblock": multiblock, "tube": tube, "tube2": tube2, "causal": causal}
NUM_MASKS = {"multiblock": 2, "tube": 1, "tube2": 2, "causal": 2}


def _block_size(h, w, scale, generator):
    """Rows and columns of a block; one size for a batch, as in V-JEPA."""
    low, high = ASPECT_RATIO
    aspect = low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()
    area = int(h * w * scale)
    return min(h, round(math.sqrt(area * aspect))), min(w, round(math.sqrt(area / aspect)))


def _outside_blocks(grid, batch, generator, sizes, truncation, blocks, scale):
    """As multiblock, for one mask: True outside the union of `blocks` random rectangles."""
    t, h, w = grid
    rows, cols = _block_size(h, w, scale, sizes)
    if rows * cols == 0 or (rows == h and cols == w):
        raise ValueError(f"a frame of {h}x{w} tokens is too small for multi-block masks (a block of {rows}x{cols})")
    frame = h, w, rows, cols, blocks
    fewest, most = (1, h * w) if truncation == "raster" else _usual_areas(*frame)
    visible = _draw_blocks(*frame, batch, generator)
    while (rare := (visible.sum(1) < fewest) | (visible.sum(1) > most)).any():
        visible = torch.where(rare[:, None], _draw_blocks(*frame, batch, generator), visible)
    return visible.repeat(1, t), None if truncation == "raster" else (t * fewest, t * (h * w - most))


def _draw_blocks(h, w, rows, cols, blocks, batch, generator):
    """(B, h*w) True outside of `blocks` rectangles of rows x cols, anywhere in the frame."""
    device = generator.device
    top = torch.randint(h - rows + 1, (batch, blocks, 1), generator=generator, device=device)
    left = torch.randint(w - cols + 1, (batch, blocks, 1), generator=generator, device=device)
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    in_rows = (y >= top) & (y < top + rows)  # (B, blocks, h)
    in_cols = (x >= left) & (x < left + cols)  # (B, blocks, w)
    return ~(in_rows[..., :, None] & in_cols[..., None, :]).any(1).flatten(1)


@functools.cache
def _usual_areas(h, w, rows, cols, blocks):
    """(fewest, most) visible places of a frame: all but a RARE share of clips have as many, at either end."""
    areas = _draw_blocks(h, w, rows, cols, blocks, 4000, torch.Generator().manual_seed(0)).sum(1)
    areas = areas[areas > 0].sort().values.tolist()
    rare = round(RARE * len(areas))
    return areas[rare], areas[-1 - rare]


def split(visible, counts, generator, truncation):
    """Boolean masks (B, N), True where visible -> `Mask`, cut to the given counts, or to the shortest of the batch."""
    N = visible.shape[1]
    if truncation == "random":
        order = torch.rand(visible.shape, generator=generator, device=visible.device)
    else:
        order = torch.arange(N, device=visible.device).expand_as(visible) / N
    ids, lost = [], []
    for i, wanted in enumerate((visible, ~visible)):
        count = wanted.sum(1)
        keep = counts[i] if counts else int(count.min())
        first = torch.where(wanted, order, 2.0).topk(keep, dim=1, largest=False, sorted=False).indices
        ids.append(first.sort(dim=1).values)
        lost.append(count - keep)
    return Mask(*ids, *lost)
