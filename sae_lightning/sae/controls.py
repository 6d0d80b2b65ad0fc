"""Controls: SAEs in which something essential is not learned. What a control scores as well as a
trained SAE does not speak for the trained one."""

from enum import Enum


class Control(Enum):
    """What a control does not learn; everything else is trained like the SAE that it belongs to."""

    frozen_decoder = "decoder directions stay random"
    soft_frozen_decoder = "decoder directions stay near random ones"
    frozen_encoder = "encoder directions stay random"
    shuffled_activations = "trained on activations with independent dimensions"
    pca = "directions are principal components"
