"""The training recipe that the three training scripts share: processes and sharding, AdamW, schedules, the update.

A run depends only on its flags. Sample n, the masks of micro-batch g of step s, and the initial weights are functions
of n, g, s, --seed and the stage. So neither a restart nor a different number of processes changes a run, and a student
shares no randomness with its teacher. A student and the EMA baseline with the same --seed share all of it.
"""

import contextlib
import math
import os
import resource
import sys
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import data
import flops
import masking
from cli import (
    check_mask_flags,
    clip_grid,
    default_micro_batch_size,
    fail,
    rank_and_world,
    require_at_least,
    resolve_device,
)

PAPER_LR, PAPER_WARMUP_STEPS = 6.25e-4, 10_000  # table 5

# ---------------------------------------------------------------------------------------------------------------------
# processes and sharding


def setup(args, stage):
    """Check the flags, fill in (in place) those that depend on the machine, and join torchrun's process group.

    stage: 1 for a V-Pixel teacher, for others 1 more than their teacher's. It selects the random streams.
    """
    rank, world = rank_and_world()
    resolve_device(args)
    gpu = args.device == "cuda"
    args.compile = gpu if args.compile is None else args.compile
    args.workers = (8 if gpu else 1) if args.workers is None else args.workers
    args.stage = stage
    args.schedule_steps = args.steps  # where the schedules end; V-JEPA stretches them beyond the last step
    if args.steps < 1 or args.batch_size < 1 or args.batch_size % world:
        fail(f"--steps and --batch-size must be at least 1, and --batch-size divisible by the {world} processes")
    require_at_least(args, 1, "save_every", "log_every", "frame_step", "keep", "loader_timeout", "clips_per_video")
    require_at_least(args, 0, "seed", "workers", "snapshot_every")
    check_mask_flags(args)
    if args.lr is None:
        args.lr = PAPER_LR * math.sqrt(args.batch_size / flops.PAPER_BATCH)
    args.start_lr = 0.32 * args.lr if args.start_lr is None else args.start_lr
    if args.warmup_steps is None:
        args.warmup_steps = PAPER_WARMUP_STEPS if args.steps >= 2 * PAPER_WARMUP_STEPS else args.steps // 10
    if args.warmup_steps >= args.steps:
        fail(f"--warmup-steps {args.warmup_steps} leaves nothing of --steps {args.steps}; a tenth of it is usual")
    clips = args.batch_size // world  # per process and step
    if args.micro_batch_size is None:
        args.micro_batch_size = default_micro_batch_size(clips)
    if args.micro_batch_size < 1 or clips % args.micro_batch_size:
        fail(f"--micro-batch-size {args.micro_batch_size} does not divide {args.batch_size} clips / {world} processes")
    if world > 1:
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    sys.excepthook = _exception_hook
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into that view
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended with a single process
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(data.stream_seed("initialization", stage, args.seed))
    if rank == 0:
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads (no GPU is used)"
        print(f"running on {world} x {name}, {args.dtype}; batch of {args.batch_size} clips = {world} processes x "
              f"{clips // args.micro_batch_size} micro-batches x {args.micro_batch_size} clips; learning rate "
              f"{args.lr:.3g} after {args.warmup_steps} steps of warm-up")  # fmt: skip


