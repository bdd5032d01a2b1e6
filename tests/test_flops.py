"""Compute accounting: the paper's tables, the executed FLOPs compared with torch's counter, and the command line."""

import pytest
import torch
from conftest import read_metrics, refusal, run_script
from torch.utils.flop_counter import FlopCounterMode

import cli
import flops
import training
from masking import STRATEGIES, sample_masks
from model import SIZES, Block, Encoder, Predictor, load_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# the paper's tables

# In the order of the printed rows, in 1e21 FLOPs: by the formula (docs/method.md, section 8), and as the paper prints.
FORMULA = [
    2.202, 1.864, 3.456, 5.293, 1.427, 2.646, 1.194, 1.499, 1.851, 2.620, 1.851, 0.2422, 0.0606, 0.1211, 0.2422, 0.2379,
    0.4757, 0.5947, 0.7136, 0.8325, 0.9515, 1.1893, 1.3083, 0.7180, 0.5968, 1.864, 1.243, 0.932,
]  # fmt: skip
PRINTED = [
    2.2, 1.9, 3.5, 5.3, 1.4, 2.6, 1.2, 1.5, 1.9, 2.6, 1.8, 0.24, 0.061, 0.121, 0.241, 0.238, 0.476, 0.595, 0.714, 0.833,
    0.951, 1.190, 1.309, 0.717, 0.597, 1.9, 1.26, 0.951,
]  # fmt: skip


def test_our_counts_agree_with_the_paper_or_a_note_explains_the_difference(capfd):
    run_script(flops)
    lines = capfd.readouterr().out.splitlines()[3:-2]
    figures = [[float(x) for x in line[55:].split()[:3]] for line in lines]
    ours, printed, ratios = zip(*figures, strict=True)
    assert ours == pytest.approx(FORMULA, rel=0.01) and list(printed) == PRINTED
    assert ratios == pytest.approx([a / b for a, b in zip(FORMULA, PRINTED, strict=True)], rel=0.01)
    marked = [line for line in lines if " ! " in line]
    assert [line[11:55].rstrip() for line in marked] == [
        "SALT g, 80k + 160k steps",
        "V-JEPA 2 L, 160k steps, as if at 256",
        "V-JEPA 2 L, 120k steps, as if at 256",
    ]
    assert all(line.rpartition("! ")[2].strip() for line in marked)


def test_counts_agree_within_one_percent_or_after_rounding():
    assert all(flops.agrees(ours * 1e21, printed * 1e21) for ours, printed in ((1.251, 1.26), (1.851, 1.9), (2.4, 2)))
    assert not any(flops.agrees(ours * 1e21, printed * 1e21) for ours, printed in ((1.246, 1.26), (1.851, 1.8)))


