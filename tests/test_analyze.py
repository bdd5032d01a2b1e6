"""tools/analyze.py and tools/pictures.py against costs, ranks, correlations and pictures computed by hand."""

import base64
import json
import math
import re
import shlex
import shutil
import statistics
from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY, numbered, refusal, run_script, write_video

import data
import probe
import train_ema_baseline
import train_student
import train_teacher
from masking import sample_masks
from model import Encoder, Predictor, load_checkpoint, load_encoder, tubelets, untubelets
from tools import analyze, pictures
from training import generator

QUICK = shlex.split(
    "--epochs 1 --batch-size 16 --probe-heads 2 --probe-depth 2 --workers 0 --device cpu --train-clips 24 "
    "--val-clips 20 --task synthetic-motion synthetic-shape --seeds 2"
)
SHORT = ["--steps", 2, "--warmup-steps", 1]
TASKS = ("synthetic-motion", "synthetic-shape")


@pytest.fixture(scope="session")
def runs(teacher, student):
    """A folder of tiny runs: teacher, student, EMA run, a student of the student, other seeds, snapshots."""
    folder = teacher.parent
    wide, snapshots = ["--width", 48], ["--log-every", 5, "--snapshot-every", 2]
    run_script(train_ema_baseline, *TINY, *wide, "--ema-momentum", 0.5, "--out", folder / "ema")
    run_script(train_teacher, *TINY, *snapshots, "--out", folder / "teacher-snapshots")
    longer = [*wide, *snapshots, "--steps", 12, "--teacher", teacher]
    run_script(train_student, *TINY, *longer, "--out", folder / "student-snapshots")
    run_script(train_student, *TINY, *SHORT, "--teacher", student, "--out", folder / "third")
    for seed in (1, 2):
        flags = [*wide, "--seed", seed, "--teacher", teacher]
        run_script(train_student, *TINY, *flags, "--out", folder / f"student-{seed}")
    for step in (2, 4, 6):
        snapshot = folder / f"teacher-snapshots/checkpoint-{step:06}.pt"
        run_script(train_student, *TINY, *SHORT, "--teacher", snapshot, "--out", folder / f"of-{step}")
    return folder


@pytest.fixture(scope="session")
def record(student, tmp_path_factory):
    """The results.json of a real probe with two seeds."""
    out = tmp_path_factory.mktemp("probe")
    run_script(probe, *QUICK, "--checkpoint", student, "--out", out)
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def probe_of(record, tmp_path):
    """A function that writes a folder like probe.py's for a checkpoint, with made-up accuracies."""

    def make(checkpoint, top1, weights="encoder", spread=None):
        folder = tmp_path / f"probe-{len(list(tmp_path.iterdir()))}"
        top1 = top1 if isinstance(top1, dict) else {"synthetic-shape": top1}
        tasks = {task: record["tasks"]["synthetic-shape"] | {"top1": x, "spread": spread} for task, x in top1.items()}
        own = {"checkpoint": str(checkpoint), "weights": weights}
        own |= {"step": load_checkpoint(checkpoint)["step"]} if Path(checkpoint).exists() else {}
        flags = {"untrained": weights == "untrained", "task": list(tasks), "out": str(folder)}
        folder.mkdir()
        text = json.dumps(record | own | {"tasks": tasks, "args": record["args"] | own | flags})
        (folder / "results.json").write_text(text)
        return folder

    return make


@pytest.fixture
def drawn(monkeypatch):
    """The figures that commands draw, instead of files."""
    figures = []
    for module in (analyze, pictures):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    yield figures
    plt.close("all")


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_line(run):
    return log(run)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# RankMe


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_orthonormal_rows(rank):
    rows = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0))).Q[:rank, :12]
    rows = torch.linalg.qr(rows.T).Q.T  # orthonormal in 12 dimensions
    assert analyze.effective_rank(rows) == pytest.approx(rank, rel=1e-4)
    assert analyze.effective_rank(1000 * rows) == pytest.approx(rank, rel=1e-4)
    assert analyze.effective_rank(rows.repeat(5, 1)) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_unequal_directions():
    """Singular values 3 and 1 have shares of 3/4 and 1/4; rows that are all equal have rank 1."""
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert analyze.effective_rank(torch.diag(torch.tensor([1.0, 3.0]))) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert analyze.effective_rank(torch.randn(1, 16).expand(50, 16)) == pytest.approx(1, abs=1e-4)


def rankme_by_hand(encoder, clips):
    x = torch.cat([encoder(data.normalize(clip[None], "cpu")).mean(1) for clip in clips]).detach().double()
    shares = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum() + 1e-7
    return math.exp(-sum(p * math.log(p) for p in shares.tolist()))


