"""Benchmark of the training step: time in total and by part, compared to the device's peak and to a peer.

    python -m bench.step --kind teacher student ema --model vit_l --batch-size 24   # the paper's shapes, for a GPU
    python -m bench.step --peer hf --peer-compile --model vit_l --batch-size 24     # the same step by Hugging Face
    python -m bench.step --compile --peer eager --model vit_l --batch-size 24       # what torch.compile gains
    python -m bench.step --sharded --model vit_l --batch-size 24     # overhead of FSDP2 with a single process
    python -m bench.step --compiles 300 --model vit_ti               # count compilations and graph breaks in 300 steps

All flags of the training scripts apply. A step is the body of their loop, with their masks, losses and optimizer, on
random clips. Utilization is executed FLOP/s (flops.py, for the masks drawn) relative to the fastest square matrix
product measured in the same run. With OMP_NUM_THREADS=1 on a CPU, times are CPU time, so that other processes matter
less.

The peer, Hugging Face's VJEPA2Model, gets the same weights, clips, masks, loss, autocast and optimizer, and the two
take turns. Its own forward pass would encode all tokens and then drop the masked ones, which no V-JEPA training does.
So its layers are called on the context tokens only, without its sorting of tokens. Its predictor's last layer is
replaced by ours, which predicts pixels, or latents of any width.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import math
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import data
import flops
import train_ema_baseline
import train_student
import train_teacher
import training
from model import CHECKPOINT_FORMAT, SIZES, Encoder, Predictor, gather
from tools import convert

WARMUP_STEPS = 4  # before any timing: memory is allocated and blocks are compiled
MAX_COMPILATIONS = 4  # per function; beyond 8, torch stops compiling it
EMA_MOMENTUM = 0.99925  # V-JEPA 2's
ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

# ---------------------------------------------------------------------------------------------------------------------
# our step and the peer's
#
# `kind` is "teacher" (stage 1), "student" (stage 2) or "ema" (the baseline). `stage` is a value of `flops.stages`.


def allocated_memory(args):
    """Bytes of GPU memory in use; 0 on the CPU."""
    return torch.cuda.memory_allocated() if args.device == "cuda" else 0


class Ours:
    """Our networks with the training scripts' losses."""

    def __init__(self, kind, args, encoder, predictor, teacher):
        self.kind, self.args = kind, args
        self.encoder, self.predictor, self.teacher = encoder, predictor, teacher

    @classmethod
    def build(cls, kind, stage, args, weights=None, sharded=False, name="ours"):
        """Make the networks and the optimizer as the training script does.

        weights: what `weights()` returns; default: initialize. sharded: with FSDP2, as far as the script shards. name:
        for the printed results.
        """
        memory_before = allocated_memory(args)
        encoder_config, predictor_config, teacher_config, _ = stage
        with torch.device(args.device):
            encoder, predictor, teacher = Encoder(**encoder_config), Predictor(**predictor_config), None
            if kind == "student":
                teacher = Encoder(**teacher_config).requires_grad_(False).to(getattr(torch, args.dtype))
        if kind == "ema":
            teacher = copy.deepcopy(encoder).requires_grad_(False)
        self = cls(kind, args, encoder, predictor, teacher)
        self.stage, self.memory_before, self.name = stage, memory_before, name
        for name, network in self._networks().items():
            if weights:
                network.load_state_dict(weights[name])
            frozen = kind == "student" and name == "teacher"
            training.compile_and_shard(network, args, sharded and not frozen)
        self.optimizer = training.make_optimizer([encoder, predictor], args)
        return self

    def _networks(self):
        networks = {"encoder": self.encoder, "predictor": self.predictor, "teacher": self.teacher}
        return {name: network for name, network in networks.items() if network is not None}

    def weights(self):
        """Copies of the weights on the CPU, as {name of the network: state dict}."""
        return {name: cpu_weights(network) for name, network in self._networks().items()}

    def latents(self, clips):
        return train_student.latent_targets(self.teacher, clips)

    def loss(self, targets, clips, mask):
        loss = train_student.latent_loss
        if self.kind == "teacher":
            loss = train_teacher.pixel_loss
        return loss(self.encoder, self.predictor, targets, clips, mask)[0]


