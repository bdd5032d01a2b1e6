"""tools/convert.py: converted weights compute the same as Hugging Face's VJEPA2 and as V-JEPA 2's own files."""

import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import randomize, refusal, run_script

import data
from model import Encoder, Predictor, gather, load_checkpoint, load_encoder, load_predictor
from tools import convert

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

GRID, N, WIDTH = (2, 3, 3), 18, 48  # 4 frames of 48x48 pixels
CLOSE = dict(atol=1e-5, rtol=1e-5)


def hf_model(kind="VJEPA2Model"):
    sizes = dict(
        crop_size=48, frames_per_clip=4, hidden_size=WIDTH, num_attention_heads=3, num_hidden_layers=2, mlp_ratio=3.0,
        pred_hidden_size=32, pred_num_attention_heads=4, pred_num_hidden_layers=2, pred_num_mask_tokens=3,
        num_pooler_layers=2, num_labels=5,
    )  # fmt: skip
    return randomize(getattr(transformers, kind)(transformers.VJEPA2Config(**sizes)))


@pytest.fixture
def hf(tmp_path):
    """A random VJEPA2Model, its folder, and a run folder with the checkpoint converted from it."""
    model = hf_model()
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
def test_encoder_and_predictor_agree_with_hf(hf):
    model, _, run = hf
    x, (context_ids, target_ids) = clips(), some_ids()
    encoder, predictor = load_encoder(run), load_predictor(run)
    torch.testing.assert_close(encoder(x), model.encoder(x.transpose(1, 2)).last_hidden_state, **CLOSE)
    expected = gather(model.encoder.embeddings(x.transpose(1, 2)), context_ids)
    for layer in model.encoder.layer:
        expected = layer(expected, context_ids)[0]
    torch.testing.assert_close(encoder(x, context_ids), model.encoder.layernorm(expected), **CLOSE)

    tokens = torch.randn(2, N, WIDTH)
    expected = model.predictor(tokens, [context_ids], [target_ids]).last_hidden_state
    predicted = [predictor(gather(tokens, context_ids), context_ids, target_ids, GRID, i) for i in (0, 1)]
    torch.testing.assert_close(predicted[1], expected, **CLOSE)  # Hugging Face always uses the second mask token
    assert not torch.allclose(predicted[0], expected, atol=1e-3)


def test_hf_to_ours_to_hf_is_exact(hf, tmp_path):
    model, _, run = hf
    run_script(convert, "to-hf", run, tmp_path / "again")
    again, loading = transformers.VJEPA2Model.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same(again.state_dict(), model.state_dict())
    for field, value in model.config.to_dict().items():
        if re.search("size|num_|ratio|eps", field) and field != "num_pooler_layers":
            assert getattr(again.config, field) == value, field


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, dict(width=704, heads=22, depth=1, mlp_ratio=0.25)])  # 704: half a ViT-g
def test_ours_to_hf_to_ours(tmp_path, sizes):
    ours, x = our_checkpoint(sizes.get("width", WIDTH), **sizes), clips()
    torch.save(ours, tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path / "checkpoint.pt", tmp_path / "hf")
    model = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf").eval()
    tokens = model(x.transpose(1, 2), skip_predictor=True).last_hidden_state
    close = dict(atol=1e-4, rtol=1e-4) if sizes else CLOSE  # sums over 704 channels of such large weights
    torch.testing.assert_close(load_encoder(tmp_path)(x), tokens, **close)

    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "back.pt")
    back = load_checkpoint(tmp_path / "back.pt")
    assert back["model"] == ours["model"]
    assert_same(back["encoder"], ours["encoder"])
    assert_same(back["predictor"], ours["predictor"])


@pytest.mark.parametrize("predictor", ["pixels", "latents of 40 values", "none", "weights deleted"])
def test_a_predictor_that_hf_cannot_have_is_left_out_with_a_message(tmp_path, capsys, predictor):
    ours = our_checkpoint({"pixels": 1536, "latents of 40 values": 40}.get(predictor, WIDTH))
    if predictor == "none":
        del ours["model"]["predictor"]
    if predictor in ("none", "weights deleted"):
        del ours["predictor"]
    torch.save(ours, tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path, tmp_path / "hf")
    reason = "it predicts" if "predictor" in ours else "there is none"
    assert f"predictor: left out ({reason}" in capsys.readouterr().out
    _, loading = transformers.VJEPA2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert loading["missing_keys"] and all(k.startswith("predictor.") for k in loading["missing_keys"])

    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert "the encoder alone" in capsys.readouterr().out
    assert_same(load_encoder(tmp_path / "back").state_dict(), ours["encoder"])
    assert "predictor" not in load_checkpoint(tmp_path / "back")