def test_rankme_of_runs(teacher, student, tmp_path, capfd):
    file = tmp_path / "new" / "rank.json"
    flags = ["--clips", 110, "--first", 7, "--save", file, "--device", "cpu"]
    run_script(analyze, "rankme", teacher, student / "checkpoint.pt", *flags)
    clips = data.Synthetic(4, 32, pictures.CLIP_SEED).batch(range(7, 117)).clips
    found, printed = json.loads(file.read_text()), capfd.readouterr().out
    assert list(found) == [str(teacher), str(student / "checkpoint.pt")]
    for (run, values), width in zip(found.items(), (32, 48), strict=True):
        assert (values["width"], values["clips"]) == (width, 110)
        assert values["rankme"] == pytest.approx(rankme_by_hand(load_encoder(run), clips), rel=1e-3)
        assert 1 < values["rankme"] < width
        assert f"{run}: RankMe {values['rankme']:.1f} of {width}, 110 clips" in printed


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A manifest of three different videos."""
    folder = tmp_path_factory.mktemp("videos")
    for n in range(3):
        write_video(folder / f"{n}.mp4", [numbered(20 * n + i, 40) for i in range(12)])
    (folder / "list.csv").write_text("0.mp4 0\n1.mp4 0\n2.mp4 0\n")
    return folder / "list.csv"


def test_rankme_on_data(teacher, videos, tmp_path):
    file = tmp_path / "rank.json"
    own = ["--data", videos, "--frame-step", 2, "--clips", 3]
    run_script(analyze, "rankme", teacher, *own, "--device", "cpu", "--save", file)
    clips = data.Manifest([videos], 4, 2, 32, train=False).batch(range(3)).clips
    expected = rankme_by_hand(load_encoder(teacher), clips)
    assert json.loads(file.read_text())[str(teacher)]["rankme"] == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# ranks and correlation


@pytest.mark.parametrize(
    "numbers, ranks",
    [([10, 30, 20], [1, 3, 2]), ([5, 2, 5, 1], [3.5, 2, 3.5, 1]), ([7, 7, 7, 9], [2, 2, 2, 4]), ([4, 4], [1.5, 1.5])],
)
def test_ranks(numbers, ranks):
    assert analyze.ranks(np.array(numbers)).tolist() == ranks


@pytest.mark.parametrize(
    "x, y, pearson, spearman",
    [
        ([1, 2, 3, 4], [3, 5, 7, 9], 1, 1),
        ([1, 2, 3, 4], [9, 7, 5, 3], -1, -1),
        ([1, 2, 3], [1, 2, 9], 8 / math.sqrt(76), 1),  # monotone but not linear
        # the first and last sets of Anscombe's quartet (1973), the last with ties; R² is 0.67 in all four
        ([10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5],
         [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68], 0.81642, 0.81818),
        ([8] * 7 + [19] + [8] * 3, [6.58, 5.76, 7.71, 8.84, 8.47, 7.04, 5.25, 12.5, 5.56, 7.91, 6.89], 0.81652, 0.5),
    ],
)  # fmt: skip
def test_correlation(x, y, pearson, spearman):
    expected = pytest.approx((pearson**2, pearson, spearman), abs=1e-5)
    assert analyze.correlation(np.array(x), np.array(y)) == expected
    assert analyze.correlation(np.array(y), np.array(x)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# lineage: the cost of a checkpoint


def paper_flops_by_hand(run, steps, teacher=None):
    """The paper's appendix F (6 N D), from the checkpoints' parameters; 32 tokens, 4 clips per step, 2 masks."""
    config = load_checkpoint(run)["model"]
    latents = Predictor(**config["predictor"] | {"out_width": (teacher or load_encoder(run)).width})
    encoder, predictor, target = (
        sum(p.numel() for p in module.parameters()) if module else 0
        for module in (Encoder(**config["encoder"]), latents, teacher)
    )
    tokens = 32 * 4 * steps
    return tokens * (6 * encoder * 0.2 + 2 * target + 6 * predictor * 2)


def test_lineage_of_three_stages(runs, teacher, student):
    stages = analyze.lineage(runs / "third")
    assert [(stage.kind, stage.path, stage.step) for stage in stages] == [
        ("student", runs / "third", 2),
        ("student", student, 6),
        ("teacher", teacher, 6),
    ]
    for stage in stages:
        line = last_line(stage.path)
        assert line["step"] == stage.step and stage.encoder == load_encoder(stage.path).config
        assert (stage.loss, stage.seconds, stage.flops) == (line["loss"], line["seconds"], line["flops"])
    makers = load_encoder(student), load_encoder(teacher), None
    for stage, maker in zip(stages, makers, strict=True):
        expected = paper_flops_by_hand(stage.path, stage.step, maker)
        assert stage.paper_flops == pytest.approx(expected, rel=1e-9)
    assert analyze.total_flops(stages) == sum(stage.flops for stage in stages)
    assert analyze.total_flops(stages, "paper_flops") == sum(stage.paper_flops for stage in stages)
    assert analyze.total_flops(stages[1:]) == last_line(student)["flops"] + last_line(teacher)["flops"]


def test_lineage_of_an_ema_run(runs):
    """The EMA teacher is part of the run: a single stage, for which the paper counts a teacher."""
    (stage,) = analyze.lineage(runs / "ema")
    assert (stage.kind, stage.step, stage.loss) == ("ema", 6, last_line(runs / "ema")["loss"])
    expected = paper_flops_by_hand(runs / "ema", 6, load_encoder(runs / "ema"))
    assert stage.paper_flops == pytest.approx(expected, rel=1e-9)


def test_lineage_of_a_snapshot(runs, teacher):
    """Its costs are those of its own step, which is logged although --log-every would skip it."""
    run = runs / "student-snapshots"
    line = next(line for line in log(run) if line["step"] == 4)
    stages = analyze.lineage(run / "checkpoint-000004.pt")
    assert stages[0].step == 4 and [stage.kind for stage in stages] == ["student", "teacher"]
    assert (stages[0].loss, stages[0].seconds, stages[0].flops) == (line["loss"], line["seconds"], line["flops"])
    expected = paper_flops_by_hand(run, 4, load_encoder(teacher))
    assert stages[0].paper_flops == pytest.approx(expected, rel=1e-9)
    assert analyze.lineage(run)[0].step == 12


def test_lineage_of_a_checkpoint_without_its_log(student, teacher, tmp_path):
    shutil.copy(student / "checkpoint.pt", tmp_path / "alone.pt")
    own, before = analyze.lineage(tmp_path / "alone.pt")
    assert (own.loss, own.seconds, own.flops) == (None, None, None)
    assert own.paper_flops == analyze.lineage(student)[0].paper_flops
    assert before.flops == last_line(teacher)["flops"] and analyze.total_flops([own, before]) is None
    checkpoint = load_checkpoint(student)
    torch.save(checkpoint | {"args": {}}, tmp_path / "converted.pt")  # like the output of tools/convert.py
    (stage,) = analyze.lineage(tmp_path / "converted.pt")
    assert stage.paper_flops is None and analyze.total_flops([stage], "paper_flops") is None


# ---------------------------------------------------------------------------------------------------------------------
# table


def table_of(tmp_path, *folders):
    """The rows that `table` writes, as a list of dictionaries."""
    run_script(analyze, "table", *folders, "--save", tmp_path / "new" / "t.md")
    lines = (tmp_path / "new" / "t.md").read_text().splitlines()
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len({len(line) for line in lines}) == 1 and set("".join(rule)) == {"-"}
    return [dict(zip(head, row, strict=True)) for row in rows]


MOTION, SHAPE = "synthetic-motion, top-1 % (chance 12.5)", "synthetic-shape, top-1 % (chance 16.7)"


def test_table_of_real_probes(record, student, teacher, tmp_path):
    for name, flags in (("untrained", ["--untrained"]), ("teacher", []), ("student", [])):
        checkpoint = teacher if name == "teacher" else student
        tasks = [] if name == "student" else ["--task", "synthetic-shape", "--seeds", 1]
        run_script(probe, *QUICK, *tasks, "--checkpoint", checkpoint, "--out", tmp_path / name, *flags)
    rows = table_of(tmp_path, *(tmp_path / name for name in ("untrained", "teacher", "student")))
    assert [row["encoder"] for row in rows] == ["untrained", "teacher", "student"] and "runs" not in rows[0]
    assert list(rows[0])[0] == "encoder" and list(rows[0])[-5:-1] == ["loss", "steps", "time", "FLOPs"]
    assert [row["steps"] for row in rows] == ["0", "6", "6"] and [row[MOTION] for row in rows[:2]] == ["-", "-"]
    assert {rows[0][name] for name in ("loss", "time", "FLOPs", "incl. teachers")} == {"-"}
    for row, name in zip(rows, ("untrained", "teacher", "student"), strict=True):
        found = json.loads((tmp_path / name / "results.json").read_text())["tasks"]["synthetic-shape"]
        spread = f" ± {found['spread']:.1f}" if name == "student" else ""
        assert row[SHAPE] == f"{found['top1']:.1f}{spread}"
    own = [last_line(teacher), last_line(student)]
    assert [row["loss"] for row in rows[1:]] == [f"{line['loss']:.3f}" for line in own]
    assert [row["FLOPs"] for row in rows[1:]] == [f"{line['flops']:.2g}" for line in own]
    both = f"{own[0]['flops'] + own[1]['flops']:.2g}"
    assert [row["incl. teachers"] for row in rows[1:]] == [rows[1]["FLOPs"], both]


def test_runs_that_differ_in_their_seed_share_a_row(runs, student, probe_of, tmp_path):
    """It shows mean and standard deviation over the runs. A single run shows the spread over its probe's seeds."""
    folders = student, runs / "student-1", runs / "student-2"
    probes = [probe_of(run, top1, spread=9.0) for run, top1 in zip(folders, (20.0, 30.0, 25.0), strict=True)]
    (row,) = table_of(tmp_path, *probes)
    assert (row["runs"], row["steps"], row[SHAPE]) == ("3", "6", "25.0 ± 5.0")
    assert row["loss"] == f"{statistics.mean(last_line(run)['loss'] for run in folders):.3f}"
    assert row["FLOPs"] == f"{statistics.mean(last_line(run)['flops'] for run in folders):.2g}"
    (row,) = table_of(tmp_path, probes[0])
    assert "runs" not in row and row[SHAPE] == "20.0 ± 9.0"
    (experiment,) = analyze.experiments(probes[:2])
    assert [stages[0].path for stages in experiment.lineages] == list(folders[:2]) and experiment.runs == 2
    assert experiment.accuracies["synthetic-shape"].spread == pytest.approx(math.sqrt(50))


