"""Look at runs: loss curves, what a teacher fills in, what an encoder's features are, and a table of probed runs.

python analyze.py curves out/teacher out/student --save curves.png
python analyze.py reconstruct out/teacher --save reconstruction.png
python analyze.py features out/teacher out/student --save features.png
python analyze.py table out/probe-untrained out/probe-teacher out/probe-student --save table.md
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

import data
from masking import sample_masks
from model import load_checkpoint, load_encoder, load_predictor, tubelets, untubelets
from training import Parser, duration, fail, generator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

CLIP_SEED = 2**31 + 4  # built-in clips that no training run and no probe sees


def some_clips(args, config, count):
    """uint8 clips (count, 3, T, H, W): from --data if given, else built-in ones; of the encoder's size."""
    size = config["num_frames"], config["resolution"]
    if not args.data:
        return data.Synthetic(*size, CLIP_SEED).batch(range(args.first, args.first + count)).clips
    source = data.Manifest(args.data, size[0], args.frame_step, size[1], train=False)
    return source.batch([n % len(source) for n in range(args.first, args.first + count)]).clips


def show_frames(axes, clip, title):
    """Draw the frames of a uint8 clip (3, T, H, W) into a row of axes, evenly spread."""
    for i, ax in enumerate(axes):
        ax.imshow(clip[:, i * clip.shape[1] // len(axes)].permute(1, 2, 0).numpy())
        ax.set(xticks=[], yticks=[])
    axes[0].set_ylabel(title, fontsize=8)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(path)


def curves(args):
    """Loss over steps of every run, a panel per kind of loss (pixel and latent losses do not compare)."""
    runs = []
    for path in map(Path, args.runs):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        kind = json.loads((path / "args.json").read_text())["kind"]
        runs.append((path, kind, [line["step"] for line in lines], [line["loss"] for line in lines]))
    labels = {"teacher": "pixel loss (mean squared error)", "student": "latent loss (mean absolute error)"}
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in runs))
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.2), squeeze=False, layout="constrained")
    for ax, kind in zip(axes[0], kinds, strict=True):
        for i, (path, _, steps, losses) in enumerate(run for run in runs if run[1] == kind):
            ax.plot(steps, losses, ("k-", "k--", "k:", "k-.")[i % 4], label=str(path), linewidth=1)
        ax.set(xlabel="optimiser step", ylabel=labels.get(kind, "loss"), title=kind)
        ax.legend()
    save(figure, args.save)


@torch.inference_mode()
def reconstruct(args):
    """What a teacher fills in: clip, what it saw, what it predicts, for a short-range mask.

    A teacher predicts pixels normalised per tubelet. To show them, mean and standard deviation are taken from the
    visible tubelets only, weighted by nearness; the target's own would leak the answer.
    """
    if len(args.runs) > 1:
        fail("reconstruct draws one run at a time")
    checkpoint = load_checkpoint(args.runs[0])
    if checkpoint["kind"] != "teacher":
        fail(f"{args.runs[0]} holds a {checkpoint['kind']}; only a teacher predicts pixels")
    encoder, predictor = load_encoder(args.runs[0]), load_predictor(args.runs[0])
    clips = some_clips(args, encoder.config, args.clips)
    x = data.normalise(clips, "cpu")
    grid, size = encoder.grid(x), (encoder.tubelet_size, encoder.patch_size)
    mask = sample_masks(checkpoint["args"]["mask"], grid, len(x), generator(0), "random")[0]
    predicted = predictor(encoder(x, mask.context_ids), mask.context_ids, mask.target_ids, grid, 0)

    pixels = tubelets(x, *size).unflatten(-1, (3, -1))  # (B, N, 3, P/3)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float) for n in grid)).reshape(-1, 3)
    seen, filled = torch.full_like(pixels, torch.nan), torch.full_like(pixels, torch.nan)
    for b, (context, target) in enumerate(zip(mask.context_ids, mask.target_ids, strict=True)):
        weights = (-2 * torch.cdist(places[target], places[context])).softmax(-1)  # (Kt, Kc)
        mean = torch.einsum("tk,kc->tc", weights, pixels[b, context].mean(-1))
        std = torch.einsum("tk,kc->tc", weights, pixels[b, context].std(-1))
        seen[b, context] = filled[b, context] = pixels[b, context]
        filled[b, target] = predicted[b].unflatten(-1, (3, -1)) * std[..., None] + mean[..., None]

    def as_frames(x):  # grey where there is nothing
        frames = untubelets(x.flatten(-2), grid, *size)
        return torch.where(frames.isnan(), 128, data.denormalise(frames.nan_to_num())).to(torch.uint8)

    seen, filled = as_frames(seen), as_frames(filled)
    columns = min(8, clips.shape[2])
    figure, axes = plt.subplots(
        3 * len(clips), columns, figsize=(columns, 3.1 * len(clips)), squeeze=False, layout="constrained"
    )
    for b in range(len(clips)):
        for row, (video, title) in enumerate(((clips, "clip"), (seen, "seen"), (filled, "filled in"))):
            show_frames(axes[3 * b + row], video[b], title)
    figure.suptitle(
        f"{args.runs[0]}: frames of {len(clips)} clips over time. Grey: neither seen nor asked for.\n"
        "Brightness and contrast of what is filled in come from visible neighbours only.", fontsize=8,
    )  # fmt: skip
    save(figure, args.save)


