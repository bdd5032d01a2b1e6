"""What every training script needs and no method depends on: flags, processes and devices, optimiser and schedules,
checkpoints and resuming, logging. Plain functions, and one class, `Run`, for what has state.

A run is determined by its flags: sample n, the masks of micro-batch g of step s, and the initial weights depend on the
seed and on n, g, s alone, so neither restarting nor spreading a run over more processes changes it.
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import data
import flops
import masking
from model import CHECKPOINT_FORMAT, SIZES, Encoder, Predictor, token_grid


def fail(message, agreed=False):
    """End with one line that says what is wrong and what to do, exit status 2.

    During set-up one process per node says it. Later the one that fails does, or only the first if all have `agreed`.
    """
    speaks = os.environ.get("RANK", "0") == "0" if agreed else os.environ.get("LOCAL_RANK", "0") == "0"
    if speaks or (dist.is_initialized() and not agreed):
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# flags


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, description, **rest):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **rest)

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def training_flags(description, out, steps):
    """The flags that teacher and student share; defaults are the paper's (tables 3, 4 and 5)."""
    parser = Parser(description)
    flag = parser.add_argument_group("what is built").add_argument
    flag("--model", choices=SIZES, default="vit_l", help="size of the encoder (paper table 3)")
    flag("--width", type=int, help="overrides the size's width; likewise --depth and --heads")
    flag("--depth", type=int, help="number of blocks")
    flag("--heads", type=int, help="attention heads")
    flag("--patch-size", type=int, default=16, help="pixels")
    flag("--tubelet-size", type=int, default=2, help="frames that a token spans")
    flag("--num-frames", type=int, default=16, help="frames of a clip (table 5)")
    flag("--resolution", type=int, default=224, help="pixels, both sides (table 5)")
    flag("--predictor-width", type=int, default=384, help="(table 4)")
    flag("--predictor-depth", type=int, default=12, help="(table 4)")
    flag("--predictor-heads", type=int, default=16, help="(table 4)")

    flag = parser.add_argument_group("what it sees").add_argument
    flag("--data", nargs="+", metavar="MANIFEST", help="text files of 'path label' lines; built-in videos without")
    flag("--data-weights", nargs="+", type=float, metavar="WEIGHT", help="share of each manifest in the samples")
    flag("--held-out", metavar="MANIFEST", help="videos whose loss is logged and that are never trained on")
    flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next (table 5)")
    flag("--fps", type=float, help="frames of a clip per second of video, by time stamps; instead of --frame-step")
    flag("--clips-per-video", type=int, default=1, help="consecutive clips from one opened video: faster, less diverse")
    flag("--max-bad", type=float, default=0.05, help="share of unreadable videos above which the run ends")
    flag("--workers", type=int, help="loader processes; default 8 per process on a GPU, 1 on the CPU")
    flag("--loader-timeout", type=int, default=600, help="seconds to wait for a loader process")
    flag("--mask", choices=masking.STRATEGIES, default="multiblock", help="which tokens are predicted (section 5.2)")
    flag("--mask-truncation", choices=("random", "raster"), default="random", help="raster is V-JEPA's (masking.py)")

    flag = parser.add_argument_group("how it learns").add_argument
    flag("--steps", type=int, default=steps, help="optimiser steps of the whole run")
    flag("--batch-size", type=int, default=3072, help="clips per step, over all processes (table 5)")
    flag("--micro-batch-size", type=int, help="clips at a time and process; default the largest that divides, <= 24")
    flag("--lr", type=float, default=6.25e-4, help="after warm-up (table 5)")
    flag("--start-lr", type=float, help="at step 0 (table 5: 2e-4); default 0.32 of --lr")
    flag("--final-lr", type=float, default=1e-6, help="at the last step (table 5)")
    flag("--warmup-steps", type=int, default=10_000, help="(table 5)")
    flag("--weight-decay", type=float, default=0.04, help="at step 0 (table 5)")
    flag("--final-weight-decay", type=float, default=0.4, help="at the last step (table 5)")
    flag("--clip-grad", type=float, default=0.02, help="largest global gradient norm (table 5)")
    flag("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW (table 5)")
    flag("--seed", type=int, default=0)

    flag = parser.add_argument_group("on what").add_argument
    flag("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; default bfloat16 on a GPU only")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks; default on a GPU only")
    flag("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=False,
         help="recompute each block in the backward pass: less memory, a third more work")  # fmt: skip
    flag("--replicate", dest="parallel", action="store_const", const="replicate", default="shard",
         help="every process holds the whole of what is trained; without, it is sharded over all of them")  # fmt: skip
    flag("--hybrid", dest="parallel", action="store_const", const="hybrid", default="shard",
         help="sharded within a node, replicated across nodes")  # fmt: skip

    flag = parser.add_argument_group("what it leaves").add_argument
    flag("--out", type=Path, default=Path(out), help="run folder; one that holds this run already is continued")
    flag("--save-every", type=int, default=1000, help="steps")
    flag("--keep", type=int, default=2, help="states to continue from that are kept, the newest ones")
    flag(
        "--snapshot-every", type=int, default=0, help="steps; each leaves a checkpoint-STEP.pt for analyze.py; 0: none"
    )
    flag("--log-every", type=int, default=10, help="steps")
    flag("--tensorboard", action="store_true", help="the figures of metrics.jsonl for TensorBoard as well")
    flag("--fresh", action="store_true", help="start anew; a run that is in --out already is moved aside")
    return parser


