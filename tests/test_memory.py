"""bench/memory.py: the estimate against real runs, and what must hold at sizes that no test can run."""

import re

import pytest
import torch
from conftest import TINY, refusal, run_script

import cli
import flops
from bench import memory
from model import SIZES, Block, Encoder, Predictor, rope_at

# 16 clips at a time, so that activations, not weights, take most of the memory.
SMALL = [*TINY, "--depth", 3, "--width", 48, "--batch-size", 32, "--micro-batch-size", 16]
MASKS = ((488, 728), (160, 1056))  # the largest of 100 micro-batches of 24 clips, for a ViT-L and larger ones


def estimate(*flags, kind="student", processes=1, shard_teacher=False, device="cpu", dtype="float32",
             checkpointing=False, teacher=None, masks=((100, 200), (40, 300))):  # fmt: skip
    """`memory.estimate` for these flags. The default masks fit the grid of 2x14x14 tokens."""
    flags = ["--num-frames", 4, "--micro-batch-size", 2, *flags]
    args = cli.training_flags("", out="out", steps=10).parse_args([str(flag) for flag in flags])
    args.kind, args.teacher, args.teacher_steps, args.shard_teacher = kind, teacher, 0, shard_teacher
    args.processes, args.processes_per_node, args.device, args.dtype = processes, 2, device, dtype
    return memory.estimate(args, flops.stages(args)[kind], masks, checkpointing)


@pytest.mark.parametrize("kind, flags", [
    ("teacher", ["--dtype", "float32"]),
    ("student", ["--dtype", "bfloat16"]),
    ("ema", ["--dtype", "float32", "--activation-checkpointing"]),
])  # fmt: skip
def test_estimate_agrees_with_the_peak_of_a_real_run(kind, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        run_script(memory, "--check", "--kind", kind, *SMALL, *flags)
    ratio = float(re.search(r"ratio ([\d.]+)", capfd.readouterr().out)[1])
    assert stop.value.code == 0 and ratio == pytest.approx(1, abs=memory.TOLERANCE)


def test_check_fails_if_the_estimate_is_wrong(capfd, monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda *_: 1)
    with pytest.raises(SystemExit) as stop:
        run_script(memory, "--check", *SMALL)
    assert stop.value.code == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_block_bytes_are_what_autograd_saves(dtype):
    config, tokens = dict(width=64, heads=4, mlp_ratio=3.0), 2 * 50
    block, rope = Block(**config), rope_at(torch.arange(50).repeat(2, 1), (2, 5, 5), 16, torch.device("cpu"))
    x = torch.randn(2, 50, 64, dtype=getattr(torch, dtype))
    not_activations = {p.shape for p in block.parameters()} | {p.t().shape for p in block.parameters() if p.ndim == 2}
    storages = {}

    def save(tensor):
        if tensor.shape not in not_activations and tensor.shape != rope[0].shape:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast:
        out = block(x, rope)  # keeps the graph
    args = cli.training_flags("", out="out", steps=1).parse_args(["--device", "cpu", "--dtype", dtype])
    saved, _ = memory.block_bytes(config, args)
    assert sum(storage.nbytes() for storage in storages.values()) == pytest.approx(saved * tokens, rel=0.02)
    assert out.requires_grad


@pytest.mark.parametrize("kind, model, teacher, processes, masks, needed, checkpointed", [
    ("student", "vit_l", "vit_l", 1, MASKS, 22.597, 7.604),
    ("student", "vit_h", "vit_l", 1, MASKS, 35.279, 13.488),
    ("student", "vit_g", "vit_l", 1, MASKS, 49.276, 20.218),
    ("student", "vit_G", "vit_l", 1, MASKS, 75.856, 34.706),
    ("student", "vit_g", "vit_l", 128, MASKS, 33.954, 5.088),
    ("student", "vit_ti", "vit_G", 128, ((464, 736), (144, 1152)), 10.401, 5.287),
    ("teacher", "vit_l", None, 1, MASKS, 22.325, 7.230),
])  # fmt: skip
def test_estimates_for_gpus_equal_the_storages_of_a_step(kind, model, teacher, processes, masks, needed, checkpointed):
    """GiB that bench/memory.py counted at commit ab5ec85 by running the step on fake tensors; the paper's batch.

    With checkpointing, the peak of a ViT-Ti student with a ViT-G teacher is the teacher's forward pass.
    """
    flags = ["--num-frames", 16, "--model", model, "--batch-size", 3072, "--micro-batch-size", 24]
    # the paper's predictor, for vit_ti, too
    flags += ["--predictor-width", 384, "--predictor-depth", 12, "--predictor-heads", 16]
    for counted, checkpointing in ((needed, False), (checkpointed, True)):
        parts = estimate(*flags, kind=kind, teacher=teacher, processes=processes, device="cuda", dtype="bfloat16",
                         checkpointing=checkpointing, masks=masks)  # fmt: skip
        assert memory.peak(parts) / memory.GIB == pytest.approx(counted, rel=0.05)


def test_bytes_of_weights_gradients_optimizer_and_teacher():
    """Weights, gradients and two averages are float32; the frozen teacher has the compute dtype, the EMA float32."""
    vit = dict(SIZES["vit_ti"], depth=2, num_frames=4)
    teacher = flops.parameters(Encoder, vit)
    trained = teacher + flops.parameters(Predictor, dict(in_width=192, out_width=192, width=192, depth=2, heads=3))
    flags = ["--model", "vit_ti", "--depth", 2, "--predictor-depth", 2, "--batch-size", 4]
    student, ema = (estimate(*flags, kind=kind, dtype="bfloat16") for kind in ("student", "ema"))
    for parts in (student, ema):
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * trained, 4 * trained, 8 * trained)
        names = ("weights", "gradients", "optimizer", "teacher", "inputs")
        persistent = sum(parts[name] for name in names)
        assert parts["step"] == parts["activations"] + parts["gathered"] + persistent
        assert parts["update"] == persistent
    assert student["teacher"] == 2 * teacher and ema["teacher"] == 4 * teacher


