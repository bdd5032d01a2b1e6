"""Pictures of what networks see: the pixels that a teacher fills in, and features as colors.

These are commands of tools/analyze.py: `python -m tools.analyze picture` and `features`.

Letters in shape comments: B clips, T frames, H and W pixels, N tokens of a clip, P values in a tubelet, D width;
(t, h, w) the token grid.
"""

from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

import data
from cli import fail
from masking import sample_masks
from model import load_checkpoint, load_encoder, load_predictor, tubelets, untubelets
from training import generator

plt.switch_backend("Agg")  # draw into files, without a display

CLIP_SEED = 2**31 + 4  # seed of built-in clips that no training run and no probe uses
MASK = 17  # of `picture`: a draw that leaves half of a 4x4 grid visible
PNG_COLUMNS = 16  # of a picture that shows time from left to right
DENSE = 28  # rows and columns, at least, of a map of features


def load_clips(args, config, first, count):
    """Load clips number first to first + count - 1 of --data, or built-in ones: (count, 3, T, H, W) uint8.

    config: of the encoder that gets the clips, for their size.
    """
    num_frames, resolution = config["num_frames"], config["resolution"]
    numbers = range(first, first + count)
    if not args.data:
        return data.Synthetic(num_frames, resolution, CLIP_SEED).batch(numbers).clips
    source = data.Manifest(args.data, num_frames, args.frame_step, resolution, train=False)
    return source.batch([n % len(source) for n in numbers]).clips


