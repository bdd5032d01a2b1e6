"""What several tests need: small videos whose frames carry their number, the scripts run in this process, tiny runs."""

import os
import shlex
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for loader workers and subprocesses
torch.set_num_threads(1)

# For tests that a machine with a GPU runs on it as well: `pytest -k cuda`.
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# 4 frames of 32x32 in tubelets of 2x8x8: a grid of (2, 4, 4), 32 tokens.
TINY = shlex.split(
    "--width 32 --depth 1 --heads 2 --patch-size 8 --num-frames 4 --resolution 32 --predictor-width 16 "
    "--predictor-depth 1 --predictor-heads 2 --batch-size 4 --steps 6 --warmup-steps 2 --workers 0 --device cpu "
    "--log-every 1 --save-every 2 --clip-grad 1 --lr 3e-3"
)


def numbered(n, size=32):
    """A gray frame that carries n < 256: its low four bits in the brightness of the left half, the high ones right."""
    frame = np.empty((size, size, 3), np.uint8)
    frame[:, : size // 2], frame[:, size // 2 :] = n % 16 * 16 + 8, n // 16 * 16 + 8
    return frame


def frame_numbers(frames):
    """What `numbered` put into the frames of a clip (T, 3, H, W)."""
    low, high = (half.float().mean((1, 2, 3)).div(16).floor().int() for half in frames.chunk(2, dim=3))
    return (low + 16 * high).tolist()


def write_video(path, frames, gop=12, bframes=0, rate=25, codec="libx264", start=0, pts=None):
    """Encode frames (an iterable of (H, W, 3) arrays); `start` shifts the time stamps, pts gives them, in frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.time_base = 1 / Fraction(rate)
        stream.codec_context.time_base = 1 / Fraction(rate)
        if codec == "libx264":
            stream.options = {"g": str(gop), "bf": str(bframes), "b-adapt": "0", "sc_threshold": "0", "qp": "4"}
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i, array in enumerate(frames):
            if i == 0:
                stream.height, stream.width = array.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = start + (pts[i] if pts else i), 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def flat(value, size=32):
    return np.full((size, size, 3), value, np.uint8)


def write_image(image, path):
    """Write a uint8 image (3, H, W) in the format of the path's suffix."""
    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def randomize(module):
    """Give every parameter, zero-initialized ones too, values that matter; deterministic."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name and "weight" in name))
    return module.eval()


def run_script(module, *flags):
    """Call a script's main() with these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        module.main()


def refusal(capfd, module, *flags):
    """Run a script that must refuse: exit status 2 and one line on stderr, which is returned."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(module, *flags)
    error = capfd.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"{Path(module.__file__).name}: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a finished tiny stage-1 run."""
    import train_teacher

    out = tmp_path_factory.mktemp("runs") / "teacher"
    run_script(train_teacher, *TINY, "--out", out)
    return out


@pytest.fixture(scope="session")
def student(teacher):
    """The folder of a finished tiny stage-2 run, of another width than its teacher."""
    import train_student

    out = teacher.parent / "student"
    run_script(train_student, *TINY, "--width", 48, "--out", out, "--teacher", teacher)
    return out
