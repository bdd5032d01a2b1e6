"""bench.py: the peer computes the same losses as ours, and the numbers printed are those measured."""

import re
import sys

import pytest
import torch
from conftest import TINY, flat, refusal, run_script, write_video

import bench

STEP = ["step", *TINY, "--rounds", 2]


@pytest.mark.parametrize("kind", ["teacher", "student", "ema"])
def test_hugging_faces_networks_compute_the_same(kind, capfd):
    pytest.importorskip("transformers")
    run_script(bench, *STEP, "--kind", kind, "--peer", "hf", "--teacher", "vit_ti")
    ours, theirs = capfd.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(rf"{kind}, float32, eager: \S+ \(\S+ to \S+\) ms per step of 4 clips, .* GiB .*; 2 steps", ours)
    assert re.fullmatch(r"hf: \S+ \(\S+ to \S+\) times as long; its losses differ by up to \S+", theirs)


def test_a_peer_that_computes_something_else_is_refused(monkeypatch, capfd):
    predict = bench.HuggingFace.predict
    monkeypatch.setattr(bench.HuggingFace, "predict", lambda self, clips, mask: predict(self, clips.flip(2), mask))
    assert "the losses differ" in refusal(capfd, bench, *STEP, "--kind", "teacher", "--peer", "hf")


def test_speed_is_computed_from_times_and_flops(monkeypatch, capfd):
    """Every reading of the clock is one second later; a step of 4 clips costs 4e8 FLOPs."""
    seconds = iter(range(1000))
    monkeypatch.setattr(bench, "now", lambda device: next(seconds))
    monkeypatch.setattr(bench, "matmul_peak", lambda args: 1e9)
    monkeypatch.setattr(bench.flops, "step_flops", lambda *_: 1e8)
    run_script(bench, *STEP, "--kind", "teacher")
    line = capfd.readouterr().out.splitlines()[-1]
    assert "1000.0 (1000.0 to 1000.0) ms" in line and "0.0004 TFLOP/s = 40% of" in line


def test_the_loader_is_compared_clip_by_clip(tmp_path, monkeypatch, capfd):
    write_video(tmp_path / "x.mp4", [flat(5 * n, 64) for n in range(24)])
    (tmp_path / "m.csv").write_text("x.mp4 0\n")
    monkeypatch.setattr(bench, "their_clip", bench.our_clip)
    threads = torch.get_num_threads()
    flags = ["--data", tmp_path / "m.csv", "--rounds", 3, "--num-frames", 4, "--frame-step", 2, "--resolution", 32]
    run_script(bench, "loader", *flags)
    torch.set_num_threads(threads)
    assert "3 clips of 4 frames, 32x32" in capfd.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "decord", None)
    assert "decord" in refusal(capfd, bench, "loader", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [([], "arguments are required: what"), (["loader"], "needs --data"), ([*STEP, "--heads", 3], "3 heads")],
)
def test_mistakes_are_one_line_errors(flags, message, capfd):
    assert message in refusal(capfd, bench, *flags)