def clip_grid(args):
    """The token grid (time, rows, columns) of the clips that flags describe; ValueError if it does not divide."""
    return token_grid((args.num_frames, args.resolution, args.resolution), args.tubelet_size, args.patch_size)


def encoder_config(args):
    """What `Encoder` takes, from a size and its overrides. Ends the script if the numbers do not fit together."""
    config = dict(SIZES[args.model])
    config.update({k: getattr(args, k) for k in ("width", "depth", "heads") if getattr(args, k) is not None})
    config.update({k: getattr(args, k) for k in ("num_frames", "resolution", "patch_size", "tubelet_size")})
    try:
        clip_grid(args)
        with torch.device("meta"):
            Encoder(**config)
    except ValueError as error:
        fail(str(error))
    return config


def predictor_config(args, in_width, out_width):
    """What `Predictor` takes. Ends the script if the numbers do not fit together."""
    config = dict(
        in_width=in_width, out_width=out_width, width=args.predictor_width, depth=args.predictor_depth,
        heads=args.predictor_heads, num_mask_tokens=masking.NUM_MASKS[args.mask],
    )  # fmt: skip
    try:
        with torch.device("meta"):
            Predictor(**config)
    except ValueError as error:
        fail(f"predictor: {error}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# processes, devices, data


def rank_and_world():
    """This process's number and how many there are, as torchrun says; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def resolve_device(args):
    """Fill in --device and --dtype, in place, where they were left to the machine."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: this machine has no GPU that torch can use")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


def require_at_least(args, least, *names):
    """End the script if one of these flags is smaller than `least`."""
    for name in names:
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least} is needed")


def default_micro_batch_size(share):
    """The largest size up to 24 (V-JEPA 2's clips per GPU) that divides a process's share of a batch."""
    return next(n for n in range(min(24, share), 0, -1) if share % n == 0)


def setup(args):
    """Resolve the flags that depend on the machine, in place; join torchrun's process group; say what it runs on."""
    rank, world = rank_and_world()
    resolve_device(args)
    gpu = args.device == "cuda"
    args.compile = gpu if args.compile is None else args.compile
    args.workers = (8 if gpu else 1) if args.workers is None else args.workers
    args.start_lr = 0.32 * args.lr if args.start_lr is None else args.start_lr
    if args.steps < 1 or args.batch_size < 1 or args.batch_size % world:
        fail(f"--steps and --batch-size are at least 1, --batch-size divisible by the {world} processes")
    require_at_least(args, 1, "save_every", "log_every", "frame_step", "keep", "loader_timeout", "clips_per_video")
    require_at_least(args, 0, "seed", "workers", "snapshot_every")
    args.schedule_steps = args.steps  # where learning rate and weight decay end; V-JEPA's stretch moves it
    if args.warmup_steps >= args.steps:
        fail(f"--warmup-steps {args.warmup_steps} leaves nothing of --steps {args.steps}; a tenth of it is usual")
    share = args.batch_size // world
    if args.micro_batch_size is None:
        args.micro_batch_size = default_micro_batch_size(share)
    if args.micro_batch_size < 1 or share % args.micro_batch_size:
        fail(f"--micro-batch-size {args.micro_batch_size} does not divide {args.batch_size} clips / {world} processes")
    if world > 1:
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    sys.excepthook = _in_one_line
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # into which nobody writes
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be with one process
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if rank == 0:
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads (no GPU is used)"
        print(f"on {world} x {name}, {args.dtype}, batch {args.batch_size} = {world} processes x "
              f"{share // args.micro_batch_size} micro-batches x {args.micro_batch_size} clips")  # fmt: skip


