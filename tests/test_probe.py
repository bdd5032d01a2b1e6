"""A probe learns what is in the tokens and nothing else; the script trains, resumes and reports as it says."""

import argparse
import collections
import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    flat,
    frame_numbers,
    numbered,
    randomize,
    refusal,
    run_script,
    same_tensors,
    write_image,
    write_video,
)
from torch.utils._python_dispatch import TorchDispatchMode

import data
import probe
from cli import interval95
from model import init_std, load_checkpoint, load_encoder
from probe import AttentiveProbe
from training import generator

QUICK = shlex.split("--epochs 1 --batch-size 16 --probe-heads 2 --probe-depth 2 --workers 0 --device cpu")
SYNTHETIC = shlex.split("--train-clips 24 --val-clips 20")
TASK = probe.Task("own", 1, 4)


def norm(x, layer):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * layer.weight + layer.bias


@torch.no_grad()
def test_probe_pools_without_output_projection():
    """A probe of depth 1, the cross-attention block and the linear layer, by hand with two heads of 8 channels."""
    network = randomize(AttentiveProbe(16, 5, depth=1, heads=2))
    tokens, c = torch.randn(3, 7, 16) * 1e-2, network.cross  # small, so that a wrong eps (1e-6) would show
    query, normed = network.query[0, 0], norm(tokens, c.norm1)
    q = c.q.weight @ query + c.q.bias
    k, v = (normed @ c.kv.weight[part].T + c.kv.bias[part] for part in (slice(0, 16), slice(16, 32)))
    heads = []
    for channels in (slice(0, 8), slice(8, 16)):
        attention = (k[..., channels] @ q[channels] / math.sqrt(8)).softmax(-1)  # (B, N)
        heads.append((attention[..., None] * v[..., channels]).sum(1))
    x = query + torch.cat(heads, dim=-1)
    x = x + F.gelu(norm(x, c.norm2) @ c.mlp.fc1.weight.T + c.mlp.fc1.bias) @ c.mlp.fc2.weight.T + c.mlp.fc2.bias
    expected = x @ network.linear.weight.T + network.linear.bias
    torch.testing.assert_close(network(tokens), expected, atol=1e-5, rtol=1e-5)


def test_shape_initial_weights_and_gradients_of_the_probe():
    torch.manual_seed(0)
    network, tokens, std = AttentiveProbe(128, 7, depth=3, heads=4), torch.randn(2, 9, 128), init_std(128)
    assert len(network.blocks) == 2 and network(tokens).shape == (2, 7)
    torch.testing.assert_close(network(tokens.flip(1)), network(tokens), atol=1e-5, rtol=1e-5)  # no positions
    for weight, expected in ((network.cross.kv.weight, std), (network.blocks[1].attn.proj.weight, std / 2),
                             (network.cross.mlp.fc2.weight, std / math.sqrt(4))):  # fmt: skip
        assert weight.std().item() == pytest.approx(expected, rel=0.05)  # V-JEPA 2 counts blocks from depth - 1
    assert network.query.abs().max() > 0
    randomize(network)(tokens).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in network.parameters())