@torch.inference_mode()
def features(args):
    """Features over time: the first three principal components of an encoder's tokens as red, green and blue."""
    encoders = [load_encoder(path) for path in args.runs]
    clips = some_clips(args, encoders[0].config, args.clips)
    x = data.normalise(clips, "cpu")
    t = encoders[0].grid(x)[0]
    rows = (1 + len(encoders)) * len(clips)
    figure, axes = plt.subplots(rows, t, figsize=(t, rows), squeeze=False, layout="constrained")
    for i, (path, encoder) in enumerate(zip(args.runs, encoders, strict=True)):
        tokens = encoder(x)
        flat = tokens.flatten(0, 1) - tokens.mean((0, 1))
        components = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T  # (B*N, 3)
        low, high = (torch.quantile(components, q, dim=0) for q in (0.02, 0.98))
        colours = ((components - low) / (high - low)).clamp(0, 1)
        colours = (colours * 255).to(torch.uint8).reshape(len(clips), *encoder.grid(x), 3).permute(0, 4, 1, 2, 3)
        for b in range(len(clips)):
            show_frames(axes[b * (1 + len(encoders)) + 1 + i], colours[b], Path(path).name)
    for b in range(len(clips)):
        show_frames(axes[b * (1 + len(encoders))], clips[b], "clip")
    figure.suptitle("First three principal components of all tokens, as red, green, blue; time runs right", fontsize=8)
    save(figure, args.save)


def table(args):
    """A markdown table of probe.py's results.json files: accuracy of each task, and what the probed run cost."""
    rows, tasks = [], {}
    for path in map(Path, args.runs):
        result = json.loads((path / "results.json").read_text())
        run = Path(result["checkpoint"])
        cells = {"encoder": "untrained", "loss": "-", "steps": 0, "time": "-", "FLOPs": "-"}
        if not result["untrained"]:
            checkpoint = load_checkpoint(run)
            cells = {"encoder": checkpoint["kind"], "loss": "-", "steps": checkpoint["step"], "time": "-", "FLOPs": "-"}
            log = (run if run.is_dir() else run.parent) / "metrics.jsonl"
            if log.exists():  # a checkpoint file elsewhere, or a converted one, has no log
                lines = log.read_text().splitlines()
                if not lines:
                    raise ValueError(f"{log} is empty: nothing was logged yet")
                last = json.loads(lines[-1])
                cells |= {"loss": f"{last['loss']:.3f}", "time": duration(last["seconds"]),
                          "FLOPs": f"{last['flops']:.2g}"}  # fmt: skip
        tasks |= {task: found["chance"] for task, found in result["tasks"].items()}
        for task, found in result["tasks"].items():
            spread = "" if found["spread"] is None else f" ± {found['spread']:.1f}"
            cells[task] = f"{found['top1']:.1f}{spread}"
        rows.append(cells)
    columns = ["encoder", *tasks, "loss", "steps", "time", "FLOPs"]
    heads = [f"{c}, top-1 % (chance {tasks[c]:.1f})" if c in tasks else c for c in columns]
    cells = [heads] + [[str(row.get(c, "-")) for c in columns] for row in rows]
    widths = np.max([[len(cell) for cell in row] for row in cells], axis=0)
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    args.save.parent.mkdir(parents=True, exist_ok=True)
    args.save.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, suffix in ((curves, "png"), (reconstruct, "png"), (features, "png"), (table, "md")):
        name = function.__name__
        command = commands.add_parser(name, description=function.__doc__, help=function.__doc__.splitlines()[0])
        command.add_argument("runs", nargs="+", metavar="RUN", help="run folders (table: folders that probe.py wrote)")
        command.add_argument("--save", type=Path, default=Path(f"out/{name}.{suffix}"), help="file to write")
        if function in (reconstruct, features):
            command.add_argument("--data", nargs="+", metavar="MANIFEST", help="real clips; built-in ones without")
            command.add_argument("--frame-step", type=int, default=4)
            command.add_argument("--clips", type=int, default=3)
            command.add_argument("--first", type=int, default=0, help="number of the first clip")
        command.set_defaults(function=function)
    args = parser.parse_args()
    try:
        args.function(args)
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
