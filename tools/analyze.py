"""Look at runs: what they learned, what it cost, and which checkpoint to choose.

    python analyze.py curves out/teacher out/student                          loss over steps
    python analyze.py reconstruct out/teacher                                 what a teacher fills in
    python analyze.py features out/teacher out/student --save features.gif    features as colors; png, gif or mp4
    python analyze.py rankme out/teacher out/student                          effective rank of the embeddings
    python analyze.py table out/probe-*                                       accuracy and cost, from probe.py's folders
    python analyze.py pareto out/probe-*                                      accuracy over training FLOPs
    python analyze.py correlate out/probe-* --against loss rankme             does the loss tell the accuracy?

FLOPs are those executed, from the training logs, teachers included; `pareto --paper` counts as the paper does.
"""

import json
import math
from pathlib import Path

import av
import matplotlib
import numpy as np
import PIL.Image
import torch

import data
import flops
from cli import Parser, duration, fail, require_at_least, resolve_device
from masking import sample_masks
from model import load_checkpoint, load_encoder, load_predictor, token_grid, tubelets, untubelets
from training import effective_rank, generator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

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


def read(path, what, *names):
    """The JSON of a file (of a .jsonl: a list) that has these keys; ValueError naming the file if it has not."""
    text = path.read_text()
    try:
        lines = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        if any(name not in line for line in lines for name in names):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not {what}") from error
    return lines if path.suffix == ".jsonl" else lines[0]


def probe_results(path):
    """(results.json of a folder of probe.py's, lineage of what was probed); no lineage for an untrained encoder."""
    result = read(path / "results.json", "what probe.py writes", "checkpoint", "step", "weights", "tasks", "args")
    stages = [] if result["weights"] == "untrained" else lineage(result["checkpoint"])
    if stages and stages[0]["step"] != result["step"]:
        raise ValueError(f"{result['checkpoint']} has gone on since it was probed, at step {result['step']}")
    return result, stages


def curves(args):
    """Loss over steps of every run, a panel per kind of loss (pixel and latent losses do not compare)."""
    runs = []
    for path in map(Path, args.runs):
        lines = read(path / "metrics.jsonl", "a training log", "step", "loss")
        kind = read(path / "args.json", "a training run's", "kind")["kind"]
        runs.append((path, kind, [line["step"] for line in lines], [line["loss"] for line in lines]))
    latent = "latent loss (mean absolute error)"
    labels = {"teacher": "pixel loss (mean squared error)", "student": latent, "ema": latent}
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in runs))
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.2), squeeze=False, layout="constrained")
    for ax, kind in zip(axes[0], kinds, strict=True):
        for i, (path, _, steps, losses) in enumerate(run for run in runs if run[1] == kind):
            ax.plot(steps, losses, ("k-", "k--", "k:", "k-.")[i % 4], label=str(path), linewidth=1)
        ax.set(xlabel="optimizer step", ylabel=labels.get(kind, "loss"), title=kind)
        ax.legend()
    save(figure, args.save)


@torch.inference_mode()
def reconstruct(args):
    """What a teacher fills in: clip, what it saw, what it predicts, for a short-range mask.

    A teacher predicts pixels normalized per tubelet. To show them, mean and standard deviation are taken from the
    visible tubelets only, weighted by nearness; the target's own would leak the answer.
    """
    if len(args.runs) > 1:
        fail("reconstruct draws one run at a time")
    checkpoint = load_checkpoint(args.runs[0])
    if checkpoint["kind"] != "teacher":
        fail(f"{args.runs[0]} holds {checkpoint['kind']} weights; only a teacher predicts pixels")
    encoder, predictor = load_encoder(args.runs[0]), load_predictor(args.runs[0])
    clips = some_clips(args, encoder.config, args.clips)
    x = data.normalize(clips, "cpu")
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

    def as_frames(x):  # gray where there is nothing
        frames = untubelets(x.flatten(-2), grid, *size)
        return torch.where(frames.isnan(), 128, data.denormalize(frames.nan_to_num())).to(torch.uint8)

    seen, filled = as_frames(seen), as_frames(filled)
    columns = min(8, clips.shape[2])
    figure, axes = plt.subplots(
        3 * len(clips), columns, figsize=(columns, 3.1 * len(clips)), squeeze=False, layout="constrained"
    )
    for b in range(len(clips)):
        for row, (video, title) in enumerate(((clips, "clip"), (seen, "seen"), (filled, "filled in"))):
            show_frames(axes[3 * b + row], video[b], title)
    figure.suptitle(
        f"{args.runs[0]}: frames of {len(clips)} clips over time. Gray: neither seen nor asked for.\n"
        "Brightness and contrast of what is filled in come from visible neighbors only.", fontsize=8,
    )  # fmt: skip
    save(figure, args.save)


