"""Built-in videos, rendered on request: labeled clips for training and probing, and pairs for physics.py.

Letters: B clips, T frames, S height and width in pixels. Lengths are in frame widths, times in clips: the first frame
is at 0, the last one at 1.
"""

import functools
import math
from typing import NamedTuple

import torch

MOTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TAU = 2 * math.pi
ANGLES = 360  # angles at which `shape_outlines` gives the radius
FLICKER, GRAIN = 0.1, 0.04  # largest change of brightness; standard deviation of the noise
GRAIN_STARTS = 2**20  # number of offsets into the noise at which a frame's grain can begin

# ---------------------------------------------------------------------------------------------------------------------
# random numbers


def uniforms(seed, numbers, count):
    """Independent uniform numbers in [0, 1): (B,) int64 sample numbers -> (B, count) float32.

    Each depends only on (seed, sample number, column), on every device: splitmix64 as a counter-based generator.
    """
    golden = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
    seed = _mix(torch.tensor(seed, device=numbers.device) + golden)
    rows = _mix(seed ^ (numbers * golden))
    columns = torch.arange(1, count + 1, device=numbers.device)
    bits = _mix(rows[:, None] + columns * golden)
    return _shift_right(bits, 40).float() * 2**-24


def _mix(z):
    """Scramble int64 values: the finalizer of splitmix64."""
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    return z ^ _shift_right(z, 31)