class HuggingFace:
    """The same losses with transformers' networks. student: a VJEPA2Model; teacher: an encoder of one, or None."""

    def __init__(self, kind, args, student, teacher):
        self.kind, self.args = kind, args
        self.encoder, self.predictor, self.teacher = student.encoder, student.predictor, teacher
        if teacher is not None:
            teacher.requires_grad_(False)

    @classmethod
    def build(cls, ours, weights, compiled):
        """Make the counterpart of `ours`, an `Ours`, with these weights."""
        args, memory_before = ours.args, allocated_memory(ours.args)
        student = hf_model(ours.encoder.config, weights["encoder"], ours.predictor.config, weights["predictor"])
        teacher = None
        if ours.teacher is not None:
            teacher = hf_model(ours.teacher.config, weights["teacher"]).encoder.to(args.device)
        if ours.kind == "student":  # frozen, so ours is in this type, too
            teacher.to(getattr(torch, args.dtype))
        self = cls(ours.kind, args, student.to(args.device), teacher)
        self.stage, self.memory_before, self.name = ours.stage, memory_before, "hf eager"
        if compiled:
            self.name = "hf compiled"
            layers = [*self.encoder.layer, *self.predictor.layer]
            if teacher is not None:
                layers += teacher.layer
            for layer in layers:
                layer.compile()
        self.optimizer = training.make_optimizer([student], args)
        return self

    @torch.no_grad()
    def latents(self, clips):
        latents = self.teacher(clips.transpose(1, 2)).last_hidden_state.float()  # it takes (B, T, 3, H, W)
        return F.layer_norm(latents, latents.shape[-1:])

    def loss(self, targets, clips, mask):
        x = gather(self.encoder.embeddings(clips.transpose(1, 2)), mask.context_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask.context_ids)[0]
        context = self.encoder.layernorm(x)
        x, ids = self.predictor.embeddings(context, [mask.context_ids], [mask.target_ids], mask.index)
        for layer in self.predictor.layer:
            x = layer(x, ids)[0]
        predicted = self.predictor.proj(self.predictor.layernorm(x)[:, mask.context_ids.shape[1] :])
        error = predicted.float() - gather(targets, mask.target_ids)
        if self.kind == "teacher":
            return error.square().mean()
        return error.abs().mean()


def hf_model(encoder, weights, predictor=None, predictor_weights=None):
    """A VJEPA2Model with our weights, made by convert.py. Without a predictor of ours, its own stays empty.

    encoder, predictor: configs; weights, predictor_weights: state dicts.
    """
    checkpoint = {"format": CHECKPOINT_FORMAT, "model": {"encoder": encoder}, "encoder": weights}
    if predictor:  # convert.py only takes predictors whose output is as wide as the encoder, so replace the last layer
        width = encoder["width"]
        blank = {"proj.weight": torch.zeros(width, predictor["width"]), "proj.bias": torch.zeros(width)}
        checkpoint["model"]["predictor"] = predictor | {"out_width": width}
        checkpoint["predictor"] = predictor_weights | blank
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        torch.save(checkpoint, f"{folder}/checkpoint.pt")
        model, hf_weights = convert.to_hf(folder)
    model.load_state_dict(hf_weights, strict=predictor is not None, assign=True)
    if predictor:
        model.predictor.proj = torch.nn.Linear(predictor["width"], predictor["out_width"], device="meta")
        proj = {name: predictor_weights[f"proj.{name}"].clone() for name in ("weight", "bias")}
        model.predictor.proj.load_state_dict(proj, assign=True)
    return model.train()


def cpu_weights(network):
    """A copy of the network's state dict on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def targets(runner, clips):
    """What the predictor should predict, for all tokens: pixels for a teacher, otherwise the teacher's latents."""
    if runner.kind == "teacher":
        return train_teacher.pixel_targets(clips, runner.args.tubelet_size, runner.args.patch_size)
    return runner.latents(clips)


def mark_nothing(part):
    pass


def training_step(runner, step, clips, mark=mark_nothing):
    """One step of the training scripts' loop. Returns loss and gradient norm.

    runner: an `Ours` or a `HuggingFace`. clips: uint8, used for every micro-batch. mark: called with the name of a part
    of the step where that part begins.
    """
    args, micro_batches = runner.args, data.micro_batch_indices(runner.args)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    training.set_schedules(runner.optimizer, step, args)
    loss = 0.0
    for g in micro_batches:
        training.set_last_micro_batch((runner.encoder, runner.predictor), g == micro_batches[-1])
        normalized = data.normalize(clips, torch.device(args.device))
        masks = train_student.draw_masks(args, step, g)
        with autocast:
            all_targets = targets(runner, normalized)
        for mask in masks:
            with autocast:
                mask_loss = runner.loss(all_targets, normalized, mask)
            mask_loss = mask_loss / (len(masks) * len(micro_batches))
            mask_loss.backward()
            mark("rest")
            loss += mask_loss.detach()
    mark("optimizer")
    loss, grad_norm = training.optimizer_step(runner.optimizer, loss, args)
    if runner.kind == "ema":
        mark("moving average")
        train_ema_baseline.update_teacher(runner.teacher, runner.encoder, EMA_MOMENTUM)
    mark("rest")
    return loss, grad_norm


