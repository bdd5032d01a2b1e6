"""The training recipe and the three scripts: schedules, optimizer, losses, EMA, the log, resuming, users' mistakes."""

import argparse
import contextlib
import difflib
import fcntl
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, extra_flags, read_metrics, refusal, run_script, same_tensors, saved_states, write_image

import cli
import data
import masking
import train_ema_baseline
import train_student
import train_teacher
import training
from model import Encoder, Predictor, build, fingerprint, gather, load_checkpoint, load_encoder
from video import BadVideo

ROOT = Path(__file__).parents[1]
GRID = (2, 4, 4)
SCRIPTS = [train_teacher, train_student, train_ema_baseline]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")  # `pytest -k cuda`
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


def parsed_flags(steps, *flags):
    """The training flags after `training.setup`. The defaults are the paper's."""
    args = cli.training_flags("", out="out", steps=steps).parse_args(["--device", "cpu", *flags])
    training.setup(args, "student", stage=2)
    return args


def test_schedules_match_the_paper():
    args = parsed_flags(80_000)
    assert (args.batch_size, args.clip_grad) == (3072, 0.02)
    cosine = (1 + math.cos(math.pi / 4)) / 2  # after a quarter
    rates = {0: 2e-4, 2500: 3.0625e-4, 10_000: 6.25e-4, 27_499: 1e-6 + (6.25e-4 - 1e-6) * cosine, 79_999: 1e-6}
    assert {step: training.learning_rate(step, args) for step in rates} == pytest.approx(rates, rel=1e-4)
    decays = {0: 0.04, 19_999: 0.4 - 0.36 * cosine, 79_999: 0.4}
    assert {step: training.weight_decay(step, args) for step in decays} == pytest.approx(decays, rel=1e-3)


def test_defaults_of_short_runs_and_small_batches():
    args = parsed_flags(200, "--batch-size", "48")
    assert args.warmup_steps == 20 and args.lr == pytest.approx(6.25e-4 / 8)  # 48 = 3072 / 8²
    assert parsed_flags(19_999).warmup_steps == 1999 and parsed_flags(20_000).warmup_steps == 10_000
    args = parsed_flags(200, "--warmup-steps", "7", "--lr", "0.1")
    assert (args.warmup_steps, args.lr, args.start_lr) == (7, 0.1, pytest.approx(0.032))


def test_biases_norms_and_mask_tokens_have_no_weight_decay():
    args = parsed_flags(80_000)
    networks = Encoder(width=32, depth=1, heads=2), Predictor(32, 48, width=16, depth=1, heads=2)
    optimizer = training.make_optimizer(networks, args)
    training.set_schedules(optimizer, 5000, args)
    names = {p: name for network in networks for name, p in network.named_parameters()}
    settings = {p: (g["weight_decay"], g["lr"], g["betas"]) for g in optimizer.param_groups for p in g["params"]}
    assert settings.keys() == names.keys()
    for p, name in names.items():
        not_decayed = "norm" in name or name.endswith("bias") or name == "mask_tokens"
        expected = 0.0 if not_decayed else training.weight_decay(5000, args)
        assert settings[p] == (expected, 4.125e-4, (0.9, 0.95)), name


@pytest.mark.parametrize("loss, gradient", [(0, 1), ("nan", 1), ("inf", 1), (0, "nan"), (0, "inf")])
def test_the_gradient_norm_is_clipped_and_a_step_that_is_not_finite_changes_nothing(loss, gradient):
    module, args = torch.nn.Linear(3, 3), parsed_flags(80_000, "--clip-grad", "0.5")
    module(torch.ones(1, 3)).sum().backward()  # all gradients are 1
    before = {name: x.clone() for name, x in module.state_dict().items()}
    optimizer = training.make_optimizer([module], args)
    module.bias.grad[1] = float(gradient)
    loss, norm = training.optimizer_step(optimizer, torch.tensor(float(loss)), args)
    averages = [state["exp_avg"].flatten() for state in optimizer.state.values()]  # of the gradients
    if (loss, gradient) == (0, 1):
        assert norm.item() == pytest.approx(math.sqrt(12)) and not same_tensors(module.state_dict(), before)
        assert torch.cat(averages).norm().item() / 0.1 == pytest.approx(0.5, rel=1e-4)
    else:
        assert not math.isfinite((loss + norm).item()) and same_tensors(module.state_dict(), before)
        assert not any(x.any() for state in optimizer.state.values() for x in state.values())


