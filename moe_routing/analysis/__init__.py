"""What the experts of a model do."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "tokens": [
            "Choices", "read_choices", "watch", "token_spans", "token_words", "expert_keywords", "expert_samples",
            "position_heatmap", "draw_positions", "expert_vectors", "expert_map", "draw_map", "routing_change",
            "change_numbers", "draw_change", "gradient_flow", "flow_numbers", "draw_flow", "window_losses",
            "router_parameters", "loss_plane", "swap_last", "boundary_jumps", "jump_numbers", "loss_landscape",
            "draw_landscape",
        ],
        "long_context": [
            "long_text", "window_starts", "short_rows", "Decisions", "read_windows", "route_long", "read_folder",
            "read_in_process", "beside",
        ],
        "domains": [
            "LEAST", "ALIASES", "domain_files", "domain_documents", "Reading", "token_batches", "read_domains",
            "document_counts", "information", "usage_test", "stratified_jackknife", "token_explained",
            "draw_domains", "published_counts", "independent_information", "published_usage", "relabelled_distance",
            "depth_distance", "next_layer_recall", "draw_depth", "orthogonality", "draw_orthogonality",
            "saturation", "coactivation", "vocabulary_specialisation", "plain_numbers", "specialisation_report",
            "report_numbers",
        ],
    },
)
