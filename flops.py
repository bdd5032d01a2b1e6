"""Compute accounting: the paper's convention, the FLOPs actually executed, and the hours they take.

    python flops.py                                                   # the paper's tables: our count beside the paper's
    python flops.py --executed --model vit_h --teacher vit_l          # the FLOPs of a training step
    python flops.py --match --teacher-steps 80000 --steps 160000      # EMA steps that cost as much as a SALT run
    python flops.py --hours 400 --gpus 8 --model vit_l                # hours at 400 TFLOP/s per GPU; cores for loaders

The paper counts 6 FLOPs per parameter and trained token, 2 per parameter and inferred token, a context of 10% of the
tokens for each of two masks, and no attention (appendix F). Executed FLOPs count all matrix products of the networks,
including attention, for the masks actually drawn. The training logs report these. A multiply-add is two FLOPs. The
backward pass of a layer costs twice its forward pass, except for the first linear layer of a network, which needs no
gradient of its input. Softmax, norms, GELU, RoPE, the optimizer and the EMA are left out: less than 1% together.

All but the paper's tables take the model and batch flags of the training scripts, which describe the student and the
EMA baseline, and --teacher, the size of the SALT teacher.
"""

import math
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import cli
from masking import sample_masks
from model import SIZES, Encoder, Predictor, token_grid

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
    size = encoder["resolution"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        clip = torch.empty(1, 3, encoder["num_frames"], size, size)
        student, predict = Encoder(**encoder), Predictor(**predictor)
        if teacher:
            with torch.no_grad():
                Encoder(**teacher)(clip)
        for mask in masks:
            context, targets = (torch.empty(1, count, dtype=torch.long) for count in mask)
            predict(student(clip, context), context, targets, student.grid(clip)).sum().backward()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# the paper's convention, and its tables

PAPER_BATCH = 3072  # table 5


def paper_flops(tokens, encoder, predictor, teacher=None, num_masks=2):
    """FLOPs of a training run over `tokens` tokens, masked or not. encoder, predictor, teacher: parameter counts."""
    trained = 6 * encoder * (num_masks * 0.1 * tokens) + 6 * predictor * (num_masks * tokens)
    return trained + 2 * (teacher or 0) * tokens


def parameters(cls, config):
    """The number of parameters of cls(**config)."""
    with torch.device("meta"):
        return sum(p.numel() for p in cls(**config).parameters())


def paper_flops_of(encoder, predictor, teacher, tokens, masks_per_clip=1):
    """`paper_flops` from configs. As in the paper, the pixel decoder of stage 1 counts as a predictor of stage 2."""
    predictor = predictor if teacher else predictor | {"out_width": encoder["width"]}
    sizes = parameters(Encoder, encoder), parameters(Predictor, predictor), teacher and parameters(Encoder, teacher)
    return paper_flops(tokens, *sizes, num_masks=masks_per_clip * predictor["num_mask_tokens"])


def paper_run(size, steps, teacher=None, resolution=224):
    """FLOPs of one stage at the paper's batch size: a student of `teacher`, or a V-Pixel teacher if that is None."""
    tokens = math.prod(token_grid((16, resolution, resolution), 2, 16)) * PAPER_BATCH * steps
    predictor = dict(in_width=SIZES[size]["width"], out_width=SIZES[teacher or size]["width"], num_mask_tokens=2)
    return paper_flops_of(SIZES[size], predictor, SIZES[teacher] if teacher else None, tokens)


def paper_rows():
    """The paper's compute tables: [(table, run, FLOPs by our count, FLOPs as printed, note if they differ), ...]."""
    sizes = {"L": "vit_l", "H": "vit_h", "g": "vit_g", "G": "vit_G"}

    def teacher(thousands):  # steps
        return paper_run("vit_l", 1000 * thousands)

    def student(thousands, size="L"):
        return paper_run(sizes[size], 1000 * thousands, "vit_l")

    def ema(size, resolution, thousands=240):
        return paper_run(sizes[size], 1000 * thousands, sizes[size], resolution)

    salt = {size: teacher(80) + student(160, size) for size in sizes}
    # 1.35M clips x 1200 epochs of 8 x 16 x 16 tokens (2x14x14); the encoder sees 10% of them, the decoder 5%
    tokens = 1.35e6 * 1200 * 2048
    rows = [
        ("1, 10", "VideoMAEv2-g", 6 * 1.1e9 * 0.1 * tokens + 6 * 0.012e9 * 0.05 * tokens, 2.2, ""),
        *(("1, 10, 11", f"V-JEPA 2 {size}, 240k steps at 256", ema(size, 256), printed, "")
          for size, printed in (("L", 1.9), ("H", 3.5), ("g", 5.3))),
        *(("1", f"V-JEPA 2 {size}, 240k steps at 224", ema(size, 224), printed, "")
          for size, printed in (("L", 1.4), ("H", 2.6))),
        *(("1, 10, 11", f"SALT {size}, 80k + 160k steps", salt[size], printed, "")
          for size, printed in (("L", 1.2), ("H", 1.5), ("g", 1.9), ("G", 2.6))),
        ("10", "SALT g, 80k + 160k steps", salt["g"], 1.8, "misprint: tables 1 and 11 have 1.9 for this run"),
        ("11", "SALT stage 1 L, 80k steps", teacher(80), 0.24, ""),
        ("16", "teacher L, 20k steps", teacher(20), 0.061, ""),
        ("16", "teacher L, 40k steps", teacher(40), 0.121, ""),
        ("16", "teacher L, 80k steps", teacher(80), 0.241, "twice 0.121 is 0.242"),
        *(("16", f"student L, {steps}k steps", student(steps), printed, "")
          for steps, printed in ((40, 0.238), (80, 0.476), (100, 0.595), (120, 0.714), (140, 0.833), (160, 0.951),
                                 (200, 1.190), (220, 1.309))),
        ("16", "two-step teacher L, 80k + 80k steps", teacher(80) + student(80), 0.717, ""),
        ("16", "two-step teacher L, 40k + 80k steps", teacher(40) + student(80), 0.597, ""),
        ("16", "V-JEPA 2 L, 240k steps, as if at 256", ema("L", 256), 1.9,
         "the run at 256 of table 1, rounded; at the ablation's 224: 1.43"),
        ("16", "V-JEPA 2 L, 160k steps, as if at 256", ema("L", 256, 160), 1.26,
         "two thirds of a rounded 1.89 (or 1.9, truncated); at 224: 0.95"),
        ("16", "V-JEPA 2 L, 120k steps, as if at 256", ema("L", 256, 120), 0.951,
         "half of a rounded 1.9, or the figure of 160k steps at 224; at 224: 0.72"),
    ]  # fmt: skip
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

    The EMA baseline gets as many steps as teacher and student together (paper section 3).
    """
    student = cli.encoder_config(args)
    teacher = student | (SIZES[args.teacher] if args.teacher else {})
    pixels = 3 * args.tubelet_size * args.patch_size**2
    t, s = teacher["width"], student["width"]
    return {
        "teacher": (teacher, cli.predictor_config(args, t, pixels, args.teacher), None, args.teacher_steps),
        "student": (student, cli.predictor_config(args, s, t), teacher, args.steps),
        "ema": (student, cli.predictor_config(args, s, s), student, args.teacher_steps + args.steps),
    }


def drawn_masks(args, draws):
    """Token counts of the masks of `draws` micro-batches: [[(Kc, Kt), ...], ...]."""
    drawn, grid, generator = [], cli.clip_grid(args), torch.Generator().manual_seed(args.seed)
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


def print_executed(args, tokens):
    """Print the executed FLOPs of a step and their parts, checked against torch's counter, and the paper's count."""
    masks = drawn_masks(args, args.draws)
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
        parts = "".join(f"{x / 1e9:10.4g}" for x in (executed - targets - predicting, predicting, targets, executed))
        step = executed * args.batch_size
        print(f"{kind:9}{parts}{formula / counted:10.4f}{paper / 1e9:18.4g}{step:14.3g}{step * steps:10.3g}")


def print_match(args, tokens):
    """Print how many EMA steps cost as much as teacher and student together."""
    plan, masks = stages(args), drawn_masks(args, args.draws)
    cost = {kind: per_clip(stage, masks, tokens) for kind, stage in plan.items()}
    for i, convention in enumerate(("executed FLOPs", "the paper's convention")):
        salt = sum(cost[kind][i] * plan[kind][3] for kind in ("teacher", "student"))
        print(
            f"{round(salt / cost['ema'][i])} EMA steps cost as much as {args.teacher_steps} teacher and {args.steps} "
            f"student steps by {convention}: {salt * args.batch_size:.4g}"
        )


K400_TRAIN, K400_VAL, PROBE_EPOCHS = 240_000, 20_000, 20  # videos of Kinetics-400; passes over them (table 7)


def probe_cost(encoder, tokens, segments, views, probes):
    """Frozen evaluation on Kinetics-400 by probe.py: (clips to load, executed FLOPs).

    Each of the probes has three blocks, which see the tokens of all segments; the fourth, cross-attention from a single
    query, is left out: 0.5%.
    """
    encode = segments * encoder_flops(encoder, tokens, train=False)
    classify = probes * _blocks(segments * tokens, encoder["width"], 3, 4.0)
    trained = PROBE_EPOCHS * K400_TRAIN
    work = trained * (encode + 3 * classify) + K400_VAL * views * (encode + classify)
    return segments * (trained + K400_VAL), work


def print_hours(args, tokens):
    """Print the hours of each run at --hours TFLOP/s per GPU, and what its loader must deliver meanwhile."""
    plan, masks = stages(args), drawn_masks(args, args.draws)
    costs = {}  # name: (clips, FLOPs)
    for kind, stage in plan.items():
        clips = args.batch_size * stage[3]
        costs[f"{kind}, {stage[3]} steps"] = clips, clips * per_clip(stage, masks, tokens)[0]
    encoder = plan["student"][0]
    costs["probe.py --task k400"] = probe_cost(encoder, tokens, segments=8, views=3, probes=20)
    costs["probe.py --task k400 --fast"] = probe_cost(encoder, tokens, segments=1, views=1, probes=1)
    print(
        f"{args.gpus} x {args.hours:g} executed TFLOP/s; cores that decode {args.clips_per_core:g} clips per second "
        "each. With fewer cores, the loader sets the pace.\n"
    )
    print(f"{'':28}{'FLOPs':>10}{'hours':>10}{'clips/s per GPU':>18}{'cores per GPU':>16}")
    for name, (clips, work) in costs.items():
        gpu_seconds = work / (args.hours * 1e12)
        hours, rate = gpu_seconds / args.gpus / 3600, clips / gpu_seconds
        print(f"{name:28}{work:10.3g}{hours:10.4g}{rate:18.4g}{rate / args.clips_per_core:16.1f}")


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--executed", action="store_true", help="print the executed FLOPs per clip, step and run")
    what.add_argument("--match", action="store_true", help="print the EMA steps that cost as much as a SALT run")
    what.add_argument("--hours", type=float, metavar="TFLOPS", help="print the hours of the runs and of probe.py, and "
                      "the cores of their loaders, at that many executed TFLOP/s per GPU")  # fmt: skip
    flag = parser.add_argument_group("FLOPs").add_argument
    flag("--teacher", choices=SIZES, help="size of the student's teacher; default: the student's architecture")
    flag("--teacher-steps", type=int, default=80_000, help="(--steps are the student's)")
    flag("--draws", type=int, default=500, help="micro-batches whose masks are averaged over")
    flag("--counted", type=int, default=5, help="micro-batches to check with torch's FLOP counter")
    flag("--gpus", type=int, default=1, help="number of GPUs, for --hours")
    flag("--clips-per-core", type=float, default=19, help="clips per second that a core decodes, for --hours: 19 of "
         "340x256 videos, 56 of their copies by tools.transcode (docs/performance.md)")  # fmt: skip
    args = parser.parse_args()
    cli.require_at_least(args, 1, "draws", "counted", "teacher_steps", "steps", "batch_size", "gpus")
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(args.batch_size)
    cli.require_at_least(args, 1, "micro_batch_size")
    cli.check_mask_flags(args)
    if args.clips_per_core <= 0 or (args.hours is not None and args.hours <= 0):
        cli.fail("--hours and --clips-per-core must be more than 0")
    try:
        tokens = math.prod(cli.clip_grid(args))
        if args.executed:
            print_executed(args, tokens)
        elif args.match:
            print_match(args, tokens)
        elif args.hours:
            print_hours(args, tokens)
        elif len(sys.argv) > 1:
            cli.fail(
                "other flags need --executed, --match or --hours; without any flag, the paper's tables are printed"
            )
        else:
            print_paper_tables()
    except ValueError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
