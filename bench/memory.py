"""Per-GPU memory of a training run: estimated by a formula, and measured.

    python -m bench.memory --kind student --model vit_g --teacher vit_l --processes 128    # estimate; allocates nothing
    python -m bench.memory --kind ema --model vit_l --processes 8 --micro-batch-size 12
    python -m bench.memory --check --kind teacher --model vit_s --resolution 112 --batch-size 8 --micro-batch-size 4
    torchrun --nproc_per_node=2 -m bench.memory --check --kind teacher --model vit_s --resolution 112 --batch-size 8

The estimate adds up weights, gradients, optimizer state, what autograd saves in each block (model.py), and the
temporaries at those moments of a step that can be its peak. It assumes a GPU and bfloat16 unless --device and --dtype
say otherwise, and eager mode: torch.compile saves less. Not included: the CUDA context, NCCL's buffers, workspaces of
kernels, fragmentation.

--check runs the training script for a few steps here, prints the estimate divided by the peak of torch's allocator, and
exits with status 1 if they differ by more than 15%.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import cli
import data
import flops
import train_ema_baseline
import train_student
import train_teacher
from model import CHECKPOINT_FORMAT, Encoder, Predictor

GIB = 2**30
TOLERANCE = 0.15  # of --check
CHECKED_STEPS = 3
SCRIPTS = {"teacher": train_teacher, "student": train_student, "ema": train_ema_baseline}

# ---------------------------------------------------------------------------------------------------------------------
# estimate


def _bytes_per_value(args):
    """Bytes per value of --dtype, and per value in a layer norm, which autocast computes in float32 on a GPU."""
    size = 2 if args.dtype == "bfloat16" else 4
    return size, 4 if args.device == "cuda" else size


def _hidden_width(config):
    """Hidden width of a block's MLP; Predictor's configs leave mlp_ratio at its default."""
    return round(config["width"] * config.get("mlp_ratio", 4.0))


def is_sharded(args):
    """Whether FSDP shards the trained networks."""
    return args.processes > 1 and args.parallel != "replicate"


def micro_batches(args):
    """Micro-batches per step and process."""
    return args.batch_size // args.processes // args.micro_batch_size


def block_bytes(config, args):
    """Bytes per token of a block: (saved for its backward pass, allocated by the first operations of that pass)."""
    size, norm_size = _bytes_per_value(args)
    width, hidden = config["width"], _hidden_width(config)
    norms = 2 * norm_size * width  # their inputs
    attention = 6 * size * width  # q, k, v; q and k after RoPE; the output, which is the input of `proj`
    if args.device == "cpu" and args.dtype == "bfloat16":
        attention = (4 * 4 + size) * width  # q, k, v and the output in float32; the output in bfloat16
    linears = 2 * size * width  # inputs of `qkv` and `fc1`
    mlp = 2 * size * hidden  # inputs of GELU and `fc2`
    statistics = 4 * (config["heads"] + 4)  # logsumexp per head; mean and standard deviation of both norms
    return norms + attention + linears + mlp + statistics, size * (width + hidden)


def activation_bytes(args, stage, context, targets, checkpointing, gathered):
    """Peak bytes of the activations in the forward and backward pass of one mask, with the gathered weights.

    context, targets: tokens per clip. gathered: bytes of the whole weights in --dtype, gathered by FSDP or cast by
    autocast. With checkpointing, autocast frees them after the forward pass and casts them again block by block.
    """
    encoder, predictor, _, _ = stage
    size, norm_size = _bytes_per_value(args)
    context, targets = context * args.micro_batch_size, targets * args.micro_batch_size
    encoder_block, encoder_backward = block_bytes(encoder, args)
    predictor_block, predictor_backward = block_bytes(predictor, args)

    saved_per_block = size * encoder["width"] if checkpointing else encoder_block
    tubelet = 3 * encoder["tubelet_size"] * encoder["patch_size"] ** 2 * size
    rope = 2 * 4 * encoder["width"] // encoder["heads"]
    last = (2 * norm_size + size) * encoder["width"]  # input and output of the final norm, input of the predictor
    in_encoder = context * (tubelet + rope + encoder["depth"] * saved_per_block + last)

    saved_per_block = size * predictor["width"] if checkpointing else predictor_block
    rope = 2 * 4 * predictor["width"] // predictor["heads"]
    in_predictor = (context + targets) * (rope + predictor["depth"] * saved_per_block)
    in_predictor += targets * (norm_size + size) * predictor["width"]  # input and output of the final norm

    values = targets * predictor["out_width"]
    in_loss = values * (size + 4)  # predictions and float32 targets
    gathered_in_backward = gathered if is_sharded(args) or not checkpointing else 0
    saved = in_encoder + in_predictor + in_loss
    moments = [
        saved + gathered + 8 * values,  # loss: the difference and its absolute value
        saved + gathered_in_backward + 16 * values,  # its backward pass: the difference and three gradients
    ]
    predictor_start = (context + targets) * predictor_backward
    if checkpointing:
        predictor_start += (context + targets) * predictor_block
        encoder_start = context * (encoder_block + encoder_backward)
        moments.append(in_encoder + in_loss + gathered_in_backward + encoder_start)
    moments.append(saved + gathered_in_backward + predictor_start)
    return max(moments)


def inference_bytes(encoder, args):
    """Peak bytes per token of a forward pass without gradients."""
    size, _ = _bytes_per_value(args)
    width, hidden = encoder["width"], _hidden_width(encoder)
    attention = 5 * size * width + 3 * 4 * width  # residual, norm, q, k, v; RoPE of q in float32
    return max(attention, 2 * size * (width + hidden))  # or in the MLP: residual, norm, input and output of GELU


def estimate(args, stage, masks, checkpointing):
    """Bytes of one process for one of `flops.stages`: {part: bytes}. masks: [(context, targets), ...] tokens per clip.

    gathered: the whole weights in --dtype. activations: the most of any mask. step and update: the peak of the forward
    and backward passes, and of the optimizer's update, with everything that is allocated then. Gradients appear while
    the first mask's activations are freed, so `step` can be less than the sum of the parts.
    """
    encoder, predictor, teacher, _ = stage
    size, _ = _bytes_per_value(args)
    weights = flops.parameters(Encoder, encoder) + flops.parameters(Predictor, predictor)
    sharded = is_sharded(args)
    shards = 1
    if sharded:
        shards = args.processes_per_node if args.parallel == "hybrid" else args.processes
    gathered = size * weights if sharded or args.dtype == "bfloat16" else 0
    # Until the last micro-batch, FSDP keeps the gradients of the whole network in every process.
    accumulated = 4 * weights if micro_batches(args) > 1 else 4 * weights / shards
    parts = {"weights": 4 * weights / shards, "gradients": accumulated, "optimizer": 8 * weights / shards, "teacher": 0}
    if teacher:
        frozen = args.kind == "student"  # in --dtype, and whole without --shard-teacher
        teacher_shards = 1 if frozen and not args.shard_teacher else shards
        parts["teacher"] = (size if frozen else 4) * flops.parameters(Encoder, teacher) / teacher_shards

    clips = 4 * 3 * args.micro_batch_size * args.num_frames * args.resolution**2
    ids = 8 * args.micro_batch_size * sum(map(sum, masks))
    tokens = args.micro_batch_size * math.prod(cli.clip_grid(args))
    targets = 4 * tokens * predictor["out_width"]
    # Pixel targets: the pixels, minus their mean, over their standard deviation.
    computing_targets = tokens * inference_bytes(teacher, args) if teacher else 3 * targets
    parts["inputs"] = clips + ids + targets
    activations = [activation_bytes(args, stage, *mask, checkpointing, gathered) for mask in masks]
    parts["gathered"], parts["activations"] = gathered, max(activations) - gathered

    persistent = parts["weights"] + parts["optimizer"] + parts["teacher"] + parts["inputs"]
    # No gradients exist before the first backward pass of a step; later micro-batches start with all of them.
    first = accumulated if micro_batches(args) > 1 else 0
    moments = [first + computing_targets - targets, first + activations[0]]
    moments += [accumulated + later for later in activations[1:]]
    parts["step"] = persistent + max(moments)
    parts["update"] = persistent + 4 * weights / shards
    if args.processes > 1 and args.parallel == "replicate":
        parts["update"] += 4 * weights  # one tensor with all gradients, to average them
    return parts


def peak(parts):
    """Peak bytes of a step."""
    return max(parts["step"], parts["update"])


def largest(args, stage, drawn):
    """The masks of the micro-batch that needs the most memory. drawn: the masks of several micro-batches."""
    return max(drawn, key=lambda masks: max(activation_bytes(args, stage, *mask, False, 0) for mask in masks))


def print_estimate(args, stage, masks):
    """Print a table of the parts, without and with --activation-checkpointing."""
    columns = [estimate(args, stage, masks, checkpointing) for checkpointing in (False, True)]
    rows = {
        "weights": "weights (float32)",
        "gradients": "gradients (float32)",
        "optimizer": "AdamW's two averages (float32)",
        "teacher": "EMA teacher (float32)" if args.kind == "ema" else f"frozen teacher ({args.dtype})",
        "inputs": "clips, token ids and targets",
        "gathered": f"whole weights ({args.dtype})",
        "activations": "activations of one mask",
        "step": "peak of the forward and backward passes",
        "update": "peak of the update",
    }
    tokens = ", ".join(f"{context} + {targets}" for context, targets in masks)
    print(
        f"{args.processes} process(es) x {micro_batches(args)} micro-batch(es) x {args.micro_batch_size} clips, "
        f"{args.dtype} on {args.device}, without torch.compile; masks of {tokens} tokens\n"
    )
    print(f"{f'GiB per process, {args.kind}':40}{'':14}{'checkpointing':>14}")
    for part, label in rows.items():
        if columns[0][part]:
            print(f"{label:40}" + "".join(f"{column[part] / GIB:14.3f}" for column in columns))
    print(f"{'needed':40}" + "".join(f"{peak(column) / GIB:14.3f}" for column in columns))


# ---------------------------------------------------------------------------------------------------------------------
# measurement


def cpu_peak(run):
    """Call run() and return the peak bytes of torch's CPU allocator, which the profiler records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"]
    reports = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    reports = [event["args"] for event in sorted(reports, key=lambda event: event["ts"])]
    start = reports[0]["Total Allocated"] - reports[0]["Bytes"]
    return max(report["Total Allocated"] for report in reports) - start


