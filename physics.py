"""Intuitive physics by surprise: is the impossible one of two videos predicted worse? (paper appendix D and table 9)

    python physics.py --checkpoint out/student                # built-in pairs, no files
    python physics.py --task intphys --data IntPhys/dev       # O1, O2, O3
    python physics.py --task grasp --data GRASP/level2        # P_Gravity, IP_Gravity, ...
    python physics.py --task inflevel --data inflevel         # continuity.csv, ...
    python physics.py --task pairs --data pairs.csv           # columns possible, impossible and perhaps property

A window of M frames slides over the video. The encoder sees its first C frames, the predictor predicts the tokens of
all later ones, and the surprise is the mean absolute difference to what the teacher says of the whole window (Garrido
et al. 2025, arXiv 2502.11831; method.md section 7). A video's score is the mean, or the maximum, over its windows; a
pair is right if the possible video's score is the lower one. "filtered" is the smallest surprise of a window over all
context lengths. A student needs its teacher: the one it names, or --teacher. An EMA run holds both: its student
predicts what the average says. A stage-1 teacher predicts pixels, so that its surprise is one about (normalized)
pixels. Writes results.json (every window's surprise in it) and surprise.png into --out.
"""

import copy
import csv
import functools
import itertools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import av
import matplotlib
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import data
import synthetic
import video
from cli import Parser, duration, fail, interval95, require_at_least, resolve_device, write_aside
from model import Encoder, Predictor, build, load_checkpoint, load_encoder, token_grid, tubelets

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

FRAME_STEP = {"synthetic": 1, "pairs": 1, "intphys": 2, "grasp": 10, "inflevel": 5}  # Garrido et al.
INFLEVEL_WINDOW = 32  # frames; elsewhere the window is what the encoder was trained on
PROPERTIES = ("permanence", "shape", "color", "continuity", "solidity", "gravity")  # of the built-in pairs
SYNTHETIC_SEED = 2**31 + 6  # colors, textures and grain that no training run has seen


class Item(NamedTuple):
    """Where the videos of one or more pairs are."""

    property: str
    name: str
    possible: list  # paths: video files, or folders of frames
    impossible: list
    starts: tuple = (0, 0)  # frames left out at the beginning, of the possible videos and of the impossible ones


class Pair(NamedTuple):
    """Two videos, uint8 (L, 3, R, R), of which the second one is impossible. Lengths may differ."""

    property: str
    name: str
    possible: torch.Tensor
    impossible: torch.Tensor
    same: int  # frames at the beginning in which the two are identical
    event: int | None  # the first frame that visibly differs; None if that is the first, or if none does


def parse_args():
    parser = Parser(__doc__)
    flag = parser.add_argument_group("what is asked").add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--teacher", metavar="RUN|FILE", help="a student's; default the one that its checkpoint names")
    flag("--untrained", action="store_true", help="the same networks, the teacher too, with random weights")
    flag("--task", choices=FRAME_STEP, default="synthetic")
    flag("--data", type=Path, metavar="FOLDER|CSV", help="where the task's videos are")
    flag("--pairs", type=int, default=600, help="of the built-in task, over its six properties")

    flag = parser.add_argument_group("how it is measured").add_argument
    flag("--num-frames", type=int, help="M, of a window; default the encoder's, 32 for inflevel")
    flag("--context-lengths", type=int, nargs="+", metavar="C", help="frames; default 1/8, 2/8, ... 5/8 of the window")
    flag("--stride", type=int, default=2, help="frames from one window to the next (appendix D)")
    flag("--frame-step", type=int, help="default: intphys 2, grasp 10, inflevel 5, others 1")
    flag("--resolution", type=int, help="default: what the encoder was trained at; the full frame is resized to it")
    flag("--mask-index", type=int, default=0, help="mask token of the prediction; 0 (short-range) is the protocol's")

    flag = parser.add_argument_group("on what, and what it leaves").add_argument
    flag("--batch-size", type=int, default=16, help="windows at a time")
    flag("--workers", type=int, default=0, help="processes that read videos ahead")
    flag("--seed", type=int, default=0, help="of the built-in pairs and of untrained networks")
    flag("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on a GPU, else float32")
    flag("--save", type=Path, metavar="PNG", help="draw the frames of one pair of every property")
    flag("--out", type=Path, default=Path("out/physics"))
    args = parser.parse_args()

    resolve_device(args)
    require_at_least(args, 1, "pairs", "stride", "batch_size")
    require_at_least(args, 0, "seed", "workers", "mask_index")
    if args.task == "synthetic" and (args.data or args.frame_step):
        fail("--task synthetic renders its videos: --data and --frame-step are for the other tasks")
    if args.task != "synthetic" and not args.data:
        fail(f"--task {args.task} needs --data")
    if args.frame_step is None:
        args.frame_step = FRAME_STEP[args.task]
    require_at_least(args, 1, "frame_step")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the networks and their surprise


