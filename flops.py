"""Compute accounting, in the paper's way and as it is.

    python flops.py                                                   # the paper's tables, ours beside the paper's
    python flops.py --executed --model vit_h --teacher vit_l          # what a step really does
    python flops.py --match --teacher-steps 80000 --steps 160000      # EMA steps that cost what a SALT run costs
    python flops.py --hours --model vit_l --dollars-per-hour 3        # times steps here: GPU-hours of whole runs

The paper counts 6 FLOPs per parameter and token trained, 2 per token inferred, two contexts of 10% of the tokens each,
and no attention (appendix F). Executed FLOPs count every matrix product of the networks, attention included, for the
masks that are really drawn; the training logs have them too. A multiply and an add are two operations. A layer's
backward pass costs twice its forward pass, except for the first linear layer of a network, which needs no gradient of
its input. Softmax, norms, GELU, RoPE (< 1%), the optimizer and the moving average are left out.

The last three take the flags of the training scripts: --model and its overrides are the student's and the EMA
baseline's, --teacher is the SALT teacher's size, or a run or file that tells it; the student's architecture without.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import cli
from masking import sample_masks
from model import CHECKPOINT_FORMAT, SIZES, Encoder, Predictor, load_checkpoint, token_grid

# ---------------------------------------------------------------------------------------------------------------------
# executed: configs are `Encoder.config` and `Predictor.config`; counts are for one clip and these numbers of tokens


def _blocks(tokens, width, depth, mlp_ratio):
    """Forward pass of transformer blocks: four D x D matrices, two of the MLP, and two products with all tokens."""
    hidden = round(width * mlp_ratio)
    return depth * (2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width)


def encoder_flops(config, tokens, train):
    """One clip through the encoder with `tokens` of its tokens; `train` adds the backward pass."""
    embed = 2 * tokens * 3 * config["tubelet_size"] * config["patch_size"] ** 2 * config["width"]
    blocks = _blocks(tokens, config["width"], config["depth"], config["mlp_ratio"])
    return 2 * embed + 3 * blocks if train else embed + blocks


def predictor_flops(config, context, targets, train):
    """One clip through the predictor; `train` adds the backward pass."""
    embed = 2 * context * config["in_width"] * config["width"]
    proj = 2 * targets * config["width"] * config["out_width"]
    blocks = _blocks(context + targets, config["width"], config["depth"], 4.0)
    return (3 if train else 1) * (embed + blocks + proj)


def step_flops(encoder, predictor, masks, teacher=None, tokens=0):
    """One clip of a training step. masks: [(context, targets), ...] counts; teacher: config, sees all `tokens`."""
    total = encoder_flops(teacher, tokens, train=False) if teacher else 0
    for context, targets in masks:
        total += encoder_flops(encoder, context, train=True) + predictor_flops(predictor, context, targets, train=True)
    return total


def counted_flops(encoder, predictor, masks, teacher=None):
    """`step_flops`, but run on the meta device under torch's FLOP counter: slow, and true by construction."""
    with torch.device("meta"):
        size = encoder["resolution"]
        clip = torch.empty(1, 3, encoder["num_frames"], size, size)
        networks = Encoder(**encoder), Predictor(**predictor), Encoder(**teacher) if teacher else None
        ids = [[torch.empty(1, count, dtype=torch.long) for count in mask] for mask in masks]
    student, predict, teacher = networks
    with FlopCounterMode(display=False) as counter:
        if teacher:
            with torch.no_grad():
                teacher(clip)
        for context, targets in ids:
            predict(student(clip, context), context, targets, student.grid(clip)).sum().backward()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# the paper's convention, and its tables

PAPER_BATCH = 3072  # table 5


def paper_flops(tokens, encoder, predictor, teacher=0, num_masks=2):
    """Of a training run. tokens: of all its clips, masked or not; encoder, predictor, teacher: their parameters."""
    return 6 * encoder * (num_masks * 0.1 * tokens) + 2 * teacher * tokens + 6 * predictor * (num_masks * tokens)


def parameters(cls, config):
    """How many cls(**config) has."""
    with torch.device("meta"):
        return sum(p.numel() for p in cls(**config).parameters())


def paper_flops_of(encoder, predictor, teacher, tokens):
    """`paper_flops` of configs. Stage 1's pixel decoder is charged as stage 2's predictor, as in the paper."""
    predictor = predictor if teacher else predictor | {"out_width": encoder["width"]}
    sizes = (
        parameters(Encoder, encoder),
        parameters(Predictor, predictor),
        parameters(Encoder, teacher) if teacher else 0,
    )
    return paper_flops(tokens, *sizes, num_masks=predictor["num_mask_tokens"])