def test_rows_of_every_kind(runs, student, probe_of, tmp_path):
    snapshot = runs / "student-snapshots" / "checkpoint-000004.pt"
    probes = [
        probe_of(runs / "ema", 40.0, "student"),
        probe_of(runs / "ema", 50.0),
        probe_of(student, 60.0),
        probe_of(snapshot, 65.0),
        probe_of(runs / "third", 70.0),
        probe_of(student, 10.0, "untrained"),
    ]
    rows = table_of(tmp_path, *probes)
    names = ["EMA's student", "EMA (V-JEPA 2)", "student", "student", "student", "untrained"]
    assert [row["encoder"] for row in rows] == names and "runs" not in rows[0]
    assert [row[SHAPE] for row in rows] == ["40.0", "50.0", "60.0", "65.0", "70.0", "10.0"]
    assert [row["steps"] for row in rows] == ["6", "6", "6", "4", "2", "0"]
    assert rows[0]["loss"] == rows[1]["loss"] == f"{last_line(runs / 'ema')['loss']:.3f}"


def test_untrained_encoders_of_one_architecture_share_a_row(student, probe_of, tmp_path):
    (row,) = table_of(tmp_path, probe_of(student, 10.0, "untrained"), probe_of(student, 20.0, "untrained"))
    assert (row["encoder"], row["runs"], row[SHAPE], row["steps"]) == ("untrained", "2", "15.0 ± 7.1", "0")


def test_untrained_encoders_of_two_architectures_have_two_rows(student, teacher, probe_of, tmp_path):
    rows = table_of(tmp_path, probe_of(student, 10.0, "untrained"), probe_of(teacher, 20.0, "untrained"))
    assert [row[SHAPE] for row in rows] == ["10.0", "20.0"]


@pytest.mark.parametrize("flags", [["--mask", "tube"], ["--lr", "1e-2"], ["--batch-size", "8"]])
def test_runs_that_differ_in_more_than_their_seed_have_two_rows(flags, teacher, probe_of, tmp_path):
    run_script(train_teacher, *TINY, *flags, "--out", tmp_path / "other")
    rows = table_of(tmp_path, probe_of(teacher, 10.0), probe_of(tmp_path / "other", 20.0))
    assert [row[SHAPE] for row in rows] == ["10.0", "20.0"]


def test_pipelines_that_differ_in_all_seeds_share_a_row(runs, student, probe_of, tmp_path):
    """Teacher and student trained again with another seed are one more run of the same experiment."""
    run_script(train_teacher, *TINY, "--seed", 1, "--out", tmp_path / "teacher")
    again = ["--width", 48, "--seed", 1, "--teacher", tmp_path / "teacher", "--out", tmp_path / "student"]
    run_script(train_student, *TINY, *again)
    (row,) = table_of(tmp_path, probe_of(student, 10.0), probe_of(tmp_path / "student", 20.0))
    assert row["runs"] == "2"


def test_students_of_teachers_with_different_masks_have_two_rows(student, probe_of, tmp_path):
    run_script(train_teacher, *TINY, "--mask", "tube", "--out", tmp_path / "teacher")
    other = ["--width", 48, "--teacher", tmp_path / "teacher", "--out", tmp_path / "student"]
    run_script(train_student, *TINY, *other)
    rows = table_of(tmp_path, probe_of(student, 10.0), probe_of(tmp_path / "student", 20.0))
    assert [row[SHAPE] for row in rows] == ["10.0", "20.0"]


