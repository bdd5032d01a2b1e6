"""A probe learns what is in the tokens and nothing else; the script trains, resumes and reports as it says."""

import argparse
import collections
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flat, refusal, run_script, write_image, write_video
from torch.utils._python_dispatch import TorchDispatchMode

import data
import features
import probe
import train_ema_baseline
import train_student
from cli import interval95
from model import AttentiveProbe, load_checkpoint, load_encoder
from training import generator

QUICK = shlex.split("--epochs 1 --batch-size 16 --probe-heads 2 --probe-depth 2 --workers 0 --device cpu")
SYNTHETIC = shlex.split("--train-clips 24 --val-clips 20")


class FixedTokens:
    """Made-up tokens (M, N, D) or (M, V, N, D) with labels (M, L), in place of `features.Tokens`."""

    def __init__(self, args, tokens, labels, readable=None):
        self.args, self.labels, self.stopwatch = args, labels, features.Stopwatch()
        self.tokens = tokens if tokens.dim() == 4 else tokens[:, None]
        self.readable = torch.ones(len(tokens), dtype=torch.bool) if readable is None else readable
        self.source, self.shape = FixedSource(tokens), tokens.shape[-2:]

    def read(self, batches):
        for numbers in batches:
            yield [features.TokenBatch(numbers, self.tokens[numbers], self.labels[numbers], self.readable[numbers])]


class FixedSource(list):
    train = False


def make_args(**changes):
    common = dict(lr=[1e-3], weight_decay=[0.01], batch_size=32, epochs=3, probe_depth=2, probe_heads=2, knn=None,
                  device="cpu", dtype="float32")  # fmt: skip
    return argparse.Namespace(**{**common, **changes})


def learn(args, tokens, labels, folder, classes=4, column=1, seed=0):
    """The probes after training on made-up tokens."""
    probes = probe.make_probes(args, tokens.shape[-1], classes, seed)
    source = FixedTokens(args, tokens, labels)
    for _ in probe.train_probes(args, probes, source, column, seed, folder / "resume.pt", "key"):
        pass
    return probes


@pytest.mark.parametrize("separable", [True, False])
def test_probe_learns_what_is_there(separable, tmp_path):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(900, 6, 16, generator=rng)
    labels = torch.randint(0, 4, (900, 2), generator=rng)
    if separable:  # in each clip, one token at a random position carries the second label
        tokens[torch.arange(900), torch.randint(0, 6, (900,), generator=rng)] += 10 * torch.eye(4, 16)[labels[:, 1]]
    args = make_args(lr=[3e-3], epochs=15)
    probes = learn(args, tokens[:600], labels[:600], tmp_path)
    found = probe.predict_with_probes(args, probes, FixedTokens(args, tokens[600:], labels[600:]), 1)
    assert torch.equal(found.labels, labels[600:, 1]) and found.readable.all()
    accuracy = (found.top5[:, 0, 0] == found.labels).float().mean()
    if separable:
        assert accuracy > 0.98  # random numbers depend on the version of torch
    else:
        assert abs(accuracy - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 300)


@pytest.mark.parametrize("depth", [1, 3])
def test_probes_of_a_grid_learn_as_if_alone(depth, tmp_path):
    """For all pairs of lr and weight decay: the same as a single probe with torch's AdamW and cosine schedule."""
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(70, 5, 16, generator=rng) * 2 + 1, torch.randint(0, 4, (70, 2), generator=rng)
    args = make_args(lr=[5e-3, 1e-3], weight_decay=[0.8, 0.1, 0.01], probe_depth=depth, probe_heads=4)
    probes = learn(args, tokens, labels, tmp_path, seed=7)
    settings = [(lr, decay) for lr in args.lr for decay in args.weight_decay]
    assert len(probes) == 6
    for (lr, decay), (trained, _) in zip(settings, probes, strict=True):
        torch.manual_seed(7)
        alone = AttentiveProbe(16, 4, depth, 4)
        optimizer = torch.optim.AdamW(alone.parameters(), lr=lr, weight_decay=decay)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / 9)) / 2)
        for epoch in range(3):
            for ids in torch.randperm(70, generator=generator("probe order", 7, epoch)).split(32):
                F.cross_entropy(alone(tokens[ids]), labels[ids, 1]).backward()
                optimizer.step()
                optimizer.zero_grad()
                cosine.step()
        for name, weight in alone.named_parameters():
            if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding errors, which Adam amplifies
                torch.testing.assert_close(trained.get_parameter(name), weight, atol=2e-4, rtol=0)
        torch.testing.assert_close(trained(tokens), alone(tokens), atol=1e-3, rtol=0)


