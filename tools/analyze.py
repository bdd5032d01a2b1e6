"""Analyze runs: loss curves, pictures, effective rank, accuracy and cost.

    python -m tools.analyze curves out/teacher out/student                          loss over the training steps
    python -m tools.analyze picture out/teacher out/student --save salt.gif         what they see: png, gif or mp4
    python -m tools.analyze features out/student --data mine.csv --save mine.gif    features of your own videos
    python -m tools.analyze rankme out/teacher out/student                          effective rank of the embeddings
    python -m tools.analyze report out/teacher out/student                          all about runs, as one HTML page
    python -m tools.analyze table out/probe-*                                       accuracy and cost
    python -m tools.analyze compare out/study/masks/*                               accuracy of variants, with all seeds
    python -m tools.analyze pareto out/probe-*                                      accuracy against training FLOPs
    python -m tools.analyze correlate out/probe-* --against loss rankme             does the loss predict the accuracy?

table, compare, pareto and correlate read the folders that probe.py writes. FLOPs are those executed, from the training
logs, and include the teachers'; `pareto --paper` counts as the paper does.
"""

import inspect
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator

import data
import flops
from cli import Parser, duration, fail, require_at_least, resolve_device
from model import load_checkpoint, load_encoder, load_teacher_of, token_grid
from tools.pictures import features, load_clips, picture, save
from tools.report import page
from training import effective_rank

# ---------------------------------------------------------------------------------------------------------------------
# reading runs


class Stage(NamedTuple):
    """A training run behind a checkpoint, up to the checkpoint's step."""

    path: Path
    kind: str  # "teacher", "student", "ema", or "vjepa2" if converted by tools/convert.py
    step: int
    encoder: dict  # config
    args: dict  # the run's flags; empty for a converted checkpoint
    loss: float | None  # loss, seconds and flops are None if the run's log does not have this step
    seconds: float | None
    flops: float | None  # executed, without the teacher's training
    paper_flops: float | None  # counted as the paper does; None for a converted checkpoint