def executed_flops(stage, args, steps):
    """Total FLOPs of these steps, for the masks they draw."""
    encoder, predictor, teacher, _ = stage
    num_tokens = math.prod(cli.clip_grid(args))
    total = 0
    for step, g in itertools.product(steps, data.micro_batch_indices(args)):
        masks = train_student.draw_masks(args, step, g)
        counts = [(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks]
        total += args.micro_batch_size * flops.step_flops(encoder, predictor, counts, teacher, num_tokens)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# timing


@dataclasses.dataclass
class Result:
    """What was measured of a runner."""

    loss: float  # of the first step
    grad_norm: float  # of the first step
    memory: int  # peak bytes: GPU memory of this runner, or resident memory of the process on the CPU
    seconds: list  # per step, one value for each round


def random_clips(args):
    """A micro-batch of random uint8 clips (B, 3, T, H, W), in pinned memory if they go to a GPU."""
    shape = args.micro_batch_size, 3, args.num_frames, args.resolution, args.resolution
    clips = torch.randint(256, shape).to(torch.uint8)
    return clips.pin_memory() if args.device == "cuda" else clips


def now(args):
    """Current time in seconds, after synchronizing the device; CPU time if single-threaded on the CPU."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds_per_step(runner, steps, clips):
    """Run these steps; returns the mean time of a step."""
    start = now(runner.args)
    for step in steps:
        training_step(runner, step, clips)
    return (now(runner.args) - start) / len(steps)


def warm_up(runner, clips):
    """Run the first steps, untimed. Returns a `Result` without times."""
    if runner.args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss, grad_norm = training_step(runner, 0, clips)
    for step in range(1, WARMUP_STEPS):
        training_step(runner, step, clips)
    memory = training.peak_memory(torch.device(runner.args.device)) - runner.memory_before
    return Result(loss.item(), grad_norm.item(), memory, [])


def matmul_peak(args):
    """FLOP/s of the fastest of several square matrix products in --dtype on this device."""
    if args.device == "cuda":
        sizes, flops_per_timing = (4096, 8192, 16384), 4e13
    else:
        sizes, flops_per_timing = (512, 1024, 2048), 0
    peak = 0.0
    for n in sizes:
        a, b = torch.randn(2, n, n, device=args.device, dtype=getattr(torch, args.dtype))
        a @ b  # warm up
        count = max(1, round(flops_per_timing / (2 * n**3)))
        for _ in range(3):
            start = now(args)
            for _ in range(count):
                a @ b
            peak = max(peak, count * 2 * n**3 / (now(args) - start))
    return peak


class MarkedNetwork:
    """A network that calls mark(part) when its forward pass or its backward pass begins.

    The forward pass ends with mark("rest"). The backward pass begins when the output's gradient is ready. It ends where
    the next part begins, because autograd runs the parts in reverse order.
    """

    def __init__(self, network, part, mark):
        self.network, self.part, self.mark = network, part, mark

    def __getattr__(self, name):
        return getattr(self.network, name)

    def __call__(self, *inputs):
        self.mark(self.part)
        out = self.network(*inputs)
        if out.requires_grad:
            out.register_hook(lambda grad: self.mark(self.part))
        self.mark("rest")
        return out


def seconds_by_part(ours, steps, clips):
    """The mean time of a step, divided into {part: seconds}. The parts add up to the whole step."""
    args, marks, seconds = ours.args, [], {}

    def mark(part):
        if args.device == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = now(args)
        marks.append((part, moment))

    def elapsed(start, end):
        if args.device == "cuda":
            return start.elapsed_time(end) / 1e3
        return end - start

    marked = copy.copy(ours)
    for part in ("teacher", "encoder", "predictor"):
        network = getattr(ours, part)
        if network is not None:
            setattr(marked, part, MarkedNetwork(network, part, mark))
    for step in steps:
        marks.clear()
        mark("rest")
        training_step(marked, step, clips, mark)
        now(args)  # wait for the GPU
        for (part, start), (_, end) in itertools.pairwise(marks):
            seconds[part] = seconds.get(part, 0.0) + elapsed(start, end) / len(steps)
    return seconds


def build_runners(kind, stage, args):
    """Yield ours and the others that the flags name, all with the same weights.

    One at a time, so that the caller can measure the memory of each before the next one is built.
    """
    ours = Ours.build(kind, stage, args)
    weights = ours.weights()
    yield ours
    if args.sharded:
        yield Ours.build(kind, stage, args, weights, sharded=True, name="ours, sharded")
    if args.peer == "eager":
        eager = argparse.Namespace(**vars(args) | {"compile": False})
        yield Ours.build(kind, stage, eager, weights, name="ours, eager")
    if args.peer == "hf":
        yield HuggingFace.build(ours, weights, compiled=False)
        if args.peer_compile:
            yield HuggingFace.build(ours, weights, compiled=True)


def time_kind(kind, args):
    """Time and print the steps of one kind, ours and the others' in turn. Returns whether all first losses agree."""
    torch._dynamo.reset()  # because torch limits the compilations of a function over all networks of a process
    stage, clips = flops.stages(args)[kind], random_clips(args)
    print(
        f"\n{kind}, {args.num_frames} frames of {args.resolution}x{args.resolution}, encoder of width "
        f"{stage[0]['width']} and depth {stage[0]['depth']}, {args.batch_size} clips in micro-batches of "
        f"{args.micro_batch_size}, {args.dtype}, {'compiled' if args.compile else 'eager'}"
    )
    runners, results = [], []
    for runner in build_runners(kind, stage, args):
        runners.append(runner)
        results.append(warm_up(runner, clips))

    peak, step_flops = matmul_peak(args), []
    for first in range(WARMUP_STEPS, WARMUP_STEPS + args.rounds * args.round_steps, args.round_steps):
        steps = range(first, first + args.round_steps)
        step_flops.append(executed_flops(stage, args, steps) / len(steps))
        for runner, result in zip(runners, results, strict=True):
            result.seconds.append(seconds_per_step(runner, steps, clips))
    peak = max(peak, matmul_peak(args))

    print(
        f"{args.rounds} rounds of {args.round_steps} steps, in turn; median (fastest to slowest round); peak: "
        f"{peak / 1e12:.4g} TFLOP/s, the fastest matrix product"
    )
    for runner, result in zip(runners, results, strict=True):
        print_speed(runner, result, step_flops, peak)
        if runner is not runners[0]:
            print_comparison(result, results[0], args)
    parts = seconds_by_part(runners[0], steps, clips)
    total = sum(parts.values())
    shares = [f"{part} {s / total:.1%}" for part, s in sorted(parts.items(), key=lambda item: -item[1])]
    print(f"parts of our step: {', '.join(shares)} of {1e3 * total:.1f} ms")
    return all(same_loss(result, results[0], args) for result in results)


def print_speed(runner, result, step_flops, peak):
    """Print a runner's speed and memory. step_flops: FLOPs of a step, one value for each round."""
    args = runner.args
    rate = statistics.median(f / s for f, s in zip(step_flops, result.seconds, strict=True))
    line = (
        f"{runner.name:13} {spread([1e3 * s for s in result.seconds], '.1f')} ms, "
        f"{args.batch_size / statistics.median(result.seconds):.3g} clips/s, {rate / 1e12:.4g} TFLOP/s = "
        f"{rate / peak:.0%} of the peak"
    )
    if args.device == "cuda" or runner.name == "ours":  # on the CPU, the process's memory includes earlier runners
        line += f", {result.memory / 2**30:.2f} GiB"
    print(line)


def print_comparison(result, our_result, args):
    """Print how a runner's first loss and its time differ from ours."""
    off = abs(result.loss / our_result.loss - 1)
    norm_off = abs(result.grad_norm / our_result.grad_norm - 1)
    verdict = "" if same_loss(result, our_result, args) else ": NOT THE SAME COMPUTATION"
    ratios = [theirs / ours for ours, theirs in zip(our_result.seconds, result.seconds, strict=True)]
    print(
        f"{'':13} first loss {result.loss:.6g}, relative difference from ours {off:.1e}; gradient norm {norm_off:.1e}"
        f"{verdict}\n{'':13} takes {spread(ratios, '.2f')} times as long as ours"
    )


def same_loss(result, our_result, args):
    """Whether a first loss equals ours up to rounding errors."""
    tolerance = 1e-2 if args.dtype == "bfloat16" else 1e-4
    return abs(result.loss / our_result.loss - 1) <= tolerance


def spread(values, form):
    """Format values as 'median (lowest to highest)'."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# ---------------------------------------------------------------------------------------------------------------------
# compilations


def count_compilations(kind, args):
    """Train for --compiles steps and print the compilations of each function, with their reasons, and graph breaks.

    Returns whether there is no graph break and no function is compiled more than MAX_COMPILATIONS times.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    clips, ours = random_clips(args), Ours.build(kind, flops.stages(args)[kind], args)
    masks = train_student.draw_masks(args, training.FIXED_BATCH_SEED, 0)
    fixed = training.FixedBatch(clips, masks, held_out=True)
    with torch.compiler.set_stance("default", force_backend=args.compile_backend):
        for step in range(args.compiles):
            training_step(ours, step, clips)
            if (step + 1) % args.log_every == 0:
                evaluate_fixed_batch(ours, fixed)
    reasons = compilation_reasons()
    graph_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(f"{kind}: {args.compiles} steps, {graph_breaks} graph breaks")
    for function, function_reasons in reasons.items():
        print(f"  {function}: {len(function_reasons)} compilations")
        for reason in function_reasons:
            print(f"      {reason}")
    return graph_breaks == 0 and max(map(len, reasons.values())) <= MAX_COMPILATIONS


def evaluate_fixed_batch(ours, fixed):
    """Compute the metrics of a fixed batch, as the training scripts do whenever they log."""
    args = ours.args
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if ours.kind == "teacher":
        train_teacher.fixed_batch_metrics(ours.encoder, ours.predictor, fixed, args, autocast)
    else:
        train_student.fixed_batch_metrics(ours.teacher, ours.encoder, ours.predictor, fixed, args, autocast)


def compilation_reasons():
    """Why torch compiled, since its metrics were last cleared: {"file:line function": [reason, ...]}."""
    reasons = {}
    for metrics in torch._dynamo.utils.get_compilation_metrics():
        if metrics.co_name and metrics.compile_id:
            function = f"{os.path.basename(metrics.co_filename)}:{metrics.co_firstlineno} {metrics.co_name}"
            reason = metrics.fail_reason or (metrics.recompile_reason or "first").splitlines()[0]
            reasons.setdefault(function, []).append(reason)
    return reasons


# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def single_process_group(args):
    """A process group with this process only, set up as under torchrun."""
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def prefer_attention(name):
    """A context in which torch uses this attention kernel wherever it can."""
    others = [kernel for other, kernel in ATTENTION_KERNELS.items() if other != name]
    return sdpa_kernel([ATTENTION_KERNELS[name], *others, SDPBackend.MATH], set_priority=True)


def parse_args():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    parser.set_defaults(batch_size=24, teacher_steps=80_000)  # flops.stages needs teacher_steps; times do not
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--kind", nargs="+", choices=("teacher", "student", "ema"), default=["student"], help="which training steps")
    flag("--teacher", metavar="SIZE", choices=SIZES, help="teacher of the student; default: the student's size")
    flag("--rounds", type=int, default=5, help="number of times that ours and the others take turns")
    flag("--round-steps", type=int, default=4, help="steps per turn")
    flag("--peer", choices=("hf", "eager"), help="also time transformers' VJEPA2Model, or ours without --compile")
    flag("--peer-compile", action="store_true", help="also time the peer with compiled layers")
    flag("--sharded", action="store_true", help="also time ours under FSDP2, with a single process")
    flag("--attention", choices=ATTENTION_KERNELS, help="attention kernel to prefer, on a GPU; default: torch's choice")
    flag("--compiles", type=int, metavar="STEPS", help="count the compilations in that many steps, and time nothing")
    flag("--compile-backend", default="aot_eager", help="backend for --compiles; training uses inductor")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "rounds", "round_steps")
    if args.compiles:
        args.compile = True
    training.setup(args, stage=2)
    if args.peer == "eager" and not args.compile:
        cli.fail("--peer eager compares with a compiled step: add --compile")
    return args


def main():
    args = parse_args()
    kinds = list(dict.fromkeys(args.kind))
    try:
        with contextlib.ExitStack() as contexts:
            if args.attention:
                contexts.enter_context(prefer_attention(args.attention))
            if args.sharded:
                contexts.enter_context(single_process_group(args))
            if args.compiles:
                few = [count_compilations(kind, args) for kind in kinds]
                sys.exit(0 if all(few) else 1)
            agree = [time_kind(kind, args) for kind in kinds]
    except (ImportError, ValueError) as error:
        cli.fail(str(error))
    if not all(agree):
        cli.fail("the first losses differ, so the others computed something else and their times mean nothing")


if __name__ == "__main__":
    main()
