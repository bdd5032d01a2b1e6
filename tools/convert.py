"""Convert checkpoints from and to Hugging Face's VJEPA2Model, and from V-JEPA 2's released files.

    python -m tools.convert to-hf out/student hf_folder       # for VJEPA2Model and AutoVideoProcessor
    python -m tools.convert from-hf hf_folder out/vjepa2      # writes out/vjepa2/checkpoint.pt
    python -m tools.convert from-vjepa2 vitl.pt out/vjepa2    # vitl.pt is from dl.fbaipublicfiles.com/vjepa2

The networks compute exactly the same; only names and shapes of tensors differ. V-JEPA 2's files hold two encoders.
Their target_encoder, which V-JEPA 2 evaluates, becomes the checkpoint's encoder. Their encoder becomes its student,
which probe.py evaluates with --weights student. physics.py uses the student for contexts and the encoder for targets.

V-JEPA 2.1 has another architecture and is refused. Do not convert files of V-JEPA 1: it adds position embeddings
instead of rotating, but nothing in the names of its tensors shows that.

Letters in shape comments: D width, P values in a tubelet, (t, h, w) frames and pixels of a tubelet, n mask tokens.
"""

import pickle
import re
import tempfile
from pathlib import Path

import torch

from cli import Parser, fail
from model import CHECKPOINT_FORMAT, SIZES, Encoder, Predictor, build, check_state_dict, load_checkpoint

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

# The weights do not show the number of heads. By width; V-JEPA 2's ViT-g has 22, and 16 in the paper's table 3.
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


def to_theirs(weights, config, table, column):
    """Convert our state dict to their names and shapes. config: of our network."""
    theirs = {}
    for name, tensor in weights.items():
        names = their_names(name, table, column, len(tensor))
        if name == "patch_embed.weight":  # (D, P) -> (D, 3, t, h, w), as in Conv3d
            tensor = tensor.unflatten(1, (3, config["tubelet_size"], config["patch_size"], config["patch_size"]))
        elif name == "mask_tokens":  # (n, D) -> (n, 1, 1, D), or n tensors (1, 1, D)
            tensor = tensor[:, None, None] if column == HF else tensor[:, None]
        theirs |= zip(names, (part.clone() for part in tensor.chunk(len(names))), strict=True)
    return theirs


def make_checkpoint(networks, column):
    """Make our checkpoint. networks: {"encoder", "student", "predictor": (our network without weights, their weights)}.

    ValueError names, as they do, the tensors that do not fit.
    """
    checkpoint = {"format": CHECKPOINT_FORMAT, "kind": "vjepa2", "step": 0, "args": {}, "model": {}}
    for part, (module, weights) in networks.items():
        table, ours = PREDICTOR_NAMES if part == "predictor" else ENCODER_NAMES, module.state_dict()
        check_state_dict(to_theirs(ours, module.config, table, column), weights, part)
        print(f"{part}: {len(weights)} tensors")
        checkpoint[part] = {}
        for name, tensor in ours.items():
            tensors = [weights[theirs] for theirs in their_names(name, table, column, len(tensor))]
            checkpoint[part][name] = torch.cat(tensors).float().reshape(tensor.shape)
        if part != "student":  # it has the encoder's configuration
            checkpoint["model"][part] = module.config
    if "predictor" not in networks:
        print("predictor: none; the checkpoint holds the encoder alone")
    return checkpoint


