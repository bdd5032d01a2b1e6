"""Violation of expectation: of a possible and an impossible video, is the prediction error larger for the impossible?

    python physics.py --checkpoint out/student                # built-in pairs, no files needed
    python physics.py --task intphys --data IntPhys/dev       # O1, O2, O3
    python physics.py --task grasp --data GRASP/level2        # P_Gravity, IP_Gravity, ...
    python physics.py --task inflevel --data inflevel         # continuity.csv, solidity.csv, gravity.csv
    python physics.py --task pairs --data pairs.csv           # columns: possible, impossible, property (optional)

The protocol is Garrido et al. 2025 (arXiv 2502.11831), as in paper appendix D and table 9; docs/method.md section 7.
A window of M frames slides over the video. The encoder sees the first C frames of the window, the predictor predicts
the tokens of all later frames, and the surprise is the mean absolute error. Relative accuracy: pairs whose possible
video has the lower mean surprise over its windows. Absolute accuracy: videos on the correct side of a threshold on
their maximum surprise. Both are reported by property and context length C; "filtered" uses the smallest surprise of
each window over all C.

A student predicts the latents of its teacher: the one recorded in the checkpoint, or --teacher. The student of an EMA
run predicts those of its EMA teacher, V-JEPA 2's encoder those of its target_encoder (tools/convert.py keeps both). A
stage-1 teacher predicts normalized pixels. Writes results.json, with the surprise of every window, to --out.
Letters: P pairs, L frames of a video, M frames of a window, C context frames, W windows, R height and width in pixels.
"""

import copy
import csv
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import data
from cli import Parser, fail, interval95, plain_flags, progress, require_at_least, resolve_device, write_lines
from model import Encoder, Predictor, build, load_checkpoint, load_teacher_of, tubelets
from synthetic import synthetic_pair
from video import BadVideo, bad_video, list_frames, open_container, video_stream

STRIDE = 2  # frames from one window to the next (appendix D)
SYNTHETIC_SEED = 2**31 + 6  # no training run uses it


def parse_args():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--checkpoint", default="out/student", metavar="RUN|FILE", help="run folder or checkpoint file")
    flag("--teacher", metavar="RUN|FILE", help="teacher of a student; default: the one recorded in its checkpoint")
    flag("--untrained", action="store_true", help="baseline: the same networks, with random weights")
    flag("--task", choices=TASKS, default="synthetic")
    flag("--data", type=Path, metavar="FOLDER|CSV", help="videos of the task")
    flag("--pairs", type=int, default=600, help="number of built-in pairs, over all three properties")
    flag("--num-frames", type=int, help="window length M; default: intphys, grasp 16, inflevel 32, else the encoder's")
    flag("--context-lengths", type=int, nargs="+", metavar="C", help="in frames; default: 1/8, 2/8, ... 5/8 of M")
    flag("--frame-step", type=int, help="keep every n-th video frame; default: intphys 2, grasp 10, inflevel 5, else 1")
    flag("--batch-size", type=int, default=16, help="windows per forward pass")
    flag("--workers", type=int, default=0, help="processes that read videos")
    flag("--seed", type=int, default=0, help="of the built-in pairs and of untrained networks")
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the forward pass; default: bfloat16 on a GPU")
    flag("--out", type=Path, default=Path("out/physics"), help="folder for the results")
    args = parser.parse_args()

    resolve_device(args)
    if args.task == "synthetic" and (args.data or args.frame_step):
        fail("--task synthetic renders its own videos: --data and --frame-step are for the other tasks")
    if args.task != "synthetic" and not args.data:
        fail(f"--task {args.task} needs --data")
    args.frame_step = TASKS[args.task].frame_step if args.frame_step is None else args.frame_step
    require_at_least(args, 1, "pairs", "frame_step", "batch_size")
    require_at_least(args, 0, "seed", "workers")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# networks and their surprise


