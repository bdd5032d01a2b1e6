"""The probe learns what is in the tokens and nothing else, and reports it."""

import argparse
import collections
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flat, frame_numbers, numbered, randomize, refusal, run_script, write_image, write_video
from torch.utils._python_dispatch import TorchDispatchMode

import data
import features
import probe
import train_ema_baseline
import train_student
from cli import interval95
from model import AttentiveProbe, Encoder, load_checkpoint, load_encoder
from training import generator

QUICK = shlex.split("--epochs 1 --batch-size 16 --probe-heads 2 --probe-depth 2 --workers 0 --device cpu")
SYNTHETIC = shlex.split("--train-clips 24 --val-clips 20")


@pytest.mark.parametrize(
    "right, total, low, high",
    [(0, 10, 0, 27.753), (5, 10, 23.659, 76.341), (81, 263, 25.529, 36.617), (10, 10, 72.247, 100)],
)
def test_interval95(right, total, low, high):
    """Wilson's interval; 81 of 263 is the example of Newcombe (1998), table I: 0.2553 to 0.3662."""
    assert interval95(right, total) == pytest.approx([low, high], abs=0.01)


class Fixed:
    """Made-up tokens in the place of an encoder's: what features.Tokens says of itself."""

    def __init__(self, args, tokens, labels):  # (M, N, D) or (M, V, N, D), (M, L)
        self.args, self.x, self.y, self.spent = args, tokens, labels, features.Stopwatch()
        self.source, self.shape, self.kept = range(len(tokens)), tokens.shape[-2:], None

    def read(self, batches):
        for ids in batches:
            x = self.x[ids]
            yield [(ids, x if x.dim() == 4 else x[:, None], self.y[ids])]


def own_args(**changes):
    common = dict(lr=[1e-3], weight_decay=[0.01], batch_size=32, epochs=3, probe_depth=2, probe_heads=2, knn=None,
                  device="cpu", dtype="float32")  # fmt: skip
    return argparse.Namespace(**{**common, **changes})


def learn(args, tokens, labels, folder, classes=4, column=1, seed=0):
    """The stacks of probes after probe.py's training on made-up tokens."""
    stacks, source = probe.make_probes(args, tokens.shape[-1], classes, seed), Fixed(args, tokens, labels)
    for _ in probe.train_probes(args, stacks, source, column, seed, None, folder / "resume.pt", "key"):
        pass
    return stacks


@pytest.mark.parametrize("separable", [True, False])
def test_probe_learns_what_is_there(separable, tmp_path):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(900, 6, 16, generator=rng)
    labels = torch.randint(0, 4, (900, 2), generator=rng)
    if separable:  # one of the tokens, at a place of its own in each clip, carries the second label
        tokens[torch.arange(900), torch.randint(0, 6, (900,), generator=rng)] += 10 * torch.eye(4, 16)[labels[:, 1]]
    args = own_args(lr=[3e-3], epochs=15)
    stacks = learn(args, tokens[:600], labels[:600], tmp_path)
    found = probe.predict(args, stacks, Fixed(args, tokens[600:], labels[600:]), 1, None)
    assert torch.equal(found[:, 0, 5], labels[600:, 1]) and (found[..., 6] == 1).all()
    accuracy = (found[:, 0, 0] == found[:, 0, 5]).float().mean()
    if separable:
        assert accuracy > 0.98  # what a torch draws depends on its version
    else:
        assert abs(accuracy - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 300)