def test_students_of_different_snapshots_of_a_teacher_have_a_row_each(runs, probe_of, tmp_path):
    rows = table_of(tmp_path, *(probe_of(runs / f"of-{step}", top1) for step, top1 in ((2, 1.0), (4, 2.0), (6, 3.0))))
    assert [row[SHAPE] for row in rows] == ["1.0", "2.0", "3.0"]
    flops = [next(line["flops"] for line in log(runs / "teacher-snapshots") if line["step"] == n) for n in (2, 4, 6)]
    own = [last_line(runs / f"of-{step}")["flops"] for step in (2, 4, 6)]
    assert [row["incl. teachers"] for row in rows] == [f"{a + b:.2g}" for a, b in zip(flops, own, strict=True)]


def test_tasks_probed_in_separate_folders_are_all_shown(student, probe_of, tmp_path):
    probes = probe_of(student, {TASKS[0]: 10.0}), probe_of(student, {TASKS[1]: 20.0})
    rows = table_of(tmp_path, *probes)
    cells = [cell for row in rows for cell in row.values()]
    assert "10.0" in cells and "20.0" in cells


def test_table_of_checkpoints_without_a_log(student, teacher, probe_of, tmp_path):
    """A file in a run folder has the run's log. A file elsewhere, or a run with an empty log, shows dashes."""
    shutil.copy(student / "checkpoint.pt", tmp_path / "alone.pt")
    run = shutil.copytree(teacher, tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    probes = probe_of(student / "checkpoint.pt", 10.0), probe_of(tmp_path / "alone.pt", 20.0), probe_of(run, 30.0)
    (inside,), (alone,), (silent,) = (table_of(tmp_path, folder) for folder in probes)
    assert inside["loss"] == f"{last_line(student)['loss']:.3f}" and inside["encoder"] == alone["encoder"] == "student"
    for row in (alone, silent):
        assert {row[name] for name in ("loss", "time", "FLOPs", "incl. teachers")} == {"-"} and row["steps"] == "6"


def test_table_of_a_student_whose_teacher_has_no_log(runs, student, teacher, probe_of, tmp_path):
    """The student's own cost is known, but the sum is not."""
    shutil.copy(teacher / "checkpoint.pt", tmp_path / "teacher.pt")
    run = shutil.copytree(student, tmp_path / "run")
    checkpoint = load_checkpoint(student)
    checkpoint["args"]["teacher"] = str(tmp_path / "teacher.pt")
    torch.save(checkpoint, run / "checkpoint.pt")
    (row,) = table_of(tmp_path, probe_of(run, 10.0))
    assert row["FLOPs"] == f"{last_line(student)['flops']:.2g}" and row["incl. teachers"] == "-"


# ---------------------------------------------------------------------------------------------------------------------
# pareto


def points(ax):
    """The points with error bars: {label: [(x, y, half the bar's length), ...]}."""
    found = {}
    for container in ax.containers:
        (bars,) = container[2]
        halves = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
        found[container.get_label()] = list(zip(*container[0].get_data(), halves, strict=True))
    return found


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_compare(runs, student, teacher, probe_of, drawn, tmp_path, capfd):
    """Every folder below a variant's is one of its runs; the kinds of encoder are kept apart."""
    variants = {
        "small": [(student, {"synthetic-motion": 50, "synthetic-shape": 20}), (teacher, {"synthetic-motion": 60})],
        "large": [(student, {"synthetic-motion": 70}), (runs / "student-1", {"synthetic-motion": 80})],
    }
    for name, probes in variants.items():
        for seed, (checkpoint, top1) in enumerate(probes):
            target = tmp_path / "study" / name / f"seed{seed}" / "probe"
            target.parent.mkdir(parents=True)
            probe_of(checkpoint, top1).rename(target)
    folders = [tmp_path / "study" / name for name in variants]
    run_script(analyze, "compare", *folders, "--save", tmp_path / "x.png")
    motion, shape = drawn[0].axes
    assert [label.get_text() for label in motion.get_xticklabels()] == ["small", "large"]
    dots = sorted(y for line in motion.get_lines() if line.get_marker() == "." for y in line.get_ydata())
    assert dots == [50, 60, 70, 80]
    means = [(bar.get_label().strip("_0123456789"), *bar[0].get_xydata()[0].tolist()) for bar in motion.containers]
    beside = [("teacher", -0.06, 60), ("student", 0.06, 50), ("container", 1, 75)]  # an encoder alone is on its tick
    assert means == [(name, pytest.approx(x), y) for name, x, y in beside]
    assert [bar[0].get_ydata().tolist() for bar in shape.containers] == [[20]]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in (tmp_path / "x.md").read_text().splitlines()]
    assert rows[2:] == [
        ["small", "student", "1", "50.0"],
        ["small", "teacher", "1", "60.0"],
        ["large", "student", "2", f"75.0 ± {math.sqrt(50):.1f}"],
    ]
    (tmp_path / "empty").mkdir()
    message = refusal(capfd, analyze, "compare", tmp_path / "empty", "--save", tmp_path / "x.png")
    assert f"no results of probe.py in {tmp_path / 'empty'}" in message


