"""Frozen evaluation: how well an attentive probe solves a task from an encoder's tokens (appendix D, tables 6 and 7).

    python probe.py --task synthetic-motion synthetic-shape --checkpoint out/student
    python probe.py --task synthetic-motion --checkpoint out/student --untrained      # baseline: random weights
    torchrun --nproc_per_node=8 probe.py --task k400                                  # reads data/k400/{train,val}.csv
    python probe.py --task k400 --fast                                                # table 7: one clip, one probe
    python probe.py --train-data train.csv --val-data val.csv --num-classes 2 --checkpoint out/student

The encoder is frozen and encodes each clip once; all probes of the grid train on its tokens in the same pass. A video
is `segments` clips, spread over its length, times `views` crops, spread along its long side. A probe sees the tokens of
all segments of a view together; its class probabilities (softmax) are averaged over the views. Training uses one view,
augmented as V-JEPA 2 does. AdamW, cosine schedule to 0 without warm-up, 20 epochs; all probes start from the same
weights. Features that never change are computed once if they fit into memory. To probe V-JEPA 2's weights, convert
them first (tools/convert.py).

Under torchrun each process takes its share of every batch, and every validation video counts exactly once; an
unreadable one counts as a miss. An interrupted run, started again, continues after its last complete epoch. Writes
results.json to --out.

Letters: B videos of a batch, M of the data set, V views, S segments, T frames, H and W pixels, N tokens of a clip,
D width, P probes, C classes.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import data
import video
from cli import (
    Parser,
    fail,
    interval95,
    plain_flags,
    progress,
    rank_and_world,
    require_at_least,
    resolve_device,
    write_atomically,
)
from model import MLP, Block, Encoder, build, fingerprint, init_std, init_weights, load_checkpoint, token_grid
from training import all_reduce, generator, join_processes, reduce_gradients


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


GRID = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.8, 0.4, 0.1, 0.01)
PROTOCOLS = {  # V-JEPA 2's and the paper's, unless noted; --fast and the flags override them
    #                       classes frames step segments views batch probes
    "k400":        Protocol(  400,   16,    4,     8,     3,   256,  *GRID),
    "ssv2":        Protocol(  174,   16,    4,     2,     3,   256,  *GRID),
    "coin":        Protocol(  180,   16,    4,     8,     3,   256),
    "diving48":    Protocol(   48,   16,    2,     4,     3,   128),
    "jester":      Protocol(   27,   16,    2,     4,     3,   128),
    "ucf101":      Protocol(  101,   16,    4,     5,     3,   128),  # VideoMAE's clips and views (docs/method.md,
    "hmdb51":      Protocol(   51,   16,    2,    10,     3,   128),  # section 6); the paper reports neither
    "imagenet1k":  Protocol( 1000,   16,    4,     1,     3,  1024),
    "synthetic-motion": Protocol(8, None,   4,     1,     1,   256, augment="none"),
    "synthetic-shape":  Protocol(6, None,   4,     1,     1,   256, augment="none"),
    "synthetic-size":   Protocol(4, None,   4,     1,     1,   256, augment="none"),
}  # fmt: skip
FAST = dict(segments=1, views=1, batch_size=256, lr=(1e-3,), weight_decay=(0.01,))  # paper appendix D, table 7
SYNTHETIC = ("synthetic-motion", "synthetic-shape", "synthetic-size")  # the label columns of data.Synthetic
SYNTHETIC_SEED = 2**31  # for clips that no training run sees
SINGLE_VIEW_SIDE = 224 / 256  # of the short side: V-JEPA 2 scales it to 256 and takes the center 224 x 224
TOKENS_AT_ONCE = 100_000  # most tokens, of width 1024 or less, that pass through the encoder or a probe at a time
KEPT_BYTES = 2**32  # most memory of a process for the tokens of one source that are computed once


# ---------------------------------------------------------------------------------------------------------------------
# flags


def make_parser():
    parser = Parser(__doc__)
    flag = parser.add_argument_group("encoder").add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--weights", choices=("encoder", "student"), help="student: that of an EMA run or V-JEPA 2; default: encoder")
    flag("--untrained", action="store_true", help="random weights in the checkpoint's architecture")

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
    augment = "training videos: V-JEPA 2's augmentation (default), or the centered validation view"
    flag("--augment", choices=("vjepa2", "none"), help=augment)
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes per process")

    flag = parser.add_argument_group("probes").add_argument
    flag("--epochs", type=int, default=20, help="passes over the training videos (table 7)")
    flag("--batch-size", type=int, help="videos per step, over all processes")
    flag("--lr", type=float, nargs="+", help="a probe is trained for every pair of lr and weight decay")
    flag("--weight-decay", type=float, nargs="+", help="see --lr")
    flag("--probe-depth", type=int, default=4, help="blocks per probe, the last one cross-attention (appendix D)")
    flag("--probe-heads", type=int, default=16, help="attention heads (V-JEPA 2)")
    standardize = "scale token channels to zero mean and unit variance"
    flag("--standardize", action=argparse.BooleanOptionalAction, default=False, help=standardize)
    flag("--seeds", type=int, default=1, help="number of repetitions with other initial weights and sample order")
    flag("--seed", type=int, default=0, help="seed of the first repetition, and of the untrained encoder")

    flag = parser.add_argument_group("hardware and output").add_argument
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; default: bfloat16 on a GPU")
    flag("--out", type=Path, default=Path("out/probe"), help="folder for the results")
    return parser


def parse_args():
    """The flags, checked, with those that the user left to the task's protocol filled in."""
    args = make_parser().parse_args()
    resolve_device(args)
    own, synthetic = args.train_data or args.val_data or args.num_classes, set(args.task) <= set(SYNTHETIC)
    if bool(args.task) == bool(own) or (len(args.task) > 1 and not synthetic):
        fail("give --task (one, or several synthetic ones), or --train-data, --val-data and --num-classes")
    if own and not (args.train_data and args.val_data and args.num_classes):
        fail("--train-data, --val-data and --num-classes are needed together")
    protocol = PROTOCOLS[args.task[0]] if args.task else Protocol(args.num_classes, None, 4, 1, 1, 256)
    if args.fast:
        protocol = protocol._replace(**FAST)
    for name, value in protocol._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    require_at_least(args, 1, "epochs", "batch_size", "train_clips", "val_clips", "seeds", "probe_depth")
    require_at_least(args, 1, "frame_step", "segments", "views")
    require_at_least(args, 0, "seed", "workers")
    if args.task and synthetic and (args.segments, args.views, args.augment) != (1, 1, "none"):
        fail("--segments, --views and --augment are for videos; synthetic tasks have one clip, as it is")
    if args.untrained and args.weights:
        fail(f"--untrained excludes --weights {args.weights}: its weights are random")
    args.weights = args.weights or "encoder"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# V-JEPA 2's training augmentation (docs/method.md, section 10, has the differences)

