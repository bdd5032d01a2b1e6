"""SALT stage 1, V-Pixel: train a teacher to reconstruct masked pixels (paper section 2.2, docs/method.md section 1).

    python train_teacher.py --steps 500 --warmup-steps 50 --batch-size 32 --model vit_ti     # built-in videos
    torchrun --nproc_per_node=8 train_teacher.py --model vit_l --data k710.csv ssv2.csv --steps 80000

The encoder sees only the context tokens. The predictor, here a pixel decoder, predicts the normalized pixels of the
target tokens. Writes out/teacher/checkpoint.pt, which train_student.py takes as its --teacher.

Letters: B clips of a micro-batch, T H W frames and pixels, N tokens of a clip, Kc and Kt context and target tokens of a
mask, D width, P values in a tubelet.
"""

import torch

import cli
import data
import training
from masking import sample_masks
from model import Encoder, Predictor, gather, tubelets


def pixel_targets(clips, tubelet_size, patch_size):
    """The pixels of each tubelet, normalized per tubelet and color (VideoMAE): (B, 3, T, H, W) -> (B, N, P)."""
    y = tubelets(clips, tubelet_size, patch_size).unflatten(-1, (3, -1))  # (B, N, 3, 2*16*16)
    y = (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6)
    return y.flatten(-2)


def main():
    args = cli.training_flags(__doc__, out="out/teacher", steps=80_000).parse_args()
    encoder_config = cli.encoder_config(args)
    training.setup(args, "teacher", stage=1)
    source = training.clip_source(args)

    with torch.device(args.device):
        encoder = Encoder(**encoder_config)
        pixels = 3 * args.tubelet_size * args.patch_size**2
        predictor = Predictor(**cli.predictor_config(args, encoder.width, pixels))
    networks = {"encoder": encoder, "predictor": predictor}
    for network in networks.values():
        training.compile_and_shard(network, args)
    optimizer = training.make_optimizer([encoder, predictor], args)
    log = training.Log(args, networks)
    start = training.resume(args, networks, optimizer, log)
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
                args.mask, encoder.grid(clips), len(clips), rng, args.mask_truncation, sizes, args.masks_per_clip,
                args.target_fraction, args.device,
            )  # fmt: skip
            targets = pixel_targets(clips, args.tubelet_size, args.patch_size)  # (B, N, P)
            training.sync_gradients(networks, last=micro == micro_batches[-1])
            for mask in masks:  # one at a time: each backward pass frees its activations before the next forward pass
                with autocast:
                    context = encoder(clips, mask.context_ids)  # (B, Kc, D)
                    predicted = predictor(context, mask.context_ids, mask.target_ids, encoder.grid(clips), mask.index)
                target = gather(targets, mask.target_ids)  # (B, Kt, P)
                mask_loss = (predicted.float() - target).square().mean() / (len(masks) * len(micro_batches))
                mask_loss.backward()
                loss += mask_loss.detach()
            log.count(batch, masks)
        loss, grad_norm = training.optimizer_step(optimizer, loss, args)
        log.add_step(step, loss, grad_norm)
        save, stop = training.agree_on_saving(step, args, log)
        if save or training.due(step, args.log_every):
            log.write(**training.collapse_metrics(predicted, target, step))
        if save:
            training.save(args, step + 1, networks, optimizer, log)
        if stop:
            break
    training.finish(args, log, stop)


if __name__ == "__main__":
    main()
