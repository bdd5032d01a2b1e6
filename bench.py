"""Benchmarks: a training step, alone or beside Hugging Face's V-JEPA 2; the loader beside decord.

    python bench.py step --kind student --model vit_l --batch-size 24       # time, TFLOP/s, memory
    python bench.py step --peer hf --model vit_l --batch-size 24            # beside transformers' VJEPA2Model
    python bench.py loader --data videos.csv                                # needs decord

Ours and the peer take turns, a step or a clip each. `step` takes the flags of the training scripts. It runs the body of
their loop on random clips, and compares executed FLOP/s (flops.py) with the fastest square matrix product. Hugging
Face's networks get the same weights, clips, masks, loss, autocast and optimizer. Their layers see the context tokens
only, although their own forward pass would encode all tokens and then drop the masked ones.
"""

import contextlib
import copy
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

import cli
import data
import flops
import training
import video
from masking import sample_masks
from model import SIZES, Encoder, Predictor, gather
from tools import convert
from train_ema_baseline import update_teacher
from train_teacher import pixel_targets

WARMUP_STEPS = 4  # not timed: memory is allocated and blocks are compiled; their losses are compared


def now(device):
    """Current time in seconds, after synchronizing the device; CPU time if single-threaded on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def spread(values, form):
    """Format values as 'median (lowest to highest)'."""
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# ---------------------------------------------------------------------------------------------------------------------
# the training step


class Ours:
    """The networks of a training script and their optimizer, with the same initial weights at each call."""

    def __init__(self, args, configs):
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            self.encoder, self.predictor, self.teacher = Encoder(**configs[0]), Predictor(**configs[1]), None
        if args.kind == "student":
            self.teacher = Encoder(**configs[2]).to(args.device, getattr(torch, args.dtype)).requires_grad_(False)
        if args.kind == "ema":
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        for network in filter(None, (self.encoder, self.predictor, self.teacher)):
            training.compile_and_shard(network, args)
        self.optimizer = training.make_optimizer([self.encoder, self.predictor], args)

    def latents(self, clips):
        return self.teacher(clips)

    def predict(self, clips, mask):
        context = self.encoder(clips, mask.context_ids)
        return self.predictor(context, mask.context_ids, mask.target_ids, self.encoder.grid(clips), mask.index)


class HuggingFace:
    """The same with transformers' networks and our weights."""

    def __init__(self, args, configs):
        ours = Ours(args, configs)
        model = hf_model(ours.encoder, ours.predictor)
        self.encoder, self.predictor = model.encoder, model.predictor
        self.teacher = ours.teacher and hf_model(ours.teacher).encoder.requires_grad_(False)
        for network in filter(None, (self.encoder, self.predictor, self.teacher)):
            for layer in network.layer if args.compile else ():
                layer.compile()
        self.optimizer = training.make_optimizer([self.encoder, self.predictor], args)

    def latents(self, clips):
        return self.teacher(clips.transpose(1, 2)).last_hidden_state  # it takes (B, T, 3, H, W)

    def predict(self, clips, mask):
        x = gather(self.encoder.embeddings(clips.transpose(1, 2)), mask.context_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask.context_ids)[0]
        x = self.encoder.layernorm(x)
        x, ids = self.predictor.embeddings(x, [mask.context_ids], [mask.target_ids], mask.index)
        for layer in self.predictor.layer:
            x = layer(x, ids)[0]
        return self.predictor.proj(self.predictor.layernorm(x)[:, mask.context_ids.shape[1] :])


def hf_model(encoder, predictor=None):
    """A VJEPA2Model with our weights. Its predictor's output is as wide as its encoder, so ours replaces it."""
    checkpoint = {"model": {"encoder": encoder.config}, "encoder": encoder.state_dict()}
    if predictor:
        proj, predictor.proj = predictor.proj, torch.nn.Linear(predictor.proj.in_features, encoder.width)
        checkpoint["model"]["predictor"] = predictor.config | {"out_width": encoder.width}
        checkpoint["predictor"] = predictor.state_dict()
    with contextlib.redirect_stdout(None):
        model, weights = convert.to_hf(checkpoint)
    model.load_state_dict(weights, strict=predictor is not None, assign=True)
    if predictor:
        model.predictor.proj = proj
    return model.train()


