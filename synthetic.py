"""The built-in videos, made as they are asked for."""

import functools
import math

import torch

# ---------------------------------------------------------------------------------------------------------------------
# built-in synthetic videos
MOTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TAU = 2 * math.pi


def uniforms(seed, numbers, count):
    """Independent uniform numbers in [0, 1) determined by (seed, number, column): (B,) int64 -> (B, count) float32.

    A counter-based generator (splitmix64's mixing), so that any sample can be drawn alone, on any device.
    """

    def mix(z):
        z = (z ^ (z >> 30 & (1 << 34) - 1)) * -4658895280553007687  # shifts are arithmetic in torch, hence the masks
        z = (z ^ (z >> 27 & (1 << 37) - 1)) * -7723592293110705685
        return z ^ (z >> 31 & (1 << 33) - 1)

    golden = -7046029254386353131
    seed = mix(torch.tensor(seed, device=numbers.device) + golden)
    column = torch.arange(1, count + 1, device=numbers.device)
    z = mix(mix(seed ^ numbers * golden)[:, None] + column * golden)
    return (z >> 40 & (1 << 24) - 1).float() * 2**-24


def shape_outlines(steps=360):
    """Radius of every shape as a function of the angle, (6, steps), and of its hole, (6,); all shapes have area pi."""
    angle = torch.arange(steps) * TAU / steps

    def polygon(corners):
        return math.cos(math.pi / corners) / (angle % (TAU / corners) - math.pi / corners).cos()

    circle = torch.ones(steps)
    from_tip = angle % (TAU / 5)
    from_tip = torch.minimum(from_tip, TAU / 5 - from_tip)
    valley = 0.42  # a star's inner radius; its sides are straight lines from tip to valley
    star = valley * math.sin(TAU / 10) / (valley * (TAU / 10 - from_tip).sin() + from_tip.sin())
    from_arm = angle % (TAU / 4)
    from_arm = torch.minimum(from_arm, TAU / 4 - from_arm)
    width = 0.36  # half of a cross's arm
    cross = torch.where(from_arm.tan() < width, 1 / from_arm.cos(), width / from_arm.sin())
    outline = torch.stack((circle, polygon(4), polygon(3), star, cross, circle))
    hole = torch.tensor([0, 0, 0, 0, 0, 0.55])
    scale = (outline.square().mean(1) - hole.square()).rsqrt()
    return outline * scale[:, None], hole * scale


GRAIN_STARTS = 2**20


@functools.cache
def _grain(piece, device):
    """A fixed strip of white noise, from which frames cut pieces that begin at any of GRAIN_STARTS places."""
    return torch.randn(GRAIN_STARTS + piece, generator=torch.Generator().manual_seed(0)).to(device).unfold(0, piece, 1)


