"""Frozen evaluation: how well an attentive probe solves a task from an encoder's tokens (appendix D, tables 6 and 7).

    python probe.py --task synthetic-motion synthetic-shape --checkpoint out/student
    python probe.py --task synthetic-motion --checkpoint out/student --untrained      # baseline: random weights
    torchrun --nproc_per_node=8 probe.py --task k400                                  # reads data/k400/{train,val}.csv
    python probe.py --task k400 --fast                                                # table 7: one clip, one probe
    python probe.py --train-data train.csv --val-data val.csv --num-classes 2 --checkpoint out/student
    python probe.py --task k400 --knn 10                                              # nearest neighbors, no training

The encoder is frozen and encodes each clip once; all probes of the grid train on its tokens in the same pass. A video
is `segments` clips times `views` crops (features.py). A probe sees the tokens of all segments of a view together; its
class probabilities (softmax) are averaged over the views. Training uses one view, augmented as V-JEPA 2 does
(augment.py). AdamW, cosine schedule to 0 without warm-up, 20 epochs; all probes start from the same weights. Without
augmentation, features are computed once if they fit into memory. To probe V-JEPA 2's weights, convert them first
(tools/convert.py).

Under torchrun each process takes its share of every batch, and every validation video counts exactly once. An
interrupted run, started again, continues after its last complete epoch. Writes results.json and confusion-TASK.png to
--out.

Letters: B videos of a batch, M of the data set, V views, S segments, N tokens of a clip, D width, P probes, C classes.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import video
from cli import (
    Parser,
    Progress,
    duration,
    fail,
    interval95,
    plain_flags,
    rank_and_world,
    require_at_least,
    resolve_device,
    write_atomically,
)
from features import BuiltInVideos, Stopwatch, Tokens, Videos, all_reduce, collect, load, moments, say
from model import AttentiveProbe, fingerprint, token_grid
from training import generator, peak_memory


class Protocol(NamedTuple):
    num_classes: int
    num_frames: int | None  # None: as the encoder was trained
    frame_step: int
    segments: int
    views: int
    batch_size: int
    lr: tuple = (1e-3,)
    weight_decay: tuple = (0.01,)  # a probe is trained for every pair of lr and weight decay
    augment: str = "vjepa2"  # how training videos are augmented
    flip: bool = True  # with --augment pretrain, mirror half of them; not if the classes distinguish left from right


GRID = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.8, 0.4, 0.1, 0.01)
PROTOCOLS = {  # V-JEPA 2's and the paper's, unless noted; --fast and the flags override them
    #                       classes frames step segments views batch probes
    "k400":        Protocol(  400,   16,    4,     8,     3,   256,  *GRID),
    "ssv2":        Protocol(  174,   16,    4,     2,     3,   256,  *GRID, flip=False),
    "coin":        Protocol(  180,   16,    4,     8,     3,   256),
    "diving48":    Protocol(   48,   16,    2,     4,     3,   128),
    "jester":      Protocol(   27,   16,    2,     4,     3,   128, flip=False),
    "ucf101":      Protocol(  101,   16,    4,     5,     3,   128),  # VideoMAE's clips and views (docs/method.md,
    "hmdb51":      Protocol(   51,   16,    2,    10,     3,   128),  # section 6); the paper reports neither
    "imagenet1k":  Protocol( 1000,   16,    4,     1,     3,  1024),
    "synthetic-motion": Protocol(8, None,   4,     1,     1,   256, augment="none"),
    "synthetic-shape":  Protocol(6, None,   4,     1,     1,   256, augment="none"),
}  # fmt: skip
FAST = dict(segments=1, views=1, batch_size=256, lr=(1e-3,), weight_decay=(0.01,))  # paper appendix D, table 7
SYNTHETIC = ("synthetic-motion", "synthetic-shape")  # in the order of the label columns of data.Synthetic
SYNTHETIC_SEED = 2**31  # for clips that no training run sees


# ---------------------------------------------------------------------------------------------------------------------
# flags


def make_parser():
    parser, yes_or_no = Parser(__doc__), argparse.BooleanOptionalAction
    flag = parser.add_argument_group("encoder").add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--weights", choices=("encoder", "student"), help="student: that of an EMA run or V-JEPA 2; default: encoder")
    flag("--untrained", action="store_true", help="random weights in the checkpoint's architecture")
    flag("--layers", nargs="+", type=int, help="blocks whose normed outputs the probe sees, from 1; default: the last")
    combine = "join the tokens of --layers (V-JEPA 2), their channels (concat), or average them"
    flag("--combine", choices=("tokens", "concat", "mean"), default="tokens", help=combine)

    flag = parser.add_argument_group("task (defaults: the task's protocol, at the top of probe.py)").add_argument
    flag("--task", nargs="+", choices=PROTOCOLS, default=[], help="several synthetic tasks share their features")
    flag("--train-data", nargs="+", metavar="MANIFEST", help="your own task, named like the folder of the manifest")
    flag("--val-data", nargs="+", metavar="MANIFEST", help="validation videos of your own task")
    flag("--num-classes", type=int, help="number of classes of your own task")
    flag("--fast", action="store_true", help="one clip, one view, one probe (table 7); always so for your own task")
    flag("--train-clips", type=int, default=4000, help="number of training clips of synthetic tasks")
    flag("--val-clips", type=int, default=1000, help="number of validation clips of synthetic tasks")
    flag("--num-frames", type=int, help="frames per clip; default for your own task: as the encoder was trained")
    flag("--frame-step", type=int, help="video frames from one clip frame to the next")
    flag("--fps", type=float, help="clip frames per second of video; replaces --frame-step")
    flag("--segments", type=int, help="clips per video, spread over its length")
    flag("--views", type=int, help="crops per validation video, spread along its long side")
    flag("--resolution", type=int, help="height and width of a clip in pixels; default: as the encoder was trained")
    flag("--single-frame", action="store_true", help="repeat each clip's middle frame: what is possible without motion")
    augment = "training videos: V-JEPA 2's augmentation (default), that of pretraining, or the centered validation view"
    flag("--augment", choices=("vjepa2", "pretrain", "none"), help=augment)
    flip = "mirror half of the training videos; default: with --augment pretrain, unless classes tell left from right"
    flag("--flip", action=yes_or_no, help=flip)
    flag("--skip-bad", action="store_true", help="count an unreadable validation video as a miss; default: an error")
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes per process")

    flag = parser.add_argument_group("probes").add_argument
    flag("--epochs", type=int, default=20, help="passes over the training videos (table 7)")
    flag("--batch-size", type=int, help="videos per step, over all processes")
    flag("--lr", type=float, nargs="+", help="a probe is trained for every pair of lr and weight decay")
    flag("--weight-decay", type=float, nargs="+", help="see --lr")
    flag("--probe-depth", type=int, default=4, help="blocks per probe, the last one cross-attention (appendix D)")
    flag("--probe-heads", type=int, default=16, help="attention heads (V-JEPA 2)")
    flag("--standardize", action=yes_or_no, default=False, help="scale token channels to zero mean and unit variance")
    flag("--seeds", type=int, default=1, help="number of repetitions with other initial weights and sample order")
    flag("--seed", type=int, default=0, help="seed of the first repetition, and of the untrained encoder")
    flag("--knn", type=int, metavar="K", help="classify by the K nearest training videos (mean tokens); no probes")

    flag = parser.add_argument_group("hardware and output").add_argument
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; default: bfloat16 on a GPU")
    flag("--out", type=Path, default=Path("out/probe"), help="folder for the results")
    return parser


def parse_args():
    """The flags, checked, with the task's protocol filled in."""
    args = make_parser().parse_args()
    resolve_device(args)
    apply_protocol(args)
    require_at_least(args, 1, "epochs", "batch_size", "train_clips", "val_clips", "seeds", "probe_depth")
    require_at_least(args, 1, "frame_step", "segments", "views")
    require_at_least(args, 0, "seed", "workers")
    if args.knn is not None:
        require_at_least(args, 1, "knn")
    if args.task and args.task[0] in SYNTHETIC:
        if (args.segments, args.views) != (1, 1):
            fail("--segments and --views are for videos; synthetic tasks have one of each")
        if args.augment != "none":
            fail(f"--augment {args.augment} is for videos; synthetic tasks are not augmented")
    if args.flip and args.augment == "none":
        fail("--flip needs --augment vjepa2 or pretrain")
    if args.untrained and args.weights:
        fail(f"--untrained excludes --weights {args.weights}: its weights are random")
    args.weights = args.weights or "encoder"
    args.layers = sorted(set(args.layers)) if args.layers else None
    return args