@pytest.mark.parametrize("depth, together", [(1, True), (3, True), (3, False)])
def test_stacked_probes_learn_as_separate_ones(depth, together, tmp_path, monkeypatch):
    """All pairs of lr and weight decay in one pass: each as AttentiveProbe with torch's AdamW and a cosine, alone."""
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(70, 5, 16, generator=rng) * 2 + 1, torch.randint(0, 4, (70, 2), generator=rng)
    args = own_args(lr=[5e-3, 1e-3], weight_decay=[0.8, 0.1, 0.01], probe_depth=depth, probe_heads=4)
    if depth > 1 and together:  # as on a GPU
        args.device = "cuda"
        monkeypatch.setattr(probe.AttentiveProbes, "to", lambda self, device: self)
    stacks = probe.make_probes(args, 16, 4, 7)
    assert [len(stack.part("query")) for stack, _ in stacks] == ([6] if depth == 1 else [4, 2] if together else [1] * 6)
    args.device, settings = "cpu", [(lr, decay) for lr in args.lr for decay in args.weight_decay]
    source = Fixed(args, tokens, labels)
    for _ in probe.train_probes(args, stacks, source, 1, 7, None, tmp_path / "resume.pt", "key"):
        pass
    for i, (lr, decay) in enumerate(settings):
        torch.manual_seed(7)
        alone = AttentiveProbe(16, 4, depth, 4)
        optimizer = torch.optim.AdamW(alone.parameters(), lr=lr, weight_decay=decay)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / 9)) / 2)
        for epoch in range(3):
            for ids in torch.randperm(70, generator=generator(7, epoch)).split(32):
                F.cross_entropy(alone(tokens[ids]), labels[ids, 1]).backward()
                optimizer.step()
                optimizer.zero_grad()
                cosine.step()
        size = len(stacks[0][0].part("query"))
        stack, place = stacks[i // size][0], i % size
        for name, weight in alone.named_parameters():
            torch.testing.assert_close(stack.part(name)[place], weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(stack(tokens)[place], alone(tokens), atol=1e-4, rtol=0)


def test_optimizer_is_adamw_to_rounding():
    """With a gradient that is the same: parameters to 1e-6."""
    torch.manual_seed(0)
    probes, settings = [AttentiveProbe(8, 3, 1, 2) for _ in range(3)], [(1e-2, 0.8), (1e-3, 0.1), (1e-4, 0)]
    stack = probe.AttentiveProbes(probes)
    optimizer = probe.make_optimizer(stack, settings)
    alone = [torch.optim.AdamW(p.parameters(), lr=lr, weight_decay=wd)
             for p, (lr, wd) in zip(probes, settings, strict=True)]  # fmt: skip
    for _ in range(5):
        for name, p in probes[0].named_parameters():
            gradient = torch.randn(3, *p.shape)
            stack.part(name).grad.copy_(gradient)
            for other, g in zip(probes, gradient, strict=True):
                other.get_parameter(name).grad = g.clone()
        for one in (optimizer, *alone):
            one.step()
    for i, other in enumerate(probes):
        for name, p in other.named_parameters():
            torch.testing.assert_close(stack.part(name)[i], p, atol=1e-6, rtol=0)


def test_views_are_averaged_as_probabilities():
    """Two views, certain of class 0 and fairly sure of 1: logits would say 0 (10 + 0 > 0 + 6), probabilities say 1."""
    args, source = own_args(), Fixed(own_args(), torch.zeros(1, 3, 1, 3), torch.zeros(1, 1, dtype=torch.long))
    source.x[0, :, 0] = torch.tensor([[12.0, 0, 0], [0, 2, 0], [0, 2, 0]])
    found = probe.predict(args, [(lambda x: x[None, :, 0], None)], source, 0, None)
    assert found[0, 0].tolist() == [1, 0, 2, -1, -1, 0, 1]


def test_missed_videos_and_ties_with_five_classes():
    """A video that could not be read has no likely class but keeps its own."""
    found = probe.top_classes(torch.eye(6)[None] * 0.5 + torch.arange(6) * 0.01, torch.tensor([0, 1, 2, 3, -5, 5]))
    assert found[:, 0, 5].tolist() == [0, 1, 2, 3, 4, 5] and found[:, 0, 6].tolist() == [1, 1, 1, 1, 0, 1]
    assert found[:, 0, 0].tolist() == [0, 1, 2, 3, -1, 5] and found[4, 0, :5].tolist() == [-1] * 5
    assert found[0, 0, :5].tolist() == [0, 5, 4, 3, 2]


def test_summary():
    """Two seeds of two probes on four videos of three classes: each seed's best probe counts."""
    right = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]]])  # (seeds, P, M)
    label = torch.tensor([0, 1, 1, 0])
    top = torch.where(right == 1, label, 2)
    found = torch.stack([top, *[torch.full_like(top, -1)] * 4, label.expand_as(top), torch.ones_like(top)], 3)
    args = own_args(lr=[1e-2, 1e-3])
    one, confusion = probe.summarize(args, found.transpose(1, 2), 3)
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
    learn(own_args(epochs=5, batch_size=64), torch.randn(70, 2, 8), torch.zeros(70, 2, dtype=torch.long), tmp_path)
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])