def paper_run(size, steps, teacher=None, resolution=224):
    """FLOPs of one stage at the paper's batch: of a V-Pixel teacher without `teacher`, else of its student."""
    tokens = math.prod(token_grid((16, resolution, resolution), 2, 16)) * PAPER_BATCH * steps
    predictor = dict(in_width=SIZES[size]["width"], out_width=SIZES[teacher or size]["width"], num_mask_tokens=2)
    return paper_flops_of(SIZES[size], predictor, SIZES[teacher] if teacher else None, tokens)


def paper_rows():
    """(table, run, FLOPs by our count, FLOPs as printed, a note where they differ) of the paper's compute tables."""
    names = {"vit_l": "L", "vit_h": "H", "vit_g": "g", "vit_G": "G"}

    def salt(size):
        return paper_run("vit_l", 80_000) + paper_run(size, 160_000, "vit_l")

    def ema(size, resolution, steps=240_000):
        return paper_run(size, steps, size, resolution)

    # 1.35M clips x 1200 epochs, 8 x 16 x 16 tokens of 2x14x14, a tenth to the encoder, a twentieth to the decoder
    tokens = 1.35e6 * 1200 * 2048
    rows = [("1, 10", "VideoMAEv2-g", 6 * 1.1e9 * 0.1 * tokens + 6 * 0.012e9 * 0.05 * tokens, 2.2, "")]
    for size, printed in (("vit_l", 1.9), ("vit_h", 3.5), ("vit_g", 5.3)):
        rows.append(("1, 10, 11", f"V-JEPA 2 {names[size]}, 240k steps at 256", ema(size, 256), printed, ""))
    for size, printed in (("vit_l", 1.4), ("vit_h", 2.6)):
        rows.append(("1", f"V-JEPA 2 {names[size]}, 240k steps at 224", ema(size, 224), printed, ""))
    for size, printed in (("vit_l", 1.2), ("vit_h", 1.5), ("vit_g", 1.9), ("vit_G", 2.6)):
        rows.append(("1, 10, 11", f"SALT {names[size]}, 80k + 160k steps", salt(size), printed, ""))
    rows.append(
        ("10", "SALT g, 80k + 160k steps", salt("vit_g"), 1.8, "misprint: tables 1 and 11 have 1.9 for this run")
    )
    rows.append(("11", "SALT stage 1 L, 80k steps", paper_run("vit_l", 80_000), 0.24, ""))
    for steps, printed, note in ((20, 0.061, ""), (40, 0.121, ""), (80, 0.241, "twice 0.121 is 0.242")):
        rows.append(("16", f"teacher L, {steps}k steps", paper_run("vit_l", steps * 1000), printed, note))
    for steps, printed in ((40, 0.238), (80, 0.476), (100, 0.595), (120, 0.714), (140, 0.833), (160, 0.951),
                           (200, 1.190), (220, 1.309)):  # fmt: skip
        rows.append(("16", f"student L, {steps}k steps", paper_run("vit_l", steps * 1000, "vit_l"), printed, ""))
    second = paper_run("vit_l", 80_000, "vit_l")
    for steps, printed in ((80, 0.717), (40, 0.597)):
        both = paper_run("vit_l", steps * 1000) + second
        rows.append(("16", f"two-step teacher L, {steps}k + 80k steps", both, printed, ""))
    for steps, printed, note in (
        (240, 1.9, "the run at 256 of table 1, rounded; at the ablation's 224: 1.43"),
        (160, 1.26, "two thirds of a rounded 1.89 (or 1.9, truncated); at 224: 0.95"),
        (120, 0.951, "half of a rounded 1.9, or the figure of 160k steps at 224; at 224: 0.72"),
    ):
        rows.append(("16", f"V-JEPA 2 L, {steps}k steps, as if at 256", ema("vit_l", 256, steps * 1000), printed, note))
    return [(table, run, ours, printed * 1e21, note) for table, run, ours, printed, note in rows]


def agrees(ours, printed):
    """Within 1%, or equal when rounded to the printed digits (the paper prints 1.2 where 1.194 is meant)."""
    digits = len(f"{printed / 1e21:g}".partition(".")[2])
    return abs(ours / printed - 1) <= 0.01 or round(ours / 1e21, digits) == round(printed / 1e21, digits)


