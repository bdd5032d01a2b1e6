"""The networks of SALT: the ViT encoder with 3D RoPE, the predictor (also the pixel decoder) and the attentive probe.

The architecture is exactly V-JEPA 2's (paper appendix B, tables 3 and 4), so weights can be exchanged with it
(tools/convert.py). Nothing here depends on masking strategies, losses or training.

Letters in shape comments:
    B  clips             T, H, W  frames, pixels down, pixels across
    N  tokens of a clip  K        tokens of a subset (context or targets), given by their ids in 0 .. N-1
    D  width             h, d     attention heads, channels per head      P  values in a tubelet (3*2*16*16 = 1536)

    from model import load_encoder
    encoder = load_encoder("out/student")     # a run folder or a checkpoint file
    tokens = encoder(clips)                   # normalized clips (B, 3, T, H, W) float -> (B, N, D)
"""

import functools
import hashlib
import math
import pickle
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Paper table 3. The mlp_ratio of g and G gives their hidden widths of 6144 and 8192. Ti and S are not in the paper.
SIZES = {
    "vit_ti": dict(width=192, depth=12, heads=3, mlp_ratio=4.0),
    "vit_s": dict(width=384, depth=12, heads=6, mlp_ratio=4.0),
    "vit_b": dict(width=768, depth=12, heads=12, mlp_ratio=4.0),
    "vit_l": dict(width=1024, depth=24, heads=16, mlp_ratio=4.0),
    "vit_h": dict(width=1280, depth=32, heads=16, mlp_ratio=4.0),
    "vit_g": dict(width=1408, depth=40, heads=16, mlp_ratio=48 / 11),
    "vit_G": dict(width=1664, depth=48, heads=16, mlp_ratio=64 / 13),
}
# Paper table 4: the same predictor for all sizes of the paper.
PREDICTORS = {name: dict(width=384, depth=12, heads=16) for name in SIZES}
PREDICTORS["vit_ti"] = dict(width=192, depth=4, heads=3)
PREDICTORS["vit_s"] = dict(width=384, depth=6, heads=6)


# ---------------------------------------------------------------------------------------------------------------------
# tokens


def token_grid(clip_shape, tubelet_size, patch_size):
    """The token grid (time, rows, columns) of a clip of shape (..., T, H, W); ValueError if it does not divide."""
    T, H, W = clip_shape[-3:]
    tubelet = f"tubelets of {tubelet_size} frames of {patch_size}x{patch_size} pixels"
    if min(tubelet_size, patch_size) < 1:
        raise ValueError(f"{tubelet}: both are at least 1")
    if T % tubelet_size or H % patch_size or W % patch_size or 0 in (T, H, W):
        raise ValueError(f"a clip of {T} frames of {H}x{W} pixels does not divide into {tubelet}")
    return T // tubelet_size, H // patch_size, W // patch_size


def tubelets(clips, tubelet_size, patch_size):
    """Cut clips (B, 3, T, H, W) into tubelets (B, N, P); N in raster order, P in (c, t, h, w) order."""
    B, C, T, H, W = clips.shape
    t, h, w = token_grid(clips.shape, tubelet_size, patch_size)
    x = clips.reshape(B, C, t, tubelet_size, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, t * h * w, C * tubelet_size * patch_size**2)


def untubelets(x, grid, tubelet_size, patch_size):
    """The inverse of `tubelets`: (B, N, P) on a token grid -> (B, 3, T, H, W)."""
    t, h, w = grid
    x = x.reshape(x.shape[0], t, h, w, -1, tubelet_size, patch_size, patch_size).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(x.shape[0], -1, t * tubelet_size, h * patch_size, w * patch_size)