@pytest.fixture(scope="module")
def clip():
    return torch.randint(0, 256, (4, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crops():
    """Areas of 8% to 100% of the frame, aspect ratios of 3/4 to 4/3, anywhere in the frame."""
    boxes = torch.tensor([probe.random_crop((0, number, 0), 200, 240) for number in range(1000)]).double()
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 200).all() and (left + w <= 240).all()
    area, aspect = h * w / (200 * 240), w / h
    assert 0.075 < area.min() < 0.1 and 0.9 < area.max() <= 1 and 0.4 < area.mean() < 0.55
    assert 0.73 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.36


def test_operations(clip, monkeypatch):
    """Four operations, each with probability 1/2; timm's at magnitude 7 of 10 ("inc1"), as far as torchvision has."""
    used, counts, randaugment = [], [], probe.RANDAUGMENT
    monkeypatch.setattr(probe, "RANDAUGMENT", lambda clip: used.append(1) or clip)
    for number in range(1000):
        used.clear()
        probe.augment((0, number, 0), clip)
        counts.append(len(used))
    shares = torch.bincount(torch.tensor(counts)) / 1000
    torch.testing.assert_close(shares, torch.tensor([1.0, 4, 6, 4, 1]) / 16, atol=0.05, rtol=0)
    values = {name: magnitudes(randaugment.num_magnitude_bins, 100, 100)
              for name, (magnitudes, _) in randaugment._AUGMENTATION_SPACE.items()}  # fmt: skip
    values = {name: float(value[randaugment.magnitude]) for name, value in values.items() if value is not None}
    shift = {"ShearX": 0.21, "ShearY": 0.21, "Rotate": 21, "TranslateX": 0.7 * 45.3, "TranslateY": 0.7 * 45.3}
    enhance = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.63)
    assert values == pytest.approx({**enhance, **shift, "Posterize": 5, "Solarize": 0.3}, rel=1e-3)


def test_random_erasing(clip, monkeypatch):
    """One clip in four gets a box of 2% to 33% of its area in ImageNet's mean color, the same in all frames."""
    monkeypatch.setattr(probe, "RANDAUGMENT", lambda clip: clip)
    bright, shares = torch.full_like(clip, 255), []
    for number in range(400):
        out = probe.augment((0, number, 0), bright)
        erased = (out != bright).any(1)
        assert torch.equal(erased, erased[:1].expand_as(erased))
        if erased.any():
            pixels = data.normalize(out.transpose(0, 1)[None], "cpu")[0].transpose(0, 1).movedim(1, -1)[erased]
            assert pixels.abs().max() < 0.01
            shares.append(erased[0].float().mean())
    assert 70 <= len(shares) <= 130 and (bright == 255).all()  # not in place
    assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.36


def make_args(**changes):
    """The flags that sources, features and probes use."""
    common = dict(
        checkpoint=None, weights="encoder", untrained=False, seed=0, num_frames=4, frame_step=1, resolution=32,
        fps=None, num_classes=2, segments=1, views=1, augment="none", single_frame=False, workers=0, device="cpu",
        dtype="float32", lr=[1e-3], weight_decay=[0.01], batch_size=32, epochs=3, probe_depth=2, probe_heads=2,
    )  # fmt: skip
    return argparse.Namespace(**{**common, **changes})


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """25 fps, 80 frames of 32 x 96: the left third carries the frame number, the middle is gray, the right bright."""
    folder = tmp_path_factory.mktemp("long")
    wide = [np.concatenate([numbered(n), flat(100), flat(200)], axis=1) for n in range(80)]
    write_video(folder / "a.mp4", wide)
    (folder / "list.csv").write_text("a.mp4 1\n")
    return [folder / "list.csv"]


def test_segments_and_views(long_video, teacher):
    """Middle clips of each share of the length, crops from left to right; a view joins its segments' tokens."""
    args, encoder = make_args(segments=4, views=3), load_encoder(teacher)
    val = probe.Videos(long_video, args, train=False)
    views = val.batch([0]).clips[0]
    assert views.shape == (3, 4, 3, 4, 32, 32)
    for segment, clip in enumerate(views[0]):
        first = round((segment + 0.5) / 4 * (80 - 4))
        assert frame_numbers(clip.transpose(0, 1))[0] in (first - 1, first, first + 1)
    assert (views[1].float() - 100).abs().mean() < 6 and (views[2].float() - 200).abs().mean() < 6
    ((numbers, tokens, labels),) = probe.Features(args, encoder, val).read([torch.arange(1)])
    clips = data.normalize(views.flatten(0, 1), "cpu")
    torch.testing.assert_close(tokens[0], encoder(clips).unflatten(0, (3, 4)).flatten(1, 2))
    assert numbers.tolist() == [0] and labels.tolist() == [[1]]
    train = probe.Videos(long_video, args, train=True)  # without augmentation, only the middle one of the views
    assert train.views == 1 and torch.equal(train.batch([0]).clips[0], views[1:2])