def print_paper_tables():
    print("FLOPs in units of 1e21; 'ours' is 6 N D from parameters counted here (appendix F)\n")
    print(f"{'table':11}{'run':44}{'ours':>7}{'paper':>8}{'ratio':>8}")
    for table, run, ours, printed, note in paper_rows():
        mark = "" if agrees(ours, printed) else "!"
        line = f"{table:11}{run:44}{ours / 1e21:7.3f}{printed / 1e21:>8g}{ours / printed:8.3f} {mark:2}{note}"
        print(line.rstrip())
    print("\n! more than 1% off, and not a matter of rounding to the printed digits")


# ---------------------------------------------------------------------------------------------------------------------
# any run


def stages(own, args):
    """{kind: (encoder config, predictor config, config of what makes the targets or None, steps)} of what flags say.

    The EMA baseline has as many steps as teacher and student together (paper section 3).
    """

    student = cli.encoder_config(args)
    teacher = student
    if own.teacher in SIZES:
        teacher = student | SIZES[own.teacher]
    elif own.teacher:
        teacher = load_checkpoint(own.teacher)["model"]["encoder"]
        if any(teacher[name] != student[name] for name in ("patch_size", "tubelet_size")):
            raise ValueError(f"--teacher {own.teacher} has tubelets of another size than the student")
        teacher = teacher | {name: student[name] for name in ("num_frames", "resolution")}
    pixels = 3 * args.tubelet_size * args.patch_size**2
    t, s = teacher["width"], student["width"]
    return {
        "teacher": (teacher, cli.predictor_config(args, t, pixels), None, own.teacher_steps),
        "student": (student, cli.predictor_config(args, s, t), teacher, args.steps),
        "ema": (student, cli.predictor_config(args, s, s), student, own.teacher_steps + args.steps),
    }


