"""What a training run needs of each GPU's memory, on paper and in truth.

    python memory.py --kind student --model vit_g --teacher vit_l --processes 128   # on paper: nothing is allocated
    python memory.py --kind ema --model vit_l --processes 8 --micro-batch-size 12
    python memory.py --kind student --model vit_l --batch-size 24 --peer hf         # beside Hugging Face's V-JEPA 2
    python memory.py --check --kind teacher --model vit_s --resolution 112 --batch-size 8 --micro-batch-size 4
    torchrun --nproc_per_node=2 memory.py --check --kind teacher --model vit_s --resolution 112 --batch-size 8

On paper: one step of the real networks, sharded by the real FSDP2, on tensors that have sizes and no memory (torch's
FakeTensorMode), in a process that believes itself to be the first of --processes. Every storage is counted from its
birth to its end. So gradients and activations add up as far as they are there at the same time: the gradients come
while the activations of a step's first mask go, and are there from then on. Masks are the largest of --draws.
Figures are for a GPU and bfloat16 unless --device and --dtype say otherwise, and for eager mode: torch.compile keeps
less. Left out: the CUDA context, NCCL's buffers, workspaces inside kernels, fragmentation.

In truth (--check): the training script itself runs three steps here, with masks that paper takes over; its peak is
that of torch's allocator for the device. Exit status 1 if paper and truth are more than 15% apart. The flags of the
training scripts apply.
"""

import argparse
import contextlib
import json
import math
import os
import runpy
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cli
import data
import flops
import masking
import training
from bench import step as bench_step
from model import CHECKPOINT_FORMAT, Encoder, Predictor, rope_table

GIB = 2**30
TOLERANCE, CHECKED_STEPS = 0.15, 3  # of --check

# ---------------------------------------------------------------------------------------------------------------------
# on paper


class Live(TorchDispatchMode):
    """Counts the bytes of all storages alive. `gathered`: of those that FSDP2 fills and frees by resizing them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.resized, self.bytes, self.gathered = {}, set(), 0, 0
        self.start_again()

    def start_again(self):
        """Look for the peak from here on."""
        self.peak, self.gathered_at_peak = self.bytes, self.gathered

    def note(self, storage):
        if id(storage) not in self.sizes:
            weakref.finalize(storage, self.forget, id(storage)).atexit = False
        self.bytes += storage.nbytes() - self.sizes.get(id(storage), 0)
        self.sizes[id(storage)] = storage.nbytes()
        if self.bytes > self.peak:
            self.start_again()

    def forget(self, key):
        size = self.sizes.pop(key)
        self.bytes -= size
        if key in self.resized:
            self.resized.remove(key)
            self.gathered -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its shards come by as tensors of their own
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf.untyped_storage())
        return result

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def noted(storage, size):
            before = self.sizes.get(id(storage), 0) if id(storage) in self.resized else 0
            resize(storage, size)
            if id(storage) in self.sizes:
                self.resized.add(id(storage))
                self.gathered += storage.nbytes() - before
                self.note(storage)
            return storage

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", noted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


class ReadAs(TorchDispatchMode):
    """Answers with `number` to whoever reads a tensor's value: the peer does so for its largest target id."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = function is torch.ops.aten._local_scalar_dense.default
        return self.number if reads else function(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_gpu():
    """A context with what is different on a GPU: flash attention's kernel, and autocast's layer norms in float32.

    The tensors say that they are on the CPU: without a GPU, autograd refuses those that say they are on one.
    """
    layer_norm = F.layer_norm

    def in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (t if t is None else t.float() for t in (x, weight, bias))
        return layer_norm(x, shape, weight, bias, eps)

    def flash(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with mock.patch.object(F, "layer_norm", in_float32), mock.patch("model.attend", flash):
        yield


@contextlib.contextmanager
def first_of(processes, per_node):
    """As if this were the first process of several. One alone needs no process group."""
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(per_node)):
            yield
    finally:
        if processes > 1:
            dist.destroy_process_group()


def built(cls, config, args, sharded=True, trained=True):
    """cls(**config), ready for training, its weights (or this process's shards) without memory: on the meta device."""
    with torch.device("meta"):
        network = cls(**config).requires_grad_(trained)
    return training.prepare(network, args, sharded)


def fill(network, dtype=torch.float32):
    """Give a network weights that count (and whose values nobody knows)."""

    def filled(p):
        if not isinstance(p, DTensor):
            return torch.empty(p.shape, dtype=dtype)
        local = torch.empty(p.to_local().shape, dtype=dtype)
        return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())

    network.load_state_dict({name: filled(p) for name, p in network.state_dict().items()}, assign=True)