def test_pareto(runs, student, teacher, probe_of, drawn):
    students = [
        probe_of(runs / run, {TASKS[0]: a, TASKS[1]: b})
        for run, a, b in (("student", 20.0, 60.0), ("student-1", 30.0, 60.0), ("student-2", 25.0, 63.0))
    ]
    others = [
        probe_of(runs / "third", {TASKS[0]: 40.0}, spread=2.5),
        probe_of(teacher, {TASKS[0]: 15.0}),
        probe_of(runs / "ema", {TASKS[1]: 35.0}),
        probe_of(runs / "ema", {TASKS[1]: 34.0}, "student"),
        probe_of(student, {TASKS[0]: 9.0, TASKS[1]: 8.0}, "untrained"),
    ]
    run_script(analyze, "pareto", others[0], *students, *others[1:])
    axes = {ax.get_title(): ax for ax in drawn[0].axes}
    assert list(axes) == list(TASKS) and {ax.get_xscale() for ax in axes.values()} == {"log"}
    seeds = "student", "student-1", "student-2"
    own = {name: last_line(runs / name)["flops"] for name in (*seeds, "teacher", "ema", "third")}
    three = statistics.mean(own[name] for name in seeds) + own["teacher"]
    all_stages = own["third"] + own["student"] + own["teacher"]
    motion, shape = (points(ax) for ax in axes.values())
    near = lambda *point: pytest.approx(point, rel=1e-6)  # noqa: E731
    pairs = sorted([near(three, 25, 5), near(all_stages, 40, 2.5)], key=lambda pair: pair.expected[0])
    assert motion == {"student": pairs, "teacher": [near(own["teacher"], 15, 0)]}
    assert shape == {
        "student": [near(three, 61, math.sqrt(3))],
        "EMA (V-JEPA 2)": [near(own["ema"], 35, 0)],
        "EMA's student": [near(own["ema"], 34, 0)],
    }
    for ax, floor in zip(axes.values(), (9, 8), strict=True):
        assert set(lines(ax)["untrained"].get_ydata()) == {floor}
        assert "untrained" in [text.get_text() for text in ax.get_legend().get_texts()]


# FLOPs in 1e21, ssv2 and k400 top-1 in percent: table 1 of the paper
TABLE_1 = {
    "SALT (paper)": [(1.2, 74.9, 85.4), (1.5, 75.4, 86.0), (1.9, 76.2, 86.8), (2.6, 76.1, 87.2)],
    "V-JEPA 2, V-3.6M (paper)": [(1.4, 68.2, 83.8), (2.6, 73.4, 84.6)],
    "V-JEPA 2, VM-22M (paper)": [(1.9, 73.7, 85.1), (3.5, 74.0, 85.3), (5.3, 75.3, 86.6)],
}


def test_pareto_with_flops_as_the_paper_counts_them(student, teacher, probe_of, drawn, tmp_path):
    """This needs no log."""
    shutil.copy(student / "checkpoint.pt", tmp_path / "alone.pt")
    run_script(analyze, "pareto", probe_of(tmp_path / "alone.pt", {"k400": 30.0, TASKS[0]: 20.0}), "--paper")
    expected = paper_flops_by_hand(student, 6, load_encoder(teacher)) + paper_flops_by_hand(teacher, 6)
    axes = {ax.get_title(): ax for ax in drawn[0].axes}
    assert axes.keys() == {"k400", "ssv2", TASKS[0]}
    assert points(axes["k400"]) == {"student": [pytest.approx((expected, 30, 0), rel=1e-6)]}
    assert not points(axes["ssv2"]) and not set(TABLE_1) & set(lines(axes[TASKS[0]]))
    for column, task in enumerate(("ssv2", "k400"), start=1):
        for name, rows in TABLE_1.items():
            x, y = lines(axes[task])[name].get_data()
            assert list(zip(x, y, strict=True)) == [pytest.approx((1e21 * row[0], row[column])) for row in rows]
    run_script(analyze, "pareto", probe_of(student, {"k400": 30.0}))
    (ax,) = drawn[1].axes
    executed = last_line(student)["flops"] + last_line(teacher)["flops"]
    assert points(ax) == {"student": [pytest.approx((executed, 30, 0))]} and not set(TABLE_1) & set(lines(ax))


def test_pareto_without_probes(tmp_path, capfd):
    assert "pareto: give folders" in refusal(capfd, analyze, "pareto", "--save", tmp_path / "x.png")
    run_script(analyze, "pareto", "--paper", "--save", tmp_path / "new" / "x.png")
    assert ink(tmp_path / "new" / "x.png") > 5


def test_pareto_refuses_checkpoints_of_unknown_cost(student, probe_of, tmp_path, capfd):
    shutil.copy(student / "checkpoint.pt", tmp_path / "alone.pt")
    error = refusal(capfd, analyze, "pareto", probe_of(tmp_path / "alone.pt", 20.0), "--save", tmp_path / "x.png")
    assert f"FLOPs of {tmp_path / 'alone.pt'}" in error and not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# correlate


def by_hand(x, y):
    """R², Pearson and Spearman (without ties), as printed."""
    mx, my, n = statistics.mean(x), statistics.mean(y), len(x)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    pearson = cov / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    ranks = [[sorted(values).index(v) for v in values] for values in (x, y)]
    spearman = 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))
    return f"R² {pearson**2:.3f}, Pearson {pearson:+.3f}, Spearman {spearman:+.3f}, {n} checkpoints"


def test_correlate_with_the_loss(runs, probe_of, drawn, capfd):
    run, steps = runs / "student-snapshots", range(2, 13, 2)
    top1 = {TASKS[0]: [10.0, 14.0, 12.0, 20.0, 26.0, 25.0], TASKS[1]: [30.0, 25.0, 26.0, 24.0, 20.0, 10.0]}
    probes = [
        probe_of(run / f"checkpoint-{step:06}.pt", {task: values[i] for task, values in top1.items()})
        for i, step in enumerate(steps)
    ]
    capfd.readouterr()
    run_script(analyze, "correlate", *probes)
    loss = [line["loss"] for line in log(run) if line["step"] in steps]
    assert capfd.readouterr().out.splitlines() == [
        f"{task} against training loss: {by_hand(loss, values)}" for task, values in top1.items()
    ]
    for ax, (task, values) in zip(drawn[0].axes, top1.items(), strict=True):
        line, dots = ax.lines
        assert dots.get_xdata().tolist() == loss and dots.get_ydata().tolist() == values
        assert [text.get_text() for text in ax.texts] == [str(step) for step in steps]
        slope = np.cov(loss, values)[0, 1] / np.var(loss, ddof=1)
        ends = np.array([min(loss), max(loss)])
        np.testing.assert_allclose(line.get_data(), [ends, np.mean(values) + slope * (ends - np.mean(loss))], rtol=1e-6)
        assert ax.get_xlabel() == "training loss" and task in ax.get_ylabel()