def apply_protocol(args):
    """Fill in, in place, the flags that the user left to the task's protocol."""
    own = args.train_data or args.val_data or args.num_classes
    mixed = len(args.task) > 1 and not set(args.task) <= set(SYNTHETIC)
    if bool(args.task) == bool(own) or mixed:
        fail("give --task (one, or several synthetic ones), or --train-data, --val-data and --num-classes")
    if own and not (args.train_data and args.val_data and args.num_classes):
        fail("--train-data, --val-data and --num-classes are needed together")
    protocol = PROTOCOLS[args.task[0]] if args.task else Protocol(args.num_classes, None, 4, 1, 1, 256)
    if args.fast:
        protocol = protocol._replace(**FAST)
    if (args.augment or protocol.augment) != "pretrain":
        protocol = protocol._replace(flip=False)
    for name, value in protocol._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)


# ---------------------------------------------------------------------------------------------------------------------
# tasks


class Task(NamedTuple):
    name: str
    column: int  # of the labels
    num_classes: int


def open_task(args, encoder):
    """(training source, validation source, list of `Task`). Fills in --num-frames and --resolution, in place."""
    args.num_frames = args.num_frames or encoder.config["num_frames"]
    args.resolution = args.resolution or encoder.config["resolution"]
    try:
        token_grid((args.num_frames, args.resolution, args.resolution), encoder.tubelet_size, encoder.patch_size)
    except ValueError as error:
        fail(str(error))
    if args.task and args.task[0] in SYNTHETIC:
        tasks = [Task(name, SYNTHETIC.index(name), PROTOCOLS[name].num_classes) for name in args.task]
        train = BuiltInVideos(args.num_frames, args.resolution, SYNTHETIC_SEED, args.train_clips)
        return train, BuiltInVideos(args.num_frames, args.resolution, SYNTHETIC_SEED + 2, args.val_clips), tasks
    name = args.task[0] if args.task else Path(args.train_data[0]).resolve().parent.name
    if args.task:
        args.train_data, args.val_data = [f"data/{name}/train.csv"], [f"data/{name}/val.csv"]
        for manifest in (*args.train_data, *args.val_data):
            if not Path(manifest).is_file():
                fail(
                    f"--task {name} needs {manifest}, lines of 'path label' for the {args.num_classes} classes; "
                    f"python -m tools.prepare {name} --help says how to make it (README, 'The public datasets')"
                )
    try:
        if args.knn:
            train = Videos(args.train_data, args)
        else:
            train = Videos(args.train_data, args, args.augment, centered=True)
        val = Videos(args.val_data, args, skip_bad=args.skip_bad)
    except (OSError, ValueError) as error:
        fail(str(error))
    return train, val, [Task(name, 0, args.num_classes)]