def test_sharding_follows_the_flags():
    flags = ["--model", "vit_ti", "--depth", 2, "--predictor-depth", 2]
    alone = estimate(*flags, "--batch-size", 2)
    assert alone["gathered"] == 0
    for ways, shards in (
        (["--batch-size", 8], 4),
        (["--batch-size", 8, "--hybrid"], 2),
        (["--batch-size", 8, "--replicate"], 1),
    ):
        parts = estimate(*flags, *ways, processes=4)
        for name in ("weights", "gradients", "optimizer"):
            assert parts[name] == alone[name] / shards, ways
        assert parts["teacher"] == alone["teacher"]
        assert parts["gathered"] == (alone["weights"] if shards > 1 else 0)
    accumulated = estimate(*flags, "--batch-size", 16, processes=4)
    assert accumulated["gradients"] == alone["gradients"] and accumulated["weights"] == alone["weights"] / 4
    sharded = estimate(*flags, "--batch-size", 8, processes=4, shard_teacher=True)
    assert sharded["teacher"] == alone["teacher"] / 4
    ema = estimate(*flags, "--batch-size", 8, processes=4, kind="ema")
    assert ema["teacher"] == alone["teacher"] / 4


def test_activations_grow_with_clips_and_shrink_with_checkpointing_and_bfloat16():
    flags = ["--model", "vit_ti", "--depth", 4, "--predictor-depth", 2, "--batch-size", 16]
    two, four = estimate(*flags), estimate(*flags, "--micro-batch-size", 4)
    assert four["activations"] == 2 * two["activations"] and four["inputs"] == 2 * two["inputs"]
    for device in ("cpu", "cuda"):
        full, half = (estimate(*flags, device=device, dtype=dtype) for dtype in ("float32", "bfloat16"))
        assert 0.45 < half["activations"] / full["activations"] < 0.8
        checkpointed = estimate(*flags, device=device, dtype="bfloat16", checkpointing=True)
        assert checkpointed["activations"] < 0.6 * half["activations"]


def test_gradients_stay_for_the_next_micro_batch():
    """They appear while the first mask's activations are freed, and stay until the update."""
    flags, one_mask = ["--model", "vit_ti", "--depth", 2, "--predictor-depth", 2], ((100, 200),)
    one, two = (estimate(*flags, "--batch-size", size, masks=one_mask) for size in (2, 4))
    assert 0.5 * one["gradients"] < two["step"] - one["step"] <= one["gradients"]
    assert estimate(*flags, "--batch-size", 2, masks=one_mask * 2)["step"] == pytest.approx(two["step"], rel=0.01)


def test_activations_of_masks_do_not_add_up():
    """Each mask's backward pass frees its activations before the next mask's forward pass."""
    flags = ["--model", "vit_ti", "--batch-size", 4]
    large, both = estimate(*flags, masks=((100, 200),)), estimate(*flags, masks=((100, 200), (40, 200)))
    assert both["step"] == pytest.approx(large["step"], rel=0.02)


def test_table(capfd):
    run_script(
        memory, "--model", "vit_ti", "--depth", 1, "--predictor-depth", 1, "--processes", 4, "--teacher", "vit_s"
    )
    out = capfd.readouterr().out
    assert "4 process(es) x 32 micro-batch(es) x 24 clips, bfloat16 on cuda" in out
    needed = [float(x) for x in re.search(r"^needed +([\d.]+) +([\d.]+)$", out, re.M).groups()]
    assert needed[0] > needed[1] > 0


@pytest.mark.parametrize("flags, message", [
    (["--processes", 5], "not divisible by 5"),
    (["--micro-batch-size", 5], "--micro-batch-size 5 does not divide"),
    (["--kind", "teacher", "--teacher", "vit_s"], "takes no --teacher"),
    (["--hybrid", "--processes", 12], "do not fill nodes of 8"),
    (["--check", "--processes", 4], "torchrun"),
    (["--teacher", "nothing"], "no checkpoint"),
    (["--width", 50, "--heads", 3], "heads"),
    (["--nonsense"], "--nonsense"),
])  # fmt: skip
def test_mistakes_end_in_one_line(capfd, flags, message):
    assert message in refusal(capfd, memory, *flags)
