"""Frozen evaluation: how much of a task can be read off an encoder's tokens by a small attentive probe.

    python probe.py --task synthetic-motion synthetic-shape --checkpoint out/student
    python probe.py --task synthetic-motion --checkpoint out/student --untrained      # the floor: random weights
    torchrun --nproc_per_node=8 probe.py --task k400                                  # data/k400/{train,val}.csv
    python probe.py --task k400 --fast                                                # appendix D, table 7: one probe
    python probe.py --train-data train.csv --val-data val.csv --num-classes 2 --checkpoint out/student
    python probe.py --task k400 --knn 10                                              # a quick look, nothing is trained

The encoder is frozen and sees each clip once; all probes of the grid learn from its tokens in the same pass. A video
is `segments` clips, each from the middle of its share of the video's length, times `views` crops, evenly spread along
the long side. The tokens of a view's segments are concatenated, class probabilities (softmax) averaged over the views.
Training draws one view: each clip's place in its share, and one random resized crop and flip for all clips of a video.
AdamW, cosine to 0, no warm-up, 20 epochs; all probes start from the same weights. Built-in tasks are not augmented, so
their features are computed once. V-JEPA 2's weights and Hugging Face folders go through convert.py first.

Under torchrun each process takes its share of every batch, and every validation video counts exactly once. A run that
was stopped continues with the epoch it was in. Writes results.json and confusion-TASK.png into --out.

Letters: B videos, V views, S segments, N tokens, D width, P probes, C classes.
"""

import argparse
import itertools
import json
import math
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import video
from cli import Parser, duration, fail, interval95, rank_and_world, require_at_least, resolve_device, write_aside
from features import Stopwatch, Tokens, Videos, all_reduce, collect, fingerprint, load, moments, say
from model import AttentiveProbe, load_checkpoint, token_grid
from training import generator


class Protocol(NamedTuple):
    num_classes: int
    num_frames: int | None  # None: what the encoder was trained at
    frame_step: int
    segments: int
    views: int
    batch_size: int
    lr: tuple = (1e-3,)
    weight_decay: tuple = (0.01,)  # a probe for every pair of lr and weight decay
    flip: bool = True  # of training videos, half of them; not where labels tell left from right


GRID = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.8, 0.4, 0.1, 0.01)
PROTOCOLS = {  # of V-JEPA 2 and the paper; --fast and flags override
    #                       classes frames step segments views batch probes
    "k400":        Protocol(  400,   16,    4,     8,     3,   256,  *GRID),
    "ssv2":        Protocol(  174,   16,    4,     2,     3,   256,  *GRID, flip=False),
    "coin":        Protocol(  180,   16,    4,     8,     3,   256),
    "diving48":    Protocol(   48,   16,    2,     4,     3,   128),
    "jester":      Protocol(   27,   16,    2,     4,     3,   128, flip=False),
    "imagenet1k":  Protocol( 1000,   16,    4,     1,     3,  1024),
    "synthetic-motion": Protocol(8, None,   4,     1,     1,   256),
    "synthetic-shape":  Protocol(6, None,   4,     1,     1,   256),
}  # fmt: skip
FAST = dict(segments=1, views=1, batch_size=256, lr=(1e-3,), weight_decay=(0.01,))  # paper appendix D, table 7
SYNTHETIC = ("synthetic-motion", "synthetic-shape")  # in the order of data.Synthetic's labels
SYNTHETIC_SEED = 2**31  # clips that no training run sees, whatever its --seed below this


