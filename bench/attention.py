"""Benchmark of attention: torch's kernels compared at the shapes of a student's training step.

    python -m bench.attention --model vit_h --teacher vit_l --batch-size 24

Times the forward and backward pass (for the frozen teacher, only the forward pass) on random queries, keys and values,
with the strides that the blocks produce. Head sizes that are not a power of two, such as the predictor's 24, are also
timed with zero padding up to the next one, which does not change the result. TFLOP/s do not count the padding.
`bench.step --attention KERNEL` shows how much a kernel matters for the whole step. All flags of the training scripts
apply.
"""

import contextlib
import math
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import flops
import train_student
import training
from bench import step as bench_step
from model import SIZES

KERNELS = bench_step.ATTENTION_KERNELS | {"math": SDPBackend.MATH}
KERNELS = {"torch's choice": list(KERNELS.values())} | KERNELS  # what torch may use


class Shape(NamedTuple):
    """The size of queries, keys and values: (B, h, K, d)."""

    clips: int
    heads: int
    tokens: int
    head_size: int

    def flops(self, trained):
        """FLOPs of attention: two matrix products, and twice as many in the backward pass."""
        forward = 4 * self.clips * self.heads * self.tokens**2 * self.head_size
        return 3 * forward if trained else forward


def attention_shapes(stage, args):
    """The attention of one micro-batch of a student's step: {name: (Shape, whether it is trained)}."""
    encoder, predictor, teacher, _ = stage

    def shape(config, tokens):
        return Shape(args.micro_batch_size, config["heads"], tokens, config["width"] // config["heads"])

    shapes = {"teacher": (shape(teacher, math.prod(cli.clip_grid(args))), False)}
    for i, mask in enumerate(train_student.draw_masks(args, bench_step.WARMUP_STEPS, 0), start=1):
        context, target = mask.context_ids.shape[1], mask.target_ids.shape[1]
        shapes[f"encoder, mask {i}"] = shape(encoder, context), True
        shapes[f"predictor, mask {i}"] = shape(predictor, context + target), True
    return shapes


def attention(qkv, padded_size):
    """Attention of (B, K, 3, h, d), with heads zero-padded to padded_size channels: (B, h, K, d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    size = q.shape[-1]
    if padded_size > size:
        q, k, v = (F.pad(x, (0, padded_size - size)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]


def next_power_of_two(n):
    return 2 ** math.ceil(math.log2(n))


def milliseconds_per_call(shape, trained, padded_size, args):
    """Median time of a call over all rounds: {kernel: milliseconds}, for the kernels that support this shape here."""
    B, h, K, d = shape
    options = dict(device=args.device, dtype=getattr(torch, args.dtype))
    qkv = torch.randn(B, K, 3, h, d, requires_grad=trained, **options)
    gradient = torch.randn(B, h, K, d, **options)

    def time_round(kernel):
        start = bench_step.now(args)
        with sdpa_kernel(kernel), torch.set_grad_enabled(trained):
            for _ in range(args.calls):
                out = attention(qkv, padded_size)
                if trained:
                    qkv.grad = None
                    out.backward(gradient)
        return 1e3 * (bench_step.now(args) - start) / args.calls

    times = {}
    for name, kernel in KERNELS.items():
        with contextlib.suppress(RuntimeError):  # raised if the kernel does not support this shape
            time_round(kernel)  # warm up
            times[name] = []
    for _ in range(args.rounds):
        for name in times:
            times[name].append(time_round(KERNELS[name]))
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def print_table(shapes, args):
    """Print a row for each shape, without and with padding, and a column for each kernel."""
    print("milliseconds per call, and TFLOP/s; - if the kernel does not support the shape on this device\n")
    print(f"{'':18}{'B x heads x tokens x channels':>31}" + "".join(f"{name:>18}" for name in KERNELS))
    for name, (shape, trained) in shapes.items():
        for padded_size in sorted({shape.head_size, next_power_of_two(shape.head_size)}):
            size = " x ".join(map(str, shape))
            if padded_size > shape.head_size:
                size += f" in {padded_size}"
            times = milliseconds_per_call(shape, trained, padded_size, args)
            row = f"{name:18}{size:>31}"
            for kernel in KERNELS:
                cell = "-"
                if kernel in times:
                    cell = f"{times[kernel]:.2f} {shape.flops(trained) / times[kernel] / 1e9:7.4g}"
                row += f"{cell:>18}"
            print(row)


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    parser.set_defaults(batch_size=24, teacher_steps=80_000)  # flops.stages needs teacher_steps; times do not
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--teacher", metavar="SIZE", choices=SIZES, help="teacher of the student; default: the student's size")
    flag("--rounds", type=int, default=5, help="number of times that the kernels take turns")
    flag("--calls", type=int, default=1, help="calls per turn")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "rounds", "calls")
    training.setup(args, stage=2)
    try:
        shapes = attention_shapes(flops.stages(args)["student"], args)
    except ValueError as error:
        cli.fail(str(error))
    print_table(shapes, args)


if __name__ == "__main__":
    main()
