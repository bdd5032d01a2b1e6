"""tools/convert.py: converted weights compute the same as Hugging Face's VJEPA2 and as V-JEPA 2's own files."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, refusal, run_script

import physics
from model import AttentiveProbe, Encoder, Predictor, build, gather, load_checkpoint, load_encoder, load_predictor
from tools import convert

transformers = pytest.importorskip("transformers")

GRID, N, WIDTH = (2, 3, 3), 18, 48  # 4 frames of 48x48 pixels
CLOSE = dict(atol=1e-5, rtol=1e-5)


def hf_config(**changes):
    sizes = dict(
        crop_size=48, frames_per_clip=4, hidden_size=WIDTH, num_attention_heads=3, num_hidden_layers=2, mlp_ratio=3.0,
        pred_hidden_size=32, pred_num_attention_heads=4, pred_num_hidden_layers=2, pred_num_mask_tokens=3,
        num_pooler_layers=2, num_labels=5,
    )  # fmt: skip
    return transformers.VJEPA2Config(**(sizes | changes))


@pytest.fixture
def hf(tmp_path):
    """A random VJEPA2Model, its folder, and a run folder with the checkpoint converted from it."""
    model = randomize(transformers.VJEPA2Model(hf_config()))
    model.save_pretrained(tmp_path / "hf")
    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "run")
    return model, tmp_path / "hf", tmp_path / "run"


def our_checkpoint(out_width=WIDTH, **sizes):
    encoder = randomize(Encoder(**(dict(width=WIDTH, depth=2, heads=3, num_frames=4, resolution=48) | sizes)))
    predictor = randomize(Predictor(encoder.width, out_width, width=24, depth=2, heads=2, num_mask_tokens=2))
    return dict(
        format="salt-1", kind="student", step=7, args={}, encoder=encoder.state_dict(),
        predictor=predictor.state_dict(), model=dict(encoder=encoder.config, predictor=predictor.config),
    )  # fmt: skip


def clips():
    return torch.randn(2, 3, 4, 48, 48, generator=torch.Generator().manual_seed(1))


def some_ids():
    """Unsorted context and target ids that differ between clips."""
    order = torch.rand(2, N, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, :7], order[:, 7:15]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face


@torch.no_grad()
def test_encoder_agrees_with_hf(hf):
    model, _, run = hf
    encoder, x = load_encoder(run), clips()
    expected = model.encoder(x.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(encoder(x), expected, **CLOSE)
    assert encoder.config == dict(
        width=WIDTH, depth=2, heads=3, mlp_ratio=3.0, num_frames=4, resolution=48, patch_size=16, tubelet_size=2
    )


@torch.no_grad()
def test_encoder_with_context_agrees_with_hf(hf):
    model, _, run = hf
    (ids, _), x = some_ids(), clips()
    expected = gather(model.encoder.embeddings(x.transpose(1, 2)), ids)
    for layer in model.encoder.layer:
        expected = layer(expected, ids)[0]
    expected = model.encoder.layernorm(expected)
    torch.testing.assert_close(load_encoder(run)(x, ids), expected, **CLOSE)


@torch.no_grad()
def test_predictor_agrees_with_hf(hf):
    model, _, run = hf
    predictor, (context_ids, target_ids) = load_predictor(run), some_ids()
    tokens = torch.randn(2, N, WIDTH)
    expected = model.predictor(tokens, [context_ids], [target_ids]).last_hidden_state
    context = gather(tokens, context_ids)
    # Hugging Face always uses the second mask token.
    torch.testing.assert_close(predictor(context, context_ids, target_ids, GRID, mask_index=1), expected, **CLOSE)
    assert not torch.allclose(predictor(context, context_ids, target_ids, GRID, mask_index=0), expected, atol=1e-3)


def test_hf_to_ours_to_hf_is_exact(hf, tmp_path):
    model, _, run = hf
    run_script(convert, "to-hf", run, tmp_path / "again")
    again, loading = transformers.VJEPA2Model.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same(again.state_dict(), model.state_dict())
    fields = hf_config().to_dict().keys() & {k for k in hf_config().to_dict() if re.search("size|num_|ratio|eps", k)}
    for k in fields - {"num_pooler_layers"}:
        assert getattr(again.config, k) == getattr(model.config, k), k


@torch.no_grad()
@pytest.mark.parametrize("file", [True, False])
def test_ours_to_hf_to_ours(tmp_path, file):
    ours = our_checkpoint()
    torch.save(ours, tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path / "checkpoint.pt" if file else tmp_path, tmp_path / "hf")
    assert {"config.json", "model.safetensors"} <= set(os.listdir(tmp_path / "hf"))
    model = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf").eval()
    x = clips()
    tokens = model(x.transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(load_encoder(tmp_path)(x), tokens, **CLOSE)

    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "back.pt")
    back = load_checkpoint(tmp_path / "back.pt")
    assert back["model"] == ours["model"]
    assert_same(back["encoder"], ours["encoder"])
    assert_same(back["predictor"], ours["predictor"])


@pytest.mark.parametrize("out_width", [1536, 40])
def test_predictor_of_another_width_is_left_out_with_a_message(tmp_path, capsys, out_width):
    ours = our_checkpoint(out_width)
    torch.save(ours, tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path, tmp_path / "hf")
    assert f"predictor: left out (it predicts {out_width}" in capsys.readouterr().out
    _, loading = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert loading["missing_keys"] and all(k.startswith("predictor.") for k in loading["missing_keys"])

    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert "the encoder alone" in capsys.readouterr().out
    assert_same(load_encoder(tmp_path / "back").state_dict(), ours["encoder"])
    assert "predictor" not in load_checkpoint(tmp_path / "back")


def test_matched_tensors_are_counted(hf, capsys, tmp_path):
    model, folder, _ = hf
    run_script(convert, "from-hf", folder, tmp_path / "counted.pt")
    counts = {name: len(getattr(model, name).state_dict()) for name in ("encoder", "predictor")}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{name}: {n} of {n} tensors matched" for name, n in counts.items()]


def test_hf_ratio_survives_truncation():
    for width in range(64, 2000, 32):
        for hidden in range(width, 5 * width, 97):
            assert int(width * convert.hf_ratio(hidden, width)) == hidden
    assert convert.hf_ratio(6144, 1408) == 48 / 11 and convert.hf_ratio(8192, 1664) == 64 / 13


def test_half_precision_hf_weights_become_float32(hf, tmp_path):
    model, _, _ = hf
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    run_script(convert, "from-hf", tmp_path / "half", tmp_path / "half.pt")
    assert {p.dtype for p in load_encoder(tmp_path / "half.pt").parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# the probe


@torch.no_grad()
def test_probe_agrees_with_hf_both_ways():
    # With so large an epsilon, a LayerNorm with another epsilon would give other values.
    model = randomize(transformers.VJEPA2ForVideoClassification(hf_config(layer_norm_eps=0.1)))
    theirs = {k: v for k, v in model.state_dict().items() if not k.startswith("vjepa2.")}
    ours = convert.probe_from_hf(model.state_dict())
    config = dict(width=WIDTH, num_classes=5, depth=3, heads=3, eps=model.config.layer_norm_eps)
    probe = build(AttentiveProbe, config, ours).eval()
    tokens = torch.randn(4, N, WIDTH)
    torch.testing.assert_close(probe(tokens), model.classifier(model.pooler(tokens)), **CLOSE)
    assert_same(convert.probe_to_hf(ours), theirs)
    del theirs["pooler.cross_attention_layer.cross_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"missing pooler\.cross_attention_layer\.cross_attn\.k_proj\.bias$"):
        convert.probe_from_hf(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# V-JEPA 2's files


def vjepa2_file(checkpoint):
    """The file that V-JEPA 2 would have saved, renamed by hand, without the tables in tools/convert.py."""
    encoder, predictor = dict(checkpoint["encoder"]), dict(checkpoint["predictor"])
    encoder["patch_embed.proj.weight"] = encoder.pop("patch_embed.weight").reshape(-1, 3, 2, 16, 16)
    encoder["patch_embed.proj.bias"] = encoder.pop("patch_embed.bias")
    encoder["pos_embed"] = torch.zeros(1, N, WIDTH)
    renamed = {"predictor_pos_embed": torch.zeros(1, N, 24)}
    for k, v in predictor.items():
        if k == "mask_tokens":
            renamed |= {f"mask_tokens.{i}": row.reshape(1, 1, -1) for i, row in enumerate(v)}
        else:
            renamed["predictor_" + k] = v
    other = {k: v + 1 for k, v in encoder.items()}
    file = dict(encoder=other, target_encoder=encoder, predictor=renamed)
    file = {key: {f"module.backbone.{k}": v for k, v in sd.items()} for key, sd in file.items()}
    return file | dict(epoch=3, loss=0.5, opt={"state": {}})


@pytest.fixture
def released(tmp_path):
    ours = our_checkpoint()
    file = vjepa2_file(ours)
    torch.save(file, tmp_path / "released.pt")
    return ours, file, tmp_path / "released.pt"


FLAGS = ("--heads", 3, "--predictor-heads", 2)


def from_vjepa2(path, out, *flags):
    run_script(convert, "from-vjepa2", path, out, *flags)


@torch.no_grad()
def test_vjepa2_file(released, tmp_path, capsys):
    ours, _, path = released
    from_vjepa2(path, tmp_path / "run", *FLAGS)
    lines = capsys.readouterr().out.splitlines()
    assert "encoder: 28 of 28 tensors matched" in lines and "predictor: 32 of 32 tensors matched" in lines
    encoder, predictor, x = load_encoder(tmp_path / "run"), load_predictor(tmp_path / "run"), clips()
    expected = build(Encoder, ours["model"]["encoder"], ours["encoder"])(x)
    assert torch.equal(encoder(x), expected)
    context_ids, target_ids = some_ids()
    reference = build(Predictor, ours["model"]["predictor"], ours["predictor"])
    for i in (0, 1):
        args = (gather(expected, context_ids), context_ids, target_ids, GRID, i)
        assert torch.equal(predictor(*args), reference(*args))
    assert encoder.config == ours["model"]["encoder"] | dict(num_frames=64, resolution=256)
    checkpoint = load_checkpoint(tmp_path / "run")
    assert (checkpoint["kind"], checkpoint["step"], checkpoint["args"]) == ("vjepa2", 0, {})


def test_both_encoders_of_a_vjepa2_file_are_kept(released, tmp_path, capsys):
    ours, _, path = released
    from_vjepa2(path, tmp_path / "run", *FLAGS)
    lines = capsys.readouterr().out.splitlines()
    assert "target_encoder becomes the checkpoint's encoder, encoder its student" in lines
    assert "student: 28 of 28 tensors matched" in lines
    online = {k: v + 1 for k, v in ours["encoder"].items()}
    assert_same(load_encoder(tmp_path / "run").state_dict(), ours["encoder"])
    assert_same(load_encoder(tmp_path / "run", "student").state_dict(), online)
    # The physics protocol encodes the context with the file's encoder, the targets with its target_encoder.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["physics.py", "--checkpoint", str(tmp_path / "run"), "--device", "cpu"])
        (encoder, _, target_encoder), _ = physics.load_networks(physics.parse_args())
    assert_same(encoder.state_dict(), online)
    assert_same(target_encoder.state_dict(), ours["encoder"])
    run_script(convert, "to-hf", tmp_path / "run", tmp_path / "hf")
    assert "student: left out" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["target_encoder", "encoder"])
def test_vjepa2_file_with_a_single_encoder(released, tmp_path, capsys, key):
    ours, file, path = released
    del file["encoder" if key == "target_encoder" else "target_encoder"]
    torch.save(file, path)
    from_vjepa2(path, tmp_path / "a.pt", *FLAGS)
    assert f"the file has only {key}: it becomes the checkpoint's encoder" in capsys.readouterr().out
    added = 0 if key == "target_encoder" else 1
    assert_same(load_encoder(tmp_path / "a.pt").state_dict(), {k: v + added for k, v in ours["encoder"].items()})
    with pytest.raises(ValueError, match="holds no student"):
        load_encoder(tmp_path / "a.pt", "student")
    del file[key]
    torch.save(file, path)
    error = refusal(capsys, convert, "from-vjepa2", path, tmp_path / "b.pt", *FLAGS)
    assert "no state dict 'target_encoder' or 'encoder'" in error


def test_vjepa2_flags_for_frames_and_resolution(released, tmp_path):
    from_vjepa2(released[2], tmp_path / "a.pt", *FLAGS, "--num-frames", 16, "--resolution", 224)
    encoder = load_encoder(tmp_path / "a.pt")
    assert (encoder.config["num_frames"], encoder.config["resolution"]) == (16, 224)


def test_heads_of_vit_g():
    # Only shapes are needed, so nothing is allocated.
    shapes = {"patch_embed.proj.weight": (1408, 3, 2, 16, 16), "blocks.39.norm1.bias": (1408,),
              "blocks.0.mlp.fc1.weight": (6144, 1408)}  # fmt: skip
    weights = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    for flag, heads in ((None, 22), (16, 16), (22, 22)):
        encoder = convert.vjepa2_encoder(weights, flag, 64, 256)
        assert encoder.config["heads"] == encoder.blocks[0].attn.heads == heads
        assert encoder.config["mlp_ratio"] == 48 / 11 and len(encoder.blocks) == 40
    assert convert.RELEASED_HEADS[1024] == 16


@torch.no_grad()
@pytest.mark.parametrize("heads", [16, 22])
def test_number_of_heads_reaches_hf_and_the_computation(tmp_path, heads):
    # One block of half a ViT-g's width, 704, which both numbers of heads divide.
    ours = our_checkpoint(width=704, depth=1, heads=heads, mlp_ratio=0.25, out_width=704)
    torch.save(ours, tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path, tmp_path / "hf")
    model, x = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf").eval(), clips()
    assert model.config.num_attention_heads == heads
    # Looser than elsewhere: sums over 1536 pixels and 704 channels of such large weights have rounding errors of 1e-5.
    torch.testing.assert_close(
        load_encoder(tmp_path)(x), model(x.transpose(1, 2), skip_predictor=True).last_hidden_state, atol=1e-4, rtol=1e-4
    )
    torch.save(vjepa2_file(ours), tmp_path / "released.pt")
    from_vjepa2(tmp_path / "released.pt", tmp_path / "back.pt", "--heads", heads, "--predictor-heads", 2)
    assert torch.equal(load_encoder(tmp_path / "back.pt")(x), load_encoder(tmp_path)(x))


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("part", ["target_encoder", "encoder", "predictor"])
@pytest.mark.parametrize("problem", ["missing", "unexpected", "misshapen"])
def test_vjepa2_file_that_does_not_fit(released, tmp_path, capsys, part, problem):
    _, file, path = released
    stem = "predictor_" if part == "predictor" else ""
    key = f"{stem}blocks.1.attn.proj.weight"
    weights = file[part]
    if problem == "missing":
        del weights["module.backbone." + key]
        message = f"missing {key}"
    elif problem == "unexpected":
        weights["module.backbone.norms_block.0.weight"] = torch.zeros(WIDTH)
        message = "unexpected norms_block.0.weight"
    else:
        weights["module.backbone." + key] = torch.zeros(5, 6)
        message = f"{key} is (5, 6), not"
    torch.save(file, path)
    error = refusal(capsys, convert, "from-vjepa2", path, tmp_path / "run", *FLAGS)
    assert message in error and error.count(";") == 0
    assert not (tmp_path / "run").exists()


def test_vjepa2_file_without_its_first_mask_token(released, tmp_path, capsys):
    _, file, path = released
    del file["predictor"]["module.backbone.mask_tokens.0"]
    torch.save(file, path)
    assert "missing mask_tokens.0" in refusal(capsys, convert, "from-vjepa2", path, tmp_path / "run", *FLAGS)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "misshapen"])
def test_hf_folder_that_does_not_fit(hf, tmp_path, capsys, problem):
    from safetensors.torch import load_file, save_file

    file = hf[1] / "model.safetensors"
    weights = load_file(file)
    key = "encoder.layer.1.attention.key.bias"
    if problem == "missing":
        del weights[key]
    elif problem == "unexpected":
        weights["encoder.layer.1.extra"] = torch.zeros(2)
    else:
        weights[key] = torch.zeros(WIDTH + 1)
    save_file(weights, file, metadata={"format": "pt"})
    error = refusal(capsys, convert, "from-hf", hf[1], tmp_path / "refused.pt")
    expected = dict(missing=f"missing {key}", unexpected="unexpected encoder.layer.1.extra").get(
        problem, f"{key} is (49,)"
    )
    assert expected in error and error.count(";") == 0
    assert not (tmp_path / "refused.pt").exists()


def test_hf_config_that_our_networks_cannot_have(hf, tmp_path, capsys):
    model, folder, _ = hf
    model.config.layer_norm_eps = 1e-5
    model.config.save_pretrained(folder)
    assert "layer_norm_eps" in refusal(capsys, convert, "from-hf", folder, tmp_path / "refused")
    transformers.ViTConfig().save_pretrained(folder)
    assert "vit" in refusal(capsys, convert, "from-hf", folder, tmp_path / "refused")
    (folder / "config.json").write_text("{")
    refusal(capsys, convert, "from-hf", folder, tmp_path / "refused")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["CONVERT_TEST_TRAP"],)


def test_files_that_are_not_checkpoints(tmp_path, capsys, monkeypatch):
    trap = tmp_path / "trap"
    monkeypatch.setenv("CONVERT_TEST_TRAP", str(trap))
    text, pickled, number, empty = (tmp_path / name for name in ("text.pt", "pickled.pt", "number.pt", "empty.pt"))
    text.write_text("not a checkpoint\n" * 100)
    empty.touch()
    torch.save({"target_encoder": RunsCode()}, pickled)
    torch.save(5, number)
    for command in ("from-vjepa2", "to-hf"):
        for file in (text, pickled, number, empty):
            assert str(file) in refusal(capsys, convert, command, file, tmp_path / "out")
        assert "no" in refusal(capsys, convert, command, tmp_path / "nowhere", tmp_path / "out")
    torch.save({"target_encoder": {"a": 1}, "predictor": {}}, number)
    assert "no state dict 'target_encoder'" in refusal(capsys, convert, "from-vjepa2", number, tmp_path / "out")
    refusal(capsys, convert, "from-hf", tmp_path / "nowhere", tmp_path / "out")
    refusal(capsys, convert, "from-hf", tmp_path, tmp_path / "out")
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_damaged_safetensors(hf, tmp_path, capsys):
    (hf[1] / "model.safetensors").write_bytes(b"\0" * 64)
    assert "cannot be read" in refusal(capsys, convert, "from-hf", hf[1], tmp_path / "refused")


def test_nothing_is_overwritten_and_no_incomplete_file_remains(hf, released, tmp_path, capsys, monkeypatch):
    _, folder, run = hf
    before = (run / "checkpoint.pt").read_bytes()
    assert "exists already" in refusal(capsys, convert, "from-vjepa2", released[2], run, *FLAGS)
    assert "exists already" in refusal(capsys, convert, "from-hf", folder, run)
    assert "exists already" in refusal(capsys, convert, "to-hf", run, folder)
    assert (run / "checkpoint.pt").read_bytes() == before

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    assert "disk full" in refusal(capsys, convert, "from-hf", folder, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_unknown_width_and_impossible_heads(released, tmp_path, capsys):
    path = released[2]
    assert "--heads" in refusal(capsys, convert, "from-vjepa2", path, tmp_path / "run")
    assert "7 heads" in refusal(capsys, convert, "from-vjepa2", path, tmp_path / "run", "--heads", 7)


def test_without_transformers(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refusal(capsys, convert, "to-hf", hf[2], tmp_path / "x")
    assert "pip install transformers" in refusal(capsys, convert, "from-hf", hf[1], tmp_path / "x")
