"""Loading, upcycling and quantising models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "quantised": [
            "QUANTISATIONS", "pack_weight", "unpack_weight", "QuantisedExperts", "quantise_experts", "Experts4Bit",
            "Experts8Bit", "quantisation_config", "stored_tensors", "weight_groups", "check_quantised", "prepared",
            "memory_plan",
        ],
        "adapters": [
            "VARIANTS", "Adapted", "adapt", "adapter_parameters", "adapter_losses", "adapter_gain",
        ],
        "load": [
            "make_tokenizer", "TinyRecipe", "tiny_config", "training_batches", "learning_rate_share", "train_tiny",
            "ship_tiny", "tiny_folder", "tiny_model", "model_size", "load_model", "fingerprint",
        ],
        "size": ["specification", "router_type"],
        "upcycling": [
            "COMBINE", "tiny_dense", "UpcycledExperts", "UpcycledGate", "UpcycledMLP", "upcycle", "text_model",
            "check_tokenizer", "attention_backend", "load_dense", "parameter_groups", "save_upcycled",
            "load_upcycled",
        ],
    },
)
