"""V-JEPA 2's training augmentation for probes (`evals/video_classification_frozen`; docs/method.md section 6).

Each clip gets its own random resized crop, RandAugment and random erasing; all its frames get the same ones. There is
no flip. V-JEPA 2's RandAugment is timm's "rand-m7-n4-mstd0.5-inc1": 4 operations, each applied with probability 0.5, at
magnitude 7 of 10 with a standard deviation of 0.5. This module builds it from torchvision's. The remaining differences:

- torchvision has no Invert and no SolarizeAdd; it has Identity, which does nothing. The other 13 operations are the
  same, with the same ranges and random signs, except that Posterize keeps 5 bits at magnitude 7 rather than 2.
- Magnitudes are whole numbers from 0 to 10.
- Pixels are interpolated bilinearly, not bicubically. Pixels from outside the frame are gray (128) in both.
- V-JEPA 2 applies RandAugment to whole frames and crops afterwards. Here the decoder crops and scales, which is much
  cheaper, so shifts and histograms refer to the crop. (For images, timm crops first, too.)
- Random erasing fills the box with ImageNet's mean color, zero after normalization, not with noise.
"""

import contextlib

import torch
from torchvision.transforms import v2

import data

CROP = v2.RandomResizedCrop(1, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
NUM_OPERATIONS, PROBABILITY = 4, 0.5
MAGNITUDE, MAGNITUDE_STD, MAX_MAGNITUDE = 7, 0.5, 10
GRAY = [128, 128, 128]
OPERATIONS = [  # one random operation each, by magnitude
    v2.RandAugment(1, magnitude, MAX_MAGNITUDE + 1, v2.InterpolationMode.BILINEAR, GRAY)
    for magnitude in range(MAX_MAGNITUDE + 1)
]
ERASE = v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=[round(255 * x) for x in data.MEAN])


@contextlib.contextmanager
def _random_stream(purpose, *key):
    """Let torch's global generator, the only one v2 transforms use, yield this stream; restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(data.stream_seed(purpose, *key))
        yield


def random_crop(key, height, width):
    """Draw the box (top, left, height, width) of a random resized crop. key: a tuple that identifies the clip."""
    with _random_stream("augment crop", *key):
        box = CROP.make_params([torch.empty(3, height, width, device="meta")])
    return box["top"], box["left"], box["height"], box["width"]


def augment(key, clip):
    """Apply RandAugment and random erasing to a cropped clip (T, 3, H, W) uint8. key: a tuple that identifies the clip.

    The transforms work on any number of frames at once and draw their parameters once, so all frames get the same.
    """
    with _random_stream("augment", *key):
        for _ in range(int((torch.rand(NUM_OPERATIONS) < PROBABILITY).sum())):
            magnitude = round(torch.normal(float(MAGNITUDE), MAGNITUDE_STD, ()).item())
            clip = OPERATIONS[min(max(magnitude, 0), MAX_MAGNITUDE)](clip)
        return ERASE(clip)