def load(args):
    """(context encoder, predictor, target encoder), frozen; the last is None where pixels are what is predicted.

    Ends the script if there is no checkpoint, a student's teacher is missing, or the networks do not fit together.
    """
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        kind, config = checkpoint["kind"], checkpoint["model"]
        if "predictor" not in checkpoint:
            raise ValueError(f"{args.checkpoint} holds no predictor")
        encoder = build(Encoder, config["encoder"], checkpoint["student" if kind == "ema" else "encoder"])
        predictor = build(Predictor, config["predictor"], checkpoint["predictor"])
    except (OSError, ValueError) as error:
        fail(f"--checkpoint: {error}")
    if args.teacher and kind in ("ema", "teacher"):
        fail(
            f"--teacher is for students: {args.checkpoint} predicts {'pixels' if kind == 'teacher' else 'its average'}"
        )
    if kind == "teacher":
        target_encoder = None
    elif kind == "ema":
        target_encoder = build(Encoder, config["encoder"], checkpoint["encoder"])
    else:
        args.teacher = args.teacher or checkpoint["args"].get("teacher")
        if not args.teacher:
            fail(f"{args.checkpoint} names no teacher whose latents it predicts: give --teacher")
        try:
            target_encoder = load_encoder(args.teacher)
        except (OSError, ValueError) as error:
            fail(f"the teacher of {args.checkpoint}: {error}; --teacher says where it is")
        same = all(target_encoder.config[n] == encoder.config[n] for n in ("patch_size", "tubelet_size"))
        if not same or target_encoder.width != predictor.config["out_width"]:
            fail(f"{args.teacher} is not the teacher of {args.checkpoint}: its latents are not what is predicted")
    if args.mask_index >= predictor.config["num_mask_tokens"]:
        fail(f"--mask-index {args.mask_index}: the predictor has {predictor.config['num_mask_tokens']} mask tokens")
    if args.untrained:
        torch.manual_seed(args.seed)
        encoder, predictor = Encoder(**encoder.config), Predictor(**predictor.config)
        if target_encoder:  # a moving average begins as a copy
            target_encoder = copy.deepcopy(encoder) if kind == "ema" else Encoder(**target_encoder.config)
    networks = encoder, predictor, target_encoder
    return [network and network.float().eval().requires_grad_(False).to(args.device) for network in networks]


