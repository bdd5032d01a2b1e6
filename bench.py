"""How fast the parts are, each against a peer and timed in turn with it in one run: the ratios are what counts.

    python bench.py step --peer hf --model vit_l --batch-size 24    # the training step, against Hugging Face's V-JEPA 2
    python bench.py attention --model vit_l --batch-size 24         # torch's attention kernels, at the step's shapes
    python bench.py loader                                          # clips per second, against decord as V-JEPA uses it
    python bench.py probe                                           # 20 probes at once, against one after the other

`python bench.py step --help` says more; likewise for the others. Each lives in a file of its own, bench_*.py.
"""

import bench_attention
import bench_loader
import bench_probe
import bench_step
import training


def main():
    parser = training.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {"step": bench_step, "attention": bench_attention, "loader": bench_loader, "probe": bench_probe}
    training_flags = ("step", "attention")  # those that take the training scripts' flags as well
    for name, module in modules.items():
        module.flags(commands.add_parser(name, description=module.__doc__, help=module.__doc__.splitlines()[0]))
    args, rest = parser.parse_known_args()
    if rest and args.command not in training_flags:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    modules[args.command].run(args, *([rest] if args.command in training_flags else []))


if __name__ == "__main__":
    main()