def training_command(args, stage, folder):
    """The command line of the training script, on built-in videos; saves a random teacher if it needs one."""
    names = "model width depth heads patch_size tubelet_size num_frames resolution predictor_width predictor_depth"
    names += " predictor_heads mask mask_truncation masks_per_clip target_fraction batch_size micro_batch_size seed"
    names += " device dtype"
    flags = {name: getattr(args, name) for name in names.split() if getattr(args, name) is not None}
    flags |= {"steps": CHECKED_STEPS, "warmup_steps": 1, "log_every": 1, "out": folder / "out"}
    flags["workers"] = 1  # clips made in this process would count as its memory
    if args.kind == "student":
        flags["teacher"] = folder / f"teacher-{cli.rank_and_world()[0]}.pt"
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "kind": "teacher",
            "step": 0,
            "model": {"encoder": stage[2]},
            "encoder": Encoder(**stage[2]).state_dict(),
            "args": {},
        }
        torch.save(checkpoint, flags["teacher"])
    switches = {
        "--no-compile": True,
        "--activation-checkpointing": args.activation_checkpointing,
        "--shard-teacher": args.shard_teacher,
        "--replicate": args.parallel == "replicate",
        "--hybrid": args.parallel == "hybrid",
    }
    command = [SCRIPTS[args.kind].__file__, *(flag for flag, given in switches.items() if given)]
    return command + [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def measure(args, stage):
    """Peak bytes of this process while the training script runs CHECKED_STEPS steps."""
    rank, world = cli.rank_and_world()
    # The same folder for all processes of a run, which have the same parent.
    folder = Path(tempfile.gettempdir(), f"salt-memory-{os.getppid() if world > 1 else os.getpid()}")
    folder.mkdir(exist_ok=True)
    try:
        with mock.patch.object(sys, "argv", training_command(args, stage, folder)):
            if args.device == "cpu":
                return cpu_peak(SCRIPTS[args.kind].main)
            SCRIPTS[args.kind].main()
            return torch.cuda.max_memory_allocated()
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def check(args, stage):
    """Print the estimate and the measured peak; return whether they agree."""
    rank, world = cli.rank_and_world()
    args.batch_size = min(args.batch_size, 2 * world * args.micro_batch_size)  # more micro-batches need no more memory
    measured = measure(args, stage)  # before any mask is drawn: the script picks this process's GPU
    args.stage = 1 if args.kind == "teacher" else 2  # as in the script: it selects the random streams
    drawn = []
    for step in range(CHECKED_STEPS):
        for g in data.micro_batch_indices(args):
            masks = train_student.draw_masks(args, step, g)
            drawn.append([(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks])
    estimated = peak(estimate(args, stage, largest(args, stage, drawn), args.activation_checkpointing))
    ratio = estimated / measured
    print(
        f"process {rank} of {world}, {args.kind}, {args.dtype}, checkpointing {args.activation_checkpointing}: "
        f"estimated {estimated / GIB:.4f} GiB, measured {measured / GIB:.4f} GiB, ratio {ratio:.3f}"
    )
    return abs(ratio - 1) <= TOLERANCE


def parse_flags():
    """Parse the flags, check those that need no network, and fill in the defaults."""
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    flag = parser.add_argument_group("memory").add_argument
    flag("--kind", choices=SCRIPTS, default="student", help="which training script")
    flag("--teacher", metavar="SIZE|RUN|FILE", help="the student's teacher; default: the student's architecture")
    flag("--shard-teacher", action="store_true", help="shard the student's teacher too")
    flag("--processes", type=int, default=1, help="GPUs of the run")
    flag("--processes-per-node", type=int, default=8, help="GPUs of a node, for --hybrid")
    flag("--draws", type=int, default=100, help="micro-batches to draw masks for; the largest masks count")
    flag("--check", action="store_true", help="run the script here (with torchrun: on several processes) and compare")
    parser.set_defaults(teacher_steps=0)  # flops.stages also counts steps
    args = parser.parse_args()
    cli.require_at_least(args, 1, "processes", "processes_per_node", "draws", "batch_size")
    if args.check and args.processes > 1:
        cli.fail("--check runs on the processes that torchrun starts; --processes is only for estimates")
    if args.check:
        cli.resolve_device(args)
        args.processes = cli.rank_and_world()[1]
        args.processes_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.device = args.device or "cuda"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    clips = args.batch_size // args.processes
    if args.batch_size % args.processes:
        cli.fail(f"--batch-size {args.batch_size} is not divisible by {args.processes} processes")
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(clips)
    if args.micro_batch_size < 1 or clips % args.micro_batch_size:
        cli.fail(f"--micro-batch-size {args.micro_batch_size} does not divide {clips} clips per process")
    cli.check_mask_flags(args)
    if args.kind != "student" and (args.teacher or args.shard_teacher):
        cli.fail(f"--kind {args.kind} takes no --teacher and no --shard-teacher: it has no frozen teacher")
    if args.parallel == "hybrid" and args.processes % args.processes_per_node:
        cli.fail(f"--hybrid: {args.processes} processes do not fill nodes of {args.processes_per_node}")
    return args


def main():
    args = parse_flags()
    try:
        grid = cli.clip_grid(args)
        stage = flops.stages(args)[args.kind]
        if args.check:
            sys.exit(0 if check(args, stage) else 1)
        print_estimate(args, stage, largest(args, stage, flops.drawn_masks(args, grid, args.draws)))
    except (OSError, ValueError) as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
