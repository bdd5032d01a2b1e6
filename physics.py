"""Violation of expectation: of a possible and an impossible video, is the prediction error larger for the impossible?

    python physics.py --checkpoint out/student                # built-in pairs, no files needed
    python physics.py --task intphys --data IntPhys/dev       # O1, O2, O3
    python physics.py --task grasp --data GRASP/level2        # P_Gravity, IP_Gravity, ...
    python physics.py --task inflevel --data inflevel         # continuity.csv, solidity.csv, gravity.csv
    python physics.py --task pairs --data pairs.csv           # columns: possible, impossible, property (optional)

The protocol is Garrido et al. 2025 (arXiv 2502.11831), as in paper appendix D and table 9; docs/method.md section 7.
A window of M frames slides over the video. The encoder sees the first C frames of the window, the predictor predicts
the tokens of all later frames, and the surprise is the mean absolute error. A video's score is the mean (or maximum)
surprise over its windows; a pair is correct if the possible video has the lower score. "filtered" uses the smallest
surprise of each window over all context lengths. The protocol's relative accuracy is that of the mean scores, its
absolute accuracy that of the maximum scores; results.json has both accuracies of both scores.

The checkpoint decides what is predicted. A student predicts the latents of its teacher: the one recorded in the
checkpoint, or --teacher. The student of an EMA run predicts the latents of its EMA teacher, and V-JEPA 2's encoder
those of its target_encoder (tools/convert.py keeps both). A stage-1 teacher predicts normalized pixels.

Writes results.json, with the surprise of every window, and surprise.png to --out.

Letters: L frames of a video, M frames of a window, C context frames, W windows, R height and width in pixels.
"""

import copy
import csv
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import matplotlib
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import data
import video
from cli import (
    Parser,
    Progress,
    fail,
    interval95,
    plain_flags,
    require_at_least,
    resolve_device,
    write_atomically,
)
from model import Encoder, Predictor, build, load_checkpoint, load_teacher_of, token_grid, tubelets
from synthetic import synthetic_pair

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

SYNTHETIC_SEED = 2**31 + 6  # no training run uses it


def parse_args():
    parser = Parser(__doc__)
    flag = parser.add_argument_group("networks and videos").add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--teacher", metavar="RUN|FILE", help="teacher of a student; default: the one recorded in its checkpoint")
    flag("--untrained", action="store_true", help="baseline: the same networks, with random weights")
    flag("--task", choices=TASKS, default="synthetic")
    flag("--data", type=Path, metavar="FOLDER|CSV", help="videos of the task")
    flag("--pairs", type=int, default=600, help="number of built-in pairs, over all six properties")

    flag = parser.add_argument_group("protocol").add_argument
    flag(
        "--num-frames",
        type=int,
        help="window length M; default: intphys, grasp 16, inflevel 32, else the encoder's",
    )
    flag("--context-lengths", type=int, nargs="+", metavar="C", help="in frames; default: 1/8, 2/8, ... 5/8 of M")
    flag("--stride", type=int, default=2, help="frames from one window to the next (appendix D)")
    flag("--frame-step", type=int, help="keep every n-th video frame; default: intphys 2, grasp 10, inflevel 5, else 1")
    flag("--resolution", type=int, help="height and width of resized frames; default: the encoder's")
    flag("--mask-index", type=int, default=0, help="mask token to predict with; the protocol uses 0 (short-range)")

    flag = parser.add_argument_group("hardware and output").add_argument
    flag("--batch-size", type=int, default=16, help="windows per forward pass")
    flag("--workers", type=int, default=0, help="processes that read videos")
    flag("--seed", type=int, default=0, help="of the built-in pairs and of untrained networks")
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; default: bfloat16 on a GPU")
    flag("--save", type=Path, metavar="PNG", help="also draw the frames of one pair per property")
    flag("--out", type=Path, default=Path("out/physics"), help="folder for the results")
    args = parser.parse_args()

    resolve_device(args)
    require_at_least(args, 1, "pairs", "stride", "batch_size")
    require_at_least(args, 0, "seed", "workers", "mask_index")
    if args.task == "synthetic" and (args.data or args.frame_step):
        fail("--task synthetic renders its own videos: --data and --frame-step are for the other tasks")
    if args.task != "synthetic" and not args.data:
        fail(f"--task {args.task} needs --data")
    if args.frame_step is None:
        args.frame_step = TASKS[args.task].frame_step
    require_at_least(args, 1, "frame_step")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# networks


