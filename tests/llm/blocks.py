"""The parts of a block, for every family."""


def parallel(model) -> bool:
    """Whether the MLP reads the stream before the attention is added to it."""
    return getattr(model.config, "use_parallel_residual", model.config.model_type == "falcon")


def mlp_norm(block):
    """The norm that the MLP reads the residual stream through."""
    names = (
        "pre_feedforward_layernorm",  # gemma2, whose post_attention_layernorm is the attention's
        "ln_2",  # gpt2, gpt_neo
        "post_attention_layernorm",  # llama, gpt_neox
        "final_layer_norm",  # opt
        "input_layernorm",  # falcon
    )
    return next(getattr(block, name) for name in names if hasattr(block, name))


def mlp_of(block):
    """What the block makes of `mlp_in`, up to what it adds to the residual stream."""
    if hasattr(block, "fc1"):
        return lambda x: block.fc2(block.activation_fn(block.fc1(x)))
    after = getattr(block, "post_feedforward_layernorm", lambda x: x)
    return lambda x: after(block.mlp(x))
