"""Pictures of what networks see: the pixels that a teacher predicts, and features as colors.

These are commands of tools/analyze.py: `python -m tools.analyze reconstruct` and `features`.

Letters in shape comments: B clips, T frames, N tokens of a clip, Kc and Kt context and target tokens of a clip,
P values in a tubelet, D width.
"""

from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch

import data
from cli import fail
from masking import sample_masks
from model import load_checkpoint, load_encoder, load_predictor, tubelets, untubelets
from training import generator

plt.switch_backend("Agg")  # draw into files, without a display

CLIP_SEED = 2**31 + 4  # seed of built-in clips that no training run and no probe uses


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


def show_frame(ax, clip, i, count):
    """Draw frame i of `count` evenly spaced frames of a uint8 clip (3, T, H, W)."""
    ax.imshow(clip[:, i * clip.shape[1] // count].permute(1, 2, 0).numpy())
    ax.set(xticks=[], yticks=[])


def show_rows(rows, columns, title):
    """Draw a clip in each row, as `columns` evenly spaced frames. rows: [(label, uint8 clip (3, T, H, W)), ...]."""
    size = columns, 1.03 * len(rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, (label, clip) in zip(axes, rows, strict=True):
        for i, ax in enumerate(row):
            show_frame(ax, clip, i, columns)
        row[0].set_ylabel(label, fontsize=8)
    figure.suptitle(title, fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# reconstruct


@torch.inference_mode()
def reconstruct(args):
    """Draw what a teacher predicts: clips, their visible part (short-range mask), and the predicted pixels."""
    if len(args.runs) > 1:
        fail("reconstruct draws one run at a time")
    run = args.runs[0]
    checkpoint = load_checkpoint(run)
    if checkpoint["kind"] != "teacher":
        fail(f"{run} holds {checkpoint['kind']} weights; only a teacher predicts pixels")
    encoder, predictor = load_encoder(run), load_predictor(run)
    clips = load_clips(args, encoder.config, args.first, args.clips)
    x = data.normalize(clips, "cpu")
    mask = sample_masks(checkpoint["args"]["mask"], encoder.grid(x), len(x), generator("reconstruction", 0), "random")[
        0
    ]
    context, predicted = predict_pixels(encoder, predictor, x, mask)
    rows = []
    for b in range(len(clips)):
        rows += [("clip", clips[b]), ("context", context[b]), ("predicted", predicted[b])]
    title = (
        f"{run}\nTop to bottom: the clip, the context (all that the encoder sees), context and predicted pixels.\n"
        "Left to right: time. Gray: neither context nor predicted.\n"
        "Brightness and contrast of the predictions are estimated from nearby context."
    )
    save(show_rows(rows, min(8, clips.shape[2]), title), args.save)


def predict_pixels(encoder, predictor, x, mask):
    """Predict the target pixels of normalized clips x: (context, context and predictions), (B, 3, T, H, W) uint8.

    A teacher predicts pixels that are normalized per tubelet and color. Mean and standard deviation, to undo this, are
    averages over the context tubelets, weighted by proximity: the target's own would leak the answer.
    """
    grid = encoder.grid(x)
    predicted = predictor(encoder(x, mask.context_ids), mask.context_ids, mask.target_ids, grid, 0)
    predicted = predicted.unflatten(-1, (3, -1))  # (B, Kt, 3, P/3)
    pixels = tubelets(x, encoder.tubelet_size, encoder.patch_size).unflatten(-1, (3, -1))  # (B, N, 3, P/3)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float) for n in grid)).reshape(-1, 3)  # (N, 3)
    context, filled = torch.full_like(pixels, torch.nan), torch.full_like(pixels, torch.nan)
    for b, (context_ids, target_ids) in enumerate(zip(mask.context_ids, mask.target_ids, strict=True)):
        visible = pixels[b, context_ids]  # (Kc, 3, P/3)
        weights = (-2 * torch.cdist(positions[target_ids], positions[context_ids])).softmax(-1)  # (Kt, Kc)
        mean = torch.einsum("tk,kc->tc", weights, visible.mean(-1))
        std = torch.einsum("tk,kc->tc", weights, visible.std(-1))
        context[b, context_ids] = visible
        filled[b, context_ids] = visible
        filled[b, target_ids] = predicted[b] * std[..., None] + mean[..., None]
    return to_clips(context, encoder, grid), to_clips(filled, encoder, grid)


def to_clips(pixels, encoder, grid):
    """Turn tubelets of normalized pixels (B, N, 3, P/3) into uint8 clips (B, 3, T, H, W); NaN becomes gray."""
    clips = untubelets(pixels.flatten(-2), grid, encoder.tubelet_size, encoder.patch_size)
    return torch.where(clips.isnan(), 128, data.denormalize(clips.nan_to_num())).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# features


@torch.inference_mode()
def features(args):
    """Draw features over time: the first three principal components of each encoder's tokens, as red, green and blue.

    A .png shows each clip and, below it, one row of features per run, with time from left to right. A .gif or .mp4
    shows them in motion, one column per clip.
    """
    encoders = [load_encoder(path) for path in args.runs]
    clips = load_clips(args, encoders[0].config, args.first, args.clips)
    x = data.normalize(clips, "cpu")
    videos = [("clip", clips)]
    for path, encoder in zip(args.runs, encoders, strict=True):
        videos.append((Path(path).name, token_colors(encoder(x), encoder.grid(x))))
    title = "First three principal components of the tokens, as red, green and blue"
    if args.save.suffix in (".gif", ".mp4"):
        write_movie(render(videos, title), args.save)
    else:
        rows = [(name, video[b]) for b in range(len(clips)) for name, video in videos]
        columns = max(encoder.grid(x)[0] for encoder in encoders)
        save(show_rows(rows, columns, f"{title}.\nLeft to right: time."), args.save)


def token_colors(tokens, grid):
    """The first three principal components of tokens (B, N, D) of all clips, as colors (B, 3, t, h, w) uint8."""
    centered = tokens.flatten(0, 1) - tokens.mean((0, 1))
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:3].T  # (B*N, 3)
    low, high = torch.quantile(components, 0.02, dim=0), torch.quantile(components, 0.98, dim=0)
    colors = ((components - low) / (high - low)).clamp(0, 1) * 255
    return colors.to(torch.uint8).reshape(len(tokens), *grid, 3).permute(0, 4, 1, 2, 3)


def render(videos, title):
    """Render a movie with one row per video and one column per clip: a list of (rows, columns, 3) uint8 arrays.

    videos: [(name, (B, 3, T, H, W) uint8), ...]. T may differ: all videos start and end together.
    """
    num_frames = max(video.shape[2] for _, video in videos)
    num_clips = len(videos[0][1])
    size = 1.6 * num_clips, 1.6 * len(videos) + 0.4
    figure, axes = plt.subplots(len(videos), num_clips, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=8, wrap=True)
    pictures = []
    for frame in range(num_frames):
        for row, (name, video) in zip(axes, videos, strict=True):
            for ax, clip in zip(row, video, strict=True):
                ax.clear()
                show_frame(ax, clip, frame, num_frames)
            row[0].set_ylabel(name, fontsize=8)
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
