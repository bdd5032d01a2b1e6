"""Benchmarks: a training step beside Hugging Face's V-JEPA 2 or beside itself uncompiled; the loader beside decord.

    python bench.py step --kind student --model vit_l --batch-size 24                 # time, TFLOP/s, memory
    python bench.py step --peer hf --model vit_l --batch-size 24                      # beside transformers' VJEPA2Model
    python bench.py step --compile --peer eager --model vit_l --batch-size 24         # what torch.compile gains
    python bench.py loader --data videos.csv                                          # needs decord or torchcodec

Two ways to do something take turns, and their ratio is printed with its spread over the rounds. With OMP_NUM_THREADS=1
on a CPU, times are CPU time, so that other processes matter less.

`step` takes the flags of the training scripts. It runs the body of their loop on random clips, and compares executed
FLOP/s (flops.py) with the fastest square matrix product of the same run. Hugging Face's networks get the same weights,
clips, masks, loss, autocast and optimizer. Their forward pass would encode all tokens and then drop the masked ones,
which no V-JEPA training does, so their layers are called on the context tokens only.
"""

import argparse
import contextlib
import copy
import math
import statistics
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

WARMUP_STEPS = 4  # before any timing: memory is allocated and blocks are compiled


def now(device):
    """Current time in seconds, after synchronizing the device; CPU time if single-threaded on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def spread(values, form):
    """Format values as 'median (lowest to highest)'."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# ---------------------------------------------------------------------------------------------------------------------
# the training step


class Ours:
    """The networks of a training script and their optimizer. weights: {network: state dict}; default: initialize."""

    def __init__(self, args, configs, weights=None):
        encoder, predictor, teacher, _ = configs
        with torch.device(args.device):
            self.encoder, self.predictor, self.teacher = Encoder(**encoder), Predictor(**predictor), None
        if args.kind == "student":
            self.teacher = Encoder(**teacher).to(args.device, getattr(torch, args.dtype))
        if args.kind == "ema":
            self.teacher = copy.deepcopy(self.encoder)
        self.networks = {"encoder": self.encoder, "predictor": self.predictor}
        if self.teacher:
            self.networks["teacher"] = self.teacher.requires_grad_(False)
        for name, network in self.networks.items():
            if weights:
                network.load_state_dict(weights[name])
            training.compile_and_shard(network, args)
        self.optimizer = training.make_optimizer([self.encoder, self.predictor], args)

    def latents(self, clips):
        return self.teacher(clips)

    def predict(self, clips, mask):
        context = self.encoder(clips, mask.context_ids)
        return self.predictor(context, mask.context_ids, mask.target_ids, self.encoder.grid(clips), mask.index)


class HuggingFace:
    """The same with transformers' networks and our weights."""

    def __init__(self, args, configs, weights):
        encoder, predictor, teacher, _ = configs
        model = hf_model(encoder, weights["encoder"], predictor, weights["predictor"]).to(args.device)
        self.encoder, self.predictor, self.teacher = model.encoder, model.predictor, None
        if args.kind != "teacher":
            self.teacher = hf_model(teacher, weights["teacher"]).encoder.requires_grad_(False).to(args.device)
            if args.kind == "student":
                self.teacher.to(getattr(torch, args.dtype))
        for part in (self.encoder, self.predictor, self.teacher):
            for layer in part.layer if args.compile and part else ():
                layer.compile()
        self.optimizer = training.make_optimizer([self.encoder, self.predictor], args)

    def latents(self, clips):
        return self.teacher(clips.transpose(1, 2)).last_hidden_state  # it takes (B, T, 3, H, W)

    def predict(self, clips, mask):
        x = gather(self.encoder.embeddings(clips.transpose(1, 2)), mask.context_ids)
        for layer in self.encoder.layer:
            x = layer(x, mask.context_ids)[0]
        context = self.encoder.layernorm(x)
        x, ids = self.predictor.embeddings(context, [mask.context_ids], [mask.target_ids], mask.index)
        for layer in self.predictor.layer:
            x = layer(x, ids)[0]
        return self.predictor.proj(self.predictor.layernorm(x)[:, mask.context_ids.shape[1] :])


def hf_model(encoder, weights, predictor=None, predictor_weights=None):
    """A VJEPA2Model with our weights, made by tools/convert.py. encoder, predictor: configs.

    Its predictor's output is as wide as its encoder, so the last layer is replaced by ours.
    """
    checkpoint = {"model": {"encoder": encoder}, "encoder": weights}
    if predictor:
        width = encoder["width"]
        blank = {"proj.weight": torch.zeros(width, predictor["width"]), "proj.bias": torch.zeros(width)}
        checkpoint["model"]["predictor"] = predictor | {"out_width": width}
        checkpoint["predictor"] = predictor_weights | blank
    with contextlib.redirect_stdout(None):
        model, hf_weights = convert.to_hf(checkpoint)
    model.load_state_dict(hf_weights, strict=predictor is not None, assign=True)
    if predictor:
        model.predictor.proj = torch.nn.Linear(predictor["width"], predictor["out_width"])
        model.predictor.proj.load_state_dict({name: predictor_weights[f"proj.{name}"] for name in ("weight", "bias")})
    return model.train()


