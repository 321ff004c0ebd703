"""One run, and a study of many."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": [
            "template_path", "template_parameters", "resolve_parameters", "visible_gpus", "result_settings",
            "run_id", "code_hash", "code_at", "write_atomic", "Run", "run_template",
        ],
        "study": [
            "STEERING", "Plan", "plan_study", "run_state", "load_runs", "recover", "execute", "confirm_study",
            "draw_plan", "parse_overrides", "study_status", "failures", "run_study", "print_status",
        ],
    },
)
