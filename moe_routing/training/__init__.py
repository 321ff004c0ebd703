"""Training loops, their monitor and their logs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": [
            "char_tokenizer", "get_tokenizer", "TrainingText", "training_text", "Recipe", "build_router",
            "build_routers", "nominal_k", "expert_width", "build_model", "mount", "unmount", "active_flops",
            "active_share", "Meter", "evaluate", "save_trained", "load_trained", "Trained", "prepare", "train",
            "batch_demand", "main",
        ],
        "monitor": [
            "undisturbed", "borrowed", "open_patch", "observed", "decisions", "expert_vectors", "measure",
            "RoutingMonitor", "load_log", "logged_metrics", "trend_figures", "trend_grid",
        ],
        "sft": [
            "CHATS", "PLAIN_TEMPLATE", "load_chat", "chat_renderer", "encode_chat", "encode_chats", "collate",
            "as_routers", "make_routers", "mounted", "Watch", "chat_loss", "SFTRecipe", "trainer_options",
            "SFTResult",
        ],
        "logs": [
            "PATTERNS", "RUN_LOGS", "LIMITS", "quantity_of", "curve_table", "Curves", "read_curves", "auxiliary",
            "bias_start", "draw_curves",
        ],
    },
)
