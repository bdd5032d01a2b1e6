"""tools/analyze.py against costs, correlations and pictures computed by hand."""

import argparse
import json
import math
import shlex
import shutil
import statistics

import matplotlib.pyplot as plt
import numpy as np
import PIL.ImageSequence
import pytest
import torch
from conftest import TINY, numbered, read_metrics, refusal, run_script, write_video

import data
import probe
import train_student
import train_teacher
from masking import sample_masks
from model import Encoder, load_checkpoint, load_encoder, tubelets, untubelets
from tools import analyze
from training import generator

TASKS = ("synthetic-motion", "synthetic-shape")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def runs(teacher, student):
    """A folder of tiny runs beside the teacher's: a student with another seed, snapshots and students of them."""
    folder = teacher.parent
    run_script(train_student, *TINY, "--width", 48, "--teacher", teacher, "--seed", 1, "--out", folder / "student-1")
    run_script(train_teacher, *TINY, "--snapshot-every", 2, "--out", folder / "snapshots")
    for step in (2, 4, 6):
        snapshot = folder / f"snapshots/checkpoint-{step:06}.pt"
        run_script(train_student, *TINY, "--teacher", snapshot, "--out", folder / f"of-{step}")
    return folder


@pytest.fixture(scope="session")
def record(student, tmp_path_factory):
    """The results.json of a real probe with two seeds."""
    out = tmp_path_factory.mktemp("probe")
    flags = shlex.split(
        "--epochs 1 --batch-size 16 --probe-heads 2 --probe-depth 2 --workers 0 --device cpu --train-clips 24 "
        "--val-clips 20 --seeds 2"
    )
    run_script(probe, *flags, "--checkpoint", student, "--out", out, "--task", *TASKS)
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def probe_of(record, tmp_path):
    """A function that writes a folder like probe.py's for a checkpoint, with made-up accuracies on both tasks."""

    def make(checkpoint, *top1, weights="encoder", folder=None):
        folder = tmp_path / (folder or f"probe-{len(list(tmp_path.iterdir()))}")
        tasks = {task: record["tasks"][task] | {"top1": x, "spread": 9.0} for task, x in zip(TASKS, top1, strict=False)}
        own = {"checkpoint": str(checkpoint), "weights": weights, "step": load_checkpoint(checkpoint)["step"]}
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(record | own | {"tasks": tasks}))
        return folder

    return make


