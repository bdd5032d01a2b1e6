"""The training recipe and the three scripts: schedules, optimizer, losses, EMA, the fixed batch, users' mistakes."""

import argparse
import contextlib
import copy
import difflib
import inspect
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EXACT_METRICS,
    TINY,
    extra_flags,
    randomize,
    read_metrics,
    refusal,
    run_script,
    same_tensors,
    truncate,
    write_image,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import cli
import data
import flops
import masking
import train_ema_baseline
import train_student
import train_teacher
import training
from model import Encoder, Predictor, fingerprint, gather, load_checkpoint, load_encoder

ROOT = Path(__file__).parents[1]
GRID = (2, 4, 4)
CLOSE = dict(atol=1e-4, rtol=1e-4)
OUT_WIDTH = {train_teacher: 3 * 2 * 8 * 8, train_student: 48, train_ema_baseline: 48}  # of the predictor
every_script = pytest.mark.parametrize("script", list(OUT_WIDTH), ids=lambda script: script.__name__)


def parsed_flags(steps, *flags):
    """The training flags after `training.setup`. The defaults are the paper's."""
    args = cli.training_flags("", out="out", steps=steps).parse_args(["--device", "cpu", *flags])
    training.setup(args, stage=2)
    return args


def make_networks(out_width, width=32, predictor_width=16):
    """A small encoder and predictor, always initialized alike."""
    torch.manual_seed(0)
    encoder = Encoder(width=width, depth=1, heads=2, num_frames=4, resolution=32, patch_size=8)
    return encoder, Predictor(width, out_width, width=predictor_width, depth=1, heads=2)


def make_teacher(width=48):
    """A small frozen encoder."""
    return make_networks(1, width)[0].eval().requires_grad_(False)


def make_batch(count=4):
    """Random clips and their multi-block masks."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 4, 32, 32, generator=rng), masking.sample_masks("multiblock", GRID, count, rng)


def make_targets(script, teacher, clips):
    """The targets of a script at all tokens: pixels, or the teacher's latents."""
    if script is train_teacher:
        return train_teacher.pixel_targets(clips, 2, 8)
    return script.latent_targets(teacher, clips)


def mean_loss(script, encoder, predictor, targets, clips, masks):
    """The mean loss over the masks, and the last mask's predictions and targets."""
    loss_function = train_teacher.pixel_loss if script is train_teacher else script.latent_loss
    results = [loss_function(encoder, predictor, targets, clips, mask) for mask in masks]
    return torch.stack([loss for loss, *_ in results]).mean(), *results[-1][1:]


# ---------------------------------------------------------------------------------------------------------------------
# schedules and optimizer