def save(figure, path):
    """Write a figure to a file, and print the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(path)


def draw(videos, path):
    """Draw videos of the same clips below each other: [(label, (B, 3, T, H, W) uint8), ...]. T, H and W may differ.

    A .png shows each clip's frames from left to right. A .gif or .mp4 plays the clips side by side. Without a suffix,
    write a .png and a .gif.
    """
    if not path.suffix:
        draw(videos, path.with_suffix(".png"))
        draw(videos, path.with_suffix(".gif"))
    elif path.suffix in (".gif", ".mp4"):
        write_movie(render(videos), path)
    else:
        count = min(max(2, PNG_COLUMNS // len(videos[0][1])), num_frames(videos))
        save(show(videos, range(count), count), path)


def num_frames(videos):
    """The number of frames of the longest video."""
    return max(video.shape[2] for _, video in videos)


def show(videos, frames, count):
    """Draw a row for each video: its clips from left to right, and of each clip one or more frames.

    videos: see `draw`; short and small ones are stretched. frames: indices into `count` evenly spaced frames.
    """
    size = max(video.shape[-1] for _, video in videos)
    gap, rows = size // 16 + 1, []
    for _, video in videos:
        cells = video[:, :, [i * video.shape[2] // count for i in frames]].transpose(1, 2)  # (B, frames, 3, H, W)
        cells = F.interpolate(cells.flatten(0, 1).float(), (size, size)).unflatten(0, cells.shape[:2])
        cells = F.pad(cells, (0, gap, 0, gap), value=255).permute(3, 0, 1, 4, 2).flatten(2, 3)  # (H, B, columns, 3)
        rows.append(F.pad(cells, (0, 0, 0, 2 * gap), value=255).flatten(1, 2))  # a wider gap between clips
    image = torch.cat(rows)[:-gap, : -3 * gap].byte().numpy()
    scale = min(1.3, 9 / (len(frames) * len(videos[0][1]))) / size  # inches per pixel
    height, width = image.shape[0] * scale, image.shape[1] * scale
    total = width + 1.5, height + 0.1  # with room for the labels
    figure = plt.figure(figsize=total)
    ax = figure.add_axes((1.45 / total[0], 0.05 / total[1], width / total[0], height / total[1]))
    ax.imshow(image, interpolation="nearest")
    ax.set_yticks([size / 2 + i * (size + gap) for i in range(len(videos))], [label for label, _ in videos], fontsize=9)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# what the teacher fills in


@torch.no_grad()
def picture(args):
    """Draw SALT at work: video clips, what a teacher sees of them, what it fills in, and the features of students.

    The teacher sees a short-range mask of its training, and predicts every hidden tubelet. It predicts normalized
    pixels; brightness and contrast are fitted to what it sees (`join`), never taken from the hidden pixels.
    Features and files: see `features`.
    """
    teacher, *students = args.runs
    checkpoint = load_checkpoint(teacher)
    if checkpoint["kind"] != "teacher":
        fail(f"{teacher} holds {checkpoint['kind']} weights; only a teacher predicts pixels")
    encoder, predictor = load_encoder(teacher), load_predictor(teacher)
    clips = load_clips(args, encoder.config, args.first, args.clips)
    x = data.normalize(clips, "cpu")
    mask = sample_masks(checkpoint["args"]["mask"], encoder.grid(x), len(x), generator("picture", MASK), "random")[0]
    seen, filled = fill_in(encoder, predictor, x, mask.context_ids)
    videos = [("video clip", clips), ("what the\nteacher sees", seen), ("what the\nteacher fills in", filled)]
    draw(videos + feature_videos(students, x), args.save)


def fill_in(encoder, predictor, x, context_ids):
    """Predict what is hidden of normalized clips x: (seen, seen and predicted), (B, 3, T, H, W) uint8; hidden: gray."""
    grid = encoder.grid(x)
    pixels = tubelets(x, encoder.tubelet_size, encoder.patch_size)  # (B, N, P)
    hidden = torch.ones(pixels.shape[:2], dtype=torch.bool).scatter(1, context_ids, False)
    target_ids = hidden.nonzero()[:, 1].view(len(x), -1)
    pattern = torch.zeros_like(pixels)
    pattern[hidden] = predictor(encoder(x, context_ids), context_ids, target_ids, grid, 0).flatten(0, 1)
    filled = join(pixels, pattern, hidden, encoder, grid)
    seen, filled = (untubelets(p, grid, encoder.tubelet_size, encoder.patch_size) for p in (pixels, filled))
    gray = untubelets(hidden[..., None].expand_as(pixels), grid, encoder.tubelet_size, encoder.patch_size)
    return data.denormalize(seen).masked_fill(gray, 128), data.denormalize(filled)


def join(pixels, pattern, hidden, encoder, grid):
    """Fill hidden tubelets of `pixels` with `pattern`, scaled and shifted so that tubelets join without edges.

    A teacher predicts pixels that are normalized per tubelet and color, so it leaves their mean and standard deviation
    open. These minimize the squared differences across the borders between tubelets. Logarithms of standard deviations
    are pulled toward the mean of the visible tubelets'. The true ones would give away what is hidden.

    pixels, pattern: (B, N, P). hidden: (B, N) bool. Returns (B, N, P).
    """
    tubelet = encoder.tubelet_size, encoder.patch_size
    pixels, pattern, hidden = pixels.unflatten(-1, (3, -1)), pattern.unflatten(-1, (3, -1)), hidden[..., None, None]
    visible = ~hidden / (~hidden).sum(1, keepdim=True)  # weights (B, N, 1, 1) of a mean
    mean = (pixels.mean(-1, keepdim=True) * visible).sum(1, keepdim=True).repeat(1, pixels.shape[1], 1, 1)
    usual = (pixels.std(-1, keepdim=True) * visible).sum(1, keepdim=True)  # (B, 1, 3, 1)
    log_ratio = torch.zeros_like(mean)  # of a tubelet's standard deviation to `usual`
    for x in (mean, log_ratio):
        x.requires_grad_()
    optimizer = torch.optim.LBFGS([mean, log_ratio], max_iter=200, line_search_fn="strong_wolfe")

    def joined():
        return torch.where(hidden, pattern * usual * log_ratio.exp() + mean, pixels).flatten(2)

    @torch.enable_grad()
    def loss():
        optimizer.zero_grad()
        clips, total = untubelets(joined(), grid, *tubelet), log_ratio.square().sum()
        for dim, size in ((2, tubelet[0]), (3, tubelet[1]), (4, tubelet[1])):
            differences = clips.diff(dim=dim)
            borders = torch.arange(size - 1, differences.shape[dim], size)
            total = total + differences.index_select(dim, borders).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return joined().detach()


# ---------------------------------------------------------------------------------------------------------------------
# features


@torch.no_grad()
def features(args):
    """Draw video clips and each encoder's features: their first three principal components, as red, green and blue.

    Small token grids are refined: the encoder also sees the clips shifted by fractions of a patch. The components are
    those of all clips and frames together.

    A .png shows time from left to right, a .gif or .mp4 plays the clips side by side. Without a suffix, write a .png
    and a .gif.
    """
    clips = load_clips(args, load_encoder(args.runs[0]).config, args.first, args.clips)
    draw([("video clip", clips), *feature_videos(args.runs, data.normalize(clips, "cpu"))], args.save)


def feature_videos(runs, x):
    """The features of normalized clips x as videos: [(label, (B, 3, t, rows, columns) uint8) for each run]."""
    return [(f"features of\n{Path(run).name}", token_colors(dense_tokens(load_encoder(run), x))) for run in runs]


def dense_tokens(encoder, x):
    """A map of tokens with at least DENSE rows and columns, if the patches have that many pixels: (B, t, n*h, n*w, D).

    Encode the normalized clips x n times n times, shifted by patch_size / n pixels down and across from one time to the
    next, and interleave the tokens.
    """
    (B, _, _, H, W), patch = x.shape, encoder.patch_size
    t, h, w = encoder.grid(x)
    n = next((n for n in range(1, patch) if patch % n == 0 and n * min(h, w) >= DENSE), patch)
    step, before = patch // n, (patch - patch // n) // 2
    padding = (before, patch - step - before) * 2
    padded = F.pad(x.flatten(1, 2), padding, mode="replicate").unflatten(1, (3, -1))
    dense = torch.empty(B, t, h, n, w, n, encoder.width)
    for i in range(n):
        for j in range(n):
            top, left = i * step, j * step
            dense[:, :, :, i, :, j] = encoder(padded[..., top : top + H, left : left + W]).unflatten(1, (t, h, w))
    return dense.flatten(4, 5).flatten(2, 3)


def token_colors(tokens):
    """The first three principal components of tokens (B, t, h, w, D) of all clips, as colors (B, 3, t, h, w) uint8."""
    centered = tokens - tokens.mean((0, 1, 2, 3))
    flat = centered.flatten(0, 3)
    components = flat @ torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    low, high = torch.quantile(components, 0.02, dim=0), torch.quantile(components, 0.98, dim=0)
    colors = ((components - low) / (high - low)).clamp(0, 1) * 255
    return colors.to(torch.uint8).unflatten(0, tokens.shape[:4]).permute(0, 4, 1, 2, 3)


def render(videos):
    """Render a movie of videos (see `draw`), which start and end together: a list of (rows, columns, 3) uint8."""
    pictures, count = [], num_frames(videos)
    for frame in range(count):
        figure = show(videos, [frame], count)
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    return pictures


def write_movie(pictures, path):
    """Write (rows, columns, 3) uint8 arrays as a .gif that loops, or as an .mp4 that plays them four times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        first, *rest = map(PIL.Image.fromarray, pictures)
        first.save(path, save_all=True, append_images=rest, duration=200, loop=0)
    else:
        height, width = (n // 2 * 2 for n in pictures[0].shape[:2])  # H.264 needs even sizes
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5, width=width, height=height, pix_fmt="yuv420p")
            for picture in pictures * 4:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    print(path)