def parse_args():
    parser = Parser(__doc__)
    flag = parser.add_argument_group("what is probed").add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--weights", choices=("encoder", "student"), help="an EMA run holds its student as well; default encoder")
    flag("--untrained", action="store_true", help="the checkpoint's architecture with random weights")
    flag("--layers", nargs="+", type=int, help="blocks whose outputs the probe sees, 1 the first; each through the "
         "encoder's last norm, as V-JEPA 2 does; default the last one")  # fmt: skip
    flag("--combine", choices=("mean", "concat"), default="concat", help="of --layers")

    flag = parser.add_argument_group("on which task (defaults are the task's protocol, at the top of this file)")
    flag = flag.add_argument
    flag("--task", nargs="+", choices=PROTOCOLS, default=[], help="several built-in tasks share features")
    flag("--train-data", nargs="+", metavar="MANIFEST", help="for a task of your own; with --val-data, --num-classes")
    flag("--val-data", nargs="+", metavar="MANIFEST")
    flag("--num-classes", type=int)
    flag("--fast", action="store_true", help="one clip, one view, one probe (table 7); always so for tasks of your own")
    flag("--train-clips", type=int, default=4000, help="of the built-in tasks")
    flag("--val-clips", type=int, default=1000, help="of the built-in tasks")
    flag("--num-frames", type=int, help="of a clip; for tasks of your own default what the encoder was trained at")
    flag("--frame-step", type=int, help="video frames from one clip frame to the next")
    flag("--fps", type=float, help="clip frames per second of video, instead of --frame-step")
    flag("--segments", type=int, help="clips of a video, spread over its length")
    flag("--views", type=int, help="crops of a validation video, spread along its long side")
    flag("--resolution", type=int, help="default: what the encoder was trained at")
    flag("--single-frame", action="store_true", help="repeat each clip's middle frame: what can be told without motion")
    flag("--augment", action=argparse.BooleanOptionalAction, default=True,
         help="--no-augment: training clips as validation clips, their features computed once")  # fmt: skip
    flag("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the training videos; not where "
         "labels tell left from right")  # fmt: skip
    flag("--cache", type=Path, help="folder for features that are computed once (built-in tasks, --no-augment)")
    flag("--skip-bad", action="store_true", help="an unreadable validation video counts as a miss; else it is an error")
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes")

    flag = parser.add_argument_group("how the probes learn").add_argument
    flag("--epochs", type=int, default=20, help="(table 7)")
    flag("--batch-size", type=int, help="videos, over all processes")
    flag("--lr", type=float, nargs="+", help="a probe is trained for every pair of lr and weight decay")
    flag("--weight-decay", type=float, nargs="+")
    flag("--probe-depth", type=int, default=4, help="blocks, the last one cross-attention (appendix D)")
    flag("--probe-heads", type=int, default=16, help="(V-JEPA 2)")
    flag("--standardize", action=argparse.BooleanOptionalAction, default=False,
         help="give the probe tokens of zero mean and unit variance per channel; pays when epochs are few")  # fmt: skip
    flag("--seeds", type=int, default=1, help="times that all is trained, with other initialization and order")
    flag("--seed", type=int, default=0, help="of the first probe, and of the untrained encoder")
    flag("--knn", type=int, metavar="K", help="instead of probes: the K nearest training videos vote (mean tokens)")

    flag = parser.add_argument_group("on what, and what it leaves").add_argument
    flag("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on a GPU, else float32")
    flag("--out", type=Path, default=Path("out/probe"))
    args = parser.parse_args()

    resolve_device(args)
    built_in = [task for task in args.task if task in SYNTHETIC]
    own = args.train_data or args.val_data or args.num_classes
    if bool(args.task) == bool(own) or (args.task and len(args.task) > 1 and len(built_in) < len(args.task)):
        fail("give --task (one, or several synthetic ones), or --train-data, --val-data and --num-classes")
    if own and not (args.train_data and args.val_data and args.num_classes):
        fail("--train-data, --val-data and --num-classes are needed together")
    protocol = PROTOCOLS[args.task[0]] if args.task else Protocol(args.num_classes, None, 4, 1, 1, 256)
    if args.fast:
        protocol = protocol._replace(**FAST)
    for name, value in protocol._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    require_at_least(args, 1, "epochs", "batch_size", "train_clips", "val_clips", "seeds", "probe_depth", "frame_step",
                     "segments", "views")  # fmt: skip
    require_at_least(args, 0, "seed", "workers")
    if built_in and (args.segments, args.views) != (1, 1):
        fail("--segments and --views are for videos; a built-in clip is one of each")
    if args.untrained and args.weights:
        fail(f"--untrained has no use for --weights {args.weights}: its weights are random")
    if args.knn is not None and args.knn < 1:
        fail(f"--knn {args.knn}: at least 1 is needed")
    if args.cache and (args.knn or not built_in and (args.augment or args.segments * args.views > 1)):
        fail("--cache is for features computed once, of one clip and view: built-in tasks, or --no-augment --fast")
    args.weights = args.weights or "encoder"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# videos -> tokens