def test_a_single_view_is_seven_eighths_of_the_short_side(tmp_path):
    """V-JEPA 2 scales the short side to 256 and takes the center 224 x 224. Three views take the whole short side."""
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 4:60, 20:76] = 255
    write_image(image, tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("a.png 0\n")
    sources = (probe.Videos([tmp_path / "m.csv"], make_args(views=views), train=False) for views in (1, 3))
    one, three = (source.batch([0]).clips[0] for source in sources)
    assert (one > 240).all()
    middle = three[1].float()
    assert middle[..., 16, 16].min() > 240 and max(middle[..., 0, :].max(), middle[..., 0].max()) < 130


def test_segments_are_augmented_and_placed_each_by_itself(long_video, monkeypatch):
    """Position, crop and RandAugment of each clip depend on its sample number and segment, not on the batch.

    Neither do they use torch's global generator, nor change its state.
    """
    read, places = probe.video.read_clips, []
    monkeypatch.setattr(probe.video, "read_clips", lambda *args: places.append(args[3]) or read(*args))
    train = probe.Videos(long_video, make_args(segments=3, augment="vjepa2"), train=True)
    clips = train.batch(range(6)).clips
    assert len({clip.numpy().tobytes() for clip in clips.flatten(0, 2)}) >= 15  # some crops are flat
    for n, found in enumerate(places):
        offsets = np.random.default_rng(data.seed_sequence("segment", 0, n)).random(3)
        assert found == pytest.approx((np.arange(3) + offsets) / 3)
    state = torch.manual_seed(5).get_state()
    assert torch.equal(train.batch([5, 2]).clips, clips[[5, 2]]) and torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(probe, "augment", lambda key, clip: clip)
    assert not torch.equal(train.batch(range(6)).clips, clips)


def test_training_and_validation_clips_differ(teacher):
    """And no training run sees any of them."""
    args = probe_args("--task", "synthetic-shape", "--checkpoint", teacher)
    train, val, tasks = probe.open_task(args, load_encoder(teacher))
    assert (len(train), len(val), tasks) == (4000, 1000, [("synthetic-shape", 1, 6)])
    numbers = list(range(30))
    sets = [source.batch(numbers).clips for source in (train, val, data.Synthetic(4, 32, 0), data.Synthetic(4, 32, 1))]
    assert len({clip.numpy().tobytes() for clips in sets for clip in clips}) == 120


def test_untrained_encoder(teacher):
    """Its weights depend on --seed only."""
    trained = probe.open_encoder(make_args(checkpoint=teacher))[0]
    encoders = [probe.open_encoder(make_args(checkpoint=teacher, untrained=True, seed=s))[0] for s in (0, 0, 1)]
    x = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(trained(x), load_encoder(teacher)(x)) and torch.equal(encoders[0](x), encoders[1](x))
    for a, b in ((trained, encoders[0]), (encoders[1], encoders[2])):
        assert not torch.allclose(a(x), b(x), atol=1e-3)
    assert not any(e.training or any(p.requires_grad for p in e.parameters()) for e in (trained, encoders[0]))


def test_weights_of_an_ema_run(ema, tmp_path, capfd):
    """Its encoder is the EMA teacher; its student is probed only on request, and named."""
    checkpoint = load_checkpoint(ema)
    for weights in ("encoder", "student"):
        loaded, step = probe.open_encoder(make_args(checkpoint=ema, weights=weights))
        assert same_tensors(loaded.state_dict(), checkpoint[weights]) and step == 6
    flags = (*SYNTHETIC, "--task", "synthetic-shape", "--checkpoint", ema, "--weights", "student", "--out", tmp_path)
    run_script(probe, *QUICK, *flags)
    assert results(tmp_path)["weights"] == "student" and results(tmp_path)["checkpoint"] == str(ema)
    assert f"{ema} (student) synthetic-shape: top-1" in capfd.readouterr().out


def test_single_frame(teacher):
    """With --single-frame, the encoder sees only the middle frame, at all times."""
    args = make_args(num_frames=6, resolution=16, single_frame=True)
    encoder, seen, source = load_encoder(teacher), [], probe.BuiltInVideos(6, 16, length=20)
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    read = list(probe.Features(args, encoder, source).read([torch.arange(16), torch.arange(16, 20)]))
    assert [len(numbers) for numbers, _, _ in read] == [16, 4]
    clips = data.normalize(source.batch(range(20)).clips[:, 0, 0], "cpu")
    torch.testing.assert_close(torch.cat(seen), clips[:, :, 3:4].expand(-1, -1, 6, -1, -1))


def test_wide_encoders_get_fewer_tokens_at_once(teacher):
    encoder, source = load_encoder(teacher), probe.BuiltInVideos(4, 32, length=10)
    assert probe.Features(make_args(), encoder, source).videos_at_once == 3125
    encoder.width = 2048
    assert probe.Features(make_args(), encoder, source).videos_at_once == 1562


class FixedFeatures(probe.Features):
    """Made-up tokens (M, N, D) or (M, V, N, D) with labels (M, L) in place of an encoder's."""

    def __init__(self, args, tokens, labels, videos_at_once=1000):
        self.args, self.source, self.scale, self.videos_at_once = args, FixedSource(tokens), None, videos_at_once
        self.kept = tokens if tokens.dim() == 4 else tokens[:, None], labels
        self.shape, self.dtype = self.kept[0].shape[1:], torch.float32


class FixedSource(list):
    train = False


def test_standardize():
    """With the moments as its scale, `read` yields tokens of zero mean and unit variance; unreadable ones apart."""
    tokens, labels = torch.randn(40, 3, 8) * 3 + 5, torch.zeros(40, 1, dtype=torch.long)
    tokens[7], labels[7] = 1000, -1
    features, readable = FixedFeatures(make_args(), tokens, labels), torch.arange(40) != 7
    features.scale = probe.moments(features, torch.arange(40))
    ((_, scaled, _),) = features.read([torch.arange(40)])
    scaled = scaled[readable].flatten(0, 2)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(8), atol=1e-3, rtol=0)


