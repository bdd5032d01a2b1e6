"""SALT stage 2: train a student to predict a frozen teacher's latents (paper section 2.2, docs/method.md section 1).

    python train_student.py --teacher out/teacher --steps 800 --warmup-steps 80 --batch-size 32 --model vit_ti
    torchrun --nproc_per_node=8 train_student.py --teacher teacher.pt --model vit_g --data k710.csv ssv2.csv

The teacher sees the whole clip, the student only the context tokens, and the predictor predicts the teacher's latents
at the target tokens. The teacher is frozen, so the targets cannot collapse. It may be of any size, and a student can be
the teacher of the next student. Writes out/student/checkpoint.pt.

Letters: B clips of a micro-batch, T H W frames and pixels, N tokens of a clip, Kc and Kt context and target tokens of a
mask, D width.
"""

import torch
import torch.nn.functional as F

import cli
import data
import training
from masking import sample_masks
from model import Encoder, Predictor, build, fingerprint, gather, load_checkpoint


def load_teacher(args):
    """The frozen teacher in eval mode, on the CPU, and what identifies it: its path, stage, step and fingerprint.

    Ends the script if there is no such checkpoint, or if its token grid is not the student's.
    """
    try:
        checkpoint = load_checkpoint(args.teacher)
        teacher = build(Encoder, checkpoint["model"]["encoder"], checkpoint["encoder"])
    except (OSError, ValueError) as error:
        cli.fail(f"--teacher: {error}; train_teacher.py makes one")
    for name in ("patch_size", "tubelet_size"):
        if teacher.config[name] != getattr(args, name):
            cli.fail(
                f"the teacher has {name} {teacher.config[name]}, the student {getattr(args, name)}; their token "
                "grids must be the same"
            )
    step = checkpoint["step"]
    steps = checkpoint["args"].get("steps", step)  # a converted checkpoint has no flags
    if cli.rank_and_world()[0] == 0:
        unfinished = "; WARNING: its training has not finished" if step < steps else ""
        print(f"teacher: {args.teacher}, step {step} of {steps}{unfinished}", flush=True)
    stage, sha256 = checkpoint.get("stage", 1), fingerprint(checkpoint["encoder"])
    teacher_id = {"path": str(args.teacher), "stage": stage, "step": step, "sha256": sha256}
    return teacher.float().eval().requires_grad_(False), teacher_id


def main():
    parser = cli.training_flags(__doc__, out="out/student", steps=160_000)
    flag = parser.add_argument_group("teacher").add_argument
    flag("--teacher", required=True, metavar="RUN|FILE", help="stage-1 or stage-2 checkpoint")
    args = parser.parse_args()
    encoder_config = cli.encoder_config(args)
    teacher, teacher_id = load_teacher(args)
    training.setup(args, "student", stage=1 + teacher_id["stage"])
    source = training.clip_source(args)

    with torch.device(args.device):
        student = Encoder(**encoder_config)
        predictor = Predictor(**cli.predictor_config(args, student.width, teacher.width))
    teacher = teacher.to(args.device, getattr(torch, args.dtype))
    networks = {"encoder": student, "predictor": predictor}
    training.compile_and_shard(teacher, args, sharded=False)  # each process has a whole copy
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