def sources(args, encoder):
    """(training source, validation source, {task: (label column, number of classes)})."""
    args.num_frames = args.num_frames or encoder.config["num_frames"]
    args.resolution = args.resolution or encoder.config["resolution"]
    try:
        token_grid((args.num_frames, args.resolution, args.resolution), encoder.tubelet_size, encoder.patch_size)
    except ValueError as error:
        fail(str(error))
    if args.task and args.task[0] in SYNTHETIC:
        columns = {task: (SYNTHETIC.index(task), PROTOCOLS[task].num_classes) for task in args.task}
        train = data.Synthetic(args.num_frames, args.resolution, SYNTHETIC_SEED, args.train_clips)
        return train, data.Synthetic(args.num_frames, args.resolution, SYNTHETIC_SEED + 2, args.val_clips), columns
    task = args.task[0] if args.task else "own"
    if args.task:
        args.train_data, args.val_data = [f"data/{task}/train.csv"], [f"data/{task}/val.csv"]
        for name in (*args.train_data, *args.val_data):
            if not Path(name).is_file():
                fail(f"--task {task} needs {name}, lines of 'path label' for the {args.num_classes} classes "
                     "(README, 'Probing', says how to make it)")  # fmt: skip
    try:
        train = Videos(args.train_data, args, train=args.augment and not args.knn)
        train.skip_bad = False  # a black video must not be learned
        return train, Videos(args.val_data, args, train=False), {task: (0, args.num_classes)}
    except (OSError, ValueError) as error:
        fail(str(error))


# ---------------------------------------------------------------------------------------------------------------------
# the probes


