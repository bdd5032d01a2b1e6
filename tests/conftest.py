"""Shared by several test files: small videos with numbered frames, and tiny training runs in this process."""

import json
import os
import shlex
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

import train_ema_baseline
import train_student
import train_teacher
from model import load_checkpoint
from video import read_clips

os.environ["OMP_NUM_THREADS"] = "1"  # for loader workers and subprocesses
torch.set_num_threads(1)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# 4 frames of 32x32 in tubelets of 2x8x8: a grid of (2, 4, 4), 32 tokens.
TINY = shlex.split(
    "--width 32 --depth 1 --heads 2 --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 16 "
    "--predictor-depth 1 --predictor-heads 2 --batch-size 4 --steps 6 --warmup-steps 2 --workers 0 --device cpu "
    "--log-every 1 --clip-grad 1 --lr 3e-3"
)
# The metrics of a log line that do not depend on how fast the machine is.
EXACT_METRICS = shlex.split("step loss grad_norm lr weight_decay context_kept target_kept flops")

# ---------------------------------------------------------------------------------------------------------------------
# videos and images


def numbered(n, size=32):
    """A gray frame that encodes n < 256 as brightness: the low four bits on the left, the high four on the right."""
    frame = np.empty((size, size, 3), np.uint8)
    frame[:, : size // 2], frame[:, size // 2 :] = n % 16 * 16 + 8, n // 16 * 16 + 8
    return frame


def frame_numbers(frames):
    """The numbers that `numbered` encoded in the frames of a clip (T, 3, H, W)."""
    low, high = (half.float().mean((1, 2, 3)).div(16).floor().int() for half in frames.chunk(2, dim=3))
    return (low + 16 * high).tolist()


def write_video(path, frames, gop=12, bframes=0, rate=25, codec="libx264", start=0, pts=None, open_gop=False):
    """Encode frames, (H, W, 3) arrays. Frame i has time stamp start + pts[i], or start + i without pts, in frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.time_base = stream.codec_context.time_base = 1 / Fraction(rate)
        if codec == "libx264":
            stream.options = {"g": str(gop), "bf": str(bframes), "b-adapt": "0", "sc_threshold": "0", "qp": "4"}
            stream.options |= {"x264-params": "open-gop=1"} if open_gop else {}
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i, array in enumerate(frames):
            if i == 0:
                stream.height, stream.width = array.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = start + (pts[i] if pts else i), 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_images(folder, names):
    """Write numbered images; the number counts the names."""
    folder.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        PIL.Image.fromarray(numbered(n % 256)).save(folder / name, quality=98)


def set_matrix(path, matrix):
    """Write a display matrix (a, b, c, d), -1, 0 or 1 each, into the header of an mp4 file. Returns its path."""
    a, b, c, d = matrix
    old, new = (struct.pack(">5i", *(n << 16 for n in numbers)) for numbers in ((1, 0, 0, 0, 1), (a, b, 0, c, d)))
    header, rest = path.read_bytes().split(b"tkhd", 1)
    path.write_bytes(header + b"tkhd" + rest.replace(old, new, 1))
    return path


def read_clip(path, num_frames, frame_step, place, fps=None):
    """Read one clip of whole frames."""
    return read_clips(path, num_frames, frame_step, [place], fps)[0]


def flat(value, size=32):
    """A frame of a single gray value."""
    return np.full((size, size, 3), value, np.uint8)


def write_image(image, path):
    """Write a uint8 image (3, H, W) in the format of the path's suffix."""
    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# networks and scripts


def randomize(module):
    """Set every parameter, even those initialized to zero, to fixed random values. Returns the module in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name and "weight" in name))
    return module.eval()


def run_script(module, *flags):
    """Run a script's main() with these flags, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        module.main()


def refusal(capfd, module, *flags):
    """Run a script that must exit with status 2 and a one-line error. Returns that line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(module, *flags)
    error, status = capfd.readouterr().err, stop.value.code
    del stop  # its traceback and this frame form a cycle, which would keep the refused run and its lock alive
    assert status == 2
    assert error.startswith(f"{Path(module.__file__).name}: ") and error.count("\n") == 1, error
    return error


def extra_flags(script, teacher):
    """The flags of a training script beyond those that all of them have. The EMA teacher moves visibly."""
    return {train_student: ("--teacher", teacher), train_ema_baseline: ("--ema-momentum", 0.9)}.get(script, ())


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a finished tiny stage-1 run."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    run_script(train_teacher, *TINY, "--out", out)
    return out


@pytest.fixture(scope="session")
def student(teacher):
    """The folder of a finished tiny stage-2 run. The student is wider than its teacher."""
    out = teacher.parent / "student"
    run_script(train_student, *TINY, "--width", 48, "--out", out, "--teacher", teacher)
    return out


@pytest.fixture(scope="session")
def ema(tmp_path_factory):
    """The folder of a finished tiny run of the baseline, with the default EMA flags."""
    out = tmp_path_factory.mktemp("runs") / "ema"
    run_script(train_ema_baseline, *TINY, "--out", out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves behind


def read_metrics(out, *names):
    """The lines of a run's metrics.jsonl: dictionaries, or lists of the named metrics."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines] if names else lines


def saved_states(out):
    """The names of everything in a run's resume/ folder, sorted."""
    return sorted(path.name for path in (out / "resume").iterdir())


def same_tensors(a, b):
    """Whether two state dicts hold the same tensors, to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def same_checkpoints(a, b):
    """Whether two runs saved the same step and the same weights, to the last bit."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    networks = {"encoder", "predictor", "student"} & a.keys()
    return a["step"] == b["step"] and a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in networks)