def test_pixel_targets_are_normalized_as_in_videomae():
    clips = torch.rand(2, 3, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    targets = train_teacher.pixel_targets(clips, 2, 8)
    assert targets.shape == (2, 2 * 3 * 2, 3 * 2 * 8 * 8)
    for b, n in itertools.product(range(2), range(12)):
        t, y, x = n // 6, n // 2 % 3, n % 2
        cube = clips[b, :, 2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(3, -1).double()
        mean = cube.sum(1, keepdim=True) / 128
        std = ((cube - mean).square().sum(1, keepdim=True) / 127).sqrt()
        expected = ((cube - mean) / (std + 1e-6)).flatten().float()
        torch.testing.assert_close(targets[b, n], expected, atol=1e-4, rtol=1e-4)


@every_script
def test_the_logged_loss_is_the_method(script, teacher, tmp_path):
    """Mean squared error of pixels, mean absolute error of latents; new clips and masks in every micro-batch.

    The learning rate is so small that the weights never change.
    """
    flags = ["--micro-batch-size", 2, "--seed", 3, "--masks-per-clip", 2, "--steps", 3, "--lr", 1e-30, "--final-lr", 0]
    run_script(script, *TINY, *extra_flags(script, teacher), *flags, "--out", tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    student = build(Encoder, checkpoint["model"]["encoder"], checkpoint.get("student", checkpoint["encoder"]))
    predictor = build(Predictor, checkpoint["model"]["predictor"], checkpoint["predictor"])
    target_encoder = load_encoder(teacher if script is train_student else tmp_path)
    args = argparse.Namespace(stage=1 if script is train_teacher else 2, seed=3)
    source, losses = data.Synthetic(4, 32, data.stream_seed("data", args.stage, 3)), []
    for step, micro in itertools.product(range(3), range(2)):
        first = 4 * step + 2 * micro
        clips = data.normalize(source.batch([first, first + 1]).clips, "cpu")
        rng, sizes = training.mask_generators(args, step, micro)
        with torch.no_grad():
            if script is train_teacher:
                targets, error = train_teacher.pixel_targets(clips, 2, 8), torch.square
            else:
                targets, error = F.layer_norm(target_encoder(clips), (target_encoder.width,)), torch.abs
            for mask in masking.sample_masks("multiblock", GRID, 2, rng, sizes=sizes, masks_per_clip=2):
                context = student(clips, mask.context_ids)
                z = predictor(context, mask.context_ids, mask.target_ids, GRID, mask.index)
                losses.append(error(z - gather(targets, mask.target_ids)).mean().item())
    expected = torch.tensor(losses).view(3, 8).mean(1).tolist()
    assert [loss for (loss,) in read_metrics(tmp_path, "loss")] == pytest.approx(expected, rel=1e-5)


@every_script
def test_every_parameter_learns(script, teacher, tmp_path):
    flags = [*TINY, *extra_flags(script, teacher), "--width", 64, "--predictor-width", 64, "--clip-grad", 10]
    run_script(script, *flags, "--steps", 100, "--lr", 2e-3, "--out", tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    torch.manual_seed(data.stream_seed("initialization", 1 if script is train_teacher else 2, 0))
    encoder, predictor = Encoder(**checkpoint["model"]["encoder"]), Predictor(**checkpoint["model"]["predictor"])
    trained = checkpoint.get("student", checkpoint["encoder"])
    for initial, now in ((encoder, trained), (predictor, checkpoint["predictor"])):
        assert not [name for name, p in initial.named_parameters() if torch.equal(p, now[name])]
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert script is train_ema_baseline or sum(losses[-10:]) / 10 < 0.93 * losses[0]


def test_a_step_does_not_wait_for_the_device():
    """On the meta device, item(), bool(), nonzero() and everything else that reads values raises an error."""
    encoder = Encoder(width=32, depth=1, heads=2, num_frames=4, resolution=32, patch_size=8).to("meta")
    predictor = Predictor(32, 32, width=16, depth=1, heads=2).to("meta")
    optimizer = torch.optim.AdamW([{"params": [*encoder.parameters(), *predictor.parameters()], "decayed": True}])
    optimizer.step = lambda: None  # fused AdamW does not support the meta device
    args = parsed_flags(80_000)
    training.set_schedules(optimizer, 0, args)
    clips = data.normalize(torch.zeros(4, 3, 4, 32, 32, dtype=torch.uint8), torch.device("meta"))
    for mask in masking.sample_masks("multiblock", GRID, 4, torch.Generator(), device="meta"):
        predicted = predictor(encoder(clips, mask.context_ids), mask.context_ids, mask.target_ids, GRID, mask.index)
        targets = gather(train_teacher.pixel_targets(clips, 2, 8)[..., :32], mask.target_ids)
        loss = (predicted.float() - targets).abs().mean()
        loss.backward()
    loss, norm = training.optimizer_step(optimizer, loss.detach(), args)
    train_ema_baseline.update_teacher(encoder, encoder, 0.9)
    assert (training.collapse_metrics(predicted, targets, 0)["prediction_std"] + loss + norm).is_meta


def test_random_streams_are_independent():
    """Of stages (a student shares no randomness with its teacher), seeds, steps and micro-batches."""
    assert len({data.stream_seed(*key) for key in [("masks", 1), ("masks", 1, 0), ("masks",), ("crop", 1)]}) == 4
    runs = itertools.product((1, 2), (0, 1), (0, 1), (0, 1))
    drawn = [training.mask_generators(argparse.Namespace(stage=a, seed=b), step, micro) for a, b, step, micro in runs]
    masks, sizes = ({rng.initial_seed() for rng in of_kind} for of_kind in zip(*drawn, strict=True))
    assert len(masks) == 16 and len(sizes) == 8 and not masks & sizes  # all micro-batches of a step share block sizes


def test_a_checkpoint_identifies_its_teacher(ema, tmp_path, capfd):
    torch.save(load_checkpoint(ema) | {"step": 4}, tmp_path / "cut.pt")  # an EMA run's encoder can be a teacher, too
    run_script(train_student, *TINY, "--teacher", tmp_path / "cut.pt", "--steps", 3, "--out", tmp_path / "other")
    assert "step 4 of 6; WARNING: its training has not finished\n" in capfd.readouterr().out
    sha256 = fingerprint(load_checkpoint(ema)["encoder"])
    identity = {"path": str(tmp_path / "cut.pt"), "stage": 2, "step": 4, "sha256": sha256}
    checkpoint = load_checkpoint(tmp_path / "other")
    assert checkpoint["teacher"] == identity and checkpoint["stage"] == 3


def test_a_run_does_not_continue_with_another_teacher(teacher, student, tmp_path, capfd):
    run, other = shutil.copytree(student, tmp_path / "run"), shutil.copytree(teacher, tmp_path / "teacher")
    checkpoint = load_checkpoint(other)
    flags = [*TINY, "--width", 48, "--steps", 8, "--out", run, "--teacher", other]
    checkpoint["encoder"]["norm.bias"][0] += 1e-3
    torch.save(checkpoint, other / "checkpoint.pt")
    assert f"was trained with another teacher, {teacher} at step 6; " in refusal(capfd, train_student, *flags)
    shutil.copy(teacher / "checkpoint.pt", other / "checkpoint.pt")  # the same weights elsewhere are the same teacher
    run_script(train_student, *flags)
    assert load_checkpoint(run)["step"] == 8


def test_the_teacher_is_a_moving_average_of_the_student(tmp_path):
    flags = ["--steps", 3, "--snapshot-every", 1, "--seed", 5, "--ema-momentum", 0.7]
    run_script(train_ema_baseline, *TINY, *flags, "--out", tmp_path)
    steps = [load_checkpoint(tmp_path / f"checkpoint-{step:06}.pt") for step in (1, 2, 3)]
    torch.manual_seed(data.stream_seed("initialization", 2, 5))
    teacher = Encoder(**steps[0]["model"]["encoder"]).state_dict()
    for checkpoint in steps:
        teacher = {name: 0.7 * x + 0.3 * checkpoint["student"][name] for name, x in teacher.items()}
        for name, x in teacher.items():
            torch.testing.assert_close(checkpoint["encoder"][name], x, rtol=1e-5, atol=1e-7)
    assert same_tensors(load_encoder(tmp_path, "student").state_dict(), steps[2]["student"])


def test_only_update_teacher_differs_in_the_loops_of_student_and_baseline():
    sources = [inspect.getsource(script) for script in (train_ema_baseline, train_student)]
    loops = [source[source.index("    for step in range(") :].splitlines() for source in sources]
    (change,) = (line for line in difflib.ndiff(*loops) if not line.startswith(" "))
    assert change.startswith("-         update_teacher(")


def test_the_diff_in_the_readme_is_up_to_date():
    _, diff = (ROOT / "README.md").read_text().split("```diff\n")
    changes = [line for line in diff.split("```")[0].splitlines() if line != "..."]
    ours, others = (inspect.getsource(script).splitlines() for script in (train_student, train_ema_baseline))
    assert {line[0] for line in changes} == {"-", "+"}
    for line in changes:
        added, code = line[0] == "+", line[1:]
        assert (code in ours, code in others) == (added, not added), line


def test_contents_of_a_run_folder(teacher, student, ema):
    runs = {"teacher": (teacher, 32, 384), "student": (student, 48, 32), "ema": (ema, 32, 32)}
    for kind, (out, width, out_width) in runs.items():
        names = ["args.json", "checkpoint.pt", "lock", "metrics.jsonl", "resume"]
        assert sorted(p.name for p in out.iterdir()) == names and saved_states(out) == ["step-00000006"]
        record = json.loads((out / "args.json").read_text())
        assert record["args"]["out"] == str(out) and record["versions"]["torch"] == torch.__version__
        checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
        keys = {"format", "kind", "step", "model", "encoder", "predictor", "args", "stage", "teacher"}
        assert set(checkpoint) == keys | ({"student"} if kind == "ema" else set())
        assert (checkpoint["kind"], checkpoint["step"], checkpoint["args"]) == (kind, 6, record["args"])
        assert checkpoint["model"]["predictor"]["out_width"] == out_width
        assert load_encoder(out)(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 32, width)
    assert load_checkpoint(ema)["args"]["ema_momentum"] == 0.99925  # V-JEPA 2's


def test_a_log_line(teacher):
    lines = read_metrics(teacher)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["tflops_per_process"] > 0 and 0 <= line["data_wait"] <= 1 and line["clips_per_s"] > 0
        assert line["bad_videos"] == 0 and line["target_std"] > 0 and 0.1 < line["peak_memory_gib"] < 100
        assert 2 <= line["context_kept"] < line["target_kept"] <= 2 * 32 - line["context_kept"]  # tokens of both masks
    assert [(line["lr"], line["weight_decay"]) for line in (lines[0], lines[-1])] == [
        (pytest.approx(0.32 * 3e-3), pytest.approx(0.04)), (pytest.approx(1e-6), pytest.approx(0.4))]  # fmt: skip
    assert sorted(lines, key=lambda line: (line["seconds"], line["flops"])) == lines


def test_collapse_metrics():
    """Standard deviation and RankMe; the rank only every 100 steps."""
    flat_vectors, random = torch.ones(2, 400, 16) * torch.arange(16), torch.randn(2, 400, 16)
    metrics = training.collapse_metrics(flat_vectors, random, step=99)
    assert metrics["prediction_std"] == 0 and metrics["target_std"].item() == pytest.approx(1, rel=0.1)
    sigma = torch.linalg.svdvals(random.flatten(0, 1).double())
    rank = torch.special.entr(sigma / sigma.sum()).sum().exp().item()
    assert metrics["prediction_rank"] == pytest.approx(1, abs=1e-2)
    assert metrics["target_rank"] == pytest.approx(rank, rel=1e-3)
    assert training.collapse_metrics(flat_vectors, random, step=100).keys() == {"prediction_std", "target_std"}


def test_tensorboard_and_the_loss_of_a_log_line(teacher, tmp_path, capfd, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = [*TINY, "--log-every", 4, "--tensorboard", "--workers", 1]
    run_script(train_teacher, *flags, "--out", tmp_path / "run")
    of_steps = [loss for (loss,) in read_metrics(teacher, "loss")]
    means = [[4, pytest.approx(sum(of_steps[:4]) / 4)], [6, pytest.approx(sum(of_steps[4:]) / 2)]]
    assert read_metrics(tmp_path / "run", "step", "loss") == means  # of the steps since the last line
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [[event.step, event.value] for event in events.Scalars("loss")] == means
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in refusal(capfd, train_teacher, *flags, "--out", tmp_path / "other")


def test_rerunning_a_finished_run_changes_nothing_and_fresh_moves_it_aside(teacher, tmp_path, capfd):
    def contents(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    out = shutil.copytree(teacher, tmp_path / "run")
    before = contents(out)
    (out / "resume" / "step-00000009.tmp").mkdir()  # a killed process may leave these
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7}\n{"step": 8, "lo')
    run_script(train_teacher, *TINY, "--out", out, "--frame-step", 3)
    assert "at step 6 of 6; changed flags: frame_step\n" in capfd.readouterr().out
    assert contents(out) == before and saved_states(out) == ["step-00000006"]
    for seed in (1, 2):
        run_script(train_teacher, *TINY, "--out", out, "--fresh", "--seed", seed)
    assert contents(tmp_path / "run.1") == before
    losses = [read_metrics(folder, "loss") for folder in (out, tmp_path / "run.2", teacher)]
    assert losses[0] != losses[1] != losses[2]


def test_another_run_is_not_continued(teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    flags, other = [*TINY, "--out", out], "holds a run of another kind or model"
    assert other in refusal(capfd, train_teacher, *flags, "--resolution", 64)
    assert other in refusal(capfd, train_student, *flags, "--teacher", out)
    assert "is already at step 6, beyond --steps 3" in refusal(capfd, train_teacher, *flags, "--steps", 3)
    shutil.rmtree(out / "resume")
    assert "but no state to continue from; --fresh" in refusal(capfd, train_teacher, *flags)


def test_two_runs_do_not_share_a_folder(tmp_path, capfd, monkeypatch):
    lock, flags = training._lock(tmp_path), [*TINY, "--steps", 3, "--out", tmp_path]
    assert f"{tmp_path} is in use by another run" in refusal(capfd, train_teacher, *flags, "--fresh")
    lock.close()
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(38, "Function not implemented")))
    run_script(train_teacher, *flags)
    assert "cannot be locked (Function not implemented)" in capfd.readouterr().out


def test_saving_by_the_clock(monkeypatch):
    monkeypatch.setattr(training, "_received", [])
    args = parsed_flags(100, "--save-minutes", "30", "--snapshot-every", "40")
    log = argparse.Namespace(saved_at=1000.0)
    for now, step, saves in ((2799, 5, False), (2800, 5, True), (1000, 39, True), (1000, 99, True), (1000, 40, False)):
        monkeypatch.setattr(training.time, "monotonic", lambda now=now: now)
        assert training.agree_on_saving(step, args, log) == (saves, 0)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert training.agree_on_saving(5, args, log) == (True, signal.SIGUSR1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("mask", masking.STRATEGIES)
def test_every_masking_strategy_trains_also_in_bfloat16(mask, device, tmp_path):
    flags = ["--device", device, "--mask", mask, "--mask-truncation", "raster", "--resolution", 16, "--patch-size", 2]
    run_script(train_teacher, *TINY, *flags, "--dtype", "bfloat16", "--steps", 3, "--out", tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    tokens = checkpoint["predictor"]["mask_tokens"]
    assert len(tokens) == masking.STRATEGIES[mask].num_masks and (tokens.abs().max(1).values > 0).all()
    assert all(x.dtype == torch.float32 for x in checkpoint["encoder"].values())


def test_a_warning_if_there_are_too_few_cores(monkeypatch, capfd):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    parsed_flags(5, "--workers", "4")
    assert "1 processes with 4 loader workers each share 2 cores" in capfd.readouterr().out


@pytest.mark.parametrize("bad, fails", [(1, False), (2, True)])  # of 25 videos; the limit is 5%, after 100 samples
def test_unreadable_videos_are_counted_and_too_many_end_the_run(bad, fails, tmp_path, capfd):
    write_image(torch.full((3, 40, 40), 99, dtype=torch.uint8), str(tmp_path / "x.png"))
    lines = [*(f"missing{n}.png 0" for n in range(bad)), *["x.png 0"] * (25 - bad)]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    flags = [*TINY, "--batch-size", 25, "--steps", 5, "--data", tmp_path / "m.csv", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match="2") if fails else contextlib.nullcontext():
        run_script(train_teacher, *flags)
    counted = [n for (n,) in read_metrics(tmp_path / "run", "bad_videos")]
    assert counted == ([2, 4, 6] if fails else [1, 2, 3, 4, 5])  # a step draws each of the 25 videos once
    *reported, last = capfd.readouterr().err.splitlines() + [""] * (not fails)
    assert len(reported) == bad and "missing0.png: No such file" in "".join(reported)  # reported once
    assert ("8 of 100 samples are unreadable, more than --max-bad 5%" in last) == fails


def test_a_manifest_of_unreadable_videos_ends_the_run(tmp_path, capfd, monkeypatch):
    (tmp_path / "m.csv").write_text("".join(f"{n}.mp4\n" for n in range(12)))
    with pytest.raises(BadVideo) as error:
        run_script(train_teacher, *TINY, "--workers", 1, "--data", tmp_path / "m.csv", "--out", tmp_path / "run")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        training._exception_hook(BadVideo, error.value, None)
    printed = capfd.readouterr().err
    assert "no other video to replace it: " in printed and printed.endswith(".mp4: No such file or directory\n")


# Flags whose error names them, and others.
INVALID = {flags: flags.split()[-2] for flags in (
    "--warmup-steps 6", "--batch-size 0", "--micro-batch-size 3", "--masks-per-clip 0", "--target-fraction 0",
    "--save-minutes -1", "--seed -1", "--model vit_x", "--data nowhere.csv", "--data one.csv --frame-step 0",
    "--out one.csv/run",
)} | {
    "--heads 3": "3 heads", "--heads 0": "heads", "--predictor-heads 3": "predictor: ", "--resolution 30": "30x30",
    "--num-frames 3": "3 frames", "--patch-size 0": "0x0 pixels", "--resolution 8": "too small",
    "--target-fraction 0.5 --mask-truncation raster": "raster does not",
    "--data one.csv --data-weights 1 2": "1 manifests but 2 weights", "--data empty.csv": "names no videos",
}  # fmt: skip


@pytest.mark.parametrize("flags, message", INVALID.items())
def test_invalid_flags_are_one_line_errors(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_image(torch.zeros(3, 20, 20, dtype=torch.uint8), "x.png")
    Path("one.csv").write_text("x.png 0\n")
    Path("empty.csv").write_text("\n")
    assert message in refusal(capfd, train_teacher, *TINY, "--out", "run", *flags.split())


def test_unusable_teachers_and_momentums_are_one_line_errors(teacher, tmp_path, capfd):
    (tmp_path / "text.pt").write_text("hello")
    for flags, message in {
        (): "--teacher", ("--teacher", "nowhere"): "no checkpoint at nowhere; train_teacher.py makes one",
        ("--teacher", teacher, "--patch-size", 16): "patch_size 8, the student 16",
        ("--teacher", teacher, "--tubelet-size", 1): "tubelet_size 2, the student 1",
        ("--teacher", tmp_path / "text.pt"): "cannot be read as a checkpoint",
    }.items():  # fmt: skip
        assert message in refusal(capfd, train_student, *TINY, "--out", tmp_path / "run", *flags)
    assert "--ema-momentum nan" in refusal(capfd, train_ema_baseline, *TINY, "--ema-momentum", "nan")
    assert not (tmp_path / "run").exists()  # no run was started