@torch.inference_mode()
def features(args):
    """Features over time: the first three principal components of an encoder's tokens as red, green and blue.

    A png has the clips and a row of features for each run under it, time to the right; a gif or mp4 plays.
    """
    encoders = [load_encoder(path) for path in args.runs]
    clips = some_clips(args, encoders[0].config, args.clips)
    x = data.normalize(clips, "cpu")
    videos = [clips]  # each (clips, 3, time, rows, columns) uint8
    for encoder in encoders:
        tokens = encoder(x)
        flat = tokens.flatten(0, 1) - tokens.mean((0, 1))
        components = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T  # (B*N, 3)
        low, high = (torch.quantile(components, q, dim=0) for q in (0.02, 0.98))
        colors = ((components - low) / (high - low)).clamp(0, 1)
        colors = (colors * 255).to(torch.uint8).reshape(len(clips), *encoder.grid(x), 3)
        videos.append(colors.permute(0, 4, 1, 2, 3))
    names = ["clip", *(Path(path).name for path in args.runs)]
    title = "First three principal components of the tokens, as red, green, blue"
    if args.save.suffix in (".gif", ".mp4"):
        return play(videos, names, title, args.save)
    t = max(encoder.grid(x)[0] for encoder in encoders)
    rows = len(videos) * len(clips)
    figure, axes = plt.subplots(rows, t, figsize=(t, rows), squeeze=False, layout="constrained")
    for i, (video, name) in enumerate(zip(videos, names, strict=True)):
        for b in range(len(clips)):
            show_frames(axes[b * len(videos) + i], video[b], name)
    figure.suptitle(f"{title}; time runs right", fontsize=8)
    save(figure, args.save)


