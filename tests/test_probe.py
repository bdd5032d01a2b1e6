"""The probe learns what is in the tokens and nothing else, and reports it."""

import argparse
import json
import math
import shlex
import shutil

import pytest
import torch
from conftest import TINY, flat, refusal, run_script, write_image, write_video

import data
import probe
import train_ema_baseline
import train_student
from model import AttentiveProbe, Encoder, load_checkpoint, load_encoder

QUICK = shlex.split("--epochs 1 --batch-size 16 --probe-heads 2 --probe-depth 2 --workers 0 --device cpu")
SYNTHETIC = shlex.split("--train-clips 24 --val-clips 20")


@pytest.mark.parametrize(
    "right, total, low, high",
    [(0, 10, 0, 27.753), (5, 10, 23.659, 76.341), (81, 263, 25.529, 36.617), (10, 10, 72.247, 100)],
)
def test_interval95(right, total, low, high):
    """Wilson's interval; 81 of 263 is the example of Newcombe (1998), table I: 0.2553 to 0.3662."""
    assert probe.interval95(right, total) == pytest.approx([low, high], abs=0.01)


def learn(tokens, labels, train, column=1, epochs=15, lr=3e-3):
    """Validation accuracy of probe.py's training on fabricated tokens."""
    args = argparse.Namespace(lr=lr, weight_decay=0.01, epochs=epochs, device="cpu", dtype="float32")
    torch.manual_seed(0)
    network = AttentiveProbe(tokens.shape[-1], 4, depth=2, heads=2)

    def batches(epoch):
        order = torch.randperm(train, generator=torch.Generator().manual_seed(epoch))
        return ((tokens[ids], labels[ids]) for ids in order.split(32))

    rates = [epoch for epoch, _ in probe.train_probe(args, network, batches, epochs * math.ceil(train / 32), column)]
    assert rates == list(range(epochs))
    held_out = zip(tokens[train:].split(50), labels[train:].split(50), strict=True)
    right, total = probe.count_correct(args, network, held_out, column)
    assert total == len(tokens) - train
    return right / total


@pytest.mark.parametrize("separable", [True, False])
def test_probe_learns_what_is_there(separable):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(900, 6, 16, generator=rng)
    labels = torch.randint(0, 4, (900, 2), generator=rng)
    if separable:  # one of the tokens, at a place of its own in each clip, carries the second label
        tokens[torch.arange(900), torch.randint(0, 6, (900,), generator=rng)] += 10 * torch.eye(4, 16)[labels[:, 1]]
    accuracy = learn(tokens, labels, 600)
    if separable:
        assert accuracy == 1
    else:
        assert abs(accuracy - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 300)