def test_the_video_processor_of_a_converted_folder_prepares_clips_as_we_do(tmp_path):
    torch.save(our_checkpoint(resolution=224), tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path, tmp_path / "hf")
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "hf")
    video = torch.randint(256, (4, 3, 256, 300), dtype=torch.uint8)  # its short side needs no scaling
    expected = data.normalize(video[None, :, :, 16:240, 38:262].transpose(1, 2), "cpu")
    got = processor(video, return_tensors="pt")["pixel_values_videos"].transpose(1, 2)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_the_encoder_and_predictor_of_a_compiled_classifier_are_taken(tmp_path, capsys):
    model = hf_model("VJEPA2ForVideoClassification").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    weights = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    assert "pooler.query_tokens" in weights and "vjepa2.encoder.layernorm.weight" in weights
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    safetensors.save_file(compiled, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "hf" / "._model.safetensors").write_text("what macOS leaves behind")
    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "run")
    left_out = sum(not name.startswith("vjepa2.") for name in weights)
    assert f"pooler and classifier: left out ({left_out} tensors)" in capsys.readouterr().out
    model.vjepa2.float().save_pretrained(tmp_path / "base")
    run_script(convert, "from-hf", tmp_path / "base", tmp_path / "expected")
    got, expected = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "expected")
    for part in ("encoder", "predictor"):
        assert_same(got[part], expected[part])  # in float32


def test_hf_ratio_survives_truncation():
    for width in range(64, 2000, 32):
        for hidden in range(width, 5 * width, 97):
            assert int(width * convert.hf_ratio(hidden, width)) == hidden
    assert convert.hf_ratio(6144, 1408) == 48 / 11 and convert.hf_ratio(8192, 1664) == 64 / 13


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


def test_vjepa2_file(released, tmp_path, capsys):
    ours, _, path = released
    run_script(convert, "from-vjepa2", path, tmp_path / "run", *FLAGS)
    checkpoint, lines = load_checkpoint(tmp_path / "run"), capsys.readouterr().out.splitlines()
    assert "target_encoder becomes the checkpoint's encoder, encoder its student" in lines
    assert {f"{name}: {n} of {n} tensors matched" for name, n in (("encoder", 28), ("predictor", 32))} <= set(lines)
    assert (checkpoint["kind"], checkpoint["step"], checkpoint["args"]) == ("vjepa2", 0, {})
    assert checkpoint["model"]["encoder"] == ours["model"]["encoder"] | dict(num_frames=64, resolution=256)
    assert checkpoint["model"]["predictor"] == ours["model"]["predictor"]
    assert_same(load_encoder(tmp_path / "run").state_dict(), ours["encoder"])
    online = {k: v + 1 for k, v in ours["encoder"].items()}
    assert_same(load_encoder(tmp_path / "run", "student").state_dict(), online)
    assert_same(load_predictor(tmp_path / "run").state_dict(), ours["predictor"])
    run_script(convert, "to-hf", tmp_path / "run", tmp_path / "hf")
    assert "student: left out" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["target_encoder", "encoder", "no predictor", "state dict"])
def test_vjepa2_file_with_a_single_encoder(released, tmp_path, capsys, layout):
    ours, file, path = released
    key = "encoder" if layout == "encoder" else "target_encoder"
    file = {key: file[key], "predictor": file["predictor"]}
    if layout == "no predictor":
        del file["predictor"]
    if layout == "state dict":  # of a compiled network, saved by itself
        file = {f"_orig_mod.{name}": tensor for name, tensor in file[key].items()}
    torch.save(file, path)
    flags = (*FLAGS, "--num-frames", 16, "--resolution", 224)
    run_script(convert, "from-vjepa2", path, tmp_path / "a.pt", *flags)
    held = "encoder" if layout == "state dict" else key
    assert f"the file has only {held}: it becomes the checkpoint's encoder" in capsys.readouterr().out
    encoder, checkpoint = load_encoder(tmp_path / "a.pt"), load_checkpoint(tmp_path / "a.pt")
    assert_same(encoder.state_dict(), {k: v + (layout == "encoder") for k, v in ours["encoder"].items()})
    assert (encoder.config["num_frames"], encoder.config["resolution"]) == (16, 224)
    assert "student" not in checkpoint and ("predictor" in checkpoint) == (layout in ("target_encoder", "encoder"))


