"""bench/attention.py: it times every attention of a training step."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from test_bench_step import TINY, tiny_args, tiny_ours

from bench import attention as bench_attention
from bench import step as bench_step


def test_shapes_are_those_of_a_training_step(monkeypatch):
    args, seen = tiny_args("--batch-size", 3), {}
    ours = tiny_ours("student", args)

    def attend(q, k, v):
        seen[tuple(q.shape)] = q.requires_grad
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("model.attend", attend)
    bench_step.training_step(ours, bench_step.WARMUP_STEPS, bench_step.random_clips(args))
    assert dict(bench_attention.attention_shapes(ours.stage, args).values()) == seen


def test_padding_does_not_change_the_result():
    qkv = torch.randn(2, 7, 3, 4, 12, requires_grad=True)
    plain, padded = (bench_attention.attention(qkv, size) for size in (12, 16))
    expected = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(padded, expected)
    gradients = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (plain, padded))
    torch.testing.assert_close(*gradients)


def test_prints_a_row_for_each_shape_and_padding(capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench_step, "now", lambda args: next(clock))  # each round takes a second
    run_script(bench_attention, *TINY, "--device", "cpu", "--batch-size", 3, "--rounds", 1, "--calls", 2)
    rows = {line[:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()[4:]}
    assert list(rows) == ["teacher", *(f"{part}, mask {i}" for i in (1, 2) for part in ("encoder", "predictor"))]
    *shape, _, padded, choice_ms, choice, flash_ms, flash, cudnn, efficient, math_ms, math = rows["teacher"]
    assert shape == ["3", "x", "2", "x", "32", "x", "12"] and padded == "16"  # the second of its two rows
    assert (choice_ms, flash_ms, math_ms, cudnn, efficient) == ("500.00", "500.00", "500.00", "-", "-")
    work = 4 * 3 * 2 * 32 * 32 * 12  # the forward pass: two products of 32 x 32 x 12
    assert float(choice) == float(flash) == float(math) == pytest.approx(work / 0.5 / 1e12, rel=1e-3)
