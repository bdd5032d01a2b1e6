"""Attention: torch's kernels in turn, at the shapes that a training step gives them.

    python bench.py attention --model vit_h --teacher vit_l --batch-size 24      # flags of the training scripts apply

Forward and backward pass (of the frozen teacher the forward pass alone) on random queries, keys and values, strided as
the blocks make them. Heads whose size is no power of two, as the predictor's 24, are also padded to the next one, which
changes nothing in the result. TFLOP/s count what is needed, not the padding. `bench.py step --attention KERNEL` tells
what a kernel does to the whole step.
"""

import contextlib
import math
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import flops
from bench import step as bench_step
from model import SIZES

KERNELS = {"torch's choice": None} | bench_step.ATTENTION | {"math": SDPBackend.MATH}


def flags(parser):
    """The subcommand's own flags; those of the training scripts apply as well."""
    flag = parser.add_argument
    flag("--teacher", metavar="SIZE", choices=SIZES, help="of the SALT student; its own architecture without")
    flag("--rounds", type=int, default=5, help="turns of every kernel")
    flag("--calls", type=int, default=1, help="of a turn")


def shapes(stage, args):
    """{who attends: ((B, heads, tokens, channels), whether it is trained)} in one micro-batch's step."""
    encoder, predictor, teacher, _ = stage
    masks, grid = bench_step.drawn(args, bench_step.FIRST)
    calls = {"teacher": (teacher, math.prod(grid))}
    for i, mask in enumerate(masks, start=1):
        context, target = mask.context_ids.shape[1], mask.target_ids.shape[1]
        calls |= {f"encoder, mask {i}": (encoder, context), f"predictor, mask {i}": (predictor, context + target)}
    return {
        who: ((args.micro_batch_size, config["heads"], tokens, config["width"] // config["heads"]), who != "teacher")
        for who, (config, tokens) in calls.items()
    }


def attention(qkv, padded):
    """Attention of (B, K, 3, h, d) with heads padded to this many channels: (B, h, K, d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    size = q.shape[-1]
    if padded > size:
        q, k, v = (F.pad(x, (0, padded - size)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]


def milliseconds(shape, trained, padded, own, args):
    """{kernel: of a call, the median of all rounds} of those kernels that take this shape here."""
    B, h, K, d = shape
    options = dict(device=args.device, dtype=getattr(torch, args.dtype))
    qkv = torch.randn(B, K, 3, h, d, requires_grad=trained, **options)
    gradient = torch.randn(B, h, K, d, **options)

    def turn(kernel):
        start = bench_step.now(args)
        with sdpa_kernel(kernel) if kernel else contextlib.nullcontext(), torch.set_grad_enabled(trained):
            for _ in range(own.calls):
                out = attention(qkv, padded)
                if trained:
                    qkv.grad = None
                    out.backward(gradient)
        return 1e3 * (bench_step.now(args) - start) / own.calls

    times = {}
    for name, kernel in KERNELS.items():  # to warm up
        with contextlib.suppress(RuntimeError):  # refused
            turn(kernel)
            times[name] = []
    for _ in range(own.rounds):
        for name in times:
            times[name].append(turn(KERNELS[name]))
    return {name: statistics.median(all_rounds) for name, all_rounds in times.items()}


def run(own, words):
    """Print a table: a row for each shape and padding, a column for each kernel."""
    cli.require_at_least(own, 1, "rounds", "calls")
    args = bench_step.training_args(own, words)
    try:
        stage = flops.stages(own, args)["student"]
    except ValueError as error:
        cli.fail(str(error))
    print("ms a call, and TFLOP/s; - where a kernel does not take the shape here\n")
    print(f"{'':18}{'B x heads x tokens x channels':>31}" + "".join(f"{name:>18}" for name in KERNELS))
    for who, (shape, trained) in shapes(stage, args).items():
        B, h, K, d = shape
        work = (3 if trained else 1) * 4 * B * h * K * K * d
        for padded in dict.fromkeys((d, 1 << (d - 1).bit_length())):
            size = f"{B} x {h} x {K} x {d}" + (f" in {padded}" if padded > d else "")
            found = milliseconds(shape, trained, padded, own, args)
            cells = (f"{found[k]:.2f} {work / found[k] / 1e9:7.4g}" if k in found else "-" for k in KERNELS)
            print(f"{who:18}{size:>31}" + "".join(f"{cell:>18}" for cell in cells))


def main():
    parser = cli.Parser(__doc__)
    flags(parser)
    run(*parser.parse_known_args())


if __name__ == "__main__":
    main()
