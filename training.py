"""What the three training scripts share: processes and sharding, AdamW and schedules, the log, saving and resuming.

A run depends only on its flags: samples, masks and initial weights are functions of the step, --seed and the stage.
Neither a restart nor a different number of processes changes a run. A student shares no randomness with its teacher,
but all of it with the EMA baseline of the same --seed.

A run folder (--out) holds args.json (flags, model, versions), metrics.jsonl (one line per logged step), checkpoint.pt
(what `model.load_checkpoint` reads) and resume/ (the newest states to continue from).
"""

import collections
import fcntl
import functools
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import av
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend

import cli
import data
import flops
import model
from cli import fail, launched, plain_flags, rank_and_world, require_at_least, write_atomically, write_lines
from video import BadVideo

PAPER_LR, PAPER_WARMUP_STEPS = 6.25e-4, 10_000  # table 5
RANK_EVERY = 100  # steps between logged effective ranks, which take an eigendecomposition

# ---------------------------------------------------------------------------------------------------------------------
# processes and sharding


def setup(args, kind, stage):
    """Check the flags, fill in (in place) those that depend on the machine, and join torchrun's process group.

    kind: "teacher", "student" or "ema". stage: 1 for a V-Pixel teacher, otherwise one more than the teacher's.
    """
    rank, world = rank_and_world()
    cli.resolve_device(args)
    gpu, cores, local = args.device == "cuda", len(os.sched_getaffinity(0)), launched("LOCAL_WORLD_SIZE", 1)
    args.kind, args.stage = kind, stage
    if args.compile is None:
        args.compile = gpu
    if args.workers is None:
        args.workers = max(1, min(16, cores // local - 1)) if gpu else 1
    require_at_least(args, 1, "steps", "batch_size", "log_every", "frame_step")
    require_at_least(args, 0, "seed", "workers", "snapshot_every", "save_minutes")
    cli.check_mask_flags(args)
    if args.lr is None:
        args.lr = PAPER_LR * math.sqrt(args.batch_size / flops.PAPER_BATCH)
    if args.start_lr is None:
        args.start_lr = 0.32 * args.lr
    if args.warmup_steps is None:
        args.warmup_steps = PAPER_WARMUP_STEPS if args.steps >= 2 * PAPER_WARMUP_STEPS else args.steps // 10
    if args.warmup_steps >= args.steps:
        fail(f"--warmup-steps {args.warmup_steps} leaves nothing of --steps {args.steps}; a tenth of it is usual")
    clips = args.batch_size // world  # per process and step
    if args.micro_batch_size is None:
        args.micro_batch_size = cli.default_micro_batch_size(clips or 1)
    if args.micro_batch_size < 1 or args.batch_size % (world * args.micro_batch_size):
        fail(f"--batch-size {args.batch_size} is not divisible by {world} processes times --micro-batch-size "
             f"{args.micro_batch_size}")  # fmt: skip
    join_processes(args)
    sys.excepthook = _exception_hook
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _receive_signal)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into that view
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended with a single process
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(data.stream_seed("initialization", stage, args.seed))
    if rank == 0:
        if not args.data:
            print("no --data: training on the built-in synthetic videos")
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads (no GPU is used)"
        print(f"running on {world} x {name}, {args.dtype}; batch of {args.batch_size} clips = {world} processes x "
              f"{clips // args.micro_batch_size} micro-batches x {args.micro_batch_size} clips")  # fmt: skip
        if cores < local * (1 + args.workers):
            print(f"WARNING: {local} processes with {args.workers} loader workers each share {cores} cores: ask for "
                  "more (SLURM: --cpus-per-task), or lower --workers")  # fmt: skip


def join_processes(args):
    """Join torchrun's process group, if there are several processes."""
    gpu = args.device == "cuda"
    if rank_and_world()[1] > 1:
        if gpu:
            torch.cuda.set_device(launched("LOCAL_RANK", 0))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def clip_source(args):
    """The training data that the flags name. Ends the script if they or a manifest are wrong."""
    seed, frames, size = data.stream_seed("data", args.stage, args.seed), args.num_frames, args.resolution
    if not args.data:
        return data.Synthetic(frames, size, seed)
    try:
        return data.Manifest(args.data, frames, args.frame_step, size, seed, weights=args.data_weights, fps=args.fps)
    except (OSError, ValueError) as error:
        fail(f"--data: {error}")


@functools.cache
def _mesh(device, hybrid):
    """The device mesh of all networks: all processes, or with --hybrid (nodes, processes of a node)."""
    world, local = dist.get_world_size(), launched("LOCAL_WORLD_SIZE", 1)
    shape, names = ((world // local, local), ("replicate", "shard")) if hybrid else ((world,), None)
    return init_device_mesh(device, shape, mesh_dim_names=names)


def compile_and_shard(network, args, sharded=True):
    """Prepare a network for training, in place: compile its blocks and shard them over the processes (FSDP2).

    Parameters and gradients are float32; with --dtype bfloat16 both passes gather and compute in bfloat16.
    """
    network.activation_checkpointing = args.activation_checkpointing
    for block in network.blocks if args.compile else ():
        block.compile()
    if dist.is_initialized() and sharded and not args.replicate:
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # RoPE tables stay float32
        frozen = not any(p.requires_grad for p in network.parameters())
        mesh = _mesh(args.device, args.hybrid)
        for module in (*network.blocks, network):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=frozen)
        if frozen:
            network.register_forward_hook(_forget_forward)


def _forget_forward(network, *_):
    """Clear FSDP's record of a frozen network's forward pass, which otherwise grows until a backward pass."""
    for module in network.modules():
        if isinstance(module, FSDPModule):  # torch has no public way that works before a version of 2.14
            group = module._get_fsdp_state()._fsdp_param_group
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()


def sync_gradients(networks, last):
    """Tell FSDP whether this is the step's last micro-batch, the only one that reduces gradients.

    Until then each process keeps whole gradients and the weights it has gathered: more memory, less communication.
    """
    for network in networks.values():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            network.set_reshard_after_backward(last)


LOST_PEER = re.compile("closed by peer|reset by peer|broken pipe|remote process exited|timed out waiting for|"
                       "collective operation timeout|timeout at nccl work", re.IGNORECASE)  # fmt: skip


def _lost_a_process(error):
    """Whether an error only says that another process of the run is gone."""
    return isinstance(error, RuntimeError | dcp.api.CheckpointException) and LOST_PEER.search(str(error))


def _exception_hook(kind, error, traceback):
    """Report unreadable data, a dead loader worker or a lost process in one line; all else with its traceback."""
    last_line = (str(error).strip().splitlines() or [kind.__name__])[-1]
    if isinstance(error, BadVideo):
        message = f"unreadable, and no other video to replace it: {last_line}"
    elif isinstance(error, data.LoaderFailed):
        message = last_line
    elif _lost_a_process(error):
        message = f"process {rank_and_world()[0]} ends: it lost another process, whose message says why ({last_line})"
    else:
        return sys.__excepthook__(kind, error, traceback)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def generator(purpose, *key):
    """A CPU random generator that depends only on a purpose (a string) and non-negative integers."""
    return torch.Generator().manual_seed(data.stream_seed(purpose, *key))


def mask_generators(args, step, micro):
    """The generators for the masks of a micro-batch, and for block sizes, which all micro-batches of a step share."""
    key = args.stage, args.seed, step
    return generator("masks", *key, micro), generator("block sizes", *key)


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedules (paper table 5)


def learning_rate(step, args):
    """Linear from start_lr to lr over warmup_steps, then cosine to final_lr at the last step."""
    if step < args.warmup_steps:
        return args.start_lr + (args.lr - args.start_lr) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.steps - 1 - args.warmup_steps)
    return args.final_lr + (args.lr - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay(step, args):
    """Cosine from weight_decay at step 0 to final_weight_decay at the last step."""
    progress = step / max(1, args.steps - 1)
    change = args.weight_decay - args.final_weight_decay
    return args.final_weight_decay + change * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(networks, args):
    """AdamW over the parameters of the networks. Biases, norms and mask tokens have no weight decay."""
    named = [item for network in networks for item in network.named_parameters()]
    decayed = [p for name, p in named if p.ndim > 1 and "mask_tokens" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "mask_tokens" in name]
    groups = [{"params": decayed, "decayed": True}, {"params": others, "decayed": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def set_schedules(optimizer, step, args):
    """Set the learning rate and weight decay of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
        if group["decayed"]:
            group["weight_decay"] = weight_decay(step, args)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Reduce a tensor over all processes, if there are several, in place. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def reduce_gradients(params, divisor=1):
    """Sum the gradients of replicated parameters over all processes, in place, and divide them.

    A single all-reduce is faster for small networks.
    """
    if dist.is_initialized():
        total = all_reduce(torch.cat([p.grad.flatten() for p in params])) / divisor
        for p, part in zip(params, total.split([p.numel() for p in params]), strict=True):
            p.grad.copy_(part.view_as(p))


def optimizer_step(optimizer, loss, args):
    """Clip the gradients and take an optimizer step, unless the loss or the gradient norm is not finite.

    loss: this process's mean, detached. Returns the mean over all processes and the global gradient norm before
    clipping, as tensors: nothing here waits for the device.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    world = rank_and_world()[1]
    if args.replicate:
        reduce_gradients(params, divisor=world)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss = all_reduce(loss) / world
    torch.nn.utils.clip_grads_with_norm_(params, args.clip_grad, norm)
    # Fused AdamW skips the step where found_inf is 1. Gradient scalers use the same mechanism.
    optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# ---------------------------------------------------------------------------------------------------------------------
# the log


def due(step, every):
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and (step + 1) % every == 0


class Log:
    """Counts what happens in the steps since the last logged one, and writes metrics.jsonl.

    Reads tensors only when it writes a line, so that no other step waits for the device. teacher: for the FLOPs.
    """

    def __init__(self, args, networks, teacher=None):
        self.args = args
        self.model = {name: networks[name].config for name in ("encoder", "predictor")}
        self.teacher = teacher and teacher.config
        self.tokens = math.prod(cli.clip_grid(args))
        self.totals = dict(seconds=0.0, flops=0.0, clips=0, bad_videos=0)  # since the run began, over all processes
        self.reported, self.tensorboard, self.saved_at = set(), None, time.monotonic()

    def start(self):
        """Start to count for the next line."""
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, []
        self.sums = collections.Counter()  # of this process

    def count(self, batch, masks):
        """Count a micro-batch: its clips, tokens and FLOPs. Report unreadable videos, each once."""
        counts = [(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks]
        clips = len(batch.clips)
        self.sums.update(  # adds to each
            clips=clips,
            flops=clips * flops.step_flops(*self.model.values(), counts, self.teacher, self.tokens),
            bad_videos=batch.num_replaced,
            context_kept=clips * sum(context for context, _ in counts),
            target_kept=clips * sum(target for _, target in counts),
        )
        self.waited += batch.waited
        for reason in sorted(set(batch.skipped) - self.reported):
            print(f"unreadable, replaced by another video: {reason}", file=sys.stderr, flush=True)
        self.reported.update(batch.skipped)

    def add_step(self, step, loss, grad_norm):
        """Remember what `optimizer_step` returned."""
        self.steps.append((step, torch.stack((loss, grad_norm))))

    def write(self, **metrics):
        """Write a line of metrics.jsonl with these metrics (floats or tensors of one element), and print a shorter one.

        Ends the run if a step was not finite, or if too many videos are unreadable. All processes must call it.
        """
        args, (rank, world) = self.args, rank_and_world()
        values = torch.stack([tensor for _, tensor in self.steps]).double().tolist()
        for (step, _), (loss, norm) in zip(self.steps, values, strict=True):  # leaves the last step's
            lr = learning_rate(step, args)
            if not math.isfinite(loss + norm):
                fail(f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, lr {lr:.3g}; the weights were not "
                     "updated and the last checkpoint is kept; a lower --lr may help", agreed=True)  # fmt: skip
        sums = all_reduce(torch.tensor(list(self.sums.values()), dtype=torch.float64)).tolist()
        seconds = time.perf_counter() - self.started
        sums = dict(zip(self.sums, sums, strict=True)) | {"seconds": seconds}
        self.totals = {name: total + type(total)(sums[name]) for name, total in self.totals.items()}
        clips, bad = self.totals["clips"], self.totals["bad_videos"]
        if clips >= 100 and bad > args.max_bad * clips:
            fail(f"{bad} of {clips} samples are unreadable, more than --max-bad {args.max_bad:.0%}", agreed=True)
        line = {
            "step": step + 1,
            "loss": sum(loss for loss, _ in values) / len(values),
            "grad_norm": norm,
            "lr": lr,
            "weight_decay": weight_decay(step, args),
            **{name: float(value) for name, value in metrics.items()},
            "clips_per_s": sums["clips"] / seconds,
            "data_wait": self.waited / seconds,  # of this process
            "seconds": self.totals["seconds"],
            "flops": self.totals["flops"],  # executed
            "tflops_per_process": sums["flops"] / seconds / world / 1e12,
            "peak_memory_gib": peak_memory(torch.device(args.device)) / 2**30,  # of this process
            **{name: sums[name] / sums["clips"] for name in ("context_kept", "target_kept")},  # tokens, of all masks
            "bad_videos": bad,
        }
        left = (args.steps - step - 1) * seconds / len(values)
        self.start()
        if rank > 0:
            return
        try:
            with open(args.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            fail(f"{args.out / 'metrics.jsonl'}: {error.strerror}")
        for name, value in line.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step + 1)
        print(f"{args.kind} {step + 1}/{args.steps}  loss {line['loss']:.4f}  lr {lr:.1e}  grad {norm:.3f}  "
              f"{line['clips_per_s']:.0f} clips/s  waiting for data {line['data_wait']:.0%}  "
              f"{cli.duration(left)} left", flush=True)  # fmt: skip


def collapse_metrics(predicted, target, step):
    """Early signs of representation collapse: standard deviation, and every RANK_EVERY steps effective rank.

    predicted, target: (B, Kt, D), what the predictor returned last and what it should have. Returns a dictionary.
    """
    metrics = {}
    for name, x in (("prediction", predicted), ("target", target)):
        x = x.detach().float().flatten(0, 1)
        x = x[:: math.ceil(len(x) / 1024)]
        metrics[f"{name}_std"] = x.std(0).mean()
        if due(step, RANK_EVERY):
            metrics[f"{name}_rank"] = effective_rank(x)
    return metrics


def effective_rank(x):
    """RankMe of vectors (M, D): the exponential of the entropy of the singular values (Garrido et al., 2023)."""
    if not x.isfinite().all():
        return math.nan
    x = x.double()  # because x.T @ x squares the singular values
    sigma = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = sigma / sigma.sum() + 1e-7
    return (-(p * p.log()).sum()).exp().item()


def peak_memory(device):
    """The most bytes that this process has used so far: GPU memory, or resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------------------------------
# stopping, saving and resuming

_received = []  # signals, by this process


def _receive_signal(number, frame):
    """Signal handler: let the run finish its step, save and stop. A second Ctrl-C ends it at once."""
    _received.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def agree_on_saving(step, args, log):
    """Whether to save after this step, and the signal to stop for (0: none). What one process wants, all do."""
    overdue = time.monotonic() - log.saved_at >= 60 * args.save_minutes
    wanted = torch.tensor([max(_received, default=0), overdue])  # on the CPU, so that nothing waits for the GPU
    stop, overdue = all_reduce(wanted, dist.ReduceOp.MAX).tolist()
    return bool(stop or overdue or step + 1 == args.steps or due(step, args.snapshot_every)), stop


def finish(args, log, stop):
    """Print how the run ended. After a signal, exit as if killed: no script should go on with an unfinished run."""
    if rank_and_world()[0] == 0:
        if stop:
            print(f"{signal.Signals(stop).name}: saved and stopped; rerun the same command to continue", flush=True)
        else:
            print(f"{args.kind} done: {args.steps} steps in {cli.duration(log.totals['seconds'])}, "
                  f"{log.totals['flops']:.3g} FLOPs; {args.out / 'checkpoint.pt'}", flush=True)  # fmt: skip
        if log.tensorboard:
            log.tensorboard.close()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop)


def save(args, step, networks, optimizer, log, teacher=None):
    """Write the state to continue from, resume/step-N, then checkpoint.pt: a run that is stopped may have little time.

    Both are written aside and renamed, so that they are complete or absent. teacher: the identity of a frozen teacher.
    """
    record = {"format": model.CHECKPOINT_FORMAT, "kind": args.kind, "stage": args.stage, "step": step,
              "model": log.model, "args": plain_flags(args), "teacher": teacher}  # fmt: skip
    folder = args.out / "resume" / f"step-{step:08}"
    temporary = folder.with_suffix(".tmp")
    try:
        weights, moments = get_state_dict(nn.ModuleDict(networks), optimizer)
        dcp.save({"networks": weights, "optimizer": moments["state"]}, checkpoint_id=temporary)  # each process's shards
        if rank_and_world()[0] == 0:
            (temporary / "run.json").write_text(json.dumps(record | {"totals": log.totals}))
            temporary.rename(folder)
            for old in sorted((args.out / "resume").glob("step-????????"))[:-2]:  # keep the newest two
                shutil.rmtree(old)
        _write_checkpoint(args, record, networks)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # torch.save: RuntimeError on a full disk
        if _lost_a_process(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        fail(f"step {step} could not be saved in {args.out}, the previous one is kept; is the disk full? {reason}")
    log.saved_at = time.monotonic()


def _write_checkpoint(args, record, networks):
    """Write checkpoint.pt, and before it checkpoint-N.pt if --snapshot-every asks for one."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = {name: get_state_dict(network, (), options=options)[0] for name, network in networks.items()}
    snapshot = [f"checkpoint-{record['step']:06}.pt"] if due(record["step"] - 1, args.snapshot_every) else []
    if rank_and_world()[0] == 0:
        for name in (*snapshot, "checkpoint.pt"):
            write_atomically(args.out / name, lambda path: torch.save(record | weights, path))


def resume(args, networks, optimizer, log, teacher=None):
    """Open the run folder, and restore networks and optimizer, in place, from the newest state in it, if there is one.

    Returns the step to continue with. Ends the script if the folder holds another run, or is in use.
    """
    rank, start = rank_and_world()[0], 0
    try:
        if rank == 0:
            _open_folder(args, log)
        if dist.is_initialized():
            dist.barrier()
        if states := sorted((args.out / "resume").glob("step-????????")):  # complete ones
            start = _restore(args, states[-1], networks, optimizer, log, teacher)
        elif (args.out / "checkpoint.pt").exists():
            fail(f"{args.out} holds a checkpoint, but no state to continue from; --fresh starts over", agreed=True)
        elif rank == 0:
            _describe(args, networks, log)
        if args.tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            log.tensorboard = SummaryWriter(args.out / "tensorboard", purge_step=start + 1)
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    except ImportError:
        fail("--tensorboard needs a package: pip install tensorboard")
    log.start()
    return start


def _open_folder(args, log):
    """Make the run folder and lock it; with --fresh, move an earlier run aside first."""
    log.lock = _lock(args.out)
    if args.fresh and (args.out / "args.json").exists():
        older = next(p for i in itertools.count(1) if not (p := args.out.with_name(f"{args.out.name}.{i}")).exists())
        shutil.move(args.out, older)
        print(f"--fresh: moved the earlier run in {args.out} to {older}")
        log.lock = _lock(args.out)
    (args.out / "resume").mkdir(exist_ok=True)
    for unfinished in (args.out / "resume").glob("*.tmp"):
        shutil.rmtree(unfinished)


def _lock(folder):
    """Keep other runs out of a folder while this process lives. Returns the lock, an open file."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by another run; choose another --out")
    except OSError as error:  # some Lustre and NFS mounts have no locks
        print(f"{folder} cannot be locked ({error.strerror}): do not start two runs in it")
    return lock


def _restore(args, folder, networks, optimizer, log, teacher):
    """Restore the state in `folder`, and check that it is one of this run. Returns its step."""
    record = json.loads((folder / "run.json").read_text())
    step, earlier = record["step"], record["teacher"]
    if record["kind"] != args.kind or record["model"] != log.model:
        fail(f"{args.out} holds a run of another kind or model; choose another --out, or --fresh", agreed=True)
    if teacher and teacher["sha256"] != earlier["sha256"]:
        fail(f"{args.out} was trained with another teacher, {earlier['path']} at step {earlier['step']}; restore it "
             "or start over with --fresh", agreed=True)  # fmt: skip
    if step > args.steps:
        fail(f"{args.out} is already at step {step}, beyond --steps {args.steps}", agreed=True)
    modules = nn.ModuleDict(networks)
    weights, moments = get_state_dict(modules, optimizer)
    dcp.load({"networks": weights, "optimizer": moments["state"]}, checkpoint_id=folder)  # in place
    set_state_dict(modules, optimizer, model_state_dict=weights, optim_state_dict=moments)
    log.totals = record.pop("totals")
    if rank_and_world()[0] == 0:
        path = args.out / "metrics.jsonl"  # a killed process may leave lines of later steps, and an unfinished one
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        write_lines(path, [line for line in lines if json.loads(line)["step"] <= step])
        now = plain_flags(args)
        changed = sorted(x for x in now.keys() - {"fresh", "out", "teacher"} if record["args"].get(x) != now[x])
        print(f"continuing {args.out} at step {step} of {args.steps}; changed flags: {', '.join(changed) or 'none'}")
    checkpoint = args.out / "checkpoint.pt"  # missing or older if the run was killed after it had written the state
    if not checkpoint.exists() or model.load_checkpoint(checkpoint)["step"] != step:
        _write_checkpoint(args, record, networks)
    return step


def _describe(args, networks, log):
    """Write args.json and an empty log, and print what is trained."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+", "--abbrev=40"]  # +: files differ
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__}
    record = {"kind": args.kind, "args": plain_flags(args), "model": log.model, "world_size": rank_and_world()[1],
              "versions": versions, "git_commit": commit or None}  # fmt: skip
    write_lines(args.out / "args.json", [json.dumps(record, indent=2)])
    write_lines(args.out / "metrics.jsonl", [])
    sizes = (f"{name} of {sum(p.numel() for p in networks[name].parameters()) / 1e6:.2f}M" for name in log.model)
    kernels = " and ".join(attention_kernel(networks[name], log.tokens, args) for name in log.model)
    print(f"{args.kind}: {', '.join(sizes)} parameters; attention by {kernels}; {args.steps} steps into {args.out}",
          flush=True)  # fmt: skip


def attention_kernel(network, tokens, args):
    """The name of the kernel that scaled_dot_product_attention takes for a network's training on so many tokens."""
    dtype = torch.float32 if args.device == "cpu" else getattr(torch, args.dtype)  # see `model.attend`
    shape = 1, network.config["heads"], tokens, network.head_dim
    q = torch.empty(shape, device=args.device, dtype=dtype, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q)).name  # torch.nn.attention has no public question