def test_micro_batches_add_up(tmp_path):
    """A batch read in several micro-batches trains the same probe."""
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(70, 5, 16, generator=rng), torch.randint(0, 4, (70, 2), generator=rng)
    args, source = make_args(probe_depth=1), FixedTokens(make_args(), tokens, labels)
    read, weights = source.read, []

    def read_in_parts(batches):
        for numbers in batches:
            yield itertools.chain(*read(numbers.split(10)))

    for i, how in enumerate((read, read_in_parts)):
        source.read, probes = how, probe.make_probes(args, 16, 4, 0)
        losses = list(probe.train_probes(args, probes, source, 1, 0, tmp_path / f"{i}.pt", ""))
        weights.append((probes[0][0].linear.weight, losses[-1][2]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def test_views_are_averaged_as_probabilities():
    """One view is certain of class 0, two are fairly sure of 1: mean logits say 0, mean probabilities say 1."""
    args, source = make_args(), FixedTokens(make_args(), torch.zeros(1, 3, 1, 3), torch.zeros(1, 1, dtype=torch.long))
    source.tokens[0, :, 0] = torch.tensor([[12.0, 0, 0], [0, 2, 0], [0, 2, 0]])
    found = probe.predict_with_probes(args, [(lambda x: x[:, 0], None)], source, 0)
    assert found.top5[0, 0].tolist() == [1, 0, 2, -1, -1]
    assert found.labels.tolist() == [0] and found.readable.tolist() == [True]


def test_predictions_of_unreadable_videos():
    """An unreadable video keeps its label but gets no predicted class."""
    scores, labels = torch.eye(6) * 0.5 + torch.arange(6) * 0.01, torch.arange(6)[:, None]
    readable = torch.arange(6) != 4
    source = FixedTokens(make_args(), scores[:, None], labels, readable)
    found = probe.predict(source, 0, 1, lambda x: x[:, 0, 0][None])
    assert torch.equal(found.labels, labels[:, 0]) and torch.equal(found.readable, readable)
    assert found.top5[:, 0, 0].tolist() == [0, 1, 2, 3, -1, 5] and found.top5[4, 0].tolist() == [-1] * 5
    assert found.top5[0, 0].tolist() == [0, 5, 4, 3, 2]


def test_summary():
    """Two seeds of two probes on four videos of three classes: each seed's best probe counts."""
    right = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]])  # (seeds, P, M)
    label = torch.tensor([0, 1, 1, 0])
    top = torch.where(right == 1, label, 2)
    top5 = F.pad(top[..., None], (0, 4), value=-1).transpose(1, 2)  # (seeds, M, P, 5)
    predictions = [probe.Predictions(seed, label, torch.ones(4, dtype=torch.bool)) for seed in top5]
    args = make_args(lr=[1e-2, 1e-3])
    one, confusion = probe.summarize(args, predictions, 3)
    assert one["top1_per_seed"] == [75, 50] and one["top1"] == 62.5 and one["median"] == (50 + 37.5) / 2
    assert [setting["lr"] for setting in one["best"]] == [1e-2, 1e-3] and one["top5"] is None
    assert [p["top1"] for p in one["probes"]] == [50, 37.5] and one["probes"][1]["lr"] == 1e-3
    assert confusion.tolist() == [[2, 0, 2], [0, 3, 1], [0, 0, 0]] and one["per_class"] == [50, 75, None]
    assert one["interval95"] == interval95(2.5, 4) and one["chance"] == pytest.approx(100 / 3)


def test_learning_rate_goes_to_zero(monkeypatch, tmp_path):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    learn(make_args(epochs=5, batch_size=64), torch.randn(70, 2, 8), torch.zeros(70, 2, dtype=torch.long), tmp_path)
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


