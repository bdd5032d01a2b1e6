"""A run's folder: what is logged and saved. Interruptions, damage and the number of processes do not change a run."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    EXACT_METRICS,
    TINY,
    extra_flags,
    flat,
    read_metrics,
    refusal,
    run_script,
    same_checkpoints,
    same_tensors,
    saved_states,
    truncate,
    write_image,
    write_video,
)

import train_ema_baseline
import train_student
import train_teacher
from model import load_checkpoint, load_encoder
from run import Run

SCRIPTS = [train_teacher, train_student, train_ema_baseline]
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)

# ---------------------------------------------------------------------------------------------------------------------
# the run folder


def test_contents_of_a_run_folder(teacher, student, ema):
    runs = (teacher, "teacher", 32, 384), (student, "student", 48, 32), (ema, "ema", 32, 32)
    for out, kind, width, out_width in runs:
        names = ["args.json", "checkpoint.pt", "lock", "metrics.jsonl", "resume"]
        assert sorted(p.name for p in out.iterdir()) == names
        record = json.loads((out / "args.json").read_text())
        assert record["kind"] == kind and record["world_size"] == 1
        args = record["args"]
        assert args["out"] == str(out) and args["steps"] == 6 and args["start_lr"] == pytest.approx(0.32 * 3e-3)
        assert record["versions"]["torch"] == torch.__version__ and "git_commit" in record
        check_log(read_metrics(out))
        checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
        keys = {"format", "kind", "step", "model", "encoder", "encoder_is", "predictor", "args", "stage", "teacher"}
        assert set(checkpoint) == keys | ({"student"} if kind == "ema" else set())
        assert (checkpoint["kind"], checkpoint["step"], checkpoint["args"]) == (kind, 6, args)
        assert checkpoint["encoder_is"] == kind
        assert checkpoint["model"]["predictor"]["out_width"] == out_width
        encoder = load_encoder(out)
        assert encoder.width == width and not encoder.training
        assert encoder(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 32, width)
    assert load_encoder(teacher).config == load_encoder(teacher / "checkpoint.pt").config


def check_log(lines):
    """Check the metrics of a tiny run."""
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["clips_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1 and line["bad_videos"] == 0 and line["tflops"] > 0
        assert line["tokens_per_s"] == pytest.approx(32 * line["clips_per_s"])
        assert 0.1 < line["peak_memory_gib"] < 100  # torch alone needs more than 0.1 GiB
        counts = [line[f"{a}_{b}"] for a in ("context", "target") for b in ("kept", "lost")]
        assert sum(counts) == 2 * 32  # every token of both masks is accounted for
    assert lines[0]["lr"] == pytest.approx(0.32 * 3e-3) and lines[-1]["lr"] == pytest.approx(1e-6)
    assert lines[0]["weight_decay"] == pytest.approx(0.04) and lines[-1]["weight_decay"] == pytest.approx(0.4)
    assert sorted(lines, key=lambda line: (line["seconds"], line["flops"])) == lines


def test_keywords_of_end_step_are_logged(tmp_path, monkeypatch):
    """A metric is a float or a tensor; a log line holds its last value."""
    end_step = Run.end_step

    def end_step_with_metrics(run, step, **metrics):
        end_step(run, step, **metrics, plain=step / 4, tensor=torch.tensor(step / 8))

    monkeypatch.setattr(Run, "end_step", end_step_with_metrics)
    run_script(train_teacher, *TINY, "--log-every", 3, "--save-every", 6, "--out", tmp_path)
    assert read_metrics(tmp_path, "step", "plain", "tensor") == [[3, 0.5, 0.25], [6, 1.25, 0.625]]


def test_the_loss_of_a_log_line_is_the_mean_since_the_last_one(teacher, tmp_path):
    run_script(train_teacher, *TINY, "--log-every", 4, "--save-every", 6, "--out", tmp_path)
    step_losses = [loss for (loss,) in read_metrics(teacher, "loss")]
    losses = [loss for (loss,) in read_metrics(tmp_path, "loss")]
    assert losses == pytest.approx([sum(step_losses[:4]) / 4, sum(step_losses[4:]) / 2])


@pytest.mark.parametrize("seconds, warns", [(4000, False), (8000, True)])
def test_a_run_of_more_than_a_day_without_a_gpu_is_announced(seconds, warns, tmp_path, capfd, monkeypatch):
    """TINY has 6 steps of 2 micro-batches. Here a clock advances `seconds` whenever it is read."""
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    run_script(train_teacher, *TINY, "--micro-batch-size", 2, "--out", tmp_path / "run")
    lines = [line for line in capfd.readouterr().out.splitlines() if "days without a GPU" in line]
    assert len(lines) == warns
    if warns:
        assert lines[0].startswith("WARNING: this run will take about 1.1 days") and "--batch-size" in lines[0]


def test_snapshots_equal_the_checkpoints_of_their_steps(tmp_path, monkeypatch):
    save, checkpoints = Run.save, {}

    def save_and_load(run, step, snapshot):
        save(run, step, snapshot)
        checkpoints[step] = load_checkpoint(tmp_path)

    monkeypatch.setattr(Run, "save", save_and_load)
    run_script(train_teacher, *TINY, "--save-every", 3, "--snapshot-every", 2, "--steps", 7, "--out", tmp_path)
    assert list(checkpoints) == [2, 3, 4, 6, 7]
    snapshots = {2: "checkpoint-000002.pt", 4: "checkpoint-000004.pt", 6: "checkpoint-000006.pt"}
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == sorted(["checkpoint.pt", *snapshots.values()])
    for step, name in snapshots.items():
        snapshot, checkpoint = load_checkpoint(tmp_path / name), checkpoints[step]
        assert snapshot["step"] == step and snapshot.keys() == checkpoint.keys()
        for key, value in checkpoint.items():
            same = same_tensors(snapshot[key], value) if key in ("encoder", "predictor") else snapshot[key] == value
            assert same, key
    assert not same_tensors(checkpoints[2]["encoder"], checkpoints[4]["encoder"])


def test_tensorboard(tmp_path, capfd, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_script(train_teacher, *TINY, "--tensorboard", "--out", tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = read_metrics(tmp_path / "run")
    for name in lines[0]:
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = refusal(capfd, train_teacher, *TINY, "--tensorboard", "--out", tmp_path / "other")
    assert "--tensorboard needs a package: pip install tensorboard" in error


# ---------------------------------------------------------------------------------------------------------------------
# the same run again


def test_the_same_seed_gives_the_same_run(teacher, tmp_path):
    torch.manual_seed(7)
    run_script(train_teacher, *TINY, "--out", tmp_path / "again", "--workers", "1")
    assert read_metrics(tmp_path / "again", *EXACT_METRICS) == read_metrics(teacher, *EXACT_METRICS)
    assert same_checkpoints(tmp_path / "again", teacher)


@pytest.mark.slow
def test_torchrun_with_two_processes_matches_one_process(teacher, tmp_path):
    """Two processes have one micro-batch each, one process has two. tests/test_distributed.py has the other scripts."""
    flags = [*TINY, "--teacher", teacher, "--micro-batch-size", "2"]
    run_script(train_student, *flags, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun.append(train_student.__file__)
    command = [str(x) for x in (*torchrun, *flags, "--out", tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, timeout=200, env=os.environ)
    one, two = (read_metrics(tmp_path / name, *EXACT_METRICS) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert json.loads((tmp_path / "two" / "args.json").read_text())["world_size"] == 2
    a, b = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    for part in ("encoder", "predictor"):
        for name, x in a[part].items():
            if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding errors, which Adam amplifies
                torch.testing.assert_close(x, b[part][name], rtol=1e-3, atol=1e-5)


@every_script
def test_an_interrupted_run_resumes_exactly(script, teacher, tmp_path, monkeypatch, capfd):
    flags = [*TINY, *extra_flags(script, teacher), "--micro-batch-size", "2", "--predictor-depth", "2"]
    run_script(script, *flags, "--out", tmp_path / "uninterrupted")
    with monkeypatch.context() as patch:
        end_step = Run.end_step

        def interrupt_step_4(run, step, **metrics):
            if step == 4:
                run.lock.close()  # as the end of the process would do
                raise KeyboardInterrupt
            end_step(run, step, **metrics)

        patch.setattr(Run, "end_step", interrupt_step_4)
        with pytest.raises(KeyboardInterrupt):
            run_script(script, *flags, "--out", tmp_path / "interrupted", "--save-every", "3")
    assert load_checkpoint(tmp_path / "interrupted")["step"] == 3
    assert read_metrics(tmp_path / "interrupted", "step") == [[1], [2], [3], [4]]  # one line ahead of the saved state
    torch.manual_seed(1234)
    run_script(script, *flags, "--out", tmp_path / "interrupted")
    assert "at step 3 of 6" in capfd.readouterr().out
    lines, expected = (read_metrics(tmp_path / name, *EXACT_METRICS) for name in ("interrupted", "uninterrupted"))
    assert lines == expected
    assert same_checkpoints(tmp_path / "interrupted", tmp_path / "uninterrupted")


def test_an_unfinished_log_line_is_dropped(teacher, tmp_path):
    out = shutil.copytree(teacher, tmp_path / "run")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a killed process may leave this
    run_script(train_teacher, *TINY, "--out", out)
    assert read_metrics(out) == read_metrics(teacher)


def contents(folder):
    """The bytes of every file under a folder, by relative path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rerunning_a_finished_run_changes_nothing(teacher, tmp_path):
    out = shutil.copytree(teacher, tmp_path / "run")
    before = contents(out)
    run_script(train_teacher, *TINY, "--out", out)
    assert contents(out) == before


