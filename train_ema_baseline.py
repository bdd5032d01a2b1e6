"""The baseline, V-JEPA 2: train_student.py with a moving average of the student as teacher (paper section 2.1).

    python train_ema_baseline.py --steps 800 --warmup-steps 80 --batch-size 32 --model vit_ti
    torchrun --nproc_per_node=8 train_ema_baseline.py --model vit_l --data k710.csv ssv2.csv

The teacher starts as a copy of the student and then follows it as an exponential moving average (EMA). Data, masks,
networks, optimizer and schedules are SALT's. Writes out/ema/checkpoint.pt: `encoder` is the teacher, which V-JEPA
evaluates, and `student` is the student, which `probe.py --weights student` evaluates.

Letters: B clips of a micro-batch, T H W frames and pixels, N tokens of a clip, Kc and Kt context and target tokens of a
mask, D width.
"""

import copy

import torch
import torch.nn.functional as F

import cli
import data
import training
from masking import sample_masks
from model import Encoder, Predictor, gather


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher = momentum * teacher + (1 - momentum) * student, in place; under FSDP each process updates its shards."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - momentum)


def main():
    parser = cli.training_flags(__doc__, out="out/ema", steps=240_000)
    flag = parser.add_argument_group("teacher").add_argument
    flag("--ema-momentum", type=float, default=0.99925, help="EMA momentum of the teacher (V-JEPA 2)")
    args = parser.parse_args()
    if not 0 <= args.ema_momentum <= 1:
        cli.fail(f"--ema-momentum {args.ema_momentum}: must be between 0 and 1")
    encoder_config = cli.encoder_config(args)
    teacher_id = None  # the teacher is part of this run
    training.setup(args, "ema", stage=2)
    source = training.clip_source(args)

    with torch.device(args.device):
        student = Encoder(**encoder_config)
        predictor = Predictor(**cli.predictor_config(args, student.width, student.width))
    teacher = copy.deepcopy(student).requires_grad_(False)
    networks = {"encoder": teacher, "student": student, "predictor": predictor}
    training.compile_and_shard(teacher, args)
    for network in (student, predictor):
        training.compile_and_shard(network, args)
    optimizer = training.make_optimizer([student, predictor], args)
    log = training.Log(args, networks, teacher)
    start = training.resume(args, networks, optimizer, log, teacher_id)
    loader = data.training_loader(source, args, start)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    micro_batches = data.micro_batch_indices(args)  # of a step, those of this process

    stop = 0
    for step in range(start, args.steps):
        training.set_schedules(optimizer, step, args)
        loss = 0.0
        for micro in micro_batches:
            batch = next(loader)
            clips = data.normalize(batch.clips, torch.device(args.device))  # (B, 3, T, H, W)
            rng, sizes = training.mask_generators(args, step, micro)
            masks = sample_masks(
                args.mask, student.grid(clips), len(clips), rng, args.mask_truncation, sizes, args.masks_per_clip,
                args.target_fraction, args.device,
            )  # fmt: skip
            with torch.no_grad(), autocast:
                targets = F.layer_norm(teacher(clips).float(), (teacher.width,))  # (B, N, D_teacher)
            training.sync_gradients(networks, last=micro == micro_batches[-1])
            for mask in masks:  # one at a time: each backward pass frees its activations before the next forward pass
                with autocast:
                    context = student(clips, mask.context_ids)  # (B, Kc, D)
                    predicted = predictor(context, mask.context_ids, mask.target_ids, student.grid(clips), mask.index)
                target = gather(targets, mask.target_ids)  # (B, Kt, D_teacher)
                mask_loss = (predicted.float() - target).abs().mean() / (len(masks) * len(micro_batches))
                mask_loss.backward()
                loss += mask_loss.detach()
            log.count(batch, masks)
        loss, grad_norm = training.optimizer_step(optimizer, loss, args)
        update_teacher(teacher, student, args.ema_momentum)
        log.add_step(step, loss, grad_norm)
        save, stop = training.agree_on_saving(step, args, log)
        if save or training.due(step, args.log_every):
            log.write(**training.collapse_metrics(predicted, target, step))
        if save:
            training.save(args, step + 1, networks, optimizer, log, teacher_id)
        if stop:
            break
    training.finish(args, log, stop)


if __name__ == "__main__":
    main()
