"""The networks: the paper's sizes, V-JEPA 2's rotary embedding, what the context depends on, and checkpoints."""

import decimal
import math

import pytest
import torch
from conftest import randomize

import model
from model import SIZES, Encoder, Predictor, gather, init_std, rotate, tubelets, untubelets

CLOSE = dict(atol=1e-5, rtol=1e-5)


def small_encoder(**sizes):
    return randomize(Encoder(**(dict(width=64, depth=2, heads=2) | sizes)))


def small_predictor(**sizes):
    return randomize(Predictor(**(dict(in_width=64, out_width=40, width=48, depth=2, heads=2) | sizes)))


def random_clips(T=4, H=48, W=80, batch=2):
    return torch.randn(batch, 3, T, H, W, generator=torch.Generator().manual_seed(1))


def random_ids(N, K, batch=2):
    return torch.rand(batch, N, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :K]


def is_printed_as(count, text):
    """Whether `count`, rounded or truncated to as many digits, is `text`, such as "303M" or "1.012B"."""
    value = decimal.Decimal(count) / {"M": 10**6, "B": 10**9}[text[-1]]
    printed = decimal.Decimal(text[:-1])
    return printed in {value.quantize(printed, rounding=r) for r in (decimal.ROUND_DOWN, decimal.ROUND_HALF_UP)}


def num_parameters(cls, *args, **sizes):
    with torch.device("meta"):
        return sum(p.numel() for p in cls(*args, **sizes).parameters())


def test_sizes_match_the_paper():
    encoders = {"vit_b": "86M", "vit_l": "303M", "vit_h": "632M", "vit_g": "1.012B", "vit_G": "1.843B"}
    assert all(is_printed_as(num_parameters(Encoder, **SIZES[name]), printed) for name, printed in encoders.items())
    # Predictors of ViT-B's student and teacher; of students of ViT-L to ViT-G with a ViT-L teacher.
    predictors = {(768, 768): "21.88M", (1024, 1024): "22.08M", (1280, 1024): "22.18M", (1408, 1024): "22.23M",
                  (1664, 1024): "22.32M"}  # fmt: skip
    assert all(is_printed_as(num_parameters(Predictor, *widths), printed) for widths, printed in predictors.items())
    # The paper's ViT-G has a hidden width of 8192. V-JEPA 2's misspelled ratio would result in 6656.
    with torch.device("meta"):
        assert Encoder(**SIZES["vit_g"] | dict(depth=1)).blocks[0].mlp.fc1.out_features == 6144
        assert Encoder(**SIZES["vit_G"] | dict(depth=1)).blocks[0].mlp.fc1.out_features == 8192


def test_untubelets_inverts_tubelets():
    x = random_clips(T=6)
    tokens = tubelets(x, 2, 16)
    assert tokens.shape == (2, 3 * 3 * 5, 3 * 2 * 16 * 16)
    assert torch.equal(untubelets(tokens, (3, 3, 5), 2, 16), x)
    # Token 22 is at time 1, row 1, column 2. Inside a token: channel, frame, row, column.
    assert torch.equal(tokens[0, 22], x[0, :, 2:4, 16:32, 32:48].flatten())


def test_clips_that_do_not_divide_and_odd_heads_are_refused():
    for T, H, W in (3, 32, 32), (4, 40, 32), (4, 32, 40), (0, 32, 32), (4, 8, 32):
        with pytest.raises(ValueError, match=f"{T} frames of {H}x{W}"):
            small_encoder()(torch.zeros(1, 3, T, H, W))
    for width, heads in ((64, 3), (30, 2), (66, 22)):
        with pytest.raises(ValueError, match="heads"):
            Encoder(width, 1, heads)


