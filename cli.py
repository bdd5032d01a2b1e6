"""The flags that scripts share, one-line errors, durations."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import masking
from model import SIZES, Encoder, Predictor, token_grid


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
    flag("--steps", type=int, default=steps, help="optimizer steps of the whole run")
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


# ---------------------------------------------------------------------------------------------------------------------
# the run: what it leaves behind, how it goes on


def duration(seconds):
    """1h02m, 3m20s or 12s."""
    s = round(seconds)
    return f"{s // 3600}h{s % 3600 // 60:02}m" if s >= 3600 else f"{s // 60}m{s % 60:02}s" if s >= 60 else f"{s}s"


def interval95(right, total):
    """Wilson's 95% interval of a proportion, in percent."""
    z, p = 1.96, right / total
    center, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return [100 * (center - half) / (1 + z * z / total), 100 * (center + half) / (1 + z * z / total)]


def write_aside(path, write):
    """Call write(temporary path), then rename it to `path`: a file of that name is complete at every moment."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    os.replace(aside, path)
