"""physics.py: the surprise of a video, checkpoints, pairing and layouts of datasets, results."""

import argparse
import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import flat, frame_numbers, numbered, randomize, refusal, run_script, same_tensors, write_video

import data
import physics
import train_teacher
from model import Encoder, Predictor, load_checkpoint
from video import BadVideo

ENCODER = Encoder(32, 1, 2, num_frames=8, resolution=32, patch_size=8)


def physics_args(*flags):
    """Flags parsed and resolved as in physics.py, for an encoder of 8 frames of 32x32 in tubelets of 2x8x8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["physics.py", "--device", "cpu", *map(str, flags)])
        args = physics.parse_args()
    physics.resolve_window(args, ENCODER)
    return args


@pytest.mark.parametrize("predicts", ["latents", "pixels"])
def test_surprise_is_the_prediction_error_of_each_window(predicts):
    encoder, teacher = randomize(ENCODER), randomize(Encoder(48, 1, 2, num_frames=8, resolution=32, patch_size=8))
    predictor = randomize(Predictor(32, 48 if predicts == "latents" else 384, 16, 1, 2))
    networks = encoder, predictor, teacher if predicts == "latents" else None
    video = torch.randint(256, (13, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    args = physics_args("--context-lengths", 6, 2, "--batch-size", 2)
    measured = physics.surprise(networks, video, args)
    # Windows start at frames 0, 2 and 4; frame 12 fills none.
    clips = data.normalize(torch.stack([video[t : t + 8] for t in (0, 2, 4)]).transpose(1, 2), "cpu")
    ids = torch.arange(64).expand(3, -1)
    if predicts == "latents":  # as in train_student.py
        targets = torch.nn.functional.layer_norm(teacher(clips), (48,))
    else:
        targets = train_teacher.pixel_targets(clips, 2, 8)
    expected = []
    for seen in (16, 48):  # 2 and 6 frames
        with torch.no_grad():
            predicted = predictor(encoder(clips, ids[:, :seen]), ids[:, :seen], ids[:, seen:], (4, 4, 4), 0)
        expected.append((predicted - targets[:, seen:]).abs().mean((1, 2)))
    torch.testing.assert_close(measured, torch.stack(expected))
    padded = torch.cat((video[:5], video[4:5], video[4:5], video[4:5]))  # a short video repeats its last frame
    assert torch.equal(physics.surprise(networks, video[:5], args), physics.surprise(networks, padded, args))


def test_defaults_are_the_protocols(tmp_path):
    found = {}
    for task in ("intphys", "grasp", "inflevel", "pairs"):
        args = physics_args("--task", task, "--data", tmp_path)
        found[task] = (args.num_frames, args.frame_step, args.context_lengths)
    assert found["intphys"] == (16, 2, [2, 4, 6, 8, 10]) and found["grasp"] == (16, 10, [2, 4, 6, 8, 10])
    assert found["inflevel"] == (32, 5, [4, 8, 12, 16, 20]) and found["pairs"] == (8, 1, [2, 4])


def test_networks_of_each_kind_of_checkpoint(teacher, student, ema, tmp_path):
    own = load_checkpoint(ema)
    both, single = tmp_path / "both.pt", tmp_path / "single.pt"  # as tools/convert.py writes V-JEPA 2
    torch.save(own | {"kind": "vjepa2", "args": {}}, both)
    torch.save({name: value for name, value in own.items() if name != "student"} | {"kind": "vjepa2"}, single)
    for run, context, target in (
        (student, load_checkpoint(student)["encoder"], load_checkpoint(teacher)["encoder"]),
        (teacher, load_checkpoint(teacher)["encoder"], None),
        (ema, own["student"], own["encoder"]),
        (both, own["student"], own["encoder"]),
        (single, own["encoder"], own["encoder"]),
    ):
        networks, step = physics.load_networks(physics_args("--checkpoint", run))
        assert step == 6
        for network, weights in zip(networks, (context, load_checkpoint(run)["predictor"], target), strict=True):
            assert same_tensors(network.state_dict(), weights) if weights else network is None
    assert not same_tensors(own["student"], own["encoder"])


def test_untrained_randomizes_all_networks(student, ema):
    for run in (student, ema):
        a, b = (physics.load_networks(physics_args("--checkpoint", run, *flags))[0] for flags in ((), ["--untrained"]))
        assert not any(same_tensors(x.state_dict(), y.state_dict()) for x, y in zip(a, b, strict=True))
        assert same_tensors(b[0].state_dict(), b[2].state_dict()) == (run == ema)  # it starts as a copy


def test_a_student_needs_its_teacher(teacher, student, ema, tmp_path, capfd):
    checkpoint, alone = load_checkpoint(student), tmp_path / "alone.pt"
    checkpoint["args"]["teacher"] = str(tmp_path / "moved")
    torch.save(checkpoint, alone)
    assert "moved" in refusal(capfd, physics, "--checkpoint", alone)
    assert all(physics.load_networks(physics_args("--checkpoint", alone, "--teacher", teacher))[0])
    del checkpoint["predictor"]
    torch.save(checkpoint, alone)
    assert "holds no predictor" in refusal(capfd, physics, "--checkpoint", alone)
    for run in (teacher, ema):
        assert "only a student" in refusal(capfd, physics, "--checkpoint", run, "--teacher", teacher)


def test_wrong_flags_end_the_run_with_one_line(student, tmp_path, capfd):
    for flags, message in (
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--context-lengths", 3], "must be multiples of 2 frames"),
        (["--context-lengths", 4], "contexts shorter than 4"),
        (["--frame-step", 2], "--task synthetic renders its own videos"),
        (["--task", "grasp"], "needs --data"),
        (["--task", "grasp", "--data", "nowhere"], "no pairs of grasp"),
        (["--task", "pairs", "--data", "nowhere.csv"], "No such file"),
    ):
        assert message in refusal(capfd, physics, "--checkpoint", student, "--out", tmp_path, *flags)


def write_folder(folder, frames):
    folder.mkdir(parents=True)
    for n, frame in enumerate(frames, start=1):
        PIL.Image.fromarray(frame).save(folder / f"scene_{n:03}.png")
    return folder


@pytest.mark.parametrize(
    "task, step, start, numbers",
    [("pairs", 10, 7, range(7, 100, 10)), ("intphys", 2, 0, range(0, 97, 2)), ("intphys", 10, 0, range(0, 90, 10))],
)
def test_read_video_returns_every_nth_frame(task, step, start, numbers, tmp_path):
    frames = [numbered(n, 64) for n in range(100)]
    args = physics_args("--task", task, "--data", tmp_path, "--frame-step", step)
    for path in (write_video(tmp_path / "v.mp4", frames), write_folder(tmp_path / "frames", frames)):
        assert frame_numbers(physics.read_video(path, args, start)) == list(numbers)
        with pytest.raises(BadVideo, match="no frames from frame 100 on"):
            physics.read_video(path, args, start=100)


@pytest.mark.parametrize("task, square", [("intphys", True), ("grasp", True), ("inflevel", False)])
def test_only_intphys_and_grasp_frames_are_cropped_to_a_square(task, square, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(47, 128, 3), dtype=np.uint8)
    video = physics.read_video(write_folder(tmp_path / "video", [pixels]), physics_args("--task", task, "--data", "x"))
    expected = torch.from_numpy(pixels[:, 40:87] if square else pixels).permute(2, 0, 1)[None].float()
    # The authors resize with this function: bilinear, without antialiasing. Ours rounds to whole gray levels.
    expected = torch.nn.functional.interpolate(expected, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(video.float(), expected, atol=1, rtol=0)


def test_broken_videos_end_the_run_with_one_line(student, tmp_path, capfd):
    good = write_video(tmp_path / "good.mp4", [flat(n) for n in range(8)])
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:400])
    write_intphys(tmp_path / "O1" / "01", [[1]] * 4, (True, True, True, False))
    flags = "--checkpoint", student, "--out", tmp_path, "--task"
    for text, workers, message in (
        ("possible,impossible\ngood.mp4,cut.mp4\n", 0, "cut.mp4"),
        ("possible,impossible\ngood.mp4,cut.mp4\n", 1, "cut.mp4"),
        ("possible,impossible\ngood.mp4,none.mp4\n", 0, "none.mp4 does not exist"),
        ("possible,other\ngood.mp4,good.mp4\n", 0, "has no 'impossible'"),
    ):
        (tmp_path / "pairs.csv").write_text(text)
        error = refusal(capfd, physics, *flags, "pairs", "--data", tmp_path / "pairs.csv", "--workers", workers)
        assert message in error and error.startswith("physics.py: unreadable video: ") == (message == "cut.mp4")
    assert "3 possible and 1 impossible" in refusal(capfd, physics, *flags, "intphys", "--data", tmp_path)


def write_intphys(root, beginnings, possible):
    """Write a scene of 12-frame movies. Movie n shows the gray levels beginnings[n - 1], then a level of its own."""
    for n, (beginning, is_possible) in enumerate(zip(beginnings, possible, strict=True), start=1):
        frames = [flat(value) for value in beginning] + [flat(200 + 10 * n)] * (12 - len(beginning))
        write_folder(root / str(n) / "scene", frames)
        (root / str(n) / "status.json").write_text(json.dumps({"header": {"is_possible": is_possible}}))


@pytest.mark.parametrize(
    ("possible", "partners"), [((False, True, True, False), "abab"), ((True, False, False, True), "aabb")]
)
def test_intphys_movies_are_paired_by_their_common_beginning(possible, partners, tmp_path):
    # Any two movies share the first 2 frames. The two that start with "a" share 8, the two with "b" share 6.
    beginnings = {"a": [1, 2, 3, 4, 5, 6, 7, 8], "b": [1, 2, 30, 40, 50, 60]}
    write_intphys(tmp_path / "O2" / "01", [beginnings[partner] for partner in partners], possible)
    args = physics_args("--task", "intphys", "--data", tmp_path, "--frame-step", 1)
    (item,) = physics.find_items(args)
    pairs = physics.read_pairs(args, item)
    assert sorted(physics.shared_frames(a, b) for _, _, a, b in pairs) == [6, 8]
    for property, name, *videos in pairs:
        movies = [int(path.split("/")[-2]) for path in name.split(" | ")]
        assert property == "O2" and [possible[movie - 1] for movie in movies] == [True, False]
        assert [video[-1, 0, 0, 0] for video in videos] == [200 + 10 * movie for movie in movies]


def test_grasp_layout(tmp_path):
    expected = []
    for name in ("Gravity/1.mp4", "Inertia2/7.mp4"):
        possible, impossible = tmp_path / f"P_{name}", tmp_path / f"IP_{name}"
        expected.append(physics.Item(name.split("/")[0], [possible], [impossible]))
        for path in (possible, impossible):
            path.parent.mkdir()
            path.touch()
    assert physics.find_items(physics_args("--task", "grasp", "--data", tmp_path)) == expected


def test_inflevel_layout(tmp_path):
    write_video(tmp_path / "a.mp4", [numbered(n) for n in range(60)])
    write_video(tmp_path / "b.mp4", [numbered(100 + n) for n in range(57)])
    header = "vid1_path,vid2_path,vid1_label,vid1_end_priming_2,vid2_end_priming_2\n"
    (tmp_path / "continuity.csv").write_text(f"{header}a.mp4,b.mp4,possible,9,4\n")
    (tmp_path / "solidity.csv").write_text(f"{header}a.mp4,b.mp4,impossible,9,4\n")
    (tmp_path / "gravity.csv").write_text(header)
    args = physics_args("--task", "inflevel", "--data", tmp_path)
    pairs = {item.property: physics.read_pairs(args, item)[0] for item in physics.find_items(args)}
    # After the priming, a has 50 frames and b has 52, so b starts two frames later, at frame 7.
    a, b = list(range(10, 60, 5)), list(range(107, 157, 5))
    for property, expected in (("continuity", [a, b]), ("solidity", [b, a])):
        assert [frame_numbers(video) for video in pairs[property][2:]] == expected


def test_accuracy():
    def absolute(possible, impossible):
        scores = (torch.stack((torch.zeros(len(x)), x), dim=1) for x in (possible, impossible))
        return physics.accuracy(*scores)["absolute_accuracy"]

    means = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.5, 2, 2.5, 9])
    result = physics.accuracy(*(mean[:, None].expand(-1, 2) for mean in means))
    assert result["relative_accuracy"] == 50 and result["pairs"] == 4  # the tie is wrong
    assert result["relative_interval95"] == pytest.approx([15.0, 85.0], abs=0.05)
    # Fewer than ten pairs: the threshold is 4. Three possible videos are below, one impossible video above.
    assert result["absolute_accuracy"] == 50 and result["absolute_interval95"] == physics.interval95(4, 8)
    # The authors' threshold is the score at index ceil(0.9 P), here 9: nine possible videos are below it.
    for score, separated in ((9.0, 9), (9.5, 19)):
        assert absolute(torch.arange(10.0), torch.full((10,), score)) == 100 * separated / 20
    assert absolute(torch.arange(20.0), torch.full((20,), 18.5)) == 100 * 38 / 40  # the threshold is 18


def test_mean_maximum_and_filtered_scores_per_property(capsys):
    a, b = [[1.0, 2, 3], [3, 0, 3]], [[1.0, 2, 4], [0, 0, 3]]  # two context lengths, three windows
    short = [a[0][:2], a[1][:2]]
    pairs = [("Gravity", a, b), ("ObjectPermanence2", b, short)]
    results = [{"property": name, "possible": x, "impossible": y} for name, x, y in pairs]
    table = physics.accuracies([2, 4], results)
    assert list(table["all"]) == [2, 4, "filtered"]
    # Gravity's means: 2 < 7/3, 2 > 1, filtered (1 0 3) 4/3 > (0 0 3) 1. Its maxima: 3 < 4, 3 = 3, 3 = 3.
    # The other's means: 7/3 > 1.5, 1 < 1.5, 1 > 0.5. Its maxima: 4 > 2, 3 = 3, 3 > 1. No possible video is below the
    # threshold if it is alone; of all, the threshold at 2 frames is 4, at others 3.
    for name, expected in (
        ("Gravity", [(100, 50), (0, 0), (0, 0)]),
        ("ObjectPermanence2", [(0, 0), (100, 0), (0, 0)]),
        ("all", [(50, 25), (50, 0), (0, 0)]),
    ):
        assert [(x["relative_accuracy"], x["absolute_accuracy"]) for x in table[name].values()] == expected
    physics.print_accuracies(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["Gravity", "1", "100.0"] and lines[7].split()[:3] == ["Gravity", "1", "50.0"]


def test_results_of_a_run(student, tmp_path):
    run_script(physics, "--checkpoint", student, "--pairs", 6, "--device", "cpu", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["properties"]) == ["permanence", "shape", "continuity", "all"] and results["short_videos"] == 0
    assert results["predicts"] == "latents" and results["args"]["teacher"].endswith("teacher") and results["step"] == 6
    assert results["args"]["context_lengths"] == [2] and len(results["pairs"]) == 6
    assert all(np.shape(pair["possible"]) == (1, 5) for pair in results["pairs"])  # 12 frames, windows of 4
    scores = [np.mean(pair["possible"]) < np.mean(pair["impossible"]) for pair in results["pairs"]]
    assert results["properties"]["all"]["2"]["relative_accuracy"] == pytest.approx(100 * np.mean(scores))


def test_videos_leave_a_worker_as_arrays():
    """Tensors would need /dev/shm, which is too small in Docker."""
    args = argparse.Namespace(task="synthetic", seed=0, num_frames=4, resolution=16)
    ((property, name, *videos),) = physics.read_arrays(args, 0)
    assert [type(video) for video in videos] == [np.ndarray] * 2 and videos[0].shape == (12, 3, 16, 16)
