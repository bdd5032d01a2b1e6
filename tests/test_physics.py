"""Intuitive physics: known surprise of fabricated networks, pairing, the datasets' layouts, what is reported."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import SHARED_DATA, TINY, flat, frame_numbers, numbered, randomize, refusal, run_script, write_video

import data
import physics
import train_ema_baseline
import train_student
import train_teacher
from model import Encoder, Predictor, load_checkpoint
from video import BadVideo


def physics_args(*flags):
    """Parsed and resolved as physics.py does it, for an encoder of 8 frames of 32x32 in tubelets of 2x8x8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["physics.py", "--device", "cpu", *map(str, flags)])
        args = physics.parse_args()
    physics.resolve_window(args, SaysWhatIsBright())
    return args


class SaysWhatIsBright:
    """As encoder and as teacher: a token is (-1, 1) where the picture is bright, (1, -1) where it is dark."""

    tubelet_size, patch_size, width, config = 2, 8, 2, {"num_frames": 8, "resolution": 32}

    def __init__(self):
        self.seen = []  # number of clips, and token ids

    def grid(self, clips):
        return clips.shape[2] // 2, clips.shape[3] // 8, clips.shape[4] // 8

    def __call__(self, clips, context_ids=None):
        self.seen.append((len(clips), context_ids))
        means = clips.unflatten(2, (-1, 2)).unflatten(4, (-1, 8)).unflatten(-1, (-1, 8)).mean((1, 3, 5, 7)).flatten(1)
        tokens = torch.stack((-means.sign(), means.sign()), dim=-1)
        return tokens if context_ids is None else tokens.gather(1, context_ids[..., None].expand(-1, -1, 2))


class PredictsDarkness:
    def __init__(self):
        self.asked = []

    def __call__(self, context, context_ids, target_ids, grid, mask_index):
        self.asked.append((context_ids, target_ids, grid, mask_index))
        return torch.tensor([1.0, -1.0]).expand(*target_ids.shape, 2)


def video_of(bright, size=32):
    """A video (L, 3, R, R) of bright (True) and dark frames."""
    return (torch.tensor(bright)[:, None, None, None] * 255).to(torch.uint8).expand(-1, 3, size, size)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_surprise_of_every_window_is_the_share_of_the_future_that_was_not_predicted(batch_size):
    bright = [n in (8, 9, 10, 11, 16, 17) for n in range(21)]
    encoder, teacher, predictor = SaysWhatIsBright(), SaysWhatIsBright(), PredictsDarkness()
    args = physics_args("--context-lengths", 6, 2, "--batch-size", batch_size, "--mask-index", 1)
    measured = physics.surprise((encoder, predictor, teacher), video_of(bright), args)
    # Windows begin at frames 0, 2, .. 12; frame 20 fills none. Every bright future tubelet is wrong by 2.
    wanted = [[2 * np.mean(bright[t + C : t + 8]) for t in range(0, 13, 2)] for C in (2, 6)]
    torch.testing.assert_close(measured, torch.tensor(wanted, dtype=torch.float32), atol=1e-4, rtol=0)
    assert sum(clips for clips, _ in teacher.seen) == 7  # once per window, not once per context length
    assert sum(clips for clips, _ in encoder.seen) == 14 and all(ids is None for _, ids in teacher.seen)
    for context_ids, target_ids, grid, mask_index in predictor.asked:
        assert grid == (4, 4, 4) and mask_index == 1 and context_ids.shape[1] in (16, 48)
        assert torch.equal(torch.cat((context_ids, target_ids), dim=1)[-1], torch.arange(64))


@pytest.mark.parametrize("length", [1, 5, 7])
def test_a_short_video_is_continued_by_its_last_frame(length):
    networks = SaysWhatIsBright(), PredictsDarkness(), SaysWhatIsBright()
    bright = [n == length - 1 for n in range(length)]
    args = physics_args("--context-lengths", 6)
    assert physics.surprise(networks, video_of(bright), args).tolist() == [[pytest.approx(2, abs=1e-4)]]
    dark = physics.surprise(networks, video_of([False] * length), args)
    assert dark.tolist() == [[pytest.approx(0, abs=1e-4)]]