def compile_and_shard(network, args, sharded=True):
    """Prepare a network for training, in place: compile its blocks and shard them over the processes (FSDP2).

    By default parameters and optimizer state are sharded over all processes, with --hybrid over those of a node.
    Parameters and gradients are float32; with --dtype bfloat16 both passes gather and compute in bfloat16. With
    --replicate every process keeps everything, and `update` averages the gradients.
    """
    network.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        for block in network.blocks:
            block.compile()
    if dist.is_initialized() and sharded and args.parallel != "replicate":
        world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
        shape = {"shard": (1, world), "hybrid": (world // local, local)}[args.parallel]
        mesh = init_device_mesh(args.device, shape, mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # keeps the RoPE tables in float32
        if args.dtype == "bfloat16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        frozen = not any(p.requires_grad for p in network.parameters())
        for module in (*network.blocks, network):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=frozen)
    return network


def set_last_micro_batch(networks, last):
    """Tell FSDP whether this is the step's last micro-batch, the only one that reduces gradients.

    Until then each process accumulates its own gradients and keeps the weights it has gathered. A step then gathers
    weights twice and reduces gradients twice (once per mask), instead of four times and twice per micro-batch. The
    price is memory for unsharded weights (in --dtype) and gradients (float32).
    """
    for network in networks:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            network.set_reshard_after_backward(last)


def lost_a_process(error):
    """Whether an error only says that another process of the run is gone."""
    signs, kinds = ("closed by peer", "gloo", "nccl"), RuntimeError | dcp.api.CheckpointException
    return isinstance(error, kinds) and any(sign in str(error).lower() for sign in signs)


def _exception_hook(kind, error, traceback):
    """Report a lost peer in one line; it has printed the cause."""
    if not lost_a_process(error):
        sys.__excepthook__(kind, error, traceback)
        return
    rank, _ = rank_and_world()
    print(f"process {rank} ends: it lost another process, whose message says why", file=sys.stderr, flush=True)
    data.end_workers()
    os._exit(2)


def generator(purpose, *key):
    """A CPU random generator for a purpose (a string), which depends only on it and on `key`, non-negative integers."""
    return torch.Generator().manual_seed(data.stream_seed(purpose, *key))


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedules (paper table 5)


def learning_rate(step, args):
    """Linear from start_lr to lr over warmup_steps, then cosine to final_lr at the last step of the schedule."""
    if step < args.warmup_steps:
        return args.start_lr + (args.lr - args.start_lr) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.schedule_steps - 1 - args.warmup_steps)
    return args.final_lr + (args.lr - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay(step, args):
    """Cosine from weight_decay at step 0 to final_weight_decay at the last step of the schedule."""
    progress = step / max(1, args.schedule_steps - 1)
    change = args.weight_decay - args.final_weight_decay
    return args.final_weight_decay + change * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(modules, args):
    """AdamW over the parameters of the modules. Biases, norms and mask tokens have no weight decay."""
    named = [item for module in modules for item in module.named_parameters()]
    decayed = [p for name, p in named if p.ndim > 1 and "mask_tokens" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "mask_tokens" in name]
    groups = [{"params": decayed, "decayed": True}, {"params": others, "decayed": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)


def set_schedules(optimizer, step, args):
    """Set the learning rate and weight decay of a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
        if group["decayed"]:
            group["weight_decay"] = weight_decay(step, args)


def _average_gradients(params):
    """Average the gradients over all processes, in place, in a single all-reduce: faster for small networks."""
    mean = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    for p, part in zip(params, mean.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(part.view_as(p))


def update(optimizer, loss, args):
    """Clip the gradients and take an optimizer step, unless the loss or the gradient norm is not finite.

    loss: this process's mean over its micro-batches, a detached tensor. Returns the mean over all processes, and the
    global gradient norm before clipping, both as tensors: nothing here waits for the device.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized() and args.parallel == "replicate":
        _average_gradients(params)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    torch.nn.utils.clip_grads_with_norm_(params, args.clip_grad, norm)
    # Fused AdamW skips the step where found_inf is 1. Gradient scalers use the same mechanism.
    optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# ---------------------------------------------------------------------------------------------------------------------
# metrics of a fixed batch

FIXED_BATCH_SEED = 2**30  # for built-in clips that no run trains on


class FixedBatch(NamedTuple):
    """One micro-batch, the same for every process at every step."""

    clips: torch.Tensor  # (B, 3, T, H, W) uint8, on the CPU
    masks: list  # of Mask, on the device
    held_out: bool  # whether the run never trains on these clips


def fixed_batch(source, args):
    """Load the `FixedBatch`: from --held-out if given, else from the training videos, else built-in clips."""
    numbers = range(args.micro_batch_size)
    if args.held_out:
        try:
            source = data.Manifest(
                [args.held_out], args.num_frames, args.frame_step, args.resolution, train=False, fps=args.fps
            )
        except (OSError, ValueError) as error:
            fail(f"--held-out: {error}")
        numbers = np.linspace(0, len(source) - 1, len(numbers)).round().astype(int).tolist()
    elif not args.data:
        source = data.Synthetic(args.num_frames, args.resolution, FIXED_BATCH_SEED)
    try:
        rng = generator("fixed batch", args.seed)
        masks = masking.sample_masks(args.mask, clip_grid(args), len(numbers), rng, args.mask_truncation)
    except ValueError as error:
        fail(f"--mask {args.mask}: {error}")
    loader = data.clip_loader(source, [numbers], min(1, args.workers), timeout=args.loader_timeout)
    masks = [mask.to(args.device) for mask in masks]
    return FixedBatch(data.next_batch(loader).clips, masks, bool(args.held_out or not args.data))


@contextlib.contextmanager
def evaluating(*networks):
    """A context without gradients and compilation. Afterwards FSDP frees the weights it gathered."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    for network in networks:
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # otherwise done by the backward pass


def collapse_metrics(predicted, targets):
    """Early signs of representation collapse on a fixed batch: standard deviation and effective rank.

    predicted, targets: (B, Kt, D), the predictor's outputs and what they should be. Returns a dictionary of floats.
    """
    metrics = {}
    for name, x in (("prediction", predicted), ("target", targets)):
        x = x.float().flatten(0, 1)
        x = x[:: math.ceil(len(x) / 4096)]
        metrics |= {f"{name}_std": x.std(0).mean().item(), f"{name}_rank": effective_rank(x)}
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
