"""The training step: how fast it is, in its parts, against the device's limit and against Hugging Face's V-JEPA 2.

    python bench.py step --kind teacher student ema --model vit_l --batch-size 24     # paper's shapes, for a GPU
    python bench.py step --peer hf --peer-compile --model vit_l --batch-size 24
    python bench.py step --sharded --model vit_l --batch-size 24     # what FSDP2 costs where there is nothing to share
    python bench.py step --sweep --time-budget 480           # over sizes, frames, resolutions, batches; paper runs
    python bench.py step --compiles 300 --model vit_ti       # compilations and graph breaks over 300 steps

Every flag of the training scripts applies; their loss functions, optimizer and masks are what is timed, micro-batches
included, on random clips. Utilization is executed FLOP/s (flops.py, for the masks drawn) over the best square matrix
product of the same dtype that this device computes in the same run. Shares come from separate steps with time stamps
where one part ends and the next begins, forward and backward, so that they add up to the whole step. With
OMP_NUM_THREADS=1 on a CPU the seconds are the process's own, whatever else the machine does.

The peer is given the same weights, clips, masks, loss, autocast and optimizer, and turns are taken. Its own
VJEPA2Model.forward runs the encoder over all tokens and drops the masked ones afterwards, which no V-JEPA training
does; here its layers are driven with the context tokens alone, and it is spared the sorting of tokens. Its predictor
gets our last layer, which may predict pixels or the latents of a teacher of another width.
"""

import contextlib
import copy
import gc
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import data
import flops
import masking
import train_ema_baseline
import train_student
import train_teacher
import training
from model import CHECKPOINT_FORMAT, SIZES, Encoder, Predictor, gather
from tools import convert

WARMUP = {False: 2, True: 4}  # steps before any timing: allocation; of compiled ones: compilation
FIRST = max(WARMUP.values())  # step that is timed
MAX_COMPILATIONS = 4  # of one function; beyond 8 torch gives up and runs it uncompiled
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def flags(parser):
    """The subcommand's own flags; those of the training scripts apply as well."""
    flag = parser.add_argument
    flag("--kind", nargs="+", choices=("teacher", "student", "ema"), default=["student"], help="whose step")
    flag("--teacher", metavar="SIZE", choices=SIZES, help="of the SALT student; its own architecture without")
    flag("--rounds", type=int, default=5, help="turns of ours and the peer's")
    flag("--round-steps", type=int, default=4, help="steps of a turn")
    flag("--peer", choices=("hf",), help="time transformers.VJEPA2Model in turn")
    flag("--peer-compile", action="store_true", help="the peer's compiled layers as well")
    flag("--sharded", action="store_true", help="time ours under FSDP2 with this one process in turn")
    flag("--attention", choices=ATTENTION, help="the kernel to prefer to torch's choice, on a GPU")
    flag("--sweep", action="store_true", help="tables of cost growth and of the paper's runs")
    flag("--compiles", type=int, metavar="STEPS", help="count compilations over so many steps, and time nothing")
    flag("--compile-backend", default="aot_eager", help="for --compiles; inductor is what training uses")
    flag("--time-budget", type=float, default=480, help="seconds for --sweep; what does not fit is extrapolated")
    flag("--sizes", nargs="+", choices=SIZES, default=["vit_l", "vit_h", "vit_g", "vit_G"], help="for --sweep")


# ---------------------------------------------------------------------------------------------------------------------
# our step and the peer's


def allocated(args):
    """Bytes of the GPU in use."""
    return torch.cuda.memory_allocated() if args.device == "cuda" else 0


