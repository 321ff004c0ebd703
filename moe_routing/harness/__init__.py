"""lm-eval under any router."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "routed": [
            "RoutedLM", "Options", "Asked", "ask", "score_depends_on", "quiet", "routing_info",
        ],
        "tasks": [
            "BENCHMARKS", "SEED_TASKS", "EMBEDDED_TASKS", "EMBEDDED", "Benchmark", "local_folder", "read_splits",
            "with_examples", "Tasks", "unknown_task", "program_passes", "may_run_code", "code_judge", "Loaded",
            "load_tasks",
        ],
        "compare": [
            "score_interval", "score_task", "run_benchmarks", "paired_scores", "compare_benchmarks",
            "write_comparison", "main",
        ],
    },
)