def learn(args, tokens, labels, folder, seed=0, **options):
    """The probes after training on made-up tokens, for the second of the labels."""
    args.out = folder
    probes = probe.make_probes(args, tokens.shape[-1], 4, seed)
    probe.train_probes(args, probes, FixedFeatures(args, tokens, labels, **options), TASK, seed, "key")
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
    top5, found = probe.predict(args, probes, FixedFeatures(args, tokens[600:], labels[600:]), TASK)
    assert torch.equal(found, labels[600:, 1])
    accuracy = (top5[:, 0, 0] == found).float().mean()
    if separable:
        assert accuracy > 0.98  # random numbers depend on the version of torch
    else:
        assert abs(accuracy - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / 300)


@pytest.mark.parametrize("depth", [1, 3])
def test_probes_of_a_grid_learn_as_if_alone(depth, tmp_path):
    """For all pairs of lr and weight decay: the same as a single probe with torch's AdamW and cosine schedule.

    Batches in several micro-batches; an unreadable video, label -1, trains nothing.
    """
    rng = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(70, 5, 16, generator=rng) * 2 + 1, torch.randint(0, 4, (70, 2), generator=rng)
    labels[3] = -1
    args = make_args(lr=[5e-3, 1e-3], weight_decay=[0.8, 0.1, 0.01], probe_depth=depth, probe_heads=4)
    probes = learn(args, tokens, labels, tmp_path, seed=7, videos_at_once=10)
    settings = [(lr, decay) for lr in args.lr for decay in args.weight_decay]
    assert len(probes) == 6
    for (lr, decay), (trained, _) in zip(settings, probes, strict=True):
        torch.manual_seed(7)
        alone = AttentiveProbe(16, 4, depth, 4)
        optimizer = torch.optim.AdamW(alone.parameters(), lr=lr, weight_decay=decay)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / 9)) / 2)
        for epoch in range(3):
            for ids in torch.randperm(70, generator=generator("probe order", 7, epoch)).split(32):
                readable = ids[ids != 3]
                loss = F.cross_entropy(alone(tokens[readable]), labels[readable, 1]) * len(readable) / len(ids)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                cosine.step()
        for name, weight in alone.named_parameters():
            if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding errors, which Adam amplifies
                torch.testing.assert_close(trained.get_parameter(name), weight, atol=2e-4, rtol=0)
        torch.testing.assert_close(trained(tokens), alone(tokens), atol=1e-3, rtol=0)