def load_networks(args):
    """Load the context encoder, the predictor and the target encoder (None if pixels are predicted), frozen.

    Returns these three and the checkpoint's step. Ends the script if a checkpoint is missing or the networks do not fit
    together.
    """
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        if "predictor" not in checkpoint:
            raise ValueError(f"{args.checkpoint} holds no predictor")
        config, context = checkpoint["model"], "student" if "student" in checkpoint else "encoder"
        encoder = build(Encoder, config["encoder"], checkpoint[context])
        predictor = build(Predictor, config["predictor"], checkpoint["predictor"])
    except (OSError, ValueError) as error:
        fail(f"--checkpoint: {error}")
    if args.mask_index >= predictor.config["num_mask_tokens"]:
        fail(f"--mask-index {args.mask_index}: the predictor has {predictor.config['num_mask_tokens']} mask tokens")
    target_encoder = _load_target_encoder(args, checkpoint, encoder, predictor)
    if args.untrained:  # networks of the same sizes
        torch.manual_seed(args.seed)
        encoder, predictor = Encoder(**encoder.config), Predictor(**predictor.config)
        if args.teacher:
            target_encoder = Encoder(**target_encoder.config)
        elif target_encoder:
            target_encoder = copy.deepcopy(encoder)  # an EMA teacher starts as a copy of the student
    networks = [encoder, predictor, target_encoder]
    for network in networks:
        if network:
            network.float().eval().requires_grad_(False).to(args.device)
    return networks, checkpoint["step"]


def _load_target_encoder(args, checkpoint, encoder, predictor):
    """The encoder whose latents the predictor predicts; None if it predicts pixels. Fills in --teacher of a student."""
    predicts_pixels, has_ema_teacher = checkpoint["kind"] == "teacher", "student" in checkpoint
    if args.teacher and (predicts_pixels or has_ema_teacher):
        predicted = "pixels" if predicts_pixels else "the latents of its own EMA teacher"
        fail(f"--teacher is for students: {args.checkpoint} predicts {predicted}")
    if predicts_pixels:
        return None
    if has_ema_teacher:
        return build(Encoder, checkpoint["model"]["encoder"], checkpoint["encoder"])
    args.teacher = args.teacher or checkpoint["args"].get("teacher")
    if checkpoint["kind"] == "vjepa2" and not args.teacher:
        print(f"{args.checkpoint} holds a single encoder, which encodes both the context and the targets")
        return build(Encoder, checkpoint["model"]["encoder"], checkpoint["encoder"])
    if not args.teacher:
        fail(f"{args.checkpoint} does not record its teacher: give --teacher")
    try:
        teacher = load_teacher_of(checkpoint, args.teacher)
        target_encoder = build(Encoder, teacher["model"]["encoder"], teacher["encoder"])
    except (OSError, ValueError) as error:
        fail(f"the teacher of {args.checkpoint}: {error}; say where it is with --teacher")
    same_grid = all(target_encoder.config[name] == encoder.config[name] for name in ("patch_size", "tubelet_size"))
    if not same_grid or target_encoder.width != predictor.config["out_width"]:
        fail(
            f"{args.teacher} is not the teacher of {args.checkpoint}: the shape of its latents is not what is predicted"
        )
    return target_encoder