def play(videos, names, title, path):
    """Write videos (each (clips, 3, time, rows, columns) uint8) as one moving picture: a row each, a column a clip."""
    frames, clips = max(video.shape[2] for video in videos), len(videos[0])
    figure, axes = plt.subplots(len(videos), clips, figsize=(1.6 * clips, 1.6 * len(videos) + 0.4), squeeze=False,
                                layout="constrained")  # fmt: skip
    figure.suptitle(title, fontsize=8, wrap=True)
    pictures = []
    for frame in range(frames):
        for row, video, name in zip(axes, videos, names, strict=True):
            for b, ax in enumerate(row):
                ax.clear()
                ax.imshow(video[b, :, frame * video.shape[2] // frames].permute(1, 2, 0).numpy())
                ax.set(xticks=[], yticks=[])
            row[0].set_ylabel(name, fontsize=8)
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        first, *rest = map(PIL.Image.fromarray, pictures)
        first.save(path, save_all=True, append_images=rest, duration=200, loop=0)
    else:
        height, width = (n // 2 * 2 for n in pictures[0].shape[:2])  # H.264 wants even sizes
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5, width=width, height=height, pix_fmt="yuv420p")
            for picture in pictures * 4:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    print(path)


# ---------------------------------------------------------------------------------------------------------------------
# numbers: rank, cost, accuracy


@torch.inference_mode()
def embeddings(args, path, weights="encoder"):
    """One mean-pooled embedding per clip, (M, D) float32."""
    encoder = load_encoder(path, weights).to(args.device)
    first, parts = args.first, []
    for start in range(first, first + args.clips, 50):
        args.first, count = start, min(50, first + args.clips - start)
        clips = some_clips(args, encoder.config, count)
        parts.append(encoder(data.normalize(clips, torch.device(args.device))).mean(1).float().cpu())
    args.first = first
    return torch.cat(parts)


def rankme(args):
    """Effective rank of the mean-pooled embeddings of --clips clips; best with ten times more clips than dimensions."""
    found = {}
    for run in args.runs:
        x = embeddings(args, run)
        found[run] = {"rankme": effective_rank(x), "width": x.shape[1], "clips": len(x)}
        print(f"{run}: RankMe {found[run]['rankme']:.1f} of {x.shape[1]}, {len(x)} clips")
    args.save.parent.mkdir(parents=True, exist_ok=True)
    args.save.write_text(json.dumps(found, indent=2) + "\n")


def lineage(path):
    """The training stages behind a checkpoint, its own first, then its teacher's, and so on.

    Each a dictionary: path, kind, step, encoder (config), paper_flops; loss, seconds and flops are None without a log.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    args, step, model = checkpoint["args"], checkpoint["step"], checkpoint["model"]
    log = (path if path.is_dir() else path.parent) / "metrics.jsonl"
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else []
    line = next((line for line in lines if line["step"] == step), {})
    stage = {"path": path, "kind": checkpoint["kind"], "step": step, "encoder": model["encoder"], "args": args}
    stage |= {name: line.get(name) for name in ("loss", "seconds", "flops")}
    before = lineage(args["teacher"]) if "teacher" in args else []
    if args:  # a converted checkpoint has none
        teacher = {"student": before and before[0]["encoder"], "ema": model["encoder"]}.get(stage["kind"])
        size = model["encoder"]["resolution"]
        tokens = math.prod(token_grid((args["num_frames"], size, size), args["tubelet_size"], args["patch_size"]))
        per_clip = flops.paper_flops_of(model["encoder"], model["predictor"], teacher, tokens)
        stage["paper_flops"] = per_clip * step * args["batch_size"]
    return [stage, *before]


def total(stages, name):
    """Sum over a lineage; None if a stage does not know."""
    return None if any(stage.get(name) is None for stage in stages) else sum(stage[name] for stage in stages)


# Flags that do not make a run another experiment.
INCIDENTAL = {"seed", "seeds", "out", "fresh", "workers", "device", "compile", "teacher", "checkpoint", "task",
              "save_every", "log_every", "snapshot_every", "untrained", "weights"}  # fmt: skip


def essential(args):
    """The flags that make an experiment what it is."""
    return {name: value for name, value in args.items() if name not in INCIDENTAL}


def probed(paths):
    """probe.py's folders, those that differ in seeds only together: [{name, stages, tasks, runs}, ...].

    stages: a list of lineages, one per run (empty for an untrained encoder); tasks: {task: {mean, spread, chance}}
    in percent. The spread is the standard deviation over runs, over a run's probe seeds if there is one run.
    """
    groups = {}
    for path in map(Path, paths):
        result, stages = probe_results(path)
        name = stages[0]["kind"] if stages else "untrained"
        name = {"ema": "EMA (V-JEPA 2)"}.get(name, name) if result["weights"] != "student" else "EMA's student"
        same = [(stage["kind"], stage["step"], stage["encoder"], essential(stage["args"])) for stage in stages]
        same = [essential(result["args"]), same or load_checkpoint(result["checkpoint"])["model"]["encoder"]]
        group = groups.setdefault(json.dumps([name, same]), {"name": name, "stages": [], "results": []})
        group["stages"].append(stages)
        group["results"].append(result["tasks"])
    for group in groups.values():
        results = group.pop("results")
        group["tasks"] = {}
        for task in dict.fromkeys(task for result in results for task in result):
            found = [result[task] for result in results if task in result]
            top1 = [one["top1"] for one in found]
            spread = np.std(top1, ddof=1) if len(top1) > 1 else found[0]["spread"]
            group["tasks"][task] = {"mean": np.mean(top1), "spread": spread, "chance": found[0]["chance"]}
            group["runs"] = max(group.get("runs", 1), len(top1))
    return list(groups.values())


def table(args):
    """A markdown table of probed runs: accuracy, and what they cost; runs that differ in their seeds share a row."""
    rows, tasks = [], {}
    for group in probed(args.runs):
        cells = {"encoder": group["name"], "runs": group["runs"], "steps": 0}
        if group["stages"][0]:
            own = [stages[0] for stages in group["stages"]]
            cells["steps"] = own[0]["step"]
            if all(stage["loss"] is not None for stage in own):  # else a checkpoint file elsewhere, or a converted one
                cells["loss"] = f"{np.mean([stage['loss'] for stage in own]):.3f}"
                cells["time"] = duration(np.mean([stage["seconds"] for stage in own]))
                cells["FLOPs"] = f"{np.mean([stage['flops'] for stage in own]):.2g}"
                sums = [total(stages, "flops") for stages in group["stages"]]
                if None not in sums:
                    cells["with its teachers"] = f"{np.mean(sums):.2g}"
        for task, found in group["tasks"].items():
            tasks[task] = found["chance"]
            spread = "" if found["spread"] is None else f" ± {found['spread']:.1f}"
            cells[task] = f"{found['mean']:.1f}{spread}"
        rows.append(cells)
    columns = ["encoder", *tasks, "loss", "steps", "time", "FLOPs", "with its teachers"]
    if any(row["runs"] > 1 for row in rows):
        columns.insert(1, "runs")
    heads = [f"{c}, top-1 % (chance {tasks[c]:.1f})" if c in tasks else c for c in columns]
    cells = [heads] + [[str(row.get(c, "-")) for c in columns] for row in rows]
    widths = np.max([[len(cell) for cell in row] for row in cells], axis=0)
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    args.save.parent.mkdir(parents=True, exist_ok=True)
    args.save.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


STYLES = {  # by name: marker, line, gray level
    "teacher": ("^", ":", "0.45"), "student": ("o", "-", "0.0"), "EMA (V-JEPA 2)": ("s", "--", "0.3"),
    "EMA's student": ("D", "-.", "0.55"),
}  # fmt: skip

# Table 1: FLOPs in 1e21, top-1 on ssv2 and k400, of ViT-L, H, g, G
PAPER = {
    "SALT (paper)": ("o", "-", [(1.2, 74.9, 85.4), (1.5, 75.4, 86.0), (1.9, 76.2, 86.8), (2.6, 76.1, 87.2)]),
    "V-JEPA 2, V-3.6M (paper)": ("s", "--", [(1.4, 68.2, 83.8), (2.6, 73.4, 84.6)]),
    "V-JEPA 2, VM-22M (paper)": ("D", ":", [(1.9, 73.7, 85.1), (3.5, 74.0, 85.3), (5.3, 75.3, 86.6)]),
}


def pareto(args):
    """Accuracy over training FLOPs, teachers included, a panel per task; --paper draws the paper's points, too."""
    groups, count = probed(args.runs), "paper_flops" if args.paper else "flops"
    tasks = list(dict.fromkeys(task for group in groups for task in group["tasks"]))
    if args.paper:
        tasks += [task for task in ("ssv2", "k400") if task not in tasks]
    if not tasks:
        fail("pareto: give folders that probe.py wrote, or --paper")
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.6), squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks, strict=True):
        if args.paper and task in ("ssv2", "k400"):
            for name, (marker, line, points) in PAPER.items():
                x, y = [1e21 * p[0] for p in points], [p[1 + (task == "k400")] for p in points]
                ax.plot(x, y, color="0.7", marker=marker, linestyle=line, label=name)
        for name in dict.fromkeys(group["name"] for group in groups):
            points = []
            for group in (group for group in groups if group["name"] == name and task in group["tasks"]):
                found, sums = group["tasks"][task], [total(stages, count) for stages in group["stages"]]
                if None in sums:
                    unknown = next(s["path"] for stages in group["stages"] for s in stages if s.get(count) is None)
                    raise ValueError(f"the FLOPs of {unknown} are not known: it has no log of that step, or no flags")
                points.append((np.mean(sums), found["mean"], found["spread"] or 0))
            if name == "untrained":
                for _, mean, _ in points:
                    ax.axhline(mean, color="0.6", linewidth=1, linestyle=(0, (1, 3)), label=name)
            elif points:
                marker, line, gray = STYLES.get(name, ("x", "-", "0.5"))
                x, y, spread = zip(*sorted(points), strict=True)
                ax.errorbar(x, y, spread, color=gray, marker=marker, linestyle=line, capsize=3, label=name)
        counted = "by the paper's count" if args.paper else "executed"
        ax.set(
            xscale="log", xlabel=f"training FLOPs, {counted}, teachers included", ylabel="top-1 accuracy, %", title=task
        )
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e+", "e"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(color="0.9")
        ax.legend(fontsize=7)
    save(figure, args.save)


