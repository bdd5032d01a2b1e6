"""What all command lines share: flags, one-line errors, progress, and files that are never incomplete."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import tqdm

import masking
from model import PREDICTORS, SIZES, Encoder, Predictor, token_grid


def fail(message, agreed=False):
    """End the process with a one-line error that says what is wrong and what to do; exit status 2.

    Of several processes, local rank 0 prints before the process group exists. Later, the one that fails does, or rank 0
    if all have `agreed` to fail.
    """
    rank = os.environ.get("RANK" if agreed else "LOCAL_RANK", "0")
    if rank == "0" or (dist.is_initialized() and not agreed):
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# flags


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a docstring, and appends each flag's default unless it is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def training_flags(description, out, steps):
    """A parser with the flags of the training scripts. Defaults are the paper's (tables 3, 4 and 5)."""
    parser = Parser(description)
    flag = parser.add_argument_group("model").add_argument
    flag("--model", choices=SIZES, default="vit_l", help="encoder size (paper table 3)")
    flag("--width", type=int, help="override the width of --model")
    flag("--depth", type=int, help="override its number of blocks")
    flag("--heads", type=int, help="override its number of attention heads")
    flag("--patch-size", type=int, default=16, help="pixels")
    flag("--tubelet-size", type=int, default=2, help="frames per token")
    flag("--num-frames", type=int, default=16, help="frames per clip (table 5)")
    flag("--resolution", type=int, default=224, help="height and width of a clip in pixels (table 5)")
    flag("--predictor-width", type=int, help="default: 384 (table 4); vit_ti: 192")
    flag("--predictor-depth", type=int, help="default: 12 (table 4); vit_ti: 4, vit_s: 6")
    flag("--predictor-heads", type=int, help="default: 16 (table 4); vit_ti: 3, vit_s: 6")

    flag = parser.add_argument_group("data").add_argument
    flag("--data", nargs="+", metavar="MANIFEST", help="text files of 'path label' lines; default: built-in videos")
    flag("--data-weights", nargs="+", type=float, metavar="WEIGHT", help="sampling weight of each manifest")
    flag("--frame-step", type=int, default=4, help="video frames from one clip frame to the next (table 5)")
    flag("--fps", type=float, help="clip frames per second of video, by time stamps; replaces --frame-step")
    flag("--max-bad", type=float, default=0.05, help="end the run if more than this fraction of videos is unreadable")
    flag("--workers", type=int, help="loader processes per training process; default: 1 per core, up to 16, on "
         "a GPU; 1 on the CPU")  # fmt: skip
    flag("--mask", choices=masking.STRATEGIES, default="multiblock", help="masking strategy (section 5.2)")
    flag("--mask-truncation", choices=("random", "raster"), default="random", help="which tokens to drop so "
         "that all clips keep equally many; raster is V-JEPA's, for comparison: slower to compile")  # fmt: skip
    flag("--masks-per-clip", type=int, default=1, help="masks of each type per clip and teacher pass")
    flag("--target-fraction", type=float, default=1.0, help="fraction of the targets to predict, chosen at random")

    flag = parser.add_argument_group("optimization").add_argument
    flag("--steps", type=int, default=steps, help="optimizer steps of the whole run")
    flag("--batch-size", type=int, default=3072, help="clips per step, over all processes (table 5)")
    flag("--micro-batch-size", type=int, help="clips per process and forward pass; default: the largest divisor <= 24")
    flag("--lr", type=float, help="after warm-up; default: 6.25e-4 * sqrt(batch size / 3072), from table 5")
    flag("--start-lr", type=float, help="learning rate at step 0; default 0.32 times --lr (table 5: 2e-4)")
    flag("--final-lr", type=float, default=1e-6, help="learning rate at the last step (table 5)")
    flag("--warmup-steps", type=int, help="default: 10,000 (table 5), or a tenth of a run of less than 20,000 steps")
    flag("--weight-decay", type=float, default=0.04, help="weight decay at step 0 (table 5)")
    flag("--final-weight-decay", type=float, default=0.4, help="weight decay at the last step (table 5)")
    flag("--clip-grad", type=float, default=0.02, help="maximum global gradient norm (table 5)")
    flag("--seed", type=int, default=0, help="of initial weights, sample order, crops and masks")

    flag = parser.add_argument_group("hardware").add_argument
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; default: bfloat16 on a GPU")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks; default: only on a GPU")
    flag("--activation-checkpointing", action="store_true", help="recompute activations: less memory, 1/3 more FLOPs")
    flag("--hybrid", action="store_true", help="shard within a node only; default: over all processes (FSDP2)")
    flag("--replicate", action="store_true", help="keep all weights in every process")

    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=Path, default=Path(out), help="run folder; the run in it, if any, is continued")
    flag("--save-minutes", type=float, default=30, help="minutes between saves; 0: save after every step")
    flag("--snapshot-every", type=int, default=0, help="steps between checkpoint-STEP.pt files that are kept; 0: none")
    flag("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    flag("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    flag("--fresh", action="store_true", help="start over; move the run that is in --out aside")
    return parser


def require_at_least(args, minimum, *names):
    """End the script if one of these flags is below the minimum."""
    for name in names:
        if getattr(args, name) < minimum:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {minimum}")


def check_mask_flags(args):
    """End the script if the masking flags do not fit together or the token grid is too small for the masks."""
    require_at_least(args, 1, "masks_per_clip")
    if not 0 < args.target_fraction <= 1:
        fail(f"--target-fraction {args.target_fraction}: must be more than 0 and at most 1")
    if args.target_fraction < 1 and args.mask_truncation == "raster":
        fail("--target-fraction chooses targets at random, which --mask-truncation raster does not")
    try:
        masking.sample_masks(args.mask, clip_grid(args), 1, torch.Generator(), args.mask_truncation)
    except ValueError as error:
        fail(f"--mask {args.mask}: {error}")


def resolve_device(args):
    """Fill in --device and --dtype, in place, where the user left them to the machine."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU on this machine")
    if args.dtype is None:
        # A V100 or T4 only emulates bfloat16, and its attention then materializes all scores.
        fast = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if fast else "float32"
        if args.device == "cuda" and not fast and rank_and_world()[0] == 0:
            print(f"{torch.cuda.get_device_name()} has no bfloat16: using float32 (--dtype bfloat16 emulates it)")


def rank_and_world():
    """This process's rank and the number of processes."""
    return launched("RANK", 0), launched("WORLD_SIZE", 1)


def launched(name, default):
    """An integer that torchrun sets in the environment; `default` without it. Ends the script if only some are set."""
    found = [x for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if os.environ.get(x)]
    if 0 < len(found) < 4:
        print(f"only {', '.join(found)} is set: start with torchrun, or unset {', '.join(found)}", file=sys.stderr)
        sys.exit(2)
    return int(os.environ[name]) if found else default


def default_micro_batch_size(clips):
    """The largest divisor of `clips`, a process's part of a batch, up to V-JEPA 2's 24 clips per GPU."""
    return next(n for n in range(min(24, clips), 0, -1) if clips % n == 0)


def clip_grid(args):
    """The token grid (time, rows, columns) of the clips that the flags describe; ValueError if it does not divide."""
    return token_grid((args.num_frames, args.resolution, args.resolution), args.tubelet_size, args.patch_size)


def encoder_config(args):
    """Keyword arguments of `Encoder`: --model and its overrides. Ends the script if the numbers do not fit together."""
    names = ("width", "depth", "heads", "num_frames", "resolution", "patch_size", "tubelet_size")
    config = SIZES[args.model] | {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        clip_grid(args)
        with torch.device("meta"):
            Encoder(**config)
    except ValueError as error:
        fail(str(error))
    return config


def predictor_config(args, in_width, out_width, model=None):
    """Keyword arguments of `Predictor`, likewise; the defaults are those of `model` (default: --model)."""
    flags = {name: getattr(args, f"predictor_{name}") for name in ("width", "depth", "heads")}
    config = PREDICTORS[model or args.model] | {name: n for name, n in flags.items() if n is not None}
    config |= dict(in_width=in_width, out_width=out_width, num_mask_tokens=masking.STRATEGIES[args.mask].num_masks)
    try:
        with torch.device("meta"):
            Predictor(**config)
    except ValueError as error:
        fail(f"predictor: {error}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# results


def progress(iterable=None, silent=False, **options):
    """A tqdm progress bar, shown by the first process; in a log file, updated every ten seconds."""
    interval, silent = 0.2 if sys.stdout.isatty() else 10, silent or rank_and_world()[0] > 0
    return tqdm.tqdm(iterable, file=sys.stdout, mininterval=interval, disable=silent, **options)


def duration(seconds):
    """Format seconds as 1h02m, 3m20s or 12s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def interval95(correct, total):
    """95% confidence interval of a proportion, in percent (Wilson score): [low, high]."""
    z, p = 1.96, correct / total
    center, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return [100 * x / (1 + z * z / total) for x in (center - half, center + half)]


def write_lines(path, lines):
    """Write a text file, and its folder if needed. Ends the script if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def write_atomically(path, write):
    """Call write(temporary path), then rename the file to `path`, so that `path` is never incomplete."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def plain_flags(args):
    """The flags as values that JSON and `torch.load(weights_only=True)` can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
