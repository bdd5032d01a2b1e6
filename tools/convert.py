"""Exchange weights with V-JEPA 2's released files and with Hugging Face's VJEPA2Model folders.

    python convert.py to-hf out/student hf_folder          # config.json and model.safetensors
    python convert.py from-hf hf_folder out/vjepa2         # writes out/vjepa2/checkpoint.pt
    python convert.py from-vjepa2 vitl.pt out/vjepa2       # a file of dl.fbaipublicfiles.com/vjepa2

The networks are the same number for number; only names and shapes differ, and the tables below say how. V-JEPA 2.1 is
another architecture (its norms_block.* are refused), and so are V-JEPA 1's files (positions are added, not rotated),
which nothing in their names gives away: do not bring them here.

Letters in shape comments: D width, P numbers in a tubelet, n mask tokens.
"""

import argparse
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import torch

from model import CHECKPOINT_FORMAT, SIZES, AttentiveProbe, Encoder, Predictor, build, check_state_dict, load_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# names: ours, V-JEPA 2's, Hugging Face's; the first row that fits counts
#     *        the number of a block
#     {a,b}    parts, in order along the first dimension, of what we keep as one tensor;  {i}: one part for each row

VJEPA2, HF = 1, 2  # columns

ENCODER_NAMES = [
    ("patch_embed", "patch_embed.proj", "encoder.embeddings.patch_embeddings.proj"),
    ("blocks.*.attn.qkv", "blocks.*.attn.qkv", "encoder.layer.*.attention.{query,key,value}"),
    ("blocks.*.attn", "blocks.*.attn", "encoder.layer.*.attention"),
    ("blocks.*", "blocks.*", "encoder.layer.*"),
    ("norm", "norm", "encoder.layernorm"),
]
PREDICTOR_NAMES = [
    ("embed", "predictor_embed", "predictor.embeddings.predictor_embeddings"),
    ("mask_tokens", "mask_tokens.{i}", "predictor.embeddings.mask_tokens"),
    ("blocks.*.attn.qkv", "predictor_blocks.*.attn.qkv", "predictor.layer.*.attention.{query,key,value}"),
    ("blocks.*.attn", "predictor_blocks.*.attn", "predictor.layer.*.attention"),
    ("blocks.*", "predictor_blocks.*", "predictor.layer.*"),
    ("norm", "predictor_norm", "predictor.layernorm"),
    ("proj", "predictor_proj", "predictor.proj"),
]
PROBE_NAMES = [
    ("query", None, "pooler.query_tokens"),
    ("blocks.*.norm1", None, "pooler.self_attention_layers.*.layer_norm1"),
    ("blocks.*.attn.qkv", None, "pooler.self_attention_layers.*.self_attn.{q,k,v}_proj"),
    ("blocks.*.attn.proj", None, "pooler.self_attention_layers.*.self_attn.out_proj"),
    ("blocks.*.norm2", None, "pooler.self_attention_layers.*.layer_norm2"),
    ("blocks.*.mlp", None, "pooler.self_attention_layers.*.mlp"),
    ("cross.norm1", None, "pooler.cross_attention_layer.layer_norm1"),
    ("cross.q", None, "pooler.cross_attention_layer.cross_attn.q_proj"),
    ("cross.kv", None, "pooler.cross_attention_layer.cross_attn.{k,v}_proj"),
    ("cross.norm2", None, "pooler.cross_attention_layer.layer_norm2"),
    ("cross.mlp", None, "pooler.cross_attention_layer.mlp"),
    ("linear", None, "classifier"),
]

# Heads leave no trace in the weights. V-JEPA 2 trained its ViT-g with 22 of them, where the paper's table has 16.
RELEASED_HEADS = {size["width"]: size["heads"] for size in SIZES.values()} | {1408: 22}


def their_names(name, table, column, rows):
    """The names in another format of our tensor `name`, which has `rows` rows: a list, of one unless we fuse parts."""
    for row in table:
        pattern = re.escape(row[0]).replace(r"\*", r"(?P<block>\d+)") + r"(?P<rest>|\..*)"
        if match := re.fullmatch(pattern, name):
            theirs = row[column].replace("*", match.groupdict().get("block", "")) + match["rest"]
            before, brace, after = theirs.partition("{")
            if not brace:
                return [theirs]
            parts, _, after = after.partition("}")
            return [f"{before}{part}{after}" for part in (range(rows) if parts == "i" else parts.split(","))]
    raise KeyError(name)