@pytest.mark.parametrize("same", [True, False])
def test_resumes_after_the_epoch(same, tmp_path):
    """Bit for bit the result of an uninterrupted run; the state of another run is not used."""
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(70, 3, 8, generator=rng), torch.randint(0, 4, (70, 2), generator=rng)
    args, file, weights = make_args(probe_depth=1, lr=[1e-2, 1e-3]), tmp_path / "resume.pt", []
    uninterrupted, first = tmp_path / "uninterrupted.pt", "this" if same else "other"
    for path, stop_at, key in ((uninterrupted, None, "this"), (file, 2, first), (file, None, "this")):
        probes, epochs = probe.make_probes(args, 8, 4, 0), []
        source = FixedTokens(args, tokens, labels)
        for epoch, step, _ in probe.train_probes(args, probes, source, 1, 0, path, key):
            if epoch == stop_at and step == 2:
                break
            epochs.append(epoch)
        weights.append(([p.linear.weight.clone() for p, _ in probes], epochs))
    for complete, stopped, resumed in zip(*(found for found, _ in weights), strict=True):
        assert torch.equal(complete, resumed) and not torch.equal(complete, stopped)
    assert weights[2][1] == ([2] * 3 if same else [0] * 3 + [1] * 3 + [2] * 3)


def test_nearest_neighbors():
    """One near neighbor outweighs two farther ones: weights are exp(cosine / 0.07), cosines of mean tokens."""

    def at(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    args = make_args(knn=3)
    train = torch.tensor([at(0), at(40), at(41), at(180)])[:, None].expand(-1, 2, -1) * torch.tensor([0.5, 7])[:, None]
    train = FixedTokens(args, train * torch.tensor([[[1.0]], [[5]], [[9]], [[1]]]), torch.tensor([[1], [2], [2], [0]]))
    val = FixedTokens(args, torch.tensor([[at(2)], [at(39)]]), torch.tensor([[1], [0]]))
    found = probe.predict_with_neighbors(args, train, val, probe.Task("own", 0, 4)).top5
    assert found[:, 0, 0].tolist() == [1, 2] and found[:, 0, 1].tolist() == [2, 1]


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
    assert "chance 16.7, 20 videos" in capfd.readouterr().out


def probe_args(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["probe.py", *map(str, flags)])
        return probe.parse_args()


def test_seed_of_the_probe(probed, student, tmp_path, capfd):
    """--seed is the first repetition's: the second of two repetitions is the one that --seed 1 trains."""
    tasks = ("--task", "synthetic-motion", "synthetic-shape")
    run_script(probe, *QUICK, *SYNTHETIC, *tasks, "--checkpoint", student, "--out", tmp_path, "--seed", 1)
    assert "seed 1 epoch 1/1" in capfd.readouterr().out and results(tmp_path)["args"]["seed"] == 1
    for task, found in results(tmp_path)["tasks"].items():
        assert found["top1_per_seed"] == results(probed)["tasks"][task]["top1_per_seed"][1:]


def test_seeds_differ_in_initialization_and_order(student, tmp_path, monkeypatch):
    """Three repetitions from --seed 5 have the seeds 5, 6 and 7."""
    firsts = []

    def watched(args, probes, tokens, column, order, *rest):
        firsts.append((probes[0][0].linear.weight.clone(), order))
        yield torch.zeros(())

    monkeypatch.setattr(probe, "train_epoch", watched)
    flags = [*QUICK, *SYNTHETIC, "--task", "synthetic-shape", "--checkpoint", student, "--out", tmp_path]
    for seeds in (("--seed", 5, "--seeds", 3), ("--seed", 6)):
        run_script(probe, *flags, *seeds)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.equal(x, y) for x, y in zip(firsts[a], firsts[b], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(firsts[1], firsts[3], strict=True))


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ema"
    run_script(train_ema_baseline, *TINY, "--ema-momentum", 0.5, "--out", out)
    return out


def test_weights_of_an_ema_run(ema, tmp_path, capfd):
    """Its student is probed only on request, and named."""
    task = ("--task", "synthetic-shape", "--checkpoint", ema)
    for flags, part in (((), "encoder"), (("--weights", "encoder"), "encoder"), (("--weights", "student"), "student")):
        run_script(probe, *QUICK, *SYNTHETIC, *task, *flags, "--out", tmp_path)
        assert results(tmp_path)["weights"] == part and results(tmp_path)["checkpoint"] == str(ema)
        assert (f"{ema} (student) synthetic-shape: top-1" in capfd.readouterr().out) == (part == "student")


def test_other_runs_hold_no_student(teacher, student, tmp_path, capfd):
    for run in (teacher, student):
        flags = ("--task", "synthetic-shape", "--checkpoint", run, "--weights", "student", "--out", tmp_path / "out")
        assert f"{run} holds no student" in refusal(capfd, probe, *QUICK, *SYNTHETIC, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [1, 2])
def test_bfloat16_means_bfloat16(depth, teacher, tmp_path):
    """All matmuls of encoder and probes run in bfloat16, forward and backward, except attention on the CPU.

    (`model.attend` uses float32 there.) The probes' weights stay float32.
    """
    seen = collections.defaultdict(set)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, inputs=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "bmm", "addmm", "baddbmm"):
                seen[name] |= {x.dtype for x in inputs[:3] if isinstance(x, torch.Tensor)}
            return function(*inputs, **(kwargs or {}))

    args = probe_args(*QUICK, *SYNTHETIC, "--task", "synthetic-shape", "--checkpoint", teacher, "--dtype", "bfloat16",
                      "--probe-depth", depth)  # fmt: skip
    encoder, _ = features.load(args)
    train, _, _ = probe.open_task(args, encoder)
    tokens = features.Tokens(args, encoder, train, features.Stopwatch())
    probes = probe.make_probes(args, tokens.shape[1], 6, 0)
    batch = train.batch(range(24))
    with Watch():
        source = FixedTokens(args, tokens.encode(batch.clips), batch.labels)
        for _ in probe.train_probes(args, probes, source, 1, 0, tmp_path / "resume.pt", ""):
            pass
    assert (
        source.tokens.dtype == torch.bfloat16
        and {"mm", "addmm"} <= seen.keys()  # backward, forward
        and all(dtypes == {torch.bfloat16} for dtypes in seen.values())
    ), seen
    assert {p.dtype for one, _ in probes for p in one.parameters()} == {torch.float32}


