"""Analyze runs: loss curves, accuracy and cost, and pictures of what the networks see.

    python -m tools.analyze curves out/teacher out/student                     loss over the training steps
    python -m tools.analyze picture out/teacher out/student --save out/salt    what a teacher fills in, features
    python -m tools.analyze table out/probe-*                                  accuracy and cost
    python -m tools.analyze compare out/study/masks/*                          accuracy of variants, over all seeds
    python -m tools.analyze differences out/study/masks/*                      paired by seed, with intervals
    python -m tools.analyze correlate out/probe-* --against loss rankme        does the loss predict the accuracy?

All but the first two read what probe.py writes. FLOPs are those executed, from the training logs.
Letters: B clips, T frames, H, W pixels, N tokens of a clip, P values in a tubelet, D width, (t, h, w) the token grid.
"""

import inspect
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

import data
from cli import Parser, duration, fail, require_at_least, write_lines
from masking import sample_masks
from model import load_checkpoint, load_encoder, load_predictor, load_teacher_of, tubelets, untubelets
from training import effective_rank, generator

plt.switch_backend("Agg")  # draw into files, without a display
plt.rcParams["figure.constrained_layout.use"] = True


class Stage(NamedTuple):
    """A training run behind a checkpoint, up to the checkpoint's step."""

    path: Path
    kind: str  # "teacher", "student", "ema", or "vjepa2" if converted by tools/convert.py
    step: int
    log: dict  # its line in the run's log: loss, seconds, flops (without the teacher's training), ...; {} if unknown


class Probe(NamedTuple):
    """Results of probe.py."""

    result: dict  # results.json
    stages: list  # lineage of the probed encoder; [] if it is untrained

    @property
    def encoder(self):
        if self.result["weights"] == "untrained":
            return "untrained"
        if self.stages[0].kind == "ema":
            return "EMA, online encoder" if self.result["weights"] == "student" else "EMA"
        return self.stages[0].kind


def parse(text, path, description, *keys):
    """Parse a JSON object with these keys; ValueError naming the file it is from if it is anything else."""
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= set(keys):
        raise ValueError(f"{path} is damaged or is not {description}")
    return record


def read_log(path):
    for line in path.read_text().splitlines():
        yield parse(line, path, "a training log", "step", "loss", "seconds", "flops")


def lineage(path, checkpoint):
    """The training runs behind a checkpoint: a list of `Stage`, its own first, then its teacher's, and so on."""
    path, step, teacher = Path(path), checkpoint["step"], checkpoint["args"].get("teacher")
    log = (path if path.is_dir() else path.parent) / "metrics.jsonl"
    line = next((line for line in read_log(log) if line["step"] == step), {}) if log.exists() else {}
    before = lineage(teacher, load_teacher_of(checkpoint, teacher)) if teacher else []
    return [Stage(path, checkpoint["kind"], step, line), *before]


def read_probe(folder):
    """Read a folder of probe.py as a `Probe`. ValueError if its checkpoint has been trained further since."""
    path = Path(folder) / "results.json"
    result = parse(path.read_text(), path, "the results of probe.py", "checkpoint", "step", "weights", "tasks")
    if result["weights"] == "untrained":
        return Probe(result, [])
    name = result["checkpoint"]
    stages = lineage(name, load_checkpoint(name))
    if stages[0].step != result["step"]:
        raise ValueError(f"{name} was probed at step {result['step']}, is at step {stages[0].step} now: probe it again")
    return Probe(result, stages)


def accuracies(probes):
    """Top-1 accuracies in percent: {task: [of each probe that has the task]}."""
    tasks = dict.fromkeys(task for probe in probes for task in probe.result["tasks"])
    return {task: [p.result["tasks"][task]["top1"] for p in probes if task in p.result["tasks"]] for task in tasks}


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(path)


# ---------------------------------------------------------------------------------------------------------------------
# loss, accuracy and cost

