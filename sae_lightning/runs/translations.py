"""Names of settings in other tools, and what to write here instead."""

from hydra.core.config_store import ConfigStore

# Names in other tools, separated by spaces -> what to write here.
SETTINGS_ELSEWHERE = {
    "max_steps num_steps n_steps train_steps training_steps total_steps total_training_steps": (
        "trainer.tokens=..., which is updates times trainer.batch"
    ),
    "epochs max_epochs num_epochs n_epochs num_train_epochs": (
        "trainer.tokens=...; text that ends is read again"
    ),
    "training_tokens train_tokens total_training_tokens max_tokens num_tokens n_tokens": (
        "trainer.tokens=..."
    ),
    "fast_dev_run overfit_batches limit_train_batches": (
        "trainer=smoke, which does everything once in about a minute"
    ),
    "ckpt_path resume_from resume_from_checkpoint from_checkpoint": "resume=<run folder>",
    "d_sae dict_size dictionary_size d_dict num_latents n_latents num_features n_features": (
        "model.features=..."
    ),
    "expansion expansion_factor exp_factor": (
        "model.features=..., which is the factor times the LLM's width"
    ),
    "seq_len seq_length max_seq_len max_length context_size context_length ctx_len n_ctx": (
        "data.context=..."
    ),
    "load_in_8bit load_in_4bit": "llm.load.quantization_config={load_in_8bit:true}",
    "device_map": "llm.load.device_map=...",
    "quantization_config": "llm.load.quantization_config=...",
    "devices num_devices gpus num_gpus n_gpus strategy world_size nproc": "trainer.devices=...",
    "num_nodes nnodes": "trainer.nodes=... (docs/clusters.md)",
    "lr learning_rate": "optim.lr=...",
    "batch_size train_batch_size train_batch_size_tokens per_device_train_batch_size": (
        "trainer.batch=... (tokens of an update) or llm.batch=... (sequences for the LLM)"
    ),
    "l1 l1_coefficient l1_coeff l1_alpha l1_penalty l1_lambda sparsity_coefficient": "loss.l1=...",
    "k top_k": "model=topk model.k=...",
    "hook_layer layer_idx layer_index layers": "layer.index=...",
    "hook_name hook_point hookpoint hookpoints": (
        "layer=resid (or attn, or mlp) with layer.index=..."
    ),
    "model_name model_name_or_path pretrained_model_name_or_path": "llm=hf with llm.name=...",
    "log_to_wandb use_wandb wandb_log wandb_project wandb_entity wandb report_to": (
        "logger=wandb, with logger.wandb.project=... and logger.wandb.entity=..."
    ),
    "dataset dataset_name dataset_path": (
        "data=hub with data.name=..., or data=text with data.path=..."
    ),
}
TRANSLATIONS = {
    name: advice for names, advice in SETTINGS_ELSEWHERE.items() for name in names.split()
}


def advise_on_setting(argument: str) -> str | None:
    """One line that names our setting if `argument` has another tool's name for it, else None.
    Always None in analyze.py, which has few of these settings."""
    if "task" in ConfigStore.instance().repo:
        return None
    name = argument.lstrip("-+~").partition("=")[0]
    advice = TRANSLATIONS.get(name.rpartition(".")[2].replace("-", "_").lower())
    return advice and f"{argument}: no such setting here; use {advice}"