def test_fresh_moves_the_earlier_run_aside(teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    before = contents(out)
    for i in (1, 2):
        run_script(train_teacher, *TINY, "--out", out, "--fresh", "--seed", i)
        assert str(tmp_path / f"run.{i}") in capfd.readouterr().out
    assert contents(tmp_path / "run.1") == before
    losses = [read_metrics(folder, "loss") for folder in (out, tmp_path / "run.2", teacher)]
    assert losses[0] != losses[1] != losses[2]


@pytest.mark.parametrize("flags", [["--width", "16"], ["--predictor-depth", "2"], ["--resolution", "64"]])
def test_a_run_of_another_model_is_not_resumed(flags, teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    error = refusal(capfd, train_teacher, *TINY, "--out", out, *flags)
    assert "another kind or model" in error and "--fresh" in error


def test_a_student_does_not_resume_a_teacher(teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    assert "another kind" in refusal(capfd, train_student, *TINY, "--out", out, "--teacher", teacher)


def test_student_and_baseline_do_not_resume_each_other(teacher, ema, tmp_path, capfd):
    """Not even if they have the same architecture, so that the weights would fit."""
    flags = [*TINY, "--steps", 3]
    run_script(train_student, *flags, "--teacher", teacher, "--out", tmp_path / "student")
    assert load_checkpoint(tmp_path / "student")["model"] == load_checkpoint(ema)["model"]
    assert "another kind" in refusal(capfd, train_ema_baseline, *flags, "--out", tmp_path / "student")
    assert "another kind" in refusal(capfd, train_student, *flags, "--out", ema, "--teacher", teacher)


# ---------------------------------------------------------------------------------------------------------------------
# damaged states


def flip_bit(path, position=0.5):
    """Flip one bit of the byte at a position in [0, 1) of the file."""
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda state: truncate(state / "__0_0.distcp"),
    "empty": lambda state: (state / "__0_0.distcp").write_bytes(b""),
    "missing": lambda state: (state / "__0_0.distcp").unlink(),
    "first-byte": lambda state: flip_bit(state / "__0_0.distcp", 0),
    "one-byte": lambda state: flip_bit(state / "__0_0.distcp"),
    "metadata": lambda state: flip_bit(state / ".metadata"),
    "no-metadata": lambda state: (state / ".metadata").unlink(),
    "no-record": lambda state: (state / "run.json").unlink(),
    "truncated-record": lambda state: truncate(state / "run.json", 100),
    "binary-record": lambda state: (state / "run.json").write_bytes(bytes(range(256))),
    "other-record": lambda state: (state / "run.json").write_text("{}"),
    "list-record": lambda state: (state / "run.json").write_text("[]"),
    "number-record": lambda state: (state / "run.json").write_text("0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_resumes_from_the_state_before_a_damaged_one(damage, teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    newest = out / "resume" / "step-00000006"
    DAMAGES[damage](newest)
    run_script(train_teacher, *TINY, "--out", out)
    printed = capfd.readouterr()
    assert "at step 4 of 6" in printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith(f"{newest} is damaged (") and printed.err.endswith("); trying the previous one\n")
    assert same_checkpoints(out, teacher)
    assert read_metrics(out, *EXACT_METRICS) == read_metrics(teacher, *EXACT_METRICS)
    run_script(train_teacher, *TINY, "--out", out)  # the damaged state has been replaced
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_an_undamaged_state_is_not_resumed(damage, teacher, tmp_path, capfd):
    out = shutil.copytree(teacher, tmp_path / "run")
    for state in (out / "resume").iterdir():
        DAMAGES[damage](state)
    before = (out / "checkpoint.pt").read_bytes(), read_metrics(out)
    with pytest.raises(SystemExit) as stop:
        run_script(train_teacher, *TINY, "--out", out)
    *damaged, last = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and [line.split()[0][-8:] for line in damaged] == ["00000006", "00000004"]
    assert last == f"train_teacher.py: {out} holds a run, but no undamaged state to continue from; --fresh starts over"
    assert before == ((out / "checkpoint.pt").read_bytes(), read_metrics(out))


def test_a_run_killed_while_saving_resumes_from_the_state_before(teacher, tmp_path):
    out = shutil.copytree(teacher, tmp_path / "run")
    newest = out / "resume" / "step-00000006"
    (newest / "run.json").unlink()
    newest.rename(newest.with_suffix(".tmp"))
    run_script(train_teacher, *TINY, "--out", out)
    assert same_checkpoints(out, teacher)
    assert read_metrics(out, *EXACT_METRICS) == read_metrics(teacher, *EXACT_METRICS)
    assert saved_states(out) == ["step-00000004", "step-00000006"]


# ---------------------------------------------------------------------------------------------------------------------
# unreadable videos, and steps that are not finite


def test_unreadable_videos_are_counted(tmp_path):
    for n in range(3):
        write_video(tmp_path / f"{n}.mp4", [flat(20 * i + n, 40) for i in range(12)])
    (tmp_path / "m.csv").write_text("0.mp4\n1.mp4\n2.mp4\nmissing.mp4\n")
    run_script(train_teacher, *TINY, "--data", tmp_path / "m.csv", "--out", tmp_path / "run", "--frame-step", 2)
    # A step draws each of the four videos once.
    assert [line["bad_videos"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad, fails", [(1, False), (2, True)])
def test_too_many_unreadable_videos_end_the_run(bad, fails, tmp_path, capfd):
    """One bad video of 25 is 4%, two are 8%. The limit is 5%, and applies from the 100th sample on."""
    write_image(torch.full((3, 40, 40), 99, dtype=torch.uint8), str(tmp_path / "x.png"))
    lines = ["x.png 0"] * 25
    for n in range(bad):
        lines[12 * n] = f"missing{n}.png 0"
    (tmp_path / "m.csv").write_text("\n".join(lines))
    flags = [*TINY, "--batch-size", 25, "--steps", 5, "--data", tmp_path / "m.csv", "--out", tmp_path / "run"]
    capfd.readouterr()
    if not fails:
        run_script(train_teacher, *flags)
        assert read_metrics(tmp_path / "run", "bad_videos")[-1] == [5]
        assert capfd.readouterr().err.count("missing0.png") == 1  # reported once
        return
    with pytest.raises(SystemExit) as stop:
        run_script(train_teacher, *flags)
    assert stop.value.code == 2
    *reported, last = capfd.readouterr().err.splitlines()
    assert "8 of 100 samples are unreadable, more than --max-bad 5%" in last
    assert len(reported) == 2 and "missing0.png: no such file" in "".join(reported)
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_manifest_of_unreadable_videos_ends_the_run(workers, tmp_path, capfd):
    (tmp_path / "m.csv").write_text("".join(f"{n}.mp4\n" for n in range(12)))
    flags = [*TINY, "--workers", workers, "--data", tmp_path / "m.csv", "--out", tmp_path / "run"]
    error = refusal(capfd, train_teacher, *flags)
    assert "unreadable, and no other video to replace it: " in error and ".mp4: no such file" in error


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capfd):
    error = refusal(capfd, train_teacher, *TINY, "--lr", "1e30", "--clip-grad", "1e30", "--out", tmp_path / "run")
    assert ": step 2: loss nan, gradient norm nan, lr 6.6e+29; " in error
    assert error.endswith("Clips of process 0: built-in 4, built-in 5, built-in 6, built-in 7\n")
    assert read_metrics(tmp_path / "run", "step") == [[1]] and not (tmp_path / "run" / "checkpoint.pt").exists()