def gather(tokens, ids):
    """Select tokens (B, N, D) by ids (B, K) -> (B, K, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# 3D rotary position embedding (RoPE), as in V-JEPA 2


@functools.cache
def rope_table(grid, head_dim, device):
    """Cosine and signed sine for every token of a grid: (2, 1, 1, N, d) float32. Computed once per grid.

    The first 3 * s channels of a head are rotated, s each for time, row and column. The rest stay as they are (cosine
    1, sine 0). V-JEPA 2 has a quirk here, which all its released weights depend on: channel c of an axis uses frequency
    c mod s/2, although the rotation pairs *adjacent* channels. We keep it so that weights can be exchanged.
    """
    s = 2 * (head_dim // 3 // 2)
    # Training and evaluation share the table, so it must not become an inference tensor.
    with torch.inference_mode(False):
        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
        positions = torch.cartesian_prod(*axes)  # (N, 3)
        omega = 10000 ** -(torch.arange(s // 2, device=device, dtype=torch.float32) / (s / 2))
        angles = (positions[:, :, None] * omega.repeat(2)).flatten(1)  # (N, 3s)
        angles = F.pad(angles, (0, head_dim - 3 * s))
        sign = torch.tensor([-1.0, 1.0], device=device).repeat(head_dim // 2)
        return torch.stack((angles.cos(), angles.sin() * sign))[:, None, None].clone()


def rope_at(ids, grid, head_dim, device):
    """The rows of `rope_table` for token ids (B, K), or all rows if ids is None: (2, B or 1, 1, K or N, d).

    Never a view: torch.compile would also guard the shape of its base, and recompile more often.
    """
    table = rope_table(tuple(grid), head_dim, device)
    return table if ids is None else table[:, 0, 0, ids.unsqueeze(1)]


def rotate(x, rope):
    """Rotate queries or keys (B, h, K, d) by the result of `rope_at`; same shape and dtype."""
    cos, sin = rope
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # x1 x0 x3 x2 ...; the sine carries the sign
    return (x * cos + swapped * sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# blocks


def attend(q, k, v):
    """Fused attention, (B, h, K, d) each -> (B, h, K, d). In float32 on the CPU, where bfloat16 is slower."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        if heads < 1 or width % heads or width // heads % 2:
            raise ValueError(f"width {width} does not divide into {heads} heads with an even number of channels")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, h, K, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. The probe's blocks use no `rope`."""

    def __init__(self, width, heads, mlp_ratio=4.0, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(self, x, rope=None):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


def run_blocks(network, x, rope):
    """Apply the blocks of a network; with activation checkpointing the backward pass recomputes their activations."""
    for block in network.blocks:
        x = checkpoint(block, x, rope, use_reentrant=False) if network.activation_checkpointing else block(x, rope)
    return x


def init_std(width):
    """Standard deviation of initial weights: V-JEPA 2's 0.02, and more for networks narrower than any of the paper's.

    With 0.02, their attention logits and residual branches start near zero, and they learn little for hundreds of
    steps. The narrowest network of the paper is its predictor, 384 wide. Up to a width of 192 this is 0.08.
    """
    return 0.02 * min(4, max(1, (384 / width) ** 2))


def init_weights(module, width, blocks):
    """As V-JEPA 2: truncated normal weights, zero biases; residual branches of block i divided by sqrt(2 i)."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=init_std(width))
            nn.init.zeros_(m.bias)
    with torch.no_grad():
        for i, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * i))
            block.mlp.fc2.weight.div_(math.sqrt(2 * i))


# ---------------------------------------------------------------------------------------------------------------------
# the two networks


class Encoder(nn.Module):
    """Video ViT without class token and absolute positions (paper appendix B, V-JEPA 2).

    encoder(clips)               normalized clips (B, 3, T, H, W) -> tokens (B, N, D)
    encoder(clips, context_ids)  encodes only the tokens context_ids (B, K) -> (B, K, D)

    Clips may be of another size than in training, if they divide into tubelets; ValueError if not. `num_frames` and
    `resolution` only record what the encoder was trained on.
    """

    def __init__(
        self, width, depth, heads, mlp_ratio=4.0, num_frames=16, resolution=224, patch_size=16, tubelet_size=2
    ):
        super().__init__()
        self.config = dict(
            width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, num_frames=num_frames, resolution=resolution,
            patch_size=patch_size, tubelet_size=tubelet_size,
        )  # fmt: skip
        self.width, self.head_dim = width, width // max(1, heads)
        self.activation_checkpointing = False
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        # Equivalent to V-JEPA 2's Conv3d with stride = kernel, but applied only to the tokens that are needed.
        self.patch_embed = nn.Linear(3 * tubelet_size * patch_size**2, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        init_weights(self, width, self.blocks)

    def grid(self, clips):
        """Token grid (time, rows, columns) of clips (B, 3, T, H, W)."""
        return token_grid(clips.shape, self.tubelet_size, self.patch_size)

    def forward(self, clips, context_ids=None):
        x = tubelets(clips, self.tubelet_size, self.patch_size)
        if context_ids is not None:
            x = gather(x, context_ids)
        x = self.patch_embed(x).clone()  # not a view, or torch.compile (up to 2.14) compiles the first block twice
        rope = rope_at(context_ids, self.grid(clips), self.head_dim, x.device)
        return self.norm(run_blocks(self, x, rope))


class Predictor(nn.Module):
    """Predicts the targets from the context: a narrow ViT over context and mask tokens (paper table 4).

    predictor(context, context_ids, target_ids, grid, mask_index)
        context (B, Kc, in_width), context_ids (B, Kc), target_ids (B, Kt) -> (B, Kt, out_width)

    out_width is the teacher's width to predict latents (stage 2), or P to predict pixels (stage 1). mask_index is the
    mask's number in the list of masks: each mask type has its own mask token.
    """

    def __init__(self, in_width, out_width, width=384, depth=12, heads=16, num_mask_tokens=2):
        super().__init__()
        self.config = dict(
            in_width=in_width, out_width=out_width, width=width, depth=depth, heads=heads,
            num_mask_tokens=num_mask_tokens,
        )  # fmt: skip
        self.head_dim = width // max(1, heads)
        self.activation_checkpointing = False
        self.embed = nn.Linear(in_width, width)
        self.mask_tokens = nn.Parameter(torch.zeros(num_mask_tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, out_width)
        init_weights(self, width, self.blocks)

    def forward(self, context, context_ids, target_ids, grid, mask_index=0):
        x = self.embed(context)
        mask_token = self.mask_tokens[mask_index].to(x.dtype).expand(*target_ids.shape, -1)
        x = torch.cat((x, mask_token), dim=1)
        # V-JEPA 2 sorts the tokens by position here. Attention does not depend on their order, so we do not.
        rope = rope_at(torch.cat((context_ids, target_ids), dim=1), grid, self.head_dim, x.device)
        x = run_blocks(self, x, rope)
        return self.proj(self.norm(x[:, context_ids.shape[1] :]))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

CHECKPOINT_FORMAT = "salt-1"


def load_checkpoint(path):
    """Read a checkpoint.pt, or the one in a run folder, as a dictionary of plain tensors and values, on the CPU.

    Keys: format; kind: "teacher", "student", "ema", or "vjepa2" if converted; step; model: {"encoder": config,
    "predictor": config}; encoder and predictor: state dicts; args; stage: 1 for a V-Pixel teacher, else 1 more than its
    teacher's; teacher: None, or the path, step and sha256 of a student's teacher. An EMA run and a converted V-JEPA 2
    file also have student.
    FileNotFoundError if there is no such file; ValueError if it is damaged or of another format.
    """
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read as a checkpoint (damaged, or not made by torch.save)") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{file} is not a {CHECKPOINT_FORMAT} checkpoint (tools/convert.py reads other formats)")
    return checkpoint


def build(cls, config, weights):
    """cls(**config) with these weights. ValueError if they do not fit: see `check_state_dict`."""
    with torch.device("meta"):
        module = cls(**config)
    check_state_dict(module.state_dict(), weights, cls.__name__)
    module.load_state_dict(weights, assign=True)
    return module


def check_state_dict(expected, weights, name):
    """ValueError if tensors are missing, unexpected or of another shape than expected. It names the first five."""
    problems = [f"missing {k}" for k in expected if k not in weights]
    problems += [f"unexpected {k}" for k in weights if k not in expected]
    problems += [
        f"{k} is {tuple(weights[k].shape)}, not {tuple(tensor.shape)}"
        for k, tensor in expected.items()
        if k in weights and weights[k].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"weights do not fit {name}: {'; '.join(problems[:5])}{more}")


def fingerprint(weights):
    """SHA-256 of a state dict: of the names, shapes, dtypes and values of its tensors. Identifies a frozen teacher."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_teacher_of(student, path):
    """Load the teacher, a run folder or checkpoint file, of a student, a loaded checkpoint.

    ValueError if its weights are not those that the student was trained with. Errors otherwise: `load_checkpoint`'s.
    """
    teacher, identity = load_checkpoint(path), student.get("teacher")
    if identity and fingerprint(teacher["encoder"]) != identity["sha256"]:
        raise ValueError(
            f"{path} (step {teacher['step']}) is not the teacher that the student was trained with: "
            f"{identity['path']} at step {identity['step']}"
        )
    return teacher


def load_encoder(path, weights="encoder"):
    """Load the encoder of a run folder or checkpoint file: eval mode, float32, on the CPU. Errors: `load_checkpoint`'s.

    weights: "encoder", or "student" for the student of an EMA run or of V-JEPA 2, whose encoder is the EMA teacher.
    """
    return _load_part(Encoder, path, "encoder", weights)


def load_predictor(path):
    """Load the predictor of a run folder or checkpoint file, likewise."""
    return _load_part(Predictor, path, "predictor", "predictor")


def _load_part(cls, path, config, weights):
    checkpoint = load_checkpoint(path)
    if weights not in checkpoint:
        raise ValueError(f"the checkpoint {path} holds no {weights}")
    return build(cls, checkpoint["model"][config], checkpoint[weights]).float().eval()
