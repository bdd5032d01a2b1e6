"""The probes: how fast probe.py trains 20 at once, against 20 separate ones as V-JEPA 2's evaluation has them.

    python bench.py probe                                              # the demo's size, one cross-attention block
    python bench.py probe --width 1024 --tokens 1568 --probe-heads 16 --batch-size 2 --probe-depth 4

Forward, backward and AdamW on made-up tokens. Every repetition times both in turn; the ratio is that of the medians.
The end of the line says how far the logits are apart after it.
"""

import argparse
import itertools
import time

import torch
import torch.nn.functional as F

import probe
from model import AttentiveProbe
from training import resolve_device

NUM_CLASSES = 400


def flags(parser):
    flag = parser.add_argument
    flag("--width", type=int, default=96)
    flag("--tokens", type=int, default=64, help="of a clip")
    flag("--batch-size", type=int, default=100)
    flag("--probe-depth", type=int, default=1)
    flag("--probe-heads", type=int, default=4)
    flag("--repeats", type=int, default=5)
    flag("--device", choices=("cpu", "cuda"))
    flag("--dtype", choices=("float32", "bfloat16"))
    flag("--together", action=argparse.BooleanOptionalAction, help="stack probes; default as probe.py does")


def run(args):
    """Print seconds per step of both ways, their ratio, and the largest difference of the logits afterwards."""
    resolve_device(args)
    args.lr, args.weight_decay = probe.GRID
    torch.manual_seed(0)
    tokens = torch.randn(args.batch_size, args.tokens, args.width, device=args.device)
    tokens = tokens.to(getattr(torch, args.dtype))
    labels = torch.randint(0, NUM_CLASSES, (args.batch_size,), device=args.device)
    settings = list(itertools.product(args.lr, args.weight_decay))
    if args.together is None:
        stacks = probe.make_probes(args, args.width, NUM_CLASSES, seed=0)
    torch.manual_seed(0)
    first = AttentiveProbe(args.width, NUM_CLASSES, args.probe_depth, args.probe_heads)
    if args.together is not None:
        size = len(settings) if args.together else 1
        groups = [settings[i : i + size] for i in range(0, len(settings), size)]
        stacks = [probe.AttentiveProbes([first] * len(group)).to(args.device) for group in groups]
        stacks = [(stack, probe.make_optimizer(stack, group)) for stack, group in zip(stacks, groups, strict=True)]
    separate = []
    for lr, weight_decay in settings:
        alone = AttentiveProbe(args.width, NUM_CLASSES, args.probe_depth, args.probe_heads).to(args.device)
        alone.load_state_dict(first.state_dict())
        separate.append((alone, torch.optim.AdamW(alone.parameters(), lr=lr, weight_decay=weight_decay, fused=True)))

    def step_together():
        for probes, optimizer in stacks:
            logits = probe.logits_of(args, probes, tokens, None)
            (F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)).backward()
            optimizer.step()
            probes.zero_grad(set_to_none=False)

    def step_separate():
        for alone, optimizer in separate:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logits = alone(tokens).float()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = {step_together: [], step_separate: []}
    for _ in range(args.repeats + 1):  # the first one warms up
        for step, times in seconds.items():
            started = time.perf_counter()
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    ours, theirs = (sorted(times[1:])[args.repeats // 2] for times in seconds.values())
    with torch.inference_mode():
        apart = torch.cat([probe.logits_of(args, probes, tokens, None) for probes, _ in stacks])
        apart = (apart - torch.stack([alone(tokens.float()) for alone, _ in separate])).abs().max().item()
    print(f"20 probes of {args.probe_depth} blocks, width {args.width}, {args.batch_size} x {args.tokens} tokens, "
          f"{args.device} {args.dtype}: {ours:.3f} s a step, {theirs:.3f} s separately, ratio {theirs / ours:.2f}; "
          f"logits {apart:.1e} apart after {args.repeats + 1} steps")  # fmt: skip