def parse(text, path, description, *keys):
    """Parse a JSON object with these keys; ValueError naming the file it is from if it is anything else."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or is not {description}") from error
    if not isinstance(record, dict) or any(key not in record for key in keys):
        raise ValueError(f"{path} is damaged or is not {description}")
    return record


def read_log(path):
    """Yield the lines of a metrics.jsonl as dictionaries."""
    for line in path.read_text().splitlines():
        yield parse(line, path, "a training log", "step", "loss")


def lineage(path):
    """The training stages behind a checkpoint: a list of `Stage`, its own first, then its teacher's, and so on.

    ValueError if a teacher has been retrained since.
    """
    return _lineage(Path(path), load_checkpoint(path))


def _lineage(path, checkpoint):
    kind, step, args = checkpoint["kind"], checkpoint["step"], checkpoint["args"]
    teachers = []
    if "teacher" in args:
        teachers = _lineage(Path(args["teacher"]), load_teacher_of(checkpoint, args["teacher"]))
    log = (path if path.is_dir() else path.parent) / "metrics.jsonl"
    logged = {}
    if log.exists():
        logged = next((line for line in read_log(log) if line["step"] == step), {})
    costs = logged.get("loss"), logged.get("seconds"), logged.get("flops"), paper_flops(checkpoint, teachers)
    stage = Stage(path, kind, step, checkpoint["model"]["encoder"], args, *costs)
    return [stage, *teachers]


def paper_flops(checkpoint, teachers):
    """Training FLOPs as the paper counts them; None for a converted checkpoint. teachers: the rest of its lineage."""
    if not checkpoint["args"]:
        return None
    encoder, predictor = checkpoint["model"]["encoder"], checkpoint["model"]["predictor"]
    teacher = None
    if checkpoint["kind"] == "student":
        teacher = teachers[0].encoder
    elif checkpoint["kind"] == "ema":
        teacher = encoder
    clip_shape = encoder["num_frames"], encoder["resolution"], encoder["resolution"]
    tokens = math.prod(token_grid(clip_shape, encoder["tubelet_size"], encoder["patch_size"]))
    args = checkpoint["args"]
    per_clip = flops.paper_flops_of(encoder, predictor, teacher, tokens, args.get("masks_per_clip", 1))
    return per_clip * checkpoint["step"] * args["batch_size"]


def total_flops(stages, count="flops"):
    """Training FLOPs of a lineage, or None if those of a stage are unknown. count: "flops" or "paper_flops"."""
    values = [getattr(stage, count) for stage in stages]
    return None if None in values else sum(values)


def read_probe(folder):
    """Read a folder of probe.py: its results.json, and the lineage of the probed encoder ([] if it is untrained)."""
    keys = ("checkpoint", "step", "weights", "tasks", "args")
    path = folder / "results.json"
    result = parse(path.read_text(), path, "the results of probe.py", *keys)
    if result["weights"] == "untrained":
        return result, []
    stages = lineage(result["checkpoint"])
    if stages[0].step != result["step"]:
        raise ValueError(
            f"{result['checkpoint']} was at step {result['step']} when it was probed and is at step {stages[0].step} "
            "now: probe it again"
        )
    return result, stages


# ---------------------------------------------------------------------------------------------------------------------
# loss curves

LATENT_LOSS = "latent loss (mean absolute error)"
PANELS = {  # of `curves`, by kind of run: title, label of the y axis
    "teacher": ("teacher (SALT stage 1)", "pixel loss (mean squared error)"),
    "student": ("student (SALT stage 2)", LATENT_LOSS),
    "ema": ("EMA baseline (V-JEPA 2)", LATENT_LOSS),
}


def curves(args):
    """Draw the loss over the training steps, one panel per kind of run, as their losses are not comparable."""
    panels = {}  # [(path, log), ...] by kind
    for path in map(Path, args.runs):
        log = list(read_log(path / "metrics.jsonl"))
        file = path / "args.json"
        kind = parse(file.read_text(), file, "the args.json of a training run", "kind")["kind"]
        panels.setdefault(kind, []).append((path, log))
    size = 5 * len(panels), 3.2
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, (kind, runs) in zip(axes[0], panels.items(), strict=True):
        for i, (path, log) in enumerate(runs):
            style = ("k-", "k--", "k:", "k-.")[i % 4]
            steps, losses = [line["step"] for line in log], [line["loss"] for line in log]
            ax.plot(steps, losses, style, label=str(path), linewidth=1)
        title, label = PANELS.get(kind, (kind, "loss"))
        ax.set(xlabel="training step", ylabel=label, title=title)
        ax.legend(fontsize=8)
    save(figure, args.save)


# ---------------------------------------------------------------------------------------------------------------------
# effective rank


def write_text(text, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@torch.inference_mode()
def embeddings(args, path, weights="encoder"):
    """Embeddings of --clips clips, their mean tokens: (clips, width) float32. path, weights: see `load_encoder`."""
    encoder = load_encoder(path, weights).to(args.device)
    parts, end = [], args.first + args.clips
    for start in range(args.first, end, 50):
        clips = load_clips(args, encoder.config, start, min(50, end - start))
        tokens = encoder(data.normalize(clips, torch.device(args.device)))
        parts.append(tokens.mean(1).float().cpu())
    return torch.cat(parts)


def rankme(args):
    """Print the effective rank (RankMe) of each encoder's embeddings, which are the mean tokens of clips.

    Use at least ten times as many --clips as the encoder's width.
    """
    found = {}
    for run in args.runs:
        x = embeddings(args, run)
        clips, width = x.shape
        found[run] = {"rankme": effective_rank(x), "width": width, "clips": clips}
        print(f"{run}: RankMe {found[run]['rankme']:.1f} of {width}, {clips} clips")
    write_text(json.dumps(found, indent=2), args.save)


# ---------------------------------------------------------------------------------------------------------------------
# accuracy and cost


class Accuracy(NamedTuple):
    """Top-1 accuracy of an experiment on a task, in percent."""

    mean: float  # over runs
    spread: float | None  # standard deviation over runs or, for a single run, over the seeds of its probe
    chance: float


class Experiment(NamedTuple):
    """Probed runs that differ only in their seeds."""

    name: str  # see `encoder_name`
    lineages: list  # one per folder of probe.py; see `read_probe`
    runs: int
    accuracies: dict  # task: `Accuracy`


# Flags that may differ between the runs of an experiment. A teacher or checkpoint is compared by its own flags.
INCIDENTAL = {"seed", "seeds", "out", "fresh", "workers", "device", "compile", "teacher", "checkpoint", "task",
              "save_every", "log_every", "snapshot_every", "untrained", "weights"}  # fmt: skip


def essential(flags):
    """The flags that must be the same in all runs of an experiment."""
    return {name: value for name, value in flags.items() if name not in INCIDENTAL}


def encoder_name(result, stages):
    """Name a probed encoder for tables and legends. Arguments: see `read_probe`."""
    if result["weights"] == "untrained":
        return "untrained"
    if result["weights"] == "student":
        return "EMA's student"
    return "EMA (V-JEPA 2)" if stages[0].kind == "ema" else stages[0].kind


def experiments(folders):
    """Group folders of probe.py into a list of `Experiment`."""
    groups = {}  # what all runs of an experiment have in common, as JSON: [(result, stages), ...]
    for folder in map(Path, folders):
        result, stages = read_probe(folder)
        trained = [(stage.kind, stage.step, stage.encoder, essential(stage.args)) for stage in stages]
        if not trained:
            trained = load_checkpoint(result["checkpoint"])["model"]["encoder"]
        common = json.dumps([encoder_name(result, stages), essential(result["args"]), trained])
        groups.setdefault(common, []).append((result, stages))
    return [summarize(probes) for probes in groups.values()]


def summarize(probes):
    """Combine probes that differ only in their seeds into an `Experiment`. probes: [(result, stages), ...]."""
    accuracies, runs = {}, 1
    for task in dict.fromkeys(task for result, _ in probes for task in result["tasks"]):
        found = [result["tasks"][task] for result, _ in probes if task in result["tasks"]]
        top1 = [one["top1"] for one in found]
        spread = np.std(top1, ddof=1) if len(top1) > 1 else found[0]["spread"]
        accuracies[task] = Accuracy(np.mean(top1), spread, found[0]["chance"])
        runs = max(runs, len(top1))
    return Experiment(encoder_name(*probes[0]), [stages for _, stages in probes], runs, accuracies)


def table(args):
    """Write a markdown table of accuracy and cost. Runs that differ only in their seeds share a row."""
    write_table([("", experiment) for experiment in experiments(args.runs)], args.save)


def write_table(rows, path):
    """Write and print a markdown table. rows: [(variant, or "" in all rows, `Experiment`), ...]."""
    tasks = {task: accuracy for _, experiment in rows for task, accuracy in experiment.accuracies.items()}
    headings = {task: f"{task}, top-1 % (chance {accuracy.chance:.1f})" for task, accuracy in tasks.items()}
    columns = ["variant", "encoder", "runs", *tasks, "loss", "steps", "time", "FLOPs", "incl. teachers"]
    if not any(variant for variant, _ in rows):
        columns.remove("variant")
    if all(experiment.runs == 1 for _, experiment in rows):
        columns.remove("runs")
    cells = [{"variant": variant} | table_cells(experiment) for variant, experiment in rows]
    cells = [[headings.get(column, column) for column in columns], *([c.get(x, "-") for x in columns] for c in cells)]
    text = markdown(cells)
    write_text(text, path)
    print(text)


def table_cells(experiment):
    """The cells of an experiment's row in `table`, by column; without those that are unknown. Costs are means."""
    cells = {"encoder": experiment.name, "runs": str(experiment.runs), "steps": "0"}
    for task, accuracy in experiment.accuracies.items():
        cells[task] = f"{accuracy.mean:.1f}"
        if accuracy.spread is not None:
            cells[task] += f" ± {accuracy.spread:.1f}"
    if experiment.name == "untrained":
        return cells
    own = [stages[0] for stages in experiment.lineages]
    cells["steps"] = str(own[0].step)
    if any(stage.loss is None for stage in own):  # a converted checkpoint, or a file outside its run folder
        return cells
    cells["loss"] = f"{np.mean([stage.loss for stage in own]):.3f}"
    cells["time"] = duration(np.mean([stage.seconds for stage in own]))
    cells["FLOPs"] = f"{np.mean([stage.flops for stage in own]):.2g}"
    totals = [total_flops(stages) for stages in experiment.lineages]
    if None not in totals:
        cells["incl. teachers"] = f"{np.mean(totals):.2g}"
    return cells