def forward_and_backward(runner, clips, masks, autocast):
    """What the training scripts do with a micro-batch. runner: bench_step's Ours or HuggingFace."""
    with autocast:
        targets = bench_step.targets(runner, clips)
    for i, mask in enumerate(masks):
        with autocast:
            loss = runner.loss(targets, clips, mask, i) / len(masks)
        loss.backward()


def peer_on_meta(encoder, predictor, teacher):
    """Hugging Face's (student, teacher or None) of these configs, on the meta device."""

    def weights(cls, config):
        with torch.device("meta"):
            return cls(**config).state_dict()

    student = bench_step.hf_model(encoder, weights(Encoder, encoder), predictor, weights(Predictor, predictor))
    return student, teacher and bench_step.hf_model(teacher, weights(Encoder, teacher)).encoder


def on_paper(own, args, stage, masks, checkpointing, peer=False):
    """{part: bytes of a process} for the networks of one of `flops.stages`; masks: [(context, targets), ...] counts.

    weights, teacher, gradients, optimizer: each in full. step: the most that is alive in a forward and backward pass,
    update: in the update, both with all that is there besides. activations: what `step` has more than those parts that
    stay throughout; gathered: the whole weights among them that FSDP2 has gathered. peer: of Hugging Face's networks.
    """
    encoder_config, predictor_config, teacher_config, _ = stage
    dtype, clips_at_once = getattr(torch, args.dtype), args.micro_batch_size
    as_there = as_on_gpu() if args.device == "cuda" else contextlib.nullcontext()
    args = argparse.Namespace(**vars(args) | {"device": "cpu", "activation_checkpointing": checkpointing})
    rope_table.cache_clear()
    parts, live = {}, Live()
    with first_of(own.processes, own.processes_per_node):
        frozen = own.kind == "student"
        if peer:
            student, teacher = peer_on_meta(encoder_config, predictor_config, teacher_config)
            runner, trained = bench_step.HuggingFace(own.kind, args, student, teacher), [student]
        else:
            student, predictor = built(Encoder, encoder_config, args), built(Predictor, predictor_config, args)
            sharded = own.shard_teacher or not frozen
            teacher = teacher_config and built(Encoder, teacher_config, args, sharded, trained=False)
            runner, trained = bench_step.Ours(own.kind, args, student, predictor, teacher), [student, predictor]
        with FakeTensorMode(allow_non_fake_inputs=True), live, as_there:
            if teacher:
                fill(teacher, dtype if frozen else torch.float32)
            parts["teacher"] = live.bytes
            for network in trained:
                fill(network)
            parts["weights"] = live.bytes - sum(parts.values())
            params = [p for network in trained for p in network.parameters()]
            averages = [torch.zeros_like(p) for p in params for _ in range(2)]  # AdamW's; updates are in place
            parts["optimizer"] = live.bytes - sum(parts.values())
            gradients = [torch.zeros_like(p) for p in params]
            parts["gradients"] = live.bytes - sum(parts.values())
            del gradients
            live.start_again()

            batch = torch.empty(clips_at_once, 3, args.num_frames, args.resolution, args.resolution, dtype=torch.uint8)
            clips = data.normalize(batch, "cpu")
            del batch  # on a GPU the host has it, on the CPU a loader process's shared memory
            ids = [[torch.empty(clips_at_once, count, dtype=torch.long) for count in mask] for mask in masks]
            masks = [masking.Mask(*mask_ids, None, None) for mask_ids in ids]
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
            with ReadAs(math.prod(cli.clip_grid(args))) if peer else contextlib.nullcontext():
                for last in (False, True)[-micro_batches(own, args) :]:  # more of them change nothing
                    training.last_micro_batch(trained, last)
                    forward_and_backward(runner, clips, masks, autocast)
            stay = sum(parts.values()) - (0 if gradients_stay(own, args) else parts["gradients"])
            parts |= {"activations": live.peak - stay, "gathered": live.gathered_at_peak, "step": live.peak}
            together = parts["gradients"] if own.processes > 1 and args.parallel == "replicate" else 0
            parts["update"] = live.bytes + together  # where training.average_gradients sums them
            del averages  # were alive until here
    rope_table.cache_clear()  # fake ones are of no use to others
    return parts


