"""Compute accounting: the paper's tables, the executed FLOPs compared with torch's counter, and the command line."""

import math

import pytest
import torch
from conftest import read_metrics, refusal, run_script
from torch.utils.flop_counter import FlopCounterMode

import cli
import flops
import training
from masking import sample_masks
from model import SIZES, Block, Encoder, Predictor, load_checkpoint


def test_our_counts_agree_with_the_paper_or_a_note_explains_the_difference(capfd):
    run_script(flops)
    lines = capfd.readouterr().out.splitlines()[3:-2]
    assert [float(line[55:].split()[0]) for line in lines] == pytest.approx([  # docs/method.md, section 8
        2.202, 1.864, 3.456, 5.293, 1.427, 2.646, 1.194, 1.499, 1.851, 2.620, 1.851, 0.2422, 0.0606, 0.1211, 0.2422,
        0.2379, 0.4757, 0.5947, 0.7136, 0.8325, 0.9515, 1.1893, 1.3083, 0.7180, 0.5968, 1.864, 1.243, 0.932,
    ], rel=0.01)  # fmt: skip
    marked = {line[11:55].rstrip(): line.rpartition("! ")[2] for line in lines if " ! " in line}
    assert all(marked.values()) and list(marked) == [
        "SALT g, 80k + 160k steps", "V-JEPA 2 L, 160k steps, as if at 256", "V-JEPA 2 L, 120k steps, as if at 256",
    ]  # fmt: skip


def encoder(**changes):
    shape = dict(width=48, depth=2, heads=2, mlp_ratio=4.0, num_frames=4, resolution=32, patch_size=8, tubelet_size=2)
    return shape | changes


def predictor(in_width=48, out_width=48, **changes):
    sizes = dict(in_width=in_width, out_width=out_width, width=32, depth=3, heads=2, num_mask_tokens=2)
    return sizes | changes


TWO = [(9, 20), (3, 25)]
WIDE = encoder(width=88, mlp_ratio=SIZES["vit_g"]["mlp_ratio"])
FINE = encoder(patch_size=4, tubelet_size=1)


