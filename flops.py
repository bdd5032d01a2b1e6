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
The model flags describe the student and the EMA baseline, --teacher the SALT teacher.
"""

import math
import sys

import torch

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


def predictor_flops(config, context, targets):
    """The predictor on so many context and target tokens: forward and backward pass."""
    embed = 2 * context * config["in_width"] * config["width"]
    proj = 2 * targets * config["width"] * config["out_width"]
    blocks = _blocks(context + targets, config["width"], config["depth"], 4.0)
    return 3 * (embed + blocks + proj)


def step_flops(encoder, predictor, masks, teacher=None, tokens=0):
    """A training step, per clip. masks: [(context, targets), ...] token counts. The teacher sees all `tokens`."""
    total = encoder_flops(teacher, tokens, train=False) if teacher else 0
    for context, targets in masks:
        total += encoder_flops(encoder, context, train=True) + predictor_flops(predictor, context, targets)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# the paper's convention, and its tables

PAPER_BATCH = 3072  # table 5
PAPER_SIZES = {letter: SIZES[name] for letter, name in zip("LHgG", ("vit_l", "vit_h", "vit_g", "vit_G"), strict=True)}


def parameters(cls, config):
    with torch.device("meta"):
        return sum(p.numel() for p in cls(**config).parameters())


def paper_flops(encoder, predictor, teacher, tokens, masks_per_clip=1):
    """FLOPs of a training run over `tokens` tokens, masked or not. encoder, predictor, teacher: configs.

    As in the paper, the pixel decoder of stage 1 (no teacher) counts as a predictor of stage 2.
    """
    predictor = predictor if teacher else predictor | {"out_width": encoder["width"]}
    masked = masks_per_clip * predictor["num_mask_tokens"] * tokens
    trained = 6 * parameters(Encoder, encoder) * 0.1 * masked + 6 * parameters(Predictor, predictor) * masked
    return trained + (2 * parameters(Encoder, teacher) * tokens if teacher else 0)


def paper_run(size, thousands, teacher=None, resolution=224):
    """FLOPs / 1e21 of so many thousand steps: of a student of `teacher`, or of a V-Pixel teacher if that is None."""
    tokens = math.prod(token_grid((16, resolution, resolution), 2, 16)) * PAPER_BATCH * 1000 * thousands
    encoder, teacher = PAPER_SIZES[size], PAPER_SIZES.get(teacher)
    predictor = dict(in_width=encoder["width"], out_width=(teacher or encoder)["width"], num_mask_tokens=2)
    return paper_flops(encoder, predictor, teacher, tokens) / 1e21


def paper_rows():
    """The paper's compute tables, in 1e21 FLOPs: (table, run, our count, the paper's, and a note if they differ)."""
    run = paper_run
    # 1.35M clips x 1200 epochs of 8 x 16 x 16 tokens (2x14x14); the encoder sees 10% of them, the decoder 5%
    video_mae = 6 * (1.1e9 * 0.1 + 0.012e9 * 0.05) * 1.35e6 * 1200 * 2048 / 1e21
    salt = {size: run("L", 80) + run(size, 160, "L") for size in PAPER_SIZES}
    return [
        ("1, 10", "VideoMAEv2-g", video_mae, 2.2),
        *(("1, 10, 11", f"V-JEPA 2 {size}, 240k steps at 256", run(size, 240, size, 256), printed)
          for size, printed in (("L", 1.9), ("H", 3.5), ("g", 5.3))),
        *(("1", f"V-JEPA 2 {size}, 240k steps at 224", run(size, 240, size), printed)
          for size, printed in (("L", 1.4), ("H", 2.6))),
        *(("1, 10, 11", f"SALT {size}, 80k + 160k steps", salt[size], printed)
          for size, printed in (("L", 1.2), ("H", 1.5), ("g", 1.9), ("G", 2.6))),
        ("10", "SALT g, 80k + 160k steps", salt["g"], 1.8, "misprint: tables 1 and 11 have 1.9 for this run"),
        ("11", "SALT stage 1 L, 80k steps", run("L", 80), 0.24),
        *(("16", f"teacher L, {thousands}k steps", run("L", thousands), *printed)
          for thousands, *printed in ((20, 0.061), (40, 0.121), (80, 0.241, "twice 0.121 is 0.242"))),
        *(("16", f"student L, {thousands}k steps", run("L", thousands, "L"), printed)
          for thousands, printed in ((40, 0.238), (80, 0.476), (100, 0.595), (120, 0.714), (140, 0.833), (160, 0.951),
                                     (200, 1.190), (220, 1.309))),
        ("16", "two-step teacher L, 80k + 80k steps", run("L", 80) + run("L", 80, "L"), 0.717),
        ("16", "two-step teacher L, 40k + 80k steps", run("L", 40) + run("L", 80, "L"), 0.597),
        *(("16", f"V-JEPA 2 L, {thousands}k steps, as if at 256", run("L", thousands, "L", 256), *printed)
          for thousands, *printed in (
              (240, 1.9, "the run at 256 of table 1, rounded; at the ablation's 224: 1.43"),
              (160, 1.26, "two thirds of a rounded 1.89 (or 1.9, truncated); at 224: 0.95"),
              (120, 0.951, "half of a rounded 1.9, or the figure of 160k steps at 224; at 224: 0.72"))),
    ]  # fmt: skip


def print_paper_tables():
    """Print all rows; mark those that differ by more than 1% and also when rounded to the paper's digits."""
    print("FLOPs in units of 1e21; 'ours' is the formula of appendix F with our parameter counts\n")
    print(f"{'table':11}{'run':44}{'ours':>7}{'paper':>8}{'ratio':>8}")
    for table, run, ours, printed, *note in paper_rows():
        digits = len(f"{printed:g}".partition(".")[2])  # the paper prints 1.194 as 1.2
        differs = abs(ours / printed - 1) > 0.01 and round(ours, digits) != round(printed, digits)
        line = f"{table:11}{run:44}{ours:7.3f}{printed:>8g}{ours / printed:8.3f} {'!' if differs else '':2}"
        print((line + "".join(note)).rstrip())
    print("\n! differs by more than 1%, and not only in rounding")


