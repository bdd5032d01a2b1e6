"""Memory on paper: against the peak of real runs, and what must be true of it at sizes that no test can run."""

import contextlib
import re

import pytest
import torch
from conftest import TINY, refusal, run_script

import cli
import flops
import masking
import training
from bench import memory
from bench import step as bench_step
from model import SIZES, Encoder, Predictor

# Activations, not weights, have to fill the most of it, or nothing is tested: 16 clips at a time.
SMALL = [*TINY, "--depth", 3, "--width", 48, "--batch-size", 32, "--micro-batch-size", 16]


def paper(*flags, kind="student", processes=1, shard_teacher=False, device="cpu", dtype="float32", checkpointing=False,
          peer=False, masks=((100, 200), (40, 300))):  # fmt: skip
    """`memory.on_paper` of flags, with masks that fit the grid of 2x14x14 tokens."""
    flags = ["--num-frames", 4, "--micro-batch-size", 2, *flags]
    args = cli.training_flags("", out="out", steps=10).parse_args([str(flag) for flag in flags])
    args.device, args.dtype, args.compile = device, dtype, False
    own = memory.argparse.Namespace(kind=kind, teacher=None, teacher_steps=0, processes=processes, processes_per_node=2,
                                    shard_teacher=shard_teacher)  # fmt: skip
    return memory.on_paper(own, args, flops.stages(own, args)[kind], masks, checkpointing, peer)


@pytest.mark.parametrize("kind, flags", [
    ("teacher", ["--dtype", "float32"]),
    ("student", ["--dtype", "bfloat16"]),
    ("ema", ["--dtype", "float32", "--activation-checkpointing"]),
])  # fmt: skip
def test_paper_agrees_with_the_peak_of_a_real_run(kind, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        run_script(memory, "--check", "--kind", kind, *SMALL, *flags)
    ratio = float(re.search(r"ratio ([\d.]+)", capfd.readouterr().out)[1])
    assert stop.value.code == 0 and ratio == pytest.approx(1, abs=memory.TOLERANCE)


def test_a_check_that_is_off_says_so(capfd, monkeypatch):
    monkeypatch.setattr(memory, "in_truth", lambda *_: 1)
    with pytest.raises(SystemExit) as stop:
        run_script(memory, "--check", *SMALL)
    assert stop.value.code == 1


def test_what_stays_is_what_the_parameters_weigh():
    """Weights, gradients and two averages in float32; the frozen teacher in the compute dtype, the average is not."""
    vit = dict(SIZES["vit_ti"], depth=2, num_frames=4)
    teacher = flops.parameters(Encoder, vit)
    trained = teacher + flops.parameters(Predictor, dict(in_width=192, out_width=192, depth=2))
    flags = ["--model", "vit_ti", "--depth", 2, "--predictor-depth", 2, "--batch-size", 4]
    student, ema = (paper(*flags, kind=kind, dtype="bfloat16") for kind in ("student", "ema"))
    for parts in (student, ema):
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * trained, 4 * trained, 8 * trained)
        stay = sum(parts[name] for name in ("weights", "gradients", "optimizer", "teacher"))
        assert parts["step"] == parts["activations"] + stay and parts["update"] > stay
    assert student["teacher"] == 2 * teacher and ema["teacher"] == 4 * teacher


def test_shards_are_what_the_flags_say():
    flags = ["--model", "vit_ti", "--depth", 2, "--predictor-depth", 2]
    alone = paper(*flags, "--batch-size", 2)
    assert alone["gathered"] == 0
    for ways, shares in (
        (["--batch-size", 8], 4),
        (["--batch-size", 8, "--hybrid"], 2),
        (["--batch-size", 8, "--replicate"], 1),
    ):
        parts = paper(*flags, *ways, processes=4)
        for name in ("weights", "gradients", "optimizer"):
            assert parts[name] == pytest.approx(alone[name] / shares, rel=0.01), ways  # mask tokens do not divide
        assert parts["teacher"] == alone["teacher"]
        gathered = 0 if shares == 1 else alone["weights"]  # from the first block's forward pass to its backward pass
        assert parts["gathered"] == pytest.approx(gathered, rel=0.02)
    sharded = paper(*flags, "--batch-size", 8, processes=4, shard_teacher=True)
    assert sharded["teacher"] == pytest.approx(alone["teacher"] / 4, rel=0.01)
    ema = paper(*flags, "--batch-size", 8, processes=4, kind="ema")
    assert ema["teacher"] == pytest.approx(alone["teacher"] / 4, rel=0.01)
    whole = paper(*flags, "--batch-size", 8, processes=4)
    assert ema["activations"] == pytest.approx(whole["activations"], rel=0.03)  # gathered block by block


