"""The decisions of a model, recorded once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "format": [
            "SCORINGS", "id_dtype", "pack", "unpack", "LinearGate", "Trace", "Batches", "own_gate",
        ],
        "recorder": [
            "estimate_trace_bytes", "decoder_layers", "Recorder", "batch_losses", "record", "check_aux_loss",
        ],
        "calibration": [
            "calibration_trace", "calibrated_null", "resolve_source", "mean_count", "matched_rule",
        ],
        "collect": [
            "SEED_DATASETS", "dataset_names", "significant", "config_name", "estimate_log_bytes", "write_logs",
        ],
    },
)