def test_views_are_averaged_as_probabilities():
    """One view is certain of class 0, two are fairly sure of 1: mean logits say 0, mean probabilities say 1."""
    views = torch.tensor([[12.0, 0, 0], [0, 2, 0], [0, 2, 0]])
    features = FixedFeatures(make_args(), views[None, :, None], torch.zeros(1, 1, dtype=torch.long))
    top5, labels = probe.predict(make_args(), [(lambda x: x[:, 0], None)], features, probe.Task("own", 0, 3))
    assert top5[0, 0].tolist() == [1, 0, 2] and labels.tolist() == [0]


def test_summary():
    """Two seeds of two probes on five videos of three classes: each seed's best probe counts. One is unreadable."""
    right = torch.tensor([[[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]])  # (seeds, P, M)
    labels = torch.tensor([0, 1, 1, 0, -1])
    top = torch.where(right == 1, labels, 2)[..., None].transpose(1, 2)  # (seeds, M, P, 1)
    one = probe.summarize(make_args(lr=[1e-2, 1e-3]), [(seed, labels) for seed in top], 3)
    assert one["top1_per_seed"] == pytest.approx([60, 40]) and one["top1"] == 50 and one["median"] == 35
    assert [setting["lr"] for setting in one["best"]] == [1e-2, 1e-3] and one["top5"] is None
    assert [p["top1"] for p in one["probes"]] == pytest.approx([40, 30]) and one["probes"][1]["lr"] == 1e-3
    assert one["interval95"] == pytest.approx(interval95(2.5, 5)) and one["chance"] == pytest.approx(100 / 3)
    assert one["num_val"] == 5 and one["unreadable"] == 1 and one["correct"] == ["11100", "11000"]  # of the best probes
    assert "1 unreadable counted as misses" in probe.describe(one)


def test_bfloat16_means_bfloat16(teacher, tmp_path):
    """All matmuls of encoder and probes, forward and backward, except attention on the CPU (`model.attend`).

    The probes' weights stay float32.
    """
    seen = collections.defaultdict(set)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, inputs=(), kwargs=None):
            seen[function.overloadpacket.__name__] |= {x.dtype for x in inputs[:3] if isinstance(x, torch.Tensor)}
            return function(*inputs, **(kwargs or {}))

    args = probe_args(*QUICK, *SYNTHETIC, "--task", "synthetic-shape", "--checkpoint", teacher, "--dtype", "bfloat16",
                      "--out", tmp_path)  # fmt: skip
    encoder, _ = probe.open_encoder(args)
    train, _, tasks = probe.open_task(args, encoder)
    batch, probes = train.batch(range(24)), probe.make_probes(args, encoder.width, 6, 0)
    with Watch():
        tokens = probe.Features(args, encoder, train).encode(batch.clips)
        probe.train_probes(args, probes, FixedFeatures(args, tokens, batch.labels), tasks[0], 0, "")
    matmuls = [seen[name] for name in ("mm", "bmm", "addmm", "baddbmm") if name in seen]
    assert tokens.dtype == torch.bfloat16 and len(matmuls) >= 2 and set().union(*matmuls) == {torch.bfloat16}
    assert {p.dtype for network, _ in probes for p in network.parameters()} == {torch.float32}


def results(out):
    return json.loads((out / "results.json").read_text())


def probe_args(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["probe.py", *map(str, flags)])
        return probe.parse_args()


