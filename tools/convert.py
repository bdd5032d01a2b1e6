"""Convert checkpoints from and to Hugging Face's VJEPA2Model, and from V-JEPA 2's released files.

    python -m tools.convert to-hf out/student hf_folder       # writes hf_folder/config.json and model.safetensors
    python -m tools.convert from-hf hf_folder out/vjepa2      # writes out/vjepa2/checkpoint.pt
    python -m tools.convert from-vjepa2 vitl.pt out/vjepa2    # vitl.pt is from dl.fbaipublicfiles.com/vjepa2

The networks compute exactly the same; only names and shapes of tensors differ. V-JEPA 2's files hold two encoders.
Their target_encoder, which V-JEPA 2 evaluates, becomes the checkpoint's encoder. Their encoder becomes its student,
which probe.py evaluates with --weights student. physics.py uses the student for contexts and the encoder for targets.
Hugging Face's folders hold a single encoder.

V-JEPA 2.1 has another architecture and is refused, because of its norms_block tensors. Do not convert files of V-JEPA
1: it adds position embeddings instead of rotating, but nothing in the names of its tensors shows that.

Letters in shape comments: D width, P values in a tubelet, (t, h, w) frames and pixels of a tubelet, n mask tokens.
"""

import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from cli import Parser, fail
from model import CHECKPOINT_FORMAT, SIZES, AttentiveProbe, Encoder, Predictor, build, check_state_dict, load_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Names of tensors: ours, V-JEPA 2's, Hugging Face's. The first row that matches applies.
#     *        a block's number
#     {a,b}    tensors that we keep as one, concatenated along the first dimension
#     {i}      one tensor for each row of ours

VJEPA2, HF = 1, 2  # columns of the tables

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

# By width. The weights do not show the number of heads. V-JEPA 2's ViT-g has 22; the paper's table 3 says 16.
RELEASED_HEADS = {size["width"]: size["heads"] for size in SIZES.values()} | {1408: 22}


def their_names(name, table, column, rows):
    """List the tensors of another format that our tensor `name` with `rows` rows consists of: usually a single one."""
    for row in table:
        pattern = re.escape(row[0]).replace(r"\*", r"(?P<block>\d+)") + r"(?P<rest>|\..*)"
        match = re.fullmatch(pattern, name)
        if match:
            theirs = row[column].replace("*", match.groupdict().get("block", "")) + match["rest"]
            braces = re.search(r"\{(.*)\}", theirs)
            if not braces:
                return [theirs]
            parts = range(rows) if braces[1] == "i" else braces[1].split(",")
            return [theirs.replace(braces[0], str(part)) for part in parts]
    raise KeyError(name)


def to_theirs(weights, table, column, tubelet=None):
    """Convert our state dict to their names and shapes. tubelet: (3, t, h, w), needed for an encoder."""
    theirs = {}
    for name, tensor in weights.items():
        names = their_names(name, table, column, len(tensor))
        if name == "patch_embed.weight":
            tensor = tensor.unflatten(1, tubelet)  # (D, P) -> (D, 3, t, h, w), as in Conv3d
        elif name == "mask_tokens" and column == HF:
            tensor = tensor[:, None, None]  # (n, D) -> (n, 1, 1, D)
        elif name == "mask_tokens":
            tensor = tensor[:, None]  # (n, D) -> (n, 1, D), then n tensors (1, 1, D)
        theirs |= zip(names, (part.clone() for part in tensor.chunk(len(names))), strict=True)
    return theirs


def from_theirs(module, weights, table, column, tubelet=None, network=None):
    """Convert their state dict to our names and shapes, in float32. module: ours, of which only the shapes are used.

    network: its name in messages; default: the class's. ValueError listing, by their names, all tensors that are
    missing, unexpected or of another shape.
    """
    ours = module.state_dict()
    expected = to_theirs(ours, table, column, tubelet)
    network = network or type(module).__name__.lower()
    check_state_dict(expected, weights, network)
    print(f"{network}: {len(weights)} of {len(expected)} tensors matched")
    converted = {}
    for name, tensor in ours.items():
        parts = [weights[theirs] for theirs in their_names(name, table, column, len(tensor))]
        converted[name] = torch.cat(parts).float().reshape(tensor.shape)
    return converted


