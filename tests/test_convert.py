"""tools/convert.py: converted weights compute the same as Hugging Face's VJEPA2 and as V-JEPA 2's own files."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, refusal, run_script, same_tensors

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


def our_checkpoint(out_width=WIDTH, resolution=48):
    encoder = randomize(Encoder(WIDTH, depth=2, heads=3, num_frames=4, resolution=resolution))
    predictor = randomize(Predictor(WIDTH, out_width, width=24, depth=2, heads=12, num_mask_tokens=2))
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
    again = transformers.VJEPA2Model.from_pretrained(tmp_path / "again")
    assert same_tensors(again.state_dict(), model.state_dict())
    for field, value in model.config.to_dict().items():
        if re.search("size|num_|ratio|eps", field) and field != "num_pooler_layers":
            assert getattr(again.config, field) == value, field


@pytest.mark.parametrize("out_width, reason", [(1536, "it predicts 1536 values"), (None, "none")])
def test_a_predictor_that_hf_cannot_have_is_left_out_with_a_message(tmp_path, capsys, out_width, reason):
    ours = our_checkpoint(out_width or WIDTH)
    if out_width is None:
        del ours["predictor"], ours["model"]["predictor"]
    torch.save(ours, tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path, tmp_path / "hf")
    assert f"predictor: left out ({reason}" in capsys.readouterr().out
    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert "the encoder alone" in capsys.readouterr().out
    assert same_tensors(load_encoder(tmp_path / "back").state_dict(), ours["encoder"])
    assert "predictor" not in load_checkpoint(tmp_path / "back")


def test_the_video_processor_of_a_converted_folder_prepares_clips_as_we_do(tmp_path):
    torch.save(our_checkpoint(resolution=224), tmp_path / "checkpoint.pt")
    run_script(convert, "to-hf", tmp_path, tmp_path / "hf")
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "hf")
    video = torch.randint(256, (4, 3, 256, 300), dtype=torch.uint8)  # its short side needs no scaling
    expected = data.normalize(video[None, :, :, 16:240, 38:262].transpose(1, 2), "cpu")
    got = processor(video, return_tensors="pt")["pixel_values_videos"].transpose(1, 2)
    torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def test_the_encoder_and_predictor_of_a_compiled_classifier_are_taken(tmp_path, capsys):
    model = hf_model("VJEPA2ForVideoClassification").to(torch.bfloat16)
    model.config.save_pretrained(tmp_path / "hf")
    weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    safetensors.save_file(weights, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "._model.safetensors").write_text("what macOS leaves behind")
    run_script(convert, "from-hf", tmp_path / "hf", tmp_path / "run")
    assert "pooler and classifier: left out" in capsys.readouterr().out
    expected = model.float().vjepa2.encoder(clips().transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(load_encoder(tmp_path / "run")(clips()), expected, **CLOSE)
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / "run")["predictor"].values()} == {torch.float32}


def test_hf_ratio_survives_truncation():
    pairs = [(width, hidden) for width in range(64, 2000, 32) for hidden in range(width, 5 * width, 97)]
    assert all(int(width * convert.hf_ratio(hidden, width)) == hidden for width, hidden in pairs)


def vjepa2_file(checkpoint):
    """The file that V-JEPA 2 would have saved, renamed by hand, without the tables in tools/convert.py."""
    encoder, predictor = dict(checkpoint["encoder"]), {"predictor_pos_embed": torch.zeros(1, N, 24)}
    encoder["patch_embed.proj.weight"] = encoder.pop("patch_embed.weight").reshape(-1, 3, 2, 16, 16)
    encoder["patch_embed.proj.bias"] = encoder.pop("patch_embed.bias")
    encoder["pos_embed"] = torch.zeros(1, N, WIDTH)
    for k, v in checkpoint["predictor"].items():
        rows = {f"mask_tokens.{i}": row.reshape(1, 1, -1) for i, row in enumerate(v)}
        predictor |= rows if k == "mask_tokens" else {"predictor_" + k: v}
    file = dict(encoder={k: v + 1 for k, v in encoder.items()}, target_encoder=encoder, predictor=predictor)
    file = {key: {f"module.backbone.{k}": v for k, v in sd.items()} for key, sd in file.items()}
    return file | dict(epoch=3, loss=0.5, opt={"state": {}})


@pytest.fixture
def released(tmp_path):
    ours = our_checkpoint()
    torch.save(vjepa2_file(ours), tmp_path / "released.pt")
    return ours, vjepa2_file(ours), tmp_path / "released.pt"


FLAGS = ("--heads", 3)


def test_vjepa2_file(released, tmp_path, capsys):
    ours, _, path = released
    run_script(convert, "from-vjepa2", path, tmp_path / "run", *FLAGS)
    checkpoint, lines = load_checkpoint(tmp_path / "run"), capsys.readouterr().out.splitlines()
    assert "target_encoder becomes the checkpoint's encoder, encoder its student" in lines
    encoder = ours["model"]["encoder"] | dict(num_frames=64, resolution=256)
    assert checkpoint["kind"] == "vjepa2" and checkpoint["model"] == ours["model"] | {"encoder": encoder}
    assert same_tensors(checkpoint["encoder"], ours["encoder"])
    assert same_tensors(checkpoint["student"], {k: v + 1 for k, v in ours["encoder"].items()})
    assert same_tensors(checkpoint["predictor"], ours["predictor"])


@pytest.mark.parametrize("layout", ["target_encoder", "encoder", "state dict"])
def test_vjepa2_file_with_a_single_encoder(released, tmp_path, layout):
    ours, file, path = released
    key = "target_encoder" if layout == "target_encoder" else "encoder"
    if layout == "state dict":  # of a compiled network, saved by itself
        file = {f"_orig_mod.{name}": tensor for name, tensor in file[key].items()}
    else:
        file = {part: file[part] for part in (key, "predictor")}
    torch.save(file, path)
    run_script(convert, "from-vjepa2", path, tmp_path / "a.pt", *FLAGS, "--resolution", 384)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert same_tensors(checkpoint["encoder"], {k: v + (key == "encoder") for k, v in ours["encoder"].items()})
    assert checkpoint["model"]["encoder"] == ours["model"]["encoder"] | dict(num_frames=64, resolution=384)
    assert "student" not in checkpoint and ("predictor" in checkpoint) == (layout == key)


def test_heads_of_vit_g():
    shapes = {"patch_embed.proj.weight": (1408, 3, 2, 16, 16), "blocks.39.norm1.bias": (1408,),
              "blocks.0.mlp.fc1.weight": (6144, 1408)}  # fmt: skip
    weights = {k: torch.empty(v, device="meta") for k, v in shapes.items()}  # only shapes are needed
    for flag, heads in ((None, 22), (16, 16)):
        encoder = convert.infer_encoder(weights, flag, 256)
        assert (encoder.config["heads"], encoder.config["mlp_ratio"], len(encoder.blocks)) == (heads, 48 / 11, 40)


@pytest.mark.parametrize("part, block", [
    ("encoder", "blocks.1"), ("predictor", "predictor_blocks.1"), ("hf", "encoder.layer.1"),
])  # fmt: skip
def test_weights_that_do_not_fit(hf, released, tmp_path, capsys, part, block):
    (_, folder, _), (_, file, path) = hf, released
    weights = safetensors.load_file(folder / "model.safetensors") if part == "hf" else file[part]
    prefix = "" if part == "hf" else "module.backbone."
    del weights[f"{prefix}{block}.norm1.bias"]
    weights[f"{prefix}{block}.norm2.bias"] = torch.zeros(5)
    weights["norms_block.0.weight"] = torch.zeros(WIDTH)  # V-JEPA 2.1
    torch.save(file, path)
    arguments = ("from-vjepa2", path, tmp_path / "out", *FLAGS)
    if part == "hf":
        safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        arguments = ("from-hf", folder, tmp_path / "out")
    error = refusal(capsys, convert, *arguments)
    expected = f"missing {block}.norm1.bias; unexpected norms_block.0.weight; {block}.norm2.bias is (5,), not "
    assert expected in error and error.count(";") == 2 and not (tmp_path / "out").exists()


def test_hf_folder_that_holds_something_else(hf, tmp_path, capsys):
    model, folder, _ = hf
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    assert "cannot be read" in refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    model.config.layer_norm_eps = 1e-5
    for config in (model.config, transformers.ViTConfig()):
        config.save_pretrained(folder)
        assert "only vjepa2 with layer_norm_eps 1e-6" in refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    refusal(capsys, convert, "from-hf", folder, tmp_path / "out")
    assert "is no Hugging Face folder" in refusal(capsys, convert, "from-hf", tmp_path, tmp_path / "out")


def test_files_that_are_not_checkpoints(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file.pt"
    arguments = convert, "from-vjepa2", file, tmp_path / "out"
    assert f"{file}" in refusal(capsys, *arguments)
    file.write_text("not a checkpoint")
    assert f"{file} cannot be read" in refusal(capsys, *arguments)
    torch.save({"target_encoder": Path("runs code when loaded")}, file)
    assert f"{file} cannot be read" in refusal(capsys, *arguments)
    for content in ({"target_encoder": {"a": 1}}, {}, 5):
        torch.save(content, file)
        assert f"{file} has no state dict 'target_encoder'" in refusal(capsys, *arguments)
    assert f"{file} is not a salt-1 checkpoint" in refusal(capsys, convert, "to-hf", file, tmp_path / "out")
    torch.save(vjepa2_file(our_checkpoint()), file)
    for flags, what in (((), "--heads"), (("--heads", 7), "7 heads")):  # an unknown width and impossible heads
        assert what in refusal(capsys, *arguments, *flags)
    torch.save(our_checkpoint(), tmp_path / "checkpoint.pt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for command in ("to-hf", "from-hf"):
        assert "pip install transformers" in refusal(capsys, convert, command, tmp_path, tmp_path / "out")


def test_nothing_is_overwritten_and_no_incomplete_file_remains(hf, tmp_path, capsys, monkeypatch):
    _, folder, run = hf
    for arguments in (("from-hf", folder, run), ("to-hf", run, folder)):
        assert "exists already; nothing written" in refusal(capsys, convert, *arguments)

    def full_disk(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    assert "disk full" in refusal(capsys, convert, "from-hf", folder, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