CROP = v2.RandomResizedCrop(1, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
RANDAUGMENT = v2.RandAugment(1, 7, 11, v2.InterpolationMode.BILINEAR, [128, 128, 128])  # 1 operation, magnitude 7 of 10
ERASE = v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=[round(255 * x) for x in data.MEAN])


@contextlib.contextmanager
def random_stream(purpose, key):
    """Seed torch's global generator, the only one v2 transforms use, for a clip; restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(data.stream_seed(purpose, *key))
        yield


def random_crop(key, height, width):
    """Draw the box (top, left, height, width) of a random resized crop. key: integers that identify the clip."""
    with random_stream("augment crop", key):
        box = CROP.make_params([torch.empty(3, height, width, device="meta")])
    return box["top"], box["left"], box["height"], box["width"]


def augment(key, clip):
    """Apply RandAugment and random erasing to a cropped clip (T, 3, H, W) uint8, to all frames alike.

    V-JEPA 2 draws 4 operations and applies each with probability 0.5.
    """
    with random_stream("augment", key):
        for _ in range(int((torch.rand(4) < 0.5).sum())):
            clip = RANDAUGMENT(clip)
        return ERASE(clip)


# ---------------------------------------------------------------------------------------------------------------------
# videos


class Videos(data.Manifest):
    """Whole videos of a manifest: clips (B, V, S, 3, T, H, W) uint8 and labels (B, 1).

    The positions that a clip can have in a video are divided into S equal shares, one per segment. An augmented
    training clip draws its position from its share; all others lie in the middle. (V-JEPA 2 divides the frames instead:
    docs/method.md, section 10.) Everything random depends on (seed, sample number).

    An unreadable video is replaced by a random one if augmented. Otherwise its clips are black and its label is -1: it
    trains nothing and no prediction of it is right.
    """

    def __init__(self, manifests, args, train):
        shape = args.num_frames, args.frame_step, args.resolution
        augmented = train and args.augment == "vjepa2"
        super().__init__(manifests, *shape, train=augmented, num_classes=args.num_classes, fps=args.fps)
        self.segments, self.views = args.segments, 1 if train else args.views
        self.side = SINGLE_VIEW_SIDE if args.views == 1 else 1  # of the views, as a fraction of the short side

    def sample(self, number):
        """One video: (clips (V, S, 3, T, H, W) uint8, label, "path: reason" of each unreadable video)."""
        skipped = []
        for line in self.lines(number):
            try:
                return self.clips(line, number), int(self.labels[line]), skipped
            except video.BadVideo as error:
                skipped.append(str(error))
        if self.train:
            raise video.BadVideo(skipped[-1])
        shape = self.views, self.segments, 3, self.num_frames, self.resolution, self.resolution
        return torch.zeros(shape, dtype=torch.uint8), -1, skipped

    def clips(self, line, number):
        """The clips (V, S, 3, T, H, W) of the video on a line, for a sample number."""
        offsets, keys = np.full(self.segments, 0.5), [(self.seed, number, segment) for segment in range(self.segments)]
        if self.train:
            offsets = np.random.default_rng(data.seed_sequence("segment", self.seed, number)).random(self.segments)
            crops = [functools.partial(random_crop, key) for key in keys]
        else:
            positions = np.linspace(0, 1, self.views) if self.views > 1 else [0.5]
            crop = functools.partial(video.square_crop, self.side)
            crops = [functools.partial(crop, position) for position in positions for _ in range(self.segments)]
        places = ((np.arange(self.segments) + offsets) / self.segments).tolist() * self.views
        shape = self.num_frames, self.frame_step
        clips = video.read_clips(self.paths[line], *shape, places, self.fps, crops, self.resolution)
        if self.train:
            clips = [augment(key, clip) for key, clip in zip(keys, clips, strict=True)]
        return torch.stack(clips).unflatten(0, (self.views, self.segments)).transpose(2, 3)


class BuiltInVideos(data.Synthetic):
    """The built-in clips as videos of one segment and one view, the same in every epoch; a label column per task."""

    train, views = False, 1

    def batch(self, numbers):
        """The videos of the samples with these numbers."""
        batch = super().batch(numbers)
        return batch._replace(clips=batch.clips[:, None, None])


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
        if args.task and args.task[0] in SYNTHETIC:
            tasks = [Task(name, SYNTHETIC.index(name), PROTOCOLS[name].num_classes) for name in args.task]
            shape = args.num_frames, args.resolution
            train = BuiltInVideos(*shape, SYNTHETIC_SEED, args.train_clips)
            return train, BuiltInVideos(*shape, SYNTHETIC_SEED + 2, args.val_clips), tasks
        name = args.task[0] if args.task else Path(args.train_data[0]).resolve().parent.name
        if args.task:
            args.train_data, args.val_data = [f"data/{name}/train.csv"], [f"data/{name}/val.csv"]
            for manifest in (*args.train_data, *args.val_data):
                if not Path(manifest).is_file():
                    fail(
                        f"--task {name} needs {manifest}, lines of 'path label' for the {args.num_classes} classes; "
                        f"python -m tools.prepare {name} --help says how to make it"
                    )
        sources = Videos(args.train_data, args, train=True), Videos(args.val_data, args, train=False)
    except (OSError, ValueError) as error:
        fail(str(error))
    return *sources, [Task(name, 0, args.num_classes)]


# ---------------------------------------------------------------------------------------------------------------------
# frozen features


def open_encoder(args):
    """Load the frozen encoder that the flags name, in --dtype. Returns (encoder, training step of the checkpoint)."""
    path = Path(args.checkpoint)
    if (path / "config.json").is_file() and not (path / "checkpoint.pt").is_file():
        fail(f"--checkpoint {path} is a Hugging Face folder; convert it with python -m tools.convert from-hf")
    try:
        checkpoint = load_checkpoint(path)
        config = checkpoint["model"]["encoder"]
        if args.untrained:
            torch.manual_seed(args.seed)
            encoder = Encoder(**config)
        elif args.weights not in checkpoint:
            raise ValueError(f"the checkpoint {path} holds no {args.weights}")
        else:
            encoder = build(Encoder, config, checkpoint[args.weights])
    except (OSError, ValueError) as error:
        fail(f"--checkpoint: {error}")
    return encoder.eval().requires_grad_(False).to(args.device, getattr(torch, args.dtype)), checkpoint["step"]


class Features:
    """The frozen encoder's tokens of a source: computed at every `read`, or once by `keep`, if they `fit`.

    Sample n belongs to process n modulo the number of processes.
    """

    def __init__(self, args, encoder, source):
        self.args, self.encoder, self.source, self.dtype = args, encoder, source, getattr(torch, args.dtype)
        self.kept = None  # this process's tokens (M, V, S * N, D) and labels (M, L)
        self.scale = None  # (2, D): mean and standard deviation per channel with which `read` standardizes
        grid = token_grid((args.num_frames, args.resolution, args.resolution), encoder.tubelet_size, encoder.patch_size)
        self.shape = source.views, args.segments * math.prod(grid), encoder.width  # of a video
        tokens_at_once = TOKENS_AT_ONCE * min(1, 1024 / encoder.width)
        self.clips_at_once = max(1, int(tokens_at_once / math.prod(grid)))
        self.videos_at_once = max(1, int(tokens_at_once / math.prod(self.shape[:2])))

    def fit(self):
        """Whether this process's share of the tokens takes at most KEPT_BYTES."""
        count = math.ceil(len(self.source) / rank_and_world()[1]) * math.prod(self.shape)
        return count * self.dtype.itemsize <= KEPT_BYTES

    def micro_batches(self, numbers):
        """This process's share of the sample numbers (B,), in parts that fit into memory."""
        rank, world = rank_and_world()
        return [part for part in numbers[numbers % world == rank].split(self.videos_at_once) if len(part)]

    def read(self, micro_batches, progress_of=None):
        """Yield (numbers (B,), tokens (B, V, S * N, D), labels (B, L)) of each micro-batch, on the device."""
        if self.kept is None:
            loaded = self._encode(micro_batches)
        else:
            rows = (numbers // rank_and_world()[1] for numbers in micro_batches)
            loaded = ([x[row] for x in self.kept] for row in rows)
        shown = progress(micro_batches, silent=not progress_of or self.kept is not None, desc=progress_of)
        for numbers, (tokens, labels) in zip(shown, loaded, strict=True):
            if self.scale is not None:
                tokens = ((tokens - self.scale[0]) / self.scale[1]).to(self.dtype)
            yield numbers, tokens, labels

    def _encode(self, micro_batches):
        """Load and encode each micro-batch: yield (tokens, labels)."""
        number_lists = [numbers.tolist() for numbers in micro_batches]
        consequence = "replaced by another" if self.source.train else "not used, a miss in validation"
        for batch in data.clip_loader(self.source, number_lists, self.args.workers):
            for reason in batch.skipped:
                print(f"unreadable, {consequence}: {reason}", file=sys.stderr)
            yield self.encode(batch.clips), batch.labels.to(self.args.device)

    @torch.no_grad()
    def encode(self, clips):
        """uint8 clips (B, V, S, 3, T, H, W) -> tokens (B, V, S * N, D)."""
        tokens = []
        for part in clips.flatten(0, 2).split(self.clips_at_once):
            part = data.normalize(part, self.args.device).to(self.dtype)
            if self.args.single_frame:
                middle = part.shape[2] // 2
                part = part[:, :, middle : middle + 1].expand_as(part)
            tokens.append(self.encoder(part))
        return torch.cat(tokens).view(len(clips), *self.shape)

    def keep(self, description):
        """Compute this process's share of the tokens now; from then on, `read` takes them from memory."""
        share = self.micro_batches(torch.arange(len(self.source)))
        size = sum(map(len, share))
        tokens = torch.empty(size, *self.shape, dtype=self.dtype, device=self.args.device)
        labels, done = [torch.empty(0, dtype=torch.long, device=self.args.device)], 0  # also if there are no samples
        for _, part, part_labels in self.read(share, f"{description} features"):
            tokens[done : done + len(part)] = part
            labels.append(part_labels)
            done += len(part)
        self.kept = tokens, torch.cat(labels)


def say(*words):
    """print, in the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def moments(features, numbers):
    """Mean and standard deviation per channel, (2, D), of the tokens of the readable samples among `numbers`."""
    sums = torch.zeros(3, features.shape[-1], dtype=torch.float64, device=features.args.device)
    for _, tokens, labels in features.read(features.micro_batches(numbers)):
        x = tokens[labels[:, 0] >= 0].flatten(0, -2).double()
        sums += torch.stack((x.sum(0), x.square().sum(0), torch.full_like(sums[0], len(x))))
    total, squares, count = all_reduce(sums)
    mean = total / count
    return torch.stack((mean, ((squares - count * mean**2) / (count - 1)).clamp(min=0).sqrt() + 1e-6)).float()


# ---------------------------------------------------------------------------------------------------------------------
# the probe


class CrossAttention(nn.Module):
    """V-JEPA 2's pooler: x = q + attention(q, LN(tokens)), without output projection, then x = x + MLP(LN(x))."""

    def __init__(self, width, heads, mlp_ratio=4.0, eps=1e-5):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(self, query, tokens):
        """query (1, 1, D), the same for all clips; tokens (B, N, D) -> (B, 1, D).

        No token needs its own key or value: q . (W_k x) = (W_k' q) . x, and sum a_n (W_v x_n) = W_v (sum a_n x_n).
        This is what makes it cheap to train many probes at once.
        """
        x = self.norm1(tokens)
        W_k, W_v = self.kv.weight.view(2, self.heads, -1, x.shape[-1])  # (h, d, D) each
        q = self.q(query).view(self.heads, 1, -1)
        keys = (q @ W_k).squeeze(1) / math.sqrt(q.shape[-1])  # (h, D); the bias of k adds the same to all scores
        attention = (x @ keys.mT).softmax(1)  # (B, N, h)
        pooled = (attention.mT @ x).transpose(0, 1)  # (h, B, D)
        values = (pooled @ W_v.mT).transpose(0, 1).flatten(1)  # (B, D)
        x = query + (values + self.kv.bias.chunk(2)[1]).unsqueeze(1)
        return x + self.mlp(self.norm2(x))


class AttentiveProbe(nn.Module):
    """Classifier of frozen features: depth - 1 self-attention blocks, cross-attention from one query, a linear layer.

    Paper appendix D and V-JEPA 2 use a depth of 4. tokens (B, N, D) -> logits (B, C)
    """

    def __init__(self, width, num_classes, depth=4, heads=16, eps=1e-5):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, eps=eps) for _ in range(depth - 1))
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.cross = CrossAttention(width, heads, eps=eps)
        self.linear = nn.Linear(width, num_classes)
        init_weights(self, width, self.blocks)
        nn.init.trunc_normal_(self.query, std=init_std(width))
        with torch.no_grad():
            self.cross.mlp.fc2.weight.div_(math.sqrt(2 * max(1, depth - 1)))  # as V-JEPA 2's pooler counts

    def forward(self, tokens):
        for block in self.blocks:
            tokens = block(tokens)
        return self.linear(self.cross(self.query, tokens).squeeze(1))