# ---------------------------------------------------------------------------------------------------------------------
# training the probes


def settings(args):
    """The (lr, weight decay) of every probe."""
    return list(itertools.product(args.lr, args.weight_decay))


def make_probe(args, width, num_classes):
    """The probe that the flags describe. Ends the script if they do not fit the encoder's width."""
    try:
        return AttentiveProbe(width, num_classes, args.probe_depth, args.probe_heads)
    except ValueError as error:
        fail(f"--probe-heads: {error}")


def make_probes(args, width, num_classes, seed):
    """[(probe, its AdamW)] for every pair of lr and weight decay, all starting from the same weights."""
    probes = []
    for lr, weight_decay in settings(args):
        torch.manual_seed(seed)
        probe = make_probe(args, width, num_classes).to(args.device)
        for p in probe.parameters():
            p.grad = torch.zeros_like(p)  # stays zero in a process that gets no video of a small batch
        optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        probes.append((probe, optimizer))
    return probes


def classify(args, probe, tokens):
    """Logits (B, C) float32 of tokens (B, N, D)."""
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return probe(tokens).float()


def sum_gradients(probe):
    """Sum a probe's gradients over all processes, in place, in a single all-reduce."""
    if dist.is_initialized():
        gradients = [p.grad for p in probe.parameters()]
        total = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def train_epoch(args, probes, tokens, column, order, first_step, num_steps):
    """Train on the samples in `order`. After every step, yield the loss, averaged over the probes.

    first_step: steps before this epoch; num_steps: steps of the whole training, for the learning rate.
    """
    batches = order.split(args.batch_size)
    for step, (numbers, micro_batches) in enumerate(zip(batches, tokens.read(batches), strict=True), start=first_step):
        total_loss = torch.zeros((), device=args.device)
        for batch in micro_batches:
            with tokens.stopwatch.measure("probes"):
                for probe, _ in probes:
                    logits = classify(args, probe, batch.tokens[:, 0])
                    loss = F.cross_entropy(logits, batch.labels[:, column], reduction="sum") / len(numbers)
                    loss.backward()
                    total_loss += loss.detach()
        with tokens.stopwatch.measure("probes"):
            for probe, optimizer in probes:
                sum_gradients(probe)
                peak_lr = optimizer.defaults["lr"]
                optimizer.param_groups[0]["lr"] = peak_lr * (1 + math.cos(math.pi * step / num_steps)) / 2
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        yield all_reduce(total_loss) / len(probes)