@pytest.mark.parametrize(
    ("same", "stride", "shared"), [(0, 2, 0), (7, 2, 0), (8, 2, 1), (13, 2, 3), (20, 2, 7), (13, 1, 6)]
)
def test_windows_before_the_event_are_computed_once(same, stride, shared):
    possible, impossible = video_of([n == 9 for n in range(20)]), video_of([n == 9 or n >= same for n in range(20)])
    args = physics_args("--stride", stride)
    encoder, predictor, teacher = SaysWhatIsBright(), PredictsDarkness(), SaysWhatIsBright()
    pair = physics.make_pair("", "", possible, impossible)
    assert pair.same == (same if same != 9 else 10)
    curves = physics.surprise_of_pair((encoder, predictor, teacher), pair, args)
    windows = 12 // stride + 1
    assert sum(clips for clips, _ in teacher.seen) == 2 * windows - shared
    for curve, video in zip(curves, (possible, impossible), strict=True):
        assert torch.equal(curve, physics.surprise((encoder, predictor, teacher), video, args))


@pytest.mark.parametrize("mask_index", [0, 1])
@pytest.mark.parametrize("predicts", ["latents", "pixels"])
def test_surprise_is_what_the_training_scripts_call_targets_and_predictions(predicts, mask_index):
    encoder = randomize(Encoder(32, 1, 2, num_frames=8, resolution=32, patch_size=8))
    teacher = randomize(Encoder(48, 1, 2, num_frames=8, resolution=32, patch_size=8))
    predictor = randomize(Predictor(32, 48 if predicts == "latents" else 384, 16, 1, 2))
    video = torch.randint(256, (11, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    args = physics_args("--context-lengths", 4, "--mask-index", mask_index, "--stride", 3)
    measured = physics.surprise((encoder, predictor, teacher if predicts == "latents" else None), video, args)
    clips = data.normalize(torch.stack((video[:8], video[3:])).transpose(1, 2), "cpu")
    ids = torch.arange(64).expand(2, -1)
    targets = (
        train_student.latent_targets(teacher, clips)
        if predicts == "latents"
        else train_teacher.pixel_targets(clips, 2, 8)
    )
    with torch.no_grad():
        predicted = predictor(encoder(clips, ids[:, :32]), ids[:, :32], ids[:, 32:], (4, 4, 4), mask_index)
    wanted = (predicted - targets[:, 32:]).abs().mean((1, 2))
    torch.testing.assert_close(measured, wanted[None])


@pytest.mark.parametrize(("num_frames", "lengths"), [(8, [2, 4]), (16, [2, 4, 6, 8, 10]), (32, [4, 8, 12, 16, 20])])
def test_context_lengths_of_the_protocol(num_frames, lengths):
    assert physics_args("--num-frames", num_frames).context_lengths == lengths


def test_windows_of_inflevel_and_frame_steps(tmp_path):
    args = {
        task: physics_args("--task", task, "--data", tmp_path) for task in ("intphys", "grasp", "inflevel", "pairs")
    }
    assert [a.num_frames for a in args.values()] == [8, 8, 32, 8]
    assert [a.frame_step for a in args.values()] == [2, 10, 5, 1]


# ---------------------------------------------------------------------------------------------------------------------
# whose surprise


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ema"
    run_script(train_ema_baseline, *TINY, "--ema-momentum", 0.5, "--out", out)
    return out


def weights_equal(network, weights):
    return all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())


def test_which_networks_are_asked(teacher, student, ema):
    for run, context, target in ((student, "encoder", None), (ema, "student", "encoder"), (teacher, "encoder", None)):
        checkpoint = load_checkpoint(run)
        encoder, predictor, target_encoder = physics.load(physics_args("--checkpoint", run))
        assert weights_equal(encoder, checkpoint[context]) and weights_equal(predictor, checkpoint["predictor"])
        if run == teacher:
            assert target_encoder is None
        else:
            assert weights_equal(target_encoder, checkpoint[target] if target else load_checkpoint(teacher)["encoder"])
            assert not (target_encoder.training or encoder.training or predictor.training)
    assert not weights_equal(encoder, load_checkpoint(ema)["encoder"])


def test_untrained_networks_are_others_and_the_teacher_is_one_of_them(teacher, student, ema):
    for run in (student, ema):
        trained = physics.load(physics_args("--checkpoint", run))
        untrained = physics.load(physics_args("--checkpoint", run, "--untrained", "--seed", 3))
        again = physics.load(physics_args("--checkpoint", run, "--untrained", "--seed", 3))
        for a, b, c in zip(trained, untrained, again, strict=True):
            assert not weights_equal(b, a.state_dict()) and weights_equal(b, c.state_dict())
        assert weights_equal(untrained[0], untrained[2].state_dict()) == (run == ema)


def test_a_student_without_its_teacher_is_refused(teacher, student, ema, tmp_path, capfd):
    checkpoint = load_checkpoint(student)
    alone = tmp_path / "alone.pt"
    checkpoint["args"]["teacher"] = str(tmp_path / "moved")
    torch.save(checkpoint, alone)
    out = "--out", tmp_path / "out"
    error = refusal(capfd, physics, "--checkpoint", alone, *out)
    assert "moved" in error and "--teacher" in error
    assert len(physics.load(physics_args("--checkpoint", alone, "--teacher", teacher))) == 3
    del checkpoint["args"]["teacher"]
    torch.save(checkpoint, alone)
    assert "give --teacher" in refusal(capfd, physics, "--checkpoint", alone, *out)
    assert "is not the teacher" in refusal(capfd, physics, "--checkpoint", student, "--teacher", student, *out)
    del checkpoint["predictor"]
    torch.save(checkpoint, alone)
    assert "holds no predictor" in refusal(capfd, physics, "--checkpoint", alone, *out)
    for run in (teacher, ema):
        assert "for students" in refusal(capfd, physics, "--checkpoint", run, "--teacher", teacher, *out)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--mask-index", 2], "has 2 mask tokens"),
        (["--context-lengths", 3], "multiples of 2"),
        (["--context-lengths", 4], "below the window's 4"),
        (["--num-frames", 5], "does not divide"),
        (["--num-frames", 0], "does not divide"),
        (["--frame-step", 2], "--task synthetic renders"),
        (["--task", "grasp"], "needs --data"),
        (["--task", "grasp", "--data", "nowhere"], "no pairs of grasp"),
        (["--task", "pairs", "--data", "nowhere.csv"], "No such file"),
        (["--task", "inflevel", "--data", "nowhere", "--num-frames", 4], "No such file"),
        (["--stride", 0], "at least 1"),
    ],
)  # fmt: skip
def test_wrong_flags_end_in_one_line(flags, says, student, tmp_path, capfd):
    flags = flags if "--checkpoint" in flags else [*flags, "--checkpoint", student]
    assert says in refusal(capfd, physics, *flags, "--out", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# the videos


def write_folder(folder, frames):
    folder.mkdir(parents=True)
    for n, frame in enumerate(frames, start=1):
        PIL.Image.fromarray(frame).save(folder / f"scene_{n:03}.png")
    return folder


def test_frames_of_a_video(tmp_path):
    video = write_video(tmp_path / "v.mp4", [numbered(n, 64) for n in range(50)])
    folder = write_folder(tmp_path / "frames", [numbered(n, 64) for n in range(50)])
    for path in (video, folder):
        assert frame_numbers(physics.read_video(path, 1, 32)) == list(range(50))
        assert frame_numbers(physics.read_video(path, 10, 32, start=7)) == [7, 17, 27, 37, 47]
        with pytest.raises(BadVideo, match="no frames after the first 50"):
            physics.read_video(path, 1, 32, start=50)


def test_the_full_frame_is_resized_not_cropped(tmp_path):
    wide = np.zeros((32, 128, 3), np.uint8)
    wide[:, :16], wide[:, -16:] = 255, 255
    frame = physics.read_video(write_folder(tmp_path / "wide", [wide]), 1, 32)[0]
    assert frame.shape == (3, 32, 32)
    columns = frame.float().mean((0, 1))
    assert columns[:3].min() > 250 and columns[-3:].min() > 250 and columns[6:-6].max() < 5


def test_broken_videos_end_the_run_in_one_line(student, tmp_path, capfd):
    good = write_video(tmp_path / "good.mp4", [flat(n) for n in range(8)])
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:400])
    (tmp_path / "pairs.csv").write_text("possible,impossible\ngood.mp4,cut.mp4\n")
    flags = "--checkpoint", student, "--task", "pairs", "--data", tmp_path / "pairs.csv", "--out", tmp_path
    for workers in (0, 1):
        error = refusal(capfd, physics, *flags, "--workers", workers)
        assert error.startswith("physics.py: unreadable video: ") and "cut.mp4" in error
    (tmp_path / "pairs.csv").write_text("possible,impossible\ngood.mp4,none.mp4\n")
    assert "there is no" in refusal(capfd, physics, *flags)
    (tmp_path / "pairs.csv").write_text("possible,other\ngood.mp4,good.mp4\n")
    assert "a row has no impossible" in refusal(capfd, physics, *flags)