def load_networks(args):
    """The frozen context encoder, predictor and target encoder (None if pixels are predicted), and their step."""
    try:
        checkpoint = target = load_checkpoint(args.checkpoint)  # target: the checkpoint with the target encoder
        config, kind = checkpoint["model"], checkpoint["kind"]
        if "predictor" not in checkpoint:
            raise ValueError("holds no predictor")
        if args.teacher and kind != "student":
            raise ValueError("only a student has a --teacher; this checkpoint itself holds what is predicted")
        if kind == "student":
            args.teacher = args.teacher or checkpoint["args"]["teacher"]
            target = load_teacher_of(checkpoint, args.teacher)
        encoder = build(Encoder, config["encoder"], checkpoint.get("student", checkpoint["encoder"]))
        predictor = build(Predictor, config["predictor"], checkpoint["predictor"])
        target_encoder = None if kind == "teacher" else build(Encoder, target["model"]["encoder"], target["encoder"])
    except (OSError, ValueError) as error:
        fail(f"--checkpoint {args.checkpoint}: {error}")
    if args.untrained:  # networks of the same sizes
        torch.manual_seed(args.seed)
        encoder, predictor = Encoder(**encoder.config), Predictor(**predictor.config)
        if target_encoder:  # an EMA teacher starts as a copy of the student
            target_encoder = Encoder(**target_encoder.config) if kind == "student" else copy.deepcopy(encoder)
    networks = encoder, predictor, target_encoder
    for network in filter(None, networks):
        network.float().eval().requires_grad_(False).to(args.device)
    return networks, checkpoint["step"]