def test_formula_of_the_paper():
    """N parameters, D tokens: 6 N D for encoder (on 10% of the tokens) and predictor per mask; 2 N D for teacher."""
    assert flops.paper_flops(1000, 7, 5) == 6 * 7 * 200 + 6 * 5 * 2000
    assert flops.paper_flops(1000, 7, 5, teacher=3, num_masks=1) == 6 * 7 * 100 + 2 * 3 * 1000 + 6 * 5 * 1000
    assert flops.paper_run("vit_l", 10, "vit_l") / flops.paper_run("vit_l", 10) == pytest.approx(0.2379 / 0.1211, 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# executed FLOPs


def encoder(**changes):
    shape = dict(width=48, depth=2, heads=2, mlp_ratio=4.0, num_frames=4, resolution=32, patch_size=8, tubelet_size=2)
    return shape | changes


def predictor(in_width=48, out_width=48, **changes):
    sizes = dict(in_width=in_width, out_width=out_width, width=32, depth=3, heads=2, num_mask_tokens=2)
    return sizes | changes


VIT_B = encoder(**SIZES["vit_b"], num_frames=16, resolution=224, patch_size=16)
TWO = [(9, 20), (3, 25)]


@pytest.mark.parametrize("student, predict, teacher, masks", [
    (encoder(), predictor(out_width=384), None, TWO),  # stage 1
    (encoder(), predictor(), encoder(), TWO),  # the EMA baseline
    (encoder(), predictor(out_width=96), encoder(width=96, depth=3, heads=4), TWO),  # stage 2, with another teacher
    (encoder(width=88, mlp_ratio=SIZES["vit_g"]["mlp_ratio"]), predictor(88, 88, heads=4),
     encoder(width=88, mlp_ratio=SIZES["vit_g"]["mlp_ratio"]), TWO),
    (encoder(heads=8, depth=1), predictor(depth=1, width=64), encoder(), TWO[:1]),  # one mask, as with tube
    (encoder(patch_size=4, tubelet_size=1), predictor(depth=1), encoder(patch_size=4, tubelet_size=1), TWO),
    (VIT_B, predictor(768, 768, width=384, depth=12, heads=16), VIT_B, [(430, 900), (160, 1250)]),
])  # fmt: skip
def test_executed_flops_match_torchs_counter(student, predict, teacher, masks):
    tokens = student["num_frames"] // student["tubelet_size"] * (student["resolution"] // student["patch_size"]) ** 2
    counted = flops.counted_flops(student, predict, masks, teacher)
    assert flops.step_flops(student, predict, masks, teacher, tokens) == pytest.approx(counted, rel=1e-9)


def parsed_flags(*flags):
    """The parsed training flags, with a micro-batch size."""
    args = cli.training_flags("", out="out", steps=160_000).parse_args([str(flag) for flag in flags])
    args.micro_batch_size = args.micro_batch_size or cli.default_micro_batch_size(args.batch_size)
    return args


@pytest.mark.parametrize("strategy, truncation", [*((name, "random") for name in STRATEGIES), ("multiblock", "raster")])
def test_masks_are_drawn_as_in_training(strategy, truncation):
    args = parsed_flags("--patch-size", 32, "--resolution", 192, "--num-frames", 4, "--batch-size", 12, "--seed", 7,
                        "--mask", strategy, "--mask-truncation", truncation, "--masks-per-clip", 3)  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for counts in flops.drawn_masks(args, draws=10):
        masks = sample_masks(strategy, (2, 6, 6), 12, generator, truncation, masks_per_clip=3)
        assert counts == [(m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks]


def test_the_papers_convention_counts_every_mask():
    once, thrice = (flops.per_clip((encoder(), predictor(), None, 1), [TWO * n], 72)[1] for n in (1, 3))
    assert thrice == pytest.approx(3 * once)


def test_the_training_log_counts_executed_flops(teacher, student, ema):
    for run, other in ((teacher, None), (student, teacher), (ema, ema)):  # other: the run of the target encoder
        checkpoint = load_checkpoint(run)
        drawn = []
        for step in range(6):  # of one micro-batch of four clips
            stage = 1 if run == teacher else 2
            rng = training.generator("masks", stage, 0, step, 0)
            sizes = training.generator("block sizes", stage, 0, step)
            masks = sample_masks("multiblock", (2, 4, 4), 4, rng, sizes=sizes)
            drawn.append([(m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks])
        stage = *checkpoint["model"].values(), other and load_checkpoint(other)["model"]["encoder"], 6
        assert read_metrics(run)[-1]["flops"] == pytest.approx(24 * flops.per_clip(stage, drawn, 32)[0], rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

SMALL = ["--model", "vit_ti", "--depth", 2, "--resolution", 64, "--predictor-depth", 2, "--batch-size", 8,
         "--teacher", "vit_s", "--teacher-steps", 3000, "--steps", 5000, "--draws", 9]  # fmt: skip
SHAPE = dict(num_frames=16, resolution=64, patch_size=16, tubelet_size=2)  # 128 tokens
STUDENT, TEACHER = SIZES["vit_ti"] | SHAPE | {"depth": 2}, SIZES["vit_s"] | SHAPE


def small_costs():
    """What the runs of SMALL cost: {kind: (steps, FLOPs executed per clip, FLOPs per clip by the paper's count)}."""
    of_teacher, of_student = dict(width=384, depth=2, heads=6), dict(width=192, depth=2, heads=3)
    costs, masks = {}, flops.drawn_masks(parsed_flags(*SMALL[:10]), 9)
    for kind, student, predict, teacher, steps in [
        ("teacher", TEACHER, predictor(384, 1536, **of_teacher), None, 3000),
        ("student", STUDENT, predictor(192, 384, **of_student), TEACHER, 5000),
        ("ema", STUDENT, predictor(192, 192, **of_student), STUDENT, 8000),
    ]:
        executed = sum(flops.step_flops(student, predict, counts, teacher, 128) for counts in masks) / 9
        # The paper counts the pixel decoder of stage 1 as if it predicted latents.
        predict = predict if teacher else predict | {"out_width": student["width"]}
        networks = Encoder(**student), Predictor(**predict), Encoder(**teacher or student)
        sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
        costs[kind] = steps, executed, flops.paper_flops(128, *sizes[: 3 if teacher else 2])
    return costs


def test_executed_prints_the_cost_of_a_step(capfd):
    run_script(flops, "--executed", *SMALL, "--counted", 1)
    lines = capfd.readouterr().out.splitlines()
    masks = flops.drawn_masks(parsed_flags(*SMALL[:10]), 9)
    for i in range(2):
        context, targets = (sum(counts[i][j] for counts in masks) / 9 / 128 for j in range(2))
        assert lines[i] == f"multiblock mask {i + 1}: context {context:.1%}, targets {targets:.1%} of 128 tokens"
    for line, (kind, (steps, executed, by_the_paper)) in zip(lines[-3:], small_costs().items(), strict=True):
        name, *figures = line.split()
        encoded, predicted, made, total, counter, paper, step, run = map(float, figures)
        assert name == kind and counter == 1 and (made == 0) == (kind == "teacher")
        assert total == pytest.approx(encoded + predicted + made, rel=2e-3)
        assert (total, paper) == pytest.approx((executed / 1e9, by_the_paper / 1e9), rel=1e-3)
        assert (step, run) == pytest.approx((8 * executed, 8 * executed * steps), rel=1e-2)


def test_matched_runs_cost_the_same(capfd):
    run_script(flops, "--match", *SMALL)
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    _, *columns = zip(*small_costs().values(), strict=True)
    for line, (teacher, student, ema) in zip(lines, columns, strict=True):
        assert line[1:3] == ["EMA", "steps"] and line[7] == "3000" and line[10] == "5000"
        assert abs(int(line[0]) * ema - (3000 * teacher + 5000 * student)) <= ema / 2
        assert float(line[-1]) == pytest.approx(8 * (3000 * teacher + 5000 * student), rel=1e-3)


def test_hours_and_what_the_loader_must_deliver(capfd):
    run_script(flops, "--hours", 400, "--gpus", 8, "--clips-per-core", 20, *SMALL)
    rows = [(line[:28].strip(), *map(float, line[28:].split())) for line in capfd.readouterr().out.splitlines()[-5:]]
    runs = {kind: (8 * steps, 8 * steps * executed) for kind, (steps, executed, _) in small_costs().items()}
    probes = [flops.probe_cost(STUDENT, 128, *protocol) for protocol in ((8, 3, 20), (1, 1, 1))]
    names = ["teacher, 3000 steps", "student, 5000 steps", "ema, 8000 steps"]
    assert [row[0] for row in rows] == [*names, "probe.py --task k400", "probe.py --task k400 --fast"]
    for (_, *printed), (clips, work) in zip(rows, [*runs.values(), *probes], strict=True):
        rate = clips / (work / 400e12)
        assert printed == pytest.approx([work, work / (8 * 400e12) / 3600, rate, rate / 20], rel=1e-2)


def test_cost_of_a_probe():
    """Two segments and views, three probes of three blocks, on K400's 240,000 + 20,000 videos; 20 epochs."""
    with torch.device("meta"), FlopCounterMode(display=False) as encoding:
        Encoder(**encoder())(torch.empty(2, 3, 4, 32, 32))
    with torch.device("meta"), FlopCounterMode(display=False) as probing:
        Block(48, 2)(torch.empty(9, 64, 48))  # 3 probes x 3 blocks
    encode, probe = encoding.get_total_flops(), probing.get_total_flops()
    clips, work = flops.probe_cost(encoder(), 32, segments=2, views=2, probes=3)
    assert clips == 2 * (20 * 240_000 + 20_000)
    expected = 20 * 240_000 * (encode + 3 * probe) + 20_000 * 2 * (encode + probe)
    assert work == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--executed --match", "not allowed with argument --executed"),
        ("--model vit_l", "other flags need --executed, --match or --hours"),
        ("--executed --teacher vit_x", "vit_x"),
        ("--executed --heads 3", "3 heads"),
        ("--match --predictor-heads 5", "predictor: "),
        ("--executed --resolution 30", "30x30"),
        ("--executed --mask causal --num-frames 2", "too small"),
        ("--executed --draws 0", "--draws 0"),
        ("--match --teacher-steps 0", "--teacher-steps 0"),
        ("--match --micro-batch-size 0", "--micro-batch-size 0"),
        ("--match --target-fraction 0", "--target-fraction 0"),
        ("--hours 0", "--hours"),
        ("--hours 400 --gpus 0", "--gpus 0"),
        ("--hours 400 --clips-per-core 0", "--clips-per-core"),
        ("--executd", "--executd"),
    ],
)
def test_invalid_flags_are_one_line_errors(flags, message, capfd):
    assert message in refusal(capfd, flops, *flags.split())