class Ours:
    """The training scripts' losses on these networks."""

    def __init__(self, kind, args, encoder, predictor, teacher):
        self.kind, self.args = kind, args
        self.encoder, self.predictor, self.teacher = encoder, predictor, teacher

    @classmethod
    def build(cls, kind, stage, args, weights=None, sharded=False):
        """Networks and optimizer as this kind's training script makes them; freshly initialized without weights."""
        allocated_before = allocated(args)
        encoder, predictor, teacher, _ = stage
        with torch.device(args.device):
            networks = {"encoder": Encoder(**encoder), "predictor": Predictor(**predictor), "teacher": None}
            if kind == "student":
                networks["teacher"] = Encoder(**teacher).requires_grad_(False).to(getattr(torch, args.dtype))
        if kind == "ema":
            networks["teacher"] = copy.deepcopy(networks["encoder"]).requires_grad_(False)
        for name, network in networks.items():
            if not network:
                continue
            if weights:
                network.load_state_dict(weights[name])
            training.prepare(network, args, sharded and not (name == "teacher" and kind == "student"))
        self = cls(kind, args, **networks)
        self.name, self.compiled = "ours, sharded" if sharded else "ours", args.compile
        self.stage, self.allocated_before = stage, allocated_before
        self.optimizer = training.make_optimizer([self.encoder, self.predictor], args)
        return self

    def weights(self):
        """Copies of them on the CPU, {name: state dict, or None}: what `build` takes."""
        return {name: cpu_copy(getattr(self, name)) for name in ("encoder", "predictor", "teacher")}

    def latents(self, clips):
        return train_student.latent_targets(self.teacher, clips)

    def loss(self, targets, clips, mask, i):
        loss = train_teacher.pixel_loss if self.kind == "teacher" else train_student.latent_loss
        return loss(self.encoder, self.predictor, targets, clips, mask, i)[0]


class HuggingFace:
    """The same losses on transformers' networks: the student's VJEPA2Model and the teacher's encoder."""

    def __init__(self, kind, args, student, teacher):
        self.kind, self.args = kind, args
        self.encoder, self.predictor = student.encoder, student.predictor
        self.teacher = teacher and teacher.requires_grad_(False)

    @classmethod
    def build(cls, ours, weights, compiled):
        """With the weights of `ours`."""
        allocated_before = allocated(ours.args)
        student = hf_model(ours.encoder.config, weights["encoder"], ours.predictor.config, weights["predictor"])
        teacher = hf_model(ours.teacher.config, weights["teacher"]).encoder if ours.teacher else None
        self = cls(ours.kind, ours.args, student, teacher)
        if ours.kind == "student":  # frozen, hence as ours
            teacher.to(getattr(torch, ours.args.dtype))
        for network in filter(None, (self.encoder, self.predictor, self.teacher)):
            network.to(ours.args.device)
            for layer in network.layer if compiled else ():
                layer.compile()
        self.name, self.compiled = f"hf {'compiled' if compiled else 'eager'}", compiled
        self.stage, self.allocated_before = ours.stage, allocated_before
        self.optimizer = training.make_optimizer([student], ours.args)
        return self

    @torch.no_grad()
    def latents(self, clips):
        latents = self.teacher(clips.transpose(1, 2)).last_hidden_state.float()  # it takes (B, T, 3, H, W)
        return F.layer_norm(latents, latents.shape[-1:])

    def loss(self, targets, clips, mask, i):
        x = gather(self.encoder.embeddings(clips.transpose(1, 2)), mask.context_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask.context_ids)[0]
        context = self.encoder.layernorm(x)
        x, ids = self.predictor.embeddings(context, [mask.context_ids], [mask.target_ids], i)
        for layer in self.predictor.layer:
            x = layer(x, ids)[0]
        predicted = self.predictor.proj(self.predictor.layernorm(x)[:, mask.context_ids.shape[1] :])
        off = predicted.float() - gather(targets, mask.target_ids)
        return (off.square() if self.kind == "teacher" else off.abs()).mean()