def train_probes(args, probes, tokens, column, seed, state_file, key):
    """Train for all epochs, continuing from state_file if it has the same key. Yields (epoch, step in it, loss)."""
    length, start = len(tokens.source), 0
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if state["key"] == key:
            start = state["epochs"]
            for (probe, optimizer), (weights, optimizer_state) in zip(probes, state["probes"], strict=True):
                probe.load_state_dict(weights)
                optimizer.load_state_dict(optimizer_state)
            say(f"continuing after epoch {start} ({state_file})")
    steps = math.ceil(length / args.batch_size)  # per epoch
    for epoch in range(start, args.epochs):
        if tokens.source.train:  # an endless sequence of samples; every seed and epoch takes its own
            order = torch.arange(length) + (seed * args.epochs + epoch) * length
        else:
            order = torch.randperm(length, generator=generator("probe order", seed, epoch))
        losses = train_epoch(args, probes, tokens, column, order, epoch * steps, args.epochs * steps)
        for step, loss in enumerate(losses, start=1):
            yield epoch, step, loss
        if rank_and_world()[0] == 0:
            weights = [(probe.state_dict(), optimizer.state_dict()) for probe, optimizer in probes]
            state = {"key": key, "epochs": epoch + 1, "probes": weights}
            write_atomically(state_file, lambda path, state=state: torch.save(state, path))


# Flags that do not change the training of a probe, or that `resume_key` and the file's name cover in another form.
NOT_IN_KEY = {"checkpoint", "weights", "untrained", "task", "fast", "train_data", "val_data", "skip_bad"}
NOT_IN_KEY |= {"workers", "seed", "seeds", "knn", "device", "out"}