class AttentiveProbes(torch.nn.Module):
    """P probes as one computation: what `AttentiveProbe` computes, with parameters (P, ...) stacked.

    tokens (B, N, D) -> logits (P, B, C)

    The last block has one query, the same for all clips, so its keys and values need not be made: the score of a token
    x is (W_k' q) . x and the result W_v (sum of a_n x_n). All heads of all probes then share two matmuls with D x (P h)
    instead of D x (2 D P) weights, and one normalisation of the tokens.
    """

    def __init__(self, probes):
        super().__init__()
        self.depth, self.heads, self.eps = len(probes[0].blocks), probes[0].cross.heads, probes[0].cross.norm1.eps
        for name, _ in probes[0].named_parameters():
            stacked = torch.stack([probe.get_parameter(name).detach() for probe in probes])
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(stacked))

    def part(self, name):
        return self.get_parameter(name.replace(".", "/"))

    def linear(self, name, x):  # (P, M, D) -> (P, M, ...)
        return torch.baddbmm(self.part(f"{name}.bias")[:, None], x, self.part(f"{name}.weight").mT)

    def norm(self, name, x):
        weight, bias = self.part(f"{name}.weight")[:, None], self.part(f"{name}.bias")[:, None]
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * weight + bias

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def block(self, name, x, batch):  # (P, B * N, D)
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x))
        q, k, v = qkv.view(len(x) * batch, -1, 3, self.heads, x.shape[2] // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.linear(f"{name}.attn.proj", attended)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def forward(self, tokens):
        (B, N, D), h, query = tokens.shape, self.heads, self.part("query")[:, 0]
        P, d = len(query), D // h
        x = tokens[None]
        if self.depth:
            x = x.reshape(1, B * N, D).expand(P, -1, -1)
            for i in range(self.depth):
                x = self.block(f"blocks.{i}", x, B)
            x = x.view(P, B, N, D)
        x = F.layer_norm(x, (D,), eps=self.eps).to(torch.promote_types(tokens.dtype, torch.bfloat16))

        weight, bias = self.part("cross.norm1.weight")[:, None], self.part("cross.norm1.bias")[:, None]
        W_k, W_v = self.part("cross.kv.weight").view(P, 2, h, d, D).unbind(1)
        q = self.linear("cross.q", query).view(P, h, 1, d)
        # What is the same for all tokens of a clip (the biases) does not change the softmax.
        keys = (q @ W_k).squeeze(2) * weight / math.sqrt(d)  # (P, h, D)
        if self.depth:
            attention = (x @ keys[:, None].mT).softmax(2)  # (P, B, N, h)
            pooled = (attention.mT.to(x.dtype) @ x).transpose(1, 2)
        else:  # all probes see the same tokens
            attention = (x[0] @ keys.flatten(0, 1).mT).softmax(1)  # (B, N, P h)
            pooled = (attention.mT.to(x.dtype) @ x[0]).view(B, P, h, D).permute(1, 2, 0, 3)
        pooled = pooled * weight[:, None] + bias[:, None]  # (P, h, B, D)
        values = pooled @ W_v.mT + self.part("cross.kv.bias").view(P, 2, h, 1, d)[:, 1]
        x = query + values.transpose(1, 2).reshape(P, B, D)
        x = x + self.mlp("cross.mlp", self.norm("cross.norm2", x))
        return self.linear("linear", x)


def make_optimizer(probes, settings):
    """torch's AdamW with a parameter group for each of the stacked probes; settings: its (lr, weight decay).

    It steps views of the stacked parameters and gradients, which therefore stay where they are.
    """
    groups = []
    for p in probes.parameters():
        p.grad = torch.zeros_like(p)
    for i, (lr, weight_decay) in enumerate(settings):
        views = [p.detach()[i] for p in probes.parameters()]
        for view, p in zip(views, probes.parameters(), strict=True):
            view.grad = p.grad[i]
        groups.append({"params": views, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay})
    return torch.optim.AdamW(groups, fused=True)


def one_probe(args, width, classes):
    """The probe that the flags name; ends the script if they do not fit the encoder."""
    try:
        return AttentiveProbe(width, classes, args.probe_depth, args.probe_heads)
    except ValueError as error:
        fail(f"--probe-heads: {error}")


def make_probes(args, width, classes, seed):
    """[(AttentiveProbes, optimizer)], for all pairs of lr and weight decay in order; all start from the same weights.

    Probes of several blocks are separate on a CPU: their matmuls fill it, and together they leave its cache (NOTES.md).
    On a GPU four at a time, for memory: 100,000 tokens of width 1024 take about 11 GB in each.
    """
    torch.manual_seed(seed)
    probe = one_probe(args, width, classes)
    settings = list(itertools.product(args.lr, args.weight_decay))
    size = len(settings) if args.probe_depth == 1 else 1 if args.device == "cpu" else 4
    groups = [settings[i : i + size] for i in range(0, len(settings), size)]
    stacks = [AttentiveProbes([probe] * len(group)).to(args.device) for group in groups]
    return [(stack, make_optimizer(stack, group)) for stack, group in zip(stacks, groups, strict=True)]


def logits_of(args, probes, x, scale):
    """(P, B, C) float32 of one stack of probes; x (B, N, D)."""
    if scale is not None:
        x = ((x - scale[0]) / scale[1]).to(x.dtype)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return probes(x).float()


def train_epoch(args, stacks, tokens, order, first_step, steps, column, scale):
    """One pass over the sample numbers in `order`; yields the loss, mean over the probes, after every step."""
    batches = order.split(args.batch_size)
    for step, (batch, parts) in enumerate(zip(batches, tokens.read(batches), strict=True), start=first_step):
        total = torch.zeros((), device=args.device)
        for _, x, labels in parts:
            with tokens.spent("probes"):
                for probes, _ in stacks:
                    logits = logits_of(args, probes, x[:, 0], scale)
                    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, column].repeat(len(logits)), reduction="sum")
                    (loss / len(batch)).backward()
                    total += loss.detach()
        with tokens.spent("probes"):
            for probes, optimizer in stacks:
                for p in probes.parameters():
                    all_reduce(p.grad)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.step()
                probes.zero_grad(set_to_none=False)
        yield all_reduce(total) / len(batch) / (len(args.lr) * len(args.weight_decay))


