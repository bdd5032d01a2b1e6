"""What every training script needs and no method depends on: flags, processes and devices, optimizer and schedules,
checkpoints and resuming, logging. Plain functions, and one class, `Run`, for what has state.

A run is determined by its flags: sample n, the masks of micro-batch g of step s, and the initial weights depend on the
seed and on n, g, s alone, so neither restarting nor spreading a run over more processes changes it.
"""

import math
import os
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import data
import masking
from cli import clip_grid, default_micro_batch_size, fail, rank_and_world, require_at_least, resolve_device
from data import next_batch


def setup(args):
    """Resolve the flags that depend on the machine, in place; join torchrun's process group; say what it runs on."""
    rank, world = rank_and_world()
    resolve_device(args)
    gpu = args.device == "cuda"
    args.compile = gpu if args.compile is None else args.compile
    args.workers = (8 if gpu else 1) if args.workers is None else args.workers
    args.start_lr = 0.32 * args.lr if args.start_lr is None else args.start_lr
    if args.steps < 1 or args.batch_size < 1 or args.batch_size % world:
        fail(f"--steps and --batch-size are at least 1, --batch-size divisible by the {world} processes")
    require_at_least(args, 1, "save_every", "log_every", "frame_step", "keep", "loader_timeout", "clips_per_video")
    require_at_least(args, 0, "seed", "workers", "snapshot_every")
    args.schedule_steps = args.steps  # where learning rate and weight decay end; V-JEPA's stretch moves it
    if args.warmup_steps >= args.steps:
        fail(f"--warmup-steps {args.warmup_steps} leaves nothing of --steps {args.steps}; a tenth of it is usual")
    share = args.batch_size // world
    if args.micro_batch_size is None:
        args.micro_batch_size = default_micro_batch_size(share)
    if args.micro_batch_size < 1 or share % args.micro_batch_size:
        fail(f"--micro-batch-size {args.micro_batch_size} does not divide {args.batch_size} clips / {world} processes")
    if world > 1:
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    sys.excepthook = _in_one_line
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # into which nobody writes
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be with one process
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if rank == 0:
        name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads (no GPU is used)"
        print(f"on {world} x {name}, {args.dtype}, batch {args.batch_size} = {world} processes x "
              f"{share // args.micro_batch_size} micro-batches x {args.micro_batch_size} clips")  # fmt: skip


def lost_a_process(error):
    """Whether an error only says that another process of the run is gone."""
    signs, kinds = ("closed by peer", "gloo", "nccl"), RuntimeError | dcp.api.CheckpointException
    return isinstance(error, kinds) and any(sign in str(error).lower() for sign in signs)


def _in_one_line(kind, error, traceback):
    """What ends a process for reasons outside it is said in one line, not in a traceback of where it was just then."""
    text = str(error).lower()
    if isinstance(error, RuntimeError) and "dataloader worker" in text:  # torch raises this anywhere in the step
        print(f"{Path(sys.argv[0]).name}: {data.loader_failed(error)}", file=sys.stderr, flush=True)
    elif lost_a_process(error):
        rank = rank_and_world()[0]
        print(f"process {rank} ends: it lost another process, whose message says why", file=sys.stderr, flush=True)
    else:
        return sys.__excepthook__(kind, error, traceback)
    data.end_workers()
    os._exit(2)