def to_theirs(weights, table, column, tubelet=None):
    """Our state dict under their names and in their shapes; tubelet: (3, t, h, w), needed for an encoder."""
    theirs = {}
    for name, tensor in weights.items():
        names = their_names(name, table, column, len(tensor))
        if name == "patch_embed.weight":
            tensor = tensor.unflatten(1, tubelet)  # (D, P) -> Conv3d's (D, 3, t, h, w)
        elif name == "mask_tokens":
            tensor = tensor[:, None, None] if column == HF else tensor[:, None]  # (n, 1, 1, D) or n of (1, 1, D)
        theirs |= zip(names, (part.clone() for part in tensor.chunk(len(names))), strict=True)
    return theirs


def from_theirs(module, weights, table, column, tubelet=None):
    """Their state dict under our names and in our shapes, float32, for `module` (of which only shapes are used).

    ValueError naming, by their names, every tensor that is missing, extra or of another shape.
    """
    ours = module.state_dict()
    expected = to_theirs(ours, table, column, tubelet)
    name = type(module).__name__.lower()
    check_state_dict(expected, weights, name)
    print(f"{name}: {len(weights)} of {len(expected)} tensors matched")
    return {
        k: torch.cat([weights[n] for n in their_names(k, table, column, len(t))]).float().reshape(t.shape)
        for k, t in ours.items()
    }


def tubelet_shape(config):
    """(3, t, h, w) of an Encoder.config."""
    return 3, config["tubelet_size"], config["patch_size"], config["patch_size"]


def checkpoint_of(encoder, encoder_weights, predictor, predictor_weights, column):
    """Our checkpoint from their weights, for encoder and predictor (or None) that only lend their shapes."""
    names, tubelet = ENCODER_NAMES, tubelet_shape(encoder.config)
    checkpoint = {"format": CHECKPOINT_FORMAT, "kind": "vjepa2", "step": 0, "args": {}}
    checkpoint["model"] = {"encoder": encoder.config}
    checkpoint["encoder"] = from_theirs(encoder, encoder_weights, names, column, tubelet)
    if predictor is None:
        print("predictor: none there, the checkpoint holds the encoder alone")
    else:
        checkpoint["model"]["predictor"] = predictor.config
        checkpoint["predictor"] = from_theirs(predictor, predictor_weights, PREDICTOR_NAMES, column)
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# V-JEPA 2's files


def depth_of(weights, blocks):
    """How many blocks there are under the name `blocks`."""
    return 1 + max((int(m[1]) for k in weights if (m := re.match(rf"{blocks}\.(\d+)\.", k))), default=-1)


def shape_of(weights, name, ndim):
    """The shape of a tensor from which a network's size is read; ValueError if it is missing or has not ndim axes."""
    if name not in weights:
        raise ValueError(f"these are not the weights of this network: missing {name}")
    if weights[name].ndim != ndim:
        raise ValueError(f"{name} is {tuple(weights[name].shape)}, which has not {ndim} axes")
    return weights[name].shape


def vjepa2_encoder(weights, heads, num_frames, resolution):
    """The Encoder, without weights, that V-JEPA 2's tensors ask for by their shapes. ValueError if they do not say."""
    width, _, tubelet_size, patch_size, _ = shape_of(weights, "patch_embed.proj.weight", 5)
    hidden, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    heads = heads or RELEASED_HEADS.get(width)
    if heads is None:
        raise ValueError(f"an encoder of width {width} may have any number of heads: say which with --heads")
    with torch.device("meta"):
        return Encoder(
            width, depth_of(weights, "blocks"), heads, mlp_ratio=hidden / width,
            num_frames=num_frames, resolution=resolution, patch_size=patch_size, tubelet_size=tubelet_size,
        )  # fmt: skip


def vjepa2_predictor(weights, heads):
    """The Predictor, without weights, that V-JEPA 2's tensors ask for; likewise."""
    width, in_width = shape_of(weights, "predictor_embed.weight", 2)
    out_width, _ = shape_of(weights, "predictor_proj.weight", 2)
    num_mask_tokens = sum(k.startswith("mask_tokens.") for k in weights)
    with torch.device("meta"):
        return Predictor(in_width, out_width, width, depth_of(weights, "predictor_blocks"), heads, num_mask_tokens)