def test_heads_of_vit_g():
    # Only shapes are needed, so nothing is allocated.
    shapes = {"patch_embed.proj.weight": (1408, 3, 2, 16, 16), "blocks.39.norm1.bias": (1408,),
              "blocks.0.mlp.fc1.weight": (6144, 1408)}  # fmt: skip
    weights = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    for flag, heads in ((None, 22), (16, 16)):
        encoder = convert.infer_encoder(weights, Namespace(heads=flag, num_frames=64, resolution=256))
        assert encoder.config["heads"] == encoder.blocks[0].attn.heads == heads
        assert encoder.config["mlp_ratio"] == 48 / 11 and len(encoder.blocks) == 40
    assert convert.RELEASED_HEADS[1024] == 16


# ---------------------------------------------------------------------------------------------------------------------
# errors


def spoil(weights, key, problem):
    """Make a state dict unfit in place. Returns what the error says."""
    if problem == "missing":
        del weights[key]
    elif problem == "unexpected":
        weights["norms_block.0.weight"] = torch.zeros(WIDTH)
        return "unexpected norms_block.0.weight"  # V-JEPA 2.1
    else:
        weights[key] = torch.zeros(5, 6)
    return {"missing": f"missing {key.removeprefix('module.backbone.')}", "misshapen": "is (5, 6), not"}[problem]


@pytest.mark.parametrize("part", ["target_encoder", "encoder", "predictor", "hf"])
@pytest.mark.parametrize("problem", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit(hf, released, tmp_path, capsys, part, problem):
    (_, folder, _), (_, file, path) = hf, released
    if part == "hf":
        weights = safetensors.load_file(folder / "model.safetensors")
        message = spoil(weights, "encoder.layer.1.attention.key.bias", problem)
        safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        error = refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    else:
        stem = "module.backbone.predictor_" if part == "predictor" else "module.backbone."
        message = spoil(file[part], f"{stem}blocks.1.attn.proj.weight", problem)
        torch.save(file, path)
        error = refusal(capsys, convert, "from-vjepa2", path, tmp_path / "out", *FLAGS)
    assert message in error and error.count(";") == 0 and not (tmp_path / "out").exists()


def test_hf_folder_that_holds_something_else(hf, tmp_path, capsys):
    model, folder, _ = hf
    model.config.layer_norm_eps = 1e-5
    model.config.save_pretrained(folder)
    assert "layer_norm_eps" in refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    transformers.ViTConfig().save_pretrained(folder)
    assert "holds a vit model" in refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    assert "is no Hugging Face folder" in refusal(capsys, convert, "from-hf", tmp_path, tmp_path / "out")
    model.config.layer_norm_eps = 1e-6
    model.config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    assert "cannot be read" in refusal(capsys, convert, "from-hf", folder, tmp_path / "out")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["CONVERT_TEST_TRAP"],)


def test_files_that_are_not_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CONVERT_TEST_TRAP", str(tmp_path / "trap"))
    text, pickled, number, empty = (tmp_path / name for name in ("text.pt", "pickled.pt", "number.pt", "empty.pt"))
    text.write_text("not a checkpoint\n" * 100)
    empty.touch()
    torch.save({"target_encoder": RunsCode()}, pickled)
    torch.save(5, number)
    for command in ("from-vjepa2", "to-hf"):
        for file in (text, pickled, number, empty, tmp_path / "nowhere"):
            assert str(file) in refusal(capsys, convert, command, file, tmp_path / "out")
    for content, what in (({"target_encoder": {"a": 1}}, "'target_encoder' is no state dict"), ({}, "no state dict")):
        torch.save(content, number)
        assert what in refusal(capsys, convert, "from-vjepa2", number, tmp_path / "out")
    assert not (tmp_path / "trap").exists() and not (tmp_path / "out").exists()


def test_unknown_width_and_impossible_heads(released, tmp_path, capsys):
    assert "--heads" in refusal(capsys, convert, "from-vjepa2", released[2], tmp_path / "run")
    assert "7 heads" in refusal(capsys, convert, "from-vjepa2", released[2], tmp_path / "run", "--heads", 7)


def test_nothing_is_overwritten_and_no_incomplete_file_remains(hf, released, tmp_path, capsys, monkeypatch):
    _, folder, run = hf
    before = (run / "checkpoint.pt").read_bytes()
    for arguments in (("from-vjepa2", released[2], run, *FLAGS), ("from-hf", folder, run), ("to-hf", run, folder)):
        assert "exists already" in refusal(capsys, convert, *arguments)
    assert (run / "checkpoint.pt").read_bytes() == before

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    assert "disk full" in refusal(capsys, convert, "from-hf", folder, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_without_transformers(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in (("to-hf", hf[2]), ("from-hf", hf[1])):
        assert "pip install transformers" in refusal(capsys, convert, *arguments, tmp_path / "x")