def write_intphys(root, beginnings, possible):
    """A scene of four movies; movie n shows beginnings[n], then its own number."""
    for n, (beginning, is_possible) in enumerate(zip(beginnings, possible, strict=True), start=1):
        frames = [flat(value) for value in beginning] + [flat(200 + 10 * n)] * (12 - len(beginning))
        write_folder(root / str(n) / "scene", frames)
        (root / str(n) / "status.json").write_text(json.dumps({"header": {"is_possible": is_possible}}))


@pytest.mark.parametrize(
    "possible", [(True, True, False, False), (False, True, True, False), (True, False, False, True)]
)
def test_movies_of_intphys_are_paired_by_their_common_beginning(possible, tmp_path):
    # Every two movies share the first 2 frames; 1 and 3 share 8 frames, 2 and 4 share 6, but not with the same label.
    a, b = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 30, 40, 50, 60]
    order = {(True, True, False, False): (a, b, a, b), (False, True, True, False): (a, b, a, b)}.get(
        possible, (a, a, b, b)
    )
    write_intphys(tmp_path / "O2" / "01", order, possible)
    args = physics_args("--task", "intphys", "--data", tmp_path, "--frame-step", 1)
    (item,) = physics.find_items(args)
    pairs = physics.read_pairs(args, item)
    assert sorted(pair.same for pair in pairs) == [6, 8] and all(pair.property == "O2" for pair in pairs)
    for pair in pairs:
        movies = [int(path.split("/")[-2]) for path in pair.name.split(" | ")]
        assert [possible[movie - 1] for movie in movies] == [True, False]
        assert (
            pair.possible[-1, 0, 0, 0] == 200 + 10 * movies[0] and pair.impossible[-1, 0, 0, 0] == 200 + 10 * movies[1]
        )


