"""Built-in videos, rendered on request: labeled clips for training and probing, and pairs for physics.py.

Letters: B clips, T frames, S height and width in pixels. Lengths are in frame widths, times in clips: the first frame
is at 0, the last one at 1.
"""

import functools
import math

import torch

MOTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = 4  # equal classes of the radius
RADIUS = 0.26, 0.36
PROPERTIES = ("permanence", "shape", "continuity")  # of physics pairs, as in IntPhys O1, O2, O3
TAU = 2 * math.pi
ANGLES = 360  # angles at which `shape_outlines` gives the radius
FLICKER, GRAIN = 0.1, 0.04  # largest change of brightness; standard deviation of the noise
GRAIN_STARTS = 2**20  # number of offsets into the noise at which a frame's grain can begin


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


def _mix(z):  # the finalizer of splitmix64
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    return z ^ _shift_right(z, 31)


def _shift_right(z, bits):
    """Logical right shift of int64 values; torch's >> is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class _Random:
    """Draws columns of `uniforms` one after the other, scaled to [low, high)."""

    def __init__(self, *key):
        self.columns = iter(uniforms(*key).unbind(1))

    def uniform(self, low, high):
        return next(self.columns) * (high - low) + low  # (B,)

    def uniforms(self, low, high, count):
        return torch.stack([self.uniform(low, high) for _ in range(count)], dim=1)  # (B, count)


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


def synthetic_clips(seed, numbers, num_frames, resolution):
    """Render the clips with these numbers: a bright textured shape that moves over a smooth moving background.

    The shape moves in one of 8 directions; its speed, size, angle, position and texture vary from clip to clip. What
    leaves the frame on one side comes back on the other. The background (camera motion) moves independently. Brightness
    flickers a little from frame to frame, and there is film grain. Positions are uniform and colors independent of the
    shape, so that a single frame does not reveal the motion. A clip's direction shows only over many frames.

    numbers: (B,) int64; its device renders. Returns clips (B, 3, T, S, S) uint8 and independent labels (B, 3) int64:
    indices of MOTIONS and SHAPES, and the size, from 0 to SIZES - 1.
    """
    T, S, device = num_frames, resolution, numbers.device
    rng, time = _Random(seed, numbers, 64 + T), torch.linspace(0, 1, T, device=device)
    pixels = (torch.arange(S, device=device) + 0.5) / S
    motion, shape = rng.uniform(0, len(MOTIONS)).long(), rng.uniform(0, len(SHAPES)).long()

    color = rng.uniforms(0.2, 0.5, 3)
    camera = _straight_path(rng.uniform(0, TAU), rng.uniform(0, 0.6), time)
    clips = _texture(rng, camera, pixels, color, contrast=0.15, frequencies=(0.3, 0.9))

    path = _straight_path(motion * (TAU / len(MOTIONS)), rng.uniform(0.28, 0.42), time)
    brighter = color + rng.uniforms(0.3, 0.45, 3)
    texture = _texture(rng, path, pixels, brighter, contrast=0.12, frequencies=(0.3, 1.2))
    x, y = (coordinate + rng.uniform(0, 1)[:, None] for coordinate in path)
    radius, rotation = rng.uniform(*RADIUS), rng.uniform(-0.5, 0.5)
    size = ((radius - RADIUS[0]) / (RADIUS[1] - RADIUS[0]) * SIZES).long().clamp(max=SIZES - 1)
    clips = torch.lerp(clips, texture, _shape_opacity(x, y, radius, rotation, shape, pixels))
    return _film(clips, rng, seed, numbers), torch.stack((motion, shape, size), dim=1)


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


def _shape_opacity(x, y, radius, rotation, shape, pixels):
    """Opacity (B, 1, T, S, S) of a shape at x, y (B, T). radius, rotation (radians), shape (index of SHAPES): (B,)."""
    dx, dy = (pixels - x[:, :, None])[:, :, None, :], (pixels - y[:, :, None])[:, :, :, None]
    dx, dy = dx - dx.round(), dy - dy.round()
    radius, rotation, shape = (value[:, None, None, None] for value in (radius, rotation, shape))
    outlines, holes = (table.to(pixels.device) for table in shape_outlines())
    distance = (dx.square() + dy.square()).sqrt()
    angle = ((torch.atan2(dy, dx) - rotation) * (ANGLES / TAU)).long() % ANGLES
    edge, hole = outlines.flatten()[shape * ANGLES + angle] * radius, holes[shape] * radius
    # Each edge is a ramp of one pixel.
    outer, inner = ((depth * len(pixels) + 0.5).clamp(0, 1) for depth in (edge - distance, distance - hole))
    return (outer * inner)[:, None]


def _film(clips, rng, seed, numbers):
    """Film clips (B, 3, T, S, S) in [0, 1]: add flicker and grain, and round to uint8."""
    T, S = clips.shape[2:4]
    light = 1 + rng.uniforms(-FLICKER, FLICKER, T)
    starts = (uniforms(seed + 1, numbers, T) * GRAIN_STARTS).long()
    grain = _grain(3 * S * S, clips.device)[starts].unflatten(2, (3, S, S)).transpose(1, 2)
    clips = (clips * light[:, None, :, None, None] + GRAIN * grain).clamp(0, 1)
    return (clips * 255).round().to(torch.uint8)


@functools.cache
def _grain(count, device):
    """White noise (GRAIN_STARTS + 1, count). Row n + 1 is row n shifted by one value, so they share memory."""
    noise = torch.randn(GRAIN_STARTS + count, generator=torch.Generator().manual_seed(0))
    return noise.to(device).unfold(0, count, 1)


def synthetic_pair(seed, number, num_frames, resolution):
    """Render built-in pair `number`: a shape that moves to the right over a textured background.

    As in IntPhys, the impossible video begins as one possible video and ends as another one, which differs in a single
    property, PROPERTIES[number % 3]: permanence (the shape vanishes or, in every other pair, appears out of nowhere),
    shape (it turns into another one) or continuity (it jumps up or down).
    Returns the property, and the possible and the impossible video, (T, 3, S, S) uint8.
    """
    T, property = num_frames, PROPERTIES[number % len(PROPERTIES)]
    numbers = torch.tensor([number, number])  # two equal scenes, (2, 3, T, S, S)
    rng, time = _Random(seed, numbers, 64 + T), torch.linspace(0, 1, T)
    pixels = (torch.arange(resolution) + 0.5) / resolution
    event = T // 3 + int(rng.uniform(0, T / 3)[0])

    color, still = rng.uniforms(0.2, 0.5, 3), torch.zeros(2, T)
    background = _texture(rng, (still, still), pixels, color, contrast=0.15, frequencies=(0.3, 0.9))
    x = rng.uniform(0.25, 0.35)[:, None] + rng.uniform(0.3, 0.4)[:, None] * time
    y = rng.uniform(0.25, 0.35)[:, None].repeat(1, T)
    shape, other = rng.uniform(0, len(SHAPES)).long(), rng.uniform(1, len(SHAPES)).long()
    visible, second = torch.ones(2), number // len(PROPERTIES) % 2
    if property == "permanence":
        visible[1 - second] = 0
    elif property == "shape":
        shape[1] = (shape + other)[1] % len(SHAPES)
    else:
        y[second] = 1 - y[second]
    opacity = _shape_opacity(x, y, rng.uniform(0.12, 0.14), rng.uniform(-0.5, 0.5), shape, pixels)
    brighter = (color + rng.uniforms(0.3, 0.45, 3))[:, :, None, None, None]
    scenes = torch.lerp(background, brighter.expand_as(background), opacity * visible[:, None, None, None, None])

    possible, impossible = _film(scenes, rng, seed, numbers).transpose(1, 2)
    return property, possible, torch.cat((possible[:event], impossible[event:]))