@pytest.mark.parametrize("same", [True, False])
def test_resumes_after_the_epoch(same, tmp_path):
    """To the bit what an uninterrupted run gives; a state of another run is not taken."""
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(70, 3, 8, generator=rng), torch.randint(0, 4, (70, 2), generator=rng)
    args, file, weights = own_args(probe_depth=1, lr=[1e-2, 1e-3]), tmp_path / "resume.pt", []
    whole, first = tmp_path / "whole.pt", "this" if same else "other"
    for path, stop_at, key in ((whole, None, "this"), (file, 2, first), (file, None, "this")):
        stacks, epochs = probe.make_probes(args, 8, 4, 0), []
        for epoch, step, _ in probe.train_probes(args, stacks, Fixed(args, tokens, labels), 1, 0, None, path, key):
            if epoch == stop_at and step == 2:
                break
            epochs.append(epoch)
        weights.append((stacks[0][0].part("linear.weight").clone(), epochs))
    assert torch.equal(weights[0][0], weights[2][0]) and not torch.equal(weights[0][0], weights[1][0])
    assert weights[2][1] == ([2] * 3 if same else [0] * 3 + [1] * 3 + [2] * 3)


def test_standardize():
    tokens = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 0.1, 1]) + 3
    args = own_args()
    scale = features.moments(args, Fixed(args, tokens, torch.zeros(50, 1)), torch.arange(50))
    torch.testing.assert_close(scale, torch.stack((tokens.flatten(0, 1).mean(0), tokens.flatten(0, 1).std(0))))
    out = probe.logits_of(args, lambda x: x, tokens, scale).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0), torch.ones(3), atol=1e-4, rtol=0)


def test_nearest_neighbors():
    """One near neighbor outweighs two farther ones: weights are exp(cosine / 0.07), of mean tokens."""

    def at(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    args = own_args(knn=3)
    train = torch.tensor([at(0), at(40), at(41), at(180)])[:, None].expand(-1, 2, -1) * torch.tensor([0.5, 7])[:, None]
    train = Fixed(args, train * torch.tensor([[[1.0]], [[5]], [[9]], [[1]]]), torch.tensor([[1], [2], [2], [0]]))
    val = Fixed(args, torch.tensor([[at(2)], [at(39)]]), torch.tensor([[1], [0]]))
    found = probe.nearest_neighbors(args, train, val, 0, 4)
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
    assert "chance 16.7, 20 clips" in capfd.readouterr().out


def probe_args(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["probe.py", *map(str, flags)])
        return probe.parse_args()


def test_untrained_is_another_encoder(teacher):
    x = torch.randn(1, 3, 4, 32, 32)
    task = ("--task", "synthetic-shape", "--checkpoint", teacher)
    trained, first, second = (features.load(probe_args(*task, *f)) for f in ((), ("--untrained",), ("--untrained",)))
    assert torch.equal(trained(x), load_encoder(teacher)(x)) and torch.equal(first(x), second(x))
    assert not torch.allclose(trained(x), first(x), atol=1e-3)
    assert not any(e.training or any(p.requires_grad for p in e.parameters()) for e in (trained, first))


def test_seed_of_the_untrained_encoder(teacher):
    task = ("--task", "synthetic-shape", "--checkpoint", teacher, "--untrained")
    flags = (), ("--seed", 0), ("--seed", 1)
    weights = [features.load(probe_args(*task, *f)).patch_embed.weight for f in flags]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[1], weights[2], atol=1e-3)