@pytest.fixture
def drawn(monkeypatch):
    """The figures that commands draw, instead of files; no movies."""
    figures = []
    monkeypatch.setattr(analyze, "save", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(analyze, "save_gif", lambda figures, path: None)
    yield figures
    plt.close("all")


def rows_of(path):
    """The rows of a markdown table, as dictionaries."""
    lines = path.read_text().splitlines()
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len({len(line) for line in lines}) == 1 and set("".join(rule)) == {"-"}
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_table(runs, student, teacher, ema, probe_of, tmp_path):
    shutil.copy(student / "checkpoint.pt", tmp_path / "alone.pt")  # without a log beside it
    killed = shutil.copytree(teacher, tmp_path / "killed")  # a killed run may leave half a line
    (killed / "metrics.jsonl").write_text((killed / "metrics.jsonl").read_text() + '{"step": 7, "lo')
    probes = {
        "untrained": probe_of(student, 20.0, 10.0, weights="untrained"),
        "student": probe_of(student, 40.0, 60.5),
        "EMA, online encoder": probe_of(ema, 50.0, weights="student"),
        "EMA": probe_of(ema, 50.0),
        "teacher": probe_of(runs / "snapshots" / "checkpoint-000004.pt", 25.0),
    }
    more = probe_of(tmp_path / "alone.pt", 40.0), probe_of(killed, 30.0)
    run_script(analyze, "table", *probes.values(), *more, "--save", tmp_path / "new" / "t.md")
    rows = rows_of(tmp_path / "new" / "t.md")
    motion, shape = "synthetic-motion, top-1 % (chance 12.5)", "synthetic-shape, top-1 % (chance 16.7)"
    costs = ["loss", "steps", "time", "FLOPs", "incl. teachers"]
    assert list(rows[0]) == ["encoder", motion, shape, *costs]
    assert [row["encoder"] for row in rows] == [*probes, "student", "teacher"]
    assert [row[shape] for row in rows] == ["10.0 ± 9.0", "60.5 ± 9.0", *["-"] * 5]
    assert rows[1][motion] == "40.0 ± 9.0" and [row["steps"] for row in rows] == ["0", *["6"] * 3, "4", "6", "6"]
    for row in (rows[0], rows[5]):
        assert {row[name] for name in costs if name != "steps"} == {"-"}
    lines = [read_metrics(student)[-1], read_metrics(runs / "snapshots")[3], read_metrics(teacher)[-1]]
    for row, line in zip([rows[1], rows[4], rows[6]], lines, strict=True):
        assert (row["loss"], row["FLOPs"]) == (f"{line['loss']:.3f}", f"{line['flops']:.2g}")
    assert rows[6]["incl. teachers"] == rows[6]["FLOPs"]
    assert rows[1]["incl. teachers"] == f"{lines[0]['flops'] + lines[2]['flops']:.2g}"


def test_compare(runs, student, teacher, probe_of, drawn, tmp_path):
    """Every folder below a variant's is one of its runs; encoders are kept apart."""
    probe_of(student, 50, 20, folder="small/seed0/probe-student")
    probe_of(teacher, 60, folder="small/seed0/probe-teacher")
    probe_of(student, 70, folder="large/seed0/probe")
    probe_of(runs / "student-1", 80, folder="large/seed1/probe")
    run_script(analyze, "compare", tmp_path / "small", tmp_path / "large", "--save", tmp_path / "x.png")
    motion, shape = drawn[0].axes
    assert [label.get_text() for label in motion.get_xticklabels()] == ["small", "large"]
    dots = sorted(y for line in motion.get_lines() if line.get_marker() == "." for y in line.get_ydata())
    assert dots == [50, 60, 70, 80]
    found = [[*mean.get_xydata()[0], np.ptp(bar.get_segments()[0][:, 1])] for mean, _, (bar,) in motion.containers]
    assert np.allclose(found, [(-0.05, 60, 0), (0.05, 50, 0), (1, 75, 2 * math.sqrt(50))])  # x, mean, error bar
    assert [container.get_label() for container in motion.containers] == ["teacher", "student", "student"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["teacher", "student"]
    assert [mean.get_ydata().tolist() for mean, *_ in shape.containers] == [[20]]
    rows = [list(row.values()) for row in rows_of(tmp_path / "x.md")]
    assert rows[0][:2] == ["small", "teacher"] and rows[1][:4] == ["small", "student", "1", "50.0 ± 9.0"]
    loss = statistics.mean(read_metrics(run)[-1]["loss"] for run in (student, runs / "student-1"))
    assert rows[2][:6] == ["large", "student", "2", f"75.0 ± {math.sqrt(50):.1f}", "-", f"{loss:.3f}"]


def test_differences(student, teacher, probe_of, tmp_path, capfd):
    """Paired by seed, from the videos that a probe gets right; two variants, of which one has a single seed."""
    manifest = tmp_path / "val.csv"
    manifest.write_text("".join(f"run_{source}_{n}.mp4 0\n" for source in "ab" for n in range(2)))

    def write(run, name, *correct):
        for seed, own in enumerate(correct):
            file = probe_of(run, 50, folder=f"{name}/seed{seed}") / "results.json"
            result = json.loads(file.read_text())
            result["tasks"] = {"mine": result["tasks"][TASKS[0]] | {"correct": own}}
            result["args"] |= {"seed": seed, "val_data": [str(manifest)]}
            file.write_text(json.dumps(result))

    write(teacher, "long/teacher", ["0000", "0011"], ["1100", "1100"])  # 25% and 50%, over two seeds of the probe
    write(student, "long/student", ["0011", "0111"], ["1101", "1101"])  # 62.5% and 75%
    write(student, "short/student", ["0000", "0001"])
    flags = ("differences", tmp_path / "long", tmp_path / "short", "--save", tmp_path / "d.md", "--source")
    run_script(analyze, *flags, r"run_.")
    cells = {row["difference"]: row["mine"] for row in rows_of(tmp_path / "d.md")}
    assert list(cells) == ["long: student - teacher", "student: long - short"]
    assert cells["long: student - teacher"].startswith("+31.2 (") and cells["long: student - teacher"].endswith(
        "2 of 2"
    )
    # One seed, two sources with gains of 25 and 75: the bootstrap draws means of 25, 50 and 75.
    assert cells["student: long - short"] == "+50.0 (+25.0 to +75.0); 1 of 1"
    assert "--source does not match" in refusal(capfd, analyze, *flags, "x")
    probe_of(teacher, 50, folder="short/older")  # another task
    assert "has no 'synthetic-motion': probe again" in refusal(capfd, analyze, *flags, "run_.")


def test_bootstrap_interval_is_the_normal_one_of_many_sources():
    rng = np.random.default_rng(0)
    per_source = rng.normal(3, 10, 400)
    gains = np.repeat(per_source, 5)[None] + rng.normal(0, 0.1, (1, 2000))  # five alike videos of each source
    low, high = analyze.bootstrap(gains, np.repeat(np.arange(400), 5))
    half = 1.96 * per_source.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.1)
    many = rng.normal(3, 10, (50, 1)) + np.zeros((50, 8))  # seeds differ, videos do not
    low, high = analyze.bootstrap(many, np.arange(8))
    half = 1.96 * many[:, 0].std() / math.sqrt(50)
    assert (low, high) == pytest.approx((many.mean() - half, many.mean() + half), abs=0.2)


def rankme_by_hand(encoder, clips):
    values = torch.linalg.svdvals(encoder(data.normalize(clips, CPU)).mean(1).detach().double())
    return math.exp(-sum(p * math.log(p) for p in (values / values.sum() + 1e-7).tolist()))


def test_correlate(runs, ema, probe_of, drawn, capfd):
    """With the loss, and with the ranks and losses of the teachers, which are other checkpoints of one run."""
    steps, top1 = (2, 4, 6), ([50.0, 20.0, 30.0], [1.0, 2.0, 1.0])
    probes = [probe_of(runs / f"of-{step}", *x) for step, *x in zip(steps, *top1, strict=True)]
    capfd.readouterr()
    against = ["loss", "rankme", "teacher-loss", "teacher-rankme"]
    run_script(analyze, "correlate", *probes, "--against", *against, "--clips", 60)
    clips = data.Synthetic(4, 32, analyze.CLIP_SEED).batch(range(60)).clips
    expected = [
        [read_metrics(runs / f"of-{step}")[-1]["loss"] for step in steps],
        [rankme_by_hand(load_encoder(runs / f"of-{step}"), clips) for step in steps],
        [read_metrics(runs / "snapshots", "loss")[step - 1][0] for step in steps],
        [rankme_by_hand(load_encoder(runs / f"snapshots/checkpoint-{step:06}.pt"), clips) for step in steps],
    ]
    lines = iter(capfd.readouterr().out.splitlines())
    for row, x, name in zip(np.reshape(drawn[0].axes, (4, 2)), expected, against, strict=True):
        for ax, y, task in zip(row, top1, TASKS, strict=True):
            dots = ax.lines[1]
            assert dots.get_xdata().tolist() == pytest.approx(x, rel=1e-3) and list(dots.get_ydata()) == y
            r = statistics.correlation(dots.get_xdata(), y)
            label = analyze.AGAINST[name][0]
            assert next(lines) == f"{task} against {label}: R² {r * r:.3f}, Pearson {r:+.3f}, 3 checkpoints"
    args = argparse.Namespace(clips=60, data=None)
    for weights in ("encoder", "student"):  # RankMe is that of the weights that were probed
        found = analyze.quantity(args, analyze.read_probe(probe_of(ema, 10.0, weights=weights)), "rankme")
        assert found == pytest.approx(rankme_by_hand(load_encoder(ema, weights), clips), rel=1e-3)


def test_correlate_refuses(runs, student, teacher, probe_of, capfd):
    good = [probe_of(run, x) for run, x in ((student, 10.0), (runs / "student-1", 20.0), (runs / "of-2", 5.0))]
    for probes, name, message in [
        (good[:2], "loss", "a correlation of 2 checkpoints"),
        ([*good, probe_of(teacher, 30.0)], "teacher-loss", "no training loss of the teacher is known"),
        ([*good, probe_of(student, 9.0, weights="untrained")], "rankme", "untrained encoder"),
        ([good[0]] * 3, "loss", "nothing to correlate"),
        ([*good, probe_of(student)], "loss", "no task in common"),
    ]:
        assert message in refusal(capfd, analyze, "correlate", *probes, "--against", name, "--clips", 4)


def test_curves(runs, teacher, student, ema, drawn):
    run_script(analyze, "curves", teacher, student, runs / "student-1", ema)
    for ax, folders in zip(drawn[0].axes, ([teacher], [student, runs / "student-1"], [ema]), strict=True):
        for line, run in zip(ax.lines, folders, strict=True):
            expected = list(zip(*read_metrics(run, "step", "loss"), strict=True))
            assert [tuple(values) for values in line.get_data()] == expected and line.get_label() == str(run)


def cells_of(figure, rows, clips, frames):
    """The frames in a picture of 32x32 clips: (rows, clips, frames, 32, 32, 3) uint8, without the gaps."""
    image = np.asarray(figure.axes[0].images[0].get_array())
    image = np.pad(image, ((0, 3), (0, 9), (0, 0)))  # the gaps that follow the last row and the last clip
    image = image.reshape(rows, 35, clips, frames * 35 + 6, 3)[:, :32, :, : frames * 35]
    return image.reshape(rows, 32, clips, frames, 35, 3)[..., :32, :].transpose(0, 2, 3, 1, 4, 5)


def test_features_are_principal_components(teacher, drawn):
    """Of the tokens of all clips and shifts together; signs are arbitrary."""
    run_script(analyze, "picture", teacher, "--features", "--first", 5, "--clips", 2)
    clips = data.Synthetic(4, 32, analyze.CLIP_SEED).batch([5, 6]).clips
    shown, features = cells_of(drawn[0], 2, 2, 4)
    assert np.array_equal(shown, clips.permute(0, 2, 3, 4, 1))
    tokens = analyze.dense_tokens(load_encoder(teacher), data.normalize(clips, CPU)).detach()
    tokens = tokens.flatten(0, 3).double().numpy()
    axes = np.linalg.eigh(np.cov(tokens.T))[1][:, -3:][:, ::-1]
    parts = (tokens - tokens.mean(0)) @ axes
    low, high = np.quantile(parts, [0.02, 0.98], axis=0)
    expected = 255 * ((parts - low) / (high - low)).clip(0, 1).reshape(2, 2, 32, 32, 3)
    errors = [np.abs(features[:, ::2] - either) for either in (expected, 255 - expected)]  # two time steps of tokens
    assert np.minimum(*(error.max((0, 1, 2, 3)) for error in errors)).max() < 3


@pytest.mark.parametrize("size, patch, shifts", [(32, 8, 8), (224, 16, 2)])
def test_dense_tokens_lie_where_their_patches_are(size, patch, shifts, monkeypatch):
    encoder = Encoder(3, 0, 1, patch_size=patch, tubelet_size=1)
    monkeypatch.setattr(encoder, "forward", lambda x: tubelets(x, 1, patch).unflatten(-1, (3, -1)).mean(-1))
    places = torch.arange(float(size))
    clip = torch.stack((*torch.meshgrid(places, places, indexing="ij"), torch.ones(size, size)))[None, :, None]
    tokens, step = analyze.dense_tokens(encoder, clip), patch // shifts  # a token is the mean of its patch
    assert tokens.shape == (1, 1, size // step, size // step, 3)
    inside = slice(shifts // 2, -(shifts // 2))  # elsewhere the patch extends beyond the clip
    expected = (torch.arange(size // step) * step + (step - 1) / 2)[inside]
    for axis in (0, 1):
        assert (tokens[0, 0, inside, inside, axis].mean(1 - axis) - expected).abs().max() <= 0.5


def test_png_and_gif_of_own_videos(teacher, student, tmp_path):
    """The movie shows every frame, and stretches shorter videos."""
    for n in range(2):
        write_video(tmp_path / f"{n}.mp4", [numbered(20 * n + i, 40) for i in range(12)])
    (tmp_path / "list.csv").write_text("0.mp4 0\n1.mp4 0\n")
    flags = "--data", tmp_path / "list.csv", "--frame-step", 2, "--clips", 2
    run_script(analyze, "picture", teacher, student, *flags, "--save", tmp_path / "new" / "x")
    png, gif = (PIL.Image.open(tmp_path / "new" / f"x.{suffix}") for suffix in ("png", "gif"))
    assert np.asarray(png.convert("RGB")).std() > 5 and gif.n_frames == 4
    frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in PIL.ImageSequence.Iterator(gif)]
    assert all(np.abs(a - b).mean() > 0.1 for a, b in zip(frames[:3], frames[1:], strict=True))
    long, short = (torch.full((1, 3, count, 8, 8), 50, dtype=torch.uint8) for count in (4, 2))
    short[:, :, 1] = 200
    image = analyze.draw_frames([("", long), ("", short)], range(4), 4).axes[0].images[0].get_array()
    assert image[-1, ::9, 0].tolist() == [50, 50, 200, 200]


def test_what_the_teacher_fills_in_does_not_depend_on_hidden_pixels(teacher, drawn, monkeypatch):
    """Nor does what it sees, whatever the brightness, contrast and content of hidden tubelets."""
    clips = data.Synthetic(4, 32, 1).batch(range(2)).clips
    mask = sample_masks("multiblock", (2, 4, 4), 2, generator("picture", analyze.MASK))[0]
    visible = torch.zeros(2, 32, dtype=torch.bool).scatter(1, mask.context_ids, True)
    pixels = tubelets(clips, 2, 8)
    pixels[~visible] = (pixels[~visible] * 0.4 + 120).to(torch.uint8)
    for shown in (clips, untubelets(pixels, (2, 4, 4), 2, 8)):
        monkeypatch.setattr(analyze, "load_clips", lambda *_, shown=shown: shown)
        run_script(analyze, "picture", teacher, "--clips", 2)
    before, after = (cells_of(figure, 3, 2, 4) for figure in drawn)
    assert np.abs(before[0].astype(int) - after[0]).mean() > 10 and np.array_equal(before[1:], after[1:])
    seen, filled = (tubelets(torch.from_numpy(row).permute(0, 4, 1, 2, 3), 2, 8).int() for row in before[1:])
    for shown in (seen, filled):
        assert (shown[visible] - tubelets(clips, 2, 8).int()[visible]).abs().max() <= 1
    assert (seen[~visible] == 128).all() and filled[~visible].float().std(1).min() > 0


def test_brightness_and_contrast_are_those_that_join_tubelets(teacher, drawn, monkeypatch):
    """A teacher that predicts the normalized pixels of a smooth clip correctly restores the clip."""
    t, y, x = torch.meshgrid(torch.arange(4), torch.arange(32), torch.arange(32), indexing="ij")
    waves = [torch.sin(a * x + b * y + 0.1 * t) for a, b in ((0.2, 0.1), (-0.1, 0.25), (0.15, -0.2))]
    clips = (torch.stack(waves) * 100 + 128).to(torch.uint8)[None]
    pixels = tubelets(data.normalize(clips, CPU), 2, 8).unflatten(-1, (3, -1))
    normal = ((pixels - pixels.mean(-1, keepdim=True)) / pixels.std(-1, keepdim=True)).flatten(2)
    monkeypatch.setattr(analyze, "load_clips", lambda *_: clips)
    monkeypatch.setattr(analyze, "load_predictor", lambda _: lambda _x, _c, target_ids, *_: normal[:, target_ids[0]])
    run_script(analyze, "picture", teacher, "--clips", 1)
    clip, _, filled = cells_of(drawn[0], 3, 1, 4).astype(int)
    assert np.abs(filled - clip).mean() < 6  # 27 with the mean brightness and contrast of what it sees


def test_wrong_runs_end_in_one_line_that_names_the_folder(tmp_path, capfd):
    for command, file in (("curves", "args.json"), ("picture", "checkpoint.pt"), ("table", "results.json")):
        run = tmp_path / command
        assert str(run) in refusal(capfd, analyze, command, run)
        run.mkdir()
        (run / file).write_text('{"weights": "enc')
        assert str(run) in refusal(capfd, analyze, command, run)


def test_mistakes_end_in_one_line(student, probe_of, tmp_path, capfd):
    checkpoint = load_checkpoint(student)
    torch.save(checkpoint, tmp_path / "later.pt")
    torch.save(checkpoint | {"args": checkpoint["args"] | {"teacher": str(tmp_path / "gone")}}, tmp_path / "orphan.pt")
    later, orphan = probe_of(tmp_path / "later.pt", 10.0), probe_of(tmp_path / "orphan.pt", 10.0)
    torch.save(checkpoint | {"step": 8}, tmp_path / "later.pt")
    for flags, message in [
        (("table", later), "probe it again"),
        (("table", orphan), f"no checkpoint at {tmp_path / 'gone'}"),
        (("compare", tmp_path / "none"), f"no results of probe.py in {tmp_path / 'none'}"),
        (("picture", student, "--data", "nowhere.csv"), "nowhere.csv"),
        (("picture", student, "--clips", 0), "--clips"),
    ]:
        assert message in refusal(capfd, analyze, *flags)