def resolve_window(args, encoder):
    """Fill in, in place, the flags that default to what the encoder was trained on. Ends the script if they misfit."""
    tubelet = encoder.tubelet_size
    if args.num_frames is None:
        args.num_frames = INFLEVEL_WINDOW if args.task == "inflevel" else encoder.config["num_frames"]
    if args.resolution is None:
        args.resolution = encoder.config["resolution"]
    try:
        token_grid((args.num_frames, args.resolution, args.resolution), tubelet, encoder.patch_size)
    except ValueError as error:
        fail(str(error))
    eighths = (args.num_frames * k // 8 for k in range(1, 6))
    args.context_lengths = sorted(set(args.context_lengths or (c for c in eighths if c and c % tubelet == 0)))
    for C in args.context_lengths:
        if not 0 < C < args.num_frames or C % tubelet:
            fail(f"--context-lengths {C}: needs multiples of {tubelet} frames below the window's {args.num_frames}")
    if not args.context_lengths:
        fail(f"--context-lengths: which, in a window of {args.num_frames} frames, {tubelet} to a token?")


def future_targets(target_encoder, encoder, clips):
    """What is to be predicted, for all tokens of clips (B, 3, M, R, R): (B, N, D) float32.

    The target encoder's layer-normed latents, or, without one, the pixels normalized per tubelet and color.
    """
    if target_encoder:
        return F.layer_norm(target_encoder(clips).float(), (target_encoder.width,))
    y = tubelets(clips, encoder.tubelet_size, encoder.patch_size).unflatten(-1, (3, -1))
    return ((y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6)).flatten(-2)


@torch.inference_mode()
def surprise(networks, video, args, known=None):
    """Surprise of every window of a video (L, 3, R, R) at every context length: (number of C, W) float32 on the CPU.

    W = (L - M) // stride + 1; frames that fill no window are left out, and a video shorter than a window is continued
    by its last frame. `known` (number of C, W'): the first windows' surprise, where it was computed before.
    """
    encoder, predictor, target_encoder = networks
    video = torch.cat((video, video[-1:].expand(max(0, args.num_frames - len(video)), -1, -1, -1)))
    windows = video.unfold(0, args.num_frames, args.stride)  # (W, 3, R, R, M), a view
    parts = [torch.empty(len(args.context_lengths), 0) if known is None else known]
    if len(windows) == parts[0].shape[1]:
        return parts[0]
    for batch in windows[parts[0].shape[1] :].split(args.batch_size):
        clips = data.normalize(batch.permute(0, 1, 4, 2, 3), args.device)
        grid = encoder.grid(clips)
        ids = torch.arange(math.prod(grid), device=args.device).expand(len(clips), -1)
        errors = []
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            targets = future_targets(target_encoder, encoder, clips)  # once for all context lengths
            for C in args.context_lengths:
                seen = C // encoder.tubelet_size * grid[1] * grid[2]  # tokens are in order of time
                context_ids, target_ids = ids[:, :seen], ids[:, seen:]
                context = encoder(clips, context_ids)
                predicted = predictor(context, context_ids, target_ids, grid, args.mask_index)
                errors.append((predicted.float() - targets[:, seen:]).abs().mean((1, 2)))
        parts.append(torch.stack(errors).cpu())
    return torch.cat(parts, dim=1)


def surprise_of_pair(networks, pair, args):
    """The surprise of both videos; the windows in which they are still identical are computed once."""
    possible = surprise(networks, pair.possible, args)
    shared = max(0, (pair.same - args.num_frames) // args.stride + 1)
    return possible, surprise(networks, pair.impossible, args, known=possible[:, :shared])


# ---------------------------------------------------------------------------------------------------------------------
# the pairs


def read_video(path, frame_step, resolution, start=0):
    """Every frame_step-th frame from `start` on, the full frame resized: uint8 (L, 3, R, R). A folder holds frames.

    Frames are resized as they are decoded, so that a long video costs 3 R^2 bytes per frame kept. BadVideo if nothing
    can be decoded, or not all of it.
    """

    def resized(frame):  # (3, H, W)
        return TF.resize(frame, [resolution, resolution], antialias=True)

    if Path(path).is_dir():
        files = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in video.IMAGE_SUFFIXES)
        frames = [resized(video.read_clip(file, 1, 1, 0)[0]) for file in files[start::frame_step]]
    else:
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise video.BadVideo(f"{path}: no video stream")
                wanted = itertools.islice(container.decode(video=0), start, None, frame_step)
                frames = [resized(torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1)) for f in wanted]
        except (av.FFmpegError, OSError) as error:
            raise video.BadVideo(f"{path}: {error.strerror}") from error
    if not frames:
        raise video.BadVideo(f"{path}: no frames{f' after the first {start}' if start else ''}")
    return torch.stack(frames)


def first_difference(a, b, tolerance=0):
    """The first frame of two videos in which a pixel differs by more than `tolerance`, or how many frames both have."""
    n = min(len(a), len(b))
    for i in range(n):
        if (a[i].int() - b[i].int()).abs().max() > tolerance:
            return i
    return n


def make_pair(property, name, possible, impossible):
    # Encoded videos of the same frames differ by a little before the event: it is where one can see something.
    event = first_difference(possible, impossible, tolerance=20)
    visible = 0 < event < min(len(possible), len(impossible))
    return Pair(
        property, name, possible, impossible, first_difference(possible, impossible), event if visible else None
    )