def train_probes(args, stacks, tokens, column, seed, scale, state_file, key):
    """Train all epochs, from where state_file leaves off if it is of this run. Yields (epoch, step of it, loss)."""
    length, start = len(tokens.source), 0
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if state["key"] == key:
            start = state["epochs"]
            for (probes, optimizer), (weights, moving) in zip(stacks, state["stacks"], strict=True):
                probes.load_state_dict(weights)
                optimizer.load_state_dict(moving)
            say(f"continuing after epoch {start} ({state_file})")
    per_epoch = math.ceil(length / args.batch_size)
    for epoch in range(start, args.epochs):
        if getattr(tokens.source, "train", False):  # a pass of its own for every seed and epoch
            order = torch.arange(length) + (seed * args.epochs + epoch) * length
        else:
            order = torch.randperm(length, generator=generator(seed, epoch))
        losses = train_epoch(args, stacks, tokens, order, epoch * per_epoch, args.epochs * per_epoch, column, scale)
        for step, loss in enumerate(losses, start=1):
            yield epoch, step, loss
        if rank_and_world()[0] == 0:
            state = {"key": key, "epochs": epoch + 1, "stacks": [(p.state_dict(), o.state_dict()) for p, o in stacks]}
            write_aside(state_file, lambda path, state=state: torch.save(state, path))


def top_classes(probabilities, labels):
    """(B, P, 7) from (P, B, C) and (B,): the five likeliest classes (-1: none), the label, whether it was read at all.

    A negative label -1 - c is that of an unreadable video of class c: it has no likely class.
    """
    readable = labels >= 0
    top = probabilities.topk(min(5, probabilities.shape[-1]), dim=-1).indices.transpose(0, 1)
    top = F.pad(top, (0, 5 - top.shape[-1]), value=-1).where(readable[:, None, None], -1)
    rest = torch.stack((labels.where(readable, -1 - labels), readable.long()), dim=1)
    return torch.cat((top, rest[:, None].expand(-1, top.shape[1], -1)), dim=2)


def predict(args, stacks, tokens, column, scale):
    """`top_classes` of every video by every probe, (M, P, 7): softmax, averaged over the views."""

    def average(x, labels):
        logits = torch.cat([logits_of(args, probes, x.flatten(0, 1), scale) for probes, _ in stacks])
        return top_classes(logits.softmax(-1).unflatten(1, x.shape[:2]).mean(2), labels[:, column])

    return collect(tokens, average, (len(args.lr) * len(args.weight_decay), 7))


def nearest_neighbors(args, train, val, column, classes):
    """`top_classes` of every video, (M, 1, 7), by the votes of the K nearest training videos.

    Cosine similarity s of the mean tokens, weight exp(s / 0.07), as DINO.
    """
    width = train.shape[1]
    table = collect(train, lambda x, _: F.normalize(x.float().mean((1, 2)), dim=-1), (width,), torch.float32)
    labels = collect(train, lambda _, labels: labels[:, column], ()).to(args.device)
    table = table.to(args.device)

    def vote(x, found):
        near, ids = (F.normalize(x.float().mean((1, 2)), dim=-1) @ table.T).topk(args.knn)
        votes = torch.zeros(len(x), classes, device=x.device).scatter_add(1, labels[ids], (near / 0.07).exp())
        return top_classes(votes[None], found[:, column])

    return collect(val, vote, (1, 7))