def test_synthetic_tasks_and_seeds(student, tmp_path):
    """--seed is the first repetition's: the second of two repetitions is the one that --seed 1 trains."""
    flags = (*QUICK, *SYNTHETIC, "--task", "synthetic-motion", "synthetic-shape", "--checkpoint", student)
    run_script(probe, *flags, "--out", tmp_path / "two", "--seeds", 2)
    run_script(probe, *flags, "--out", tmp_path / "one", "--seed", 1)
    record, one = results(tmp_path / "two"), results(tmp_path / "one")
    assert record["checkpoint"] == str(student) and record["weights"] == "encoder" and record["step"] == 6
    assert record["args"]["epochs"] == 1 and record["args"]["train_clips"] == 24
    for name, classes in (("synthetic-motion", 8), ("synthetic-shape", 6)):
        found, (first, second) = record["tasks"][name], record["tasks"][name]["top1_per_seed"]
        assert one["tasks"][name]["top1_per_seed"] == [second] and one["tasks"][name]["spread"] is None
        assert found["num_val"] == 20 and found["chance"] == pytest.approx(100 / classes)
        assert found["top1"] == pytest.approx((first + second) / 2)
        assert found["spread"] == pytest.approx(torch.tensor([first, second]).std().item())


@pytest.fixture(scope="module")
def dark_or_bright(tmp_path_factory):
    """A folder of videos and images, class 0 dark and class 1 bright, with train.csv and val.csv."""
    folder, lines = tmp_path_factory.mktemp("brightness"), []
    for n in range(24):
        value = 40 + n if n % 2 == 0 else 200 + n
        lines.append(f"{n}.{'mp4' if n % 3 else 'png'} {n % 2}\n")
        if n % 3:
            write_video(folder / f"{n}.mp4", [flat(value, 40)] * 10)
        else:
            write_image(torch.full((3, 40, 40), value, dtype=torch.uint8), str(folder / f"{n}.png"))
    (folder / "train.csv").write_text("".join(lines[:16]))
    (folder / "val.csv").write_text("".join(lines[16:]))
    return folder


def own_task(folder):
    return "--train-data", folder / "train.csv", "--val-data", folder / "val.csv", "--num-classes", 2