def test_seed_of_the_probe(probed, student, tmp_path, capfd):
    """It is the first probe's: the second of two probes is the one that --seed 1 trains."""
    tasks = ("--task", "synthetic-motion", "synthetic-shape")
    run_script(probe, *QUICK, *SYNTHETIC, *tasks, "--checkpoint", student, "--out", tmp_path, "--seed", 1)
    assert "seed 1 epoch 1/1" in capfd.readouterr().out and results(tmp_path)["args"]["seed"] == 1
    for task, found in results(tmp_path)["tasks"].items():
        assert found["top1_per_seed"] == results(probed)["tasks"][task]["top1_per_seed"][1:]


def test_seeds_differ_in_initialization_and_order(student, tmp_path, monkeypatch):
    """With three probes from --seed 5 on: 5, 6 and 7."""
    firsts = []

    def watched(args, stacks, tokens, order, *rest):
        firsts.append((stacks[0][0].part("linear.weight").clone(), order))
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
    """Its encoder is the moving average; the student is probed only if asked for."""
    x, states = torch.randn(1, 3, 4, 32, 32), load_checkpoint(ema)
    task = ("--task", "synthetic-shape", "--checkpoint", ema)
    for flags, part in (((), "encoder"), (("--weights", "encoder"), "encoder"), (("--weights", "student"), "student")):
        encoder = Encoder(**states["model"]["encoder"])
        encoder.load_state_dict(states[part])
        loaded = features.load(probe_args(*task, *flags))
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
def test_single_frame(single, teacher):
    """The encoder then sees the middle frame only, at all times."""
    args = probe_args(*QUICK, "--task", "synthetic-shape", "--num-frames", 6, "--resolution", 16,
                      *["--single-frame"] * single)  # fmt: skip
    encoder, seen = load_encoder(teacher), []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    probe.sources(args, encoder)
    source = data.Synthetic(6, 16, length=20)
    parts = features.Tokens(args, encoder, source, features.Stopwatch()).read([torch.arange(16), torch.arange(16, 20)])
    assert [len(ids) for ids, _, _ in itertools.chain(*parts)] == [16, 4]
    clips, expected = torch.cat(seen), data.normalize(source.batch(range(20)).clips, "cpu")
    if single:
        expected = expected[:, :, 3:4].expand(-1, -1, 6, -1, -1)
    torch.testing.assert_close(clips, expected)


def tokens_of(source_args, encoder, source):
    tokens = features.Tokens(source_args, encoder, source, features.Stopwatch())
    ((ids, x, labels),) = next(iter(tokens.read([torch.arange(len(source))])))
    return x, labels


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """25 fps, 80 numbered frames of 32 x 96 whose left, middle and right thirds are darker, as numbered, brighter."""
    folder = tmp_path_factory.mktemp("long")
    wide = [np.concatenate([numbered(n), flat(100), flat(200)], axis=1) for n in range(80)]
    write_video(folder / "a.mp4", wide)
    (folder / "list.csv").write_text("a.mp4 1\n")
    return folder / "list.csv"