def markdown(rows):
    """Format rows of strings, the first of which is the heading, as a markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def compare(args):
    """Compare variants: a figure with the accuracy of every run, the means and standard deviations, and a table.

    RUN is a folder with all probes of a variant in it, at any depth. The table has the figure's name and suffix .md.
    """
    variants, found = [Path(folder) for folder in args.runs], {}  # found: {(variant, encoder name): [probe, ...]}
    for folder in variants:
        files = sorted(folder.rglob("results.json"))
        if not files:
            raise ValueError(f"there are no results of probe.py in {folder}")
        for probe in (read_probe(file.parent) for file in files):
            found.setdefault((folder.name, encoder_name(*probe)), []).append(probe)
    rows = [(variant, summarize(probes)) for (variant, _), probes in found.items()]
    tasks = list(dict.fromkeys(task for _, experiment in rows for task in experiment.accuracies))
    names = list(dict.fromkeys([*STYLES, *(name for _, name in found)]))
    size = (1.6 + len(variants)) * len(tasks), 3.6
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks, strict=True):
        for name in names:
            marker, _, gray = STYLES.get(name, ("x", "", "0.5"))
            label = name
            for x, folder in enumerate(variants):
                here = [other for other in names if (folder.name, other) in found]
                top1 = [r["tasks"][task]["top1"] for r, _ in found.get((folder.name, name), []) if task in r["tasks"]]
                if top1:
                    place = x + 0.12 * (here.index(name) - (len(here) - 1) / 2)
                    spread = np.std(top1, ddof=1) if len(top1) > 1 else 0
                    ax.plot([place] * len(top1), top1, ".", color="0.75", markersize=4)
                    ax.errorbar(place, np.mean(top1), spread, color=gray, marker=marker, capsize=3, label=label)
                    label = None  # one entry of the legend for each name
        ax.set(ylabel="top-1 accuracy, %", title=task)
        ax.set_xticks(range(len(variants)), [folder.name for folder in variants], fontsize=8)
        ax.grid(color="0.9", axis="y")
        ax.legend(fontsize=7)
    figure.suptitle("Small dots: runs of different seeds. Error bars: their standard deviation.", fontsize=8)
    save(figure, args.save)
    write_table(rows, args.save.with_suffix(".md"))


STYLES = {  # by `encoder_name`: marker, line, gray level
    "untrained": ("x", "", "0.5"),
    "teacher": ("^", ":", "0.45"),
    "student": ("o", "-", "0.0"),
    "EMA (V-JEPA 2)": ("s", "--", "0.3"),
    "EMA's student": ("D", "-.", "0.55"),
}

PAPER_TASKS = ("ssv2", "k400")
PAPER = {  # table 1: marker, line, (FLOPs in 1e21, top-1 on ssv2, top-1 on k400) of each model size
    "SALT (paper)": ("o", "-", [(1.2, 74.9, 85.4), (1.5, 75.4, 86.0), (1.9, 76.2, 86.8), (2.6, 76.1, 87.2)]),
    "V-JEPA 2, V-3.6M (paper)": ("s", "--", [(1.4, 68.2, 83.8), (2.6, 73.4, 84.6)]),
    "V-JEPA 2, VM-22M (paper)": ("D", ":", [(1.9, 73.7, 85.1), (3.5, 74.0, 85.3), (5.3, 75.3, 86.6)]),
}


def pareto(args):
    """Draw accuracy against training FLOPs, including the teachers', one panel per task."""
    found = experiments(args.runs)
    tasks = list(dict.fromkeys(task for experiment in found for task in experiment.accuracies))
    if args.paper:
        tasks += [task for task in PAPER_TASKS if task not in tasks]
    if not tasks:
        fail("pareto: give folders that probe.py wrote, or --paper")
    count, counted = "flops", "executed"
    if args.paper:
        count, counted = "paper_flops", "as the paper counts them"
    size = 4.6 * len(tasks), 3.8
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks, strict=True):
        if args.paper and task in PAPER_TASKS:
            draw_paper(ax, task)
        draw_experiments(ax, task, found, count)
        ax.set(xscale="log", xlabel=f"training FLOPs {counted}, incl. teachers", ylabel="top-1 accuracy, %", title=task)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e+", "e"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(color="0.9")
        ax.legend(fontsize=7)
    if found:
        figure.suptitle("Error bars: standard deviation over runs or, for a single run, over probe seeds.", fontsize=8)
    save(figure, args.save)


