"""Losses, schedules and what a run leaves behind; a run does not depend on interruptions or the number of processes."""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flat, randomize, refusal, run_script, write_image, write_video
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
from model import Encoder, Predictor, gather, load_checkpoint, load_encoder
from run import Run

GRID = (2, 4, 4)


def networks(out_width, width=32, predictor_width=16):
    torch.manual_seed(0)
    encoder = Encoder(width=width, depth=1, heads=2, num_frames=4, resolution=32, patch_size=8)
    return encoder, Predictor(width, out_width, width=predictor_width, depth=1, heads=2)


def some_batch(count=4):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 4, 32, 32, generator=rng), masking.sample_masks("multiblock", GRID, count, rng)


def losses_of(script, encoder, predictor, clips, masks):
    return mean_loss(script, encoder, predictor, targets_of(script, some_teacher(), clips), clips, masks)[0]


def targets_of(script, teacher, clips):
    if script is train_teacher:
        return train_teacher.pixel_targets(clips, 2, 8)
    return script.latent_targets(teacher, clips)


def mean_loss(script, encoder, predictor, targets, clips, masks):
    """The mean over the masks, and the last mask's predictions and targets."""
    function = train_teacher.pixel_loss if script is train_teacher else script.latent_loss
    found = [function(encoder, predictor, targets, clips, mask, i) for i, mask in enumerate(masks)]
    return torch.stack([loss for loss, *_ in found]).mean(), *found[-1][1:]


def some_teacher(width=48):
    return networks(1, width)[0].eval().requires_grad_(False)


OUT_WIDTH = {train_teacher: 3 * 2 * 8 * 8, train_student: 48, train_ema_baseline: 48}
SCRIPTS = list(OUT_WIDTH)
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)

# ---------------------------------------------------------------------------------------------------------------------
# schedules and optimizer


def paper_args(steps, *flags):
    args = cli.training_flags("", out="out", steps=steps).parse_args(["--device", "cpu", *flags])
    training.setup(args)
    return args