def tubelet_shape(config):
    """(3, t, h, w) of an encoder's config."""
    return 3, config["tubelet_size"], config["patch_size"], config["patch_size"]


def make_checkpoint(encoder, encoder_weights, predictor, predictor_weights, column, student_weights=None):
    """Make our checkpoint from their weights. encoder, predictor: ours, for the shapes; predictor may be None.

    student_weights: those of the encoder that the predictor was trained with, if encoder_weights are its EMA.
    """
    tubelet = tubelet_shape(encoder.config)
    checkpoint = {"format": CHECKPOINT_FORMAT, "kind": "vjepa2", "step": 0, "args": {}}
    checkpoint["model"] = {"encoder": encoder.config}
    checkpoint["encoder"] = from_theirs(encoder, encoder_weights, ENCODER_NAMES, column, tubelet)
    if student_weights is not None:
        checkpoint["student"] = from_theirs(encoder, student_weights, ENCODER_NAMES, column, tubelet, "student")
    if predictor is None:
        print("predictor: there is none; the checkpoint holds the encoder alone")
    else:
        checkpoint["model"]["predictor"] = predictor.config
        checkpoint["predictor"] = from_theirs(predictor, predictor_weights, PREDICTOR_NAMES, column)
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# V-JEPA 2's files


def depth_of(weights, blocks):
    """The number of blocks, from the tensors named `blocks`.0., `blocks`.1., ... (`blocks` is a regular expression)."""
    matches = (re.match(rf"{blocks}\.(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def shape_of(weights, name, ndim):
    """The shape of a tensor; ValueError if it is missing or does not have ndim dimensions."""
    if name not in weights:
        raise ValueError(f"these are not the weights of this network: missing {name}")
    if weights[name].ndim != ndim:
        raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, not {ndim} dimensions")
    return weights[name].shape


def vjepa2_encoder(weights, heads, num_frames, resolution):
    """Infer the Encoder, without weights, from the shapes of V-JEPA 2's tensors; ValueError if that is impossible."""
    width, _, tubelet_size, patch_size, _ = shape_of(weights, "patch_embed.proj.weight", 5)
    hidden, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    heads = heads or RELEASED_HEADS.get(width)
    if heads is None:
        raise ValueError(f"no released encoder has width {width}: give its number of attention heads with --heads")
    with torch.device("meta"):
        return Encoder(
            width, depth_of(weights, "blocks"), heads, mlp_ratio=hidden / width,
            num_frames=num_frames, resolution=resolution, patch_size=patch_size, tubelet_size=tubelet_size,
        )  # fmt: skip


def vjepa2_predictor(weights, heads):
    """Infer the Predictor, without weights, likewise."""
    width, in_width = shape_of(weights, "predictor_embed.weight", 2)
    out_width, _ = shape_of(weights, "predictor_proj.weight", 2)
    num_mask_tokens = sum(name.startswith("mask_tokens.") for name in weights)
    with torch.device("meta"):
        return Predictor(in_width, out_width, width, depth_of(weights, "predictor_blocks"), heads, num_mask_tokens)


def vjepa2_weights(file, key):
    """The state dict `key` of a V-JEPA 2 file, without the prefixes of wrappers and the unused position embeddings."""
    state_dict = file.get(key)
    if not isinstance(state_dict, dict) or not all(isinstance(t, torch.Tensor) for t in state_dict.values()):
        raise ValueError(f"there is no state dict {key!r}; V-JEPA 2's files have target_encoder, encoder and predictor")
    weights = {name.replace("module.", "").replace("backbone.", ""): tensor for name, tensor in state_dict.items()}
    for name in ("pos_embed", "predictor_pos_embed"):
        # Sine tables from before RoPE; V-JEPA 2's own loader ignores them too.
        if weights.pop(name, None) is not None:
            print(f"{key}: ignoring {name} (V-JEPA 2 does not use it; V-JEPA 1 does, and cannot be converted)")
    return weights


def from_vjepa2(path, heads=None, predictor_heads=12, num_frames=64, resolution=256):
    """Convert a V-JEPA 2 file to our checkpoint, a dictionary.

    The checkpoint's encoder is the file's target_encoder, which V-JEPA 2 evaluates and whose latents its predictor
    predicts; its student is the file's encoder, with which the predictor was trained. If the file has only one of the
    two, that is the checkpoint's encoder, and there is no student. heads: None for those of the released encoder of the
    same width. OSError if the file cannot be read; ValueError if it is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint (damaged, not made by torch.save, or unsafe)"
        ) from error
    if not isinstance(file, dict):
        raise ValueError(f"{path} holds a {type(file).__name__}, not a dictionary like V-JEPA 2's files")
    held = [key for key in ("target_encoder", "encoder") if key in file]
    if not held:
        raise ValueError("there is no state dict 'target_encoder' or 'encoder'; V-JEPA 2's files have both")
    encoder_weights, student_weights = vjepa2_weights(file, held[0]), None
    if len(held) == 2:
        print("target_encoder becomes the checkpoint's encoder, encoder its student")
        student_weights = vjepa2_weights(file, "encoder")
    else:
        print(f"the file has only {held[0]}: it becomes the checkpoint's encoder, for contexts and targets")
    predictor_weights = vjepa2_weights(file, "predictor")
    encoder = vjepa2_encoder(encoder_weights, heads, num_frames, resolution)
    predictor = vjepa2_predictor(predictor_weights, predictor_heads)
    return make_checkpoint(encoder, encoder_weights, predictor, predictor_weights, VJEPA2, student_weights)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders


def import_transformers():
    """Import transformers, which only these functions need; ImportError saying how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("conversion from and to Hugging Face needs transformers: pip install transformers") from error
    return transformers


def hf_ratio(hidden, width):
    """An mlp_ratio for which Hugging Face's int(width * ratio) is `hidden`, in spite of rounding errors."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def to_hf(path):
    """Convert our checkpoint to Hugging Face: (VJEPA2Model without weights, the tensors that we have for it).

    Its predictor can only predict as many values as its encoder is wide. If ours predicts something else (pixels, the
    latents of a teacher of another width), there are tensors for the encoder only. Errors: those of `load_checkpoint`
    and `build`.
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
    if "student" in checkpoint:
        print("student: left out (Hugging Face's model has a single encoder)")
    missing = None
    if p is None:
        missing = "there is none"
    elif p["in_width"] != e["width"] or p["out_width"] != e["width"]:
        missing = f"it predicts {p['out_width']} values, but Hugging Face's can only predict {e['width']}"
    if missing:
        print(f"predictor: left out ({missing}); Hugging Face will report that it initializes one at random")
    else:
        config.pred_hidden_size, config.pred_num_hidden_layers = p["width"], p["depth"]
        config.pred_num_attention_heads, config.pred_num_mask_tokens = p["heads"], p["num_mask_tokens"]
        predictor = build(Predictor, p, checkpoint["predictor"])
        predictor_weights = to_theirs(predictor.state_dict(), PREDICTOR_NAMES, HF)
        print(f"predictor: {len(predictor_weights)} tensors")
        weights |= predictor_weights
    with torch.device("meta"):
        model = transformers.VJEPA2Model(config)
    return model, weights


def read_hf(folder):
    """Read a Hugging Face folder: (config, state dict). OSError if it is none; ValueError if it holds another model."""
    transformers = import_transformers()
    from safetensors import SafetensorError  # comes with transformers
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{folder} is no Hugging Face folder: config.json or model.safetensors is missing")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "vjepa2":
        raise ValueError(f"{folder} holds a {config.model_type} model, not vjepa2")
    if config.layer_norm_eps != 1e-6 or config.hidden_act != "gelu":
        raise ValueError(
            f"our networks have layer_norm_eps 1e-6 and gelu, not {config.layer_norm_eps} and {config.hidden_act}"
        )
    try:
        return config, {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"the tensors in {folder} cannot be read: {error}") from error


def from_hf(path):
    """Convert a Hugging Face VJEPA2Model folder to our checkpoint, a dictionary. Errors: those of `read_hf`.

    If the folder has no predictor, neither has the checkpoint.
    """
    c, weights = read_hf(Path(path))
    predictor_weights = {name: weights.pop(name) for name in list(weights) if name.startswith("predictor.")}
    predictor = None
    with torch.device("meta"):
        encoder = Encoder(
            c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
            mlp_ratio=int(c.hidden_size * c.mlp_ratio) / c.hidden_size, num_frames=c.frames_per_clip,
            resolution=c.crop_size, patch_size=c.patch_size, tubelet_size=c.tubelet_size,
        )  # fmt: skip
        if predictor_weights:
            sizes = c.pred_hidden_size, c.pred_num_hidden_layers, c.pred_num_attention_heads, c.pred_num_mask_tokens
            predictor = Predictor(c.hidden_size, c.hidden_size, *sizes)
    return make_checkpoint(encoder, weights, predictor, predictor_weights, HF)


def probe_to_hf(weights):
    """Convert an AttentiveProbe's state dict to the `pooler` and `classifier` of VJEPA2ForVideoClassification.

    Those have as many heads as the encoder, and layer_norm_eps 1e-6. Ours has by default 16 and, like V-JEPA 2, 1e-5.
    """
    return to_theirs(weights, PROBE_NAMES, HF)


def probe_from_hf(weights):
    """Convert VJEPA2ForVideoClassification's state dict to an AttentiveProbe's, ignoring the encoder.

    Load it into AttentiveProbe(..., heads=config.num_attention_heads, eps=config.layer_norm_eps). ValueError listing
    all tensors that are missing, unexpected or of another shape.
    """
    weights = {name: tensor for name, tensor in weights.items() if name.startswith(("pooler.", "classifier."))}
    num_classes, width = shape_of(weights, "classifier.weight", 2)
    with torch.device("meta"):
        probe = AttentiveProbe(width, num_classes, 1 + depth_of(weights, r"pooler\.self_attention_layers"), heads=1)
    return from_theirs(probe, weights, PROBE_NAMES, HF)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def write_checkpoint(checkpoint, out):
    """Write a checkpoint to `out`, a run folder or a file ending in .pt. FileExistsError if it has one already."""
    file = Path(out) if str(out).endswith(".pt") else Path(out) / "checkpoint.pt"
    if file.exists():
        raise FileExistsError(f"{file} exists already; nothing written")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        torch.save(checkpoint, temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {file}")


def write_hf(model, weights, out):
    """Write a Hugging Face folder. FileExistsError if `out` exists and is not an empty folder."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; nothing written")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary, state_dict=weights)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}")


def parse_args():
    parser = Parser(__doc__, prog="python -m tools.convert")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name, source, target, out):
        text = f"Convert {source} to {target}."
        command = commands.add_parser(name, description=text, help=text)
        command.add_argument("source", metavar="SOURCE", help=source)
        command.add_argument("out", metavar="OUT", help=out)
        return command.add_argument

    folder, out = "a Hugging Face VJEPA2Model folder", "run folder, for a checkpoint.pt in it, or file ending in .pt"
    add_command("to-hf", "our checkpoint (a run folder or a file)", folder, "new or empty folder")
    add_command("from-hf", folder, "our checkpoint", out)
    flag = add_command("from-vjepa2", "a file that V-JEPA 2 released", "our checkpoint", out)
    flag("--heads", type=int, help="attention heads of the encoder; default: the released encoder's of this width")
    flag("--predictor-heads", type=int, default=12, help="attention heads of the predictor")
    flag("--num-frames", type=int, default=64, help="frames of the clips it was trained on, for the record")
    flag("--resolution", type=int, default=256, help="height and width of these clips, for the record")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        if args.command == "to-hf":
            write_hf(*to_hf(args.source), args.out)
        elif args.command == "from-hf":
            write_checkpoint(from_hf(args.source), args.out)
        else:
            sizes = args.heads, args.predictor_heads, args.num_frames, args.resolution
            write_checkpoint(from_vjepa2(args.source, *sizes), args.out)
    except (ValueError, OSError, ImportError) as error:
        fail(" ".join(str(error).split()))  # transformers' errors have several lines


if __name__ == "__main__":
    main()