def test_segments_and_views(long_video, teacher):
    """Clips in the middle of their share of the length, crops from left to right; segments' tokens joined per view."""
    own_task = ("--train-data", long_video, "--val-data", long_video, "--num-classes", 2)
    args = probe_args(*QUICK, *own_task, "--segments", 4, "--views", 3, "--frame-step", 1, "--checkpoint", teacher)
    encoder = load_encoder(teacher)
    train, val, _ = probe.sources(args, encoder)
    views = val.batch([0]).clips[0]
    assert views.shape == (3, 4, 3, 4, 32, 32)
    room = 80 - 4
    for segment, clip in enumerate(views[0]):
        first = round((segment + 0.5) / 4 * room)
        assert frame_numbers(clip.transpose(0, 1))[0] in (first - 1, first, first + 1)
    assert (views[1].float() - 100).abs().mean() < 6 and (views[2].float() - 200).abs().mean() < 6
    x, labels = tokens_of(args, encoder, val)
    clips = data.normalize(views.flatten(0, 1), "cpu")
    torch.testing.assert_close(x[0], encoder(clips).unflatten(0, (3, 4)).flatten(1, 2))
    assert labels.tolist() == [[1]]

    views = torch.stack([train.batch([n]).clips[0] for n in range(12)])  # one view of each video
    assert views.shape == (12, 1, 4, 3, 4, 32, 32)
    assert len({view.numpy().tobytes() for view in views}) == 12
    places = [(n + u) / 4 for n in range(4) for u in (0, 1)]  # each segment within its share
    for n in range(6):
        rng = np.random.default_rng((0, n, 1))
        shares = rng.random(4)
        assert all(low <= (s + u) / 4 <= high for s, u, low, high in zip(range(4), shares, places[::2], places[1::2]))  # noqa: B905


def test_one_crop_and_flip_for_all_segments_of_a_training_video(tmp_path, teacher):
    """In a video that stands still all clips of a training sample are the same, and others in the next sample."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    write_video(tmp_path / "still.mp4", [ramp] * 40)
    (tmp_path / "list.csv").write_text("still.mp4 0\n")
    own_task = ("--train-data", tmp_path / "list.csv", "--val-data", tmp_path / "list.csv", "--num-classes", 2)
    args = probe_args(*QUICK, *own_task, "--segments", 3, "--frame-step", 2, "--checkpoint", teacher)
    train, _, _ = probe.sources(args, load_encoder(teacher))
    samples = torch.stack([train.batch([n]).clips[0, 0] for n in range(10)]).float()
    assert (samples[:, :1] - samples).abs().mean() < 1 and (samples[0] - samples[1]).abs().mean() > 3
    rises = (samples[..., -1] - samples[..., 0]).mean((1, 2, 3, 4)) > 0
    assert 0 < rises.sum() < 10  # some are flipped


@pytest.mark.parametrize("combine", ["mean", "concat"])
def test_layers(combine, teacher):
    """Chosen blocks' outputs, each through the encoder's norm."""
    encoder = randomize(Encoder(16, 3, 2, num_frames=4, resolution=16, patch_size=8))
    args = probe_args("--task", "synthetic-shape", "--layers", 1, 3, "--combine", combine)
    train, _, _ = probe.sources(args, encoder)
    clips, x, states = data.normalize(train.batch([0, 1]).clips, "cpu"), None, []
    for depth in (1, 2, 3):
        shallow = Encoder(16, depth, 2, num_frames=4, resolution=16, patch_size=8)
        shallow.load_state_dict({k: encoder.state_dict()[k] for k in shallow.state_dict()})
        states.append(shallow(clips))
    expected = torch.cat(states[::2], -1) if combine == "concat" else (states[0] + states[2]) / 2
    tokens = features.Tokens(args, encoder, train, features.Stopwatch())
    x = tokens.encode(train.batch([0, 1]).clips)
    torch.testing.assert_close(x[:, 0], expected)
    assert tokens.shape == expected.shape[1:]


@pytest.mark.parametrize("depth", [1, 2])
def test_bfloat16_means_bfloat16(depth, teacher, tmp_path):
    """Every matmul of encoder and probes, forward and backward, but for the CPU's attention (`model.attend`).

    The probes' weights stay float32.
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
    encoder = features.load(args)
    train, _, _ = probe.sources(args, encoder)
    tokens = features.Tokens(args, encoder, train, features.Stopwatch())
    stacks = probe.make_probes(args, tokens.shape[1], 6, 0)
    batch = train.batch(range(24))
    with Watch():
        source = Fixed(args, tokens.encode(batch.clips), batch.labels)
        for _ in probe.train_probes(args, stacks, source, 1, 0, None, tmp_path / "resume.pt", ""):
            pass
    assert (
        source.x.dtype == torch.bfloat16
        and {"bmm", "baddbmm"} <= seen.keys()
        and all(dtypes == {torch.bfloat16} for dtypes in seen.values())
    ), seen
    assert {p.dtype for stack, _ in stacks for p in stack.parameters()} == {torch.float32}


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
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--task", "jester"]
    assert "--task jester needs data/jester/train.csv" in refusal(capfd, probe, *flags)
    (tmp_path / "data" / "jester").mkdir(parents=True)
    for name in ("train", "val"):
        lines = (dark_or_bright / f"{name}.csv").read_text().splitlines()
        text = "".join(f"{dark_or_bright}/{line}\n" for line in lines)
        (tmp_path / "data" / "jester" / f"{name}.csv").write_text(text)
    run_script(probe, *flags)
    assert results(tmp_path / "out")["tasks"]["jester"]["chance"] == pytest.approx(100 / 27)


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