def micro_batches(own, args):
    """Of a step and process."""
    return args.batch_size // own.processes // args.micro_batch_size


def gradients_stay(own, args):
    """Whether p.grad is there from micro-batch to micro-batch, not only what a process has not yet given the others."""
    return micro_batches(own, args) > 1 and (own.processes == 1 or args.parallel == "replicate")


def peak(parts):
    return max(parts["step"], parts["update"])


def largest(drawn, stage):
    """The masks, of several micro-batches', that keep most: tokens x width x depth in the encoder and the predictor."""
    e, p = (config["width"] * config["depth"] for config in stage[:2])
    return max(drawn, key=lambda masks: sum(context * e + (context + targets) * p for context, targets in masks))


def print_paper(own, args, stage, masks):
    """A table of what one process needs, without and with --activation-checkpointing; and of what the peer needs."""
    columns = {"": on_paper(own, args, stage, masks, False), "checkpointed": on_paper(own, args, stage, masks, True)}
    if own.peer:
        columns["hf"] = on_paper(own, args, stage, masks, False, peer=True)
    teacher = "moving average" if own.kind == "ema" else f"frozen teacher ({args.dtype})"
    rows = {
        "weights": "weights (float32)",
        "gradients": "gradients (float32)",
        "optimizer": "AdamW's two averages (float32)",
        "teacher": f"{teacher}{'' if own.kind == 'ema' or own.shard_teacher else ', whole'}",
        "activations": "activations" + ("" if gradients_stay(own, args) else ", and gradients as they come"),
        "gathered": "  of which gathered weights",
        "step": "peak of forward and backward pass",
        "update": "peak of the update",
    }
    print(f"{own.processes} process(es) x {micro_batches(own, args)} micro-batch(es) "
          f"x {args.micro_batch_size} clips, {args.dtype} on {'a GPU' if args.device == 'cuda' else 'the CPU'}, eager; "
          f"masks: {', '.join(f'{c} + {t}' for c, t in masks)} tokens\n")  # fmt: skip
    print(f"{f'GiB per process, {own.kind}':40}" + "".join(f"{name:>14}" for name in columns))
    for part, label in rows.items():
        if columns[""][part]:
            print(f"{label:40}" + "".join(f"{column[part] / GIB:14.3f}" for column in columns.values()))
    print(f"{'needed':40}" + "".join(f"{peak(column) / GIB:14.3f}" for column in columns.values()))


# ---------------------------------------------------------------------------------------------------------------------
# in truth


