"""A report of training runs as one self-contained HTML page: `python -m tools.analyze report out/teacher out/student`.

For every run: what it is, its curves, pictures of what it has learned, the results of probe.py in folders beside it,
and its flags.
"""

import argparse
import base64
import contextlib
import html
import io
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from cli import duration
from tools.pictures import features, picture, save

CURVES = {  # title: the metrics of metrics.jsonl that its panel shows
    "loss": ("loss", "held_out_loss"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "clips per second": ("clips_per_s",),
    "standard deviation": ("prediction_std", "target_std"),
    "effective rank": ("prediction_rank", "target_rank"),
}
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 24px } h2 { font-size: 19px; border-top: 1px solid #bbb; padding-top: 1em; margin-top: 2em }
img { max-width: 100%; display: block; margin: 1em 0 }
table { border-collapse: collapse } td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top }
summary { cursor: pointer }
"""


def page(runs):
    """The page as a string. runs: [(folder, args.json, log lines, [(name, results.json of probe.py), ...]), ...]."""
    body = "".join(section(*run) for run in runs)
    title = "SALT: " + ", ".join(html.escape(str(folder)) for folder, *_ in runs)
    return f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n" + (
        f"<h1>{title}</h1>\n{body}</html>\n"
    )


def section(folder, record, log, probes):
    """A run's part of the page."""
    last, args = log[-1], record["args"]
    encoder = record["model"]["encoder"]
    facts = {
        "encoder": f"width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads; "
        f"{encoder['num_frames']} frames of {encoder['resolution']}×{encoder['resolution']} pixels",
        "data": " ".join(args["data"] or ["built-in videos"]),
        "teacher": args.get("teacher"),
        "step": f"{last['step']:,} of {args['steps']:,}, {args['batch_size']} clips each",
        "loss": f"{last['loss']:.4f}",
        "cost": f"{duration(last['seconds'])}, {last['flops']:.3g} FLOPs executed, {last['clips_per_s']:.0f} clips/s",
        "unreadable videos": f"{last['bad_videos']:,}",
    }
    parts = [f"<h2>{html.escape(str(folder))}: {record['kind']}</h2>", table(facts.items())]
    parts.append(image(lambda path: draw_curves(log, path), "png", "curves of the run"))
    parts.append(image(lambda path: draw_pictures(folder, record, path), "gif", "what the networks see"))
    if probes:
        rows = [
            (f"{name}: {task}", f"{accuracy(found)}, step {result['step']}")
            for name, result in probes
            for task, found in result["tasks"].items()
        ]
        parts += ["<h3>Probes</h3>", table(rows)]
    flags = table((f"--{name.replace('_', '-')}", value) for name, value in args.items())
    return "\n".join([*parts, f"<details><summary>All flags</summary>{flags}</details>", ""])


def table(rows):
    """An HTML table of (name, value) rows; values that are None are left out."""
    cells = (f"<tr><th>{html.escape(name)}<td>{html.escape(str(x))}" for name, x in rows if x is not None)
    return f"<table>{''.join(cells)}</table>"


def accuracy(found):
    """The result of probe.py for a task, as text."""
    low, high = found["interval95"]
    return f"top-1 {found['top1']:.1f}% (95% interval {low:.1f} to {high:.1f}, chance {found['chance']:.1f})"


def image(draw, suffix, text):
    """An HTML image that holds the file that draw(path) writes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # the file's name
        path = Path(folder, f"x.{suffix}")
        draw(path)
        return f'<img alt="{text}" src="data:image/{suffix};base64,{base64.b64encode(path.read_bytes()).decode()}">'


def draw_curves(log, path):
    """Draw the metrics of a run over its steps."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for ax, (title, names) in zip(axes.flat, CURVES.items(), strict=True):
        for name, style in zip(names, ("k-", "k:"), strict=False):
            points = np.array([(line["step"], line[name]) for line in log if name in line])
            if len(points):
                ax.plot(*points.T, style, linewidth=1, label=name)
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=8)
        if len(names) > 1:
            ax.legend(fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    save(figure, path)


def draw_pictures(folder, record, path):
    """Draw what a teacher fills in and, for a student, its features. For other runs, draw features only."""
    args = record["args"]
    options = dict(data=args["data"], frame_step=args["frame_step"], clips=4, first=0, save=path)
    teacher = args.get("teacher")
    if record["kind"] == "teacher":
        picture(argparse.Namespace(runs=[folder], **options))
    elif teacher and json.loads(Path(teacher, "args.json").read_text())["kind"] == "teacher":
        picture(argparse.Namespace(runs=[teacher, folder], **options))
    else:
        features(argparse.Namespace(runs=[folder], **options))