def prepare(network, args, sharded=True):
    """Ready a network for training, in place: compile and checkpoint its blocks, share it among the processes (FSDP2).

    Its blocks' parameters and optimizer state are sharded over all processes, or with --hybrid over those of a node.
    Parameters and sums of gradients are float32; with --dtype bfloat16 the forward and backward pass gather and compute
    in bfloat16. What is trained stays gathered until `last_micro_batch` says otherwise; what is not, for a forward pass
    of a block. With --replicate every process keeps everything, and `update` averages the gradients.
    """
    network.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        for block in network.blocks:
            block.compile()
    if dist.is_initialized() and sharded and args.parallel != "replicate":
        world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
        shape = {"shard": (1, world), "hybrid": (world // local, local)}[args.parallel]
        mesh = init_device_mesh(args.device, shape, mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # RoPE's tables stay float32
        if args.dtype == "bfloat16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        frozen = not any(p.requires_grad for p in network.parameters())
        for part in (*network.blocks, network):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=frozen)
    return network


def last_micro_batch(networks, last):
    """Say before a micro-batch whether it is the last one of a step, after which alone processes have to talk.

    Before it, a process adds up its own gradients and keeps the weights that it has gathered: two gatherings and two
    sums of gradients a step, one for each mask, instead of four and two a micro-batch. It costs the memory of weights
    (in --dtype) and gradients (float32) that are not shards.
    """
    for network in networks:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            network.set_reshard_after_backward(last)


def generator(*key):
    """A CPU random generator determined by a tuple of non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and schedules (paper table 5)


def learning_rate(step, args):
    """Linear from start_lr to lr over warmup_steps, then cosine to final_lr at the schedule's last step."""
    if step < args.warmup_steps:
        return args.start_lr + (args.lr - args.start_lr) * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.schedule_steps - 1 - args.warmup_steps)
    return args.final_lr + (args.lr - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay(step, args):
    """Cosine from weight_decay at step 0 to final_weight_decay at the schedule's last step."""
    progress = step / max(1, args.schedule_steps - 1)
    change = args.weight_decay - args.final_weight_decay
    return args.final_weight_decay + change * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(modules, args):
    """AdamW over the modules' parameters; no weight decay on biases, norms and mask tokens."""
    named = [item for module in modules for item in module.named_parameters()]
    decayed = [p for name, p in named if p.ndim > 1 and "mask_tokens" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "mask_tokens" in name]
    groups = [{"params": decayed, "decayed": True}, {"params": others, "decayed": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)


def set_schedules(optimizer, step, args):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
        if group["decayed"]:
            group["weight_decay"] = weight_decay(step, args)


def average_gradients(params):
    """The mean over all processes, in place; one sum of them all, which for small networks is what counts."""
    mean = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    for p, part in zip(params, mean.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(part.view_as(p))


def update(optimizer, loss, args):
    """Clip the gradients and step, unless loss or gradients are not finite. Returns loss and norm before clipping.

    loss: this process's mean, a detached tensor; returned is the mean over all processes, the norm over all parameters.
    Nothing here waits for the device.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized() and args.parallel == "replicate":
        average_gradients(params)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    torch.nn.utils.clip_grads_with_norm_(params, args.clip_grad, norm)
    # Where this is 1, fused AdamW changes nothing: torch's way for scaled gradients.
    optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# ---------------------------------------------------------------------------------------------------------------------
# what is watched


HELD_OUT_SEED = 2**30  # built-in clips that no run with a seed below this is trained on


def fixed_batch(source, args):
    """(clips uint8, masks, whether never trained on) of one micro-batch, the same for every process at every step."""
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
        source = data.Synthetic(args.num_frames, args.resolution, HELD_OUT_SEED)
    clips = next_batch(data.clip_loader(source, [numbers], min(1, args.workers), timeout=args.loader_timeout)).clips
    rng = generator(args.seed, HELD_OUT_SEED)
    masks = masking.sample_masks(args.mask, clip_grid(args), len(clips), rng, args.mask_truncation)
    return clips, masks, bool(args.held_out or not args.data)


def effective_rank(x):
    """RankMe of vectors (M, D): the exponential of the entropy of the singular values (Garrido et al., 2023)."""
    if not x.isfinite().all():
        return math.nan
    x = x.double()  # the matrix below squares the singular values
    sigma = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = sigma / sigma.sum() + 1e-7
    return (-(p * p.log()).sum()).exp().item()


def peak_memory(device):
    """Bytes that this process has needed at most: of the GPU's memory, of the machine's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