def cpu_peak(run):
    """Call run(); the most bytes that torch's CPU allocator had given out at a time, by its reports to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"]
    reports = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    reports = [event["args"] for event in sorted(reports, key=lambda event: event["ts"])]
    start = reports[0]["Total Allocated"] - reports[0]["Bytes"]
    return max(report["Total Allocated"] for report in reports) - start


def gpu_peak(run):
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def in_truth(own, args, stage, flags):
    """Peak bytes of this process while the training script runs CHECKED_STEPS steps of at most two micro-batches."""
    rank, world = cli.rank_and_world()
    # one folder for the processes of a run
    folder = Path(tempfile.gettempdir(), f"salt-memory-{os.getppid() if world > 1 else os.getpid()}")
    folder.mkdir(exist_ok=True)
    script = Path(__file__).parents[1] / ("train_ema_baseline.py" if own.kind == "ema" else f"train_{own.kind}.py")
    argv = [
        str(script), *flags, f"--steps={CHECKED_STEPS}", "--warmup-steps=1", f"--batch-size={args.batch_size}",
        f"--micro-batch-size={args.micro_batch_size}", "--no-compile", "--log-every=1", f"--out={folder}/out",
        "--workers=1",  # made in this process, the built-in videos would count
    ]  # fmt: skip
    if own.kind == "student":
        config, file = stage[2], folder / f"teacher-{rank}.pt"
        torch.save({"format": CHECKPOINT_FORMAT, "kind": "teacher", "step": 0, "model": {"encoder": config},
                    "encoder": Encoder(**config).state_dict(), "args": {}}, file)  # fmt: skip
        argv += [f"--teacher={file}"] + ["--shard-teacher"] * own.shard_teacher
    try:
        with mock.patch.object(sys, "argv", argv):
            measure = gpu_peak if args.device == "cuda" else cpu_peak
            return measure(lambda: runpy.run_path(str(script), run_name="__main__"))
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def check(own, args, stage, grid, flags):
    """Compare, and say so; whether they agree."""
    rank, world = cli.rank_and_world()
    args.batch_size = min(args.batch_size, 2 * world * args.micro_batch_size)
    drawn = []
    for step in range(CHECKED_STEPS):
        for g in data.micro_batch_indices(args):
            rng, sizes = training.generator(args.seed, step, g), training.generator(args.seed, step)
            masks = masking.sample_masks(args.mask, grid, args.micro_batch_size, rng, args.mask_truncation, sizes)
            drawn.append([(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks])
    truth = in_truth(own, args, stage, flags)  # first: real process groups do not work after fake ones
    parts = on_paper(own, args, stage, largest(drawn, stage), args.activation_checkpointing)
    ratio = peak(parts) / truth
    print(f"process {rank} of {world}, {own.kind}, {args.dtype}, checkpointing {args.activation_checkpointing}: "
          f"paper {peak(parts) / GIB:.4f} GiB, truth {truth / GIB:.4f} GiB, ratio {ratio:.3f}")  # fmt: skip
    return abs(ratio - 1) <= TOLERANCE


def main():
    parser = cli.Parser(__doc__)
    flag = parser.add_argument_group("which run (the training scripts' flags apply too, see theirs)").add_argument
    flag("--kind", choices=("teacher", "student", "ema"), default="student", help="which training script")
    flag("--teacher", metavar="SIZE|RUN|FILE", help="of a student; its own architecture without")
    flag("--shard-teacher", action="store_true", help="as train_student.py's")
    flag("--processes", type=int, default=1, help="GPUs of the run")
    flag("--processes-per-node", type=int, default=8, help="for --hybrid")
    flag("--draws", type=int, default=100, help="of masks; the largest count")
    flag("--peer", choices=("hf",), help="the same step with transformers' VJEPA2Model, on paper")
    flag("--check", action="store_true", help="run the script here (under torchrun for several processes) and compare")
    own, flags = parser.parse_known_args()
    own.teacher_steps = 0  # flops.stages counts steps, too
    args = cli.training_flags(__doc__, out="out", steps=160_000).parse_args(flags)
    cli.require_at_least(own, 1, "processes", "processes_per_node", "draws")
    cli.require_at_least(args, 1, "batch_size")
    world = cli.rank_and_world()[1] if own.check else own.processes
    args.compile = False
    if own.check:
        cli.resolve_device(args)
    args.device = args.device or "cuda"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    share = args.batch_size // world
    if args.batch_size % world:
        cli.fail(f"--batch-size {args.batch_size} is not divisible by {world} processes")
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(share)
    if args.micro_batch_size < 1 or share % args.micro_batch_size:
        cli.fail(f"--micro-batch-size {args.micro_batch_size} does not divide {share} clips per process")
    if own.kind != "student" and (own.teacher or own.shard_teacher):
        cli.fail(f"--kind {own.kind} takes no --teacher: it has none that is frozen")
    if own.peer and (own.check or own.processes > 1):
        cli.fail("--peer is for paper and one process: nothing shards it")
    if own.check and own.processes > 1:
        cli.fail("--check runs on the processes that torchrun starts: --processes is for paper alone")
    if own.check:
        own.processes, own.processes_per_node = world, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.parallel == "hybrid" and own.processes % own.processes_per_node:
        cli.fail(f"--hybrid: {own.processes} processes are not whole nodes of {own.processes_per_node}")
    try:
        grid = cli.clip_grid(args)
        stage = flops.stages(own, args)[own.kind]
        if own.check:
            sys.exit(0 if check(own, args, stage, grid, flags) else 1)
        print_paper(own, args, stage, largest(flops.drawn_masks(args, grid, own.draws), stage))
    except (ImportError, OSError, ValueError) as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
