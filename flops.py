"""Compute accounting: the paper's convention, and the FLOPs actually executed.

    python flops.py                                                   # the paper's tables: our count beside the paper's
    python flops.py --executed --model vit_h --teacher vit_l          # the FLOPs of a training step
    python flops.py --match --teacher-steps 80000 --steps 160000      # EMA steps that cost as much as a SALT run

The paper counts 6 FLOPs per parameter and trained token, 2 per parameter and inferred token, a context of 10% of the
tokens for each of two masks, and no attention (appendix F). Executed FLOPs count all matrix products of the networks,
including attention, for the masks actually drawn. The training logs report these. A multiply-add is two FLOPs. The
backward pass of a layer costs twice its forward pass, except for the first linear layer of a network, which needs no
gradient of its input. Softmax, norms, GELU, RoPE, the optimizer and the EMA are left out: less than 1% together.

--executed and --match take the model and batch flags of the training scripts. They describe the student and the EMA
baseline. --teacher is the SALT teacher: a size, or a run or checkpoint file whose architecture it has. By default it
has the architecture of the student.
"""

import math
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import cli
from masking import sample_masks
from model import SIZES, Encoder, Predictor, load_checkpoint, token_grid

# ---------------------------------------------------------------------------------------------------------------------
# executed FLOPs of one clip; configs are `Encoder.config` and `Predictor.config`


def _blocks(tokens, width, depth, mlp_ratio):
    """Forward pass of transformer blocks: four D x D matrices, the two of the MLP, and two attention products."""
    hidden = round(width * mlp_ratio)
    return depth * (2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width)


def encoder_flops(config, tokens, train):
    """The encoder on `tokens` tokens of a clip: forward pass, and with `train` the backward pass."""
    embed = 2 * tokens * 3 * config["tubelet_size"] * config["patch_size"] ** 2 * config["width"]
    blocks = _blocks(tokens, config["width"], config["depth"], config["mlp_ratio"])
    return 2 * embed + 3 * blocks if train else embed + blocks


def predictor_flops(config, context, targets, train):
    """The predictor on so many context and target tokens: forward pass, and with `train` the backward pass."""
    embed = 2 * context * config["in_width"] * config["width"]
    proj = 2 * targets * config["width"] * config["out_width"]
    blocks = _blocks(context + targets, config["width"], config["depth"], 4.0)
    return (3 if train else 1) * (embed + blocks + proj)


def step_flops(encoder, predictor, masks, teacher=None, tokens=0):
    """A training step, per clip. masks: [(context, targets), ...] token counts. The teacher sees all `tokens`."""
    total = encoder_flops(teacher, tokens, train=False) if teacher else 0
    for context, targets in masks:
        total += encoder_flops(encoder, context, train=True) + predictor_flops(predictor, context, targets, train=True)
    return total


def counted_flops(encoder, predictor, masks, teacher=None):
    """The same as `step_flops`, counted by torch's FLOP counter on the meta device: slow, to check the formula."""
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
    """FLOPs of a training run over `tokens` tokens, masked or not. encoder, predictor, teacher: parameter counts."""
    return 6 * encoder * (num_masks * 0.1 * tokens) + 2 * teacher * tokens + 6 * predictor * (num_masks * tokens)


def parameters(cls, config):
    """The number of parameters of cls(**config)."""
    with torch.device("meta"):
        return sum(p.numel() for p in cls(**config).parameters())


def paper_flops_of(encoder, predictor, teacher, tokens, masks_per_clip=1):
    """`paper_flops` from configs. As in the paper, the pixel decoder of stage 1 counts as a predictor of stage 2."""
    predictor = predictor if teacher else predictor | {"out_width": encoder["width"]}
    sizes = (
        parameters(Encoder, encoder),
        parameters(Predictor, predictor),
        parameters(Encoder, teacher) if teacher else 0,
    )
    return paper_flops(tokens, *sizes, num_masks=masks_per_clip * predictor["num_mask_tokens"])


