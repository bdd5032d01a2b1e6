"""Compute accounting: the floating point operations that a training step really does, attention and masks included.

A multiply and an add are two operations. A layer's backward pass costs twice its forward pass, except for the first
linear layer of a network, which needs no gradient of its input. Softmax, norms, GELU and RoPE are left out (< 1%).

Configs are `Encoder.config` and `Predictor.config`; counts are for one clip and the stated numbers of tokens.
"""


def _blocks(tokens, width, depth, mlp_ratio):
    """Forward pass of transformer blocks: four D x D matrices, two of the MLP, and two products with all tokens."""
    hidden = round(width * mlp_ratio)
    return depth * (2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width)


def encoder_flops(config, tokens, train):
    """One clip through the encoder with `tokens` of its tokens; `train` adds the backward pass."""
    embed = 2 * tokens * 3 * config["tubelet_size"] * config["patch_size"] ** 2 * config["width"]
    blocks = _blocks(tokens, config["width"], config["depth"], config["mlp_ratio"])
    return 2 * embed + 3 * blocks if train else embed + blocks


def predictor_flops(config, context, targets, train):
    """One clip through the predictor; `train` adds the backward pass."""
    embed = 2 * context * config["in_width"] * config["width"]
    proj = 2 * targets * config["width"] * config["out_width"]
    blocks = _blocks(context + targets, config["width"], config["depth"], 4.0)
    return (3 if train else 1) * (embed + blocks + proj)


def step_flops(encoder, predictor, masks, teacher=None, tokens=0):
    """One clip of a training step. masks: [(context, targets), ...] counts; teacher: config, sees all `tokens`."""
    total = encoder_flops(teacher, tokens, train=False) if teacher else 0
    for context, targets in masks:
        total += encoder_flops(encoder, context, train=True) + predictor_flops(predictor, context, targets, train=True)
    return total