def resolve_window(args, encoder):
    """Fill in --num-frames and --context-lengths, and set args.resolution."""
    tubelet, args.resolution = encoder.tubelet_size, encoder.config["resolution"]
    if args.num_frames is None:
        args.num_frames = TASKS[args.task].num_frames or encoder.config["num_frames"]
    M = args.num_frames
    eighths = [C for C in (M * k // 8 for k in range(1, 6)) if C and C % tubelet == 0]
    args.context_lengths = sorted(set(args.context_lengths or eighths))
    if M % tubelet or not args.context_lengths or any(C % tubelet or not 0 < C < M for C in args.context_lengths):
        fail(f"--num-frames {M}, --context-lengths: must be multiples of {tubelet} frames, contexts shorter than {M}")


@torch.inference_mode()
def surprise(networks, frames, args):
    """The surprise of a video (L, 3, R, R) at each context length and window: float32 on the CPU, (number of C, W).

    W = (L - M) // STRIDE + 1: trailing frames that fill no window are ignored, and a video shorter than a window is
    padded with its last frame.
    """
    encoder, predictor, target_encoder = networks
    padding = frames[-1:].expand(max(0, args.num_frames - len(frames)), -1, -1, -1)
    windows = torch.cat((frames, padding)).unfold(0, args.num_frames, STRIDE)  # (W, 3, R, R, M), a view
    curves = []  # (number of C, B) of each batch
    for batch in windows.split(args.batch_size):
        clips = data.normalize(batch.permute(0, 1, 4, 2, 3), args.device)  # (B, 3, M, R, R)
        grid = encoder.grid(clips)
        ids = torch.arange(math.prod(grid), device=args.device).expand(len(clips), -1)
        errors = []
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if target_encoder:  # latents, as in train_student.py
                targets = F.layer_norm(target_encoder(clips).float(), (target_encoder.width,))  # (B, N, D)
            else:  # pixels normalized per tubelet and color channel, as in train_teacher.py
                pixels = tubelets(clips, encoder.tubelet_size, encoder.patch_size).unflatten(-1, (3, -1))
                mean, std = pixels.mean(-1, keepdim=True), pixels.std(-1, keepdim=True)
                targets = ((pixels - mean) / (std + 1e-6)).flatten(-2)
            for C in args.context_lengths:
                seen = C // encoder.tubelet_size * grid[1] * grid[2]  # tokens are ordered by time
                context_ids, target_ids = ids[:, :seen], ids[:, seen:]
                predicted = predictor(encoder(clips, context_ids), context_ids, target_ids, grid, 0)  # short-range
                errors.append((predicted.float() - targets[:, seen:]).abs().mean((1, 2)))
        curves.append(torch.stack(errors).cpu())
    return torch.cat(curves, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# pairs of videos


class Item(NamedTuple):  # one or more pairs
    property: str
    possible: list  # paths of video files, or of folders of images
    impossible: list
    starts: tuple = (0, 0)  # first frame used, of the possible videos and of the impossible ones


def find_items(args):
    """The list of what `read_pairs` reads."""
    if args.task == "synthetic":
        return range(args.pairs)
    try:
        items = TASKS[args.task].find_items(args.data)
    except KeyError as error:
        fail(f"--data {args.data}: a file has no {error}")
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        fail(f"--data {args.data}: {error}")
    if not items:
        fail(f"--data {args.data} holds no pairs of {args.task} (--help shows the expected files)")
    for path in (path for item in items for path in (*item.possible, *item.impossible)):
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
            (possible if status["header"]["is_possible"] else impossible).append(movie / "scene")
        if len(possible) != 2 or len(impossible) != 2:
            raise ValueError(f"{scene}: {len(possible)} possible and {len(impossible)} impossible movies, not 2 each")
        items.append(Item(scene.parent.name, possible, impossible))
    return items


def find_grasp(root):
    """Items of GRASP level 2: ROOT/P_Gravity/x.mp4 is possible, ROOT/IP_Gravity/x.mp4 impossible; 16 properties."""
    paths = sorted(root.glob("P_*/*.mp4"))
    return [Item(path.parent.name[2:], [path], [root / f"I{path.parent.name}" / path.name]) for path in paths]


def find_inflevel(root):
    """Items of InfLevel: ROOT/continuity.csv, solidity.csv and gravity.csv, as the protocol's authors publish them.

    Columns: vid1_path, vid2_path (relative to ROOT), vid1_label, vid1_end_priming_2, vid2_end_priming_2. A video starts
    after its priming; the longer one of a pair is shortened at its beginning.
    """
    items = []
    for property in ("continuity", "solidity", "gravity"):
        for row in read_csv(root / f"{property}.csv"):
            order = (1, 2) if row["vid1_label"] == "possible" else (2, 1)
            paths = [root / row[f"vid{n}_path"] for n in order]
            ends = [count_frames(path) for path in paths]
            used = min(end - int(row[f"vid{n}_end_priming_2"]) - 1 for end, n in zip(ends, order, strict=True))
            items.append(Item(property, paths[:1], paths[1:], starts=[end - used for end in ends]))
    return items


def find_csv_pairs(file):
    """Items of a csv file with columns possible, impossible (paths relative to the file) and, optionally, property."""
    root, rows = file.parent, read_csv(file)
    return [Item(row.get("property") or "pairs", [root / row["possible"]], [root / row["impossible"]]) for row in rows]


def read_csv(file):
    return list(csv.DictReader(file.read_text("utf-8-sig").splitlines(), restval=""))


def count_frames(path):
    with open_container(path) as container:
        stream = video_stream(path, container)
        return stream.frames or sum(1 for _ in container.decode(stream))


class Task(NamedTuple):
    """Settings of a task. Those of the three datasets are taken from the code of Garrido et al."""

    frame_step: int
    num_frames: int | None  # window length; None: what the encoder was trained with
    find_items: Callable | None  # value of --data -> list of `Item`
    max_frames: int | None = None  # frames used: max_frames // frame_step, 49 of IntPhys's 99
    square: bool = False  # crop frames to a centered square before resizing, instead of resizing the whole frame


TASKS = {
    "synthetic": Task(1, None, None),
    "pairs": Task(1, None, find_csv_pairs),
    "intphys": Task(2, 16, find_intphys, max_frames=99, square=True),
    "grasp": Task(10, 16, find_grasp, square=True),
    "inflevel": Task(5, 32, find_inflevel),
}


def read_pairs(args, item):
    """Read an `Item`, or render a built-in pair: a list of (property, name, possible, impossible), uint8 (L, 3, R, R).

    The two possible and two impossible movies of an IntPhys scene are matched so that pairs share as many frames at the
    beginning as possible.
    """
    if args.task == "synthetic":
        property, *videos = synthetic_pair(SYNTHETIC_SEED + args.seed, item, 3 * args.num_frames, args.resolution)
        return [(property, f"built-in {item}", *videos)]
    possible = [(path, read_video(path, args, item.starts[0])) for path in item.possible]
    impossible = [(path, read_video(path, args, item.starts[1])) for path in item.impossible]
    orders = [list(zip(possible, order, strict=True)) for order in itertools.permutations(impossible)]
    pairs = max(orders, key=lambda pairs: sum(shared_frames(a, b) for (_, a), (_, b) in pairs))
    return [(item.property, f"{x} | {y}", a, b) for (x, a), (y, b) in pairs]


def read_arrays(args, item):
    """`read_pairs` with arrays: a worker passes these through a pipe, but tensors through /dev/shm (Docker: 64 MB)."""
    return [(*names, a.numpy(), b.numpy()) for *names, a, b in read_pairs(args, item)]


def shared_frames(a, b):
    """The number of identical frames at the beginning of two videos (L, 3, R, R)."""
    return len(list(itertools.takewhile(lambda pair: torch.equal(*pair), zip(a, b, strict=False))))


def decode(file):
    """Yield the decoded frames of a video or an image."""
    with open_container(file) as container:
        yield from container.decode(video_stream(file, container))


def read_video(path, args, start=0):
    """Read every --frame-step-th frame of a video, or of a folder of images, from `start` on: uint8 (L, 3, R, R)."""
    task, files, frames = TASKS[args.task], list_frames(path) if path.is_dir() else [path], []
    stop = start + task.max_frames // args.frame_step * args.frame_step if task.max_frames else None
    with bad_video(path):
        decoded = itertools.chain.from_iterable(map(decode, files))
        for frame in itertools.islice(decoded, start, stop, args.frame_step):
            frame = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)  # (3, H, W)
            if task.square:
                frame = TF.center_crop(frame, min(frame.shape[1:]))
            frames.append(TF.resize(frame, [args.resolution, args.resolution], antialias=False))  # as the authors do
    if not frames:
        raise BadVideo(f"{path}: no frames from frame {start} on")
    return torch.stack(frames)


# ---------------------------------------------------------------------------------------------------------------------
# results


def accuracies(context_lengths, results):
    """The `accuracy` of each property and of "all" pairs: {property: {context length or "filtered": accuracy}}."""

    def scores(results, kind):  # mean and maximum over the windows of each video: (number of C + 1, P, 2)
        curves = [torch.tensor(result[kind]) for result in results]  # of each video (number of C, W)
        curves = [torch.cat((c, c.amin(0, keepdim=True))) for c in curves]  # the last row is "filtered"
        return torch.stack([torch.stack((c.mean(1), c.amax(1)), dim=1) for c in curves], dim=1)

    table = {}
    for property in [*dict.fromkeys(result["property"] for result in results), "all"]:
        chosen = [result for result in results if property in (result["property"], "all")]
        columns = [*context_lengths, "filtered"], scores(chosen, "possible"), scores(chosen, "impossible")
        table[property] = {column: accuracy(a, b) for column, a, b in zip(*columns, strict=True)}
    return table


def accuracy(possible, impossible):
    """Accuracies in percent from the mean and maximum scores (P, 2) of the possible and impossible video of each pair.

    A tie of mean scores is wrong. The threshold for the maximum scores is the lowest score of a possible video that is
    above 90% of the possible videos (calibrated on these videos, as in the authors' code); with fewer than 10 pairs, it
    is their highest score.
    """
    P = len(possible)
    right = int((possible[:, 0] < impossible[:, 0]).sum())
    threshold = possible[:, 1].sort().values[min(math.ceil(0.9 * P), P - 1)]
    separated = int((possible[:, 1] < threshold).sum() + (impossible[:, 1] > threshold).sum())
    return {
        "pairs": P,
        "relative_accuracy": 100 * right / P,
        "relative_interval95": interval95(right, P),
        "absolute_accuracy": 100 * separated / (2 * P),
        "absolute_interval95": interval95(separated, 2 * P),
    }


def print_accuracies(table):
    for kind, score in (("relative", "pairs, mean surprise"), ("absolute", "videos, maximum surprise")):
        print(f"{kind} accuracy in % of {score} (95% interval), by context length in frames")
        print(f"{'property':20}{'pairs':>6}" + "".join(f"{column:>19}" for column in table["all"]))
        for property, row in table.items():
            line = f"{property:20}{row['filtered']['pairs']:6}"
            for result in row.values():
                low, high = result[f"{kind}_interval95"]
                line += f"{result[f'{kind}_accuracy']:.1f} ({low:.0f} to {high:.0f})".rjust(19)
            print(line)


def main():
    args = parse_args()
    networks, step = load_networks(args)
    resolve_window(args, networks[0])
    items = find_items(args)
    print(f"surprise of {args.checkpoint} on {args.task}, windows of {args.num_frames} frames")

    results, read = [], functools.partial(read_arrays, args)
    loader = torch.utils.data.DataLoader(items, batch_size=None, collate_fn=read, num_workers=args.workers)
    try:
        for pairs in progress(loader):
            for property, name, *videos in pairs:
                possible, impossible = (surprise(networks, torch.from_numpy(video), args).tolist() for video in videos)
                results.append({"property": property, "name": name, "frames": list(map(len, videos))})
                results[-1] |= {"possible": possible, "impossible": impossible}  # [context length][window]
    except BadVideo as error:
        fail(f"unreadable video: {str(error).splitlines()[-1]}")  # a worker's error begins with its traceback

    short = sum(length < args.num_frames for result in results for length in result["frames"])
    if short:
        print(f"{short} videos are shorter than a window and were padded with their last frame")
    table = accuracies(args.context_lengths, results)
    print_accuracies(table)
    record = {"step": step, "predicts": "latents" if networks[2] else "pixels", "short_videos": short}
    record |= {"properties": table, "pairs": results, "args": plain_flags(args)}
    write_lines(args.out / "results.json", [json.dumps(record)])
    print(args.out / "results.json")


if __name__ == "__main__":
    main()