def read_pairs(args, item):
    """The `Pair`s of an item: a list. BadVideo if a video cannot be read.

    Of several possible and impossible videos (IntPhys), those are paired that share the longest beginnings in sum.
    """
    if args.task == "synthetic":
        return [synthetic_pair(SYNTHETIC_SEED + args.seed, item, 3 * args.num_frames, args.resolution)]
    read = functools.partial(read_video, frame_step=args.frame_step, resolution=args.resolution)
    possible = [read(path, start=item.starts[0]) for path in item.possible]
    impossible = [read(path, start=item.starts[1]) for path in item.impossible]
    shared = [[first_difference(p, i) for i in impossible] for p in possible]
    order = max(itertools.permutations(range(len(possible))), key=lambda o: sum(map(list.__getitem__, shared, o)))
    return [
        make_pair(item.property, f"{item.possible[n]} | {item.impossible[i]}", possible[n], impossible[i])
        for n, i in enumerate(order)
    ]


def intphys(root):
    """Items of IntPhys's dev set: ROOT/O1/SCENE/1..4/scene/*.png, two of the four possible (status.json)."""
    items = []
    for scene in sorted(path for block in ("O1", "O2", "O3") for path in (root / block).glob("*/")):
        movies = {True: [], False: []}
        for movie in sorted(scene.glob("[1-4]")):
            status = json.loads((movie / "status.json").read_text())
            movies[bool(status["header"]["is_possible"])].append(movie / "scene")
        if [len(movies[True]), len(movies[False])] != [2, 2]:
            raise ValueError(f"{scene} holds {len(movies[True])} possible and {len(movies[False])} impossible movies")
        items.append(Item(scene.parent.name, scene.name, movies[True], movies[False]))
    return items


def grasp(root):
    """Items of GRASP level 2: ROOT/P_Gravity/x.mp4 is possible, ROOT/IP_Gravity/x.mp4 impossible, 16 properties."""
    return [
        Item(path.parent.name[2:], path.stem, [path], [root / f"I{path.parent.name}" / path.name])
        for path in sorted(root.glob("P_*/*.mp4"))
    ]


def inflevel(root):
    """Items of InfLevel: ROOT/continuity.csv, solidity.csv, gravity.csv as the protocol's authors publish them.

    Their columns: vid1_path, vid2_path (relative to ROOT), vid1_label, vid1_end_priming_2, vid2_end_priming_2. A video
    begins after its priming; where one is longer than the other, the rest is left out at its beginning.
    """
    items = []
    for property in ("continuity", "solidity", "gravity"):
        for row in read_csv(root / f"{property}.csv", "vid1_path", "vid2_path", "vid1_label", "vid1_end_priming_2",
                            "vid2_end_priming_2"):  # fmt: skip
            paths = [root / row["vid1_path"], root / row["vid2_path"]]
            starts = [int(row[f"vid{i}_end_priming_2"]) + 1 for i in (1, 2)]
            lengths = [count_frames(path) - start for path, start in zip(paths, starts, strict=True)]
            starts = [start + length - min(lengths) for start, length in zip(starts, lengths, strict=True)]
            if row["vid1_label"] != "possible":
                paths, starts = paths[::-1], starts[::-1]
            items.append(Item(property, paths[0].stem, paths[:1], paths[1:], tuple(starts)))
    return items


def count_frames(path):
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, OSError, IndexError) as error:
        raise video.BadVideo(f"{path}: {getattr(error, 'strerror', 'no video stream')}") from error


def pairs(file):
    """Items of a csv with columns possible, impossible (paths relative to it) and, if there is one, property."""
    items = []
    for row in read_csv(file, "possible", "impossible"):
        possible, impossible = file.parent / row["possible"], file.parent / row["impossible"]
        items.append(Item(row.get("property") or "pairs", possible.stem, [possible], [impossible]))
    return items