def strip_wrappers(weights):
    """The state dict without what FSDP or DDP, V-JEPA 2's multi-sequence wrapper and torch.compile add to names."""
    return {re.sub(r"\b(module|backbone|_orig_mod)\.", "", name): tensor for name, tensor in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# V-JEPA 2's files


def read_vjepa2(path):
    """Read a V-JEPA 2 file: state dicts target_encoder, encoder and predictor. A file may itself be an encoder's."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: damaged, not made by torch.save, or unsafe") from error
    if _is_state_dict(file):
        file = {"encoder": file}
    parts = ("target_encoder", "encoder", "predictor") if isinstance(file, dict) else ()
    held = {key: file[key] for key in parts if key in file}
    if not held.keys() - {"predictor"} or not all(map(_is_state_dict, held.values())):
        raise ValueError(f"{path} has no state dict 'target_encoder' or 'encoder'; V-JEPA 2's files have both")
    held = {key: strip_wrappers(weights) for key, weights in held.items()}
    for weights in held.values():
        for name in {"pos_embed", "predictor_pos_embed"} & weights.keys():  # V-JEPA 2's loader ignores them too
            print(f"ignoring {name} (V-JEPA 2 does not use it; V-JEPA 1 does, and cannot be converted)")
            del weights[name]
    return held


def _is_state_dict(value):
    return isinstance(value, dict) and value and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def shape_of(weights, name, ndim):
    if name not in weights or weights[name].ndim != ndim:
        raise ValueError(f"these are not the weights of this network: {name} is missing or not of {ndim} dimensions")
    return weights[name].shape


def depth_of(weights):
    """The number of blocks."""
    return 1 + max(int(number) for number in re.findall(r"blocks\.(\d+)\.", " ".join(weights)) or [-1])


def infer_encoder(weights, heads, resolution):
    """Infer the Encoder, without weights, from the shapes of V-JEPA 2's tensors."""
    width, _, tubelet_size, patch_size, _ = shape_of(weights, "patch_embed.proj.weight", 5)
    hidden, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    heads = RELEASED_HEADS.get(width) if heads is None else heads
    if heads is None:
        raise ValueError(f"no released encoder has width {width}: give its number of attention heads with --heads")
    with torch.device("meta"):
        return Encoder(width, depth_of(weights), heads, hidden / width, 64, resolution, patch_size, tubelet_size)


def from_vjepa2(args):
    """Convert a V-JEPA 2 file to our checkpoint, a dictionary. A file with a single encoder gives no student."""
    file = read_vjepa2(args.source)
    first = "target_encoder" if "target_encoder" in file else "encoder"
    encoder = infer_encoder(file[first], args.heads, args.resolution)
    networks = {"encoder": (encoder, file[first])}
    if {"target_encoder", "encoder"} <= file.keys():
        print("target_encoder becomes the checkpoint's encoder, encoder its student")
        networks["student"] = encoder, file["encoder"]
    else:
        print(f"the file has only {first}: it becomes the checkpoint's encoder, for contexts and targets")
    if weights := file.get("predictor"):
        width, in_width = shape_of(weights, "predictor_embed.weight", 2)
        out_width, _ = shape_of(weights, "predictor_proj.weight", 2)
        num_mask_tokens = sum("mask_tokens." in name for name in weights)
        with torch.device("meta"):  # all released predictors have 12 heads
            predictor = Predictor(in_width, out_width, width, depth_of(weights), 12, num_mask_tokens)
        networks["predictor"] = predictor, weights
    return make_checkpoint(networks, VJEPA2)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders


def hf_ratio(hidden, width):
    """An mlp_ratio for which Hugging Face's int(width * ratio) is `hidden`, in spite of rounding errors."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def to_hf(checkpoint):
    """Convert our checkpoint: (VJEPA2Model without weights, the tensors that we have for it).

    Its predictor predicts as many values as its encoder is wide. If ours predicts others, it is left out.
    """
    import transformers

    e, p = checkpoint["model"]["encoder"], checkpoint["model"].get("predictor")
    config = transformers.VJEPA2Config(
        patch_size=e["patch_size"], tubelet_size=e["tubelet_size"], crop_size=e["resolution"],
        frames_per_clip=e["num_frames"], hidden_size=e["width"], num_hidden_layers=e["depth"],
        num_attention_heads=e["heads"], mlp_ratio=hf_ratio(round(e["width"] * e["mlp_ratio"]), e["width"]),
        layer_norm_eps=1e-6,
    )  # fmt: skip
    weights = to_theirs(build(Encoder, e, checkpoint["encoder"]).state_dict(), e, ENCODER_NAMES, HF)
    if "student" in checkpoint:
        print("student: left out (Hugging Face's model has a single encoder)")
    if not p or not p["in_width"] == p["out_width"] == e["width"]:
        why = f"it predicts {p['out_width']} values, but Hugging Face's can only predict {e['width']}" if p else "none"
        print(f"predictor: left out ({why}); Hugging Face will report that it initializes one at random")
    else:
        config.pred_hidden_size, config.pred_num_hidden_layers = p["width"], p["depth"]
        config.pred_num_attention_heads, config.pred_num_mask_tokens = p["heads"], p["num_mask_tokens"]
        predictor = build(Predictor, p, checkpoint["predictor"]).state_dict()
        weights |= to_theirs(predictor, p, PREDICTOR_NAMES, HF)
    with torch.device("meta"):
        return transformers.VJEPA2Model(config), weights


def save_hf(model, weights, folder):
    import transformers

    model.save_pretrained(folder, state_dict=weights)
    # Scales the short side to 256/224 of the crop, as V-JEPA 2 does, and normalizes like `data.normalize`.
    transformers.VJEPA2VideoProcessor(crop_size=model.config.crop_size).save_pretrained(folder)


def from_hf(args):
    """Convert a Hugging Face folder to our checkpoint. Of a VJEPA2ForVideoClassification, take the VJEPA2Model."""
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(args.source)
    files = sorted(folder.glob("[!.]*.safetensors"))  # macOS leaves files ._NAME
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{folder} is no Hugging Face folder: config.json or model.safetensors is missing")
    c = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if c.model_type != "vjepa2" or c.layer_norm_eps != 1e-6 or c.hidden_act != "gelu":
        raise ValueError(f"{folder} holds a {c.model_type} model: only vjepa2 with layer_norm_eps 1e-6 and gelu fits")
    try:
        weights = strip_wrappers({name: tensor for file in files for name, tensor in load_file(file).items()})
    except SafetensorError as error:
        raise ValueError(f"the tensors in {folder} cannot be read: {error}") from error
    if left_out := [name for name in weights if name.startswith(("pooler.", "classifier."))]:
        print(f"pooler and classifier: left out ({len(left_out)} tensors); probe.py trains its own")
    weights = {name.removeprefix("vjepa2."): weights[name] for name in weights.keys() - set(left_out)}
    predictor_weights = {name: weights.pop(name) for name in list(weights) if name.startswith("predictor.")}
    mlp_ratio = int(c.hidden_size * c.mlp_ratio) / c.hidden_size
    sizes = c.hidden_size, c.num_hidden_layers, c.num_attention_heads, mlp_ratio
    clip = c.frames_per_clip, c.crop_size, c.patch_size, c.tubelet_size
    with torch.device("meta"):
        networks = {"encoder": (Encoder(*sizes, *clip), weights)}
        if predictor_weights:
            sizes = c.pred_hidden_size, c.pred_num_hidden_layers, c.pred_num_attention_heads, c.pred_num_mask_tokens
            networks["predictor"] = Predictor(c.hidden_size, c.hidden_size, *sizes), predictor_weights
    return make_checkpoint(networks, HF)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


def write_new(out, write):
    """Call write(temporary path), then rename that file or folder to `out`, so that `out` is never incomplete."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; nothing written")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        write(Path(folder) / out.name)
        (Path(folder) / out.name).rename(out)
    print(f"wrote {out}")