def training_step(runner, args, step, clips):
    """One step of the training scripts' loop, on the same uint8 clips for every micro-batch.

    Returns the loss and, per micro-batch, the context and target tokens of each mask.
    """
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    micro_batches, loss, counts = data.micro_batch_indices(args), 0.0, []
    error_of = F.mse_loss if args.kind == "teacher" else F.l1_loss
    training.set_schedules(runner.optimizer, step, args)
    for micro in micro_batches:
        x = data.normalize(clips, torch.device(args.device))
        rng, sizes = training.mask_generators(args, step, micro)
        masks = sample_masks(args.mask, cli.clip_grid(args), len(x), rng, args.mask_truncation, sizes,
                             args.masks_per_clip, args.target_fraction, args.device)  # fmt: skip
        if args.kind == "teacher":
            targets = pixel_targets(x, args.tubelet_size, args.patch_size)
        else:
            with torch.no_grad(), autocast:
                targets = runner.latents(x)
                targets = F.layer_norm(targets.float(), targets.shape[-1:])
        for mask in masks:
            with autocast:
                predicted = runner.predict(x, mask)
            error = error_of(predicted.float(), gather(targets, mask.target_ids))
            mask_loss = error / (len(masks) * len(micro_batches))
            mask_loss.backward()
            loss += mask_loss.detach()
        counts.append([(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks])
    loss, _ = training.optimizer_step(runner.optimizer, loss, args)
    if args.kind == "ema":
        update_teacher(runner.teacher, runner.encoder, 0.99925)
    return loss, counts


def matmul_peak(args):
    """FLOP/s of the fastest of several square matrix products in --dtype on this device."""
    sizes, products = ((4096, 8192, 16384), 20) if args.device == "cuda" else ((512, 1024, 2048), 1)
    peak = 0.0
    for n in sizes * 4:  # the first time warms up
        a, b = torch.randn(2, n, n, device=args.device, dtype=getattr(torch, args.dtype))
        start = now(args.device)
        for _ in range(products):
            a @ b
        peak = max(peak, products * 2 * n**3 / (now(args.device) - start))
    return peak


def bench_step(args):
    """Time steps of one kind, ours and the peer's in turn, and print the results. Ends the script if losses differ."""
    configs, tokens = flops.stages(args)[args.kind], math.prod(cli.clip_grid(args))
    shape = args.micro_batch_size, 3, args.num_frames, args.resolution, args.resolution
    clips = torch.randint(256, shape, device=args.device, dtype=torch.uint8)
    runners = [Ours(args, configs)] + ([HuggingFace(args, configs)] if args.peer else [])
    seconds, losses, work = np.empty((3, len(runners), WARMUP_STEPS + args.rounds))
    for step in range(WARMUP_STEPS + args.rounds):
        for i, runner in enumerate(runners):
            start = now(args.device)
            loss, counts = training_step(runner, args, step, clips)
            seconds[i, step], losses[i, step] = now(args.device) - start, loss
            work[i, step] = sum(flops.step_flops(*configs[:2], c, configs[2], tokens) for c in counts)
    memory = training.peak_memory(torch.device(args.device)) / 2**30
    seconds, work = seconds[:, WARMUP_STEPS:], work[:, WARMUP_STEPS:] * args.micro_batch_size
    rate = np.median(work[0] / seconds[0])
    print(
        f"{args.kind}, {args.dtype}, {'compiled' if args.compile else 'eager'}: {spread(1e3 * seconds[0], '.1f')} ms "
        f"per step of {args.batch_size} clips, {rate / 1e12:.4g} TFLOP/s = {rate / matmul_peak(args):.0%} of the "
        f"fastest matrix product, {memory:.2f} GiB{' with the peer' if args.peer else ''}; {args.rounds} steps"
    )
    if args.peer:
        off = abs(losses[1] / losses[0] - 1)[:WARMUP_STEPS].max()
        print(f"hf: {spread(seconds[1] / seconds[0], '.2f')} times as long; its losses differ by up to {off:.1e}")
        if off > (1e-2 if args.dtype == "bfloat16" else 1e-4):
            cli.fail("the losses differ, so the peer computed something else and its times mean nothing")


# ---------------------------------------------------------------------------------------------------------------------
# the loader


def our_clip(args, path, rng):
    """A training clip, made as in data.Manifest."""
    place, crop = rng.random(), lambda height, width: video.random_crop(rng, height, width)
    return video.read_clips(path, args.num_frames, args.frame_step, [place], None, [crop], args.resolution)[0]


def their_clip(args, path, rng):
    """The same clip, made as in V-JEPA: decode whole frames, then crop, interpolate and normalize in float32."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    wanted = video.wanted_frames(rng.random(), args.num_frames, args.frame_step, len(reader)).tolist()
    clip = torch.as_tensor(reader.get_batch(wanted).asnumpy()).float().permute(3, 0, 1, 2)
    top, left, height, width = video.random_crop(rng, *clip.shape[2:])
    clip = clip[:, :, top : top + height, left : left + width]
    clip = F.interpolate(clip, (args.resolution, args.resolution), mode="bilinear")
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (data.MEAN, data.STD))
    return (clip / 255 - mean) / std


def bench_loader(args):
    """Print clips per second of CPU time, ours beside decord's, over the videos of a manifest."""
    if not args.data:
        cli.fail("loader needs --data MANIFEST")
    torch.set_num_threads(1)
    paths, times = data.Manifest(args.data, 1, 1, 1).paths, []
    for n in range(1 + args.rounds):
        clocks = [time.process_time()]
        for make_clip in (our_clip, their_clip):
            make_clip(args, paths[n % len(paths)], np.random.default_rng(n))
            clocks.append(time.process_time())
        times.append(np.diff(clocks))
    ours, theirs = np.transpose(times[1:])  # the first round warms up
    print(
        f"ours: {1 / ours.mean():.1f} clips/s per core; decord takes {spread(theirs / ours, '.2f')} times as long per "
        f"clip; {args.rounds} clips of {args.num_frames} frames, {args.resolution}x{args.resolution}"
    )


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    parser.set_defaults(batch_size=24, teacher_steps=80_000)  # flops.stages needs teacher_steps; times do not
    parser.add_argument("what", choices=("step", "loader"), help="what to measure")
    flag = parser.add_argument
    flag("--kind", choices=("teacher", "student", "ema"), default="student", help="step: of which training script")
    flag("--teacher", choices=SIZES, help="step: teacher of the student; default: the student's size")
    flag("--peer", choices=("hf",), help="step: also time transformers' VJEPA2Model")
    flag("--rounds", type=int, default=20, help="number of steps or clips to time")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "rounds")
    try:
        if args.what == "loader":
            bench_loader(args)
        else:
            training.setup(args, args.kind, stage=2)
            bench_step(args)
    except (OSError, ValueError) as error:
        cli.fail(str(error))
    except ImportError as error:
        cli.fail(f"{error}: the peer needs a package that is not installed (transformers or decord)")


if __name__ == "__main__":
    main()
