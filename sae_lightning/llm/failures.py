"""One clear line for each way in which a model can fail to load."""

import re

from sae_lightning.errors import UserError

NO_NETWORK_NEEDED = "llm=smollm2 data=shakespeare need no network"


def explained(config, error: Exception, part: str = "model") -> UserError:
    """One line for whatever transformers or huggingface_hub raised while loading."""
    from huggingface_hub import errors as hub

    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    name = f"llm.name={config.name}"

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(hub.GatedRepoError):
        return UserError(f"{name}: gated; accept its terms on the hub, then run: hf auth login")
    if caused_by(hub.RevisionNotFoundError):
        return UserError(f"llm.revision={config.revision}: {config.name} has no such revision")
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
        return UserError(f"{name}: neither a local folder nor a model on the hub; check the name")
    # Before its parent class, EntryNotFoundError: this one means "not in the cache either".
    if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        return UserError(
            f"{name}: not a local folder, not downloaded before, and the hub cannot be reached; "
            f"{NO_NETWORK_NEEDED}"
        )
    if "trust_remote_code" in str(error):
        return UserError(
            f"{name}: the model brings its own Python code; read it, then allow it with "
            "llm.trust_remote_code=true"
        )
    if isinstance(error, ImportError) or "attention" in str(error).lower():
        return UserError(
            f"llm.attn={config.attn.value}: not possible for {config.name} here "
            f"({first_sentence(error)}); use llm.attn=auto"
        )
    return UserError(
        f"{name}: the {part} cannot be loaded ({first_sentence(error)}); "
        "give a causal language model that transformers can read"
    )


def first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[a-z`'])\. ", text)[0][:200].rstrip(".")