def test_scenes_of_intphys_must_be_labelled(tmp_path, student, capfd):
    write_intphys(tmp_path / "O1" / "01", [[1]] * 4, (True, True, True, False))
    flags = "--checkpoint", student, "--task", "intphys", "--data", tmp_path, "--out", tmp_path
    assert "3 possible and 1 impossible" in refusal(capfd, physics, *flags)
    (tmp_path / "O1" / "01" / "1" / "status.json").unlink()
    assert "status.json" in refusal(capfd, physics, *flags)


def test_layout_of_grasp(tmp_path):
    for name in ("P_Gravity/1.mp4", "IP_Gravity/1.mp4", "P_Inertia2/7.mp4", "IP_Inertia2/7.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, [flat(50 if name.startswith("P") else 150)] * 25)
    args = physics_args("--task", "grasp", "--data", tmp_path)
    pairs = [physics.read_pairs(args, item)[0] for item in physics.find_items(args)]
    assert [pair.property for pair in pairs] == ["Gravity", "Inertia2"]
    assert all(len(pair.possible) == len(pair.impossible) == 3 for pair in pairs)  # every tenth of 25 frames
    assert all(abs(pair.possible.float().mean() - 50) < 5 < 100 < pair.impossible.float().mean() for pair in pairs)


def test_layout_of_inflevel(tmp_path):
    write_video(tmp_path / "a.mp4", [numbered(n) for n in range(60)])
    write_video(tmp_path / "b.mp4", [numbered(100 + n) for n in range(57)])
    header = "vid1_path,vid2_path,vid1_label,vid1_end_priming_2,vid2_end_priming_2\n"
    (tmp_path / "continuity.csv").write_text(f"{header}a.mp4,b.mp4,possible,9,4\n")
    (tmp_path / "solidity.csv").write_text(f"{header}a.mp4,b.mp4,impossible,9,4\n")
    (tmp_path / "gravity.csv").write_text(f"{header}b.mp4,a.mp4,impossible,4,9\n")
    args = physics_args("--task", "inflevel", "--data", tmp_path)
    pairs = {item.property: physics.read_pairs(args, item)[0] for item in physics.find_items(args)}
    # a has 50 frames after its priming, b 52: b begins two frames later, at frame 7.
    a, b = list(range(10, 60, 5)), list(range(107, 157, 5))
    for property, wanted in (("continuity", (a, b)), ("solidity", (b, a)), ("gravity", (a, b))):
        pair = pairs[property]
        assert (frame_numbers(pair.possible), frame_numbers(pair.impossible)) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# built-in pairs


def objects(video):
    """Where something colorful is, (L, R, R), and its center (x, y) over time, in frame widths; nan where nothing."""
    video = video.float() / 255
    where = video.amax(1) - video.amin(1) > 0.45
    places = (torch.arange(where.shape[-1]) + 0.5) / where.shape[-1]
    count = where.sum((1, 2))
    return where, (where.sum(1) * places).sum(1) / count, (where.sum(2) * places).sum(1) / count


def built_in(property, count, resolution=64):
    first = physics.PROPERTIES.index(property)
    return [physics.synthetic_pair(0, first + len(physics.PROPERTIES) * n, 24, resolution) for n in range(count)]


@pytest.mark.parametrize("property", physics.PROPERTIES)
def test_built_in_pairs_are_the_same_until_the_event(property):
    for pair in built_in(property, 6, resolution=32):
        assert pair.property == property and pair.possible.shape == pair.impossible.shape == (24, 3, 32, 32)
        differs = (pair.possible != pair.impossible).flatten(1).any(1)
        assert not differs[: pair.same].any() and differs[pair.same]
        assert 7 < pair.same <= pair.event < 18 and pair.event - pair.same < 4
        assert (pair.possible[0] != pair.possible[1]).any()  # grain
    again = built_in(property, 2)[1]
    assert torch.equal(again.impossible, built_in(property, 2)[1].impossible)
    assert not torch.equal(again.possible, built_in(property, 1)[0].possible)


def test_built_in_events_are_what_their_names_say():
    for n, pair in enumerate(built_in("permanence", 4)):
        comes_out = [objects(video)[0][-1].any() for video in (pair.possible, pair.impossible)]
        went_in = [objects(video)[0][0].any() for video in (pair.possible, pair.impossible)]
        assert went_in == [n % 2 == 0] * 2 and comes_out == [n % 2 == 0, n % 2 == 1]
        assert not objects(pair.possible)[0][12].any()  # behind the occluder
    for name in ("shape", "color"):
        for pair in built_in(name, 4):
            (a, *_), (b, *_) = objects(pair.possible), objects(pair.impossible)
            apart = (a[-1] ^ b[-1]).sum() / a[-1].sum()
            assert apart > 0.2 if name == "shape" else apart < 0.1, apart
            both = a[-1] & b[-1]
            hues = [video[-1][:, both].float().mean(1).argsort().tolist() for video in (pair.possible, pair.impossible)]
            assert (hues[0] == hues[1]) == (name == "shape")
    for pair in built_in("continuity", 4):
        steps = [objects(video)[2].diff().abs().max() for video in (pair.possible, pair.impossible)]
        assert steps[0] < 0.02 and steps[1] > 0.25
    for pair in built_in("solidity", 4):
        x = [objects(video)[1] for video in (pair.possible, pair.impossible)]
        assert abs(x[0][-1] - x[0][0]) < 0.45 < 0.6 < abs(x[1][-1] - x[1][0])
        assert x[1].diff().sign().unique().numel() == 1
        assert (x[0] - x[0][0]).abs().max() > abs(x[0][-1] - x[0][0]) + 0.1  # it comes back
        area = objects(pair.impossible)[0].sum((1, 2))
        assert area[1:-1].min() > 0.8 * area.max()  # seen all the way through the wall
    for pair in built_in("gravity", 4):
        y = [objects(video)[2] for video in (pair.possible, pair.impossible)]
        assert y[0][-1] > 0.8 and y[1][-1] < 0.2 and abs(y[0][0] - 0.5) < 0.04


# ---------------------------------------------------------------------------------------------------------------------
# what is reported


def test_accuracy():
    result = physics.accuracy(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.5, 2, 2.5, 9]))
    assert result["right"] == 2 and result["relative_accuracy"] == 50 and result["ties"] == 1 and result["pairs"] == 4
    assert result["interval95"] == pytest.approx([15.0, 85.0], abs=0.05)
    assert result["absolute_accuracy"] == 100 * 5 / 8  # four possible ones up to 4, one impossible one above
    assert result["auroc"] == pytest.approx(100 * (1 + 1.5 + 2 + 4) / 16)
    ten = physics.accuracy(torch.arange(10.0), torch.full((10,), 8.5))
    assert ten["absolute_accuracy"] == 95  # the threshold is 8: nine possible ones, and all impossible ones
    same = physics.accuracy(torch.ones(3), torch.ones(3))
    assert (same["relative_accuracy"], same["ties"], same["auroc"]) == (0, 3, 50)


