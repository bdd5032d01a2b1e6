"""SALT stage 1, V-Pixel: train the teacher by filling in masked pixels (paper section 2.2, method.md section 1).

    python train_teacher.py --steps 500 --warmup-steps 50 --batch-size 32 --model vit_ti     # built-in videos
    torchrun --nproc_per_node=8 train_teacher.py --model vit_l --data k710.csv ssv2.csv --steps 80000

The encoder sees the context tokens only; the predictor, here a pixel decoder, fills in the normalized pixels of the
target tokens. Leaves out/teacher/checkpoint.pt for train_student.py.
"""

import torch

import cli
import data
import training
from model import Encoder, Predictor, gather, tubelets
from run import Run


def pixel_targets(clips, tubelet_size, patch_size):
    """Pixels of every tubelet, normalized per tubelet and color (VideoMAE): clips (B, 3, T, H, W) -> (B, N, P)."""
    y = tubelets(clips, tubelet_size, patch_size).unflatten(-1, (3, -1))  # (B, N, 3, 2*16*16)
    y = (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6)
    return y.flatten(-2)


def pixel_loss(encoder, predictor, targets, clips, mask, mask_index):
    """Mean squared error at a mask's target tokens; and the predictions and targets there, (B, Kt, P) both.

    targets: the normalized pixels of all tokens (B, N, P).
    """
    context = encoder(clips, mask.context_ids)
    predicted = predictor(context, mask.context_ids, mask.target_ids, encoder.grid(clips), mask_index)
    wanted = gather(targets, mask.target_ids)
    return (predicted.float() - wanted).square().mean(), predicted, wanted


def main():
    args = cli.training_flags(__doc__, out="out/teacher", steps=80_000).parse_args()
    training.setup(args)
    config = cli.encoder_config(args)
    source = data.clip_source(args)

    pixels = 3 * args.tubelet_size * args.patch_size**2
    encoder = Encoder(**config).to(args.device)
    predictor = Predictor(**cli.predictor_config(args, encoder.width, pixels)).to(args.device)
    for network in (encoder, predictor):
        training.prepare(network, args)
    optimizer = training.make_optimizer([encoder, predictor], args)
    run = Run("teacher", args, {"encoder": encoder, "predictor": predictor}, optimizer, source)

    def losses_of(clips, masks):  # one by one: a mask's activations are gone before the next one's come
        targets = pixel_targets(clips, args.tubelet_size, args.patch_size)
        for i, mask in enumerate(masks):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                result = pixel_loss(encoder, predictor, targets, clips, mask, i)
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