@pytest.mark.parametrize("workers", [0, 1])
def test_own_task_with_unreadable_videos(workers, dark_or_bright, teacher, tmp_path, capfd):
    """They are named; a training video is replaced by another one, a validation video counts as a miss."""
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    for name in ("3.png", "20.mp4"):
        (folder / name).write_bytes(b"")
    flags = [*QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", "--epochs", 8, "--lr", "3e-3", "--standardize"]
    run_script(probe, *flags, *own_task(folder), "--workers", workers)
    found, said = results(tmp_path / "out")["tasks"]["data"], capfd.readouterr()
    assert found["num_val"] == 8 and found["unreadable"] == 1 and found["top1"] == 87.5 and found["chance"] == 50
    assert "3.png: " in said.err and "20.mp4: " in said.err and "1 unreadable counted as misses" in said.out


@pytest.mark.parametrize("split, message", [("train", "missing"), ("val", "no validation video can be read")])
def test_only_unreadable_videos(split, message, dark_or_bright, teacher, tmp_path, capfd):
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    (folder / f"{split}.csv").write_text("".join(f"missing{n}.mp4 1\n" for n in range(20)))
    with pytest.raises(SystemExit):
        run_script(probe, *QUICK, "--checkpoint", teacher, "--out", tmp_path / "out", *own_task(folder))
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_named_task(dark_or_bright, teacher, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = [*QUICK, "--checkpoint", teacher, "--out", "out", "--task", "jester"]
    error = refusal(capfd, probe, *flags)
    assert "--task jester needs data/jester/train.csv" in error and "python -m tools.prepare jester --help" in error
    shutil.copytree(dark_or_bright, "data/jester")
    run_script(probe, *flags, "--untrained", "--resolution", 48)
    found = results(tmp_path / "out")
    assert found["weights"] == "untrained" and found["tasks"]["jester"]["chance"] == pytest.approx(100 / 27)


def test_resume_key_identifies_the_run(dark_or_bright, teacher, tmp_path):
    """It changes with flags, weights, labels and step, but not with what a restarted run may change."""
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")

    def key(*more, step_offset=0):
        args = probe_args(*QUICK, "--checkpoint", teacher, *own_task(folder), *more)
        encoder, step = probe.open_encoder(args)
        probe.open_task(args, encoder)
        return probe.resume_key(args, encoder, step + step_offset)

    first = key()
    assert key("--workers", 3, "--out", "x", "--seeds", 2, "--checkpoint", teacher / "checkpoint.pt") == first
    changes = ["--lr 1e-2", "--untrained", "--frame-step 1", "--batch-size 8", "--num-classes 3", "--augment none"]
    changes += ["--standardize", "--dtype bfloat16", "--untrained --seed 1", "--single-frame", "--segments 2"]
    keys = {first, key(step_offset=1), *(key(*change.split()) for change in changes)}
    train = folder / "train.csv"
    train.write_text(train.read_text().replace(" 0", " 1", 1))
    assert len(keys | {key()}) == len(changes) + 3


@pytest.mark.parametrize("same", [True, False])
def test_resumed_script(same, dark_or_bright, teacher, tmp_path, monkeypatch, capfd):
    """A run that died continues after its last epoch, with the same result; with another --lr it starts over."""
    flags = [*QUICK, "--checkpoint", teacher, *own_task(dark_or_bright), "--epochs", 3]
    epoch, predict, weights = probe.train_epoch, probe.predict, []

    def dies_in_the_third_epoch(args, probes, features, column, order, first_step, *others):
        if first_step == 2:
            raise RuntimeError("killed")
        return epoch(args, probes, features, column, order, first_step, *others)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(probe, "train_epoch", dies_in_the_third_epoch)
        run_script(probe, *flags, "--lr", 1e-3, "--out", tmp_path / "resumed")
    monkeypatch.setattr(probe, "predict", lambda *args: weights.append(args[1][0][0]) or predict(*args))
    for name in ("resumed", "uninterrupted"):
        run_script(probe, *flags, "--lr", 1e-3 if same else 2e-3, "--out", tmp_path / name)
    assert ("continuing after epoch 2" in capfd.readouterr().out) == same
    assert torch.equal(weights[0].linear.weight, weights[1].linear.weight)
    assert results(tmp_path / "resumed")["tasks"] == results(tmp_path / "uninterrupted")["tasks"]
    assert not list((tmp_path / "resumed").glob("resume-*.pt"))


def test_features_that_never_change_are_computed_once(dark_or_bright, teacher, tmp_path, monkeypatch):
    """With two segments and three views, too; the probes are the same as without keeping features."""
    flags = [*QUICK, "--checkpoint", teacher, *own_task(dark_or_bright), "--augment", "none", "--epochs", "2",
             "--seeds", "2", "--segments", "2", "--views", "3", "--standardize", "--batch-size", "24"]  # fmt: skip
    encode, encoded = probe.Features.encode, collections.Counter()

    def counted(features, clips):
        encoded[features.source.views] += len(clips)  # one view of training videos, three of validation videos
        return encode(features, clips)

    monkeypatch.setattr(probe.Features, "encode", counted)
    run_script(probe, *flags, "--out", tmp_path / "kept")
    assert encoded == {1: 16, 3: 8}
    monkeypatch.setattr(probe, "KEPT_BYTES", 0)
    run_script(probe, *flags, "--out", tmp_path / "not-kept")
    assert encoded == {1: 16 * (1 + 1 + 2 * 2), 3: 8 * (1 + 2)}  # 1 to standardize, 2 epochs x 2 seeds
    assert results(tmp_path / "kept")["tasks"] == results(tmp_path / "not-kept")["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["vjepa2", "none"])
def test_three_processes_seven_videos(augment, dark_or_bright, teacher, tmp_path, capfd):
    """Every validation video counts once, although 3 does not divide 7; the probes are the same as in one process."""
    folder = shutil.copytree(dark_or_bright, tmp_path / "data")
    (folder / "val.csv").write_text("".join((folder / "val.csv").read_text().splitlines(keepends=True)[:7]))
    own = shlex.split("--probe-depth 1 --lr 3e-3 1e-3 --epochs 4 --batch-size 5 --standardize --augment")
    flags = [str(flag) for flag in (*QUICK, "--checkpoint", teacher, *own_task(folder), *own, augment, "--out")]
    capfd.readouterr()
    run_script(probe, *flags, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", probe.__file__]
    done = subprocess.run([*command, *flags, str(tmp_path / "three")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, three = (results(tmp_path / name)["tasks"]["data"] for name in ("one", "three"))
    assert one == three and one["num_val"] == 7
    losses = [re.findall(r"epoch 4, loss ([0-9.]+)", text) for text in (capfd.readouterr().out, done.stdout)]
    assert losses[0] == losses[1] and len(losses[0]) == 1


@pytest.mark.parametrize("task, protocol", [
    ("k400", (400, 16, 4, 8, 3, 256, 20)), ("ssv2", (174, 16, 4, 2, 3, 256, 20)), ("coin", (180, 16, 4, 8, 3, 256, 1)),
    ("diving48", (48, 16, 2, 4, 3, 128, 1)), ("jester", (27, 16, 2, 4, 3, 128, 1)),
    ("ucf101", (101, 16, 4, 5, 3, 128, 1)), ("hmdb51", (51, 16, 2, 10, 3, 128, 1)),
    ("imagenet1k", (1000, 16, 4, 1, 3, 1024, 1)), ("k400 --fast", (400, 16, 4, 1, 1, 256, 1)),
    ("jester --views 2 --lr 1 2 --weight-decay 3", (27, 16, 2, 4, 2, 128, 2)),
])  # fmt: skip
def test_protocols(task, protocol):
    args = probe_args("--task", *task.split())
    found = args.num_classes, args.num_frames, args.frame_step, args.segments, args.views, args.batch_size
    assert (*found, len(args.lr) * len(args.weight_decay)) == protocol and args.augment == "vjepa2"


WRONG = {
    "": "give --task",
    "--task synthetic-shape --num-classes 5": "give --task",
    "--task k400 synthetic-shape": "give --task",
    "--task imagenet": "imagenet",
    "--num-classes 2": "needed together",
    "--train-data DIR/train.csv --val-data DIR/val.csv --num-classes 1": "train.csv line 2: a label from 0 to 0",
    "--train-data DIR/train.csv --val-data DIR/nowhere.csv --num-classes 2": "nowhere.csv",
} | {f"--task synthetic-shape {flags}": message for flags, message in {
    "--checkpoint nowhere": "no checkpoint at nowhere", "--checkpoint HF": "python -m tools.convert from-hf",
    "--checkpoint STUDENT --weights student": "holds no student", "--untrained --weights student": "--weights student",
    "--probe-heads 3": "--probe-heads: ", "--probe-heads 3 --probe-depth 1": "--probe-heads: ", "--views 3": "--views",
    "--augment vjepa2": "--augment", "--resolution 30": "30x30", "--num-frames 3": "3 frames",
    "--epochs 0": "--epochs", "--seed -1": "--seed", "--out DIR/train.csv/x": "--out ",
}.items()}  # fmt: skip


@pytest.mark.parametrize("flags, message", WRONG.items())
def test_wrong_flags_end_in_one_line(flags, message, dark_or_bright, student, teacher, tmp_path, capfd):
    (tmp_path / "config.json").write_text("{}")  # like a Hugging Face folder
    flags = flags.replace("DIR", str(dark_or_bright)).replace("STUDENT", str(student)).replace("HF", str(tmp_path))
    flags = [*QUICK, *SYNTHETIC, "--checkpoint", teacher, "--out", tmp_path / "out", *flags.split()]
    assert message in refusal(capfd, probe, *flags)