def main():
    parser = Parser(__doc__, prog="python -m tools.convert")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    hf, ours = "a Hugging Face VJEPA2Model folder", "our checkpoint (a run folder or a .pt file)"
    for name, convert, source, out in (
        ("to-hf", lambda args: to_hf(load_checkpoint(args.source)), ours, hf),
        ("from-hf", from_hf, hf, ours),
        ("from-vjepa2", from_vjepa2, "a file that V-JEPA 2 released", ours),
    ):
        text = f"convert {source} to {out}"
        command = commands.add_parser(name, description=text, help=text)
        command.set_defaults(convert=convert)
        command.add_argument("source", metavar="SOURCE", help=source)
        command.add_argument("out", type=Path, metavar="OUT", help=f"{out}; nothing is overwritten")
    flag = command.add_argument  # of from-vjepa2
    flag("--heads", type=int, help="attention heads of the encoder; default: the released encoder's of this width")
    flag("--resolution", type=int, default=256, help="height and width of its training clips; 384 for vitg-384")
    args = parser.parse_args()
    try:
        converted = args.convert(args)
        if args.command == "to-hf":
            write_new(args.out, lambda folder: save_hf(*converted, folder))
        else:
            file = args.out if args.out.suffix == ".pt" else args.out / "checkpoint.pt"
            write_new(file, lambda path: torch.save(converted, path))
    except ImportError:
        fail("conversion from and to Hugging Face needs transformers: pip install transformers")
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))  # transformers' errors have several lines


if __name__ == "__main__":
    main()