def drawn_masks(args, grid, draws):
    """Context and target counts of as many micro-batches: [[(Kc, Kt), ...], ...]."""
    drawn, generator = [], torch.Generator().manual_seed(args.seed)
    for _ in range(draws):
        masks = sample_masks(args.mask, grid, args.micro_batch_size, generator, args.mask_truncation)
        drawn.append([(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks])
    return drawn


def per_clip(stage, masks, tokens):
    """Mean FLOPs of a clip: executed, over drawn masks, and by the paper's convention."""
    encoder, predictor, teacher, _ = stage
    executed = sum(step_flops(encoder, predictor, counts, teacher, tokens) for counts in masks) / len(masks)
    return executed, paper_flops_of(encoder, predictor, teacher, tokens)


def print_executed(own, args, grid):
    plan, masks, tokens = stages(own, args), drawn_masks(args, grid, own.draws), math.prod(grid)
    for i, counts in enumerate(zip(*masks, strict=True)):
        context, targets = (sum(c) / len(c) / tokens for c in zip(*counts, strict=True))
        print(f"{args.mask} mask {i + 1}: context {context:.1%}, targets {targets:.1%} of {tokens} tokens")
    print(f"means of {own.draws} draws for micro-batches of {args.micro_batch_size} clips (counter: of the first "
          f"{own.counted}, against the formula for the same)\n")  # fmt: skip
    print("                    GFLOPs of a clip, executed        formula /   GFLOPs of a clip,    executed FLOPs")
    print(f"{'':9}{'encoder':>10}{'predictor':>10}{'targets':>10}{'sum':>10}{'counter':>11}{'paper convention':>18}"
          f"{f'step of {args.batch_size}':>16}{'run':>10}")  # fmt: skip
    for kind, stage in plan.items():
        encoder, predictor, teacher, steps = stage
        executed, paper = per_clip(stage, masks, tokens)
        made = encoder_flops(teacher, tokens, train=False) if teacher else 0
        predicted = sum(predictor_flops(predictor, *c, train=True) for counts in masks for c in counts) / len(masks)
        few = masks[: own.counted]
        counted = sum(counted_flops(encoder, predictor, counts, teacher) for counts in few)
        formula = sum(step_flops(encoder, predictor, counts, teacher, tokens) for counts in few)
        parts = [executed - made - predicted, predicted, made, executed]
        print(f"{kind:9}" + "".join(f"{x / 1e9:10.4g}" for x in parts) + f"{formula / counted:11.4f}{paper / 1e9:18.4g}"
              f"{executed * args.batch_size:16.3g}{executed * args.batch_size * steps:10.3g}")  # fmt: skip


def print_match(own, args, grid):
    plan, masks = stages(own, args), drawn_masks(args, grid, own.draws)
    cost = {kind: per_clip(stage, masks, math.prod(grid)) for kind, stage in plan.items()}
    for i, way in enumerate(("executed FLOPs", "the paper's convention")):
        salt = sum(cost[kind][i] * plan[kind][3] for kind in ("teacher", "student"))
        print(f"{round(salt / cost['ema'][i])} EMA steps cost as much as {own.teacher_steps} teacher and {args.steps} "
              f"student steps by {way}: {salt * args.batch_size:.4g}")  # fmt: skip


TIMED_STEPS = 20  # as for the paper's table 11; as many run before, untimed


def print_hours(own, args, flags):
    """Run each training script for a few steps of one micro-batch, and scale its clips/s to the whole run.

    Several micro-batches a step share one optimizer update, so a whole run is a little faster than this says.
    """
    plan = stages(own, args)
    config = plan["teacher"][0]
    gpu = torch.cuda.is_available() and args.device != "cpu"
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{TIMED_STEPS} steps of {args.micro_batch_size} clips each, on one {device}")
    with tempfile.TemporaryDirectory() as folder:
        kinds = own.hours or plan
        if "student" in kinds:
            untrained = Encoder(**config).state_dict()
            torch.save({"format": CHECKPOINT_FORMAT, "kind": "teacher", "step": 0, "model": {"encoder": config},
                        "encoder": untrained, "args": {}}, f"{folder}/untrained.pt")  # fmt: skip
        size = next(name for name, size in SIZES.items() if size["mlp_ratio"] == config["mlp_ratio"])
        special = {
            "teacher": ["--model", size] + [f"--{name}={config[name]}" for name in ("width", "depth", "heads")],
            "student": ["--teacher", f"{folder}/untrained.pt"],
            "ema": [],
        }
        hours = {}
        for kind in kinds:
            script = "train_ema_baseline.py" if kind == "ema" else f"train_{kind}.py"
            out, steps = f"{folder}/{kind}", plan[kind][3]
            timing = [
                f"--steps={2 * TIMED_STEPS}", "--warmup-steps=1", f"--log-every={TIMED_STEPS}", f"--out={out}",
                f"--batch-size={args.micro_batch_size}", f"--micro-batch-size={args.micro_batch_size}",
            ]  # fmt: skip
            command = [sys.executable, Path(__file__).with_name(script), *flags, *special[kind], *timing]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{script} failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
            line = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
            hours[kind] = steps * args.batch_size / line["clips_per_s"] / 3600
            print(f"{kind:8} {line['clips_per_s']:9.3g} clips/s {line['tflops']:8.3g} TFLOP/s, waiting for data "
                  f"{line['data_wait']:.0%}: {steps} steps of {args.batch_size} {bill(hours[kind], own)}")  # fmt: skip
    if {"teacher", "student"} <= hours.keys():
        print(f"SALT, teacher and student: {bill(hours['teacher'] + hours['student'], own)}")


def bill(hours, own):
    """Hours of one device, and money if its price is known."""
    money = f" = {hours * own.dollars_per_hour:,.2f} dollars" if own.dollars_per_hour else ""
    return f"{hours:,.4g} device hours{money}"


def main():

    parser = cli.Parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--executed", action="store_true", help="FLOPs really done, per clip, step and run")
    what.add_argument("--match", action="store_true", help="EMA steps whose FLOPs equal those of a SALT run")
    what.add_argument("--hours", nargs="*", choices=("teacher", "student", "ema"), help="time these here; all without")
    flag = parser.add_argument_group("which runs (the training scripts' flags apply too, see theirs)").add_argument
    flag("--teacher", metavar="SIZE|RUN|FILE", help="of the SALT student; its own architecture without")
    flag("--teacher-steps", type=int, default=80_000, help="(--steps are the student's)")
    flag("--draws", type=int, default=500, help="of masks, to average over")
    flag("--counted", type=int, default=5, help="draws that torch's FLOP counter verifies")
    flag("--dollars-per-hour", type=float, help="of one device")
    own, flags = parser.parse_known_args()
    args = cli.training_flags(__doc__, out="out", steps=160_000).parse_args(flags)
    cli.require_at_least(own, 1, "draws", "counted", "teacher_steps")
    cli.require_at_least(args, 1, "steps", "batch_size")
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(args.batch_size)
    cli.require_at_least(args, 1, "micro_batch_size")
    try:
        grid = cli.clip_grid(args)
        if own.executed:
            print_executed(own, args, grid)
        elif own.match:
            print_match(own, args, grid)
        elif own.hours is not None:
            print_hours(own, args, flags)
        elif len(sys.argv) > 1:
            raise ValueError("without --executed, --match or --hours the paper's tables are printed: no other flags")
        else:
            print_paper_tables()
    except (OSError, ValueError) as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