def vjepa2_rotation(x, ids, grid):
    """V-JEPA 2's rotation of x (B, h, K, d) at ids (B, K), from docs/method.md, one number at a time."""
    _, rows, cols = grid
    out = x.clone()
    d = x.shape[-1]
    s = 2 * ((d // 3) // 2)
    for b in range(x.shape[0]):
        for k, i in enumerate(ids[b].tolist()):
            positions = i // (rows * cols), i // cols % rows, i % cols
            for axis, position in enumerate(positions):
                for c in range(0, s, 2):
                    # The quirk: neighbors form a pair, but each has its own frequency.
                    first, second = (position * 10000 ** -((j % (s // 2)) / (s / 2)) for j in (c, c + 1))
                    even, odd = x[b, :, k, axis * s + c], x[b, :, k, axis * s + c + 1]
                    out[b, :, k, axis * s + c] = even * math.cos(first) - odd * math.sin(first)
                    out[b, :, k, axis * s + c + 1] = odd * math.cos(second) + even * math.sin(second)
    return out


@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 88])
def test_rotation_matches_vjepa2(head_dim):
    grid = (4, 3, 5)
    ids, x = random_ids(60, 9), torch.randn(2, 3, 9, head_dim)
    rope = model.rope_at(ids, grid, head_dim, x.device)
    torch.testing.assert_close(rotate(x, rope), vjepa2_rotation(x, ids, grid), **CLOSE)
    everything, x = torch.arange(60).expand(2, -1), torch.randn(2, 3, 60, head_dim)
    whole = model.rope_at(None, grid, head_dim, x.device)
    torch.testing.assert_close(rotate(x, whole), vjepa2_rotation(x, everything, grid), **CLOSE)
    assert rotate(x.bfloat16(), whole).dtype == torch.bfloat16


def test_the_rope_table_is_cached_and_usable_for_training_after_inference():
    model.rope_table.cache_clear()
    encoder, x = small_encoder(), random_clips()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(x)
    assert model.rope_table((2, 3, 5), 32, x.device).dtype == torch.float32
    encoder(x).sum().backward()
    encoder(x, random_ids(30, 4)).sum().backward()
    assert encoder.patch_embed.weight.grad.abs().sum() > 0
    assert model.rope_table.cache_info().misses == 1


@torch.no_grad()
def test_position_matters_along_every_axis():
    # Without positions, rolling the content by one token would only roll the encoding.
    encoder, x = small_encoder(), random_clips(batch=1)
    for axis, size in ((2, 2), (3, 16), (4, 16)):
        moved = encoder(x.roll(size, axis)).unflatten(1, encoder.grid(x)).roll(-1, axis - 1).flatten(1, 3)
        assert not torch.allclose(encoder(x), moved, atol=1e-3)


@torch.no_grad()
def test_all_ids_in_any_order_encode_the_whole_clip():
    encoder, x = small_encoder(), random_clips()
    everything = torch.arange(30).expand(2, -1)
    whole = encoder(x)
    torch.testing.assert_close(encoder(x, everything), whole, **CLOSE)
    permuted = random_ids(30, 30)
    torch.testing.assert_close(encoder(x, permuted), gather(whole, permuted), **CLOSE)


@torch.no_grad()
def test_context_does_not_depend_on_targets():
    encoder, x = small_encoder(), random_clips()
    ids = random_ids(30, 30)
    context_ids, target_ids = ids[:, :12], ids[:, 12:]
    pixels = tubelets(x, 2, 16)
    before = encoder(x, context_ids)

    def with_noise_at(token_ids):
        noise = torch.randn(2, token_ids.shape[1], pixels.shape[-1])
        other = pixels.scatter(1, token_ids[..., None].expand_as(noise), noise)
        return untubelets(other, (2, 3, 5), 2, 16)

    assert torch.equal(encoder(with_noise_at(target_ids), context_ids), before)
    after = encoder(with_noise_at(context_ids[:, :1]), context_ids)
    assert ((after - before).abs().amax(-1) > 1e-4).all()  # every encoding depends on every context token
    assert ((encoder(with_noise_at(target_ids[:, :1])) - encoder(x)).abs().amax(-1) > 1e-4).all()


def test_gradients_reach_every_parameter():
    encoder, predictor = small_encoder(), small_predictor(num_mask_tokens=2)
    x, ids = random_clips(), random_ids(30, 22)
    context_ids, target_ids = ids[:, :12], ids[:, 12:]
    for mask_index in (0, 1):
        predictor.zero_grad()
        context = encoder(x, context_ids)
        predictor(context, context_ids, target_ids, (2, 3, 5), mask_index).square().sum().backward()
        assert predictor.mask_tokens.grad[mask_index].abs().sum() > 0
        assert predictor.mask_tokens.grad[1 - mask_index].abs().sum() == 0
        for name, p in (*encoder.named_parameters(), *predictor.named_parameters()):
            assert p.grad is not None and p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_predictor_depends_on_positions_mask_and_context_but_not_on_order():
    predictor, ids = small_predictor(), random_ids(30, 22)
    context_ids, target_ids = ids[:, :12], ids[:, 12:]
    context, grid = torch.randn(2, 12, 64), (2, 3, 5)
    z = predictor(context, context_ids, target_ids, grid)
    assert z.shape == (2, 10, 40)
    order = torch.randperm(12)
    torch.testing.assert_close(predictor(context[:, order], context_ids[:, order], target_ids, grid), z, **CLOSE)
    torch.testing.assert_close(predictor(context, context_ids, target_ids.flip(1), grid), z.flip(1), **CLOSE)
    assert not torch.allclose(predictor(context, context_ids, target_ids, grid, mask_index=1), z, atol=1e-2)
    assert not torch.allclose(predictor(context, context_ids.flip(1), target_ids, grid), z, atol=1e-2)
    assert not torch.allclose(predictor(context.flip(0), context_ids, target_ids, grid), z, atol=1e-2)
    assert (z[:, 0] - z[:, 1]).abs().max() > 1e-3  # mask tokens differ only by position


def assert_std(weight, std):  # within 4 standard errors
    assert abs(weight.std().item() / std - 1) < 4 / math.sqrt(2 * weight.numel())


@pytest.mark.parametrize("width, std", [(384, 0.02), (768, 0.02), (1664, 0.02), (256, 0.045), (96, 0.08), (16, 0.08)])
def test_narrow_networks_start_with_larger_weights(width, std):
    """Those of the paper's widths, 384 or more, start as V-JEPA 2's."""
    torch.manual_seed(0)
    assert_std(Encoder(width, 1, 4).patch_embed.weight, std)
    assert_std(Predictor(1024, 16, width=width, depth=1, heads=4).embed.weight, std)


def test_deeper_residual_branches_start_smaller():
    torch.manual_seed(0)
    std = init_std(128)
    for network in (Encoder(128, 4, 2), Predictor(64, 96, width=128, depth=4, heads=2)):
        for i, block in enumerate(network.blocks, start=1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                assert_std(weight, std / math.sqrt(2 * i))
            for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
                assert_std(weight, std)
        for name, p in network.named_parameters():
            assert not (name.endswith("bias") or name == "mask_tokens") or (p == 0).all(), name
    assert_std(network.proj.weight, std)


def save(folder, **changes):
    """Save a checkpoint, with no size at its default. Returns its encoder and predictor."""
    sizes = dict(mlp_ratio=2.5, num_frames=6, resolution=32, patch_size=8, tubelet_size=3)
    encoder, predictor = small_encoder(**sizes), small_predictor(num_mask_tokens=3)
    checkpoint = dict(
        format=model.CHECKPOINT_FORMAT, kind="student", step=5, args={},
        model=dict(encoder=encoder.config, predictor=predictor.config),
        encoder=encoder.state_dict(), predictor=predictor.state_dict(),
    )  # fmt: skip
    torch.save(checkpoint | changes, folder / "checkpoint.pt")
    return encoder, predictor


@torch.no_grad()
@pytest.mark.parametrize("name", ["", "checkpoint.pt"])
def test_checkpoint_round_trip(tmp_path, name):
    encoder, predictor = save(tmp_path)
    loaded, x = model.load_encoder(tmp_path / name), random_clips(6, 32, 24)
    assert loaded.config == encoder.config and not loaded.training
    assert torch.equal(loaded(x), encoder(x)) and loaded(x).shape == (2, 2 * 4 * 3, 64)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    loaded = model.load_predictor(str(tmp_path / name))
    assert loaded.config == predictor.config and not loaded.training
    ids = torch.arange(8).expand(2, -1)
    args = (torch.randn(2, 5, 64), ids[:, :5], ids[:, 5:], (2, 2, 2), 2)
    assert torch.equal(loaded(*args), predictor(*args))


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "text": lambda file: file.write_text("hello, I am not a checkpoint\n" * 50),
    "empty": lambda file: file.write_bytes(b""),
    "code": lambda file: torch.save({"format": model.CHECKPOINT_FORMAT, "args": decimal.Decimal(1)}, file),
    "another format": lambda file: torch.save({"format": "salt-0"}, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_missing_and_damaged_checkpoints_are_refused(tmp_path, damage):
    save(tmp_path)
    DAMAGE[damage](tmp_path / "checkpoint.pt")
    messages = {"missing": f"no checkpoint at {tmp_path}", "another format": f"{tmp_path}/.* is not a salt-1"}
    message = messages.get(damage, f"{tmp_path}/.* cannot be read")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.load_checkpoint(tmp_path)


def test_weights_that_do_not_fit_are_named_at_most_five(tmp_path):
    encoder, _ = save(tmp_path)
    weights = encoder.state_dict()
    del weights["blocks.1.mlp.fc2.bias"], weights["norm.weight"]
    weights["blocks.2.norm1.weight"] = torch.zeros(64)
    weights["patch_embed.bias"] = torch.zeros(65)
    problems = ["missing blocks.1.mlp.fc2.bias", "missing norm.weight", "unexpected blocks.2.norm1.weight",
                "patch_embed.bias is (65,), not (64,)"]  # fmt: skip
    save(tmp_path, encoder=weights)
    with pytest.raises(ValueError) as error:
        model.load_encoder(tmp_path)
    assert str(error.value) == "weights do not fit Encoder: " + "; ".join(problems)
    save(tmp_path, encoder=weights | {f"x{i}": torch.zeros(1) for i in range(3)})
    with pytest.raises(ValueError, match="; ".join([*problems[:3], "unexpected x0", "unexpected x1", "and 2 more$"])):
        model.load_encoder(tmp_path)