def test_training_and_validation_clips_differ(teacher):
    """And no training run sees any of them."""
    args = probe_args("--task", "synthetic-shape", "--checkpoint", teacher)
    train, val, tasks = probe.open_task(args, load_encoder(teacher))
    assert (len(train), len(val), tasks) == (4000, 1000, [("synthetic-shape", 1, 6)])
    numbers = list(range(30))
    sets = [source.batch(numbers).clips for source in (train, val, data.Synthetic(4, 32, 0), data.Synthetic(4, 32, 1))]
    assert len({clip.numpy().tobytes() for clips in sets for clip in clips}) == 120


@pytest.fixture(scope="module")
def dark_or_bright(tmp_path_factory):
    """A folder of videos and images, class 0 dark and class 1 bright, with train.csv and val.csv."""
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


def own_task(folder, classes=2, val="val.csv"):
    return "--train-data", folder / "train.csv", "--val-data", folder / val, "--num-classes", classes


def test_own_task(dark_or_bright, teacher, tmp_path):
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path, "--epochs", 8, "--lr", "3e-3", "--standardize"]
    run_script(probe, *flags, *own_task(dark_or_bright))
    found = results(tmp_path)["tasks"][dark_or_bright.name]
    assert found["top1"] == 100 and found["chance"] == 50 and found["num_val"] == 8