def hf_model(encoder, weights, predictor=None, predictor_weights=None):
    """A VJEPA2Model with our weights, of which convert.py makes it; its predictor stays empty without ours."""
    checkpoint = {"format": CHECKPOINT_FORMAT, "model": {"encoder": encoder}, "encoder": weights}
    if predictor:  # one that convert.py takes: of the encoder's width
        width = encoder["width"]
        blank = {"proj.weight": torch.zeros(width, predictor["width"]), "proj.bias": torch.zeros(width)}
        checkpoint["model"]["predictor"] = predictor | {"out_width": width}
        checkpoint["predictor"] = predictor_weights | blank
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        torch.save(checkpoint, f"{folder}/checkpoint.pt")
        model, theirs = convert.to_hf(folder)
    model.load_state_dict(theirs, strict=predictor is not None, assign=True)
    if predictor:
        model.predictor.proj = torch.nn.Linear(predictor["width"], predictor["out_width"], device="meta")
        proj = {name: predictor_weights[f"proj.{name}"].clone() for name in ("weight", "bias")}
        model.predictor.proj.load_state_dict(proj, assign=True)
    return model.train()


def drawn(args, number, g=0):
    """The masks of micro-batch g of a step, as the training scripts draw them."""
    grid = cli.clip_grid(args)
    rng, sizes = training.generator(args.seed, number, g), training.generator(args.seed, number)
    return masking.sample_masks(args.mask, grid, args.micro_batch_size, rng, args.mask_truncation, sizes), grid