def resume_key(args, encoder, checkpoint_step):
    """What a training of probes depends on: flags, encoder weights, manifests. It continues only one with its key."""
    manifests = [os.path.abspath(path) for path in (args.train_data or []) + (args.val_data or [])]
    key = {
        "flags": {name: value for name, value in plain_flags(args).items() if name not in NOT_IN_KEY},
        "encoder": [encoder.config, checkpoint_step, fingerprint(encoder.state_dict())],
        "manifests": {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in manifests},
    }
    return json.dumps(key)


# ---------------------------------------------------------------------------------------------------------------------
# predictions


class Predictions(NamedTuple):
    top5: torch.Tensor  # (M, P, 5) most likely classes; -1: fewer than 5 classes, or an unreadable video
    labels: torch.Tensor  # (M,)
    readable: torch.Tensor  # (M,) bool


def top5_classes(scores):
    """(B, P, 5): the classes with the highest scores (P, B, C), highest first; -1 if there are fewer."""
    top = scores.topk(min(5, scores.shape[-1]), dim=-1).indices.transpose(0, 1)
    return F.pad(top, (0, 5 - top.shape[-1]), value=-1)


def predict(tokens, column, num_probes, score):
    """`Predictions` for all videos; score: tokens (B, V, S * N, D) -> class scores (P, B, C)."""
    top5, labels, readable = collect(tokens, column, lambda x: top5_classes(score(x)), (num_probes, 5), torch.long)
    return Predictions(top5.where(readable[:, None, None], -1), labels, readable)


def predict_with_probes(args, probes, tokens, column):
    """`Predictions` of the probes: softmax, averaged over the views."""

    def score(x):
        num_videos, num_views = x.shape[:2]
        logits = torch.stack([classify(args, probe, x.flatten(0, 1)) for probe, _ in probes])
        return logits.softmax(-1).unflatten(1, (num_videos, num_views)).mean(2)

    return predict(tokens, column, len(probes), score)


def predict_with_neighbors(args, train, val, task):
    """`Predictions` by the votes of the K nearest training videos, by cosine similarity s of mean tokens.

    A vote weighs exp(s / 0.07), as in DINO.
    """

    def mean_tokens(x):
        return F.normalize(x.float().mean((1, 2)), dim=-1)

    means, labels, _ = collect(train, task.column, mean_tokens, (train.shape[1],), torch.float32)
    means, labels = means.to(args.device), labels.to(args.device)

    def score(x):
        similarity, neighbors = (mean_tokens(x) @ means.T).topk(args.knn)
        votes = torch.zeros(len(x), task.num_classes, device=x.device)
        return votes.scatter_add(1, labels[neighbors], (similarity / 0.07).exp())[None]

    return predict(val, task.column, 1, score)


def train_and_predict(args, train, val, task, key):
    """Train the probes of a task, and print the progress; a list of `Predictions`, one per seed."""
    predictions, steps = [], math.ceil(len(train.source) / args.batch_size)
    for seed in range(args.seed, args.seed + args.seeds):
        probes = make_probes(args, train.shape[1], task.num_classes, seed)
        state_file = args.out / f"resume-{task.name}-{seed}.pt"
        progress = Progress(silent=rank_and_world()[0] > 0)
        losses = train_probes(args, probes, train, task.column, seed, state_file, key)
        for done, (epoch, step, loss) in enumerate(losses, start=1):
            left = (args.epochs - epoch) * steps - step
            place = f"{task.name} seed {seed} epoch {epoch + 1}/{args.epochs}  step {step}/{steps}"
            if progress.due(last=left == 0):  # reading the loss waits for the GPU
                text = f"{place}  loss {loss.item():.3f}, {progress.left(done, done + left)}"
                progress.show(text, last=left == 0)
        predictions.append(predict_with_probes(args, probes, val, task.column))
    return predictions


# ---------------------------------------------------------------------------------------------------------------------
# results