def test_named_task(dark_or_bright, teacher, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--task", "jester"]
    error = refusal(capfd, probe, *flags)
    assert "--task jester needs data/jester/train.csv" in error and "python -m tools.prepare jester --help" in error
    (tmp_path / "data" / "jester").mkdir(parents=True)
    for name in ("train", "val"):
        lines = (dark_or_bright / f"{name}.csv").read_text().splitlines()
        text = "".join(f"{dark_or_bright}/{line}\n" for line in lines)
        (tmp_path / "data" / "jester" / f"{name}.csv").write_text(text)
    run_script(probe, *flags)
    assert results(tmp_path / "out")["tasks"]["jester"]["chance"] == pytest.approx(100 / 27)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_videos(workers, dark_or_bright, teacher, tmp_path, capfd):
    """A training video is replaced by another one and reported; a validation video ends the evaluation."""
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--workers", workers]
    (folder / "3.png").write_bytes(b"")
    run_script(probe, *flags, *own_task(folder))
    assert "3.png: " in capfd.readouterr().err
    (folder / "20.mp4").write_bytes(b"")
    shutil.rmtree(tmp_path / "out")
    error = refusal(capfd, probe, *flags, *own_task(folder))
    assert f"{folder / '20.mp4'}: " in error and not (tmp_path / "out").exists()


def test_skip_bad_counts_a_miss(dark_or_bright, teacher, tmp_path, capfd):
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    (folder / "20.mp4").write_bytes(b"")
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--epochs", 8, "--lr", "3e-3", "--standardize"]
    run_script(probe, *flags, *own_task(folder), "--skip-bad")
    found = results(tmp_path / "out")["tasks"]["data"]
    assert found["num_val"] == 8 and found["unreadable"] == 1 and found["top1"] == 87.5
    assert found["per_class"] == [75, 100]
    said = capfd.readouterr()
    assert "20.mp4" in said.err and "1 unreadable counted as misses" in said.out


def test_resume_key_identifies_the_run(dark_or_bright, teacher, tmp_path):
    """It changes with flags, weights, labels and step, but not with what a restarted run may change."""
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    flags = [*QUICK, "--checkpoint", teacher, *own_task(folder)]

    def key(*more, step_offset=0):
        args = probe_args(*flags, *more)
        encoder, step = features.load(args)
        probe.open_task(args, encoder)
        return probe.resume_key(args, encoder, step + step_offset)

    first = key()
    assert key("--workers", 3, "--out", tmp_path / "x", "--seeds", 2, "--skip-bad") == first
    assert key("--checkpoint", teacher / "checkpoint.pt") == first
    changes = [("--lr", 1e-2), ("--untrained",), ("--frame-step", 1), ("--batch-size", 8), ("--flip",),
               ("--num-classes", 3), ("--augment", "none"), ("--augment", "pretrain"), ("--standardize",),
               ("--dtype", "bfloat16"), ("--layers", 1), ("--layers", 1, "--combine", "mean"),
               ("--untrained", "--seed", 1)]  # fmt: skip
    keys = {first, key(step_offset=1), *(key(*change) for change in changes)}
    lines = (folder / "train.csv").read_text().splitlines(keepends=True)
    (folder / "train.csv").write_text("".join(lines[1:]))
    keys.add(key())
    (folder / "train.csv").write_text("".join([lines[0].replace(" 0", " 1"), *lines[1:]]))
    keys.add(key())
    assert len(keys) == len(changes) + 4


@pytest.mark.parametrize("same", [True, False])
def test_resumed_script(same, dark_or_bright, teacher, tmp_path, monkeypatch, capfd):
    """A run that died continues after its last epoch, with the same result; with another --lr it starts over."""
    flags = [*QUICK, "--checkpoint", teacher, *own_task(dark_or_bright), "--epochs", 3]
    lr = ["--lr", "1e-3"] if same else ["--lr", "2e-3"]
    run_script(probe, *flags, *lr, "--out", tmp_path / "uninterrupted")
    with monkeypatch.context() as patch:
        epoch = probe.train_epoch

        def dies_in_the_third_epoch(args, probes, tokens, column, order, first_step, num_steps):
            if first_step == 2:
                raise RuntimeError("killed")
            return epoch(args, probes, tokens, column, order, first_step, num_steps)

        patch.setattr(probe, "train_epoch", dies_in_the_third_epoch)
        with pytest.raises(RuntimeError, match="killed"):
            run_script(probe, *flags, "--lr", "1e-3", "--out", tmp_path / "resumed")
    capfd.readouterr()
    run_script(probe, *flags, *lr, "--out", tmp_path / "resumed")
    said = capfd.readouterr().out
    assert ("continuing after epoch 2" in said) == same
    assert results(tmp_path / "resumed")["tasks"] == results(tmp_path / "uninterrupted")["tasks"]
    assert not list((tmp_path / "resumed").glob("resume-*.pt"))


def test_step_of_the_checkpoint_is_that_of_the_probed_weights(teacher, tmp_path, monkeypatch):
    """Even if the training run saves again meanwhile."""
    run = shutil.copytree(teacher, tmp_path / "run")
    summarize = probe.summarize

    def training_continues(*args):
        torch.save(load_checkpoint(run) | {"step": 1000}, run / "checkpoint.pt")
        return summarize(*args)

    monkeypatch.setattr(probe, "summarize", training_continues)
    flags = [*QUICK, *SYNTHETIC, "--task", "synthetic-shape", "--checkpoint", run, "--out", tmp_path / "out"]
    run_script(probe, *flags)
    assert results(tmp_path / "out")["step"] == 6


def test_features_that_never_change_are_computed_once(dark_or_bright, teacher, tmp_path, monkeypatch):
    """With two segments and three views, too; the probes are the same as without keeping features."""
    flags = [*QUICK, "--checkpoint", teacher, *own_task(dark_or_bright), "--augment", "none", "--epochs", "2",
             "--seeds", "2", "--segments", "2", "--views", "3", "--standardize", "--batch-size", "24"]  # fmt: skip
    encode, encoded = features.Tokens.encode, collections.Counter()

    def counted(tokens, clips):
        encoded[tokens.source.views] += len(clips)  # one view of training videos, three of validation videos
        return encode(tokens, clips)

    monkeypatch.setattr(features.Tokens, "encode", counted)
    run_script(probe, *flags, "--out", tmp_path / "kept")
    num_train, num_val = (len((dark_or_bright / f"{split}.csv").read_text().splitlines()) for split in ("train", "val"))
    assert encoded == {1: num_train, 3: num_val}
    monkeypatch.setattr(features, "KEPT_BYTES", 0)
    run_script(probe, *flags, "--out", tmp_path / "not-kept")
    assert encoded == {1: num_train * (1 + 1 + 2 * 2), 3: num_val * (1 + 2)}  # 1 to standardize, 2 epochs x 2 seeds
    assert results(tmp_path / "kept")["tasks"] == results(tmp_path / "not-kept")["tasks"]


def test_knn(dark_or_bright, teacher, tmp_path):
    run_script(probe, *QUICK, "--checkpoint", teacher, "--out", tmp_path, "--knn", 3, *own_task(dark_or_bright))
    found = results(tmp_path)["tasks"][dark_or_bright.name]
    assert found["top1"] == 100 and found["best"] == [{"k": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["vjepa2", "none"])
def test_three_processes_seven_videos(augment, dark_or_bright, teacher, tmp_path, capfd):
    """Every validation video counts once, although 3 does not divide 7; the probes are the same as in one process."""
    lines = (dark_or_bright / "val.csv").read_text().splitlines()[:7]
    (tmp_path / "val.csv").write_text("".join(f"{dark_or_bright}/{line}\n" for line in lines))
    flags = [*QUICK, "--checkpoint", teacher, *own_task(dark_or_bright, val=tmp_path / "val.csv"), "--probe-depth", "1",
             "--lr", "3e-3", "1e-3", "--epochs", "4", "--batch-size", "5", "--standardize",
             "--augment", augment]  # fmt: skip
    capfd.readouterr()
    run_script(probe, *flags, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", probe.__file__]
    done = subprocess.run(
        [*command, *map(str, flags), "--out", str(tmp_path / "three")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, three = (results(tmp_path / name)["tasks"][dark_or_bright.name] for name in ("one", "three"))
    assert one == three and one["num_val"] == 7
    losses = [re.findall(r"step 4/4  loss ([0-9.]+)", text) for text in (capfd.readouterr().out, done.stdout)]
    assert losses[0] == losses[1] and len(losses[0]) == 1  # the last step's; others appear every 30 seconds
    assert (tmp_path / "three" / f"confusion-{dark_or_bright.name}.png").stat().st_size > 1000


@pytest.mark.parametrize("task, protocol", [
    ("k400", (400, 16, 4, 8, 3, 256, 20)), ("ssv2", (174, 16, 4, 2, 3, 256, 20)), ("coin", (180, 16, 4, 8, 3, 256, 1)),
    ("diving48", (48, 16, 2, 4, 3, 128, 1)), ("jester", (27, 16, 2, 4, 3, 128, 1)),
    ("ucf101", (101, 16, 4, 5, 3, 128, 1)), ("hmdb51", (51, 16, 2, 10, 3, 128, 1)),
    ("imagenet1k", (1000, 16, 4, 1, 3, 1024, 1)), ("k400 --fast", (400, 16, 4, 1, 1, 256, 1)),
    ("ssv2 --fast", (174, 16, 4, 1, 1, 256, 1)),
    ("jester --views 2 --lr 1 2 --weight-decay 3", (27, 16, 2, 4, 2, 128, 2)),
])  # fmt: skip
def test_protocols(task, protocol):
    args = probe_args("--task", *task.split())
    found = args.num_classes, args.num_frames, args.frame_step, args.segments, args.views, args.batch_size
    assert (*found, len(args.lr) * len(args.weight_decay)) == protocol


@pytest.mark.parametrize(
    "flags, augment, flip",
    [
        ("--task k400", "vjepa2", False),
        ("--task ssv2 --fast", "vjepa2", False),
        ("--train-data a --val-data b --num-classes 2", "vjepa2", False),
        ("--task k400 --flip", "vjepa2", True),
        ("--task k400 --augment pretrain", "pretrain", True),
        ("--task k400 --augment pretrain --no-flip", "pretrain", False),
        ("--task ssv2 --augment pretrain", "pretrain", False),
        ("--task jester --augment pretrain --flip", "pretrain", True),
        ("--train-data a --val-data b --num-classes 2 --augment pretrain", "pretrain", True),
        ("--task coin --augment none", "none", False),
        ("--task synthetic-shape", "none", False),
    ],
)
def test_augmentation_of_the_protocols(flags, augment, flip):
    """V-JEPA 2's augmentation without flips is the default; that of pretraining flips where labels allow it."""
    args = probe_args(*flags.split())
    assert (args.augment, args.flip) == (augment, flip)


@pytest.mark.parametrize("augment, clips", [("none", 16 + 8 * 3), ("vjepa2", 16 * 3 + 8 * 3)])
def test_clips_encoded_with_three_views(augment, clips, dark_or_bright, teacher, tmp_path, monkeypatch):
    """Training encodes one view: without augmentation only once for 3 epochs, and not the leftmost but the centered."""
    encoded, encode = [], features.Tokens.encode

    def count(self, clips):
        encoded.append(clips.shape[:3].numel())
        return encode(self, clips)

    monkeypatch.setattr(features.Tokens, "encode", count)
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path, "--epochs", 3, *own_task(dark_or_bright)]
    run_script(probe, *flags, "--views", 3, "--augment", augment)
    assert sum(encoded) == clips


@pytest.mark.parametrize("flags, views", [((), 1), (("--knn", 1), 3)])
def test_training_views_without_augmentation(flags, views, dark_or_bright, teacher):
    """Probes train on the middle one of three validation views; nearest neighbors average all of them."""
    flags = [*flags, "--checkpoint", teacher, *own_task(dark_or_bright, val="train.csv"), "--views", 3]
    train, val, _ = probe.open_task(probe_args(*flags, "--augment", "none"), load_encoder(teacher))
    clips = val.batch([1]).clips
    assert torch.equal(train.batch([1]).clips, clips[:, 1:2] if views == 1 else clips)


def test_only_unreadable_training_videos(dark_or_bright, teacher, tmp_path, capfd):
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    (folder / "train.csv").write_text("".join(f"missing{n}.mp4 1\n" for n in range(20)))
    error = refusal(capfd, probe, *QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", *own_task(folder))
    assert "missing" in error


@pytest.mark.parametrize(
    "flags, message",
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
        ("--task synthetic-shape --probe-heads 3 --probe-depth 1", "--probe-heads: "),
        ("--task synthetic-shape --untrained --weights student", "--weights student"),
        ("--task synthetic-shape --views 3", "--views"),
        ("--task synthetic-shape --augment vjepa2", "--augment vjepa2"),
        ("--task synthetic-shape --flip", "--flip"),
        ("--task synthetic-shape --layers 0", "--layers"),
        ("--task synthetic-shape --layers 1 2", "--layers"),
        ("--task synthetic-shape --knn 0", "--knn 0"),
        ("--task synthetic-shape --knn 25", "24 training videos"),
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
def test_wrong_flags_end_in_one_line(flags, message, dark_or_bright, teacher, tmp_path, capfd):
    flags = flags.replace("DIR", str(dark_or_bright)).split()
    message = message.replace("DIR", str(dark_or_bright))
    assert message in refusal(capfd, probe, *QUICK, *SYNTHETIC, "--checkpoint", teacher, "--out", tmp_path, *flags)


def test_probe_of_a_student_taught_by_a_student(student, tmp_path):
    """A student can be the teacher of another run of stage 2, and that one be probed."""
    run_script(train_student, *TINY, "--teacher", student, "--out", tmp_path / "next")
    run_script(probe, *QUICK, *SYNTHETIC, "--task", "synthetic-motion", "--checkpoint", tmp_path / "next",
               "--out", tmp_path / "probe")  # fmt: skip
    assert results(tmp_path / "probe")["tasks"]["synthetic-motion"]["num_val"] == 20
