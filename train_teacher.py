"""SALT stage 1, V-Pixel: train a teacher to reconstruct masked pixels (paper section 2.2, docs/method.md section 1).

    python train_teacher.py --steps 500 --warmup-steps 50 --batch-size 32 --model vit_ti     # built-in videos
    torchrun --nproc_per_node=8 train_teacher.py --model vit_l --data k710.csv ssv2.csv --steps 80000

The encoder sees only the context tokens. The predictor, here a pixel decoder, predicts the normalized pixels of the
target tokens. Writes out/teacher/checkpoint.pt, which train_student.py takes as its --teacher.
"""

import torch

import cli
import data
import training
from masking import sample_masks
from model import Encoder, Predictor, gather, tubelets
from run import Run


def draw_masks(args, step, g):
    """The masks of micro-batch g of a step, of all types. Block sizes are the same for all micro-batches."""
    rng = training.generator("masks", args.stage, args.seed, step, g)
    sizes = training.generator("block sizes", args.stage, args.seed, step)
    options = args.mask_truncation, sizes, args.masks_per_clip, args.target_fraction
    masks = sample_masks(args.mask, cli.clip_grid(args), args.micro_batch_size, rng, *options)
    return [mask.to(args.device) for mask in masks]


def pixel_targets(clips, tubelet_size, patch_size):
    """The pixels of each tubelet, normalized per tubelet and color (VideoMAE): (B, 3, T, H, W) -> (B, N, P)."""
    y = tubelets(clips, tubelet_size, patch_size).unflatten(-1, (3, -1))  # (B, N, 3, 2*16*16)
    y = (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6)
    return y.flatten(-2)


def pixel_loss(encoder, predictor, targets, clips, mask):
    """Mean squared error at the target tokens of a mask. targets: (B, N, P), the pixels of all tokens.

    Returns the loss, and the predictions and targets at the target tokens, both (B, Kt, P).
    """
    context = encoder(clips, mask.context_ids)
    predicted = predictor(context, mask.context_ids, mask.target_ids, encoder.grid(clips), mask.index)
    targets = gather(targets, mask.target_ids)
    return (predicted.float() - targets).square().mean(), predicted, targets


def fixed_batch_metrics(encoder, predictor, fixed, args, autocast):
    """Signs of collapse on the fixed batch, and its loss if it is held out: a dictionary for the log."""
    clips = data.normalize(fixed.clips, torch.device(args.device))
    with training.evaluating(encoder, predictor), autocast:
        targets = pixel_targets(clips, args.tubelet_size, args.patch_size)
        results = [pixel_loss(encoder, predictor, targets, clips, mask) for mask in fixed.masks]
    losses, predictions, targets = zip(*results, strict=True)
    held_out = {"held_out_loss": torch.stack(losses).mean()} if fixed.held_out else {}
    return held_out | training.collapse_metrics(predictions[-1], targets[-1])


def main():
    args = cli.training_flags(__doc__, out="out/teacher", steps=80_000).parse_args()
    training.setup(args, stage=1)
    encoder_config = cli.encoder_config(args)
    source = data.clip_source(args)

    encoder = Encoder(**encoder_config).to(args.device)
    pixels = 3 * args.tubelet_size * args.patch_size**2
    predictor = Predictor(**cli.predictor_config(args, encoder.width, pixels)).to(args.device)
    for network in (encoder, predictor):
        training.compile_and_shard(network, args)
    optimizer = training.make_optimizer([encoder, predictor], args)
    fixed = training.fixed_batch(source, args)
    run = Run("teacher", args, {"encoder": encoder, "predictor": predictor}, optimizer)
    loader = data.training_loader(source, args, run.start_step)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    for step in range(run.start_step, args.steps):
        training.set_schedules(optimizer, step, args)
        loss = 0.0
        for g, clips in run.micro_batches(loader, step):  # (B, 3, T, H, W), normalized, on the device
            masks = draw_masks(args, step, g)
            run.record_masks(masks)
            targets = pixel_targets(clips, args.tubelet_size, args.patch_size)  # (B, N, P)
            # One mask at a time: each backward pass frees its activations before the next forward pass.
            for mask in masks:
                with autocast:
                    mask_loss, *_ = pixel_loss(encoder, predictor, targets, clips, mask)
                mask_loss = mask_loss / (len(masks) * run.num_micro_batches)
                mask_loss.backward()
                loss += mask_loss.detach()
        loss, grad_norm = training.update(optimizer, loss, args)
        due = run.is_log_step(step)
        metrics = fixed_batch_metrics(encoder, predictor, fixed, args, autocast) if due else {}
        run.end_step(step, loss=loss, grad_norm=grad_norm, **metrics)
    run.finish()


if __name__ == "__main__":
    main()