def summarize(args, predictions, num_classes):
    """A task's entry in results.json, and its confusion counts (C, C), true by predicted class.

    predictions: one per seed. With several probes, each seed counts its best one on the validation videos; the median
    over the probes is given as well.
    """
    labels, readable = predictions[0].labels, predictions[0].readable
    top5 = torch.stack([p.top5 for p in predictions])  # (seeds, M, P, 5)
    correct = top5 == labels[:, None, None]
    top1_accuracy = correct[..., 0].float().mean(1) * 100  # (seeds, P)
    top5_accuracy = correct.any(-1).float().mean(1) * 100
    best = top1_accuracy.argmax(1)
    best_top1 = top1_accuracy.gather(1, best[:, None])[:, 0]  # (seeds,)
    confusion = torch.zeros(num_classes, num_classes)
    for seed, probe in enumerate(best):
        predicted = top5[seed, readable, probe, 0]
        confusion.index_put_((labels[readable], predicted), torch.ones(()), accumulate=True)
    class_sizes = labels.bincount(minlength=num_classes)
    per_class = confusion.diagonal() / len(predictions) / class_sizes * 100
    names = [{"k": args.knn}] if args.knn else [{"lr": lr, "weight_decay": decay} for lr, decay in settings(args)]
    top1, total = best_top1.mean().item(), len(labels)
    return {
        "top1": top1,
        "spread": best_top1.std().item() if len(predictions) > 1 else None,
        "top1_per_seed": best_top1.tolist(),
        "interval95": interval95(top1 * total / 100, total),
        "chance": 100 / num_classes,
        "num_val": total,
        "unreadable": int((~readable).sum()),
        "top5": top5_accuracy.gather(1, best[:, None]).mean().item() if num_classes > 5 else None,
        "median": top1_accuracy.quantile(0.5, dim=1).mean().item(),
        "best": [names[i] for i in best],
        "probes": [
            {**name, "top1": first.mean().item(), "top5": five.mean().item()}
            for name, first, five in zip(names, top1_accuracy.T, top5_accuracy.T, strict=True)
        ],
        "per_class": [x if size else None for x, size in zip(per_class.tolist(), class_sizes.tolist(), strict=True)],
    }, confusion


def print_result(name, task, result):
    """One line: accuracy, interval, and which probe was the best."""
    low, high = result["interval95"]
    line = f"{name} {task}: top-1 {result['top1']:.1f}%"
    if result["spread"] is not None:
        line += f" ± {result['spread']:.1f} over {len(result['top1_per_seed'])} seeds"
    line += f" (95% interval {low:.1f} to {high:.1f}, chance {result['chance']:.1f}, {result['num_val']} videos"
    if result["unreadable"]:
        line += f", {result['unreadable']} unreadable counted as misses"
    line += ")"
    if result["top5"] is not None:
        line += f", top-5 {result['top5']:.1f}"
    if len(result["probes"]) > 1:
        line += f", best probe on these videos: {result['best']}, median {result['median']:.1f}"
    say(line)


