"""SALT stage 2: train a student to predict a frozen teacher's latents (paper section 2.2, docs/method.md section 1).

    python train_student.py --teacher out/teacher --steps 800 --warmup-steps 80 --batch-size 32 --model vit_ti
    torchrun --nproc_per_node=8 train_student.py --teacher teacher.pt --model vit_g --data k710.csv ssv2.csv

The teacher sees the whole clip, the student only the context tokens, and the predictor predicts the teacher's latents
at the target tokens. The teacher is frozen, so the targets cannot collapse. It may be of any size, and a student can be
the teacher of the next student. Writes out/student/checkpoint.pt.
"""

import torch
import torch.nn.functional as F

import cli
import data
import training
from masking import sample_masks
from model import Encoder, Predictor, build, fingerprint, gather, load_checkpoint
from run import Run


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
    identity = {
        "path": str(args.teacher),
        "stage": checkpoint.get("stage", 1),
        "step": step,
        "sha256": fingerprint(checkpoint["encoder"]),
    }
    return teacher.float().eval().requires_grad_(False), identity


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
    parser = cli.training_flags(__doc__, out="out/student", steps=160_000)
    flag = parser.add_argument_group("teacher").add_argument
    flag("--teacher", required=True, metavar="RUN|FILE", help="stage-1 or stage-2 checkpoint")
    flag("--shard-teacher", action="store_true", help="shard the teacher too; default: a whole copy in each process")
    args = parser.parse_args()
    teacher, teacher_identity = load_teacher(args)
    training.setup(args, stage=1 + teacher_identity["stage"])
    encoder_config = cli.encoder_config(args)
    source = data.clip_source(args)

    student = Encoder(**encoder_config).to(args.device)
    teacher = teacher.to(args.device, getattr(torch, args.dtype))
    predictor = Predictor(**cli.predictor_config(args, student.width, teacher.width)).to(args.device)
    training.compile_and_shard(teacher, args, sharded=args.shard_teacher)
    for network in (student, predictor):
        training.compile_and_shard(network, args)
    optimizer = training.make_optimizer([student, predictor], args)
    fixed = training.fixed_batch(source, args)
    networks = {"encoder": student, "predictor": predictor}
    run = Run("student", args, networks, optimizer, teacher, teacher_identity)
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
        due = run.is_log_step(step)
        metrics = fixed_batch_metrics(teacher, student, predictor, fixed, args, autocast) if due else {}
        run.end_step(step, loss=loss, grad_norm=grad_norm, **metrics)
    run.finish()


if __name__ == "__main__":
    main()