def test_learning_rate_goes_to_zero(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    learn(torch.randn(70, 2, 8), torch.zeros(70, 2, dtype=torch.long), 64, epochs=5, lr=1e-3)
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


def test_standardize():
    tokens = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 0.1, 1]) + 3
    layer = probe.Standardize(tokens)
    out = layer(tokens).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer(tokens[:1])[0], out[:7])  # measured once
    assert not list(layer.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# the script


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def probed(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe")
    tasks = ("--task", "synthetic-motion", "synthetic-shape")
    run_script(probe, *QUICK, *SYNTHETIC, *tasks, "--checkpoint", student, "--out", out, "--seeds", 2)
    return out


def test_synthetic_tasks(probed, student):
    record = results(probed)
    assert record["checkpoint"] == str(student) and record["weights"] == "encoder" and record["seconds"] > 0
    assert record["args"]["epochs"] == 1 and record["args"]["train_clips"] == 24
    assert list(record["tasks"]) == ["synthetic-motion", "synthetic-shape"]
    for (_, found), classes in zip(record["tasks"].items(), (8, 6), strict=True):
        assert found["num_val"] == 20 and found["chance"] == pytest.approx(100 / classes)
        assert len(found["top1_per_seed"]) == 2
        assert all(5 * round(x / 5) == pytest.approx(x, abs=1e-4) for x in found["top1_per_seed"])  # 20 clips
        assert found["top1"] == pytest.approx(sum(found["top1_per_seed"]) / 2)
        assert found["spread"] == pytest.approx(torch.tensor(found["top1_per_seed"]).std().item())
        low, high = found["interval95"]
        assert 0 <= low <= found["top1"] <= high <= 100


@pytest.mark.parametrize("flags", [["--untrained"], ["--standardize"], ["--dtype", "bfloat16"], ["--resolution", "48"]])
def test_flags_of_the_probe(flags, teacher, tmp_path, capfd):
    run = ["--task", "synthetic-shape", "--checkpoint", teacher / "checkpoint.pt"]
    run_script(probe, *QUICK, *SYNTHETIC, *run, "--out", tmp_path, *flags)
    record = results(tmp_path)
    assert record["tasks"]["synthetic-shape"]["spread"] is None
    assert record["weights"] == ("untrained" if "--untrained" in flags else "encoder")
    assert "chance 16.7, 20 clips" in capfd.readouterr().out


def probe_args(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["probe.py", *map(str, flags)])
        return probe.parse_args()


def test_untrained_is_another_encoder(teacher):
    x = torch.randn(1, 3, 4, 32, 32)
    task = ("--task", "synthetic-shape", "--checkpoint", teacher)
    trained, first, second = (probe.load(probe_args(*task, *f)) for f in ((), ("--untrained",), ("--untrained",)))
    assert torch.equal(trained(x), load_encoder(teacher)(x)) and torch.equal(first(x), second(x))
    assert not torch.allclose(trained(x), first(x), atol=1e-3)
    assert not any(e.training or any(p.requires_grad for p in e.parameters()) for e in (trained, first))


def test_seed_of_the_untrained_encoder(teacher):
    task = ("--task", "synthetic-shape", "--checkpoint", teacher, "--untrained")
    flags = (), ("--seed", 0), ("--seed", 1)
    weights = [probe.load(probe_args(*task, *f)).patch_embed.weight for f in flags]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[1], weights[2], atol=1e-3)


def test_seed_of_the_probe(probed, student, tmp_path, capfd):
    """It is the first probe's: the second of two probes is the one that --seed 1 trains."""
    tasks = ("--task", "synthetic-motion", "synthetic-shape")
    run_script(probe, *QUICK, *SYNTHETIC, *tasks, "--checkpoint", student, "--out", tmp_path, "--seed", 1)
    assert "seed 1 epoch 1/1" in capfd.readouterr().out and results(tmp_path)["args"]["seed"] == 1
    for task, found in results(tmp_path)["tasks"].items():
        assert found["top1_per_seed"] == results(probed)["tasks"][task]["top1_per_seed"][1:]


def test_seeds_differ_in_initialisation_and_order(student, tmp_path, monkeypatch):
    """With three probes from --seed 5 on: 5, 6 and 7."""
    firsts = []

    def watched(args, network, epochs, steps, column):
        firsts.append((network.linear.weight.clone(), next(iter(epochs(0)))[0]))
        yield 0, 0.0

    monkeypatch.setattr(probe, "train_probe", watched)
    flags = [*QUICK, *SYNTHETIC, "--task", "synthetic-shape", "--checkpoint", student, "--out", tmp_path]
    for seeds in (("--seed", 5, "--seeds", 3), ("--seed", 6)):
        run_script(probe, *flags, *seeds)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.allclose(x, y) for x, y in zip(firsts[a], firsts[b], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(firsts[1], firsts[3], strict=True))


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ema"
    run_script(train_ema_baseline, *TINY, "--ema-momentum", 0.5, "--out", out)
    return out


def test_weights_of_an_ema_run(ema, tmp_path, capfd):
    """Its encoder is the moving average; the student is probed only if asked for."""
    x, states = torch.randn(1, 3, 4, 32, 32), load_checkpoint(ema)
    task = ("--task", "synthetic-shape", "--checkpoint", ema)
    for flags, part in (((), "encoder"), (("--weights", "encoder"), "encoder"), (("--weights", "student"), "student")):
        encoder = Encoder(**states["model"]["encoder"])
        encoder.load_state_dict(states[part])
        loaded = probe.load(probe_args(*task, *flags))
        assert torch.equal(loaded(x), encoder(x)) and not loaded.training
        run_script(probe, *QUICK, *SYNTHETIC, *task, *flags, "--out", tmp_path)
        assert results(tmp_path)["weights"] == part and results(tmp_path)["checkpoint"] == str(ema)
        assert (f"{ema} (student) synthetic-shape: top-1" in capfd.readouterr().out) == (part == "student")
    assert not torch.allclose(states["encoder"]["patch_embed.weight"], states["student"]["patch_embed.weight"])


def test_other_runs_hold_no_student(teacher, student, tmp_path, capfd):
    for run in (teacher, student):
        flags = ("--task", "synthetic-shape", "--checkpoint", run, "--weights", "student", "--out", tmp_path / "out")
        assert f"{run} holds no student" in refusal(capfd, probe, *QUICK, *SYNTHETIC, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("single", [False, True])
def test_single_frame(single):
    """The encoder then sees the middle frame only, at all times."""
    args = probe_args(*QUICK, "--task", "synthetic-shape", *["--single-frame"] * single)
    source, seen = data.Synthetic(6, 16, length=20), []

    def encoder(clips):
        seen.append(clips)
        return clips.flatten(1)[:, None]

    pairs = list(probe.tokens_of(args, encoder, source, range(20)))
    clips, expected = torch.cat(seen), data.normalise(source.batch(range(20)).clips, "cpu")
    assert [len(tokens) for tokens, _ in pairs] == [16, 4]
    assert torch.equal(torch.cat([labels for _, labels in pairs]), source.batch(range(20)).labels)
    if single:
        expected = expected[:, :, 3:4].expand(-1, -1, 6, -1, -1)
    torch.testing.assert_close(clips, expected)


def test_training_and_validation_clips_are_others(teacher):
    """And none of them is a training clip of a run."""
    args = probe_args("--task", "synthetic-shape", "--checkpoint", teacher)
    train, val, tasks = probe.sources(args, load_encoder(teacher))
    assert (len(train), len(val), tasks) == (4000, 1000, {"synthetic-shape": (1, 6)})
    numbers = list(range(30))
    sets = [source.batch(numbers).clips for source in (train, val, data.Synthetic(4, 32, 0), data.Synthetic(4, 32, 1))]
    assert len({clip.numpy().tobytes() for clips in sets for clip in clips}) == 120


@pytest.fixture(scope="module")
def dark_or_bright(tmp_path_factory):
    """A folder of videos and single pictures, class 0 dark and class 1 bright; train.csv, val.csv."""
    folder = tmp_path_factory.mktemp("brightness")
    lines = []
    for n in range(24):
        value = 40 + n if n % 2 == 0 else 200 + n
        if n % 3:
            name = f"{n}.mp4"
            write_video(folder / name, [flat(value, 40)] * 10)
        else:
            name = f"{n}.png"
            write_image(torch.full((3, 40, 40), value, dtype=torch.uint8), str(folder / name))
        lines.append(f"{name} {n % 2}\n")
    (folder / "train.csv").write_text("".join(lines[:16]))
    (folder / "val.csv").write_text("".join(lines[16:]))
    return folder


def own(folder, classes=2, val="val.csv"):
    return "--train-data", folder / "train.csv", "--val-data", folder / val, "--num-classes", classes


def test_task_of_ones_own(dark_or_bright, teacher, tmp_path):
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path, "--epochs", 8, "--lr", "3e-3", "--standardize"]
    run_script(probe, *flags, *own(dark_or_bright))
    found = results(tmp_path)["tasks"]["own"]
    assert found["top1"] == 100 and found["chance"] == 50 and found["num_val"] == 8


def test_named_task(dark_or_bright, teacher, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--task", "k400"]
    assert "--task k400 needs data/k400/train.csv" in refusal(capfd, probe, *flags)
    (tmp_path / "data" / "k400").mkdir(parents=True)
    for name in ("train", "val"):
        lines = (dark_or_bright / f"{name}.csv").read_text().splitlines()
        text = "".join(f"{dark_or_bright}/{line}\n" for line in lines)
        (tmp_path / "data" / "k400" / f"{name}.csv").write_text(text)
    run_script(probe, *flags)
    assert results(tmp_path / "out")["tasks"]["k400"]["chance"] == 0.25


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_videos(workers, dark_or_bright, teacher, tmp_path, capfd):
    """Another one stands in for a training video, which is said; a validation video ends the evaluation."""
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--workers", workers]
    (folder / "3.png").write_bytes(b"")
    run_script(probe, *flags, *own(folder))
    assert "3.png: " in capfd.readouterr().err
    (folder / "20.mp4").write_bytes(b"")
    shutil.rmtree(tmp_path / "out")
    error = refusal(capfd, probe, *flags, *own(folder))
    assert f"{folder / '20.mp4'}: " in error and not (tmp_path / "out").exists()


def test_nothing_but_unreadable_training_videos(dark_or_bright, teacher, tmp_path, capfd):
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    (folder / "train.csv").write_text("0.png 0\n" + "".join(f"missing{n}.mp4 1\n" for n in range(20)))
    error = refusal(capfd, probe, *QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", *own(folder))
    assert "missing" in error


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "give --task"),
        ("--task synthetic-shape --num-classes 5", "give --task"),
        ("--task k400 ssv2", "give --task"),
        ("--task k400 synthetic-shape", "give --task"),
        ("--task imagenet", "imagenet"),
        ("--num-classes 2", "needed together"),
        ("--train-data DIR/train.csv --val-data DIR/val.csv", "needed together"),
        ("--train-data DIR/train.csv --val-data DIR/val.csv --num-classes 1", "train.csv line 2: a label from 0 to 0"),
        ("--train-data DIR/train.csv --val-data DIR/nowhere.csv --num-classes 2", "nowhere.csv"),
        ("--task synthetic-shape --checkpoint nowhere", "no checkpoint at nowhere"),
        ("--task synthetic-shape --probe-heads 3", "--probe-heads: "),
        ("--task synthetic-shape --probe-heads 0", "--probe-heads"),
        ("--task synthetic-shape --probe-depth 0", "--probe-depth"),
        ("--task synthetic-shape --resolution 30", "30x30"),
        ("--task synthetic-shape --num-frames 3", "3 frames"),
        ("--task synthetic-shape --epochs 0", "--epochs"),
        ("--task synthetic-shape --batch-size 0", "--batch-size"),
        ("--task synthetic-shape --val-clips 0", "--val-clips"),
        ("--task synthetic-shape --seeds 0", "--seeds"),
        ("--task synthetic-shape --seed -1", "--seed"),
        ("--task synthetic-shape --workers -1", "--workers"),
        ("--task synthetic-shape --weights predictor", "--weights"),
        ("--task synthetic-shape --out DIR/train.csv/x", "--out "),
    ],
)
def test_wrong_flags_end_in_one_line(flags, says, dark_or_bright, teacher, tmp_path, capfd):
    flags = flags.replace("DIR", str(dark_or_bright)).split()
    assert says in refusal(capfd, probe, *QUICK, *SYNTHETIC, "--checkpoint", teacher, "--out", tmp_path, *flags)


def test_probe_of_a_students_student(student, tmp_path):
    """Stage 2 after stage 2, then probed: what a run leaves, the next script reads."""
    run_script(train_student, *TINY, "--teacher", student, "--out", tmp_path / "next")
    run_script(probe, *QUICK, *SYNTHETIC, "--task", "synthetic-motion", "--checkpoint", tmp_path / "next",
               "--out", tmp_path / "probe")  # fmt: skip
    assert results(tmp_path / "probe")["tasks"]["synthetic-motion"]["num_val"] == 20