def draw_paper(ax, task):
    """Draw the points of the paper's table 1."""
    column = 1 + PAPER_TASKS.index(task)
    for name, (marker, line, points) in PAPER.items():
        x, y = [1e21 * point[0] for point in points], [point[column] for point in points]
        ax.plot(x, y, color="0.7", marker=marker, linestyle=line, label=name)


def draw_experiments(ax, task, found, count):
    """Draw a curve for each name, and a horizontal line for untrained encoders. count: see `total_flops`."""
    points = {}  # name: [(FLOPs, accuracy, spread), ...]
    for experiment in found:
        if task in experiment.accuracies:
            accuracy = experiment.accuracies[task]
            point = mean_flops(experiment.lineages, count), accuracy.mean, accuracy.spread or 0
            points.setdefault(experiment.name, []).append(point)
    for _, mean, _ in points.pop("untrained", []):
        ax.axhline(mean, color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="untrained")
    for name, values in points.items():
        marker, line, gray = STYLES.get(name, ("x", "-", "0.5"))
        x, y, spread = zip(*sorted(values), strict=True)
        ax.errorbar(x, y, spread, color=gray, marker=marker, linestyle=line, capsize=3, label=name)


def mean_flops(lineages, count):
    """Mean of `total_flops` over lineages; ValueError if those of a stage are unknown."""
    for stages in lineages:
        for stage in stages:
            if getattr(stage, count) is None:
                raise ValueError(f"the FLOPs of {stage.path} are unknown: its step is not logged, or it was converted")
    return np.mean([total_flops(stages, count) for stages in lineages])


