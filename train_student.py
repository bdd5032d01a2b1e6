"""SALT stage 2: train the student to predict a frozen teacher's latents (paper section 2.2, method.md section 1).

    python train_student.py --teacher out/teacher --steps 800 --warmup-steps 80 --batch-size 32 --model vit_ti
    torchrun --nproc_per_node=8 train_student.py --teacher teacher.pt --model vit_g --data k710.csv ssv2.csv

The teacher sees the whole clip; it may be of any size, and a student may be the next student's teacher. The student
sees the context tokens only; the predictor predicts the teacher's latents at the target tokens. The teacher never
changes, so there is nothing to collapse to: no EMA, no stop-gradient. Leaves out/student/checkpoint.pt.
"""

import torch
import torch.nn.functional as F

import cli
import data
import training
from model import Encoder, Predictor, gather, load_encoder
from run import Run


def load_teacher(args):
    """The frozen teacher, in eval mode. Ends the script if there is none, or if its tokens are not the student's."""
    try:
        teacher = load_encoder(args.teacher)
    except (OSError, ValueError) as error:
        cli.fail(f"--teacher: {error}; train_teacher.py makes one")
    for name in ("patch_size", "tubelet_size"):
        if teacher.config[name] != getattr(args, name):
            cli.fail(f"the teacher has {name} {teacher.config[name]}, the student {getattr(args, name)}: not one grid")
    return teacher.requires_grad_(False).to(args.device, getattr(torch, args.dtype))


@torch.no_grad()
def latent_targets(teacher, clips):
    """The teacher's layer-normed latents of the whole clip: (B, 3, T, H, W) -> (B, N, D_teacher) float32."""
    return F.layer_norm(teacher(clips).float(), (teacher.width,))


def latent_loss(student, predictor, targets, clips, mask, mask_index):
    """Mean absolute error at a mask's target tokens; and the predictions and targets there, (B, Kt, D_teacher) both.

    targets: the latents of all tokens (B, N, D_teacher).
    """
    context = student(clips, mask.context_ids)
    predicted = predictor(context, mask.context_ids, mask.target_ids, student.grid(clips), mask_index)
    wanted = gather(targets, mask.target_ids)
    return (predicted.float() - wanted).abs().mean(), predicted, wanted


def main():
    parser = cli.training_flags(__doc__, out="out/student", steps=160_000)
    parser.add_argument("--teacher", required=True, metavar="RUN|FILE", help="stage-1 or stage-2 checkpoint")
    parser.add_argument("--shard-teacher", action="store_true", help="where it does not fit into a process whole")
    args = parser.parse_args()
    training.setup(args)
    config = cli.encoder_config(args)
    teacher = load_teacher(args)
    source = data.clip_source(args)

    student = Encoder(**config).to(args.device)
    predictor = Predictor(**cli.predictor_config(args, student.width, teacher.width)).to(args.device)
    training.prepare(teacher, args, sharded=args.shard_teacher)
    for network in (student, predictor):
        training.prepare(network, args)
    optimizer = training.make_optimizer([student, predictor], args)
    run = Run("student", args, {"encoder": student, "predictor": predictor}, optimizer, source, teacher)

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
        run.end_step(step, loss, grad_norm, losses_of)
    run.finish()


if __name__ == "__main__":
    main()