# ---------------------------------------------------------------------------------------------------------------------
# training the probes


def make_probes(args, width, num_classes, seed):
    """[(probe, its AdamW)] for every pair of lr and weight decay, all starting from the same weights."""
    probes = []
    for lr, weight_decay in itertools.product(args.lr, args.weight_decay):
        torch.manual_seed(seed)
        probe = AttentiveProbe(width, num_classes, args.probe_depth, args.probe_heads).to(args.device)
        for p in probe.parameters():
            p.grad = torch.zeros_like(p)  # stays zero in a process that gets no video of a small batch
        probes.append((probe, torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay, fused=True)))
    return probes


def classify(args, probe, tokens):
    """Logits (B, C) float32 of tokens (B, N, D)."""
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return probe(tokens).float()


def train_epoch(args, probes, features, column, order, first_step, num_steps, bar):
    """Train on the samples in `order`, and advance the progress bar. Returns the last step's mean loss of the probes.

    first_step: steps before this epoch; num_steps: steps of the whole training, for the learning rate.
    """
    batches = order.split(args.batch_size)
    micro_batches = [features.micro_batches(batch) for batch in batches]
    read = features.read(list(itertools.chain(*micro_batches)))
    for step, (batch, parts) in enumerate(zip(batches, micro_batches, strict=True), start=first_step):
        total_loss = torch.zeros((), device=args.device)
        for _, tokens, labels in itertools.islice(read, len(parts)):
            for probe, _ in probes:
                logits = classify(args, probe, tokens[:, 0])
                loss = F.cross_entropy(logits, labels[:, column], reduction="sum", ignore_index=-1) / len(batch)
                loss.backward()
                total_loss += loss.detach()
        for probe, optimizer in probes:
            reduce_gradients(list(probe.parameters()))
            lr = optimizer.defaults["lr"] * (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        bar.update()
    return all_reduce(total_loss).item() / len(probes)


def train_probes(args, probes, features, task, seed, key):
    """Train for all epochs, printing the progress. Continues from the state in --out if it has the same key."""
    state_file, length, start = args.out / f"resume-{task.name}-{seed}.pt", len(features.source), 0
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if state["key"] == key:
            start = state["epochs"]
            for (probe, optimizer), (weights, optimizer_state) in zip(probes, state["probes"], strict=True):
                probe.load_state_dict(weights)
                optimizer.load_state_dict(optimizer_state)
            say(f"continuing after epoch {start} ({state_file})")
    steps = math.ceil(length / args.batch_size)  # per epoch
    bar = progress(total=args.epochs * steps, initial=start * steps, desc=f"{task.name} seed {seed}")
    for epoch in range(start, args.epochs):
        if features.source.train:  # an endless sequence of samples; every seed and epoch takes its own
            order = torch.arange(length) + (seed * args.epochs + epoch) * length
        else:
            order = torch.randperm(length, generator=generator("probe order", seed, epoch))
        loss = train_epoch(args, probes, features, task.column, order, epoch * steps, args.epochs * steps, bar)
        bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
        if rank_and_world()[0] == 0:
            weights = [(probe.state_dict(), optimizer.state_dict()) for probe, optimizer in probes]
            state = {"key": key, "epochs": epoch + 1, "probes": weights}
            write_atomically(state_file, lambda path, state=state: torch.save(state, path))
    bar.close()


def resume_key(args, encoder, checkpoint_step):
    """What a training of probes depends on: flags, encoder weights, manifests. It continues only one with its key."""
    elsewhere = {"checkpoint", "weights", "untrained", "task", "fast", "train_data", "val_data", "seed", "seeds"}
    flags = {k: v for k, v in plain_flags(args).items() if k not in elsewhere | {"workers", "device", "out"}}
    manifests = [Path(path).resolve() for path in (args.train_data or []) + (args.val_data or [])]
    hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in manifests}
    return json.dumps([flags, encoder.config, checkpoint_step, fingerprint(encoder.state_dict()), hashes])