def test_mean_max_and_filtered_scores_per_property():
    possible = torch.tensor([[1.0, 2, 3], [3, 0, 3]])  # two context lengths, three windows
    impossible = torch.tensor([[1.0, 2, 4], [0, 0, 3]])
    summary = physics.summarize([2, 4], [("a", possible, impossible), ("b", impossible, possible[:, :2])])
    assert list(summary) == ["a", "b", "all"] and list(summary["a"]) == [2, 4, "filtered"]

    def right(property):
        return {name: (row["mean"]["right"], row["max"]["right"]) for name, row in summary[property].items()}

    # Means: 2 < 7/3, 2 > 1, filtered (1 0 3) 4/3 > (0 0 3) 1. Maxima: 3 < 4, 3 = 3, 3 = 3.
    assert right("a") == {2: (1, 1), 4: (0, 0), "filtered": (0, 0)}
    # The other way round, two windows: 7/3 > 1.5, 1 < 1.5, 1 > 0.5; maxima 4 > 2, 3 = 3, 3 > 1.
    assert right("b") == {2: (0, 0), 4: (1, 0), "filtered": (0, 0)}
    assert right("all") == {2: (1, 1), 4: (1, 0), "filtered": (0, 0)} and summary["all"][2]["mean"]["pairs"] == 2