# ---------------------------------------------------------------------------------------------------------------------
# results


def summarize(args, found, classes):
    """What results.json says of a task, confusion counts (C, C) true by predicted; from `top_classes` (seeds, M, P, 7).

    Of several probes the best on the validation videos counts, for each seed; beside it the median.
    """
    label, right = found[0, :, 0, 5], found[..., :5] == found[..., 5:6]  # (M,), (seeds, M, P, 5)
    top1, top5 = right[..., 0].float().mean(1) * 100, right.any(-1).float().mean(1) * 100  # (seeds, P)
    best = top1.argmax(1)
    scores = top1.gather(1, best[:, None])[:, 0]
    confusion = torch.zeros(classes, classes)
    for seed, probe in enumerate(best):
        guess = found[seed, :, probe, 0]
        confusion.index_put_((label[guess >= 0], guess[guess >= 0]), torch.ones(()), accumulate=True)
    numbers = label.bincount(minlength=classes)
    per_class = confusion.diagonal() / len(found) / numbers * 100
    settings = [{"k": args.knn}] if args.knn else [
        {"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(args.lr, args.weight_decay)]  # fmt: skip
    probes = [{**setting, "top1": top1[:, i].mean().item(), "top5": top5[:, i].mean().item()}
              for i, setting in enumerate(settings)]  # fmt: skip
    total = len(label)
    return {
        "top1": scores.mean().item(), "spread": scores.std().item() if len(scores) > 1 else None,
        "top1_per_seed": scores.tolist(), "interval95": interval95(scores.mean().item() * total / 100, total),
        "chance": 100 / classes, "num_val": total, "unreadable": int((found[0, :, 0, 6] == 0).sum()),
        "top5": top5.gather(1, best[:, None]).mean().item() if classes > 5 else None,
        "median": top1.quantile(0.5, dim=1).mean().item(), "best": [settings[i] for i in best], "probes": probes,
        "per_class": [None if number == 0 else x for x, number in zip(per_class.tolist(), numbers, strict=True)],
    }, confusion  # fmt: skip


def draw_confusion(confusion, task, path):
    """Rows are true classes, columns predicted ones, in shares of the row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest"))
    axes.set(title=task, xlabel="predicted class", ylabel="true class")
    write_aside(path, lambda aside: figure.savefig(aside, format="png", dpi=150))
    plt.close(figure)


def probe_task(args, train, val, task, column, classes, scale, key):
    """`top_classes` for every seed, (seeds, M, P, 7)."""
    if args.knn:
        return nearest_neighbors(args, train, val, column, classes)[None]
    found, per_epoch, shown = [], math.ceil(len(train.source) / args.batch_size), time.perf_counter()
    for seed in range(args.seed, args.seed + args.seeds):
        stacks, first = make_probes(args, train.shape[1], classes, seed), None
        file = args.out / f"resume-{task}-{seed}.pt"
        for epoch, step, loss in train_probes(args, stacks, train, column, seed, scale, file, key):
            now, done = time.perf_counter(), epoch * per_epoch + step
            first = first or (now, done)
            if step == per_epoch or now > shown + 1:
                left = (now - first[0]) / max(1, done - first[1]) * (args.epochs * per_epoch - done)
                shown = now
                say(f"\r{task} seed {seed} epoch {epoch + 1}/{args.epochs}  step {step}/{per_epoch}  "
                    f"loss {loss.item():.3f}, {duration(left)} left  ", end="")  # fmt: skip
        say("")
        found.append(predict(args, stacks, val, column, scale))
    return torch.stack(found)


def evaluate(args):
    """Probe the encoder on every task and write results.json. BadVideo if a video cannot be read."""
    encoder, spent, started = load(args), Stopwatch(), time.perf_counter()
    train, val, tasks = sources(args, encoder)
    part = "untrained" if args.untrained else args.weights
    name = f"{args.checkpoint}{'' if part == 'encoder' else f' ({part})'}"
    settings = 1 if args.knn else len(args.lr) * len(args.weight_decay)
    method = f"{args.knn} nearest neighbors" if args.knn else f"{settings} probe{'s' * (settings > 1)}"
    say(f"probing {name} on {', '.join(tasks)} ({method}): {len(train)} training and {len(val)} validation videos, "
        f"{args.segments} x {args.num_frames} frames x {args.views} views, {args.device} {args.dtype}")  # fmt: skip
    if args.knn and args.knn > len(train):
        fail(f"--knn {args.knn}: there are {len(train)} training videos")
    train, val = Tokens(args, encoder, train, spent), Tokens(args, encoder, val, spent)
    if not args.knn:
        for _, classes in tasks.values():
            with torch.device("meta"):
                one_probe(args, train.shape[1], classes)  # fails now if it must
    key = ""
    try:
        once = args.segments * args.views == 1 and not args.knn
        if once and not getattr(train.source, "train", False):
            val.keep("validation")
            train.keep("training")
        elif not args.skip_bad and not args.knn:
            rank, world = rank_and_world()
            with spent("loader"):  # an unreadable validation video is an error: better now than after the training
                for _ in data.clip_loader(val.source, [[n] for n in range(rank, len(val.source), world)], args.workers):
                    pass
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out} or --cache {args.cache}: {error.strerror}")
    scale = None
    if not args.knn:
        how = (args.batch_size, args.lr, args.weight_decay, args.epochs, args.probe_depth, args.probe_heads,
               args.standardize)  # fmt: skip
        key = f"{[fingerprint(args, encoder, tokens.source) for tokens in (train, val)]} {how}"
        if args.standardize:
            length = len(train.source)
            scale = moments(args, train, torch.arange(length if train.kept else min(length, args.batch_size)))

    results, pictures = {}, {}
    for task, (column, classes) in tasks.items():
        found = probe_task(args, train, val, task, column, classes, scale, key)
        results[task], confusion = summarize(args, found, classes)
        one = results[task]
        low, high = one["interval95"]
        spread = f" ± {one['spread']:.1f} over {args.seeds} seeds" if one["spread"] is not None else ""
        best = f", best of {settings} on these clips: {one['best']}, median {one['median']:.1f}" if settings > 1 else ""
        top5 = f", top-5 {one['top5']:.1f}" if one["top5"] is not None else ""
        missed = f", {one['unreadable']} unreadable count as missed" if one["unreadable"] else ""
        say(f"{name} {task}: top-1 {one['top1']:.1f}%{spread} (95% interval {low:.1f} to {high:.1f}, "
            f"chance {100 / classes:.1f}, {one['num_val']} clips{missed}){top5}{best}")  # fmt: skip
        pictures[task] = confusion

    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    speed = {"clips_per_s": spent["clips"] / seconds, "peak_memory_gib": memory,
             **{f"{part}_share": spent[part] / seconds for part in ("loader", "encoder", "probes")}}  # fmt: skip
    record = {"checkpoint": str(args.checkpoint), "step": load_checkpoint(args.checkpoint)["step"], "weights": part,
              "tasks": results, "seconds": seconds, "speed": speed,
              "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}  # fmt: skip
    if rank_and_world()[0] == 0:
        try:
            write_aside(args.out / "results.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        except OSError as error:
            fail(f"--out {args.out}: {error.strerror}")
        for file in args.out.glob("resume-*.pt"):
            file.unlink()
        for task, confusion in pictures.items():
            draw_confusion(confusion, task, args.out / f"confusion-{task}.png")
    shares = ", ".join(f"{part} {speed[f'{part}_share']:.0%}" for part in ("loader", "encoder", "probes"))
    say(f"{speed['clips_per_s']:.1f} clips/s a process; of {duration(seconds)}: {shares}; peak memory {memory:.1f} GiB")
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
    except video.BadVideo as error:  # its last line; before it, a worker's traceback
        fail(f"unreadable video: {str(error).splitlines()[-1]}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