def paper_run(size, steps, teacher=None, resolution=224):
    """FLOPs of one stage at the paper's batch size: a student of `teacher`, or a V-Pixel teacher if that is None."""
    tokens = math.prod(token_grid((16, resolution, resolution), 2, 16)) * PAPER_BATCH * steps
    predictor = dict(in_width=SIZES[size]["width"], out_width=SIZES[teacher or size]["width"], num_mask_tokens=2)
    return paper_flops_of(SIZES[size], predictor, SIZES[teacher] if teacher else None, tokens)


def paper_rows():
    """The paper's compute tables: [(table, run, FLOPs by our count, FLOPs as printed, note if they differ), ...]."""
    names = {"vit_l": "L", "vit_h": "H", "vit_g": "g", "vit_G": "G"}

    def salt(size):
        return paper_run("vit_l", 80_000) + paper_run(size, 160_000, "vit_l")

    def ema(size, resolution, steps=240_000):
        return paper_run(size, steps, size, resolution)

    # 1.35M clips x 1200 epochs of 8 x 16 x 16 tokens (2x14x14); the encoder sees 10% of them, the decoder 5%
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
    for steps, printed in (
        (40, 0.238),
        (80, 0.476),
        (100, 0.595),
        (120, 0.714),
        (140, 0.833),
        (160, 0.951),
        (200, 1.190),
        (220, 1.309),
    ):
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
    """Whether two counts agree within 1%, or when rounded to the printed digits (the paper prints 1.194 as 1.2)."""
    digits = len(f"{printed / 1e21:g}".partition(".")[2])
    return abs(ours / printed - 1) <= 0.01 or round(ours / 1e21, digits) == round(printed / 1e21, digits)


def print_paper_tables():
    print("FLOPs in units of 1e21; 'ours' is the formula of appendix F with our parameter counts\n")
    print(f"{'table':11}{'run':44}{'ours':>7}{'paper':>8}{'ratio':>8}")
    for table, run, ours, printed, note in paper_rows():
        mark = "" if agrees(ours, printed) else "!"
        line = f"{table:11}{run:44}{ours / 1e21:7.3f}{printed / 1e21:>8g}{ours / printed:8.3f} {mark:2}{note}"
        print(line.rstrip())
    print("\n! differs by more than 1%, and not only in rounding")


# ---------------------------------------------------------------------------------------------------------------------
# any run


def stages(args):
    """The runs that the flags describe: {kind: (encoder config, predictor config, teacher config or None, steps)}.

    The EMA baseline gets as many steps as teacher and student together (paper section 3). ValueError if --teacher has
    another token grid; OSError if it does not exist.
    """
    student = cli.encoder_config(args)
    teacher = student
    if args.teacher in SIZES:
        teacher = student | SIZES[args.teacher]
    elif args.teacher:
        teacher = load_checkpoint(args.teacher)["model"]["encoder"]
        if any(teacher[name] != student[name] for name in ("patch_size", "tubelet_size")):
            raise ValueError(f"--teacher {args.teacher} has tubelets of another size than the student")
        teacher = teacher | {name: student[name] for name in ("num_frames", "resolution")}
    pixels = 3 * args.tubelet_size * args.patch_size**2
    t, s = teacher["width"], student["width"]
    size = args.teacher if args.teacher in SIZES else None
    return {
        "teacher": (teacher, cli.predictor_config(args, t, pixels, size), None, args.teacher_steps),
        "student": (student, cli.predictor_config(args, s, t), teacher, args.steps),
        "ema": (student, cli.predictor_config(args, s, s), student, args.teacher_steps + args.steps),
    }