def test_a_run_leaves_everything_in_results(student, tmp_path, capsys):
    flags = "--checkpoint", student, "--pairs", 12, "--stride", 1, "--device", "cpu"
    run_script(physics, *flags, "--out", tmp_path, "--save", tmp_path / "frames.png")
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["properties"]) == [*physics.PROPERTIES, "all"]
    assert results["properties"]["all"]["2"]["mean"]["pairs"] == 12 and results["args"]["context_lengths"] == [2]
    assert results["predicts"] == "latents" and results["teacher"].endswith("teacher") and results["step"] == 6
    assert len(results["pairs"]) == 12
    scores = []
    for pair in results["pairs"]:
        assert np.shape(pair["possible"]) == np.shape(pair["impossible"]) == (1, 9)  # 12 frames, windows of 4
        assert pair["possible"][0][: pair["same"] - 3] == pair["impossible"][0][: pair["same"] - 3]
        scores.append(np.mean(pair["possible"]) < np.mean(pair["impossible"]))
    assert sum(scores) == results["properties"]["all"]["2"]["mean"]["right"]
    for name in ("surprise.png", "frames.png"):
        assert PIL.Image.open(tmp_path / name).size[0] > 500
    assert "permanence" in capsys.readouterr().out
    run_script(physics, *flags, "--untrained", "--workers", 1, "--out", tmp_path / "untrained")
    untrained = json.loads((tmp_path / "untrained" / "results.json").read_text())
    assert untrained["weights"] == "untrained" and untrained["pairs"][0]["possible"] != results["pairs"][0]["possible"]
    assert all(math.isfinite(v) for pair in untrained["pairs"] for v in pair["possible"][0])


@pytest.mark.skipif(not (SHARED_DATA / "physics_pairs").is_dir(), reason="needs ../shared/data/physics_pairs")
def test_pairs_of_real_files(student, tmp_path):
    csv = SHARED_DATA / "physics_pairs" / "pairs.csv"
    flags = "--task", "pairs", "--data", csv, "--frame-step", 8
    run_script(physics, "--checkpoint", student, *flags, "--out", tmp_path, "--device", "cpu")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [pair["frames"] for pair in results["pairs"]][:3] == [[25, 25], [21, 21], [8, 8]]
    assert sum(pair["event"] is not None for pair in results["pairs"]) >= 5  # the others differ by little at this size
