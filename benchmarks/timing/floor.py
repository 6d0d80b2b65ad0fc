"""The floor of the time per token: what is dense by nature. Units: tokens per second."""


def floor(llm: float, encode: float, saes: int = 1) -> float:
    """The speed at which each token goes through the LLM and then through the encode of each SAE,
    one after the other: 1 / (1/llm + saes/encode)."""
    return 1 / (1 / llm + saes / encode)


def llm_floor(flops: float, parameters: int) -> float:
    """The speed of blocks with so many parameters at the rate `flops` [FLOP/s]: 2 FLOP a
    parameter and token; attention's scores, which have no parameters, are left out."""
    return flops / (2 * parameters)