def test_correlate_with_rankme_and_the_teachers_quantities(runs, probe_of, tmp_path, capfd):
    top1, steps = [50.0, 20.0, 30.0], (2, 4, 6)
    probes = [probe_of(runs / f"of-{step}", x) for step, x in zip(steps, top1, strict=True)]
    capfd.readouterr()
    flags = ["--clips", 60, "--save", tmp_path / "new" / "x.png", "--device", "cpu"]
    run_script(analyze, "correlate", *probes, "--against", "rankme", "teacher-loss", "teacher-rankme", *flags)
    clips = data.Synthetic(4, 32, pictures.CLIP_SEED).batch(range(60)).clips
    teachers = [runs / f"teacher-snapshots/checkpoint-{step:06}.pt" for step in steps]
    found = {
        "RankMe": [rankme_by_hand(load_encoder(runs / f"of-{step}"), clips) for step in steps],
        "training loss of the teacher": [x["loss"] for x in log(runs / "teacher-snapshots") if x["step"] in steps],
        "RankMe of the teacher": [rankme_by_hand(load_encoder(teacher), clips) for teacher in teachers],
    }
    *printed, _ = capfd.readouterr().out.splitlines()
    number = re.compile(r"[-+]?\d\.\d{3}")
    for line, (name, values) in zip(printed, found.items(), strict=True):
        assert line.startswith(f"synthetic-shape against {name}: R² ")
        expected = [float(x) for x in number.findall(by_hand(values, top1))]
        assert [float(x) for x in number.findall(line)] == pytest.approx(expected, abs=0.003)
    assert ink(tmp_path / "new" / "x.png") > 5