def lost_a_process(error):
    """Whether an error only says that another process of the run is gone."""
    signs, kinds = ("closed by peer", "gloo", "nccl"), RuntimeError | dcp.api.CheckpointException
    return isinstance(error, kinds) and any(sign in str(error).lower() for sign in signs)


def _in_one_line(kind, error, traceback):
    """What ends a process for reasons outside it is said in one line, not in a traceback of where it was just then."""
    text = str(error).lower()
    if isinstance(error, RuntimeError) and "dataloader worker" in text:  # torch raises this anywhere in the step
        print(f"{Path(sys.argv[0]).name}: {data.loader_failed(error)}", file=sys.stderr, flush=True)
    elif lost_a_process(error):
        rank = rank_and_world()[0]
        print(f"process {rank} ends: it lost another process, whose message says why", file=sys.stderr, flush=True)
    else:
        return sys.__excepthook__(kind, error, traceback)
    data.end_workers()
    os._exit(2)


def prepare(network, args, sharded=True):
    """Ready a network for training, in place: compile and checkpoint its blocks, share it among the processes (FSDP2).

    Its blocks' parameters and optimiser state are sharded over all processes, or with --hybrid over those of a node.
    Parameters and sums of gradients are float32; with --dtype bfloat16 the forward and backward pass gather and compute
    in bfloat16. What is trained stays gathered until `last_micro_batch` says otherwise; what is not, for a forward pass
    of a block. With --replicate every process keeps everything, and `update` averages the gradients.
    """
    network.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        for block in network.blocks:
            block.compile()
    if dist.is_initialized() and sharded and args.parallel != "replicate":
        world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
        shape = {"shard": (1, world), "hybrid": (world // local, local)}[args.parallel]
        mesh = init_device_mesh(args.device, shape, mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # RoPE's tables stay float32
        if args.dtype == "bfloat16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        frozen = not any(p.requires_grad for p in network.parameters())
        for part in (*network.blocks, network):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=frozen)
    return network


def last_micro_batch(networks, last):
    """Say before a micro-batch whether it is the last one of a step, after which alone processes have to talk.

    Before it, a process adds up its own gradients and keeps the weights that it has gathered: two gatherings and two
    sums of gradients a step, one for each mask, instead of four and two a micro-batch. It costs the memory of weights
    (in --dtype) and gradients (float32) that are not shards.
    """
    for network in networks:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            network.set_reshard_after_backward(last)


def clip_source(args):
    """The training data that the flags name. Ends the script if a manifest cannot be used."""
    if not args.data:
        if rank_and_world()[0] == 0:
            print("no --data: training on the built-in synthetic videos")
        return data.Synthetic(args.num_frames, args.resolution, args.seed)
    try:
        return data.Manifest(
            args.data, args.num_frames, args.frame_step, args.resolution, args.seed, weights=args.data_weights,
            fps=args.fps, clips_per_video=args.clips_per_video,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        fail(f"--data: {error}")


def micro_batch_indices(args):
    """Which of a step's micro-batches, counted over all processes, this process computes."""
    rank, world = rank_and_world()
    return range(rank, args.batch_size // args.micro_batch_size, world)


def training_loader(source, args, start_step):
    """An iterator over the `data.Batch`es of this process, from start_step to the end of the run."""
    size = args.micro_batch_size
    numbers = (
        range(first, first + size)
        for step in range(start_step, args.steps)
        for first in (step * args.batch_size + g * size for g in micro_batch_indices(args))
    )
    return data.clip_loader(source, numbers, args.workers, args.device == "cuda", args.loader_timeout)


def next_batch(loader):
    """The loader's next `data.Batch`; ends the script where there is none to be had."""
    try:
        return next(loader)
    except data.BadVideo as error:  # its last line; before it, a worker's traceback
        fail(f"unreadable, and nothing stands in: {str(error).splitlines()[-1]}")
    except data.LoaderFailed as error:
        fail(str(error))


def generator(*key):
    """A CPU random generator determined by a tuple of non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# ---------------------------------------------------------------------------------------------------------------------
# optimiser and schedules (paper table 5)


def learning_rate(step, args):
    """Linear from start_lr to lr over warmup_steps, then cosine to final_lr at the schedule's last step."""
    if step < args.warmup_steps:
        return args.start_lr + (args.lr - args.start_lr) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.schedule_steps - 1 - args.warmup_steps)
    return args.final_lr + (args.lr - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay(step, args):
    """Cosine from weight_decay at step 0 to final_weight_decay at the schedule's last step."""
    progress = step / max(1, args.schedule_steps - 1)
    change = args.weight_decay - args.final_weight_decay
    return args.final_weight_decay + change * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(modules, args):
    """AdamW over the modules' parameters; no weight decay on biases, norms and mask tokens."""
    named = [item for module in modules for item in module.named_parameters()]
    decayed = [p for name, p in named if p.ndim > 1 and "mask_tokens" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "mask_tokens" in name]
    groups = [{"params": decayed, "decayed": True}, {"params": others, "decayed": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)


def set_schedules(optimizer, step, args):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
        if group["decayed"]:
            group["weight_decay"] = weight_decay(step, args)


def average_gradients(params):
    """The mean over all processes, in place; one sum of them all, which for small networks is what counts."""
    mean = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    for p, part in zip(params, mean.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(part.view_as(p))


def update(optimizer, loss, args):
    """Clip the gradients and step, unless loss or gradients are not finite. Returns loss and norm before clipping.

    loss: this process's mean, a detached tensor; returned is the mean over all processes, the norm over all parameters.
    Nothing here waits for the device.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized() and args.parallel == "replicate":
        average_gradients(params)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    torch.nn.utils.clip_grads_with_norm_(params, args.clip_grad, norm)
    # Where this is 1, fused AdamW changes nothing: torch's way for scaled gradients.
    optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# ---------------------------------------------------------------------------------------------------------------------
# what is watched

HELD_OUT_SEED = 2**30  # built-in clips that no run with a seed below this is trained on
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # bfloat16, dense, of the SXM modules


def fixed_batch(source, args):
    """(clips uint8, masks, whether never trained on) of one micro-batch, the same for every process at every step."""
    numbers = range(args.micro_batch_size)
    if args.held_out:
        try:
            source = data.Manifest(
                [args.held_out], args.num_frames, args.frame_step, args.resolution, train=False, fps=args.fps
            )
        except (OSError, ValueError) as error:
            fail(f"--held-out: {error}")
        numbers = np.linspace(0, len(source) - 1, len(numbers)).round().astype(int).tolist()
    elif not args.data:
        source = data.Synthetic(args.num_frames, args.resolution, HELD_OUT_SEED)
    clips = next_batch(data.clip_loader(source, [numbers], min(1, args.workers), timeout=args.loader_timeout)).clips
    rng = generator(args.seed, HELD_OUT_SEED)
    masks = masking.sample_masks(args.mask, clip_grid(args), len(clips), rng, args.mask_truncation)
    return clips, masks, bool(args.held_out or not args.data)


def effective_rank(x):
    """RankMe of vectors (M, D): the exponential of the entropy of the singular values (Garrido et al., 2023)."""
    if not x.isfinite().all():
        return math.nan
    x = x.double()  # the matrix below squares the singular values
    sigma = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = sigma / sigma.sum() + 1e-7
    return (-(p * p.log()).sum()).exp().item()


def interval95(right, total):
    """Wilson's 95% interval of a proportion, in percent."""
    z, p = 1.96, right / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return [100 * (centre - half) / (1 + z * z / total), 100 * (centre + half) / (1 + z * z / total)]


def peak_memory(device):
    """Bytes that this process has needed at most: of the GPU's memory, of the machine's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------------------------------
# the run: what it leaves behind, how it goes on


def duration(seconds):
    """1h02m, 3m20s or 12s."""
    s = round(seconds)
    return f"{s // 3600}h{s % 3600 // 60:02}m" if s >= 3600 else f"{s // 60}m{s % 60:02}s" if s >= 60 else f"{s}s"


def write_aside(path, write):
    """Call write(temporary path), then rename it to `path`: a file of that name is complete at every moment."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    os.replace(aside, path)


def checksum(path):
    """[bytes, CRC-32] of a file; None if it cannot be read."""
    size = crc = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    except OSError:
        return None
    return [size, crc]


def git_commit():
    """The commit of the code that runs, "+" if files were changed; None outside a git checkout."""
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Run:
    """A training run and its folder: restores what an earlier start saved, logs, saves.

    kind: "teacher", "student" or "ema". networks: what is saved, by name: "encoder" (what a checkpoint is loaded for),
    "predictor", and whatever else is needed to go on. source: the training data. teacher: what makes the targets, if
    anything does. Networks and optimiser are restored in place where --out holds an earlier part of this run.
    `start_step` is where to go on.
    """

    RECORDED = {"step", "kind", "model", "args", "seconds", "flops", "counted", "files"}  # in run.json

    def __init__(self, kind, args, networks, optimizer, source, teacher=None):
        self.kind, self.args, self.networks, self.optimizer = kind, args, networks, optimizer
        self.model = {name: networks[name].config for name in ("encoder", "predictor")}
        self.teacher_config = teacher.config if teacher else None
        self.rank, self.world = rank_and_world()
        self.device = torch.device(args.device)
        self.grid = clip_grid(args)
        self.num_micro_batches = len(micro_batch_indices(args))  # per step, of this process
        self.start_step, self.seconds, self.flops = 0, 0.0, 0.0
        self.samples, self.num_bad, self.bad = 0, 0, set()  # of this process, since it started
        self.samples_before, self.num_bad_before = 0, 0  # of all processes, before
        self.metrics_file, self.resume_folder = args.out / "metrics.jsonl", args.out / "resume"
        self.stop_signal, self.tensorboard = 0, None
        name = torch.cuda.get_device_name() if args.device == "cuda" else ""
        self.peak_tflops = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)
        try:  # whether the grid takes such masks; they may be too large for it
            masking.sample_masks(args.mask, self.grid, 1, generator(args.seed))
        except ValueError as error:
            fail(f"--mask {args.mask}: {error}")
        self.fixed = fixed_batch(source, args)
        try:
            self._open_folder()
        except OSError as error:
            fail(f"--out {args.out}: {error.strerror}")
        if not self._resume() and self.rank == 0:
            self._describe()
        if args.tensorboard and self.rank == 0:
            self._open_tensorboard()
        self._start_window()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    # -- what a step sees

    def micro_batches(self, loader, step):
        """Yields this process's micro-batches of a step: clips, normalised (B, 3, T, H, W) on the device, and masks."""
        self.names, args = [], self.args
        for g in micro_batch_indices(args):
            started = time.perf_counter()
            batch = next_batch(loader)
            self.waited += time.perf_counter() - started
            self.names += batch.names
            self._count_bad(batch)
            rng, sizes, truncation = generator(args.seed, step, g), generator(args.seed, step), args.mask_truncation
            masks = masking.sample_masks(args.mask, self.grid, len(batch.clips), rng, truncation, sizes)
            self._count_tokens(masks)
            last_micro_batch(self.networks.values(), g == micro_batch_indices(args)[-1])
            yield data.normalise(batch.clips, self.device), [mask.to(self.device) for mask in masks]

    def _count_bad(self, batch):
        self.samples += len(batch.clips)
        self.num_bad += len(batch.skipped)
        for reason in sorted(set(batch.skipped) - self.bad):
            print(f"unreadable, another video stands in: {reason}", file=sys.stderr, flush=True)
        self.bad.update(batch.skipped)

    def _count_tokens(self, masks):
        counts = [(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks]
        clips = len(masks[0].context_ids)
        self.window_clips += clips
        self.window_flops += clips * flops.step_flops(
            self.model["encoder"], self.model["predictor"], counts, self.teacher_config, math.prod(self.grid)
        )
        for i, name in enumerate(("context", "target")):
            lost = sum(mask[i + 2].sum().item() for mask in masks)
            self.tokens[f"{name}_kept"] += clips * sum(count[i] for count in counts)
            self.tokens[f"{name}_lost"] += lost

    # -- what it says and saves

    def _start_window(self):
        """Figures are averages since the last logged step."""
        self.started, self.waited, self.window_clips, self.window_flops = time.perf_counter(), 0.0, 0, 0.0
        self.tokens = dict.fromkeys(("context_kept", "context_lost", "target_kept", "target_lost"), 0)
        self.steps = []  # (step, loss, gradient norm, names of the clips): read when logged, so that no step waits

    def end_step(self, step, loss, grad_norm, losses_of):
        """Log and save where it is time; end the run where it cannot or shall not go on.

        Takes `update`'s loss and norm. losses_of(clips, masks), which yields every mask's loss, predictions and targets
        (B, Kt, D), is called with the fixed batch.
        """
        args, done = self.args, step + 1
        self.steps.append((step, loss, grad_norm, self.names))
        stop = torch.tensor(self.stop_signal)
        if dist.is_initialized():  # a signal reaches the processes at different steps, or only one of them
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        snapshot = args.snapshot_every and done % args.snapshot_every == 0
        saving = stop or snapshot or done % args.save_every == 0 or done == args.steps
        if saving or done % args.log_every == 0:
            self._log(done, losses_of)
        if saving:
            self.save(done, snapshot)
        if stop:
            if self.rank == 0:
                name = signal.Signals(stop.item()).name
                print(
                    f"{name}: saved and stopped after step {done} of {args.steps}; the same command continues",
                    flush=True,
                )
            self._leave()
            sys.exit(0)

    def _remember(self, number, frame):
        self.stop_signal = number

    def _read_steps(self):
        """The losses and gradient norms since the last logged step; ends the run if one is not finite."""
        figures = torch.stack([torch.stack((loss, norm)) for _, loss, norm, _ in self.steps]).double().tolist()
        for (step, _, _, names), (loss, norm) in zip(self.steps, figures, strict=True):
            if not math.isfinite(loss + norm):
                fail(f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, lr "
                     f"{learning_rate(step, self.args):.3g}; not updated, the last checkpoint is kept; a lower --lr "
                     f"may help. Clips of process {self.rank}: {', '.join(names)}")  # fmt: skip
        return zip(*figures, strict=True)

    @torch.no_grad()
    def _watch(self, losses_of):
        """What a collapse shows in first, on the fixed batch: spread and rank of targets and predictions."""
        clips, masks, held_out = self.fixed
        clips, masks = data.normalise(clips, self.device), [mask.to(self.device) for mask in masks]
        with torch.compiler.set_stance("force_eager"):  # so that nothing is compiled for this
            losses, *vectors = zip(*losses_of(clips, masks), strict=True)
        for module in nn.ModuleDict(self.networks).modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward pass does it
        line = {"held_out_loss": torch.stack(losses).mean().item()} if held_out else {}
        for name, x in zip(("prediction", "target"), vectors, strict=True):
            x = x[-1].float().flatten(0, 1)  # the last mask's
            x = x[:: math.ceil(len(x) / 4096)]
            line |= {f"{name}_std": x.std(0).mean().item(), f"{name}_rank": effective_rank(x)}
        return line

    def _log(self, done, losses_of):
        args = self.args
        losses, norms = self._read_steps()
        watched = self._watch(losses_of)
        sums = [self.samples, self.num_bad, self.window_clips, self.window_flops, *self.tokens.values()]
        sums = torch.tensor(sums, dtype=torch.float64)  # of this process
        if dist.is_initialized():
            dist.all_reduce(sums)
        samples, bad, clips, window_flops, *tokens = sums.tolist()
        memory = torch.tensor(peak_memory(self.device))
        if dist.is_initialized():
            dist.all_reduce(memory, dist.ReduceOp.MAX)
        self.counted = int(samples) + self.samples_before, int(bad) + self.num_bad_before
        loss, grad_norm = sum(losses) / len(losses), norms[-1]
        seconds = time.perf_counter() - self.started
        self.seconds += seconds
        self.flops += window_flops
        line = {
            "step": done,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate(done - 1, args),
            "weight_decay": weight_decay(done - 1, args),
            **watched,
            "clips_per_s": clips / seconds,
            "tokens_per_s": clips / seconds * math.prod(self.grid),
            "data_wait": self.waited / seconds,
            "seconds": self.seconds,
            "flops": self.flops,
            "tflops": window_flops / seconds / 1e12,
            "peak_memory_gib": memory.item() / 2**30,
            # tokens of a clip, summed over its masks
            **{name: count / clips for name, count in zip(self.tokens, tokens, strict=True)},
            "bad_videos": self.counted[1],
        }
        if self.peak_tflops and args.dtype == "bfloat16":
            line["model_flops_utilisation"] = line["tflops"] / (self.world * self.peak_tflops)
        self._start_window()
        samples, bad = self.counted
        if samples >= 100 and bad > self.args.max_bad * samples:
            fail(
                f"{bad} of {samples} samples are unreadable, more than --max-bad {self.args.max_bad:.0%}: check --data",
                agreed=True,
            )
        if self.rank == 0:
            with open(self.metrics_file, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.tensorboard:
                for name, value in line.items():
                    self.tensorboard.add_scalar(name, value, done)
            left = duration((args.steps - done) * seconds / len(losses))
            print(f"{self.kind} {done}/{args.steps}  loss {loss:.4f}  lr {line['lr']:.1e}  grad {grad_norm:.3f}  "
                  f"{line['clips_per_s']:.0f} clips/s  waiting for data {line['data_wait']:.0%}  {left} left",
                  flush=True)  # fmt: skip

    def _state(self):
        """(all networks as one module, what resume/ holds of them and of the optimiser: sharded tensors only)."""
        networks = nn.ModuleDict(self.networks)
        optimizer = get_optimizer_state_dict(networks, self.optimizer)["state"]
        return networks, {"networks": get_model_state_dict(networks), "optimizer": optimizer}

    def save(self, step, snapshot=False):
        """Write checkpoint.pt for others and resume/ for this run; with `snapshot`, a checkpoint that stays as well."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = {name: get_model_state_dict(network, options=whole) for name, network in self.networks.items()}
        shared = {"format": CHECKPOINT_FORMAT, "kind": self.kind, "step": step, "model": self.model,
                  "encoder_is": self.kind, **weights, "args": self._plain_args()}  # fmt: skip
        folder = self.resume_folder / f"step-{step:08}"
        aside = folder.with_suffix(".tmp")
        try:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                # Before the state: a run that goes on from a state has written its checkpoints.
                for name in ["checkpoint.pt", f"checkpoint-{step:06}.pt"][: 2 if snapshot else 1]:
                    write_aside(self.args.out / name, lambda path: torch.save(shared, path))
            self._save_state(step, aside, folder)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # RuntimeError: torch.save, a full disk
            if lost_a_process(error):
                raise
            reason = str(error).strip().splitlines()[-1]
            fail(
                f"step {step} could not be saved in {self.args.out}, the one before is kept; is the disk full? {reason}"
            )
        if dist.is_initialized():
            dist.barrier()

    def _save_state(self, step, aside, folder):
        """resume/step-N: every process writes its part; the folder gets its name when it is whole."""
        if dist.is_initialized():
            dist.barrier()
        dcp.save(self._state()[1], checkpoint_id=aside)
        if self.rank == 0:
            record = {"step": step, "kind": self.kind, "model": self.model, "args": self._plain_args(),
                      "seconds": self.seconds, "flops": self.flops, "counted": self.counted,
                      "files": {path.name: checksum(path) for path in sorted(aside.iterdir())}}  # fmt: skip
            (aside / "run.json").write_text(json.dumps(record))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            for old in self._states()[self.args.keep :]:
                shutil.rmtree(old)

    def finish(self):
        """Say what there is now, and leave the process group."""
        if self.rank == 0:
            print(f"{self.kind} done: {self.args.steps} steps in {duration(self.seconds)}, "
                  f"{self.flops:.3g} FLOPs; {self.args.out / 'checkpoint.pt'}", flush=True)  # fmt: skip
        self._leave()

    def _leave(self):
        """The end of the run, not of the process: let others have the folder, the signals, the process group."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if self.tensorboard:
            self.tensorboard.close()
        if self.rank == 0:
            self.lock.close()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    # -- how it starts

    def _open_folder(self):
        out = self.args.out
        if self.rank == 0:
            self._lock()
            if self.args.fresh and (out / "args.json").exists():
                older = next(p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.{i}")).exists())
                shutil.move(out, older)
                print(f"--fresh: the run that was in {out} is now in {older}")
                self._lock()
            self.resume_folder.mkdir(exist_ok=True)
        if dist.is_initialized():
            dist.barrier()

    def _lock(self):
        """Keep other runs out of the folder for as long as this process lives."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.args.out / "lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            fail(f"{self.args.out} is in use by another run ({self.lock.read()}); choose another --out")
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def _describe(self):
        versions = {"python": platform.python_version(), "torch": torch.__version__, "av": data.av.__version__}
        record = {"kind": self.kind, "args": self._plain_args(), "model": self.model, "world_size": self.world,
                  "versions": versions, "git_commit": git_commit()}  # fmt: skip
        write_aside(self.args.out / "args.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        self.metrics_file.write_text("")
        sizes = [sum(p.numel() for p in self.networks[name].parameters()) / 1e6 for name in self.model]
        print(f"{self.kind}: encoder {sizes[0]:.2f}M parameters, predictor {sizes[1]:.2f}M; "
              f"{self.args.steps} steps into {self.args.out}", flush=True)  # fmt: skip

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fail("--tensorboard needs a package: pip install tensorboard")
        self.tensorboard = SummaryWriter(self.args.out / "tensorboard", purge_step=self.start_step + 1)

    def _states(self):
        """The folders to continue from, the newest first."""
        return sorted((p for p in self.resume_folder.glob("step-*") if p.suffix != ".tmp"), reverse=True)

    def _resume(self):
        """Restore the newest whole state; whether there is one."""
        for folder in self._states():
            try:
                record = self._verified(folder)
                break
            except (OSError, ValueError, AttributeError, TypeError) as error:
                if self.rank == 0:
                    print(f"{folder} is damaged ({error}); trying the one before", file=sys.stderr, flush=True)
        else:
            begun = any(self.resume_folder.iterdir())  # the first save was cut off
            if self._states() or ((self.args.out / "checkpoint.pt").exists() and not begun):
                fail(
                    f"{self.args.out} holds a run, but no whole state to continue it from; --fresh starts anew",
                    agreed=True,
                )
            return False
        if record["kind"] != self.kind or record["model"] != self.model:
            fail(f"{self.args.out} holds a run of another kind or model; choose another --out, or --fresh", agreed=True)
        networks, state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(networks, state["networks"])
        groups = get_optimizer_state_dict(networks, self.optimizer)["param_groups"]
        set_optimizer_state_dict(networks, self.optimizer, {"state": state["optimizer"], "param_groups": groups})
        self.start_step, self.seconds, self.flops = record["step"], record["seconds"], record["flops"]
        self.samples_before, self.num_bad_before = record["counted"]
        if self.rank == 0:
            for newer in self._states():
                if newer > folder:
                    shutil.rmtree(newer)
            lines = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
            # A killed process may leave its last line unfinished.
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.start_step]
            write_aside(self.metrics_file, lambda path: path.write_text("".join(line + "\n" for line in kept)))
            print(f"continuing {self.args.out} at step {self.start_step} of {self.args.steps}")
            silent, before = ("fresh", "out", "schedule_steps"), record["args"]
            changed = [k for k, v in self._plain_args().items() if k not in silent and before.get(k) != v]
            if changed:
                print("  with other flags than before: " + ", ".join("--" + k.replace("_", "-") for k in changed))
        return True

    def _verified(self, folder):
        """The record of a state's folder whose files are as they were written; ValueError if one is not."""
        record = json.loads((folder / "run.json").read_text())
        if not isinstance(record, dict) or not record.keys() >= self.RECORDED:
            raise ValueError("run.json says too little")
        mine = sorted(record["files"])[self.rank :: self.world]  # the processes share the reading
        bad = [name for name in mine if checksum(folder / name) != record["files"][name]]
        count = torch.tensor(len(bad))
        if dist.is_initialized():
            dist.all_reduce(count)
        if count:
            raise ValueError(f"{count.item()} of its files are not as they were written")
        return record

    def _plain_args(self):
        def plain(value):
            return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in vars(self.args).items()}