def training_step(runner, args, step, clips):
    """One step of the training scripts' loop, on the same uint8 clips for every micro-batch.

    Returns the loss, and the context and target tokens of each mask, per micro-batch.
    """
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    micro_batches, grid = data.micro_batch_indices(args), cli.clip_grid(args)
    training.set_schedules(runner.optimizer, step, args)
    loss, counts = 0.0, []
    for micro in micro_batches:
        x = data.normalize(clips, torch.device(args.device))
        rng, sizes = training.mask_generators(args, step, micro)
        masks = sample_masks(args.mask, grid, len(x), rng, args.mask_truncation, sizes, args.masks_per_clip,
                             args.target_fraction, args.device)  # fmt: skip
        if args.kind == "teacher":
            targets = pixel_targets(x, args.tubelet_size, args.patch_size)
        else:
            with torch.no_grad(), autocast:
                targets = runner.latents(x).float()
                targets = F.layer_norm(targets, targets.shape[-1:])
        for mask in masks:
            with autocast:
                predicted = runner.predict(x, mask)
            error = predicted.float() - gather(targets, mask.target_ids)
            mask_loss = error.square().mean() if args.kind == "teacher" else error.abs().mean()
            mask_loss = mask_loss / (len(masks) * len(micro_batches))
            mask_loss.backward()
            loss += mask_loss.detach()
        counts.append([(mask.context_ids.shape[1], mask.target_ids.shape[1]) for mask in masks])
    loss, _ = training.optimizer_step(runner.optimizer, loss, args)
    if args.kind == "ema":
        update_teacher(runner.teacher, runner.encoder, 0.99925)
    return loss, counts


def matmul_peak(args):
    """FLOP/s of the fastest of several square matrix products in --dtype on this device."""
    sizes, work = ((4096, 8192, 16384), 4e13) if args.device == "cuda" else ((512, 1024, 2048), 0)
    peak = 0.0
    for n in sizes:
        a, b = torch.randn(2, n, n, device=args.device, dtype=getattr(torch, args.dtype))
        a @ b  # warm up
        count = max(1, round(work / (2 * n**3)))
        for _ in range(3):
            start = now(args.device)
            for _ in range(count):
                a @ b
            peak = max(peak, count * 2 * n**3 / (now(args.device) - start))
    return peak


def bench_step(args):
    """Time steps of one kind, ours and the peer's in turn, and print the results. Ends the script if losses differ."""
    configs = flops.stages(args)[args.kind]
    shape = args.micro_batch_size, 3, args.num_frames, args.resolution, args.resolution
    clips = torch.randint(256, shape).to(torch.uint8)
    clips = clips.pin_memory() if args.device == "cuda" else clips
    tokens = math.prod(cli.clip_grid(args))
    ours = Ours(args, configs)
    runners = {"ours": (ours, args)}
    weights = {  # on the CPU, so that `memory` is that of the step
        name: {key: x.to("cpu", copy=True) for key, x in network.state_dict().items()}
        for name, network in ours.networks.items()
    }
    losses = {"ours": warm_up(ours, args, clips)}
    memory = training.peak_memory(torch.device(args.device))
    if args.peer:
        peer_args = args if args.peer == "hf" else argparse.Namespace(**vars(args) | {"compile": False})
        peer = (HuggingFace if args.peer == "hf" else Ours)(peer_args, configs, weights)
        runners[args.peer], losses[args.peer] = (peer, peer_args), warm_up(peer, peer_args, clips)
    peak, seconds, rates = matmul_peak(args), {name: [] for name in runners}, []
    for first in range(WARMUP_STEPS, WARMUP_STEPS + args.rounds * args.round_steps, args.round_steps):
        for name, (runner, flags) in runners.items():
            start, counts = now(args.device), []
            for step in range(first, first + args.round_steps):
                counts += training_step(runner, flags, step, clips)[1]
            duration = now(args.device) - start
            seconds[name].append(duration / args.round_steps)
            if name == "ours":
                work = sum(flops.step_flops(*configs[:2], c, configs[2], tokens) for c in counts)
                rates.append(work * args.micro_batch_size / duration)
    rate = statistics.median(rates)
    print(
        f"{args.kind}, {args.dtype}, {'compiled' if args.compile else 'eager'}: "
        f"{spread([1e3 * s for s in seconds['ours']], '.1f')} ms per step of {args.batch_size} clips, "
        f"{rate / 1e12:.4g} TFLOP/s = {rate / peak:.0%} of the fastest matrix product, {memory / 2**30:.2f} GiB; "
        f"{args.rounds} rounds of {args.round_steps} steps"
    )
    for name in list(runners)[1:]:
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
        off = max(abs(theirs / ours - 1) for theirs, ours in zip(losses[name], losses["ours"], strict=True))
        print(f"{name}: {spread(ratios, '.2f')} times as long as ours; its losses differ by up to {off:.1e}")
        if off > (1e-2 if args.dtype == "bfloat16" else 1e-4):
            cli.fail("the losses differ, so the peer computed something else and its times mean nothing")


