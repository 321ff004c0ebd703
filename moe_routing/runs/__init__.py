"""One run, and a study of many."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": [
            "TIMED", "run_template", "new_record", "template_path", "template_parameters", "template_protocol",
            "typed", "resolve_parameters", "run_id", "expected_model", "made_on", "visible_gpus", "package_folder",
            "git_state", "Run", "machine_facts", "finite", "write_atomic", "read_json", "process_identity",
            "living", "end_process", "locked", "smoke", "differences",
        ],
        "study": [
            "STEERING", "LOGS", "Plan", "plan_study", "parse_overrides", "run_state", "is_stale", "study_status",
            "failures", "load_runs", "read_records", "read_lines", "load_logs", "publish", "compare_with_published",
            "reproduce", "recover", "execute", "run_study", "print_status", "draw_plan", "golden_cases",
            "golden_result", "write_golden",
        ],
    },
)