def test_skip_bad_counts_a_miss(dark_or_bright, teacher, tmp_path, capfd):
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    (folder / "20.mp4").write_bytes(b"")
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--epochs", 8, "--lr", "3e-3", "--standardize"]
    run_script(probe, *flags, *own(folder), "--skip-bad")
    found = results(tmp_path / "out")["tasks"]["own"]
    assert found["num_val"] == 8 and found["unreadable"] == 1 and found["top1"] == 87.5
    assert found["per_class"] == [75, 100]
    said = capfd.readouterr()
    assert "20.mp4" in said.err and "1 unreadable count as missed" in said.out


def test_cache(dark_or_bright, teacher, tmp_path, monkeypatch):
    """Features are computed once; another checkpoint, other clips, a changed video: computed anew."""
    folder, encoded = shutil.copytree(dark_or_bright, tmp_path / "data"), []
    encode = features.Tokens.encode
    monkeypatch.setattr(
        features.Tokens, "encode", lambda self, clips: encoded.append(len(clips)) or encode(self, clips)
    )
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--no-augment"]

    def run(*more):
        encoded.clear()
        run_script(probe, *flags, *own(folder), *more)
        return sum(encoded), results(tmp_path / "out")["tasks"]["own"]

    first, second = run(), run()
    assert (first[0], second[0]) == (24, 0) and first[1] == second[1]
    assert run("--lr", "1e-2")[0] == 0 and run("--untrained")[0] == 24 and run("--frame-step", 1)[0] == 24
    (folder / "val.csv").write_text("".join((folder / "val.csv").read_text().splitlines(keepends=True)[::-1]))
    assert run()[0] == 8
    write_video(folder / "1.mp4", [flat(0, 40)] * 10)
    assert run()[0] == 16 and run()[0] == 0
    for file in (tmp_path / "cache").glob("*.features"):
        os.truncate(file, 10)  # a full disk, a stopped copy
    assert run()[0] == 24 and run()[0] == 0