def test_activations_grow_with_clips_and_shrink_with_checkpointing_and_bfloat16():
    flags = ["--model", "vit_ti", "--depth", 4, "--predictor-depth", 2, "--batch-size", 16]
    two, four = paper(*flags), paper(*flags, "--micro-batch-size", 4)
    assert four["activations"] == pytest.approx(2 * two["activations"], rel=0.05)
    for device in ("cpu", "cuda"):
        whole, half = (paper(*flags, device=device, dtype=dtype) for dtype in ("float32", "bfloat16"))
        assert 0.45 < half["activations"] / whole["activations"] < 0.8
        again = paper(*flags, device=device, dtype="bfloat16", checkpointing=True)
        assert again["activations"] < 0.6 * half["activations"]


def test_gradients_wait_for_the_next_micro_batch():
    """They come as the activations of the first mask go, and are there from then on."""
    flags, one_mask = ["--model", "vit_ti", "--depth", 2, "--predictor-depth", 2], ((100, 200),)
    one, two = (paper(*flags, "--batch-size", size, masks=one_mask) for size in (2, 4))
    assert 0.5 * one["gradients"] < two["step"] - one["step"] <= one["gradients"]
    assert paper(*flags, "--batch-size", 2, masks=one_mask * 2)["step"] == pytest.approx(two["step"], rel=0.01)


def test_masks_do_not_add_up():
    """The activations of one are gone when those of the next come."""
    flags = ["--model", "vit_ti", "--batch-size", 4]
    large, both = paper(*flags, masks=((100, 200),)), paper(*flags, masks=((100, 200), (40, 200)))
    assert both["step"] == pytest.approx(large["step"], rel=0.02)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_peer_on_paper_agrees_with_the_peak_of_its_step(kind):
    pytest.importorskip("transformers")
    flags = ["--width", 48, "--depth", 3, "--heads", 2, "--predictor-depth", 2, "--batch-size", 2]
    parts, ours = (paper(*flags, kind=kind, peer=peer) for peer in (True, False))
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert parts[name] == ours[name]
    flags = [*map(str, flags), "--num-frames", "4", "--device", "cpu", "--no-compile"]
    args = cli.training_flags("", out="out", steps=160_000).parse_args(flags)
    training.setup(args)
    own = memory.argparse.Namespace(teacher=None, teacher_steps=1)
    runner = bench_step.Ours.build(kind, flops.stages(own, args)[kind], args)
    peer, clips = bench_step.HuggingFace.build(runner, runner.weights(), compiled=False), torch.zeros(2, 3, 4, 224, 224)
    masks = [masking.Mask(torch.arange(c).repeat(2, 1), torch.arange(c, c + t).repeat(2, 1), None, None)
             for c, t in ((100, 200), (40, 300))]  # fmt: skip
    truth = memory.cpu_peak(lambda: memory.forward_and_backward(peer, clips, masks, contextlib.nullcontext()))
    assert parts["activations"] - 4 * clips.numel() == pytest.approx(truth, rel=0.15)


def test_the_table(capfd):
    run_script(
        memory, "--model", "vit_ti", "--depth", 1, "--predictor-depth", 1, "--processes", 4, "--teacher", "vit_s"
    )
    out = capfd.readouterr().out
    assert "4 process(es) x 32 micro-batch(es) x 24 clips, bfloat16 on a GPU" in out
    needed = [float(x) for x in re.search(r"^needed +([\d.]+) +([\d.]+)$", out, re.M).groups()]
    assert needed[0] > needed[1] > 0


@pytest.mark.parametrize("flags, said", [
    (["--processes", 5], "not divisible by 5"),
    (["--micro-batch-size", 5], "--micro-batch-size 5 does not divide"),
    (["--kind", "teacher", "--teacher", "vit_s"], "takes no --teacher"),
    (["--peer", "hf", "--processes", 2], "--peer is for paper and one process"),
    (["--hybrid", "--processes", 12], "not whole nodes of 8"),
    (["--check", "--processes", 4], "torchrun"),
    (["--teacher", "nothing"], "no checkpoint"),
    (["--width", 50, "--heads", 3], "heads"),
    (["--nonsense"], "--nonsense"),
])  # fmt: skip
def test_mistakes_are_said_in_one_line(capfd, flags, said):
    assert said in refusal(capfd, memory, *flags)