PANELS = {  # by kind of run
    "teacher": {"title": "teacher (SALT stage 1)", "ylabel": "pixel loss (mean squared error)"},
    "student": {"title": "student (SALT stage 2)", "ylabel": "latent loss (mean absolute error)"},
    "ema": {"title": "EMA baseline (V-JEPA 2)", "ylabel": "latent loss (mean absolute error)"},
}


def curves(args):
    """Draw the loss over the training steps, one panel per kind of run, as their losses are not comparable."""
    panels = {}  # {kind: folders}
    for run in args.runs:
        file = Path(run, "args.json")
        kind = parse(file.read_text(), file, "the args.json of a training run", "kind")["kind"]
        panels.setdefault(kind, []).append(run)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.2), squeeze=False)
    for ax, (kind, runs) in zip(axes[0], panels.items(), strict=True):
        for run in runs:
            log = list(read_log(Path(run, "metrics.jsonl")))
            ax.plot([line["step"] for line in log], [line["loss"] for line in log], label=run, linewidth=1)
        ax.set(xlabel="training step", **PANELS[kind])
        ax.legend(fontsize=8)
    save(figure, args.save)


def table(args):
    """Write a markdown table of accuracy and cost, with a row for each folder of probe.py."""
    write_table([row_cells([read_probe(folder)]) for folder in args.runs], args.save)


def row_cells(probes):
    """A row of the table, {heading: cell}, without what is unknown: means over probes that differ only in their seeds.

    Accuracies have their standard deviation over the runs or, for a single run, over the seeds of its probe.
    """
    cells = {"encoder": probes[0].encoder}
    for task, top1 in accuracies(probes).items():
        result = next(probe.result["tasks"][task] for probe in probes if task in probe.result["tasks"])
        deviation = np.std(top1, ddof=1) if len(top1) > 1 else result["spread"]
        heading = f"{task}, top-1 % (chance {result['chance']:.1f})"
        cells[heading] = f"{np.mean(top1):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
    own = [probe.stages[0] for probe in probes if probe.stages]
    cells["steps"] = str(own[0].step if own else 0)
    if own and all(stage.log for stage in own):
        loss, seconds, flops = (np.mean([stage.log[name] for stage in own]) for name in ("loss", "seconds", "flops"))
        cells |= {"loss": f"{loss:.3f}", "time": duration(seconds), "FLOPs": f"{flops:.2g}"}
    if own and all(stage.log for probe in probes for stage in probe.stages):
        totals = [sum(stage.log["flops"] for stage in probe.stages) for probe in probes]
        cells["incl. teachers"] = f"{np.mean(totals):.2g}"
    return cells