def vjepa2_weights(file, key):
    """The state dict `key` of a V-JEPA 2 file as read, without wrappers' prefixes and unused position embeddings."""
    if not isinstance(file.get(key), dict) or not all(isinstance(t, torch.Tensor) for t in file[key].values()):
        raise ValueError(f"no state dict {key!r} there; V-JEPA 2's files have target_encoder, encoder and predictor")
    weights = {k.replace("module.", "").replace("backbone.", ""): t for k, t in file[key].items()}
    for name in ("pos_embed", "predictor_pos_embed"):
        # The released files carry sine tables from before RoPE; V-JEPA 2's own loader passes over them too.
        if weights.pop(name, None) is not None:
            print(f"{key}: {name} left out (V-JEPA 2 does not use it; a V-JEPA 1 file would, and cannot be converted)")
    return weights


def from_vjepa2(path, heads=None, predictor_heads=12, num_frames=64, resolution=256, key="target_encoder"):
    """Our checkpoint (a dictionary) of a V-JEPA 2 file.

    key: "target_encoder", which V-JEPA 2 evaluates, or "encoder", which its predictor was trained on. heads: None for
    the released ones by width. OSError if the file cannot be read; ValueError if it is not such a file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)  # never runs what a pickle says
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, not by torch.save, or unsafe)") from error
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not V-JEPA 2's dictionary")
    encoder_weights, predictor_weights = vjepa2_weights(file, key), vjepa2_weights(file, "predictor")
    encoder = vjepa2_encoder(encoder_weights, heads, num_frames, resolution)
    predictor = vjepa2_predictor(predictor_weights, predictor_heads)
    return checkpoint_of(encoder, encoder_weights, predictor, predictor_weights, VJEPA2)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders


def import_transformers():
    """The transformers package, which nothing else here needs; ImportError saying what to do."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face's folders need transformers: pip install transformers") from error
    return transformers


def hf_ratio(hidden, width):
    """A ratio whose product with width Hugging Face truncates to hidden, whatever the division's last bit did."""
    return next(r for r in (hidden / width, (hidden + 0.5) / width) if int(width * r) == hidden)


def to_hf(path):
    """The Hugging Face VJEPA2Model of our checkpoint, and the tensors of it that we have.

    Its predictor can only predict the width of its own encoder. Where ours predicts something else (pixels, another
    teacher's latents) the tensors are the encoder's alone. Errors as model.load_checkpoint and model.build.
    """
    transformers = import_transformers()
    checkpoint = load_checkpoint(path)
    e, p = checkpoint["model"]["encoder"], checkpoint["model"].get("predictor")
    config = transformers.VJEPA2Config(
        patch_size=e["patch_size"], tubelet_size=e["tubelet_size"], crop_size=e["resolution"],
        frames_per_clip=e["num_frames"], hidden_size=e["width"], num_hidden_layers=e["depth"],
        num_attention_heads=e["heads"], mlp_ratio=hf_ratio(round(e["width"] * e["mlp_ratio"]), e["width"]),
        layer_norm_eps=1e-6,
    )  # fmt: skip
    encoder = build(Encoder, e, checkpoint["encoder"])
    weights = to_theirs(encoder.state_dict(), ENCODER_NAMES, HF, tubelet_shape(e))
    print(f"encoder: {len(weights)} tensors")
    if p is not None and p["out_width"] == p["in_width"] == e["width"]:
        config.pred_hidden_size, config.pred_num_hidden_layers = p["width"], p["depth"]
        config.pred_num_attention_heads, config.pred_num_mask_tokens = p["heads"], p["num_mask_tokens"]
        predictor = build(Predictor, p, checkpoint["predictor"])
        theirs = to_theirs(predictor.state_dict(), PREDICTOR_NAMES, HF)
        print(f"predictor: {len(theirs)} tensors")
        weights |= theirs
    else:
        why = "there is none" if p is None else f"it predicts {p['out_width']} numbers, theirs could only {e['width']}"
        print(f"predictor: left out ({why}); Hugging Face will say that it starts one at random")
    with torch.device("meta"):
        model = transformers.VJEPA2Model(config)
    return model, weights