# ---------------------------------------------------------------------------------------------------------------------
# results


@torch.no_grad()
def predict(args, probes, features, task):
    """The most likely classes of all videos, (M, P, 5 or C), highest first, and their labels (M,); -1: unreadable.

    A probe's class probabilities are averaged over the views. The same in every process, on the CPU.
    """
    length, device = len(features.source), args.device
    top5 = torch.zeros(length, len(probes), min(5, task.num_classes), dtype=torch.long, device=device)
    labels = torch.zeros(length, dtype=torch.long, device=device)
    share = features.micro_batches(torch.arange(length))
    for numbers, tokens, batch_labels in features.read(share, "validation videos"):
        logits = torch.stack([classify(args, probe, tokens.flatten(0, 1)) for probe, _ in probes])  # (P, B * V, C)
        scores = logits.softmax(-1).unflatten(1, tokens.shape[:2]).mean(2)
        rows = numbers.to(device)
        top5[rows] = scores.topk(top5.shape[-1]).indices.transpose(0, 1)
        labels[rows] = batch_labels[:, task.column]
    return all_reduce(top5).cpu(), all_reduce(labels).cpu()


def summarize(args, predictions, num_classes):
    """A task's entry in results.json. predictions: what `predict` returns, for each seed.

    With several probes, each seed counts its best one on the validation videos; the median over the probes is given as
    well.
    """
    labels, seeds = predictions[0][1], len(predictions)
    correct = torch.stack([top5 == labels[:, None, None] for top5, _ in predictions])  # (seeds, M, P, 5)
    top1_accuracy = correct[..., 0].float().mean(1) * 100  # (seeds, P)
    top5_accuracy = correct.any(-1).float().mean(1) * 100
    best = top1_accuracy.argmax(1, keepdim=True)
    best_top1 = top1_accuracy.gather(1, best)[:, 0]  # (seeds,)
    correct_of_best = correct[torch.arange(seeds), :, best[:, 0], 0]  # (seeds, M)
    grid = itertools.product(args.lr, args.weight_decay)
    probes = [{"lr": lr, "weight_decay": weight_decay} for lr, weight_decay in grid]
    top1, total = best_top1.mean().item(), len(labels)
    return {
        "top1": top1,
        "spread": best_top1.std().item() if seeds > 1 else None,
        "top1_per_seed": best_top1.tolist(),
        "correct": ["".join("01"[x] for x in row) for row in correct_of_best.tolist()],  # a digit per video
        "interval95": interval95(top1 * total / 100, total),
        "chance": 100 / num_classes,
        "num_val": total,
        "unreadable": int((labels < 0).sum()),
        "top5": top5_accuracy.gather(1, best).mean().item() if num_classes > 5 else None,
        "median": top1_accuracy.quantile(0.5, dim=1).mean().item(),
        "best": [probes[i] for i in best],
        "probes": [
            {**probe, "top1": first.mean().item(), "top5": five.mean().item()}
            for probe, first, five in zip(probes, top1_accuracy.T, top5_accuracy.T, strict=True)
        ],
    }