def read_csv(file, *columns):
    """The rows of a csv file as dictionaries; ValueError if one lacks a column."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        if missing := [name for name in columns if not row.get(name)]:
            raise ValueError(f"{file}: a row has no {', '.join(missing)}")
    return rows


def find_items(args):
    """What there is to read, a list for `read_pairs`. Ends the script if there is nothing, or a file is missing."""
    if args.task == "synthetic":
        return range(args.pairs)
    try:
        items = {"intphys": intphys, "grasp": grasp, "inflevel": inflevel, "pairs": pairs}[args.task](args.data)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--data {args.data}: {error}")
    if not items:
        fail(f"--data {args.data} holds no pairs of {args.task} (--help says what is expected where)")
    for path in itertools.chain.from_iterable((*item.possible, *item.impossible) for item in items):
        if not path.exists():
            fail(f"--data {args.data}: there is no {path}")
    return items


# ---------------------------------------------------------------------------------------------------------------------
# built-in pairs


def synthetic_pair(seed, number, num_frames, resolution):
    """Built-in pair `number`: a shape over a textured background, with an occluder or a wall; property number % 6.

    permanence  it vanishes behind the occluder; in every other pair nothing went in, but something comes out
    shape       it comes out as another shape
    color      it comes out in another color
    continuity  it jumps
    solidity    it passes through the wall, off which it should bounce
    gravity     let go, it falls upwards

    The pair is identical until the event, grain included. Lengths are in frame widths, times in videos.
    """
    T, S = num_frames, resolution
    columns = iter(synthetic.uniforms(seed, torch.tensor([number]), 64)[0].tolist())

    def draw(low, high):
        return low + (high - low) * next(columns)

    def cover(inside):  # signed distance inside an edge -> opacity, one pixel wide
        return (inside * S + 0.5).clamp(0, 1)

    property = PROPERTIES[number % len(PROPERTIES)]
    occluded = property in ("permanence", "shape", "color")
    pixel, time, noise = (torch.arange(S) + 0.5) / S, torch.arange(T) / (T - 1), torch.Generator().manual_seed(number)
    size, speed, event = draw(0.1, 0.13), draw(0.7, 0.8), draw(0.35, 0.5)  # size: from the center to the farthest point
    kind, forward, upper = int(draw(0, len(synthetic.SHAPES))), draw(0, 1) < 0.5, draw(0, 1) < 0.5
    color = torch.tensor([0.95, 0.6, 0.25])[torch.randperm(3, generator=noise)]

    # What is there at every time: as it should be, and as it is from the event on in the impossible video.
    x, y = 0.5 + speed * (time - 0.5), torch.full((T,), draw(0.3, 0.7))
    possible = {"x": x, "y": y, "kind": kind, "color": color, "there": True}
    impossible = dict(possible)
    happened = time > (0.5 if occluded else event)
    bar = (0.32, 0.68) if occluded else None  # left and right edge; 2.7 sizes wide or more, the shape is wholly hidden
    if property == "permanence":
        possible["there"] = number // len(PROPERTIES) % 2 == 0
        impossible["there"] = not possible["there"]
    elif property == "shape":
        impossible["kind"] = (kind + 1 + int(draw(0, len(synthetic.SHAPES) - 1))) % len(synthetic.SHAPES)
    elif property == "color":
        impossible["color"] = color.roll(1)
    elif property == "continuity":
        top = torch.full((T,), draw(0.2, 0.35))
        possible["y"], impossible["y"] = (top, 1 - top) if upper else (1 - top, top)
    elif property == "solidity":
        bar = 0.6, 0.7
        possible["x"] = bar[0] - size - (bar[0] - size - x).abs()
    else:
        fall = 4 * (time - event).clamp(min=0).square()
        possible["x"] = impossible["x"] = torch.full((T,), draw(0.3, 0.7))
        possible["y"], impossible["y"] = (0.5 + fall).clamp(max=1 - size), (0.5 - fall).clamp(min=size)

    outlines, holes = synthetic.shape_outlines()

    def shape_opacity(x, y, kind, there):  # (T, 1, S, S)
        outline, hole = (table[kind] / outlines[kind].max() * size for table in (outlines, holes))
        dx, dy = (pixel - x[:, None])[:, None, :], (pixel - y[:, None])[:, :, None]
        angle = (torch.atan2(dy, dx) * (len(outline) / synthetic.TAU)).long() % len(outline)
        distance = (dx.square() + dy.square()).sqrt()
        opacity = cover(outline[angle] - distance) * (cover(distance - hole) if hole else 1)
        return (opacity * there)[:, None]

    background = torch.empty(3, S, S)
    for channel in background:
        angle, frequency, phase, strength = (
            draw(0, synthetic.TAU),
            draw(0.5, 1.5),
            draw(0, synthetic.TAU),
            draw(0.03, 0.07),
        )
        along = math.cos(angle) * pixel + math.sin(angle) * pixel[:, None]
        channel.copy_(0.35 + strength * (synthetic.TAU * frequency * along + phase).cos())
    gray, grain = torch.tensor(draw(0.5, 0.75)), torch.randn(T, 3, S, S, generator=noise) * 0.03

    def render(color, **shape):
        layers = [(shape_opacity(**shape), color[:, None, None])]
        if bar:  # an occluder is in front of the shape, a wall behind it, so that one sees it pass
            opacity = cover(torch.minimum(pixel - bar[0], bar[1] - pixel)).expand(T, 1, S, S)
            layers.insert(1 if occluded else 0, (opacity, gray))
        frames = background.expand(T, 3, S, S)
        for opacity, paint in layers:
            frames = torch.lerp(frames, paint.expand_as(frames), opacity)
        frames = ((frames + grain).clamp(0, 1) * 255).round().to(torch.uint8)
        return frames if forward else frames.flip(3)

    possible, impossible = render(**possible), render(**impossible)
    impossible = torch.where(happened[:, None, None, None], impossible, possible)
    return make_pair(property, f"built-in {number}", possible, impossible)


# ---------------------------------------------------------------------------------------------------------------------
# what comes of it


def accuracy(possible, impossible):
    """What paired scores (P,) of videos tell, in percent.

    Relative: how often the possible video of a pair has the lower score, a tie being wrong. Absolute: of all videos,
    those on the right side of a threshold that 90% of the possible ones do not exceed (calibrated on these very videos,
    as in the protocol). AUROC: the same for all thresholds, free of a choice.
    """
    right, P = int((possible < impossible).sum()), len(possible)
    threshold = possible.sort().values[math.ceil(0.9 * P) - 1]
    sorted_out = int((possible <= threshold).sum() + (impossible > threshold).sum())
    above = (impossible[:, None] > possible).double() + 0.5 * (impossible[:, None] == possible)
    return {
        "relative_accuracy": 100 * right / P, "interval95": interval95(right, P), "right": right,
        "ties": int((possible == impossible).sum()), "pairs": P,
        "absolute_accuracy": 100 * sorted_out / (2 * P), "absolute_interval95": interval95(sorted_out, 2 * P),
        "auroc": 100 * above.mean().item(),
    }  # fmt: skip


def summarize(names, measured):
    """{property: {context length or "filtered": {"mean": accuracy(...), "max": accuracy(...)}}}, and "all" together.

    measured: a list of (property, surprise of the possible video, of the impossible one), each (number of C, W).
    """
    scores = []  # of every pair: (video, mean or max, context length)
    for _, *videos in measured:
        videos = [torch.cat((s, s.amin(0, keepdim=True))) for s in videos]
        scores.append(torch.stack([torch.stack((s.mean(1), s.amax(1))) for s in videos]))
    scores = torch.stack(scores)
    properties = [property for property, *_ in measured]
    summary = {}
    for chosen in [*dict.fromkeys(properties), "all"]:
        of = scores[torch.tensor([chosen in (property, "all") for property in properties])]
        summary[chosen] = {
            name: {score: accuracy(of[:, 0, i, c], of[:, 1, i, c]) for i, score in enumerate(("mean", "max"))}
            for c, name in enumerate([*names, "filtered"])
        }
    return summary


def print_table(summary):
    names = list(summary["all"])
    print("relative accuracy, mean surprise, % of pairs (95% interval), by frames of context")
    print(f"{'':14}{'pairs':>6}" + "".join(f"{name:>19}" for name in names))
    for property, row in summary.items():
        cells = [row[name]["mean"] for name in names]
        text = [f"{c['relative_accuracy']:.1f} ({c['interval95'][0]:.0f} to {c['interval95'][1]:.0f})" for c in cells]
        print(f"{property[:14]:14}{cells[0]['pairs']:6}" + "".join(f"{cell:>19}" for cell in text))


def draw_surprise(shown, args, path):
    """Surprise over time, mean over context lengths, of one pair of every property; a window is at its last frame."""
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.4), squeeze=False, layout="constrained")
    for ax, (pair, *curves) in zip(axes[0], shown, strict=True):
        for label, curve in zip(("possible", "impossible"), curves, strict=True):
            last = (torch.arange(curve.shape[1]) * args.stride + args.num_frames - 1) * args.frame_step
            ax.plot(last, curve.mean(0), label=label, marker=".")
        if pair.event is not None:
            ax.axvline(pair.event * args.frame_step, color="gray", linestyle="--", linewidth=1, label="event")
        ax.set_title(pair.property, fontsize=9)
        ax.set_xlabel("window's last frame", fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0][0].set_ylabel("surprise", fontsize=8)
    axes[0][0].legend(fontsize=7)
    save(figure, path)


def draw_frames(shown, path, columns=12):
    """Frames of one pair of every property, evenly spread; the impossible video below, from the event on in red."""
    rows, resolution = [], shown[0][0].possible.shape[-1]
    edge = max(1, resolution // 32)
    for pair, *_ in shown:
        for frames, event in ((pair.possible, None), (pair.impossible, pair.event)):
            numbers = torch.linspace(0, len(frames) - 1, columns).long()
            framed = torch.full((columns, 3, resolution + 2 * edge, resolution + 2 * edge), 255, dtype=torch.uint8)
            if event is not None:
                framed[numbers >= event] = torch.tensor([[[255]], [[0]], [[0]]], dtype=torch.uint8)
            framed[:, :, edge:-edge, edge:-edge] = frames[numbers]
            rows.append(framed.transpose(0, 1).transpose(1, 2).flatten(2))  # (3, R, columns * R)
    figure, ax = plt.subplots(figsize=(columns * 0.8, len(rows) * 0.8), layout="constrained")
    ax.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
    height = resolution + 2 * edge
    ax.set_yticks([(2 * n + 1) * height for n in range(len(shown))], [pair.property for pair, *_ in shown], rotation=90)
    ax.set_xticks([])
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    save(figure, path)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: figure.savefig(aside, dpi=150, bbox_inches="tight", format="png"))
    plt.close(figure)
    print(path)


def main():
    args = parse_args()
    networks = load(args)
    resolve_window(args, networks[0])
    items = find_items(args)
    name = f"{args.checkpoint}{' (untrained)' if args.untrained else ''}"
    print(f"surprise of {name} on {args.task}: windows of {args.num_frames} frames, {args.device}")

    started, measured, records, shown, short = time.perf_counter(), [], [], {}, 0
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, collate_fn=functools.partial(read_pairs, args), num_workers=args.workers
    )
    try:
        for done, found in enumerate(loader, start=1):
            for pair in found:
                curves = surprise_of_pair(networks, pair, args)
                measured.append((pair.property, *curves))
                shown.setdefault(pair.property, (pair, *curves))
                short += sum(len(video) < args.num_frames for video in (pair.possible, pair.impossible))
                records.append({
                    "property": pair.property, "name": pair.name, "event": pair.event, "same": pair.same,
                    "frames": [len(pair.possible), len(pair.impossible)],
                    "possible": curves[0].tolist(), "impossible": curves[1].tolist(),
                })  # fmt: skip
            left = (time.perf_counter() - started) * (len(items) - done) / done
            print(f"\r{done}/{len(items)}, {duration(left)} left  ", end="", flush=True)
        print()
    except video.BadVideo as error:  # its last line; before it, a worker's traceback
        fail(f"unreadable video: {str(error).splitlines()[-1]}")
    seconds, shown = time.perf_counter() - started, list(shown.values())
    if short:
        print(f"{short} videos are shorter than a window: continued by their last frame")

    summary = summarize(args.context_lengths, measured)
    print_table(summary)
    record = {
        "checkpoint": str(args.checkpoint), "step": load_checkpoint(args.checkpoint)["step"],
        "weights": "untrained" if args.untrained else "trained", "teacher": args.teacher and str(args.teacher),
        "predicts": "latents" if networks[2] else "pixels", "task": args.task, "properties": summary,
        "short_videos": short, "seconds": seconds, "pairs": records,
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }  # fmt: skip
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_aside(args.out / "results.json", lambda path: path.write_text(json.dumps(record) + "\n"))
        print(args.out / "results.json")
        draw_surprise(shown, args, args.out / "surprise.png")
        if args.save:
            draw_frames(shown, args.save)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