def test_knn(dark_or_bright, teacher, tmp_path):
    run_script(probe, *QUICK, "--checkpoint", teacher, "--out", tmp_path, "--knn", 3, *own(dark_or_bright))
    found = results(tmp_path)["tasks"]["own"]
    assert found["top1"] == 100 and found["best"] == [{"k": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["--augment", "--no-augment"])
def test_three_processes_seven_videos(augment, dark_or_bright, teacher, tmp_path, capfd):
    """Every validation video counts once, though 3 does not divide 7, and the probes are those of one process."""
    lines = (dark_or_bright / "val.csv").read_text().splitlines()[:7]
    (tmp_path / "val.csv").write_text("".join(f"{dark_or_bright}/{line}\n" for line in lines))
    flags = [*QUICK, "--checkpoint", teacher, *own(dark_or_bright, val=tmp_path / "val.csv"), "--probe-depth", "1",
             "--lr", "3e-3", "1e-3", "--epochs", "4", "--batch-size", "5", "--standardize", augment]  # fmt: skip
    capfd.readouterr()
    run_script(probe, *flags, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", probe.__file__]
    done = subprocess.run(
        [*command, *map(str, flags), "--out", str(tmp_path / "three")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, three = (results(tmp_path / name)["tasks"]["own"] for name in ("one", "three"))
    assert one == three and one["num_val"] == 7
    losses = [re.findall(r"step 4/4  loss ([0-9.]+)", text) for text in (capfd.readouterr().out, done.stdout)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert (tmp_path / "three" / "confusion-own.png").stat().st_size > 1000


@pytest.mark.parametrize("task, protocol", [
    ("k400", (400, 16, 4, 8, 3, 256, 20)), ("ssv2", (174, 16, 4, 2, 3, 256, 20)), ("coin", (180, 16, 4, 8, 3, 256, 1)),
    ("diving48", (48, 16, 2, 4, 3, 128, 1)), ("jester", (27, 16, 2, 4, 3, 128, 1)),
    ("imagenet1k", (1000, 16, 4, 1, 3, 1024, 1)), ("k400 --fast", (400, 16, 4, 1, 1, 256, 1)),
    ("ssv2 --fast", (174, 16, 4, 1, 1, 256, 1)),
    ("jester --views 2 --lr 1 2 --weight-decay 3", (27, 16, 2, 4, 2, 128, 2)),
])  # fmt: skip
def test_protocols(task, protocol):
    args = probe_args("--task", *task.split())
    found = args.num_classes, args.num_frames, args.frame_step, args.segments, args.views, args.batch_size
    assert (*found, len(args.lr) * len(args.weight_decay)) == protocol


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
        ("--task synthetic-shape --probe-heads 3 --probe-depth 1", "--probe-heads: "),
        ("--task synthetic-shape --untrained --weights student", "--weights student"),
        ("--task synthetic-shape --views 3", "--views"),
        ("--task synthetic-shape --layers 0", "--layers"),
        ("--task synthetic-shape --layers 1 2", "--layers"),
        ("--task synthetic-shape --knn 0", "--knn 0"),
        ("--task synthetic-shape --knn 25", "24 training videos"),
        ("--task synthetic-shape --cache DIR/train.csv/x", "--cache DIR/train.csv/x"),
        ("--task k400 --cache x", "--cache is for"),
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
    says = says.replace("DIR", str(dark_or_bright))
    assert says in refusal(capfd, probe, *QUICK, *SYNTHETIC, "--checkpoint", teacher, "--out", tmp_path, *flags)


def test_probe_of_a_students_student(student, tmp_path):
    """Stage 2 after stage 2, then probed: what a run leaves, the next script reads."""
    run_script(train_student, *TINY, "--teacher", student, "--out", tmp_path / "next")
    run_script(probe, *QUICK, *SYNTHETIC, "--task", "synthetic-motion", "--checkpoint", tmp_path / "next",
               "--out", tmp_path / "probe")  # fmt: skip
    assert results(tmp_path / "probe")["tasks"]["synthetic-motion"]["num_val"] == 20


@pytest.mark.parametrize("flip", [True, False])
def test_training_videos_are_mirrored_unless_labels_tell_left_from_right(flip, tmp_path):
    """A video whose left half is dark: how often it is on the right, in 40 samples."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 255
    write_image(image, tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("a.png 0\n")
    args = argparse.Namespace(num_frames=2, frame_step=1, resolution=32, num_classes=2, fps=None, segments=1, views=1,
                              skip_bad=False, flip=flip)  # fmt: skip
    clips = features.Videos([tmp_path / "m.csv"], args, train=True).batch(range(40)).clips[:, 0, 0, 0, 0].float()
    mirrored = (clips[..., :16].mean((1, 2)) > clips[..., 16:].mean((1, 2))).sum()
    assert 8 < mirrored < 32 if flip else mirrored == 0
    assert not probe.PROTOCOLS["ssv2"].flip and not probe.PROTOCOLS["jester"].flip and probe.PROTOCOLS["k400"].flip