def resolve_window(args, encoder):
    """Fill in the flags that default to the encoder's settings. Ends the script if they do not fit together."""
    tubelet = encoder.tubelet_size
    if args.num_frames is None:
        args.num_frames = TASKS[args.task].num_frames or encoder.config["num_frames"]
    if args.resolution is None:
        args.resolution = encoder.config["resolution"]
    try:
        token_grid((args.num_frames, args.resolution, args.resolution), tubelet, encoder.patch_size)
    except ValueError as error:
        fail(str(error))
    if not args.context_lengths:
        eighths = [args.num_frames * k // 8 for k in range(1, 6)]
        args.context_lengths = [C for C in eighths if C > 0 and C % tubelet == 0]
    args.context_lengths = sorted(set(args.context_lengths))
    for C in args.context_lengths:
        if not 0 < C < args.num_frames or C % tubelet:
            fail(f"--context-lengths {C}: must be a multiple of {tubelet} frames below the window's {args.num_frames}")
    if not args.context_lengths:
        fail(f"give --context-lengths: no eighth of {args.num_frames} frames is a multiple of {tubelet} frames")


# ---------------------------------------------------------------------------------------------------------------------
# surprise


class Pair(NamedTuple):
    """A possible and an impossible video, uint8 (L, 3, R, R); their lengths may differ."""

    property: str
    name: str
    possible: torch.Tensor
    impossible: torch.Tensor
    same: int  # number of identical frames at the beginning
    event: int | None  # the first frame that visibly differs; None if no frame or already the first one does


class Measurement(NamedTuple):
    """The surprise of a pair's videos, float32 (number of context lengths, W) each."""

    property: str
    name: str
    event: int | None
    same: int
    frames: list  # lengths of the possible and the impossible video
    possible: torch.Tensor
    impossible: torch.Tensor


def measure(networks, items, args):
    """Measure all pairs. Returns a list of `Measurement`s, and the first `Pair` of each property as a dictionary."""
    measurements, examples = [], {}
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, collate_fn=functools.partial(read_pairs, args), num_workers=args.workers
    )
    progress = Progress()
    try:
        for done, pairs in enumerate(loader, start=1):
            for pair in pairs:
                lengths = [len(pair.possible), len(pair.impossible)]
                curves = surprise_of_pair(networks, pair, args)
                measurements.append(Measurement(pair.property, pair.name, pair.event, pair.same, lengths, *curves))
                examples.setdefault(pair.property, pair)
            progress.show(f"{done}/{len(items)}, {progress.left(done, len(items))}", last=done == len(items))
    except video.BadVideo as error:
        reason = str(error).splitlines()[-1]  # an error in a worker begins with the worker's traceback
        fail(f"unreadable video: {reason}")
    return measurements, examples