@pytest.mark.parametrize("student, predict, teacher, masks", [
    (encoder(), predictor(out_width=384), None, TWO),  # stage 1
    (encoder(), predictor(out_width=96), encoder(width=96, depth=3, heads=4), TWO),  # stage 2, with another teacher
    (WIDE, predictor(88, 88, heads=4), WIDE, TWO),  # the EMA baseline
    (FINE, predictor(depth=1), FINE, TWO[:1]),  # one mask, as with tube
])  # fmt: skip
def test_executed_flops_match_torchs_counter(student, predict, teacher, masks):
    size = student["resolution"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        clip = torch.empty(1, 3, student["num_frames"], size, size)
        encode, predictor = Encoder(**student), Predictor(**predict)
        if teacher:
            with torch.no_grad():
                Encoder(**teacher)(clip)
        for mask in masks:
            context, targets = (torch.empty(1, count, dtype=torch.long) for count in mask)
            predictor(encode(clip, context), context, targets, encode.grid(clip)).sum().backward()
    tokens = math.prod(encode.grid(clip))
    expected = pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert flops.step_flops(student, predict, masks, teacher, tokens) == expected


def parsed_flags(*flags):
    args = cli.training_flags("", out="out", steps=160_000).parse_args([str(flag) for flag in flags])
    args.micro_batch_size = args.batch_size
    return args


def test_masks_are_drawn_as_in_training():
    args = parsed_flags("--patch-size", 32, "--resolution", 192, "--num-frames", 4, "--batch-size", 12, "--seed", 7,
                        "--mask-truncation", "raster", "--masks-per-clip", 3, "--target-fraction", 0.5)  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for counts in flops.drawn_masks(args):
        masks = sample_masks("multiblock", (2, 6, 6), 12, generator, "raster", None, 3, 0.5)
        assert counts == [(m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks]


def test_the_papers_convention():
    """6 FLOPs per parameter and trained token: of 10% for the encoder, of all for the predictor; 2 for the teacher."""
    student, teacher, predict = encoder(), encoder(width=96, heads=4), predictor(out_width=96)
    networks = Encoder(**student), Encoder(**teacher), Predictor(**predict), Predictor(**predictor(96, 96))
    e, t, p, decoder = (sum(x.numel() for x in network.parameters()) for network in networks)
    assert flops.paper_flops(student, predict, teacher, 1000) == 6 * e * 200 + 6 * p * 2000 + 2 * t * 1000
    for masks_per_clip in (1, 3):  # of a V-Pixel teacher, whose decoder is counted as if it predicted latents
        _, counted = flops.per_clip((teacher, predictor(96, 384), None, 1), [TWO * masks_per_clip], 1000)
        assert counted == masks_per_clip * (6 * t * 200 + 6 * decoder * 2000)


def test_the_training_log_counts_executed_flops(teacher, student, ema):
    for stage, run, other in ((1, teacher, None), (2, student, teacher), (2, ema, ema)):  # other: of the targets
        drawn = []
        for step in range(6):  # of one micro-batch of four clips
            key = stage, 0, step
            rng, sizes = training.generator("masks", *key, 0), training.generator("block sizes", *key)
            masks = sample_masks("multiblock", (2, 4, 4), 4, rng, sizes=sizes)
            drawn.append([(m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks])
        target = other and load_checkpoint(other)["model"]["encoder"]
        expected, _ = flops.per_clip((*load_checkpoint(run)["model"].values(), target, 6), drawn, 32)
        assert read_metrics(run)[-1]["flops"] == pytest.approx(24 * expected, rel=1e-12)


SMALL = ["--model", "vit_ti", "--depth", 2, "--resolution", 64, "--predictor-depth", 2, "--batch-size", 8,
         "--steps", 5000]  # fmt: skip
OTHERS = ["--teacher", "vit_s", "--teacher-steps", 3000]
SHAPE = dict(num_frames=16, resolution=64, patch_size=16, tubelet_size=2)  # 128 tokens


@pytest.fixture
def costs(monkeypatch):
    """What the runs of SMALL cost: {kind: (steps, FLOPs executed per clip, FLOPs per clip by the paper's count)}."""
    monkeypatch.setattr(flops, "DRAWS", 9)
    args = parsed_flags(*SMALL)
    args.teacher, args.teacher_steps = "vit_s", 3000
    plan = flops.stages(args)
    student, teacher = SIZES["vit_ti"] | SHAPE | {"depth": 2}, SIZES["vit_s"] | SHAPE
    of_teacher, of_student = dict(width=384, depth=2, heads=6), dict(width=192, depth=2, heads=3)
    assert plan == {
        "teacher": (teacher, predictor(384, 1536, **of_teacher), None, 3000),
        "student": (student, predictor(192, 384, **of_student), teacher, 5000),
        "ema": (student, predictor(192, 192, **of_student), student, 8000),
    }
    masks = flops.drawn_masks(args)
    return {kind: (stage[3], *flops.per_clip(stage, masks, 128)) for kind, stage in plan.items()}


def test_executed_prints_the_cost_of_a_step(costs, capfd):
    run_script(flops, "--executed", *SMALL, *OTHERS)
    lines, masks = capfd.readouterr().out.splitlines(), flops.drawn_masks(parsed_flags(*SMALL))
    context, targets = (sum(counts[1][i] for counts in masks) / 9 / 128 for i in (0, 1))
    assert lines[1] == f"multiblock mask 2: context {context:.1%}, targets {targets:.1%} of 128 tokens"
    for line, (kind, (steps, executed, by_the_paper)) in zip(lines[-3:], costs.items(), strict=True):
        encoded, predicted, made, *figures = map(float, line.removeprefix(kind).split())
        assert (made == 0) == (kind == "teacher")
        assert encoded + predicted + made == pytest.approx(executed / 1e9, rel=2e-3)
        step = 8 * executed
        assert figures == pytest.approx([executed / 1e9, by_the_paper / 1e9, step, step * steps], rel=1e-2)


def test_matched_runs_cost_the_same(costs, capfd):
    run_script(flops, "--match", *SMALL, *OTHERS)
    _, *columns = zip(*costs.values(), strict=True)
    for line, (teacher, student, ema) in zip(capfd.readouterr().out.splitlines(), columns, strict=True):
        salt, (steps, *_, total) = 3000 * teacher + 5000 * student, line.split()
        assert abs(int(steps) * ema - salt) <= ema / 2 and float(total) == pytest.approx(8 * salt, rel=1e-3)


def test_hours_and_what_the_loader_must_deliver(costs, capfd):
    run_script(flops, "--hours", 400, "--gpus", 8, "--clips-per-core", 20, *SMALL, *OTHERS)
    expected = {f"{kind}, {steps} steps": (8 * steps, 8 * steps * work) for kind, (steps, work, _) in costs.items()}
    encoder = SIZES["vit_ti"] | SHAPE | {"depth": 2}
    expected["probe.py --task k400"] = flops.probe_cost(encoder, 128, segments=8, views=3, probes=20)
    expected["probe.py --task k400 --fast"] = flops.probe_cost(encoder, 128, segments=1, views=1, probes=1)
    for line, (name, (clips, work)) in zip(capfd.readouterr().out.splitlines()[-5:], expected.items(), strict=True):
        rate = clips / (work / 400e12)
        assert line[:28].strip() == name
        figures = [work, work / (8 * 400e12) / 3600, rate, rate / 20]
        assert [*map(float, line[28:].split())] == pytest.approx(figures, rel=1e-2)


def test_cost_of_a_probe():
    """Two segments and views, three probes of three blocks, on K400's 240,000 + 20,000 videos; 20 epochs."""
    with torch.device("meta"), FlopCounterMode(display=False) as encoding:
        Encoder(**encoder())(torch.empty(2, 3, 4, 32, 32))
    with torch.device("meta"), FlopCounterMode(display=False) as probing:
        Block(48, 2)(torch.empty(9, 64, 48))  # 3 probes x 3 blocks
    encode, probe = encoding.get_total_flops(), probing.get_total_flops()
    work = 20 * 240_000 * (encode + 3 * probe) + 20_000 * 2 * (encode + probe)
    expected = 2 * (20 * 240_000 + 20_000), pytest.approx(work, rel=1e-9)
    assert flops.probe_cost(encoder(), 32, segments=2, views=2, probes=3) == expected


@pytest.mark.parametrize("flags, message", [
    ("--executed --match", "not allowed with argument --executed"),
    ("--model vit_l", "--executed --match --hours is required"),
    ("--executed --mask causal --num-frames 2", "too small"),
    ("--match --batch-size 0", "--batch-size 0"), ("--match --micro-batch-size 0", "--micro-batch-size 0"),
    ("--hours 0", "--hours"), ("--hours 400 --clips-per-core 0", "--clips-per-core"),
])  # fmt: skip
def test_invalid_flags_are_one_line_errors(flags, message, capfd):
    assert message in refusal(capfd, flops, *flags.split())