def draw_confusion(confusion, task, path):
    """Picture of the confusion counts: rows are true classes, columns predicted ones, as fractions of the row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    fractions = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    figure.colorbar(axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues", interpolation="nearest"))
    axes.set(title=task, xlabel="predicted class", ylabel="true class")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)


def write_results(args, record, confusions):
    """Write results.json and the pictures; delete the states to resume from."""
    file = args.out / "results.json"
    try:
        write_atomically(file, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    for state_file in args.out.glob("resume-*.pt"):
        state_file.unlink()
    for task, confusion in confusions.items():
        draw_confusion(confusion, task, args.out / f"confusion-{task}.png")


# ---------------------------------------------------------------------------------------------------------------------
# the script


def announce(args, name, train, val, tasks):
    """Print what is about to be done."""
    num_probes = len(settings(args))
    method = f"{num_probes} probes" if num_probes > 1 else "1 probe"
    if args.knn:
        method = f"{args.knn} nearest neighbors"
    say(
        f"probing {name} on {', '.join(task.name for task in tasks)} ({method}): {len(train)} training and {len(val)} "
        f"validation videos, {args.segments} segments x {args.num_frames} frames x {args.views} views, {args.device} "
        f"{args.dtype}"
    )


def prepare_tokens(args, train, val):
    """Before the probes are trained: compute features that never change, or check that validation videos are readable.

    BadVideo if an unreadable validation video is an error: better now than after the training.
    """
    if val.fit():
        val.keep("validation")
    elif not args.skip_bad:
        rank, world = rank_and_world()
        with val.stopwatch.measure("loader"):
            for _ in data.clip_loader(val.source, [[n] for n in range(rank, len(val.source), world)], args.workers):
                pass
    if train.fit() and not train.source.train:
        train.keep("training")
    if args.standardize:
        length = len(train.source)
        numbers = torch.arange(length if train.kept else min(length, args.batch_size))
        train.scale = val.scale = moments(train, numbers)


def measure_speed(args, train, val, seconds):
    """Print and return the speed, where the time went, and the peak memory of this process."""
    spent = train.stopwatch.seconds
    shares = {part: spent[part] / seconds for part in ("loader", "encoder", "probes")}
    speed = {
        "clips_per_s": (train.num_clips + val.num_clips) / seconds,
        "peak_memory_gib": peak_memory(torch.device(args.device)) / 2**30,
        **{f"{part}_share": share for part, share in shares.items()},
    }
    say(
        f"{speed['clips_per_s']:.1f} clips/s per process; {duration(seconds)}: "
        f"{', '.join(f'{part} {share:.0%}' for part, share in shares.items())}; "
        f"peak memory {speed['peak_memory_gib']:.1f} GiB"
    )
    return speed


def evaluate(args):
    """Probe the encoder on every task and write the results. BadVideo if a video cannot be read."""
    started, stopwatch = time.perf_counter(), Stopwatch()
    encoder, checkpoint_step = load(args)
    train, val, tasks = open_task(args, encoder)
    weights = "untrained" if args.untrained else args.weights
    name = str(args.checkpoint) if weights == "encoder" else f"{args.checkpoint} ({weights})"
    announce(args, name, train, val, tasks)
    if args.knn and args.knn > len(train):
        fail(f"--knn {args.knn}: there are {len(train)} training videos")
    train, val = Tokens(args, encoder, train, stopwatch), Tokens(args, encoder, val, stopwatch)
    key = None
    if not args.knn:
        with torch.device("meta"):
            make_probe(args, train.shape[1], args.num_classes)  # to fail now if the flags do not fit
        prepare_tokens(args, train, val)
        key = resume_key(args, encoder, checkpoint_step)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")

    results, confusions = {}, {}
    for task in tasks:
        if args.knn:
            predictions = [predict_with_neighbors(args, train, val, task)]
        else:
            predictions = train_and_predict(args, train, val, task, key)
        results[task.name], confusions[task.name] = summarize(args, predictions, task.num_classes)
        print_result(name, task.name, results[task.name])

    seconds = time.perf_counter() - started
    speed = measure_speed(args, train, val, seconds)
    record = {
        "checkpoint": str(args.checkpoint),
        "step": checkpoint_step,
        "weights": weights,
        "tasks": results,
        "seconds": seconds,
        "speed": speed,
        "args": plain_flags(args),
    }
    if rank_and_world()[0] == 0:
        write_results(args, record, confusions)
    say(args.out / "results.json")


def main():
    args = parse_args()
    _, world = rank_and_world()
    if world > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    try:
        evaluate(args)
    except video.BadVideo as error:  # in the last line; before it comes a worker's traceback
        fail(f"unreadable video: {str(error).splitlines()[-1]}")
    except data.LoaderFailed as error:
        fail(str(error))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