def test_correlate_uses_the_weights_that_were_probed(runs, student, probe_of, monkeypatch, drawn):
    seen = []  # embeddings
    monkeypatch.setattr(analyze, "effective_rank", lambda x: seen.append(x) or float(len(seen)))
    probes = probe_of(runs / "ema", 10.0, "student"), probe_of(runs / "ema", 20.0), probe_of(student, 35.0)
    run_script(analyze, "correlate", *probes, "--against", "rankme", "--clips", 4, "--first", 3, "--device", "cpu")
    clips = data.normalize(data.Synthetic(4, 32, pictures.CLIP_SEED).batch(range(3, 7)).clips, "cpu")
    probed = (runs / "ema", "student"), (runs / "ema", "encoder"), (student, "encoder")
    for x, (run, weights) in zip(seen, probed, strict=True):
        torch.testing.assert_close(x, load_encoder(run, weights)(clips).mean(1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_correlate_refuses(runs, student, teacher, probe_of, tmp_path, capfd):
    def error_of(*flags):
        return refusal(capfd, analyze, "correlate", *flags, "--clips", 4, "--save", tmp_path / "x.png")

    good = [probe_of(runs / name, x) for name, x in (("student", 10.0), ("student-1", 20.0), ("student-2", 5.0))]
    first = probe_of(teacher, 30.0)
    assert "a correlation of 2 checkpoints" in error_of(*good[:2])
    for against in ("teacher-loss", "teacher-rankme"):
        assert f"{teacher} has no teacher: --against {against}" in error_of(*good, first, "--against", against)
    shutil.copy(student / "checkpoint.pt", tmp_path / "alone.pt")
    alone = probe_of(tmp_path / "alone.pt", 20.0)
    assert f"the loss of {tmp_path / 'alone.pt'} is unknown" in error_of(*good, alone)
    assert "accuracy" in error_of(*good, "--against", "accuracy")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("against", ["loss", "rankme", "teacher-loss", "teacher-rankme"])
def test_correlate_refuses_untrained_encoders(against, runs, student, probe_of, tmp_path, capfd):
    """The checkpoint named in the folder has a loss, but the encoder that was probed has none."""
    good = [probe_of(runs / name, x) for name, x in (("student", 10.0), ("student-1", 20.0), ("student-2", 5.0))]
    floor = probe_of(student, 9.0, "untrained")
    flags = ["--against", against, "--clips", 4, "--save", tmp_path / "x.png"]
    assert "untrained" in refusal(capfd, analyze, "correlate", *good, floor, *flags)


def test_correlate_refuses_constant_quantities(runs, probe_of, tmp_path, capfd):
    """The teacher's loss, for students of one teacher."""
    good = [probe_of(runs / name, x) for name, x in (("student", 10.0), ("student-1", 20.0), ("student-2", 5.0))]
    flags = ["--against", "teacher-loss", "--save", tmp_path / "x.png"]
    assert "nothing to correlate" in refusal(capfd, analyze, "correlate", *good, *flags)


def test_correlate_refuses_folders_of_different_tasks(runs, probe_of, tmp_path, capfd):
    good = [probe_of(runs / name, x) for name, x in (("student", 10.0), ("student-1", 20.0))]
    other = probe_of(runs / "student-2", {TASKS[0]: 5.0})
    assert TASKS[0] in refusal(capfd, analyze, "correlate", *good, other, "--save", tmp_path / "x.png")


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def ink(path):
    """The standard deviation of the pixels of a picture, which must have at least 100 x 100."""
    image = np.asarray(PIL.Image.open(path).convert("RGB"))
    assert min(image.shape[:2]) > 100
    return image.std()


@pytest.mark.parametrize("command", ["curves", "features", "picture"])
def test_pictures(command, runs, teacher, student, videos, tmp_path):
    own = [] if command == "curves" else ["--data", videos, "--clips", 2]
    for flags in ([], own):
        run_script(analyze, command, teacher, student, runs / "ema", "--save", tmp_path / "new" / "x.png", *flags)
        assert ink(tmp_path / "new" / "x.png") > 5


def test_report(runs, student, teacher, probe_of, tmp_path, capfd):
    """A page that holds everything itself: facts, curves, pictures, and the probes of this run beside it."""
    for run in (teacher, student, runs / "ema", runs / "third"):
        shutil.copytree(run, tmp_path / run.name)
    probe_of(tmp_path / "student", 61.5).rename(tmp_path / "probe-a")
    probe_of(tmp_path / "teacher", 42.5).rename(tmp_path / "probe-b")
    for names in (["student"], ["teacher", "ema"], ["third"]):
        file = tmp_path / "report.html"
        run_script(analyze, "report", *(tmp_path / name for name in names), "--save", file)
        text = file.read_text()
        links = re.findall('(?:src|href)="([^;"]*)', text)
        assert text.count("<h2>") == len(names) and links == ["data:image/png", "data:image/gif"] * len(names)
        for name in names:
            assert f"<td>{last_line(tmp_path / name)['loss']:.4f}" in text
        assert ("probe-a: synthetic-shape" in text, "top-1 61.5%" in text) == (("student" in names),) * 2
        assert ("top-1 42.5%" in text) == ("teacher" in names)
        images = [base64.b64decode(x) for x in re.findall('base64,([^"]+)', text)]
        assert [image[:4] for image in images] == [b"\x89PNG", b"GIF8"] * len(names)
    (tmp_path / "student" / "metrics.jsonl").write_text("")
    assert "has not logged a step" in refusal(capfd, analyze, "report", tmp_path / "student", "--save", file)


def test_curves(runs, teacher, student, drawn):
    run_script(analyze, "curves", teacher, student, runs / "student-1", runs / "ema")
    assert [ax.get_title() for ax in drawn[0].axes] == [
        "teacher (SALT stage 1)",
        "student (SALT stage 2)",
        "EMA baseline (V-JEPA 2)",
    ]
    for ax, folders in zip(drawn[0].axes, ([teacher], [student, runs / "student-1"], [runs / "ema"]), strict=True):
        for line, run in zip(ax.lines, folders, strict=True):
            expected = [[x[name] for x in log(run)] for name in ("step", "loss")]
            assert [list(values) for values in line.get_data()] == expected and line.get_label() == str(run)


def cells_of(figure, rows, clips, frames):
    """The frames in a picture of 32x32 clips: (rows, clips, frames, 32, 32, 3) uint8, without the gaps."""
    image = np.asarray(figure.axes[0].images[0].get_array())
    image = np.pad(image, ((0, 3), (0, 9), (0, 0)))  # the gaps that follow the last row and the last clip
    image = image.reshape(rows, 35, clips, frames * 35 + 6, 3)[:, :32, :, : frames * 35]
    return image.reshape(rows, 32, clips, frames, 35, 3)[..., :32, :].transpose(0, 2, 3, 1, 4, 5)


def test_features_are_principal_components(runs, teacher, drawn):
    """Of the tokens of all clips and shifts together, separately for each encoder; signs are arbitrary."""
    run_script(analyze, "features", teacher, runs / "ema", "--first", 5, "--clips", 2)
    clips = data.Synthetic(4, 32, pictures.CLIP_SEED).batch([5, 6]).clips
    found = cells_of(drawn[0], 3, 2, 4)
    assert np.array_equal(found[0], clips.permute(0, 2, 3, 4, 1))
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()][1:] == [
        f"features of\n{name}" for name in ("teacher", "ema")
    ]
    for row, run in ((1, teacher), (2, runs / "ema")):
        tokens = pictures.dense_tokens(load_encoder(run), data.normalize(clips, "cpu")).detach()
        tokens = tokens.flatten(0, 3).double().numpy()
        axes = np.linalg.eigh(np.cov(tokens.T))[1][:, -3:][:, ::-1]
        parts = (tokens - tokens.mean(0)) @ axes
        low, high = np.quantile(parts, [0.02, 0.98], axis=0)
        expected = 255 * ((parts - low) / (high - low)).clip(0, 1).reshape(2, 2, 32, 32, 3)
        for channel in range(3):
            colors = found[row, :, ::2, ..., channel].astype(float)  # the token grid has two time steps
            either = expected[..., channel], 255 - expected[..., channel]
            assert min(np.abs(colors - expected).max() for expected in either) < 3


@pytest.mark.parametrize("size, patch, shifts", [(32, 8, 8), (64, 16, 8), (224, 16, 2), (32, 1, 1)])
def test_dense_tokens(size, patch, shifts):
    """Each lies where its patch is in the clip; without a shift, they are the encoder's tokens."""
    encoder = Encoder(3, 0, 1, patch_size=patch, tubelet_size=1)  # a token is the mean of its patch
    encoder.embed = lambda clips, _: (tubelets(clips, 1, patch).unflatten(-1, (3, -1)).mean(-1), None)
    encoder.norm = torch.nn.Identity()
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    clip = torch.stack((y, x, torch.ones(size, size))).float()[None, :, None]
    tokens, step = pictures.dense_tokens(encoder, clip), patch // shifts
    assert tokens.shape == (1, 1, size // step, size // step, 3)
    inside = slice(shifts // 2, -(shifts // 2) or None)  # elsewhere the patch extends beyond the clip
    for channel, axis in ((0, 0), (1, 1)):
        found = tokens[0, 0, inside, inside, channel].mean(1 - axis)
        expected = (torch.arange(size // step) * step + (step - 1) / 2)[inside]
        assert (found - expected).abs().max() <= 0.5
    assert torch.equal(tokens[..., 2], torch.ones_like(tokens[..., 2]))


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_features_as_a_movie(suffix, runs, teacher, student, tmp_path):
    """The clip has four frames, and its features change at every second one. An mp4 plays four times."""
    file = tmp_path / "new" / f"x.{suffix}"
    snapshot = runs / "student-snapshots" / "checkpoint-000002.pt"
    run_script(analyze, "features", teacher, student, snapshot, "--clips", 2, "--save", file)
    if suffix == "gif":
        image = PIL.Image.open(file)
        assert image.is_animated and image.n_frames == 4
        frames = []
        for n in range(4):
            image.seek(n)
            frames.append(np.asarray(image.convert("RGB")))
    else:
        with av.open(str(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) % 4 == 0
        assert np.abs(frames[0].astype(int) - frames[-4]).mean() < 1
        assert not any(n % 2 for n in frames[0].shape[:2])
    assert min(frames[0].shape[:2]) > 100 and all(frame.std() > 5 for frame in frames)
    assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in zip(frames[:3], frames[1:4], strict=True))


def test_videos_of_different_lengths_play_together(tmp_path):
    def gray(*values):
        return torch.tensor(values, dtype=torch.uint8).view(1, 1, -1, 1, 1).expand(1, 3, -1, 8, 8)

    videos = [("clip", gray(20, 80, 160, 240)), ("run", gray(50, 200))]
    pictures.draw(videos, tmp_path / "x")
    assert ink(tmp_path / "x.png") > 5
    image, found = PIL.Image.open(tmp_path / "x.gif"), []
    for n in range(image.n_frames):
        image.seek(n)
        found.append(
            [image.convert("RGB").getpixel((image.width * 3 // 4, int(y * image.height)))[0] for y in (0.25, 0.75)]
        )
    assert np.abs(np.array(found) - [(20, 50), (80, 50), (160, 200), (240, 200)]).max() < 8


def test_what_the_teacher_fills_in_does_not_depend_on_hidden_pixels(teacher, student, drawn, monkeypatch):
    """Nor does what it sees, whatever the brightness, contrast and content of hidden tubelets."""
    clips = data.Synthetic(4, 32, 1).batch(range(2)).clips
    mask = sample_masks("multiblock", (2, 4, 4), 2, generator("picture", pictures.MASK), "random")[0]
    visible = torch.zeros(2, 32, dtype=torch.bool).scatter(1, mask.context_ids, True)
    pixels = tubelets(clips, 2, 8)
    pixels[~visible] = (pixels[~visible] * 0.4 + 120).to(torch.uint8)
    for shown in (clips, untubelets(pixels, (2, 4, 4), 2, 8)):
        monkeypatch.setattr(pictures, "load_clips", lambda *_, shown=shown: shown)
        run_script(analyze, "picture", teacher, student, "--clips", 2)
    before, after = (cells_of(figure, 4, 2, 4) for figure in drawn)
    assert np.abs(before[0].astype(int) - after[0]).mean() > 10
    assert np.array_equal(before[1:3], after[1:3]) and not np.array_equal(before[3], after[3])
    seen, filled = (tubelets(torch.from_numpy(row).permute(0, 4, 1, 2, 3), 2, 8).int() for row in before[1:3])
    own = tubelets(clips, 2, 8).int()
    assert (seen[visible] - own[visible]).abs().max() <= 1 and (seen[~visible] == 128).all()
    assert (filled[visible] - own[visible]).abs().max() <= 1
    assert filled[~visible].float().std(1).min() > 0


def test_brightness_and_contrast_are_those_that_join_tubelets(teacher, drawn, monkeypatch):
    """A teacher that predicts the normalized pixels of a smooth clip correctly restores the clip."""
    t, y, x = torch.meshgrid(torch.arange(4), torch.arange(32), torch.arange(32), indexing="ij")
    waves = [torch.sin(a * x + b * y + 0.1 * t) for a, b in ((0.2, 0.1), (-0.1, 0.25), (0.15, -0.2))]
    clips = (torch.stack(waves) * 100 + 128).to(torch.uint8)[None]
    pixels = tubelets(data.normalize(clips, "cpu"), 2, 8).unflatten(-1, (3, -1))
    normal = ((pixels - pixels.mean(-1, keepdim=True)) / pixels.std(-1, keepdim=True)).flatten(2)
    monkeypatch.setattr(pictures, "load_clips", lambda *_: clips)
    monkeypatch.setattr(pictures, "load_predictor", lambda _: lambda _x, _c, target_ids, *_: normal[:, target_ids[0]])
    run_script(analyze, "picture", teacher, "--clips", 1)
    clip, seen, filled = cells_of(drawn[0], 3, 1, 4).astype(int)
    assert (seen == 128).all(-1).mean() > 0.3
    assert np.abs(filled - clip).mean() < 6  # 27 with the mean brightness and contrast of what it sees


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.fixture(scope="module")
def broken(teacher, tmp_path_factory):
    """A folder of broken run folders."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty").mkdir()
    for name, text in {"cut": '{"weights": "enc', "other": "{}", "list": "[1, 2]", "blank": ""}.items():
        (folder / name).mkdir()
        for file in ("results.json", "metrics.jsonl", "args.json", "checkpoint.pt"):
            (folder / name / file).write_text(text)
    return folder


COMMANDS = ["curves", "picture", "features", "rankme", "table", "pareto", "correlate"]


@pytest.mark.parametrize("name", ["missing", "empty", "cut", "other", "list", "blank"])
@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_runs_end_in_one_line(command, name, broken, tmp_path, capfd):
    """The line names the folder."""
    error = refusal(capfd, analyze, command, broken / name, "--save", tmp_path / "x")
    assert str(broken / name) in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["table", "pareto", "correlate"])
def test_probes_of_missing_checkpoints(command, student, probe_of, tmp_path, capfd):
    """The checkpoint is gone, or its teacher is."""
    checkpoint = load_checkpoint(student)
    checkpoint["args"]["teacher"] = str(tmp_path / "gone")
    torch.save(checkpoint, tmp_path / "orphan.pt")
    for gone in (tmp_path / "gone", tmp_path / "orphan.pt"):
        error = refusal(capfd, analyze, command, *[probe_of(gone, 10.0)] * 3, "--save", tmp_path / "x.png")
        assert f"no checkpoint at {tmp_path / 'gone'}" in error and not (tmp_path / "x.png").exists()


def test_log_with_an_incomplete_last_line(student, tmp_path):
    """A killed run may leave half a line; the lines before it are read."""
    run = shutil.copytree(student, tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert analyze.lineage(run)[0].loss == last_line(student)["loss"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["picture", "STUDENT", "TEACHER"], "holds student weights; only a teacher predicts pixels"),
        (["picture", "EMA"], "holds ema weights; only a teacher predicts pixels"),
        (["features", "STUDENT", "--data", "nowhere.csv"], "nowhere.csv"),
        (["features", "STUDENT", "--clips", "0"], "--clips"),
        (["rankme", "STUDENT", "--clips", "0"], "--clips"),
        (["rankme", "STUDENT", "--data", "nowhere.csv"], "nowhere.csv"),
        (["curves"], "RUN"),
        (["table", "STUDENT"], "results.json"),
        (["show", "STUDENT"], "show"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, runs, tmp_path, capfd):
    flags = [str(runs / f.lower()) if f.isupper() else f for f in flags]
    if flags[0] in COMMANDS:
        flags += ["--save", tmp_path / "x.png"]
    assert message in refusal(capfd, analyze, *flags)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu(teacher, tmp_path, capfd):
    refusal(capfd, analyze, "rankme", teacher, "--device", "cuda", "--clips", 4, "--save", tmp_path / "x.json")