# ---------------------------------------------------------------------------------------------------------------------
# any run

DRAWS = 500  # micro-batches whose masks are averaged over


def stages(args):
    """The runs that the flags describe: {kind: (encoder config, predictor config, teacher config or None, steps)}.

    The EMA baseline gets as many steps as teacher and student together (paper section 3).
    """
    student = cli.encoder_config(args)
    teacher = student | SIZES.get(args.teacher, {})
    pixels = 3 * args.tubelet_size * args.patch_size**2
    t, s = teacher["width"], student["width"]
    return {
        "teacher": (teacher, cli.predictor_config(args, t, pixels, args.teacher), None, args.teacher_steps),
        "student": (student, cli.predictor_config(args, s, t), teacher, args.steps),
        "ema": (student, cli.predictor_config(args, s, s), student, args.teacher_steps + args.steps),
    }


def drawn_masks(args):
    """Token counts of the masks of DRAWS micro-batches: [[(Kc, Kt), ...], ...]."""
    shape, generator = (cli.clip_grid(args), args.micro_batch_size), torch.Generator().manual_seed(args.seed)
    options = args.mask_truncation, None, args.masks_per_clip, args.target_fraction
    drawn = (sample_masks(args.mask, *shape, generator, *options) for _ in range(DRAWS))
    return [[(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks] for masks in drawn]


def per_clip(stage, masks, tokens):
    """Mean FLOPs per clip: (executed, over the drawn masks; by the paper's convention)."""
    encoder, predictor, teacher, _ = stage
    executed = sum(step_flops(encoder, predictor, counts, teacher, tokens) for counts in masks) / len(masks)
    return executed, paper_flops(encoder, predictor, teacher, tokens, len(masks[0]) // predictor["num_mask_tokens"])


def print_executed(args, plan, masks, tokens):
    """Print the executed FLOPs of a step and their parts, and the paper's count."""
    for i, counts in enumerate(zip(*masks, strict=True)):
        context, targets = (sum(c) / len(c) / tokens for c in zip(*counts, strict=True))
        print(f"{args.mask} mask {i + 1}: context {context:.1%}, targets {targets:.1%} of {tokens} tokens")
    print(f"means over {DRAWS} micro-batches of {args.micro_batch_size} clips\n")
    print(f"{'executed GFLOPs per clip':>40}{'paper convention,':>27}{'executed FLOPs of a':>23}")
    print(f"{'encoder':>19}{'predictor':>10}{'targets':>10}{'total':>10}{'GFLOPs per clip':>18}"
          f"{f'step of {args.batch_size}':>14}{'run':>10}")  # fmt: skip
    for kind, (_, predictor, teacher, steps) in plan.items():
        executed, paper = per_clip(plan[kind], masks, tokens)
        targets = encoder_flops(teacher, tokens, train=False) if teacher else 0
        predicting = sum(predictor_flops(predictor, *c) for counts in masks for c in counts) / len(masks)
        parts = "".join(f"{x / 1e9:10.4g}" for x in (executed - targets - predicting, predicting, targets, executed))
        step = executed * args.batch_size
        print(f"{kind:9}{parts}{paper / 1e9:18.4g}{step:14.3g}{step * steps:10.3g}")


def print_match(args, plan, masks, tokens):
    """Print how many EMA steps cost as much as teacher and student together."""
    executed, paper = zip(*(per_clip(stage, masks, tokens) for stage in plan.values()), strict=True)
    steps = f"EMA steps cost as much as {args.teacher_steps} teacher and {args.steps} student steps"
    for convention, (teacher, student, ema) in (("executed FLOPs", executed), ("the paper's convention", paper)):
        salt = teacher * args.teacher_steps + student * args.steps
        print(f"{round(salt / ema)} {steps} by {convention}: {salt * args.batch_size:.4g}")


def probe_cost(encoder, tokens, segments, views, probes):
    """Frozen evaluation by probe.py on Kinetics-400's 240,000 and 20,000 videos: (clips to load, executed FLOPs).

    The three blocks of each probe see the tokens of all segments. Its cross-attention is left out: 0.5%.
    """
    encode = segments * encoder_flops(encoder, tokens, train=False)
    classify = probes * _blocks(segments * tokens, encoder["width"], 3, 4.0)
    trained = 20 * 240_000  # passes (table 7) over the training videos
    return segments * (trained + 20_000), trained * (encode + 3 * classify) + 20_000 * views * (encode + classify)


def print_hours(args, plan, masks, tokens):
    """Print the hours of each run at --hours TFLOP/s per GPU, and what its loader must deliver meanwhile."""
    costs = {}  # name: (clips, FLOPs)
    for kind, stage in plan.items():
        clips = args.batch_size * stage[3]
        costs[f"{kind}, {stage[3]} steps"] = clips, clips * per_clip(stage, masks, tokens)[0]
    costs["probe.py --task k400"] = probe_cost(plan["student"][0], tokens, segments=8, views=3, probes=20)
    costs["probe.py --task k400 --fast"] = probe_cost(plan["student"][0], tokens, segments=1, views=1, probes=1)
    cores = f"cores that decode {args.clips_per_core:g} clips per second each"
    print(f"{args.gpus} x {args.hours:g} executed TFLOP/s; {cores}. With fewer cores, the loader sets the pace.\n")
    print(f"{'':28}{'FLOPs':>10}{'hours':>10}{'clips/s per GPU':>18}{'cores per GPU':>16}")
    for name, (clips, work) in costs.items():
        seconds = work / (args.hours * 1e12)  # of one GPU
        rate = clips / seconds
        print(f"{name:28}{work:10.3g}{seconds / args.gpus / 3600:10.4g}{rate:18.4g}{rate / args.clips_per_core:16.1f}")


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    what = parser.add_mutually_exclusive_group(required=len(sys.argv) > 1)  # no flags: the paper's tables
    what.add_argument("--executed", action="store_true", help="print the executed FLOPs per clip, step and run")
    what.add_argument("--match", action="store_true", help="print the EMA steps that cost as much as a SALT run")
    what.add_argument("--hours", type=float, metavar="TFLOPS", help="print the hours at that rate per GPU")
    flag = parser.add_argument_group("FLOPs").add_argument
    flag("--teacher", choices=SIZES, help="size of the student's teacher; default: the student's architecture")
    flag("--teacher-steps", type=int, default=80_000, help="(--steps are the student's)")
    flag("--gpus", type=int, default=1, help="number of GPUs, for --hours")
    flag("--clips-per-core", type=float, default=19, help="clips per second that a core decodes (docs/performance.md)")
    args = parser.parse_args()
    if len(sys.argv) == 1:
        print_paper_tables()
        return
    cli.require_at_least(args, 1, "teacher_steps", "steps", "batch_size", "gpus", "clips_per_core")
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(args.batch_size)
    cli.require_at_least(args, 1, "micro_batch_size")
    if args.hours is not None and args.hours <= 0:
        cli.fail("--hours: must be more than 0")
    plan = stages(args)
    cli.check_mask_flags(args)
    show = print_executed if args.executed else print_match if args.match else print_hours
    show(args, plan, drawn_masks(args), math.prod(cli.clip_grid(args)))


if __name__ == "__main__":
    main()