def write_table(rows, path):
    """Write and print a markdown table of rows {heading: cell}."""
    last = ("loss", "steps", "time", "FLOPs", "incl. teachers")
    found = dict.fromkeys(heading for row in rows for heading in row)
    columns = [name for name in found if name not in last] + [name for name in last if name in found]
    lines = [columns, *([row.get(heading, "-") for heading in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
    write_lines(path, [text])
    print(text)


STYLES = {  # by `Probe.encoder`: color, marker
    "untrained": ("0.6", "x"),
    "teacher": ("tab:orange", "^"),
    "student": ("black", "o"),
    "EMA": ("tab:blue", "s"),
    "EMA, online encoder": ("tab:cyan", "D"),
    "vjepa2": ("tab:green", "v"),
}


def group_probes(runs):
    """{(folder of the variant, encoder): probes that differ only in their seeds}."""
    groups = {}
    for run in runs:
        probes = [read_probe(file.parent) for file in sorted(Path(run).rglob("results.json"))]
        if not probes:
            raise ValueError(f"there are no results of probe.py in {run}")
        for probe in sorted(probes, key=lambda probe: list(STYLES).index(probe.encoder)):
            groups.setdefault((run, probe.encoder), []).append(probe)
    return groups


def compare(args):
    """Compare variants: a figure with the accuracy of every run, the means and standard deviations, and a table.

    RUN is a folder with all probes of a variant in it, at any depth. The table has the figure's name and suffix .md.
    """
    groups = group_probes(args.runs)
    tasks = accuracies([probe for probes in groups.values() for probe in probes])
    width = max(3.4, 1.6 + len(args.runs))  # in inches, of a task's panel
    figure, axes = plt.subplots(1, len(tasks), figsize=(width * len(tasks), 3.8), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for (run, encoder), probes in groups.items():
            if top1 := accuracies(probes).get(task):
                beside = [other for variant, other in groups if variant == run]
                x = args.runs.index(run) + 0.1 * (beside.index(encoder) - (len(beside) - 1) / 2)
                color, marker = STYLES[encoder]
                ax.plot([x] * len(top1), top1, ".", color=color, alpha=0.4, markersize=4)
                deviation = np.std(top1, ddof=min(1, len(top1) - 1))  # 0 of a single run
                ax.errorbar(x, np.mean(top1), deviation, color=color, fmt=marker, capsize=3, label=encoder)
        ax.set(ylabel="top-1 accuracy, %", title=task)
        ax.set_xticks(range(len(args.runs)), [Path(run).name for run in args.runs], fontsize=8)
        ax.grid(color="0.9", axis="y")
    handles, names = axes[0][0].get_legend_handles_labels()
    legend = dict(zip(names, handles, strict=True))  # once per encoder
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), fontsize=8)
    figure.suptitle("Small dots: runs of different seeds. Error bars: their standard deviation.", fontsize=8)
    save(figure, args.save)
    rows = []
    for (run, encoder), probes in groups.items():
        rows.append({"variant": Path(run).name, "encoder": encoder, "runs": str(len(probes))} | row_cells(probes))
    write_table(rows, args.save.with_suffix(".md"))


RESAMPLES = 10_000  # of the bootstrap


def differences(args):
    """Write a table of the paired differences in accuracy: of two encoders of a variant, of two variants of an encoder.

    RUN is as for `compare`. Pairs the probes with the same --seed. A cell holds the mean difference in points, its 95%
    interval (bootstrap over training seeds and sources of videos), and for how many of the seeds it is positive.
    Videos whose paths have the same match of --source are of one source.
    """
    rows, groups = [], group_probes(args.runs)
    for ((run, encoder), first), ((other_run, other), second) in itertools.combinations(groups.items(), 2):
        if run == other_run:
            row = {"difference": f"{Path(run).name}: {other} - {encoder}"}
        elif encoder == other:
            row = {"difference": f"{encoder}: {Path(run).name} - {Path(other_run).name}"}
            first, second = second, first
        else:
            continue
        a, b = ({probe.result["args"]["seed"]: probe.result for probe in probes} for probes in (first, second))
        seeds = sorted(a.keys() & b.keys())
        for task in accuracies(first) if seeds else ():
            gains = np.array([hits(b[seed], task) - hits(a[seed], task) for seed in seeds])  # (seeds, videos)
            low, high = bootstrap(gains, sources(a[seeds[0]], gains.shape[1], args.source))
            better = f"{(gains.mean(1) > 0).sum()} of {len(seeds)}"
            row[task] = f"{gains.mean():+.1f} ({low:+.1f} to {high:+.1f}); {better}"
        rows.append(row)
    write_table(rows, args.save)


def hits(result, task):
    """In percent, how often each validation video is classified correctly, over the seeds of the probe: (videos,)."""
    per_seed = result["tasks"].get(task, {}).get("correct")
    if not per_seed:
        raise ValueError(f"a probe of {result['checkpoint']} has no {task!r}: probe again, with this probe.py")
    return 100 * np.mean([list(map(int, correct)) for correct in per_seed], axis=0)


def sources(result, count, pattern):
    """The number of each validation video's source, (videos,); each video is its own without a pattern."""
    if not pattern:
        return np.arange(count)
    paths = [path for manifest in result["args"]["val_data"] for path in data.read_manifest(manifest)[0]]
    matches = [re.search(pattern, path) for path in paths]
    if None in matches:
        raise ValueError(f"--source does not match {paths[matches.index(None)]}")
    return np.unique([match[0] for match in matches], return_inverse=True)[1]


def bootstrap(gains, sources):
    """95% interval of the mean of gains (seeds, videos), resampling seeds, and videos by source."""
    rng, (num_seeds, _), num_sources = np.random.default_rng(0), gains.shape, sources.max() + 1
    totals = np.stack([np.bincount(sources, row) for row in gains])  # (seeds, sources)
    draws = rng.multinomial(num_sources, np.full(num_sources, 1 / num_sources), RESAMPLES)  # (resamples, sources)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES) / num_seeds
    means = (seeds @ totals * draws).sum(1) / (draws @ np.bincount(sources))
    return np.percentile(means, [2.5, 97.5])


AGAINST = {  # --against: label, index in the lineage (0: the checkpoint, 1: its teacher)
    "loss": ("training loss", 0),
    "rankme": ("RankMe", 0),
    "teacher-loss": ("training loss of the teacher", 1),
    "teacher-rankme": ("RankMe of the teacher", 1),
}


def correlate(args):
    """Correlate the accuracy of checkpoints with their loss or RankMe, or their teachers' (paper, figures 3 and 9).

    RankMe is the effective rank of the mean tokens of --clips clips. Use at least ten times the encoder's width.
    """
    probes = [read_probe(folder) for folder in args.runs]
    if len(probes) < 3:
        raise ValueError(f"a correlation of {len(probes)} checkpoints is meaningless: give three or more")
    common = {task: top1 for task, top1 in accuracies(probes).items() if len(top1) == len(probes)}
    if not common:
        raise ValueError("these probes have no task in common")
    size = 3.6 * len(common), 3.4 * len(args.against)
    figure, axes = plt.subplots(len(args.against), len(common), figsize=size, squeeze=False)
    for row, name in zip(axes, args.against, strict=True):
        label, x = AGAINST[name][0], np.array([quantity(args, probe, name) for probe in probes])
        if np.ptp(x) == 0:
            raise ValueError(f"{name} is {x[0]:.4g} for all of these checkpoints: nothing to correlate")
        for ax, (task, y) in zip(row, common.items(), strict=True):
            pearson = np.corrcoef(x, y)[0, 1]
            found = f"R² {pearson**2:.3f}, Pearson {pearson:+.3f}"
            print(f"{task} against {label}: {found}, {len(x)} checkpoints")
            ends = np.array([x.min(), x.max()])
            ax.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color="0.6", linestyle="--", linewidth=1)
            ax.plot(x, y, "ko", markersize=4)
            ax.margins(0.1)
            ax.set(xlabel=label, ylabel=f"{task}, top-1 %")
            ax.set_title(found, fontsize=8)
    save(figure, args.save)


@torch.inference_mode()
def quantity(args, probe, name):
    """The number that --against `name` means for a probed checkpoint."""
    label, index = AGAINST[name]
    stage = probe.stages[index] if index < len(probe.stages) else None
    if not stage or not (stage.log or name.endswith("rankme")):
        raise ValueError(f"{probe.encoder} encoder of {probe.result['checkpoint']}: no {label} is known; leave it out")
    if not name.endswith("rankme"):
        return stage.log["loss"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, embeddings = load_encoder(stage.path, "encoder" if index else probe.result["weights"]).to(device), []
    for start in range(0, args.clips, 50):
        clips = load_clips(args, encoder.config, range(args.clips)[start : start + 50])
        embeddings.append(encoder(data.normalize(clips, device)).mean(1).cpu())
    return effective_rank(torch.cat(embeddings))


# ---------------------------------------------------------------------------------------------------------------------
# pictures

CLIP_SEED = 2**31 + 4  # seed of built-in clips that no training run and no probe uses
MASK = 17  # a draw that leaves half of a 4x4 grid visible
DENSE = 28  # rows and columns, at least, of a map of features


def load_clips(args, config, numbers):
    """These clips of --data, or built-in ones, for an encoder of this config: (B, 3, T, H, W) uint8."""
    if not args.data:
        return data.Synthetic(config["num_frames"], config["resolution"], CLIP_SEED).batch(numbers).clips
    source = data.Manifest(args.data, config["num_frames"], args.frame_step, config["resolution"], train=False)
    return source.batch([n % len(source) for n in numbers]).clips


@torch.no_grad()
def picture(args):
    """Draw video clips, what a teacher (stage 1) sees of them and fills in, and the features of other encoders.

    The teacher sees a short-range mask of its training, and predicts every hidden tubelet. It predicts normalized
    pixels; brightness and contrast are fitted to what it sees (`join`), never taken from the hidden pixels. Features
    are the first three principal components of an encoder's tokens over all clips and frames, as red, green and blue.
    Small token grids are refined: the encoder also sees the clips shifted by fractions of a patch.

    Writes a .png, with time from left to right, and a .gif.
    """
    clips = load_clips(args, load_encoder(args.runs[0]).config, range(args.first, args.first + args.clips))
    x = data.normalize(clips, torch.device("cpu"))
    videos = [("video clip", clips)]
    for run in args.runs:
        checkpoint, encoder = load_checkpoint(run), load_encoder(run)
        if checkpoint["kind"] == "teacher" and not args.features:
            mask = sample_masks(checkpoint["args"]["mask"], encoder.grid(x), len(x), generator("picture", MASK))[0]
            seen, filled = fill_in(encoder, load_predictor(run), x, mask.context_ids)
            videos += [("what the\nteacher sees", seen), ("what the\nteacher fills in", filled)]
        else:
            videos.append((f"features of\n{Path(run).name}", token_colors(dense_tokens(encoder, x))))
    count = max(video.shape[2] for _, video in videos)  # frames
    columns = min(max(2, 16 // args.clips), count)
    save(draw_frames(videos, range(columns), columns), args.save.with_suffix(".png"))
    save_gif([draw_frames(videos, [frame], count) for frame in range(count)], args.save.with_suffix(".gif"))


def fill_in(encoder, predictor, x, context_ids):
    """Predict what is hidden of normalized clips x: (seen, seen and predicted), (B, 3, T, H, W) uint8; hidden: gray."""
    tubelet, grid = (encoder.tubelet_size, encoder.patch_size), encoder.grid(x)
    pixels = tubelets(x, *tubelet)  # (B, N, P)
    hidden = torch.ones(pixels.shape[:2], dtype=torch.bool).scatter(1, context_ids, False)
    target_ids = hidden.nonzero()[:, 1].view(len(x), -1)
    pattern = torch.zeros_like(pixels)
    pattern[hidden] = predictor(encoder(x, context_ids), context_ids, target_ids, grid, 0).flatten(0, 1)
    gray = untubelets(hidden[..., None].expand_as(pixels), grid, *tubelet)
    filled = untubelets(join(pixels, pattern, hidden, tubelet, grid), grid, *tubelet)
    return data.denormalize(x).masked_fill(gray, 128), data.denormalize(filled)


def join(pixels, pattern, hidden, tubelet, grid):
    """Fill hidden tubelets of `pixels` with `pattern`, scaled and shifted so that tubelets join without edges.

    A teacher predicts pixels that are normalized per tubelet and color, so it leaves their mean and standard deviation
    open. These minimize the squared differences across the borders between tubelets. Logarithms of standard deviations
    are pulled toward the mean of the visible tubelets'. pixels, pattern, returned: (B, N, P); hidden: (B, N) bool.
    """
    pixels, pattern, hidden = pixels.unflatten(-1, (3, -1)), pattern.unflatten(-1, (3, -1)), hidden[..., None, None]
    visible = ~hidden / (~hidden).sum(1, keepdim=True)  # weights (B, N, 1, 1) of a mean
    mean = (pixels.mean(-1, keepdim=True) * visible).sum(1, keepdim=True).repeat(1, pixels.shape[1], 1, 1)
    usual = (pixels.std(-1, keepdim=True) * visible).sum(1, keepdim=True)  # (B, 1, 3, 1)
    log_ratio = torch.zeros_like(mean)  # of a tubelet's standard deviation to `usual`
    unknown = [mean.requires_grad_(), log_ratio.requires_grad_()]
    optimizer = torch.optim.LBFGS(unknown, max_iter=200, line_search_fn="strong_wolfe")

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


def dense_tokens(encoder, x):
    """A map of tokens with at least DENSE rows and columns, if the patches have that many pixels: (B, t, n*h, n*w, D).

    Encode the normalized clips x n times n times, shifted by patch_size / n pixels down and across from one time to the
    next, and interleave the tokens.
    """
    (B, _, _, H, W), patch = x.shape, encoder.patch_size
    t, h, w = encoder.grid(x)
    n = next((n for n in range(1, patch) if patch % n == 0 and n * min(h, w) >= DENSE), patch)
    step, before = patch // n, (patch - patch // n) // 2
    padded = F.pad(x, (before, patch - step - before) * 2 + (0, 0), mode="replicate")
    dense = torch.empty(B, t, h, n, w, n, encoder.width)
    for i, j in np.ndindex(n, n):
        shifted = padded[..., i * step : i * step + H, j * step : j * step + W]
        dense[:, :, :, i, :, j] = encoder(shifted).unflatten(1, (t, h, w))
    return dense.flatten(4, 5).flatten(2, 3)


def token_colors(tokens):
    """The first three principal components of tokens (B, t, h, w, D) of all clips, as colors (B, 3, t, h, w) uint8."""
    flat = (tokens - tokens.mean((0, 1, 2, 3))).flatten(0, 3)
    components = flat @ torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    colors = ((components - low) / (high - low)).clamp(0, 1) * 255
    return colors.to(torch.uint8).unflatten(0, tokens.shape[:4]).permute(0, 4, 1, 2, 3)


def draw_frames(videos, frames, count):
    """A figure with a row for each of the videos [(label, (B, 3, T, H, W) uint8), ...], all stretched to one size.

    Shows the clips from left to right, and of each clip these of `count` evenly spaced frames.
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
    figure, ax = plt.subplots(figsize=(image.shape[1] * scale + 1.1, image.shape[0] * scale + 0.1))  # room for labels
    ax.imshow(image, interpolation="nearest")
    ax.set_yticks([size / 2 + i * (size + gap) for i in range(len(videos))], [label for label, _ in videos], fontsize=9)
    ax.tick_params(length=0)
    ax.set(xticks=[], frame_on=False)
    return figure


def save_gif(figures, path):
    images = []
    for figure in figures:
        figure.canvas.draw()
        images.append(PIL.Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
        plt.close(figure)
    images[0].save(path, save_all=True, append_images=images[1:], duration=200, loop=0)
    print(path)


def parse_args():
    parser = Parser(__doc__, prog="python -m tools.analyze")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(function, save, runs, clips=None):
        text = inspect.getdoc(function)
        command = commands.add_parser(function.__name__, description=text, help=text.splitlines()[0])
        command.set_defaults(function=function)
        flag = command.add_argument
        flag("runs", nargs="+", metavar="RUN", help=runs)
        flag("--save", type=Path, default=Path("out", save), help="file to write")
        if clips:
            flag("--data", nargs="+", metavar="MANIFEST", help="videos to take clips from; default: built-in videos")
            flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
            flag("--clips", type=int, default=clips, help="number of clips")
        return flag

    add_command(curves, "curves.png", "run folders")
    flag = add_command(picture, "picture", "run folders or checkpoint files", clips=4)
    flag("--first", type=int, default=0, help="number of the first clip")
    flag("--features", action="store_true", help="draw the features of teachers, too, and not what they fill in")
    add_command(table, "table.md", "folders that probe.py wrote")
    add_command(compare, "compare.png", "folders of variants")
    flag = add_command(differences, "differences.md", "folders of variants")
    flag("--source", metavar="REGEX", help="part of a path that names the source; default: each video is its own")
    flag = add_command(correlate, "correlate.png", "folders that probe.py wrote", clips=2000)
    flag("--against", nargs="+", choices=AGAINST, default=["loss"], help="what to correlate the accuracy with")
    return parser.parse_args()


def main():
    args = parse_args()
    if "clips" in args:
        require_at_least(args, 1, "clips", "frame_step")
    try:
        args.function(args)
    except (OSError, ValueError) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
