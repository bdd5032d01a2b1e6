"""cli.py: one-line errors, the machine, durations, confidence intervals, and files that are never incomplete."""

import argparse

import pytest
import torch

import cli
from model import SIZES


def failure(capfd, function, *args, **options):
    """Call a function that must end the process with status 2. Returns what it prints to stderr, a single line."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **options)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") <= 1
    return error


def test_errors_of_the_parser_are_one_line(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["folder/script.py"])
    error = failure(capfd, cli.training_flags("", "out", 1).parse_args, ["--step", "3"])  # no abbreviations
    assert error == "script.py: unrecognized arguments: --step 3 (--help lists the flags)\n"


def test_which_processes_print_an_error(capfd, monkeypatch):
    def prints(initialized, rank, local_rank, agreed=False):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: initialized)
        return failure(capfd, cli.fail, "message", agreed=agreed) != ""

    assert prints(False, 2, 0) and not prints(False, 3, 1)  # before the process group exists: one process per node
    assert prints(True, 3, 1) and prints(True, 0, 0, agreed=True) and not prints(True, 3, 1, agreed=True)


@pytest.mark.parametrize(
    "variables, found",
    [
        ("", (0, 1)),
        ("RANK= WORLD_SIZE=", (0, 1)),
        ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", (3, 8)),
        ("RANK=0", "only RANK is set: start with torchrun"),
        ("RANK=0 WORLD_SIZE=2", "unset RANK, WORLD_SIZE"),
    ],
)
def test_rank_and_world(variables, found, capfd, monkeypatch):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    if isinstance(found, tuple):
        assert cli.rank_and_world() == found
    else:
        assert found in failure(capfd, cli.rank_and_world)


def test_resolve_device(capfd, monkeypatch):
    def resolved(gpu, bfloat16=True, device=None, dtype=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        args = argparse.Namespace(device=device, dtype=dtype)
        cli.resolve_device(args)
        return args.device, args.dtype

    assert resolved(gpu=True) == ("cuda", "bfloat16") and resolved(gpu=False) == ("cpu", "float32")
    assert resolved(gpu=True, bfloat16=False, dtype="bfloat16") == ("cuda", "bfloat16")
    assert resolved(gpu=True, bfloat16=False) == ("cuda", "float32")
    assert "Tesla V100 has no bfloat16" in capfd.readouterr().out
    assert "no GPU" in failure(capfd, resolved, gpu=False, device="cuda")


def test_default_micro_batch_size_is_the_largest_divisor_up_to_24():
    assert [cli.default_micro_batch_size(clips) for clips in (384, 24, 50, 29, 36, 1)] == [24, 24, 10, 1, 18, 1]


def test_flags_override_the_model_size():
    parser = cli.training_flags("", out="out", steps=1)
    config = cli.encoder_config(parser.parse_args(["--model", "vit_g", "--depth", "2", "--resolution", "32"]))
    assert config == SIZES["vit_g"] | dict(depth=2, num_frames=16, resolution=32, patch_size=16, tubelet_size=2)


def test_duration():
    texts = {0: "0s", 12.4: "12s", 59.6: "1m00s", 200: "3m20s", 3599.7: "1h00m", 3725: "1h02m"}
    assert {seconds: cli.duration(seconds) for seconds in texts} == texts


def test_interval95():
    """Wilson's score interval; 81 of 263 is the example of Newcombe (1998), table I: 0.2553 to 0.3662."""
    assert cli.interval95(81, 263) == pytest.approx([25.529, 36.617], abs=0.01)
    assert cli.interval95(0, 10) == pytest.approx([0, 27.753], abs=0.01)


def test_write_atomically_replaces_the_file_only_when_it_is_complete(tmp_path):
    path = tmp_path / "results.json"
    cli.write_lines(path, ["first"])
    with pytest.raises(ZeroDivisionError):
        cli.write_atomically(path, lambda file: file.write_text("sec") / 0)
    assert path.read_text() == "first\n"
    cli.write_lines(path, ["second"])
    assert path.read_text() == "second\n" and list(tmp_path.iterdir()) == [path]