def executed(stage, args, numbers):
    """FLOPs of these steps, for the masks they draw."""
    encoder, predictor, teacher, _ = stage
    total = 0
    for number, g in itertools.product(numbers, range(args.batch_size // args.micro_batch_size)):
        masks, grid = drawn(args, number, g)
        counts = [(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks]
        total += args.micro_batch_size * flops.step_flops(encoder, predictor, counts, teacher, math.prod(grid))
    return total


def targets(runner, clips):
    """What the predictor is to predict, for all tokens: pixels in stage 1, the teacher's latents in the others."""
    if runner.kind == "teacher":
        return train_teacher.pixel_targets(clips, runner.args.tubelet_size, runner.args.patch_size)
    return runner.latents(clips)


def ignore(part):
    pass


def one_step(runner, number, clips, mark=ignore):
    """The loop's body of the training scripts: step `number` on uint8 clips. Returns loss and gradient norm."""
    args, loss = runner.args, 0.0
    micro_batches = args.batch_size // args.micro_batch_size
    for g in range(micro_batches):
        training.last_micro_batch((runner.encoder, runner.predictor), g == micro_batches - 1)
        masks = [mask.to(args.device) for mask in drawn(args, number, g)[0]]
        normalized = data.normalize(clips, torch.device(args.device))
        autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
        with autocast:
            wanted = targets(runner, normalized)
        for i, mask in enumerate(masks):
            with autocast:
                mask_loss = runner.loss(wanted, normalized, mask, i) / (len(masks) * micro_batches)
            mask_loss.backward()
            mark("rest")
            loss += mask_loss.detach()
    mark("optimizer")
    loss, norm = training.update(runner.optimizer, loss, args)
    if runner.kind == "ema":
        mark("moving average")
        train_ema_baseline.follow(runner.teacher, runner.encoder, 0.99925)
    mark("rest")
    return loss, norm


# ---------------------------------------------------------------------------------------------------------------------
# timing


def random_clips(args):
    clips = torch.randint(256, (args.micro_batch_size, 3, args.num_frames, args.resolution, args.resolution))
    clips = clips.to(torch.uint8)
    return clips.pin_memory() if args.device == "cuda" else clips


def now(args):
    """Seconds, when the device has done what it was given; of one thread on the CPU, those that it ran."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def turn(runner, numbers, clips):
    """Seconds of these steps."""
    start = now(runner.args)
    for number in numbers:
        one_step(runner, number, clips)
    return now(runner.args) - start


def warm_up(runner, clips):
    """The first step's loss and gradient norm; and bytes that this runner needs at most, on the CPU the process."""
    gpu = runner.args.device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    first, *_ = [one_step(runner, number, clips) for number in range(WARMUP[runner.compiled])]
    return [x.item() for x in first], training.peak_memory(torch.device(runner.args.device)) - runner.allocated_before


def matmul_ceiling(args):
    """FLOP/s of the best of several square matrix products in --dtype."""
    best = 0.0
    for n in (4096, 8192, 16384) if args.device == "cuda" else (512, 1024, 2048):
        a, b = torch.randn(2, n, n, device=args.device, dtype=getattr(torch, args.dtype))
        a @ b
        for _ in range(3):
            start, count = now(args), max(1, round(2e13 / n**3) if args.device == "cuda" else 1)
            for _ in range(count):
                a @ b
            best = max(best, count * 2 * n**3 / (now(args) - start))
    return best


class Stamped:
    """A network that marks where its part of the step begins: when it is called, and when its output has its gradient.

    Autograd runs what was computed last first, so a part's backward pass lasts until the next mark: `shares`.
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


def shares(ours, numbers, clips):
    """{part: seconds} of a step, the mean of these; all moments of a step belong to one part."""
    gpu, stamps, seconds = ours.args.device == "cuda", [], {}

    def mark(part):
        stamps.append((part, torch.cuda.Event(enable_timing=True) if gpu else now(ours.args)))
        if gpu:
            stamps[-1][1].record()

    stamped = copy.copy(ours)
    for part in ("teacher", "encoder", "predictor"):
        if getattr(ours, part) is not None:
            setattr(stamped, part, Stamped(getattr(ours, part), part, mark))
    for number in numbers:
        mark("rest")
        one_step(stamped, number, clips, mark)
        now(ours.args)
        for (part, start), (_, end) in itertools.pairwise(stamps):
            elapsed = start.elapsed_time(end) / 1e3 if gpu else end - start
            seconds[part] = seconds.get(part, 0.0) + elapsed / len(numbers)
        stamps.clear()
    return seconds


def spread(values, form):
    """median (lowest to highest)"""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def time_kind(kind, own, args):
    """Time one kind's steps, in turn with the others asked for; print all about them. Whether all computed the same."""
    torch._dynamo.reset()  # the limit of compilations is for all networks of a process together
    stage, clips = flops.stages(own, args)[kind], random_clips(args)
    ours = Ours.build(kind, stage, args)
    initial = ours.weights()
    print(f"\n{kind}, {args.num_frames} frames of {args.resolution}x{args.resolution}, encoder of width "
          f"{stage[0]['width']} and depth {stage[0]['depth']}, {args.batch_size} clips in micro-batches of "
          f"{args.micro_batch_size}, {args.dtype}, {'compiled' if args.compile else 'eager'}")  # fmt: skip
    runners, firsts = [ours], [warm_up(ours, clips)]
    if own.sharded:
        runners.append(Ours.build(kind, stage, args, initial, sharded=True))
        firsts.append(warm_up(runners[-1], clips))
    for compiled in [False, True][: 1 + own.peer_compile] if own.peer else []:
        runners.append(HuggingFace.build(ours, initial, compiled))
        firsts.append(warm_up(runners[-1], clips))
    ceiling, work, times = matmul_ceiling(args), [], {runner.name: [] for runner in runners}
    for first in range(0, own.rounds * own.round_steps, own.round_steps):
        numbers = range(FIRST + first, FIRST + first + own.round_steps)
        work.append(executed(stage, args, numbers) / own.round_steps)
        for runner in runners:
            times[runner.name].append(turn(runner, numbers, clips) / own.round_steps)
    ceiling, agreed = max(ceiling, matmul_ceiling(args)), True
    print(f"{own.rounds} rounds of {own.round_steps} steps each in turn, median (lowest to highest round); "
          f"the best matrix product: {ceiling / 1e12:.4g} TFLOP/s")  # fmt: skip
    for runner, ((loss, norm), memory) in zip(runners, firsts, strict=True):
        seconds = times[runner.name]
        rate = statistics.median(w / s for w, s in zip(work, seconds, strict=True))
        on_cpu = args.device == "cpu" and runner is not ours  # the process's peak says nothing about the second one
        print(f"{runner.name:13} {spread([1e3 * s for s in seconds], '.1f')} ms, "
              f"{args.batch_size / statistics.median(seconds):.3g} clips/s, {rate / 1e12:.4g} TFLOP/s = "
              f"{rate / ceiling:.0%} of it" + ("" if on_cpu else f", {memory / 2**30:.2f} GiB"))  # fmt: skip
        if runner is not ours:
            agreed &= agrees(loss, norm, *firsts[0][0], args)
            print(f"{'':13} takes {spread([b / a for a, b in zip(times['ours'], seconds, strict=True)], '.2f')} times "
                  "as long as ours")  # fmt: skip
    parts = shares(ours, numbers, clips)
    whole = sum(parts.values())
    print("shares: " + ", ".join(f"{part} {s / whole:.1%}" for part, s in sorted(parts.items(), key=lambda x: -x[1])),
          f"of {1e3 * whole:.1f} ms")  # fmt: skip
    return agreed


def cpu_copy(network):
    return network and {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def agrees(loss, norm, our_loss, our_norm, args):
    """Whether a first loss is ours, within rounding; says how far off it is."""
    off, norm_off = abs(loss / our_loss - 1), abs(norm / our_norm - 1)
    same = off <= (1e-2 if args.dtype == "bfloat16" else 1e-4)
    print(f"{'':13} first loss {loss:.6g}, {off:.1e} off ours; gradient norm {norm_off:.1e} off"
          f"{'' if same else ': NOT THE SAME COMPUTATION'}")  # fmt: skip
    return same


# ---------------------------------------------------------------------------------------------------------------------
# growth of the cost


SALT_TEACHER = ("teacher", "vit_l", 224, 80_000)
PAPER_RUNS = [  # paper table 11: run, [(kind, size, resolution, steps)], hours of one A100
    ("V-JEPA 2 L", [("ema", "vit_l", 256, 240_000)], 9800),
    ("V-JEPA 2 H", [("ema", "vit_h", 256, 240_000)], 14377),
    ("V-JEPA 2 g", [("ema", "vit_g", 256, 240_000)], 18708),
    ("SALT L", [SALT_TEACHER, ("student", "vit_l", 224, 160_000)], 8263),
    ("SALT H", [SALT_TEACHER, ("student", "vit_h", 224, 160_000)], 9574),
    ("SALT g", [SALT_TEACHER, ("student", "vit_g", 224, 160_000)], 10476),
    ("SALT G", [SALT_TEACHER, ("student", "vit_G", 224, 160_000)], 12379),
]


class Cell(NamedTuple):
    """What the sweep times: a kind of step and its shapes. `teacher`: size of the student's, "" for the others."""

    kind: str
    model: str
    frames: int
    resolution: int
    batch: int
    teacher: str


class Cost(NamedTuple):
    flops: float  # of a step
    seconds: float | None = None  # None: not measured
    memory: float | None = None  # bytes
    why: str = ""  # it was not measured


def cell_args(cell, own, args):
    """The flags of a cell's training script, and `flops.stages`'s stage of it."""
    args, own = copy.copy(args), copy.copy(own)
    args.model, args.num_frames, args.resolution = cell.model, cell.frames, cell.resolution
    args.batch_size = args.micro_batch_size = cell.batch
    own.teacher = cell.teacher or cell.model
    return args, flops.stages(own, args)[cell.kind]


def measure(cell, own, args, seconds_left):
    """The `Cost` of a cell. seconds_left(FLOPs of all it runs) -> whether there is time for it."""
    args, stage = cell_args(cell, own, args)
    numbers = range(FIRST, FIRST + own.round_steps)
    work = executed(stage, args, numbers) / own.round_steps
    if not seconds_left(work * (FIRST + own.round_steps)):
        return Cost(work, why="no time")
    torch._dynamo.reset()
    try:
        before = training.peak_memory(torch.device(args.device))
        runner, clips = Ours.build(cell.kind, stage, args), random_clips(args)
        _, memory = warm_up(runner, clips)
        if args.device == "cpu" and memory == before:  # the process has needed more for another cell
            memory = None
        return Cost(work, turn(runner, numbers, clips) / own.round_steps, memory)
    except torch.OutOfMemoryError:
        return Cost(work, why="no memory")


def extrapolated(cost, costs):
    """Seconds of a step: measured, or at the FLOP/s of the measured one that is nearest in FLOPs."""
    near = min((c for c in costs if c.seconds), key=lambda c: abs(math.log(c.flops / cost.flops)))
    return cost.seconds or near.seconds * cost.flops / near.flops


def sweep(own, args):
    """Measure, one after the other while there is time, and print both tables."""
    if any(getattr(args, name) is not None for name in ("width", "depth", "heads")):
        raise ValueError("--sweep goes over sizes: no --width, --depth or --heads")
    ends, ceiling, costs, last = time.perf_counter() + own.time_budget, matmul_ceiling(args), {}, (0.0, math.inf)
    kind, teacher = own.kind[0], own.teacher or args.model
    base = Cell(kind, args.model, args.num_frames, args.resolution, args.batch_size, teacher * (kind == "student"))
    growth = [base, *(base._replace(model=size) for size in own.sizes)]
    growth += [base._replace(frames=frames) for frames in (16, 32, 64)]
    sides = (side * base.resolution // 2 // args.patch_size * args.patch_size for side in (3, 4))
    growth += [base._replace(resolution=side) for side in sides]
    growth += [base._replace(batch=batch) for batch in (max(1, base.batch // 2), 2 * base.batch)]
    paper = {
        (kind, size, resolution): Cell(kind, size, 16, resolution, base.batch, "vit_l" * (kind == "student"))
        for _, stages, _ in PAPER_RUNS
        for kind, size, resolution, _ in stages
    }
    # Each is expected to take as long as the last one did, set-up included, and more if it has more FLOPs.
    for cell in dict.fromkeys([*growth, *paper.values()]):

        def time_left(work, last=last):
            needed = max(last[0] * max(1.0, work / last[1]), work / ceiling)
            return time.perf_counter() + needed < ends

        start = time.perf_counter()
        costs[cell] = cost = measure(cell, own, args, time_left)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if cost.seconds:
            last = time.perf_counter() - start, cost.flops * (FIRST + own.round_steps)
    if not any(cost.seconds for cost in costs.values()):
        cli.fail(
            f"--time-budget {own.time_budget:g}: too little for any step; smaller --model, --batch-size, or longer"
        )
    print_growth(base, dict.fromkeys(growth), costs, args)
    print_paper_runs(paper, costs)


def print_growth(base, growth, costs, args):
    print(f"\n{base.kind} step, {args.dtype}, {'compiled' if args.compile else 'eager'}; ~ extrapolated by FLOPs")
    print(f"{'model':8}{'frames':>7}{'pixels':>7}{'batch':>6}{'GFLOPs a clip':>15}{'ms':>10}{'clips/s':>9}"
          f"{'TFLOP/s':>9}{'GiB':>7}")  # fmt: skip
    for cell in growth:
        cost = costs[cell]
        seconds = extrapolated(cost, costs.values())
        memory = f"{cost.memory / 2**30:7.2f}" if cost.memory else f"  {cost.why or '-'}"
        print(f"{cell.model:8}{cell.frames:7}{cell.resolution:7}{cell.batch:6}{cost.flops / cell.batch / 1e9:15.4g}"
              f"{'' if cost.seconds else '~':>2}{1e3 * seconds:8.1f}{cell.batch / seconds:9.3g}"
              f"{cost.flops / seconds / 1e12:9.3g}{memory}")  # fmt: skip


def print_paper_runs(paper, costs):
    print("\nwhole runs of the paper (batch 3072), hours of one device; ~ extrapolated by FLOPs, at least in part")
    print(f"{'run':12}{'here':>9}{'paper, A100':>13}")
    for name, stages, hours in PAPER_RUNS:
        cells = [(paper[stage[:3]], stage[3]) for stage in stages]
        here = sum(n * 3072 / cell.batch * extrapolated(costs[cell], costs.values()) for cell, n in cells) / 3600
        mark = "" if all(costs[cell].seconds for cell, _ in cells) else "~"
        print(f"{name:12}{mark:>2}{here:7,.0f}{hours:13,}")


# ---------------------------------------------------------------------------------------------------------------------
# compilations


def count_compilations(kind, own, args):
    """Count them over many steps, with the fixed batch that a run watches every 10 steps; whether they are few."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    args.compile = True
    clips, runner = random_clips(args), Ours.build(kind, flops.stages(own, args)[kind], args)
    with torch.compiler.set_stance("default", force_backend=own.compile_backend):
        for number in range(own.compiles):
            one_step(runner, number, clips)
            if number % 10 == 9:  # Run._watch
                masks = [mask.to(args.device) for mask in drawn(args, training.HELD_OUT_SEED)[0]]
                normalized = data.normalize(clips, torch.device(args.device))
                autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
                with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"):
                    wanted = targets(runner, normalized)
                    for i, mask in enumerate(masks):
                        runner.loss(wanted, normalized, mask, i)
    functions = {}
    for metrics in torch._dynamo.utils.get_compilation_metrics():
        if metrics.co_name and metrics.compile_id:
            place = f"{os.path.basename(metrics.co_filename)}:{metrics.co_firstlineno} {metrics.co_name}"
            reason = metrics.fail_reason or (metrics.recompile_reason or "first").splitlines()[0]
            functions.setdefault(place, []).append(reason)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(f"{kind}: {own.compiles} steps, {breaks} graph breaks")
    for place, reasons in functions.items():
        print(f"  {place}: {len(reasons)} compilations" + "".join(f"\n      {reason}" for reason in reasons))
    return not breaks and max(map(len, functions.values())) <= MAX_COMPILATIONS


# ---------------------------------------------------------------------------------------------------------------------


def training_args(own, words):
    """The training scripts' flags that a subcommand was given besides its own; a step of one micro-batch without."""
    args = cli.training_flags(__doc__, out="out", steps=160_000).parse_args(words)
    own.teacher_steps = 80_000  # flops.stages wants it; times do not depend on it
    if "--batch-size" not in words:
        args.batch_size = args.micro_batch_size or 24
    training.setup(args)
    return args


def run(own, words):
    """The subcommand: its own flags, and the words that are the training scripts'."""
    cli.require_at_least(own, 1, "rounds", "round_steps")
    args = training_args(own, words)
    kinds = list(dict.fromkeys(own.kind))
    try:
        with preferred(own.attention), alone(args) if own.sharded else contextlib.nullcontext():
            if own.sweep:
                sweep(own, args)
            elif own.compiles:
                few = [count_compilations(kind, own, args) for kind in kinds]
                sys.exit(not all(few))
            else:
                agreed = [time_kind(kind, own, args) for kind in kinds]
                if not all(agreed):
                    cli.fail("others computed something else than ours: their times mean nothing", agreed=True)
    except (ImportError, ValueError) as error:
        cli.fail(str(error))


@contextlib.contextmanager
def alone(args):
    """A process group of this process alone, as torchrun would make it."""
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    backends = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def preferred(attention):
    """A context in which torch takes this attention kernel where it can, on a GPU; its own choice without."""
    if not attention:
        return contextlib.nullcontext()
    others = [kernel for name, kernel in ATTENTION.items() if name != attention]
    return sdpa_kernel([ATTENTION[attention], *others, SDPBackend.MATH], set_priority=True)


def main():
    parser = cli.Parser(__doc__)
    flags(parser)
    run(*parser.parse_known_args())


if __name__ == "__main__":
    main()