def drawn_masks(args, grid, draws):
    """Token counts of the masks of `draws` micro-batches: [[(Kc, Kt), ...], ...]."""
    drawn, generator = [], torch.Generator().manual_seed(args.seed)
    options = args.mask_truncation, None, args.masks_per_clip, args.target_fraction
    for _ in range(draws):
        masks = sample_masks(args.mask, grid, args.micro_batch_size, generator, *options)
        drawn.append([(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks])
    return drawn


def per_clip(stage, masks, tokens):
    """Mean FLOPs per clip: (executed, over the drawn masks; by the paper's convention)."""
    encoder, predictor, teacher, _ = stage
    executed = sum(step_flops(encoder, predictor, counts, teacher, tokens) for counts in masks) / len(masks)
    masks_per_clip = len(masks[0]) // predictor["num_mask_tokens"]
    return executed, paper_flops_of(encoder, predictor, teacher, tokens, masks_per_clip)


def print_executed(args, grid):
    """Print the executed FLOPs of a step and their parts, checked against torch's counter, and the paper's count."""
    masks, tokens = drawn_masks(args, grid, args.draws), math.prod(grid)
    for i, counts in enumerate(zip(*masks, strict=True)):
        context, targets = (sum(c) / len(c) / tokens for c in zip(*counts, strict=True))
        print(f"{args.mask} mask {i + 1}: context {context:.1%}, targets {targets:.1%} of {tokens} tokens")
    print(
        f"means over {args.draws} micro-batches of {args.micro_batch_size} clips; 'formula / counter' compares the "
        f"first {args.counted} with torch's FLOP counter\n"
    )
    print("                executed GFLOPs per clip             formula /  paper convention,  executed FLOPs of a")
    print(
        f"{'':9}{'encoder':>10}{'predictor':>10}{'targets':>10}{'total':>10}{'counter':>10}{'GFLOPs per clip':>18}"
        f"{f'step of {args.batch_size}':>14}{'run':>10}"
    )
    for kind, stage in stages(args).items():
        encoder, predictor, teacher, steps = stage
        executed, paper = per_clip(stage, masks, tokens)
        targets = encoder_flops(teacher, tokens, train=False) if teacher else 0
        predicting = sum(predictor_flops(predictor, *c, train=True) for counts in masks for c in counts) / len(masks)
        some = masks[: args.counted]
        counted = sum(counted_flops(encoder, predictor, counts, teacher) for counts in some)
        formula = sum(step_flops(encoder, predictor, counts, teacher, tokens) for counts in some)
        parts = [executed - targets - predicting, predicting, targets, executed]
        per_step = executed * args.batch_size
        print(
            f"{kind:9}" + "".join(f"{x / 1e9:10.4g}" for x in parts) + f"{formula / counted:10.4f}{paper / 1e9:18.4g}"
            f"{per_step:14.3g}{per_step * steps:10.3g}"
        )


def print_match(args, grid):
    """Print how many EMA steps cost as much as teacher and student together."""
    plan, masks = stages(args), drawn_masks(args, grid, args.draws)
    cost = {kind: per_clip(stage, masks, math.prod(grid)) for kind, stage in plan.items()}
    for i, convention in enumerate(("executed FLOPs", "the paper's convention")):
        salt = sum(cost[kind][i] * plan[kind][3] for kind in ("teacher", "student"))
        print(
            f"{round(salt / cost['ema'][i])} EMA steps cost as much as {args.teacher_steps} teacher and {args.steps} "
            f"student steps by {convention}: {salt * args.batch_size:.4g}"
        )


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--executed", action="store_true", help="print the executed FLOPs per clip, step and run")
    what.add_argument("--match", action="store_true", help="print the EMA steps that cost as much as a SALT run")
    flag = parser.add_argument_group("FLOPs").add_argument
    flag("--teacher", metavar="SIZE|RUN|FILE", help="the student's teacher; default: the student's architecture")
    flag("--teacher-steps", type=int, default=80_000, help="(--steps are the student's)")
    flag("--draws", type=int, default=500, help="micro-batches whose masks are averaged over")
    flag("--counted", type=int, default=5, help="micro-batches to check with torch's FLOP counter")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "draws", "counted", "teacher_steps", "steps", "batch_size")
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(args.batch_size)
    cli.require_at_least(args, 1, "micro_batch_size")
    cli.check_mask_flags(args)
    try:
        grid = cli.clip_grid(args)
        if args.executed:
            print_executed(args, grid)
        elif args.match:
            print_match(args, grid)
        elif len(sys.argv) > 1:
            cli.fail("other flags need --executed or --match; without any flag, the paper's tables are printed")
        else:
            print_paper_tables()
    except (OSError, ValueError) as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
