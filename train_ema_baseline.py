"""The baseline, V-JEPA 2: as train_student.py, but the teacher follows the student (paper section 2.1).

    python train_ema_baseline.py --steps 800 --warmup-steps 80 --batch-size 32 --model vit_ti
    torchrun --nproc_per_node=8 train_ema_baseline.py --model vit_l --data k710.csv ssv2.csv

The teacher starts as a copy of the student and is an exponential moving average of it from then on. Data, masks,
networks, optimizer and schedules are SALT's. Leaves out/ema/checkpoint.pt: its `encoder` is the moving average, which
V-JEPA evaluates ("encoder_is" says so), `student` the student, which `probe.py --weights student` evaluates.
"""

import copy
import math

import torch
import torch.nn.functional as F

import cli
import data
import training
from model import Encoder, Predictor, gather
from run import Run


@torch.no_grad()
def latent_targets(teacher, clips):
    """The teacher's layer-normed latents of the whole clip: (B, 3, T, H, W) -> (B, N, D) float32."""
    return F.layer_norm(teacher(clips).float(), (teacher.width,))


def latent_loss(student, predictor, targets, clips, mask, mask_index):
    """Mean absolute error at a mask's target tokens; and the predictions and targets there, (B, Kt, D) both.

    targets: the latents of all tokens (B, N, D).
    """
    context = student(clips, mask.context_ids)
    predicted = predictor(context, mask.context_ids, mask.target_ids, student.grid(clips), mask_index)
    wanted = gather(targets, mask.target_ids)
    return (predicted.float() - wanted).abs().mean(), predicted, wanted


def momentum(step, args):
    """Of the teacher: constant (V-JEPA 2), or linear to final_ema_momentum over the schedule (V-JEPA: 0.998 to 1)."""
    return args.ema_momentum + (args.final_ema_momentum - args.ema_momentum) * step / args.schedule_steps


@torch.no_grad()
def follow(teacher, student, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, in place, shard by shard."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - momentum)


def main():
    parser = cli.training_flags(__doc__, out="out/ema", steps=240_000)
    flag = parser.add_argument_group("how the teacher follows").add_argument
    flag(
        "--ema-momentum", type=float, default=0.99925, help="share of itself that the teacher keeps per step (V-JEPA 2)"
    )
    flag(
        "--final-ema-momentum", type=float, help="at the schedule's last step, linearly reached; default --ema-momentum"
    )
    flag("--ema-stretch", type=float, default=1.0, help="schedules last this many times --steps (V-JEPA: 1.25)")
    args = parser.parse_args()
    training.setup(args)
    args.final_ema_momentum = args.ema_momentum if args.final_ema_momentum is None else args.final_ema_momentum
    if not (0 <= args.ema_momentum <= 1 and 0 <= args.final_ema_momentum <= 1 and 1 <= args.ema_stretch < math.inf):
        cli.fail("--ema-momentum and --final-ema-momentum are between 0 and 1, --ema-stretch is at least 1")
    args.schedule_steps = round(args.ema_stretch * args.steps)
    config = cli.encoder_config(args)
    source = data.clip_source(args)

    student = Encoder(**config).to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = Predictor(**cli.predictor_config(args, student.width, teacher.width)).to(args.device)
    for network in (student, teacher, predictor):
        training.prepare(network, args)
    optimizer = training.make_optimizer([student, predictor], args)
    networks = {"encoder": teacher, "student": student, "predictor": predictor}
    run = Run("ema", args, networks, optimizer, source, teacher)

    def losses_of(clips, masks):  # one by one: a mask's activations are gone before the next one's come
        autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
        with autocast:
            targets = latent_targets(teacher, clips)
        for i, mask in enumerate(masks):
            with autocast:
                result = latent_loss(student, predictor, targets, clips, mask, i)
            yield result

    loader = data.training_loader(source, args, run.start_step)
    for step in range(run.start_step, args.steps):
        training.set_schedules(optimizer, step, args)
        loss = 0.0
        for clips, masks in run.micro_batches(loader, step):
            for mask_loss, *_ in losses_of(clips, masks):
                mask_loss = mask_loss / (len(masks) * run.num_micro_batches)
                mask_loss.backward()
                loss += mask_loss.detach()
        loss, grad_norm = training.update(optimizer, loss, args)
        follow(teacher, student, momentum(step, args))
        run.end_step(step, loss, grad_norm, losses_of)
    run.finish()


if __name__ == "__main__":
    main()