def surprise_of_pair(networks, pair, args):
    """The surprise of both videos. Windows in which they are identical are computed once."""
    possible = surprise(networks, pair.possible, args)
    shared = max(0, (pair.same - args.num_frames) // args.stride + 1)
    return possible, surprise(networks, pair.impossible, args, known=possible[:, :shared])


@torch.inference_mode()
def surprise(networks, frames, args, known=None):
    """The surprise of a video (L, 3, R, R) at each context length and window: float32 on the CPU, (number of C, W).

    W = (L - M) // stride + 1: trailing frames that fill no window are ignored, and a video shorter than a window is
    padded with its last frame. known: (number of C, W'), the surprise of the first W' windows if already computed.
    """
    padding = frames[-1:].expand(max(0, args.num_frames - len(frames)), -1, -1, -1)
    windows = torch.cat((frames, padding)).unfold(0, args.num_frames, args.stride)  # (W, 3, R, R, M), a view
    if known is None:
        known = torch.empty(len(args.context_lengths), 0)
    windows = windows[known.shape[1] :]
    if len(windows) == 0:
        return known
    batches = [batch.permute(0, 1, 4, 2, 3) for batch in windows.split(args.batch_size)]
    return torch.cat([known, *(_surprise_of_clips(networks, clips, args) for clips in batches)], dim=1)


def _surprise_of_clips(networks, clips, args):
    """The surprise of clips (B, 3, M, R, R) uint8 at each context length: (number of C, B) float32 on the CPU."""
    encoder, predictor, target_encoder = networks
    clips = data.normalize(clips, args.device)
    grid = encoder.grid(clips)
    ids = torch.arange(math.prod(grid), device=args.device).expand(len(clips), -1)
    errors = []
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        targets = _prediction_targets(target_encoder, encoder, clips)
        for C in args.context_lengths:
            seen = C // encoder.tubelet_size * grid[1] * grid[2]  # tokens are ordered by time
            context_ids, target_ids = ids[:, :seen], ids[:, seen:]
            context = encoder(clips, context_ids)
            predicted = predictor(context, context_ids, target_ids, grid, args.mask_index)
            errors.append((predicted.float() - targets[:, seen:]).abs().mean((1, 2)))
    return torch.stack(errors).cpu()


def _prediction_targets(target_encoder, encoder, clips):
    """The targets of all N tokens of clips (B, 3, M, R, R): (B, N, D) float32.

    With a target encoder, its layer-normalized latents, as in train_student.latent_targets. Without one, the pixels
    normalized per tubelet and color channel, as in train_teacher.pixel_targets. (Scripts do not import each other.)
    """
    if target_encoder:
        return F.layer_norm(target_encoder(clips).float(), (target_encoder.width,))
    pixels = tubelets(clips, encoder.tubelet_size, encoder.patch_size).unflatten(-1, (3, -1))
    mean, std = pixels.mean(-1, keepdim=True), pixels.std(-1, keepdim=True)
    return ((pixels - mean) / (std + 1e-6)).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# pairs of videos


class Item(NamedTuple):
    """Paths of one or more pairs. A path is a video file, or a folder of frames."""

    property: str
    name: str
    possible: list
    impossible: list
    starts: tuple = (0, 0)  # first frame used, of the possible videos and of the impossible ones


def find_items(args):
    """The list of what `read_pairs` reads. Ends the script if there is nothing, or if a file is missing."""
    if args.task == "synthetic":
        return range(args.pairs)
    try:
        items = TASKS[args.task].find_items(args.data)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--data {args.data}: {error}")
    if not items:
        fail(f"--data {args.data} holds no pairs of {args.task} (--help shows the expected files)")
    for item in items:
        for path in (*item.possible, *item.impossible):
            if not path.exists():
                fail(f"--data {args.data}: {path} does not exist")
    return items


def find_intphys(root):
    """Items of IntPhys's dev set, ROOT/O1/SCENE/1..4/scene/*.png. In each scene, two of four movies are possible."""
    items = []
    for scene in sorted(path for block in ("O1", "O2", "O3") for path in (root / block).glob("*/")):
        possible, impossible = [], []
        for movie in sorted(scene.glob("[1-4]")):
            status = json.loads((movie / "status.json").read_text())
            movies = possible if status["header"]["is_possible"] else impossible
            movies.append(movie / "scene")
        if len(possible) != 2 or len(impossible) != 2:
            raise ValueError(
                f"{scene} holds {len(possible)} possible and {len(impossible)} impossible movies, not 2 each"
            )
        items.append(Item(scene.parent.name, scene.name, possible, impossible))
    return items


def find_grasp(root):
    """Items of GRASP level 2: ROOT/P_Gravity/x.mp4 is possible, ROOT/IP_Gravity/x.mp4 impossible; 16 properties."""
    items = []
    for path in sorted(root.glob("P_*/*.mp4")):
        property = path.parent.name.removeprefix("P_")
        items.append(Item(property, path.stem, [path], [root / f"IP_{property}" / path.name]))
    return items


def find_inflevel(root):
    """Items of InfLevel: ROOT/continuity.csv, solidity.csv and gravity.csv, as the protocol's authors publish them.

    Columns: vid1_path, vid2_path (relative to ROOT), vid1_label, vid1_end_priming_2, vid2_end_priming_2. A video starts
    after its priming; the longer one of a pair is shortened at its beginning.
    """
    columns = ("vid1_path", "vid2_path", "vid1_label", "vid1_end_priming_2", "vid2_end_priming_2")
    items = []
    for property in ("continuity", "solidity", "gravity"):
        for row in _read_csv(root / f"{property}.csv", columns):
            first, second = root / row["vid1_path"], root / row["vid2_path"]
            starts = [int(row["vid1_end_priming_2"]) + 1, int(row["vid2_end_priming_2"]) + 1]
            lengths = [_count_frames(first) - starts[0], _count_frames(second) - starts[1]]
            starts = [start + length - min(lengths) for start, length in zip(starts, lengths, strict=True)]
            if row["vid1_label"] == "possible":
                items.append(Item(property, first.stem, [first], [second], tuple(starts)))
            else:
                items.append(Item(property, second.stem, [second], [first], (starts[1], starts[0])))
    return items


def find_csv_pairs(file):
    """Items of a csv file with columns possible, impossible (paths relative to the file) and, optionally, property."""
    items = []
    for row in _read_csv(file, ("possible", "impossible")):
        possible, impossible = file.parent / row["possible"], file.parent / row["impossible"]
        items.append(Item(row.get("property") or "pairs", possible.stem, [possible], [impossible]))
    return items


class Task(NamedTuple):
    """Settings of a task. Those of the three datasets are taken from the code of Garrido et al."""

    frame_step: int
    num_frames: int | None  # window length; None: what the encoder was trained with
    find_items: Callable | None  # value of --data -> list of `Item`
    # At most max_frames // frame_step frames are used. IntPhys has 99, so 49 at step 2: frame 98 is left out.
    max_frames: int | None = None
    square: bool = False  # crop frames to a centered square before resizing, instead of resizing the whole frame


TASKS = {
    "synthetic": Task(1, None, None),
    "pairs": Task(1, None, find_csv_pairs),
    "intphys": Task(2, 16, find_intphys, max_frames=99, square=True),
    "grasp": Task(10, 16, find_grasp, square=True),
    "inflevel": Task(5, 32, find_inflevel),
}


def _read_csv(file, columns):
    """The rows of a csv file as dictionaries; ValueError if a row lacks one of the columns."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        missing = [name for name in columns if not row.get(name)]
        if missing:
            raise ValueError(f"{file}: a row has no {', '.join(missing)}")
    return rows


def _count_frames(path):
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, OSError, IndexError) as error:
        raise video.BadVideo(f"{path}: {getattr(error, 'strerror', 'no video stream')}") from error


def read_pairs(args, item):
    """Read the `Pair`s of an `Item`, or render the built-in pair of this number. BadVideo if a video is unreadable.

    IntPhys has two possible and two impossible movies per scene: they are matched so that the pairs share as many
    frames at the beginning as possible.
    """
    if args.task == "synthetic":
        seed, num_frames = SYNTHETIC_SEED + args.seed, 3 * args.num_frames
        property, possible, impossible = synthetic_pair(seed, item, num_frames, args.resolution)
        return [make_pair(property, f"built-in {item}", possible, impossible)]
    task = TASKS[args.task]
    length = task.max_frames // args.frame_step if task.max_frames else None
    possible, impossible = (
        [read_video(path, args.frame_step, args.resolution, start, length, task.square) for path in paths]
        for paths, start in zip((item.possible, item.impossible), item.starts, strict=True)
    )

    def shared_frames(order):
        return sum(first_difference(possible[n], impossible[i]) for n, i in enumerate(order))

    order = max(itertools.permutations(range(len(possible))), key=shared_frames)
    return [
        make_pair(item.property, f"{item.possible[n]} | {item.impossible[i]}", possible[n], impossible[i])
        for n, i in enumerate(order)
    ]


def read_video(path, frame_step, resolution, start=0, length=None, square=False):
    """Every frame_step-th frame of a video, or of a folder of frames, from frame `start` on: uint8 (L, 3, R, R).

    length: maximum of L. square: crop frames to a centered square instead of resizing the whole frame. Frames are
    resized as soon as they are decoded, so a long video takes 3 R^2 bytes per frame. As in the authors' code, resizing
    is bilinear without antialiasing. BadVideo if the used part of the video cannot be decoded or has no frames.
    """
    stop = None if length is None else start + length * frame_step

    def resized(frame):  # (3, H, W)
        if square:
            height, width = frame.shape[1:]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            frame = frame[:, top : top + side, left : left + side]
        return TF.resize(frame, [resolution, resolution], antialias=False)

    if Path(path).is_dir():
        files = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in video.IMAGE_SUFFIXES)
        frames = [resized(video.read_clip(file, 1, 1, 0)[0]) for file in files[start:stop:frame_step]]
    else:
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise video.BadVideo(f"{path}: no video stream")
                wanted = itertools.islice(container.decode(video=0), start, stop, frame_step)
                frames = [resized(torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1)) for f in wanted]
        except (av.FFmpegError, OSError) as error:
            raise video.BadVideo(f"{path}: {error.strerror}") from error
    if not frames:
        raise video.BadVideo(f"{path}: no frames from frame {start} on")
    return torch.stack(frames)


def make_pair(property, name, possible, impossible):
    """A `Pair` of two videos, with the number of frames they share and the frame of the event."""
    same = first_difference(possible, impossible)
    # Identical frames differ slightly in two encoded videos, so the event is where the difference is visible.
    event = first_difference(possible, impossible, tolerance=20)
    if event in (0, min(len(possible), len(impossible))):
        event = None
    return Pair(property, name, possible, impossible, same, event)


def first_difference(a, b, tolerance=0):
    """The first frame in which a pixel of two videos differs by more than `tolerance`; the shorter length if none."""
    length = min(len(a), len(b))
    for i in range(length):
        if (a[i].int() - b[i].int()).abs().max() > tolerance:
            return i
    return length


# ---------------------------------------------------------------------------------------------------------------------
# results


def accuracy(possible, impossible):
    """Accuracies in percent from the scores (P,) of the possible and the impossible video of each pair.

    Relative: pairs whose possible video has the lower score; a tie is wrong. Absolute: videos on the correct side of a
    threshold, the lowest score of a possible video that is above 90% of the possible videos. It is calibrated on these
    videos, as in the authors' code, which needs 10 pairs; with fewer, the threshold is the highest score. AUROC: the
    probability that a random impossible video scores higher than a random possible one.
    """
    P, right = len(possible), int((possible < impossible).sum())
    threshold = possible.sort().values[min(math.ceil(0.9 * P), P - 1)]
    separated = int((possible < threshold).sum() + (impossible > threshold).sum())
    higher = (impossible[:, None] > possible).double() + 0.5 * (impossible[:, None] == possible)
    return {
        "relative_accuracy": 100 * right / P,
        "interval95": interval95(right, P),
        "right": right,
        "ties": int((possible == impossible).sum()),
        "pairs": P,
        "absolute_accuracy": 100 * separated / (2 * P),
        "absolute_interval95": interval95(separated, 2 * P),
        "auroc": 100 * higher.mean().item(),
    }


def accuracies(context_lengths, measurements):
    """The `accuracy` of each property, and of "all" pairs together.

    Returns {property: {context length or "filtered": {"mean": accuracy, "max": accuracy}}}, by how a video's score is
    computed from its windows. The protocol's relative accuracy is under "mean", its absolute accuracy under "max".
    """
    possible = torch.stack([_video_scores(m.possible) for m in measurements])  # (P, number of C + 1, 2)
    impossible = torch.stack([_video_scores(m.impossible) for m in measurements])
    properties = [m.property for m in measurements]
    result = {}
    for property in [*dict.fromkeys(properties), "all"]:
        chosen = [n for n, name in enumerate(properties) if property in (name, "all")]
        result[property] = {
            length: {
                "mean": accuracy(possible[chosen, c, 0], impossible[chosen, c, 0]),
                "max": accuracy(possible[chosen, c, 1], impossible[chosen, c, 1]),
            }
            for c, length in enumerate([*context_lengths, "filtered"])
        }
    return result


def _video_scores(curves):
    """Mean and maximum over windows: (number of C, W) -> (number of C + 1, 2); the last row is "filtered"."""
    curves = torch.cat((curves, curves.amin(0, keepdim=True)))
    return torch.stack((curves.mean(1), curves.amax(1)), dim=1)


def print_table(table, title, score, value, interval):
    """Print one value of a table of `accuracies`. score: "mean" or "max"; value, interval: keys of `accuracy`."""
    columns, width = list(table["all"]), max(map(len, ["property", *table]))
    print(f"{title}, by context length in frames")
    print(f"{'property':{width}}{'pairs':>6}" + "".join(f"{column:>19}" for column in columns))
    for property, row in table.items():
        line = f"{property:{width}}{row[columns[0]][score]['pairs']:6}"
        for column in columns:
            result = row[column][score]
            low, high = result[interval]
            line += f"{result[value]:.1f} ({low:.0f} to {high:.0f})".rjust(19)
        print(line)


def print_accuracies(table):
    """Print the protocol's two accuracies: relative from mean scores, absolute from maximum scores."""
    title = "relative accuracy in % of pairs (95% interval), mean surprise"
    print_table(table, title, "mean", "relative_accuracy", "interval95")
    title = "absolute accuracy in % of videos (95% interval), maximum surprise"
    print_table(table, title, "max", "absolute_accuracy", "absolute_interval95")


def write_results(args, step, predicts, table, measurements, short, seconds):
    pairs = [m._asdict() | {"possible": m.possible.tolist(), "impossible": m.impossible.tolist()} for m in measurements]
    record = {
        "checkpoint": str(args.checkpoint),
        "step": step,
        "weights": "untrained" if args.untrained else "trained",
        "teacher": str(args.teacher) if args.teacher else None,
        "predicts": predicts,
        "task": args.task,
        "properties": table,
        "short_videos": short,
        "seconds": seconds,
        "pairs": pairs,
        "args": plain_flags(args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "results.json", lambda path: path.write_text(json.dumps(record) + "\n"))
    print(args.out / "results.json")


def draw_surprise(measurements, args, path):
    """Draw the surprise over time of one pair per property, averaged over context lengths."""
    examples = {}
    for measurement in measurements:
        examples.setdefault(measurement.property, measurement)
    figure, axes = plt.subplots(1, len(examples), figsize=(3 * len(examples), 2.4), squeeze=False, layout="constrained")
    for ax, (property, example) in zip(axes[0], examples.items(), strict=True):
        for label, curves in (("possible", example.possible), ("impossible", example.impossible)):
            last_frames = torch.arange(curves.shape[1]) * args.stride + args.num_frames - 1
            ax.plot(last_frames * args.frame_step, curves.mean(0), label=label, marker=".")
        if example.event is not None:
            ax.axvline(example.event * args.frame_step, color="gray", linestyle="--", linewidth=1, label="event")
        ax.set_title(property, fontsize=9)
        ax.set_xlabel("last frame of the window", fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0][0].set_ylabel("surprise", fontsize=8)
    axes[0][0].legend(fontsize=7)
    _save_figure(figure, path)


def draw_frames(pairs, path, columns=12):
    """Draw evenly spaced frames of each pair: possible video above, impossible video below, red from the event on."""
    rows = []
    for pair in pairs:
        rows += [_framed(pair.possible, None, columns), _framed(pair.impossible, pair.event, columns)]
    height = rows[0].shape[1]
    figure, ax = plt.subplots(figsize=(columns * 0.8, len(rows) * 0.8), layout="constrained")
    ax.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
    ax.set_yticks([(2 * n + 1) * height for n in range(len(pairs))], [pair.property for pair in pairs], rotation=90)
    ax.set_xticks([])
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    _save_figure(figure, path)


def _framed(frames, event, columns):
    """A row of frames with white edges, red ones from the event on: (3, height, width)."""
    resolution = frames.shape[-1]
    edge = max(1, resolution // 32)
    numbers = torch.linspace(0, len(frames) - 1, columns).long()
    framed = torch.full((columns, 3, resolution + 2 * edge, resolution + 2 * edge), 255, dtype=torch.uint8)
    if event is not None:
        framed[numbers >= event, 1:] = 0
    framed[:, :, edge:-edge, edge:-edge] = frames[numbers]
    return torch.cat(framed.unbind(), dim=2)


def _save_figure(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, bbox_inches="tight", format="png"))
    plt.close(figure)
    print(path)


def main():
    args = parse_args()
    networks, step = load_networks(args)
    resolve_window(args, networks[0])
    items = find_items(args)
    name = f"{args.checkpoint} (untrained)" if args.untrained else args.checkpoint
    print(f"surprise of {name} on {args.task}: windows of {args.num_frames} frames, {args.device}")

    started = time.perf_counter()
    measurements, examples = measure(networks, items, args)
    seconds = time.perf_counter() - started
    short = sum(length < args.num_frames for m in measurements for length in m.frames)
    if short:
        print(f"{short} videos are shorter than a window and were padded with their last frame")
    table = accuracies(args.context_lengths, measurements)
    print_accuracies(table)
    try:
        predicts = "latents" if networks[2] else "pixels"
        write_results(args, step, predicts, table, measurements, short, seconds)
        draw_surprise(measurements, args, args.out / "surprise.png")
        if args.save:
            draw_frames(list(examples.values()), args.save)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