@pytest.mark.parametrize("steps", [80_000, 160_000])
def test_schedules_are_the_papers(steps):
    args = paper_args(steps)
    assert (args.batch_size, args.clip_grad, args.betas, args.steps) == (3072, 0.02, (0.9, 0.95), steps)
    lr, decay = (lambda step: training.learning_rate(step, args)), (lambda step: training.weight_decay(step, args))
    near = lambda x: pytest.approx(x, rel=1e-9)  # noqa: E731
    assert (lr(0), lr(2500), lr(10_000)) == (near(2e-4), near(3.0625e-4), near(6.25e-4))
    assert lr(9999) < lr(10_000) > lr(10_001) and lr(steps - 1) == near(1e-6)
    half = (10_000 + steps - 1) / 2
    assert (lr(math.floor(half)) + lr(math.ceil(half))) / 2 == near((6.25e-4 + 1e-6) / 2)
    quarter = 1e-6 + (6.25e-4 - 1e-6) * (1 + math.cos(math.pi / 4)) / 2
    assert lr(10_000 + (steps - 10_001) // 4) == pytest.approx(quarter, rel=1e-4)
    assert (decay(0), decay(steps - 1)) == (near(0.04), near(0.4))
    assert (decay(steps // 2 - 1) + decay(steps // 2)) / 2 == near(0.22)
    assert decay((steps - 1) // 4) == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-3)


def test_start_lr_follows_lr():
    assert paper_args(80_000, "--lr", "1e-3").start_lr == pytest.approx(3.2e-4)
    assert paper_args(80_000, "--start-lr", "1e-5").start_lr == 1e-5


def test_optimizer_groups():
    args = paper_args(80_000)
    encoder, predictor = networks(48)
    optimizer = training.make_optimizer([encoder, predictor], args)
    training.set_schedules(optimizer, 5000, args)
    names = {p: n for m in (encoder, predictor) for n, p in m.named_parameters()}
    settings = {p: (g["weight_decay"], g["lr"], g["betas"]) for g in optimizer.param_groups for p in g["params"]}
    assert settings.keys() == names.keys()
    for p, name in names.items():
        free = "norm" in name or name.endswith("bias") or name == "mask_tokens"
        assert settings[p] == (0.0 if free else training.weight_decay(5000, args), 4.125e-4, (0.9, 0.95)), name
    assert len(settings) == len(set(settings)) and any(n == "mask_tokens" for n in names.values())


def test_update_clips_the_global_norm():
    """With AdamW a scale does not show in the step, so look at what the optimizer keeps."""
    args = paper_args(80_000, "--clip-grad", "0.5")
    modules = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
    optimizer = training.make_optimizer(modules, args)
    params = [p for m in modules for p in m.parameters()]
    for p in params:
        p.grad = torch.ones_like(p)
    assert training.update(optimizer, torch.tensor(0.0), args)[1].item() == pytest.approx(math.sqrt(24))
    assert all(p.grad is None for p in params)
    first = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in params]) / 0.1
    assert first.norm().item() == pytest.approx(0.5, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_pixel_targets_are_videomaes():
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
    faint = clips * 1e-6  # where the 1e-6 matters
    std = faint[:, :, :2, :8, :8].flatten(2).std(2)
    found = train_teacher.pixel_targets(faint, 2, 8)[:, 0].view(2, 3, -1).std(2)
    torch.testing.assert_close(found, std / (std + 1e-6), **CLOSE)


CLOSE = dict(atol=1e-4, rtol=1e-4)


class Says(torch.nn.Module):
    """Stands in for a predictor: answers with given targets, off by 0.5 for the first mask and 2 for the second."""

    def __init__(self, targets, masks, off):
        super().__init__()
        self.targets, self.masks, self.off = targets, masks, off

    def forward(self, context, context_ids, target_ids, grid, mask_index):
        mask = self.masks[mask_index]
        assert torch.equal(context_ids, mask.context_ids) and torch.equal(target_ids, mask.target_ids)
        assert context.shape[:2] == context_ids.shape and tuple(grid) == GRID
        return gather(self.targets, target_ids) + self.off[mask_index]


@every_script
def test_losses(script):
    """Squared error of pixels, absolute of latents, averaged over the masks; 0 when the predictor is right."""
    encoder, _ = networks(1)
    clips, masks = some_batch()
    expected = (0.25 + 4) / 2 if script is train_teacher else (0.5 + 2) / 2
    if script is train_teacher:
        targets = train_teacher.pixel_targets(clips, 2, 8)
    else:
        targets = F.layer_norm(some_teacher()(clips), (48,), eps=1e-5)
    for off, loss in (((0, 0), 0), ((0.5, -2), expected)):
        found = losses_of(script, encoder, Says(targets, masks, off), clips, masks).item()
        assert found == pytest.approx(loss, rel=1e-4, abs=1e-6)


@every_script
def test_gradients_reach_student_and_predictor_only(script):
    encoder, predictor = networks(OUT_WIDTH[script])
    clips, masks = some_batch()
    teacher = some_teacher()
    targets = targets_of(script, teacher.requires_grad_(True), clips)
    assert not targets.requires_grad and targets.dtype == torch.float32
    loss, *_ = mean_loss(script, encoder, predictor, targets, clips, masks)
    loss.backward()
    for name, p in (*encoder.named_parameters(), *predictor.named_parameters()):
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert (predictor.mask_tokens.grad.abs().max(1).values > 0).all()  # both masks take part
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("script, factor", [(train_teacher, 0.8), (train_student, 0.7)])
def test_one_batch_can_be_learned(script, factor):
    encoder, predictor = networks(OUT_WIDTH[script], 64, 64)
    clips, masks = some_batch(1)
    args = paper_args(10, "--warmup-steps", "1", "--clip-grad", "10")
    optimizer = training.make_optimizer([encoder, predictor], args)
    for group in optimizer.param_groups:
        group["lr"] = 2e-3
    losses = []
    for _ in range(150):
        loss = losses_of(script, encoder, predictor, clips, masks)
        loss.backward()
        training.update(optimizer, torch.tensor(0.0), args)
        losses.append(loss.item())
    assert losses[-1] < factor * losses[0]


@every_script
def test_flops_are_those_that_torch_counts(script):
    torch.manual_seed(0)
    encoder = Encoder(width=64, depth=2, heads=2, mlp_ratio=3.0, num_frames=4, resolution=32, patch_size=8)
    predictor = Predictor(64, OUT_WIDTH[script], width=32, depth=3, heads=2)
    clips, masks = some_batch()
    teacher = None if script is train_teacher else some_teacher()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses_of(script, encoder, predictor, clips, masks).backward()
    counts = [(m.context_ids.shape[1], m.target_ids.shape[1]) for m in masks]
    found = flops.step_flops(encoder.config, predictor.config, counts, teacher and teacher.config, 32)
    assert 4 * found == pytest.approx(counter.get_total_flops(), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# runs


EMA = ("--ema-momentum", 0.9, "--final-ema-momentum", 1, "--ema-stretch", 1.5)  # a teacher that visibly moves


def own_flags(script, teacher):
    """What a script needs, or what makes it different from the others, beside the flags that all share."""
    return {train_teacher: (), train_student: ("--teacher", teacher), train_ema_baseline: EMA}[script]


@pytest.fixture(scope="session")
def ema(tmp_path_factory):
    """The folder of a finished tiny run of the baseline, all its own flags left alone."""
    out = tmp_path_factory.mktemp("runs") / "ema"
    run_script(train_ema_baseline, *TINY, "--out", out)
    return out


def metrics(out, *names):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [[line[n] for n in names] for line in lines] if names else lines


def same_weights(a, b):
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a["step"] == b["step"] and a.keys() == b.keys()
    return all(equal(a[part], b[part]) for part in ("encoder", "predictor", "student") if part in a)


def equal(a, b):
    """Whether two state dicts hold the same numbers, to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


FIGURES = ("step", "loss", "grad_norm", "lr", "weight_decay", "context_kept", "context_lost", "target_kept", "flops")


def test_what_a_run_leaves_behind(teacher, student, ema):
    runs = (teacher, "teacher", 32, 384), (student, "student", 48, 32), (ema, "ema", 32, 32)
    for out, kind, width, out_width in runs:
        assert sorted(p.name for p in out.iterdir()) == [
            "args.json",
            "checkpoint.pt",
            "lock",
            "metrics.jsonl",
            "resume",
        ]
        record = json.loads((out / "args.json").read_text())
        assert record["kind"] == kind and record["world_size"] == 1
        args = record["args"]
        assert args["out"] == str(out) and args["steps"] == 6 and args["start_lr"] == pytest.approx(0.32 * 3e-3)
        assert record["versions"]["torch"] == torch.__version__ and "git_commit" in record
        lines = metrics(out)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        for line in lines:
            assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["clips_per_s"] > 0
            assert 0 <= line["data_wait"] <= 1 and line["bad_videos"] == 0 and line["tflops"] > 0
            assert line["tokens_per_s"] == pytest.approx(32 * line["clips_per_s"])
            assert 0.1 < line["peak_memory_gib"] < 100  # of a process that holds torch
            counts = [line[f"{a}_{b}"] for a in ("context", "target") for b in ("kept", "lost")]
            assert sum(counts) == 2 * 32  # every token of both masks is accounted for
        assert lines[0]["lr"] == pytest.approx(0.32 * 3e-3) and lines[-1]["lr"] == pytest.approx(1e-6)
        assert lines[0]["weight_decay"] == pytest.approx(0.04) and lines[-1]["weight_decay"] == pytest.approx(0.4)
        assert sorted(lines, key=lambda line: (line["seconds"], line["flops"])) == lines
        checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
        keys = {"format", "kind", "step", "model", "encoder", "encoder_is", "predictor", "args"}
        assert set(checkpoint) == keys | ({"student"} if kind == "ema" else set())
        assert (checkpoint["kind"], checkpoint["step"], checkpoint["args"]) == (kind, 6, args)
        assert checkpoint["encoder_is"] == kind
        assert checkpoint["model"]["predictor"]["out_width"] == out_width
        encoder = load_encoder(out)
        assert encoder.width == width and not encoder.training
        assert encoder(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 32, width)
    assert load_encoder(teacher).config == load_encoder(teacher / "checkpoint.pt").config


def test_the_teacher_stays_as_it_is(teacher, tmp_path, monkeypatch):
    seen, before = [], (teacher / "checkpoint.pt").read_bytes()
    load = train_student.load_teacher
    monkeypatch.setattr(train_student, "load_teacher", lambda args: seen.append(load(args)) or seen[-1])
    run_script(train_student, *TINY, "--teacher", teacher / "checkpoint.pt", "--out", tmp_path / "s")
    (used,), kept = seen, load_encoder(teacher).state_dict()
    assert not any(m.training for m in used.modules()) and not any(p.requires_grad for p in used.parameters())
    assert all(torch.equal(x, kept[k]) for k, x in used.state_dict().items())
    assert (teacher / "checkpoint.pt").read_bytes() == before


@every_script
def test_an_interrupted_run_continues_as_if_nothing_had_happened(script, teacher, tmp_path, monkeypatch, capfd):
    flags = [*TINY, *own_flags(script, teacher), "--micro-batch-size", "2", "--predictor-depth", "2"]
    run_script(script, *flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        end_step = Run.end_step

        def stop_after_four(run, step, **metrics):
            if step == 4:
                run.lock.close()  # as the end of the process would
                raise KeyboardInterrupt
            end_step(run, step, **metrics)

        patch.setattr(Run, "end_step", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            run_script(script, *flags, "--out", tmp_path / "cut", "--save-every", "3")
    assert load_checkpoint(tmp_path / "cut")["step"] == 3
    assert metrics(tmp_path / "cut", "step") == [[1], [2], [3], [4]]  # one line ahead of the saved state
    torch.manual_seed(1234)
    run_script(script, *flags, "--out", tmp_path / "cut")
    assert "at step 3 of 6" in capfd.readouterr().out
    assert metrics(tmp_path / "cut", *FIGURES) == metrics(tmp_path / "whole", *FIGURES)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_log_cut_off_in_a_line_does_not_stop_a_run(teacher, tmp_path):
    out = shutil.copytree(teacher, tmp_path / "run")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a killed process may leave it
    run_script(train_teacher, *TINY, "--out", out)
    assert metrics(out) == metrics(teacher)


def test_a_finished_run_stays_and_fresh_moves_it_aside(teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    run_script(train_teacher, *TINY, "--out", out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    for i in (1, 2):
        run_script(train_teacher, *TINY, "--out", out, "--fresh", "--seed", i)
        assert str(tmp_path / f"run.{i}") in capfd.readouterr().out
    assert {tmp_path / "run.1" / p.relative_to(out): x for p, x in before.items()} == {
        p: p.read_bytes() for p in (tmp_path / "run.1").rglob("*") if p.is_file()
    }
    assert metrics(out, "loss") != metrics(tmp_path / "run.2", "loss") != metrics(teacher, "loss")


def test_a_run_depends_on_its_seed_alone(teacher, tmp_path):
    torch.manual_seed(7)
    run_script(train_teacher, *TINY, "--out", tmp_path / "again", "--workers", "1")
    assert metrics(tmp_path / "again", *FIGURES) == metrics(teacher, *FIGURES)
    assert same_weights(tmp_path / "again", teacher)


@pytest.mark.slow
@every_script
def test_two_processes_do_what_one_does(script, teacher, tmp_path):
    """One process with two micro-batches against two processes with one."""
    flags = [*TINY, *own_flags(script, teacher), "--micro-batch-size", "2"]
    run_script(script, *flags, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.__file__]
    command = [str(x) for x in (*torchrun, *flags, "--out", tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, timeout=100, env=os.environ)
    one, two = metrics(tmp_path / "one", *FIGURES), metrics(tmp_path / "two", *FIGURES)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert json.loads((tmp_path / "two" / "args.json").read_text())["world_size"] == 2
    a, b = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    for part in {"encoder", "predictor", "student"} & a.keys():
        for name, x in a[part].items():
            torch.testing.assert_close(x, b[part][name], rtol=1e-3, atol=1e-5)


@every_script
def test_every_micro_batch_is_new_and_they_are_averaged(script, teacher, tmp_path, monkeypatch):
    clips, masks, losses = [], [], []
    name = "pixel_loss" if script is train_teacher else "latent_loss"
    original = getattr(script, name)

    def watched(*args):
        result = original(*args)
        *_, batch, mask, i = args
        if torch.is_grad_enabled():  # not the fixed batch
            clips.extend(batch if i == 0 else [])
            masks.append(mask.context_ids.numpy().tobytes())
            losses.append(result[0].item())
        return result

    monkeypatch.setattr(script, name, watched)
    run_script(script, *TINY, *own_flags(script, teacher), "--micro-batch-size", 2, "--seed", 3, "--out", tmp_path)
    expected = data.Synthetic(4, 32, 3).batch(range(6 * 4)).clips
    torch.testing.assert_close(torch.stack(clips), data.normalize(expected, "cpu"))  # no clip twice, none left out
    assert len(set(zip(masks[::2], masks[1::2], strict=True))) == 12
    assert [loss for (loss,) in metrics(tmp_path, "loss")] == pytest.approx(
        torch.tensor(losses).view(6, 4).mean(1).tolist()
    )


def test_a_student_as_teacher(student, tmp_path):
    """The next student's predictor is as wide as its teacher, here a student of width 48."""
    run_script(train_student, *TINY, "--teacher", student, "--out", tmp_path / "next")
    checkpoint = load_checkpoint(tmp_path / "next")
    assert (checkpoint["model"]["encoder"]["width"], checkpoint["model"]["predictor"]["out_width"]) == (32, 48)


def test_the_baselines_average_as_teacher(ema, tmp_path, monkeypatch):
    seen, load = [], train_student.load_teacher
    monkeypatch.setattr(train_student, "load_teacher", lambda args: seen.append(load(args)) or seen[-1])
    run_script(train_student, *TINY, "--teacher", ema, "--steps", 3, "--out", tmp_path)
    assert equal(seen[0].state_dict(), load_checkpoint(ema)["encoder"])


@pytest.mark.parametrize("mask", masking.STRATEGIES)
def test_every_mask_trains(mask, tmp_path):
    flags = ["--mask", mask, "--mask-truncation", "raster", "--resolution", "16", "--patch-size", "2"]
    run_script(train_teacher, *TINY, *flags, "--steps", 3, "--out", tmp_path)
    tokens = load_checkpoint(tmp_path)["predictor"]["mask_tokens"]
    assert len(tokens) == masking.STRATEGIES[mask].num_masks and (tokens.abs().max(1).values > 0).all()


def test_bfloat16(tmp_path):
    run_script(train_teacher, *TINY, "--dtype", "bfloat16", "--out", tmp_path)
    assert all(x.dtype == torch.float32 for x in load_checkpoint(tmp_path)["encoder"].values())
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))


def test_training_on_videos(tmp_path):
    for n in range(3):
        write_video(tmp_path / f"{n}.mp4", [flat(20 * i + n, 40) for i in range(12)])
    (tmp_path / "m.csv").write_text("0.mp4\n1.mp4\n2.mp4\nmissing.mp4\n")
    run_script(train_teacher, *TINY, "--data", tmp_path / "m.csv", "--out", tmp_path / "run", "--frame-step", 2)
    assert [line["bad_videos"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]  # a pass is a step


def test_snapshots_are_what_the_checkpoint_was(tmp_path, monkeypatch):
    save, were = Run.save, {}

    def save_and_look(run, step, snapshot):
        save(run, step, snapshot)
        were[step] = load_checkpoint(tmp_path)

    monkeypatch.setattr(Run, "save", save_and_look)
    run_script(train_teacher, *TINY, "--save-every", 3, "--snapshot-every", 2, "--steps", 7, "--out", tmp_path)
    assert list(were) == [2, 3, 4, 6, 7]
    snapshots = {2: "checkpoint-000002.pt", 4: "checkpoint-000004.pt", 6: "checkpoint-000006.pt"}
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == sorted(["checkpoint.pt", *snapshots.values()])
    for step, name in snapshots.items():
        found, expected = load_checkpoint(tmp_path / name), were[step]
        assert found["step"] == step and found.keys() == expected.keys()
        for key, value in expected.items():
            assert equal(found[key], value) if key in ("encoder", "predictor") else found[key] == value
    assert not equal(were[2]["encoder"], were[4]["encoder"])


# ---------------------------------------------------------------------------------------------------------------------
# the baseline


def test_follow_is_the_moving_average():
    teacher, student = randomize(some_teacher()), networks(1, 48)[0]
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    now = {name: x.clone() for name, x in student.state_dict().items()}
    train_ema_baseline.update_teacher(teacher, student, 0.7)
    for name, x in teacher.state_dict().items():
        torch.testing.assert_close(x, 0.7 * before[name] + 0.3 * now[name])
    assert equal(student.state_dict(), now) and not any(p.requires_grad for p in teacher.parameters())


def ema_run(out, *flags):
    """A run that keeps every step. Returns the initial weights, and the checkpoints of its steps."""
    run_script(train_ema_baseline, *TINY, "--steps", 3, "--snapshot-every", 1, "--out", out, "--seed", 5, *flags)
    steps = [load_checkpoint(out / f"checkpoint-{step:06}.pt") for step in (1, 2, 3)]
    return initial(steps[0], 5).state_dict(), steps


def initial(checkpoint, seed):
    """The student's initialization."""
    torch.manual_seed(seed)
    return Encoder(**checkpoint["model"]["encoder"])


@pytest.mark.parametrize("flags, momenta", [
    (("--ema-momentum", 0.8), [0.8, 0.8, 0.8]),
    (("--ema-momentum", 0.7, "--final-ema-momentum", 1), [0.7, 0.8, 0.9]),
    (("--ema-momentum", 0.4, "--final-ema-momentum", 1, "--ema-stretch", 2), [0.4, 0.5, 0.6]),
])  # fmt: skip
def test_the_encoder_is_the_recursion_over_the_students(flags, momenta, tmp_path):
    encoder, steps = ema_run(tmp_path, *flags)
    for momentum, checkpoint in zip(momenta, steps, strict=True):
        student = checkpoint["student"]
        encoder = {name: momentum * x + (1 - momentum) * student[name] for name, x in encoder.items()}
        for name, x in encoder.items():
            torch.testing.assert_close(checkpoint["encoder"][name], x, rtol=1e-5, atol=1e-7)
    assert not equal(steps[0]["student"], steps[1]["student"])


def test_a_momentum_of_0_copies_and_of_1_keeps(tmp_path):
    for checkpoint in ema_run(tmp_path / "0", "--ema-momentum", 0)[1]:
        assert equal(checkpoint["encoder"], checkpoint["student"])
    start, steps = ema_run(tmp_path / "1", "--ema-momentum", 1)
    for checkpoint in steps:
        assert equal(checkpoint["encoder"], start) and not equal(checkpoint["student"], start)


def ema_args(steps, **changes):
    defaults = dict(ema_momentum=0.9, final_ema_momentum=0.9, schedule_steps=steps)
    return argparse.Namespace(**vars(paper_args(steps)) | defaults | changes)


def test_momentum_is_constant_or_linear():
    momentum = train_ema_baseline.ema_momentum
    assert all(momentum(step, ema_args(20_000)) == 0.9 for step in (0, 1, 10_000, 19_999))
    ramp = ema_args(20_000, ema_momentum=0.998, final_ema_momentum=1.0)  # V-JEPA's: 1 would be reached one step later
    found = [momentum(step, ramp) for step in (0, 5000, 10_000, 20_000)]
    assert found == pytest.approx([0.998, 0.9985, 0.999, 1.0], abs=1e-12)


def test_the_stretch_cuts_longer_schedules_off():
    stretched, longer = (
        ema_args(steps, schedule_steps=25_000, ema_momentum=0.998, final_ema_momentum=1.0) for steps in (20_000, 25_000)
    )
    for schedule in (training.learning_rate, training.weight_decay, train_ema_baseline.ema_momentum):
        assert [schedule(step, stretched) for step in range(0, 20_000, 999)] == [
            schedule(step, longer) for step in range(0, 20_000, 999)
        ]
        assert schedule(19_999, stretched) != pytest.approx(schedule(24_999, stretched))


def test_the_baselines_schedules(ema, tmp_path, monkeypatch):
    """What the script makes of its flags: nothing is stretched and momentum constant by default; all three stretch."""
    momenta, follow = [], train_ema_baseline.update_teacher
    monkeypatch.setattr(train_ema_baseline, "update_teacher", lambda *a: momenta.append(a[2]) or follow(*a))
    run_script(train_ema_baseline, *TINY, "--out", tmp_path / "plain")
    assert momenta == [0.99925] * 6
    assert metrics(tmp_path / "plain", *FIGURES) == metrics(ema, *FIGURES)
    assert metrics(ema, "lr", "weight_decay")[-1] == pytest.approx([1e-6, 0.4])
    run_script(train_ema_baseline, *TINY, "--steps", 8, "--ema-stretch", 1.25, "--ema-momentum", 0.9,
               "--final-ema-momentum", 1, "--out", tmp_path / "stretched")  # fmt: skip
    assert momenta[6:] == pytest.approx([0.9 + 0.01 * step for step in range(8)])
    run_script(train_ema_baseline, *TINY, "--steps", 10, "--out", tmp_path / "longer")
    names = ("step", "lr", "weight_decay")
    assert metrics(tmp_path / "stretched", *names) == metrics(tmp_path / "longer", *names)[:8]


@pytest.mark.parametrize("momentum", [1, 0.5])
def test_with_its_initialization_as_teacher_a_student_is_the_baseline(momentum, ema, tmp_path):
    """To the last bit: at the first step always, later as long as the baseline's teacher does not move."""
    flags = [*TINY, "--seed", 3]
    start = load_checkpoint(ema)
    torch.save(start | {"encoder": initial(start, 3).state_dict()}, tmp_path / "start.pt")
    run_script(train_student, *flags, "--teacher", tmp_path / "start.pt", "--out", tmp_path / "student")
    run_script(train_ema_baseline, *flags, "--ema-momentum", momentum, "--out", tmp_path / "ema")
    student, baseline = (metrics(tmp_path / name, *FIGURES) for name in ("student", "ema"))
    assert student[0] == baseline[0]
    assert [a == b for a, b in zip(student, baseline, strict=True)] == [True] + [momentum == 1] * 5
    assert equal(load_checkpoint(tmp_path / "student")["encoder"], load_checkpoint(tmp_path / "ema")["student"]) == (
        momentum == 1
    )


def test_the_baselines_student_can_be_loaded(teacher, student, ema):
    checkpoint = load_checkpoint(ema)
    assert equal(load_encoder(ema, "student").state_dict(), checkpoint["student"])
    assert equal(load_encoder(ema).state_dict(), checkpoint["encoder"])
    assert not equal(checkpoint["encoder"], checkpoint["student"])
    for out in (teacher, student):
        with pytest.raises(ValueError, match="holds no student"):
            load_encoder(out, "student")


# ---------------------------------------------------------------------------------------------------------------------
# users' mistakes


@pytest.mark.parametrize(
    "flags, says",
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
def test_wrong_flags_end_in_one_line(flags, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_image(torch.zeros(3, 20, 20, dtype=torch.uint8), "x.png")
    Path("one.csv").write_text("x.png 0\n")
    Path("empty.csv").write_text("\n")
    assert says in refusal(capfd, train_teacher, *TINY, "--out", "run", *flags.split())


@pytest.mark.parametrize(
    "flags",
    ["--ema-momentum 1.5", "--ema-momentum -0.1", "--ema-momentum nan", "--final-ema-momentum 1.5",
     "--final-ema-momentum -0.1", "--ema-stretch 0.5", "--ema-stretch nan"],
)  # fmt: skip
def test_wrong_flags_of_the_baseline(flags, tmp_path, capfd):
    error = refusal(capfd, train_ema_baseline, *TINY, "--out", tmp_path / "run", *flags.split())
    assert flags.split()[0] in error and not (tmp_path / "run").exists()


def damage(path, left=3000):
    path.write_bytes(path.read_bytes()[:left])


@pytest.mark.parametrize("flags", [["--width", "16"], ["--predictor-depth", "2"], ["--resolution", "64"]])
def test_a_run_of_another_model_is_not_continued(flags, teacher, tmp_path, capfd):
    run = shutil.copytree(teacher, tmp_path / "run")
    error = refusal(capfd, train_teacher, *TINY, "--out", run, *flags)
    assert "another kind or model" in error and "--fresh" in error


def flip(path, place=0.5):
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda state: damage(state / "__0_0.distcp"),
    "empty": lambda state: (state / "__0_0.distcp").write_bytes(b""),
    "missing": lambda state: (state / "__0_0.distcp").unlink(),
    "first-byte": lambda state: flip(state / "__0_0.distcp", 0),
    "one-byte": lambda state: flip(state / "__0_0.distcp"),
    "metadata": lambda state: flip(state / ".metadata"),
    "no-metadata": lambda state: (state / ".metadata").unlink(),
    "no-record": lambda state: (state / "run.json").unlink(),
    "cut-record": lambda state: damage(state / "run.json", 100),
    "binary-record": lambda state: (state / "run.json").write_bytes(bytes(range(256))),
    "other-record": lambda state: (state / "run.json").write_text("{}"),
    "list-record": lambda state: (state / "run.json").write_text("[]"),
    "number-record": lambda state: (state / "run.json").write_text("0"),
}


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_state_gives_way_to_the_one_before(change, teacher, tmp_path, capfd):
    run = shutil.copytree(teacher, tmp_path / "run")
    newest = run / "resume" / "step-00000006"
    DAMAGES[change](newest)
    run_script(train_teacher, *TINY, "--out", run)
    said = capfd.readouterr()
    assert "at step 4 of 6" in said.out and said.err.count("\n") == 1
    assert said.err.startswith(f"{newest} is damaged (") and said.err.endswith("); trying the previous one\n")
    assert same_weights(run, teacher) and metrics(run, *FIGURES) == metrics(teacher, *FIGURES)
    run_script(train_teacher, *TINY, "--out", run)  # what was damaged has been replaced
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change", DAMAGES)
def test_a_run_without_a_whole_state_is_not_continued(change, teacher, tmp_path, capfd):
    run = shutil.copytree(teacher, tmp_path / "run")
    for state in (run / "resume").iterdir():
        DAMAGES[change](state)
    before = (run / "checkpoint.pt").read_bytes(), metrics(run)
    with pytest.raises(SystemExit) as stop:
        run_script(train_teacher, *TINY, "--out", run)
    *found, last = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and [line.split()[0][-8:] for line in found] == ["00000006", "00000004"]
    assert last == f"train_teacher.py: {run} holds a run, but no undamaged state to continue from; --fresh starts over"
    assert before == ((run / "checkpoint.pt").read_bytes(), metrics(run))


def test_what_a_kill_while_saving_leaves_does_not_matter(teacher, tmp_path):
    run = shutil.copytree(teacher, tmp_path / "run")
    newest = run / "resume" / "step-00000006"
    (newest / "run.json").unlink()
    newest.rename(newest.with_suffix(".tmp"))
    run_script(train_teacher, *TINY, "--out", run)
    assert same_weights(run, teacher) and metrics(run, *FIGURES) == metrics(teacher, *FIGURES)
    assert sorted(path.name for path in (run / "resume").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_student_does_not_continue_a_teacher(teacher, tmp_path, capfd):
    run = shutil.copytree(teacher, tmp_path / "run")
    assert "another kind" in refusal(capfd, train_student, *TINY, "--out", run, "--teacher", teacher)


def test_student_and_baseline_do_not_continue_each_other(teacher, ema, tmp_path, capfd):
    """Not even of one architecture, where the weights would fit."""
    flags = [*TINY, "--steps", 3]
    run_script(train_student, *flags, "--teacher", teacher, "--out", tmp_path / "student")
    assert load_checkpoint(tmp_path / "student")["model"] == load_checkpoint(ema)["model"]
    assert "another kind" in refusal(capfd, train_ema_baseline, *flags, "--out", tmp_path / "student")
    assert "another kind" in refusal(capfd, train_student, *flags, "--out", ema, "--teacher", teacher)


def test_teachers_that_do_not_do(teacher, tmp_path, capfd):
    def error(path, *flags):
        named = ["--teacher", path] if path else []
        return refusal(capfd, train_student, *TINY, "--out", tmp_path / "run", *flags, *named)

    assert "no checkpoint at nowhere; train_teacher.py makes one" in error("nowhere")
    assert "--teacher" in error(None)
    assert "patch_size 8, the student 16" in error(teacher, "--patch-size", "16")
    assert "tubelet_size 2, the student 1" in error(teacher, "--tubelet-size", "1")
    (tmp_path / "text.pt").write_text("hello")
    assert "cannot be read as a checkpoint" in error(tmp_path / "text.pt")
    shutil.copy(teacher / "checkpoint.pt", tmp_path / "cut.pt")
    damage(tmp_path / "cut.pt")
    assert "cannot be read as a checkpoint" in error(tmp_path / "cut.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    assert "not a salt-1 checkpoint" in error(tmp_path / "other.pt")
    assert not (tmp_path / "run").exists()  # nothing was begun


@pytest.mark.parametrize("bad, fails", [(1, False), (2, True)])
def test_too_many_unreadable_videos_end_the_run(bad, fails, tmp_path, capfd):
    """1 of 25 is 4%, 2 are 8%; 5% are allowed, from the 100th sample on."""
    write_image(torch.full((3, 40, 40), 99, dtype=torch.uint8), str(tmp_path / "x.png"))
    lines = ["x.png 0"] * 25
    for n in range(bad):
        lines[12 * n] = f"missing{n}.png 0"
    (tmp_path / "m.csv").write_text("\n".join(lines))
    flags = [*TINY, "--batch-size", 25, "--steps", 5, "--data", tmp_path / "m.csv", "--out", tmp_path / "run"]
    capfd.readouterr()
    if not fails:
        run_script(train_teacher, *flags)
        assert metrics(tmp_path / "run", "bad_videos")[-1] == [5]
        assert capfd.readouterr().err.count("missing0.png") == 1  # named once
        return
    with pytest.raises(SystemExit) as stop:
        run_script(train_teacher, *flags)
    assert stop.value.code == 2
    *named, last = capfd.readouterr().err.splitlines()
    assert "8 of 100 samples are unreadable, more than --max-bad 5%" in last
    assert len(named) == 2 and "missing0.png: no such file" in "".join(named)
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_unreadable_videos(workers, tmp_path, capfd):
    (tmp_path / "m.csv").write_text("".join(f"{n}.mp4\n" for n in range(12)))
    flags = [*TINY, "--workers", workers, "--data", tmp_path / "m.csv", "--out", tmp_path / "run"]
    error = refusal(capfd, train_teacher, *flags)
    assert "unreadable, and no other video to replace it: " in error and ".mp4: no such file" in error


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capfd):
    error = refusal(capfd, train_teacher, *TINY, "--lr", "1e30", "--clip-grad", "1e30", "--out", tmp_path / "run")
    assert ": step 2: loss nan, gradient norm nan, lr 6.6e+29; " in error
    assert error.endswith("Clips of process 0: built-in 4, built-in 5, built-in 6, built-in 7\n")
    assert metrics(tmp_path / "run", "step") == [[1]] and not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("loss, gradient", [("nan", 1), ("inf", 1), (0, "nan"), (0, "inf")])
def test_no_update_without_a_finite_loss_and_finite_gradients(loss, gradient):
    module = torch.nn.Linear(3, 3)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    args = paper_args(80_000)
    optimizer = training.make_optimizer([module], args)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    module.bias.grad[1] = float(gradient)
    found = training.update(optimizer, torch.tensor(float(loss)), args)
    assert not math.isfinite(sum(found).item())
    assert equal(module.state_dict(), before)
    assert not any(x.any() for state in optimizer.state.values() for x in state.values())


class NothingSent(TorchFunctionMode):
    """Refuses to make tensors of a device from Python's numbers: on a GPU the host would wait for all work before."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor):
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", f"{function.__name__} on a device"
        return function(*args, **kwargs)


@every_script
def test_a_step_does_not_wait_for_the_device(script):
    """On the meta device nothing can be read: item(), bool(), nonzero() and their like raise an error."""
    clips, masks = torch.zeros(4, 3, 4, 32, 32, dtype=torch.uint8), some_batch()[1]
    teacher, (encoder, predictor) = some_teacher().to("meta"), networks(OUT_WIDTH[script])
    params = [*encoder.to("meta").parameters(), *predictor.to("meta").parameters()]
    optimizer = torch.optim.AdamW([{"params": params, "decayed": True}])
    optimizer.step = lambda: None  # the fused one knows no meta device
    args = paper_args(80_000)
    for step in range(2):  # the first one makes the table of RoPE
        with NothingSent() if step else contextlib.nullcontext():
            training.set_schedules(optimizer, step, args)
            on_device = data.normalize(clips, torch.device("meta"))
            targets = targets_of(script, teacher, on_device)
            loss, *_ = mean_loss(script, encoder, predictor, targets, on_device, [mask.to("meta") for mask in masks])
            loss.backward()
            loss, norm = training.update(optimizer, loss.detach(), args)
            if script is train_ema_baseline:
                script.update_teacher(copy.deepcopy(encoder), encoder, 0.9)
    assert loss.is_meta and norm.is_meta


# ---------------------------------------------------------------------------------------------------------------------
# what is watched


@every_script
def test_the_fixed_batch_is_watched(script, teacher, tmp_path):
    held_out = tmp_path / "held_out.csv"
    held_out.write_text("".join(f"{n}.png\n" for n in range(3)))
    for n in range(3):
        write_image(torch.full((3, 32, 32), 60 * n, dtype=torch.uint8), tmp_path / f"{n}.png")
    flags = [*TINY, *own_flags(script, teacher), "--held-out", held_out]
    run_script(script, *flags, "--out", tmp_path / "run", "--snapshot-every", 1)
    lines = metrics(tmp_path / "run")
    assert len({line["held_out_loss"] for line in lines}) == len(lines) == 6
    source = data.Manifest([held_out], 4, 4, 32, train=False)
    clips = data.normalize(source.batch([0, 1, 1, 2]).clips, "cpu")  # four clips, spread over three lines
    masks = masking.sample_masks("multiblock", GRID, 4, training.generator(0, training.FIXED_BATCH_SEED))
    for step, line in enumerate(lines, start=1):
        checkpoint = load_checkpoint(tmp_path / "run" / f"checkpoint-{step:06}.pt")
        learner = "student" if script is train_ema_baseline else "encoder"
        encoder = Encoder(**checkpoint["model"]["encoder"])
        encoder.load_state_dict(checkpoint[learner])
        predictor = Predictor(**checkpoint["model"]["predictor"])
        predictor.load_state_dict(checkpoint["predictor"])
        with torch.no_grad():
            target_encoder = None
            if script is not train_teacher:
                target_encoder = load_encoder(
                    teacher if script is train_student else tmp_path / "run" / "checkpoint.pt"
                )
                if script is train_ema_baseline:
                    target_encoder.load_state_dict(checkpoint["encoder"])
            targets = targets_of(script, target_encoder, clips)
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


def test_what_is_held_out_must_be_readable(tmp_path, capfd):
    (tmp_path / "m.csv").write_text("gone.mp4\n")
    flags = [*TINY, "--out", tmp_path / "run", "--held-out"]
    error = refusal(capfd, train_teacher, *flags, tmp_path / "m.csv")
    assert "unreadable, and no other video to replace it: " in error and "gone.mp4: no such file" in error
    assert "nowhere.csv" in refusal(capfd, train_teacher, *flags, tmp_path / "nowhere.csv")


def test_training_videos_are_watched_but_not_called_held_out(tmp_path):
    write_image(torch.full((3, 32, 32), 60, dtype=torch.uint8), tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("a.png\n")
    run_script(train_teacher, *TINY, "--data", tmp_path / "m.csv", "--out", tmp_path / "run")
    line = metrics(tmp_path / "run")[-1]
    assert "held_out_loss" not in line and line["target_rank"] >= 1


def test_tensorboard(tmp_path, capfd, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_script(train_teacher, *TINY, "--tensorboard", "--out", tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = metrics(tmp_path / "run")
    for name in lines[0]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = refusal(capfd, train_teacher, *TINY, "--tensorboard", "--out", tmp_path / "other")
    assert "--tensorboard needs a package: pip install tensorboard" in error