def warm_up(runner, args, clips):
    """Run the first steps, untimed. Returns their losses."""
    return [training_step(runner, args, step, clips)[0].item() for step in range(WARMUP_STEPS)]


# ---------------------------------------------------------------------------------------------------------------------
# the loader


def our_clip(args, path, rng):
    """A training clip, made as in data.Manifest."""
    place, crop = rng.random(), lambda height, width: video.random_crop(rng, height, width)
    return video.read_clips(path, args.num_frames, args.frame_step, [place], None, [crop], args.resolution)[0]


def their_clip(args, path, rng):
    """The same clip, made as in V-JEPA: decode whole frames, then crop, interpolate and normalize in float32."""
    try:
        import decord

        reader = decord.VideoReader(str(path), num_threads=1)
    except ImportError:
        import torchcodec

        reader = torchcodec.decoders.VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    wanted = video.wanted_frames(rng.random(), args.num_frames, args.frame_step, len(reader)).tolist()
    frames = reader.get_batch(wanted).asnumpy() if hasattr(reader, "get_batch") else reader.get_frames_at(wanted).data
    frames = torch.as_tensor(frames).float().permute(3, 0, 1, 2)
    top, left, height, width = video.random_crop(rng, *frames.shape[2:])
    clip = frames[:, :, top : top + height, left : left + width]
    clip = F.interpolate(clip, (args.resolution, args.resolution), mode="bilinear")
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (data.MEAN, data.STD))
    return (clip / 255 - mean) / std


def bench_loader(args):
    """Print clips per second of CPU time, ours beside the peer's, over the videos of a manifest."""
    torch.set_num_threads(1)
    paths, seconds, ratios = data.Manifest(args.data, 1, 1, 1).paths, [], []
    for n in range(-1, args.clips):  # the first one warms up
        times = []
        for make_clip in (our_clip, their_clip):
            start = time.process_time()
            make_clip(args, paths[n % len(paths)], np.random.default_rng(n + 1))
            times.append(time.process_time() - start)
        if n >= 0:
            seconds.append(times[0])
            ratios.append(times[1] / times[0])
    print(
        f"ours: {len(seconds) / sum(seconds):.1f} clips/s per core; the peer takes {spread(ratios, '.2f')} times as "
        f"long per clip; {len(seconds)} clips of {args.num_frames} frames, {args.resolution}x{args.resolution}"
    )


def main():
    parser = cli.training_flags(__doc__, out="out", steps=160_000)
    parser.set_defaults(batch_size=24, teacher_steps=80_000)  # flops.stages needs teacher_steps; times do not
    parser.add_argument("what", choices=("step", "loader"), help="what to measure")
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--kind", choices=("teacher", "student", "ema"), default="student", help="step: of which training script")
    flag("--teacher", choices=SIZES, help="step: teacher of the student; default: the student's size")
    flag("--peer", choices=("hf", "eager"), help="step: also time transformers' VJEPA2Model, or ours without --compile")
    flag("--rounds", type=int, default=5, help="step: number of times that ours and the peer take turns")
    flag("--round-steps", type=int, default=4, help="step: steps per turn")
    flag("--clips", type=int, default=40, help="loader: number of clips")
    args = parser.parse_args()
    cli.require_at_least(args, 1, "rounds", "round_steps", "clips")
    try:
        if args.what == "loader":
            if not args.data:
                cli.fail("loader needs --data MANIFEST")
            bench_loader(args)
        else:
            cli.encoder_config(args)
            training.setup(args, args.kind, stage=2)
            if args.peer == "eager" and not args.compile:
                cli.fail("--peer eager compares with a compiled step: add --compile")
            bench_step(args)
    except (OSError, ValueError) as error:
        cli.fail(str(error))
    except ImportError as error:
        cli.fail(f"{error}: the peer needs a package that is not installed (transformers; decord or torchcodec)")


if __name__ == "__main__":
    main()