@pytest.mark.parametrize("steps", [80_000, 160_000])
def test_schedules_match_the_paper(steps):
    args = parsed_flags(steps)
    assert (args.batch_size, args.clip_grad, args.betas, args.steps) == (3072, 0.02, (0.9, 0.95), steps)

    def lr(step):
        return training.learning_rate(step, args)

    def decay(step):
        return training.weight_decay(step, args)

    def near(x):
        return pytest.approx(x, rel=1e-9)

    assert (lr(0), lr(2500), lr(10_000)) == (near(2e-4), near(3.0625e-4), near(6.25e-4))
    assert lr(9999) < lr(10_000) > lr(10_001) and lr(steps - 1) == near(1e-6)
    half = (10_000 + steps - 1) / 2
    assert (lr(math.floor(half)) + lr(math.ceil(half))) / 2 == near((6.25e-4 + 1e-6) / 2)
    quarter = 1e-6 + (6.25e-4 - 1e-6) * (1 + math.cos(math.pi / 4)) / 2
    assert lr(10_000 + (steps - 10_001) // 4) == pytest.approx(quarter, rel=1e-4)
    assert (decay(0), decay(steps - 1)) == (near(0.04), near(0.4))
    assert (decay(steps // 2 - 1) + decay(steps // 2)) / 2 == near(0.22)
    assert decay((steps - 1) // 4) == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-3)


def test_defaults_of_short_runs_and_small_batches():
    args = parsed_flags(200, "--batch-size", "48")
    assert args.warmup_steps == 20 and args.lr == pytest.approx(6.25e-4 / 8)  # 48 = 3072 / 8²
    assert parsed_flags(19_999).warmup_steps == 1999 and parsed_flags(20_000).warmup_steps == 10_000
    assert parsed_flags(5).warmup_steps == 0
    args = parsed_flags(200, "--warmup-steps", "7", "--lr", "0.1")
    assert (args.warmup_steps, args.lr) == (7, 0.1)


def test_start_lr_is_relative_to_lr():
    assert parsed_flags(80_000, "--lr", "1e-3").start_lr == pytest.approx(3.2e-4)
    assert parsed_flags(80_000, "--start-lr", "1e-5").start_lr == 1e-5


def test_biases_norms_and_mask_tokens_have_no_weight_decay():
    args = parsed_flags(80_000)
    encoder, predictor = make_networks(48)
    optimizer = training.make_optimizer([encoder, predictor], args)
    training.set_schedules(optimizer, 5000, args)
    names = {p: n for m in (encoder, predictor) for n, p in m.named_parameters()}
    settings = {p: (g["weight_decay"], g["lr"], g["betas"]) for g in optimizer.param_groups for p in g["params"]}
    assert settings.keys() == names.keys()
    for p, name in names.items():
        not_decayed = "norm" in name or name.endswith("bias") or name == "mask_tokens"
        expected = 0.0 if not_decayed else training.weight_decay(5000, args)
        assert settings[p] == (expected, 4.125e-4, (0.9, 0.95)), name
    assert len(settings) == len(set(settings)) and any(n == "mask_tokens" for n in names.values())


def test_update_clips_the_global_norm():
    """AdamW's step does not depend on the gradients' scale, so check its running average of the gradients."""
    args = parsed_flags(80_000, "--clip-grad", "0.5")
    modules = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
    optimizer = training.make_optimizer(modules, args)
    params = [p for m in modules for p in m.parameters()]
    for p in params:
        p.grad = torch.ones_like(p)
    assert training.update(optimizer, torch.tensor(0.0), args)[1].item() == pytest.approx(math.sqrt(24))
    assert all(p.grad is None for p in params)
    clipped = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in params]) / 0.1
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_pixel_targets_are_normalized_as_in_videomae():
    clips = torch.rand(2, 3, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    targets = train_teacher.pixel_targets(clips, 2, 8)
    assert targets.shape == (2, 2 * 3 * 2, 3 * 2 * 8 * 8)
    for b in range(2):
        for n in range(12):
            t, y, x = n // 6, n // 2 % 3, n % 2
            cube = clips[b, :, 2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(3, -1).double()
            mean = cube.sum(1, keepdim=True) / 128
            std = ((cube - mean).square().sum(1, keepdim=True) / 127).sqrt()
            torch.testing.assert_close(targets[b, n].double(), ((cube - mean) / (std + 1e-6)).flatten(), **CLOSE)
    faint = clips * 1e-6  # so that the 1e-6 in the denominator matters
    std = faint[:, :, :2, :8, :8].flatten(2).std(2)
    targets = train_teacher.pixel_targets(faint, 2, 8)[:, 0].view(2, 3, -1)
    torch.testing.assert_close(targets.std(2), std / (std + 1e-6), **CLOSE)


class OffsetPredictor(torch.nn.Module):
    """A predictor that returns the targets plus offsets[i] for mask i."""

    def __init__(self, targets, masks, offsets):
        super().__init__()
        self.targets, self.masks, self.offsets = targets, masks, offsets

    def forward(self, context, context_ids, target_ids, grid, mask_index):
        mask = self.masks[mask_index]
        assert torch.equal(context_ids, mask.context_ids) and torch.equal(target_ids, mask.target_ids)
        assert context.shape[:2] == context_ids.shape and tuple(grid) == GRID
        return gather(self.targets, target_ids) + self.offsets[mask_index]


@every_script
def test_losses(script):
    """The mean squared error of pixels, the mean absolute error of latents; 0 if the prediction is correct."""
    encoder, _ = make_networks(1)
    clips, masks = make_batch()
    expected = (0.25 + 4) / 2 if script is train_teacher else (0.5 + 2) / 2
    if script is train_teacher:
        targets = train_teacher.pixel_targets(clips, 2, 8)
    else:
        targets = F.layer_norm(make_teacher()(clips), (48,), eps=1e-5)
    for offsets, value in (((0, 0), 0), ((0.5, -2), expected)):
        predictor = OffsetPredictor(targets, masks, offsets)
        loss, *_ = mean_loss(script, encoder, predictor, make_targets(script, make_teacher(), clips), clips, masks)
        assert loss.item() == pytest.approx(value, rel=1e-4, abs=1e-6)


@every_script
def test_gradients_reach_only_encoder_and_predictor(script):
    encoder, predictor = make_networks(OUT_WIDTH[script])
    clips, masks = make_batch()
    teacher = make_teacher()
    targets = make_targets(script, teacher.requires_grad_(True), clips)
    assert not targets.requires_grad and targets.dtype == torch.float32
    loss, *_ = mean_loss(script, encoder, predictor, targets, clips, masks)
    loss.backward()
    for name, p in (*encoder.named_parameters(), *predictor.named_parameters()):
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert (predictor.mask_tokens.grad.abs().max(1).values > 0).all()  # both masks contribute
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("script, factor", [(train_teacher, 0.8), (train_student, 0.7)])
def test_one_batch_can_be_learned(script, factor):
    encoder, predictor = make_networks(OUT_WIDTH[script], 64, 64)
    clips, masks = make_batch(1)
    args = parsed_flags(10, "--warmup-steps", "1", "--clip-grad", "10")
    optimizer = training.make_optimizer([encoder, predictor], args)
    for group in optimizer.param_groups:
        group["lr"] = 2e-3
    targets = make_targets(script, make_teacher(), clips)
    losses = []
    for _ in range(150):
        loss, *_ = mean_loss(script, encoder, predictor, targets, clips, masks)
        loss.backward()
        training.update(optimizer, torch.tensor(0.0), args)
        losses.append(loss.item())
    assert losses[-1] < factor * losses[0]


@every_script
def test_flops_match_torchs_counter(script):
    torch.manual_seed(0)
    encoder = Encoder(width=64, depth=2, heads=2, mlp_ratio=3.0, num_frames=4, resolution=32, patch_size=8)
    predictor = Predictor(64, OUT_WIDTH[script], width=32, depth=3, heads=2)
    clips, masks = make_batch()
    teacher = None if script is train_teacher else make_teacher()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        targets = make_targets(script, make_teacher(), clips)
        mean_loss(script, encoder, predictor, targets, clips, masks)[0].backward()
    counts = [(m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks]
    per_clip = flops.step_flops(encoder.config, predictor.config, counts, teacher and teacher.config, 32)
    assert 4 * per_clip == pytest.approx(counter.get_total_flops(), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs of the scripts


@pytest.fixture
def loaded_teachers(monkeypatch):
    """A list of the teachers that train_student.py loads during the test."""
    load_teacher, loaded = train_student.load_teacher, []

    def load_and_remember(args):
        network, identity = load_teacher(args)
        loaded.append(network)
        return network, identity

    monkeypatch.setattr(train_student, "load_teacher", load_and_remember)
    return loaded


def test_the_teacher_is_frozen(teacher, loaded_teachers, tmp_path):
    before = (teacher / "checkpoint.pt").read_bytes()
    run_script(train_student, *TINY, "--teacher", teacher / "checkpoint.pt", "--out", tmp_path / "s")
    (network,) = loaded_teachers
    assert not any(m.training for m in network.modules()) and not any(p.requires_grad for p in network.parameters())
    assert same_tensors(network.state_dict(), load_encoder(teacher).state_dict())
    assert (teacher / "checkpoint.pt").read_bytes() == before


@every_script
def test_every_micro_batch_is_new_and_losses_are_averaged(script, teacher, tmp_path, monkeypatch):
    clips, masks, losses = [], [], []
    masks_per_clip = 2 if script is train_student else 1
    name = "pixel_loss" if script is train_teacher else "latent_loss"
    original = getattr(script, name)

    def recorded_loss(*args):
        result = original(*args)
        *_, batch, mask = args
        if torch.is_grad_enabled():  # not the fixed batch
            clips.extend(batch if len(losses) % (2 * masks_per_clip) == 0 else [])
            masks.append(mask.context_ids.numpy().tobytes())
            losses.append(result[0].item())
        return result

    monkeypatch.setattr(script, name, recorded_loss)
    run_script(script, *TINY, *extra_flags(script, teacher), "--micro-batch-size", 2, "--seed", 3,
               "--masks-per-clip", masks_per_clip, "--out", tmp_path)  # fmt: skip
    stage = 1 if script is train_teacher else 2
    expected = data.Synthetic(4, 32, data.stream_seed("data", stage, 3)).batch(range(6 * 4)).clips
    torch.testing.assert_close(torch.stack(clips), data.normalize(expected, "cpu"))  # every clip once
    assert len(set(zip(masks[::2], masks[1::2], strict=True))) == 12 * masks_per_clip
    assert [loss for (loss,) in read_metrics(tmp_path, "loss")] == pytest.approx(
        torch.tensor(losses).view(6, 4 * masks_per_clip).mean(1).tolist()
    )


def test_a_student_can_be_the_teacher(student, tmp_path):
    """The predictor's output is as wide as the teacher, here a student of width 48."""
    run_script(train_student, *TINY, "--teacher", student, "--out", tmp_path / "next")
    checkpoint = load_checkpoint(tmp_path / "next")
    assert (checkpoint["model"]["encoder"]["width"], checkpoint["model"]["predictor"]["out_width"]) == (32, 48)


def test_an_ema_teacher_can_be_the_teacher(ema, loaded_teachers, tmp_path):
    run_script(train_student, *TINY, "--teacher", ema, "--steps", 3, "--out", tmp_path)
    assert same_tensors(loaded_teachers[0].state_dict(), load_checkpoint(ema)["encoder"])


@pytest.mark.parametrize("mask", masking.STRATEGIES)
def test_every_masking_strategy_trains(mask, tmp_path):
    flags = ["--mask", mask, "--mask-truncation", "raster", "--resolution", "16", "--patch-size", "2"]
    run_script(train_teacher, *TINY, *flags, "--steps", 3, "--out", tmp_path)
    tokens = load_checkpoint(tmp_path)["predictor"]["mask_tokens"]
    assert len(tokens) == masking.STRATEGIES[mask].num_masks and (tokens.abs().max(1).values > 0).all()


def test_bfloat16_keeps_float32_weights(tmp_path):
    run_script(train_teacher, *TINY, "--dtype", "bfloat16", "--out", tmp_path)
    assert all(x.dtype == torch.float32 for x in load_checkpoint(tmp_path)["encoder"].values())
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path))


def test_a_student_shares_no_randomness_with_its_teacher(tmp_path, monkeypatch):
    """Equal size and seed, but other initial weights, clips and masks; the next student differs from both."""
    seen = {}

    def record(script, name):
        draw_masks = script.draw_masks

        def draw(args, step, g):
            masks = draw_masks(args, step, g)
            seen[name] = seen.get(name, []) + [mask.context_ids.tolist() for mask in masks]
            return masks

        monkeypatch.setattr(script, "draw_masks", draw)

    first, weights = [], []
    for name, script, flags in (
        ("1", train_teacher, ()),
        ("2", train_student, ("--teacher", tmp_path / "1")),
        ("3", train_student, ("--teacher", tmp_path / "2")),
    ):
        with monkeypatch.context():
            record(script, name)
            run_script(script, *TINY, *flags, "--steps", 3, "--lr", 1e-9, "--final-lr", 0, "--out", tmp_path / name)
        monkeypatch.undo()
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint["stage"] == int(name)
        weights.append(checkpoint["encoder"]["blocks.0.mlp.fc1.weight"])
        seed = data.stream_seed("data", int(name), 0)
        first.append(data.Synthetic(4, 32, seed).batch([0]).clips)
    for a, b in itertools.combinations(range(3), 2):
        assert (weights[a] - weights[b]).abs().mean() > 1e-3  # a shared initialization would differ by about 1e-9
        assert not torch.equal(first[a], first[b])
        assert seen[str(a + 1)] != seen[str(b + 1)]


def test_random_streams_are_independent_of_trailing_zeros_and_of_each_other():
    keys = [("masks", 1), ("masks", 1, 0), ("masks", 1, 0, 0), ("masks", 0), ("masks",), ("crop", 1), ("order", 1)]
    seeds = [data.stream_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**62 for seed in seeds)
    assert data.stream_seed("masks", 1) == seeds[0]


def test_a_student_prints_whether_its_teacher_has_finished(teacher, tmp_path, capfd):
    run_script(train_student, *TINY, "--teacher", teacher, "--steps", 3, "--out", tmp_path / "student")
    assert f"teacher: {teacher}, step 6 of 6\n" in capfd.readouterr().out
    checkpoint = load_checkpoint(teacher)
    torch.save(checkpoint | {"step": 4}, tmp_path / "cut.pt")
    run_script(train_student, *TINY, "--teacher", tmp_path / "cut.pt", "--steps", 3, "--out", tmp_path / "other")
    assert "step 4 of 6; WARNING: its training has not finished\n" in capfd.readouterr().out


def test_a_checkpoint_identifies_its_teacher(teacher, student):
    identity = load_checkpoint(student)["teacher"]
    weights = load_checkpoint(teacher)["encoder"]
    assert identity == {"path": str(teacher), "stage": 1, "step": 6, "sha256": fingerprint(weights)}
    changed = {name: x.clone() for name, x in weights.items()}
    changed["norm.bias"][0] += 1e-6
    assert fingerprint(changed) != identity["sha256"]
    assert load_checkpoint(teacher)["teacher"] is None


def test_a_run_does_not_continue_with_another_teacher(teacher, student, tmp_path, capfd):
    run = shutil.copytree(student, tmp_path / "run")
    other = shutil.copytree(teacher, tmp_path / "teacher")
    checkpoint = load_checkpoint(other)
    flags = [*TINY, "--width", 48, "--steps", 8, "--out", run, "--teacher", other]
    checkpoint["encoder"]["norm.bias"][0] += 1e-3
    torch.save(checkpoint, other / "checkpoint.pt")
    error = refusal(capfd, train_student, *flags)
    assert f"was trained with another teacher: {teacher} at step 6, now {other} at step 6" in error
    shutil.copy(teacher / "checkpoint.pt", other / "checkpoint.pt")  # the same weights elsewhere are the same teacher
    run_script(train_student, *flags)
    assert load_checkpoint(run)["step"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# the baseline


def test_update_teacher_is_a_moving_average():
    teacher, student = randomize(make_teacher()), make_networks(1, 48)[0]
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    now = {name: x.clone() for name, x in student.state_dict().items()}
    train_ema_baseline.update_teacher(teacher, student, 0.7)
    for name, x in teacher.state_dict().items():
        torch.testing.assert_close(x, 0.7 * before[name] + 0.3 * now[name])
    assert same_tensors(student.state_dict(), now) and not any(p.requires_grad for p in teacher.parameters())


def training_loop(script):
    """The lines of a script from its loop over steps to run.finish()."""
    source = inspect.getsource(script)
    start, end = source.index("    for step in range("), source.index("    run.finish()")
    return source[start:end].splitlines()


def test_only_update_teacher_differs_in_the_loops_of_student_and_baseline():
    diff = difflib.ndiff(training_loop(train_ema_baseline), training_loop(train_student))
    changes = [line for line in diff if not line.startswith(" ")]
    assert len(changes) == 1 and changes[0].startswith("-         update_teacher("), changes


def test_the_diff_in_the_readme_is_up_to_date():
    _, diff = (ROOT / "README.md").read_text().split("```diff\n")
    lines = diff.split("```")[0].splitlines()
    scripts = {"-": train_ema_baseline, "+": train_student}
    sources = {sign: inspect.getsource(script).splitlines() for sign, script in scripts.items()}
    changes = [line for line in lines if line != "..."]
    assert {line[0] for line in changes} == {"-", "+"}
    for line in changes:
        sign, code = line[0], line[1:]
        other = "+" if sign == "-" else "-"
        assert code in sources[sign] and code not in sources[other], line


def ema_run(out, *flags):
    """Run the baseline. Returns the initial weights of the student, and the checkpoint of each step."""
    run_script(train_ema_baseline, *TINY, "--steps", 3, "--snapshot-every", 1, "--out", out, "--seed", 5, *flags)
    steps = [load_checkpoint(out / f"checkpoint-{step:06}.pt") for step in (1, 2, 3)]
    return initial_student(steps[0], 5).state_dict(), steps


def initial_student(checkpoint, seed):
    """The student of a checkpoint, as a stage-2 run with this seed initializes it."""
    torch.manual_seed(data.stream_seed("initialization", 2, seed))
    return Encoder(**checkpoint["model"]["encoder"])


@pytest.mark.parametrize("flags, momenta", [
    (("--ema-momentum", 0.8), [0.8, 0.8, 0.8]),
    (("--ema-momentum", 0.7, "--final-ema-momentum", 1), [0.7, 0.8, 0.9]),
    (("--ema-momentum", 0.4, "--final-ema-momentum", 1, "--ema-stretch", 2), [0.4, 0.5, 0.6]),
])  # fmt: skip
def test_the_saved_encoder_averages_the_students(flags, momenta, tmp_path):
    encoder, steps = ema_run(tmp_path, *flags)
    for momentum, checkpoint in zip(momenta, steps, strict=True):
        student = checkpoint["student"]
        encoder = {name: momentum * x + (1 - momentum) * student[name] for name, x in encoder.items()}
        for name, x in encoder.items():
            torch.testing.assert_close(checkpoint["encoder"][name], x, rtol=1e-5, atol=1e-7)
    assert not same_tensors(steps[0]["student"], steps[1]["student"])


def test_momentum_0_copies_the_student_and_1_keeps_the_teacher(tmp_path):
    for checkpoint in ema_run(tmp_path / "0", "--ema-momentum", 0)[1]:
        assert same_tensors(checkpoint["encoder"], checkpoint["student"])
    start, steps = ema_run(tmp_path / "1", "--ema-momentum", 1)
    for checkpoint in steps:
        assert same_tensors(checkpoint["encoder"], start) and not same_tensors(checkpoint["student"], start)


def ema_args(steps, **changes):
    defaults = dict(ema_momentum=0.9, final_ema_momentum=0.9, schedule_steps=steps)
    return argparse.Namespace(**vars(parsed_flags(steps)) | defaults | changes)


def test_momentum_is_constant_or_linear():
    momentum = train_ema_baseline.ema_momentum
    assert all(momentum(step, ema_args(20_000)) == 0.9 for step in (0, 1, 10_000, 19_999))
    ramp = ema_args(
        20_000, ema_momentum=0.998, final_ema_momentum=1.0
    )  # V-JEPA's; would reach 1 one step after the last
    momenta = [momentum(step, ramp) for step in (0, 5000, 10_000, 20_000)]
    assert momenta == pytest.approx([0.998, 0.9985, 0.999, 1.0], abs=1e-12)


def test_stretched_schedules_are_longer_schedules_cut_off():
    stretched, longer = (
        ema_args(steps, schedule_steps=25_000, ema_momentum=0.998, final_ema_momentum=1.0) for steps in (20_000, 25_000)
    )
    for schedule in (training.learning_rate, training.weight_decay, train_ema_baseline.ema_momentum):
        assert [schedule(step, stretched) for step in range(0, 20_000, 999)] == [
            schedule(step, longer) for step in range(0, 20_000, 999)
        ]
        assert schedule(19_999, stretched) != pytest.approx(schedule(24_999, stretched))


def test_schedules_of_the_baseline(ema, tmp_path, monkeypatch):
    """By default nothing is stretched and the momentum is constant; --ema-stretch stretches all three schedules."""
    momenta, update_teacher = [], train_ema_baseline.update_teacher

    def update_and_remember(teacher, student, momentum):
        momenta.append(momentum)
        update_teacher(teacher, student, momentum)

    monkeypatch.setattr(train_ema_baseline, "update_teacher", update_and_remember)
    run_script(train_ema_baseline, *TINY, "--out", tmp_path / "plain")
    assert momenta == [0.99925] * 6
    assert read_metrics(tmp_path / "plain", *EXACT_METRICS) == read_metrics(ema, *EXACT_METRICS)
    assert read_metrics(ema, "lr", "weight_decay")[-1] == pytest.approx([1e-6, 0.4])
    run_script(train_ema_baseline, *TINY, "--steps", 8, "--ema-stretch", 1.25, "--ema-momentum", 0.9,
               "--final-ema-momentum", 1, "--out", tmp_path / "stretched")  # fmt: skip
    assert momenta[6:] == pytest.approx([0.9 + 0.01 * step for step in range(8)])
    run_script(train_ema_baseline, *TINY, "--steps", 10, "--out", tmp_path / "longer")
    names = ("step", "lr", "weight_decay")
    assert read_metrics(tmp_path / "stretched", *names) == read_metrics(tmp_path / "longer", *names)[:8]


@pytest.mark.parametrize("momentum", [1, 0.5])
def test_a_student_matches_the_baseline_while_their_teachers_are_the_same(momentum, ema, tmp_path):
    """The student's teacher has the baseline's initial weights, so all runs agree to the last bit at the first step.

    The later steps agree if momentum 1 keeps the baseline's teacher as it is.
    """
    flags = [*TINY, "--seed", 3]
    start = load_checkpoint(ema)
    start |= {"encoder": initial_student(start, 3).state_dict(), "stage": 1}  # the baseline is of stage 2
    torch.save(start, tmp_path / "start.pt")
    run_script(train_student, *flags, "--teacher", tmp_path / "start.pt", "--out", tmp_path / "student")
    run_script(train_ema_baseline, *flags, "--ema-momentum", momentum, "--out", tmp_path / "ema")
    student, baseline = (read_metrics(tmp_path / name, *EXACT_METRICS) for name in ("student", "ema"))
    assert student[0] == baseline[0]
    kept = momentum == 1
    assert [a == b for a, b in zip(student, baseline, strict=True)] == [True, kept, kept, kept, kept, kept]
    student, baseline = (load_checkpoint(tmp_path / name) for name in ("student", "ema"))
    assert same_tensors(student["encoder"], baseline["student"]) == kept


def test_load_encoder_loads_the_teacher_or_the_student_of_the_baseline(teacher, student, ema):
    checkpoint = load_checkpoint(ema)
    assert same_tensors(load_encoder(ema, "student").state_dict(), checkpoint["student"])
    assert same_tensors(load_encoder(ema).state_dict(), checkpoint["encoder"])
    assert not same_tensors(checkpoint["encoder"], checkpoint["student"])
    for out in (teacher, student):
        with pytest.raises(ValueError, match="holds no student"):
            load_encoder(out, "student")


# ---------------------------------------------------------------------------------------------------------------------
# users' mistakes


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--warmup-steps 6", "--warmup-steps 6"),
        ("--steps 0", "--steps"),
        ("--batch-size 0", "--batch-size"),
        ("--micro-batch-size 3", "--micro-batch-size 3"),
        ("--micro-batch-size 0", "--micro-batch-size 0"),
        ("--heads 3", "3 heads"),
        ("--heads 32", "32 heads"),
        ("--heads 0", "heads"),
        ("--predictor-heads 3", "predictor: "),
        ("--predictor-heads 0", "predictor: "),
        ("--resolution 30", "30x30"),
        ("--num-frames 3", "3 frames"),
        ("--patch-size 0", "0x0 pixels"),
        ("--resolution 8", "too small"),
        ("--mask causal --num-frames 2", "too small"),
        ("--masks-per-clip 0", "--masks-per-clip 0"),
        ("--target-fraction 0", "--target-fraction 0"),
        ("--target-fraction 1.5", "--target-fraction 1.5"),
        ("--target-fraction 0.5 --mask-truncation raster", "raster does not"),
        ("--save-every 0", "--save-every"),
        ("--log-every 0", "--log-every"),
        ("--snapshot-every -1", "--snapshot-every -1"),
        ("--seed -1", "--seed"),
        ("--workers -1", "--workers"),
        ("--model vit_x", "vit_x"),
        ("--maks tube", "--maks"),
        ("--data nowhere.csv", "nowhere.csv"),
        ("--data one.csv --frame-step 0", "--frame-step"),
        ("--data one.csv --data-weights 1 2", "1 manifests but 2 weights"),
        ("--data one.csv --data-weights 0", "weights"),
        ("--data empty.csv", "names no videos"),
        ("--out one.csv", "--out one.csv"),
        ("--out one.csv/run", "--out one.csv/run"),
    ],
)
def test_invalid_flags_are_one_line_errors(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_image(torch.zeros(3, 20, 20, dtype=torch.uint8), "x.png")
    Path("one.csv").write_text("x.png 0\n")
    Path("empty.csv").write_text("\n")
    assert message in refusal(capfd, train_teacher, *TINY, "--out", "run", *flags.split())


@pytest.mark.parametrize(
    "flags",
    ["--ema-momentum 1.5", "--ema-momentum -0.1", "--ema-momentum nan", "--final-ema-momentum 1.5",
     "--final-ema-momentum -0.1", "--ema-stretch 0.5", "--ema-stretch nan"],
)  # fmt: skip
def test_invalid_flags_of_the_baseline(flags, tmp_path, capfd):
    error = refusal(capfd, train_ema_baseline, *TINY, "--out", tmp_path / "run", *flags.split())
    assert flags.split()[0] in error and not (tmp_path / "run").exists()


def test_unusable_teachers_are_one_line_errors(teacher, tmp_path, capfd):
    flags = [*TINY, "--out", tmp_path / "run"]

    def error(path, *more):
        return refusal(capfd, train_student, *flags, "--teacher", path, *more)

    assert "--teacher" in refusal(capfd, train_student, *flags)
    assert "no checkpoint at nowhere; train_teacher.py makes one" in error("nowhere")
    assert "patch_size 8, the student 16" in error(teacher, "--patch-size", "16")
    assert "tubelet_size 2, the student 1" in error(teacher, "--tubelet-size", "1")
    (tmp_path / "text.pt").write_text("hello")
    assert "cannot be read as a checkpoint" in error(tmp_path / "text.pt")
    shutil.copy(teacher / "checkpoint.pt", tmp_path / "truncated.pt")
    truncate(tmp_path / "truncated.pt")
    assert "cannot be read as a checkpoint" in error(tmp_path / "truncated.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    assert "not a salt-1 checkpoint" in error(tmp_path / "other.pt")
    assert not (tmp_path / "run").exists()  # no run was started


@pytest.mark.parametrize("loss, gradient", [("nan", 1), ("inf", 1), (0, "nan"), (0, "inf")])
def test_a_step_that_is_not_finite_changes_nothing(loss, gradient):
    module = torch.nn.Linear(3, 3)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    args = parsed_flags(80_000)
    optimizer = training.make_optimizer([module], args)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    module.bias.grad[1] = float(gradient)
    loss, norm = training.update(optimizer, torch.tensor(float(loss)), args)
    assert not math.isfinite((loss + norm).item())
    assert same_tensors(module.state_dict(), before)
    assert not any(x.any() for state in optimizer.state.values() for x in state.values())


class NoTensorsFromPython(TorchFunctionMode):
    """Fails if a Python number becomes a tensor on a device: on a GPU the copy would wait for all queued work."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor):
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", f"{function.__name__} on a device"
        return function(*args, **kwargs)


@every_script
def test_a_step_does_not_wait_for_the_device(script):
    """On the meta device, item(), bool(), nonzero() and everything else that reads values raises an error."""
    clips, masks = torch.zeros(4, 3, 4, 32, 32, dtype=torch.uint8), make_batch()[1]
    teacher, (encoder, predictor) = make_teacher().to("meta"), make_networks(OUT_WIDTH[script])
    params = [*encoder.to("meta").parameters(), *predictor.to("meta").parameters()]
    optimizer = torch.optim.AdamW([{"params": params, "decayed": True}])
    optimizer.step = lambda: None  # fused AdamW does not support the meta device
    args = parsed_flags(80_000)
    for step in range(2):  # the first step fills the cache of RoPE tables
        with NoTensorsFromPython() if step else contextlib.nullcontext():
            training.set_schedules(optimizer, step, args)
            on_device = data.normalize(clips, torch.device("meta"))
            targets = make_targets(script, teacher, on_device)
            loss, *_ = mean_loss(script, encoder, predictor, targets, on_device, [mask.to("meta") for mask in masks])
            loss.backward()
            loss, norm = training.update(optimizer, loss.detach(), args)
            if script is train_ema_baseline:
                script.update_teacher(copy.deepcopy(encoder), encoder, 0.9)
    assert loss.is_meta and norm.is_meta


# ---------------------------------------------------------------------------------------------------------------------
# metrics of a fixed batch


@every_script
def test_fixed_batch_metrics(script, teacher, tmp_path):
    held_out = tmp_path / "held_out.csv"
    held_out.write_text("".join(f"{n}.png\n" for n in range(3)))
    for n in range(3):
        write_image(torch.full((3, 32, 32), 60 * n, dtype=torch.uint8), tmp_path / f"{n}.png")
    flags = [*TINY, *extra_flags(script, teacher), "--held-out", held_out]
    run_script(script, *flags, "--out", tmp_path / "run", "--snapshot-every", 1)
    lines = read_metrics(tmp_path / "run")
    assert len({line["held_out_loss"] for line in lines}) == len(lines) == 6
    source = data.Manifest([held_out], 4, 4, 32, train=False)
    clips = data.normalize(source.batch([0, 1, 1, 2]).clips, "cpu")  # four clips, spread over three videos
    masks = masking.sample_masks("multiblock", GRID, 4, training.generator("fixed batch", 0))
    for step, line in enumerate(lines, start=1):
        checkpoint = load_checkpoint(tmp_path / "run" / f"checkpoint-{step:06}.pt")
        learner = "student" if script is train_ema_baseline else "encoder"
        encoder = Encoder(**checkpoint["model"]["encoder"])
        encoder.load_state_dict(checkpoint[learner])
        predictor = Predictor(**checkpoint["model"]["predictor"])
        predictor.load_state_dict(checkpoint["predictor"])
        target_encoder = None
        if script is train_student:
            target_encoder = load_encoder(teacher)
        if script is train_ema_baseline:
            target_encoder = Encoder(**checkpoint["model"]["encoder"])
            target_encoder.load_state_dict(checkpoint["encoder"])
        with torch.no_grad():
            targets = make_targets(script, target_encoder, clips)
            loss, *vectors = mean_loss(script, encoder, predictor, targets, clips, masks)
        assert line["held_out_loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, x in zip(("prediction", "target"), vectors, strict=True):
            x = x.flatten(0, 1).double()
            assert line[f"{name}_std"] == pytest.approx(x.std(0).mean().item(), rel=1e-5)
            sigma = torch.linalg.svdvals(x)
            p = sigma / sigma.sum()
            entropy = torch.special.entr(p).sum()
            assert line[f"{name}_rank"] == pytest.approx(entropy.exp().item(), rel=1e-3)


def test_effective_rank():
    assert training.effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    collapsed = torch.randn(200, 1) * torch.randn(1, 64)
    assert training.effective_rank(collapsed) == pytest.approx(1, abs=1e-2)


def test_unreadable_held_out_videos_end_the_run(tmp_path, capfd):
    (tmp_path / "m.csv").write_text("gone.mp4\n")
    flags = [*TINY, "--out", tmp_path / "run", "--held-out"]
    error = refusal(capfd, train_teacher, *flags, tmp_path / "m.csv")
    assert "unreadable, and no other video to replace it: " in error and "gone.mp4: no such file" in error
    assert "nowhere.csv" in refusal(capfd, train_teacher, *flags, tmp_path / "nowhere.csv")


def test_the_loss_of_training_videos_is_not_logged_as_held_out_loss(tmp_path):
    write_image(torch.full((3, 32, 32), 60, dtype=torch.uint8), tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("a.png\n")
    run_script(train_teacher, *TINY, "--data", tmp_path / "m.csv", "--out", tmp_path / "run")
    line = read_metrics(tmp_path / "run")[-1]
    assert "held_out_loss" not in line and line["target_rank"] >= 1