def _shift_right(z, bits):
    """Logical right shift of int64 values; torch's >> is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class _Random:
    """Scales prepared numbers in [0, 1), one per draw: Python floats for one video, tensors (B,) for a batch."""

    def __init__(self, numbers):
        self.numbers = iter(numbers)

    def uniform(self, low, high):
        return next(self.numbers) * (high - low) + low

    def uniforms(self, low, high, count):
        """(B, count); only for batches."""
        return torch.stack([next(self.numbers) for _ in range(count)], dim=1) * (high - low) + low


# ---------------------------------------------------------------------------------------------------------------------
# shapes


def shape_outlines():
    """Radius of each shape at ANGLES angles, (6, ANGLES), and radius of the hole in it, (6,). All areas are pi."""
    angle = torch.arange(ANGLES) * TAU / ANGLES

    def polygon(corners):
        return math.cos(math.pi / corners) / (angle % (TAU / corners) - math.pi / corners).cos()

    def from_nearest(count):  # angle to the nearest of `count` tips or arms
        past = angle % (TAU / count)
        return torch.minimum(past, TAU / count - past)

    circle = torch.ones(ANGLES)
    from_tip, valley = from_nearest(5), 0.42  # a star's inner radius; its sides are straight lines from tip to valley
    star = valley * math.sin(TAU / 10) / (valley * (TAU / 10 - from_tip).sin() + from_tip.sin())
    from_arm, width = from_nearest(4), 0.36  # half the width of a cross's arm
    cross = torch.where(from_arm.tan() < width, 1 / from_arm.cos(), width / from_arm.sin())
    outline = torch.stack((circle, polygon(4), polygon(3), star, cross, circle))
    hole = torch.tensor([0, 0, 0, 0, 0, 0.55])
    scale = (outline.square().mean(1) - hole.square()).rsqrt()
    return outline * scale[:, None], hole * scale


def _pixel_centers(size, device=None):
    return (torch.arange(size, device=device) + 0.5) / size


def _length(dx, dy):
    return (dx.square() + dy.square()).sqrt()


def _angle_index(dx, dy, rotation=0.0):
    """The index into `shape_outlines` of a direction, for a shape rotated by `rotation` (radians)."""
    return ((torch.atan2(dy, dx) - rotation) * (ANGLES / TAU)).long() % ANGLES


def _opacity(depth, size):
    """Opacity at a signed distance inside an edge: 0 outside, 1 inside, a ramp of one pixel between."""
    return (depth * size + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# clips


def synthetic_clips(seed, numbers, num_frames, resolution):
    """Render the clips with these numbers: a bright textured shape that moves over a smooth moving background.

    The shape moves in one of 8 directions; its speed, size, angle, position and texture vary from clip to clip. What
    leaves the frame on one side comes back on the other. The background (camera motion) moves independently. Colors
    vary from clip to clip, brightness flickers a little from frame to frame, and there is film grain. Positions are
    uniform, so a single frame does not reveal the motion, and colors do not reveal the shape. The shape moves
    0.28 to 0.42 frame widths in a clip, so that its direction shows only over many frames.

    numbers: (B,) int64; its device renders. Returns clips (B, 3, T, S, S) uint8 and labels (B, 2) int64: the motion and
    the shape, independent of each other, as indices of MOTIONS and SHAPES.
    """
    T, S, device = num_frames, resolution, numbers.device
    rng = _Random(uniforms(seed, numbers, 64 + T).unbind(1))
    time, pixels = torch.linspace(0, 1, T, device=device), _pixel_centers(S, device)
    motion, shape = rng.uniform(0, len(MOTIONS)).long(), rng.uniform(0, len(SHAPES)).long()

    color = rng.uniforms(0.2, 0.5, 3)
    camera = _straight_path(rng.uniform(0, TAU), rng.uniform(0, 0.6), time)
    clips = _texture(rng, camera, pixels, color, contrast=0.15, frequencies=(0.3, 0.9))

    path = _straight_path(motion * (TAU / len(MOTIONS)), rng.uniform(0.28, 0.42), time)
    brighter = color + rng.uniforms(0.3, 0.45, 3)
    texture = _texture(rng, path, pixels, brighter, contrast=0.12, frequencies=(0.3, 1.2))
    clips = torch.lerp(clips, texture, _shape_opacity(rng, path, pixels, shape))

    light = 1 + rng.uniforms(-FLICKER, FLICKER, T)
    starts = (uniforms(seed + 1, numbers, T) * GRAIN_STARTS).long()
    grain = _grain(3 * S * S, device)[starts].unflatten(2, (3, S, S)).transpose(1, 2)
    clips = (clips * light[:, None, :, None, None] + GRAIN * grain).clamp(0, 1)
    return (clips * 255).round().to(torch.uint8), torch.stack((motion, shape), dim=1)


def _straight_path(direction, speed, time):
    """x and y, (B, T) each, of a point that starts at (0, 0). direction: (B,) radians, counterclockwise from right."""
    return (direction.cos() * speed)[:, None] * time, (-direction.sin() * speed)[:, None] * time


def _texture(rng, path, pixels, color, contrast, frequencies):
    """Two plane waves around a color (B, 3) that move along the path: (B, 3, T, S, S)."""
    waves, (x, y) = 2, path
    frequency = rng.uniforms(*frequencies, waves)
    angle, phase = rng.uniforms(0, TAU, waves), rng.uniforms(0, TAU, waves)
    kx, ky = TAU * frequency * angle.cos(), TAU * frequency * angle.sin()
    px = kx[:, None, :, None] * (pixels - x[:, :, None, None]) + phase[:, None, :, None]  # (B, T, waves, S)
    py = ky[:, None, :, None] * (pixels - y[:, :, None, None])
    # cos(px + py) = cos(px) cos(py) - sin(px) sin(py), summed over the waves by one matrix product
    across, down = torch.cat((px.cos(), px.sin()), dim=2), torch.cat((py.cos(), -py.sin()), dim=2)
    field = down.transpose(2, 3) @ across * math.sqrt(2 / waves)  # (B, T, S, S)
    variation = rng.uniforms(-contrast, contrast, 3)
    return color[:, :, None, None, None] + variation[:, :, None, None, None] * field[:, None]


def _shape_opacity(rng, path, pixels, shape):
    """Opacity of the moving shape, which starts at a random position: (B, 1, T, S, S). shape: (B,) index of SHAPES."""
    x, y = (coordinate + rng.uniform(0, 1)[:, None] for coordinate in path)
    dx, dy = (pixels - x[:, :, None])[:, :, None, :], (pixels - y[:, :, None])[:, :, :, None]
    dx, dy = dx - dx.round(), dy - dy.round()  # what leaves the frame comes back on the other side
    radius, rotation = rng.uniform(0.26, 0.36)[:, None, None, None], rng.uniform(-0.5, 0.5)[:, None, None, None]
    outlines, holes = (table.to(pixels.device) for table in shape_outlines())
    distance, angle = _length(dx, dy), _angle_index(dx, dy, rotation)
    edge = outlines.flatten()[shape[:, None, None, None] * ANGLES + angle] * radius
    hole = holes[shape][:, None, None, None] * radius
    opacity = _opacity(edge - distance, len(pixels)) * _opacity(distance - hole, len(pixels))
    return opacity[:, None]


@functools.cache
def _grain(count, device):
    """White noise (GRAIN_STARTS + 1, count). Row n + 1 is row n shifted by one value, so they share memory."""
    noise = torch.randn(GRAIN_STARTS + count, generator=torch.Generator().manual_seed(0))
    return noise.to(device).unfold(0, count, 1)


# ---------------------------------------------------------------------------------------------------------------------
# physics pairs

PROPERTIES = ("permanence", "shape", "color", "continuity", "solidity", "gravity")
OCCLUDED = ("permanence", "shape", "color")  # properties whose event happens behind an occluder
OCCLUDER = (0.32, 0.68)  # left and right edge; at least 2.7 times as wide as `_Object.size`, so it hides every object
WALL = (0.6, 0.7)  # left and right edge


class _Object(NamedTuple):
    """The moving object of one video of a pair."""

    x: torch.Tensor  # (T,) position of its center
    y: torch.Tensor
    size: float  # from the center to the farthest point
    shape: int  # index of SHAPES
    color: torch.Tensor  # (3,) in [0, 1]
    visible: bool = True


def synthetic_pair(seed, number, num_frames, resolution):
    """Render built-in pair `number`: a shape over a textured background, perhaps with an occluder or a wall.

    The property is PROPERTIES[number % 6]. After the event, this happens in the impossible video:

    permanence  the shape does not come out from behind the occluder, or, in every other pair, comes out of nowhere
    shape       it comes out as another shape
    color       it comes out in another color
    continuity  it jumps
    solidity    it passes through a wall that it should bounce off
    gravity     when released, it falls upward

    Returns the property, and the possible and the impossible video, (T, 3, S, S) uint8, identical until the event.
    """
    T, S = num_frames, resolution
    property = PROPERTIES[number % len(PROPERTIES)]
    rng = _Random(uniforms(seed, torch.tensor([number]), 64)[0].tolist())
    noise = torch.Generator().manual_seed(number)
    time = torch.arange(T) / (T - 1)

    possible, impossible, event, mirrored = _draw_objects(property, number, rng, noise, time)
    background, gray = _background(rng, S), torch.tensor(rng.uniform(0.5, 0.75))
    grain = torch.randn(T, 3, S, S, generator=noise) * 0.03
    possible, impossible = (_render(property, obj, background, gray, grain) for obj in (possible, impossible))
    impossible = torch.where((time > event)[:, None, None, None], impossible, possible)
    if mirrored:
        possible, impossible = possible.flip(3), impossible.flip(3)
    return property, possible, impossible


def _draw_objects(property, number, rng, noise, time):
    """Draw a pair's possible and impossible `_Object`, the time of the event, and whether to mirror the videos.

    The impossible object is shown only after the event. time: (T,).
    """
    size, speed, event = rng.uniform(0.1, 0.13), rng.uniform(0.7, 0.8), rng.uniform(0.35, 0.5)
    if property in OCCLUDED:
        event = 0.5  # in the middle of the occluder
    shape = int(rng.uniform(0, len(SHAPES)))
    mirrored, starts_at_top = rng.uniform(0, 1) >= 0.5, rng.uniform(0, 1) < 0.5
    color = torch.tensor([0.95, 0.6, 0.25])[torch.randperm(3, generator=noise)]
    x, y = 0.5 + speed * (time - 0.5), torch.full_like(time, rng.uniform(0.3, 0.7))
    possible = impossible = _Object(x, y, size, shape, color)

    if property == "permanence":
        visible = number // len(PROPERTIES) % 2 == 0
        possible, impossible = possible._replace(visible=visible), possible._replace(visible=not visible)
    elif property == "shape":
        other = (shape + 1 + int(rng.uniform(0, len(SHAPES) - 1))) % len(SHAPES)
        impossible = possible._replace(shape=other)
    elif property == "color":
        impossible = possible._replace(color=color.roll(1))
    elif property == "continuity":
        top = torch.full_like(time, rng.uniform(0.2, 0.35))
        before, after = (top, 1 - top) if starts_at_top else (1 - top, top)
        possible, impossible = possible._replace(y=before), possible._replace(y=after)
    elif property == "solidity":
        contact = WALL[0] - size
        possible = impossible._replace(x=contact - (contact - x).abs())
    else:  # gravity
        resting = possible._replace(x=torch.full_like(time, rng.uniform(0.3, 0.7)))
        fall = 4 * (time - event).clamp(min=0).square()
        possible = resting._replace(y=(0.5 + fall).clamp(max=1 - size))
        impossible = resting._replace(y=(0.5 - fall).clamp(min=size))
    return possible, impossible, event, mirrored


def _background(rng, size):
    """A plane wave in each color channel: (3, S, S)."""
    pixels, channels = _pixel_centers(size), []
    for _ in range(3):
        angle, frequency = rng.uniform(0, TAU), rng.uniform(0.5, 1.5)
        phase, strength = rng.uniform(0, TAU), rng.uniform(0.03, 0.07)
        along = math.cos(angle) * pixels + math.sin(angle) * pixels[:, None]
        channels.append(0.35 + strength * (TAU * frequency * along + phase).cos())
    return torch.stack(channels)


def _render(property, obj, background, gray, grain):
    """Render one video of a pair: (T, 3, S, S) uint8."""
    T, _, S, _ = grain.shape
    layers = []  # from back to front: (opacity (T, 1, S, S), color)
    if property == "solidity":  # the wall is behind the object, which stays visible as it passes through
        layers.append((_bar_opacity(*WALL, S).expand(T, 1, S, S), gray))
    if obj.visible:
        layers.append((_object_opacity(obj, S), obj.color[:, None, None]))
    if property in OCCLUDED:
        layers.append((_bar_opacity(*OCCLUDER, S).expand(T, 1, S, S), gray))
    frames = background.expand(T, 3, S, S)
    for opacity, color in layers:
        frames = torch.lerp(frames, color.expand_as(frames), opacity)
    return ((frames + grain).clamp(0, 1) * 255).round().to(torch.uint8)


def _bar_opacity(left, right, size):
    """Opacity of a vertical bar, in one row of pixels: (S,)."""
    pixels = _pixel_centers(size)
    return _opacity(torch.minimum(pixels - left, right - pixels), size)


def _object_opacity(obj, size):
    """Opacity of a moving object: (T, 1, S, S)."""
    pixels = _pixel_centers(size)
    dx, dy = (pixels - obj.x[:, None])[:, None, :], (pixels - obj.y[:, None])[:, :, None]
    outlines, holes = shape_outlines()
    farthest = outlines[obj.shape].max()
    outline, hole = (table[obj.shape] / farthest * obj.size for table in (outlines, holes))
    distance = _length(dx, dy)
    opacity = _opacity(outline[_angle_index(dx, dy)] - distance, size)
    if hole > 0:
        opacity = opacity * _opacity(distance - hole, size)
    return opacity[:, None]