def from_hf(path):
    """Our checkpoint (a dictionary) of a Hugging Face VJEPA2Model folder; of its encoder alone if that is all there is.

    OSError if there is no such folder, ValueError if it holds another model.
    """
    transformers = import_transformers()
    from safetensors import SafetensorError  # comes with transformers
    from safetensors.torch import load_file

    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{folder} is no Hugging Face folder: config.json or model.safetensors is missing")
    c = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if c.model_type != "vjepa2":
        raise ValueError(f"{folder} holds a {c.model_type} model, not vjepa2")
    if (c.layer_norm_eps, c.hidden_act) != (1e-6, "gelu"):
        raise ValueError(f"our networks have layer_norm_eps 1e-6 and gelu, not {c.layer_norm_eps} and {c.hidden_act}")
    try:
        weights = {k: t for file in files for k, t in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"the tensors in {folder} cannot be read: {error}") from error
    predictor_weights = {k: weights.pop(k) for k in list(weights) if k.startswith("predictor.")}
    with torch.device("meta"):
        encoder = Encoder(
            c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
            mlp_ratio=int(c.hidden_size * c.mlp_ratio) / c.hidden_size, num_frames=c.frames_per_clip,
            resolution=c.crop_size, patch_size=c.patch_size, tubelet_size=c.tubelet_size,
        )  # fmt: skip
        predictor = predictor_weights and Predictor(
            c.hidden_size, c.hidden_size, c.pred_hidden_size, c.pred_num_hidden_layers, c.pred_num_attention_heads,
            c.pred_num_mask_tokens,
        )  # fmt: skip
    return checkpoint_of(encoder, weights, predictor or None, predictor_weights, HF)


def probe_to_hf(weights):
    """An AttentiveProbe's state dict -> `pooler.*` and `classifier.*` of VJEPA2ForVideoClassification.

    Theirs has the encoder's number of heads and layer_norm_eps 1e-6; ours 16 and, as V-JEPA 2, 1e-5 unless told.
    """
    return to_theirs(weights, PROBE_NAMES, HF)


def probe_from_hf(weights):
    """VJEPA2ForVideoClassification's state dict (other tensors are passed over) -> an AttentiveProbe's.

    For theirs to come out, make it AttentiveProbe(..., heads=config.num_attention_heads, eps=config.layer_norm_eps).
    ValueError naming every tensor that is missing, extra or of another shape.
    """
    weights = {k: t for k, t in weights.items() if k.startswith(("pooler.", "classifier."))}
    num_classes, width = shape_of(weights, "classifier.weight", 2)
    with torch.device("meta"):
        probe = AttentiveProbe(width, num_classes, 1 + depth_of(weights, r"pooler\.self_attention_layers"), heads=1)
    return from_theirs(probe, weights, PROBE_NAMES, HF)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def write_checkpoint(checkpoint, out):
    """Write to `out`, a file ending in .pt or a run folder; beside it first, then renamed. FileExistsError if taken."""
    file = Path(out) if str(out).endswith(".pt") else Path(out) / "checkpoint.pt"
    if file.exists():
        raise FileExistsError(f"{file} exists already; nothing written")
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        torch.save(checkpoint, aside)
        aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)
    print(f"wrote {file}")


def write_hf(model, weights, out):
    """Write a Hugging Face folder; beside it first, then renamed. FileExistsError if `out` is not new or empty."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; nothing written")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(aside, state_dict=weights)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"wrote {out}")


def parse_args(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to = commands.add_parser("to-hf", help="our checkpoint -> Hugging Face's VJEPA2Model")
    to.add_argument("source", metavar="RUN_OR_CHECKPOINT")
    to.add_argument("out", metavar="DIR", help="new or empty folder")
    hf = commands.add_parser("from-hf", help="Hugging Face's VJEPA2Model -> our checkpoint")
    hf.add_argument("source", metavar="DIR")
    file = commands.add_parser("from-vjepa2", help="V-JEPA 2's released file -> our checkpoint")
    file.add_argument("source", metavar="FILE")
    for command in (hf, file):
        command.add_argument("out", metavar="OUT", help="run folder, gets a checkpoint.pt; or a file ending in .pt")
    key_help = "which of the file's encoders (default target_encoder, the one V-JEPA 2 evaluates)"
    file.add_argument("--key", choices=("target_encoder", "encoder"), default="target_encoder", help=key_help)
    file.add_argument("--heads", type=int, help="of the encoder (default: the released model's of that width)")
    file.add_argument("--predictor-heads", type=int, default=12, help="default 12, the released models'")
    file.add_argument("--num-frames", type=int, default=64, help="trained on, for the record (default 64)")
    file.add_argument("--resolution", type=int, default=256, help="trained on, for the record (default 256)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.command == "to-hf":
            write_hf(*to_hf(args.source), args.out)
        elif args.command == "from-hf":
            write_checkpoint(from_hf(args.source), args.out)
        else:
            checkpoint = from_vjepa2(
                args.source, args.heads, args.predictor_heads, args.num_frames, args.resolution, args.key
            )
            write_checkpoint(checkpoint, args.out)
    except (ValueError, OSError, ImportError) as error:
        print("convert: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