# ---------------------------------------------------------------------------------------------------------------------
# correlation

AGAINST = {  # --against: label, index in the lineage (0: the checkpoint, 1: its teacher), quantity
    "loss": ("training loss", 0, "loss"),
    "rankme": ("RankMe", 0, "rankme"),
    "teacher-loss": ("training loss of the teacher", 1, "loss"),
    "teacher-rankme": ("RankMe of the teacher", 1, "rankme"),
}


def ranks(x):
    """The ranks of numbers, from 1; equal numbers share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(x, y):
    """R² of a linear fit (Pearson's r squared), Pearson's r, and Spearman's rank correlation."""
    pearson, spearman = np.corrcoef(x, y)[0, 1], np.corrcoef(ranks(x), ranks(y))[0, 1]
    return pearson**2, pearson, spearman


def correlate(args):
    """Correlate the accuracy of checkpoints with their loss or RankMe, or their teachers': R², Pearson, Spearman."""
    points, tasks = correlation_points(args)
    if len(points) < 3:
        raise ValueError(f"a correlation of {len(points)} checkpoints is meaningless: give three or more")
    for name in (*args.against, *tasks):
        if len({point[name] for point in points}) == 1:
            raise ValueError(f"{name} is {points[0][name]:.4g} for all of these checkpoints: nothing to correlate")
    size = 3.6 * len(tasks), 3.4 * len(args.against)
    figure, axes = plt.subplots(len(args.against), len(tasks), figsize=size, squeeze=False, layout="constrained")
    steps = [point["step"] for point in points]
    for row, name in zip(axes, args.against, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            label = AGAINST[name][0]
            x, y = np.array([point[name] for point in points]), np.array([point[task] for point in points])
            r2, pearson, spearman = correlation(x, y)
            found = f"R² {r2:.3f}, Pearson {pearson:+.3f}, Spearman {spearman:+.3f}"
            print(f"{task} against {label}: {found}, {len(x)} checkpoints")
            draw_fit(ax, x, y, steps)
            ax.set(xlabel=label, ylabel=f"{task}, top-1 %")
            ax.set_title(f"R² {r2:.2f}, Pearson {pearson:+.2f}, Spearman {spearman:+.2f}", fontsize=9)
    figure.suptitle("Each point is a checkpoint, labeled with its training steps. Dashed: linear fit.", fontsize=8)
    save(figure, args.save)


def correlation_points(args):
    """What `correlate` compares: a dictionary for each probed checkpoint, and the list of tasks.

    The dictionary holds the checkpoint's "step", its accuracy by task, and the numbers that --against names.
    """
    points, tasks = [], []
    for folder in map(Path, args.runs):
        result, stages = read_probe(folder)
        if not stages:
            raise ValueError(f"{folder} is a probe of an untrained encoder, which has no loss: leave it out")
        if points and result["tasks"].keys() != set(tasks):
            raise ValueError(
                f"{folder} has the tasks {', '.join(result['tasks'])}, but {args.runs[0]} has {', '.join(tasks)}"
            )
        tasks = list(result["tasks"])
        point = {"step": stages[0].step}
        point |= {task: accuracy["top1"] for task, accuracy in result["tasks"].items()}
        point |= {name: quantity(args, result, stages, name) for name in args.against}
        points.append(point)
    return points, tasks


def quantity(args, result, stages, name):
    """The number that --against `name` means, for the probed checkpoint `result` with the lineage `stages`."""
    _, index, wanted = AGAINST[name]
    if index >= len(stages):
        raise ValueError(f"{result['checkpoint']} has no teacher: --against {name} is for students")
    stage = stages[index]
    if wanted == "rankme":
        weights = result["weights"] if index == 0 else "encoder"
        return effective_rank(embeddings(args, stage.path, weights))
    if stage.loss is None:
        raise ValueError(f"the loss of {stage.path} is unknown: there is no log of its step {stage.step} beside it")
    return stage.loss


def draw_fit(ax, x, y, steps):
    """Draw points labeled with their steps, and a straight line fitted to them."""
    slope, offset = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, offset + slope * ends, color="0.6", linestyle="--", linewidth=1)
    ax.plot(x, y, "ko", markersize=4)
    for point, step in zip(zip(x, y, strict=True), steps, strict=True):
        ax.annotate(step, point, fontsize=6, xytext=(3, 3), textcoords="offset points")
    ax.margins(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# report


def report(args):
    """Write an HTML page about training runs: curves, pictures, results of probes in folders beside them, flags."""
    keys = ("checkpoint", "step", "weights", "tasks")
    runs = []
    for run in map(Path, args.runs):
        record = parse((run / "args.json").read_text(), run / "args.json", "the args.json of a training run", "kind")
        log = list(read_log(run / "metrics.jsonl"))
        if not log:
            raise ValueError(f"{run / 'metrics.jsonl'} is empty: the run has not logged a step yet")
        files = sorted(run.resolve().parent.glob("*/results.json"))
        probes = [(file.parent.name, parse(file.read_text(), file, "the results of probe.py", *keys)) for file in files]
        own = {run.resolve(), (run / "checkpoint.pt").resolve()}
        runs.append((run, record, log, [probe for probe in probes if Path(probe[1]["checkpoint"]).resolve() in own]))
    write_text(page(runs), args.save)
    print(args.save)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def parse_args():
    parser = Parser(__doc__, prog="python -m tools.analyze")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(function, suffix, runs, nargs="+"):
        name, text = function.__name__, inspect.getdoc(function)
        command = commands.add_parser(name, description=text, help=text.splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("runs", nargs=nargs, metavar="RUN", help=runs)
        command.add_argument("--save", type=Path, default=Path(f"out/{name}.{suffix}"), help="file to write")
        return command.add_argument

    def add_clip_flags(flag, clips):
        flag("--data", nargs="+", metavar="MANIFEST", help="videos to take clips from; default: built-in videos")
        flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next")
        flag("--clips", type=int, default=clips, help="number of clips")
        flag("--first", type=int, default=0, help="number of the first clip")

    def add_embedding_flags(flag):
        add_clip_flags(flag, clips=2000)
        flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")

    runs, probes = "run folders or checkpoint files", "folders that probe.py wrote"
    add_command(curves, "png", "run folders")
    add_clip_flags(add_command(picture, "png", "a teacher, then its students: run folders or files"), clips=4)
    add_clip_flags(add_command(features, "png", runs), clips=4)
    add_embedding_flags(add_command(rankme, "json", runs))
    add_command(report, "html", "run folders")
    add_command(table, "md", probes)
    add_command(compare, "png", "folders of variants")
    flag = add_command(pareto, "png", probes, nargs="*")
    flag("--paper", action="store_true", help="count FLOPs as the paper does, and add the points of its table 1")
    flag = add_command(correlate, "png", probes)
    names = f"what to correlate the accuracy with: {', '.join(AGAINST)}"
    flag("--against", nargs="+", metavar="NAME", choices=AGAINST, default=["loss"], help=names)
    add_embedding_flags(flag)
    return parser.parse_args()


def main():
    args = parse_args()
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