def ranks(x):
    """Ranks of numbers, ties shared."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(x, y):
    """R² of the straight line (which is Pearson's r squared), Pearson's r and Spearman's rank correlation."""
    pearson, spearman = np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]
    return pearson**2, pearson, spearman


AGAINST = {
    "loss": "training loss", "rankme": "RankMe", "teacher-loss": "training loss of the teacher",
    "teacher-rankme": "RankMe of the teacher",
}  # fmt: skip


def correlate(args):
    """Accuracy of probed checkpoints against their loss or RankMe, or their teachers': R², Pearson, Spearman."""
    points, tasks = [], {}  # a dictionary of numbers per checkpoint; of the last one, its results
    for path in map(Path, args.runs):
        result, stages = probe_results(path)
        if not stages:
            raise ValueError(f"{path} is of an untrained encoder, which has no loss: leave it out")
        if points and result["tasks"].keys() != tasks.keys():
            raise ValueError(f"{path} has {', '.join(result['tasks'])}, {args.runs[0]} {', '.join(tasks)}")
        tasks = result["tasks"]
        point = {task: found["top1"] for task, found in result["tasks"].items()} | {"step": stages[0]["step"]}
        for what in args.against:
            of, _, name = what.rpartition("-")
            stage = stages[min(1, len(stages) - 1) if of else 0]
            if of and len(stages) < 2:
                raise ValueError(f"{result['checkpoint']} has no teacher: --against {what} is for students")
            weights = "encoder" if of else result["weights"]
            point[what] = stage["loss"] if name == "loss" else effective_rank(embeddings(args, stage["path"], weights))
            if point[what] is None:
                raise ValueError(f"the loss of {stage['path']} is not known: no log beside it")
        points.append(point)
    if len(points) < 3:
        raise ValueError(f"a correlation of {len(points)} checkpoints says nothing: give three or more")
    for what in (*args.against, *tasks):
        if len({point[what] for point in points}) == 1:
            raise ValueError(f"{what} is {points[0][what]:.4g} for all of these checkpoints: nothing to correlate")
    size = 3.6 * len(tasks), 3.4 * len(args.against)
    figure, axes = plt.subplots(len(args.against), len(tasks), figsize=size, squeeze=False, layout="constrained")
    for row, what in zip(axes, args.against, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            x, y = (np.array([point[name] for point in points]) for name in (what, task))
            r2, pearson, spearman = correlation(x, y)
            print(f"{task} against {AGAINST[what]}: R² {r2:.3f}, Pearson {pearson:+.3f}, Spearman {spearman:+.3f}, "
                  f"{len(x)} checkpoints")  # fmt: skip
            slope, offset = np.polyfit(x, y, 1)
            ends = np.array([x.min(), x.max()])
            ax.plot(ends, offset + slope * ends, color="0.6", linestyle="--", linewidth=1)
            ax.plot(x, y, "ko", markersize=4)
            for point in points:
                ax.annotate(
                    point["step"], (point[what], point[task]), fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
            ax.set(xlabel=AGAINST[what], ylabel=f"{task}, top-1 %")
            ax.set_title(f"R² {r2:.2f}, Pearson {pearson:+.2f}, Spearman {spearman:+.2f}", fontsize=9)
    figure.suptitle("Each point a checkpoint, its steps beside it", fontsize=8)
    save(figure, args.save)


def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pictures = (curves, reconstruct, features, pareto, correlate)
    for function in (*pictures, rankme, table):
        name = function.__name__
        command = commands.add_parser(name, description=function.__doc__, help=function.__doc__.splitlines()[0])
        flag = command.add_argument
        folders = "probe.py's folders" if function in (table, pareto, correlate) else "run folders, checkpoints"
        flag("runs", nargs="*" if function is pareto else "+", metavar="RUN", help=folders)
        suffix = "png" if function in pictures else {rankme: "json", table: "md"}[function]
        flag("--save", type=Path, default=Path(f"out/{name}.{suffix}"), help="file to write")
        if function in (reconstruct, features, rankme, correlate):
            flag("--data", nargs="+", metavar="MANIFEST", help="real clips; built-in ones without")
            flag("--frame-step", type=int, default=4)
            flag("--clips", type=int, default=2000 if function in (rankme, correlate) else 3)
            flag("--first", type=int, default=0, help="number of the first clip")
        if function in (rankme, correlate):
            flag("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
        if function is correlate:
            flag("--against", nargs="+", choices=AGAINST, default=["loss"], help="what is set against the accuracy")
        if function is pareto:
            flag("--paper", action="store_true", help="count as the paper does, and draw its table 1")
        command.set_defaults(function=function)
    args = parser.parse_args()
    if "clips" in args:
        require_at_least(args, 1, "clips", "frame_step")
        require_at_least(args, 0, "first")
    if "device" in args:
        args.dtype = "float32"
        resolve_device(args)
    try:
        args.function(args)
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