def synthetic_clips(seed, numbers, num_frames, resolution):
    """Built-in videos: textured shapes moving over a textured background that moves too. Any device, no files.

    The frame is a wallpaper of one shape, two across and two down; all of them travel together in one of 8 directions,
    at a speed, size, angle and phase of their own. The background (the camera) travels independently of them, and so
    does a disc on top of both. Colors, textures and lighting vary from clip to clip, brightness flickers from frame to
    frame, and there is film grain. Phases are uniform, so that a single frame does not tell the motion; colors do not
    tell the shape. With fewer than 5 frames a step may exceed half the distance of two shapes: the motion is ambiguous.

    numbers: int64 (B,), which clips. Returns clips uint8 (B, 3, T, H, W), and labels int64 (B, 2): motion, shape (the
    indices in MOTIONS and SHAPES), independent of each other.
    """
    T, S, device = num_frames, resolution, numbers.device
    columns = iter(uniforms(seed, numbers, 64 + T).unbind(1))
    time = torch.linspace(0, 1, T, device=device)
    pixel = (torch.arange(S, device=device) + 0.5) / S  # lengths are in frame widths, times in clips

    def draw(low, high, count=None):  # (B,) or (B, count)
        if count is None:
            return next(columns) * (high - low) + low
        return torch.stack([next(columns) for _ in range(count)], dim=1) * (high - low) + low

    def travel(direction, speed):  # x and y of something that moves straight, 2 x (B, T)
        return (direction.cos() * speed)[:, None] * time, (-direction.sin() * speed)[:, None] * time

    def texture(x, y, darkest, waves=2):
        """Plane waves that move with (x, y), in a random color: (B, 3, T, S, S)."""
        frequency, angle, phase = draw(0.5, 1.5, waves), draw(0, TAU, waves), draw(0, TAU, waves)
        kx, ky = TAU * frequency * angle.cos(), TAU * frequency * angle.sin()
        px = kx[:, None, :, None] * (pixel - x[:, :, None, None]) + phase[:, None, :, None]  # (B, T, waves, S)
        py = ky[:, None, :, None] * (pixel - y[:, :, None, None])
        # cos(px + py) as a matrix product over the waves
        across, down = torch.cat((px.cos(), px.sin()), dim=2), torch.cat((py.cos(), -py.sin()), dim=2)
        field = down.transpose(2, 3) @ across * math.sqrt(2 / waves)  # (B, T, S, S)
        color, variation = draw(darkest, darkest + 0.15, 3), draw(-0.15, 0.15, 3)
        return color[:, :, None, None, None] + variation[:, :, None, None, None] * field[:, None]

    def offsets(x, y, across=1):
        """From every pixel to a moving point, or to the nearest of across*across copies: (B, T, 1, S), (B, T, S, 1)."""
        x, y = x + draw(0, 1)[:, None], y + draw(0, 1)[:, None]
        dx, dy = (pixel - x[:, :, None])[:, :, None, :], (pixel - y[:, :, None])[:, :, :, None]
        return dx - (dx * across).round() / across, dy - (dy * across).round() / across

    def cover(inside):  # signed distance inside an edge -> opacity (B, 1, T, S, S), one pixel wide
        return (inside * S + 0.5).clamp(0, 1).unsqueeze(1)

    motion, shape = draw(0, len(MOTIONS)).long(), draw(0, len(SHAPES)).long()
    clips = texture(*travel(draw(0, TAU), draw(0.2, 0.9)), darkest=0.3)

    x, y = travel(motion * (TAU / len(MOTIONS)), draw(0.4, 0.9))
    shapes = texture(x, y, darkest=0.55)
    dx, dy = offsets(x, y, across=2)
    outline, hole = (table.to(device) for table in shape_outlines())
    steps = outline.shape[1]
    radius, turned = draw(0.16, 0.21)[:, None, None, None], draw(-0.4, 0.4)[:, None, None, None]
    angle = ((torch.atan2(dy, dx) - turned) * (steps / TAU)).long() % steps
    distance = (dx.square() + dy.square()).sqrt()
    edge = outline.flatten()[shape[:, None, None, None] * steps + angle] * radius
    opacity = cover(edge - distance) * cover(distance - hole[shape][:, None, None, None] * radius)
    clips = torch.lerp(clips, shapes, opacity)

    x, y = travel(draw(0, TAU), draw(0, 0.6))
    dx, dy = offsets(x, y)
    disc = draw(0.25, 0.75, 3)[:, :, None, None, None].expand_as(clips)
    clips = torch.lerp(clips, disc, cover(draw(0.05, 0.1)[:, None, None, None] - (dx.square() + dy.square()).sqrt()))

    light = 1 + 0.05 * (TAU * (draw(0, 1)[:, None] + draw(0, 1)[:, None] * time)).sin() + draw(-0.2, 0.2, T)
    start = (uniforms(seed + 1, numbers, T) * GRAIN_STARTS).long()  # of every frame's piece
    grain = _grain(3 * S * S, device)[start].unflatten(2, (3, S, S)).transpose(1, 2)
    clips = (clips * light[:, None, :, None, None] + 0.2 * grain).clamp(0, 1)
    return (clips * 255).round().to(torch.uint8), torch.stack((motion, shape), dim=1)