def describe(result):
    """One line: accuracy, interval, and which probe was the best."""
    (low, high), seeds = result["interval95"], len(result["top1_per_seed"])
    spread = f" ± {result['spread']:.1f} over {seeds} seeds" if seeds > 1 else ""
    bad = f", {result['unreadable']} unreadable counted as misses" if result["unreadable"] else ""
    best = f"; best probe on these videos: {result['best']}, median {result['median']:.1f}"
    return (
        f"top-1 {result['top1']:.1f}%{spread} (95% interval {low:.1f} to {high:.1f}, chance {result['chance']:.1f}, "
        f"{result['num_val']} videos{bad}){best if len(result['probes']) > 1 else ''}"
    )


def evaluate(args):
    """Probe the encoder on every task and write the results."""
    encoder, checkpoint_step = open_encoder(args)
    train_source, val_source, tasks = open_task(args, encoder)
    weights = "untrained" if args.untrained else args.weights
    name = str(args.checkpoint) if weights == "encoder" else f"{args.checkpoint} ({weights})"
    say(
        f"probing {name} on {', '.join(task.name for task in tasks)} (probes: {len(args.lr) * len(args.weight_decay)}"
        f"): {len(train_source)} training and {len(val_source)} validation videos, {args.segments} segments x "
        f"{args.num_frames} frames x {args.views} views, {args.device} {args.dtype}"
    )
    try:
        with torch.device("meta"):
            AttentiveProbe(encoder.width, args.num_classes, args.probe_depth, args.probe_heads)  # to fail early
        args.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        fail(f"--probe-heads: {error}")
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")

    train, val = Features(args, encoder, train_source), Features(args, encoder, val_source)
    if val.fit():
        val.keep("validation")
    if train.fit() and not train_source.train:
        train.keep("training")
    if args.standardize:
        numbers = torch.arange(len(train_source) if train.kept else min(len(train_source), args.batch_size))
        train.scale = val.scale = moments(train, numbers)

    results, key = {}, resume_key(args, encoder, checkpoint_step)
    for task in tasks:
        predictions = []
        for seed in range(args.seed, args.seed + args.seeds):
            probes = make_probes(args, encoder.width, task.num_classes, seed)
            train_probes(args, probes, train, task, seed, key)
            predictions.append(predict(args, probes, val, task))
        if (predictions[0][1] < 0).all():
            fail("no validation video can be read", agreed=True)
        results[task.name] = summarize(args, predictions, task.num_classes)
        say(f"{name} {task.name}: {describe(results[task.name])}")

    record = {"checkpoint": str(args.checkpoint), "step": checkpoint_step, "weights": weights}
    record |= {"tasks": results, "args": plain_flags(args)}
    if rank_and_world()[0] == 0:
        write_atomically(args.out / "results.json", lambda p: p.write_text(json.dumps(record, indent=2) + "\n"))
        for state_file in args.out.glob("resume-*.pt"):
            state_file.unlink()
    say(args.out / "results.json")


def main():
    args = parse_args()
    join_processes(args)
    try:
        evaluate(args)
    except video.BadVideo as error:
        fail(f"unreadable video: {error}")
    except data.LoaderFailed as error:
        fail(str(error))
    except OSError as error:  # a full disk
        fail(f"--out {args.out}: {error.strerror}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
