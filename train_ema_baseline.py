"""The baseline, V-JEPA 2: train_student.py with a moving average of the student as teacher (paper section 2.1).

    python train_ema_baseline.py --steps 800 --warmup-steps 80 --batch-size 32 --model vit_ti
    torchrun --nproc_per_node=8 train_ema_baseline.py --model vit_l --data k710.csv ssv2.csv

The teacher starts as a copy of the student and then follows it as an exponential moving average (EMA). Data, masks,
networks, optimizer and schedules are SALT's. Writes out/ema/checkpoint.pt: `encoder` is the teacher, which V-JEPA
evaluates, and `student` is the student, which `probe.py --weights student` evaluates.
"""

import copy
import math

import torch
import torch.nn.functional as F

import cli
import data
import training
from masking import sample_masks
from model import Encoder, Predictor, gather
from run import Run


def ema_momentum(step, args):
    """The teacher's momentum: constant (V-JEPA 2), or linear over the schedule (V-JEPA: from 0.998 to 1)."""
    return args.ema_momentum + (args.final_ema_momentum - args.ema_momentum) * step / args.schedule_steps


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, in place; under FSDP each process updates its shards."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - momentum)


def draw_masks(args, step, g):
    """The masks of micro-batch g of a step, of all types. Block sizes are the same for all micro-batches."""
    rng = training.generator("masks", args.stage, args.seed, step, g)
    sizes = training.generator("block sizes", args.stage, args.seed, step)
    options = args.mask_truncation, sizes, args.masks_per_clip, args.target_fraction
    masks = sample_masks(args.mask, cli.clip_grid(args), args.micro_batch_size, rng, *options)
    return [mask.to(args.device) for mask in masks]


@torch.no_grad()
def latent_targets(teacher, clips):
    """The teacher's latents of the whole clip, layer-normalized: (B, 3, T, H, W) -> (B, N, D_teacher) float32."""
    return F.layer_norm(teacher(clips).float(), (teacher.width,))


def latent_loss(student, predictor, targets, clips, mask):
    """Mean absolute error at the target tokens of a mask. targets: (B, N, D_teacher), the latents of all tokens.

    Returns the loss, and the predictions and targets at the target tokens, both (B, Kt, D_teacher).
    """
    context = student(clips, mask.context_ids)
    predicted = predictor(context, mask.context_ids, mask.target_ids, student.grid(clips), mask.index)
    targets = gather(targets, mask.target_ids)
    return (predicted.float() - targets).abs().mean(), predicted, targets


def fixed_batch_metrics(teacher, student, predictor, fixed, args, autocast):
    """Signs of collapse on the fixed batch, and its loss if it is held out: a dictionary for the log."""
    clips = data.normalize(fixed.clips, torch.device(args.device))
    with training.evaluating(teacher, student, predictor), autocast:
        targets = latent_targets(teacher, clips)
        results = [latent_loss(student, predictor, targets, clips, mask) for mask in fixed.masks]
    losses, predictions, targets = zip(*results, strict=True)
    held_out = {"held_out_loss": torch.stack(losses).mean()} if fixed.held_out else {}
    return held_out | training.collapse_metrics(predictions[-1], targets[-1])


def main():
    parser = cli.training_flags(__doc__, out="out/ema", steps=240_000)
    flag = parser.add_argument_group("teacher").add_argument
    flag("--ema-momentum", type=float, default=0.99925, help="EMA momentum of the teacher (V-JEPA 2)")
    flag("--final-ema-momentum", type=float, help="momentum at the end of a linear ramp; default --ema-momentum")
    flag("--ema-stretch", type=float, default=1.0, help="length of all schedules relative to --steps (V-JEPA: 1.25)")
    args = parser.parse_args()
    training.setup(args, stage=2)
    args.final_ema_momentum = args.ema_momentum if args.final_ema_momentum is None else args.final_ema_momentum
    if not (0 <= args.ema_momentum <= 1 and 0 <= args.final_ema_momentum <= 1 and 1 <= args.ema_stretch < math.inf):
        cli.fail("--ema-momentum and --final-ema-momentum must be between 0 and 1, --ema-stretch at least 1")
    args.schedule_steps = round(args.ema_stretch * args.steps)
    encoder_config = cli.encoder_config(args)
    source = data.clip_source(args)

    student = Encoder(**encoder_config).to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = Predictor(**cli.predictor_config(args, student.width, teacher.width)).to(args.device)
    training.compile_and_shard(teacher, args)
    for network in (student, predictor):
        training.compile_and_shard(network, args)
    optimizer = training.make_optimizer([student, predictor], args)
    fixed = training.fixed_batch(source, args)
    networks = {"encoder": teacher, "student": student, "predictor": predictor}
    run = Run("ema", args, networks, optimizer, teacher)
    loader = data.training_loader(source, args, run.start_step)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    for step in range(run.start_step, args.steps):
        training.set_schedules(optimizer, step, args)
        loss = 0.0
        for g, clips in run.micro_batches(loader, step):  # (B, 3, T, H, W), normalized, on the device
            masks = draw_masks(args, step, g)
            run.record_masks(masks)
            with autocast:
                targets = latent_targets(teacher, clips)  # (B, N, D_teacher)
            # One mask at a time: each backward pass frees its activations before the next forward pass.
            for mask in masks:
                with autocast:
                    mask_loss, *_ = latent_loss(student, predictor, targets, clips, mask)
                mask_loss = mask_loss / (len(masks) * run.num_micro_batches)
                mask_loss.backward()
                loss += mask_loss.detach()
        loss, grad_norm = training.update(optimizer, loss, args)
        update_teacher(teacher, student, ema_momentum(step, args))
        due = run.is_log_step(step)
        metrics = fixed_batch_metrics(teacher, student, predictor, fixed, args, autocast) if due else {}
        run.end_step(step, loss=loss, grad_norm=grad_norm, **metrics)
    run.finish()


if __name__ == "__main__":
    main()
