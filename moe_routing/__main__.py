"""The command line: `python -m moe_routing run STUDY [parameter=value ...]`, and what the Snakefile calls."""

import argparse
import os
import sys

WEEK_FLAGS = ("continue_on_error", "skip_baselines", "skip_ablation", "skip_wandb")


def parser() -> argparse.ArgumentParser:
    "Every verb with its arguments."
    top = argparse.ArgumentParser(prog="python -m moe_routing", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)

    def verb(name, says, study="study", overrides=True):
        sub = verbs.add_parser(name, help=says)
        if study:
            sub.add_argument("study", nargs=None if study == "study" else "?", help="a file of papermill_runs/studies")
        if overrides:
            sub.add_argument(
                "overrides", nargs="*", metavar="parameter=value", help="replaces a parameter in every run"
            )
        return sub

    run = verb("run", "run a study with Snakemake and build its report")
    run.add_argument("--cores", type=int, help="processes at once (default: all cores)")
    _add_week(verbs.add_parser("week", help="the seven-day plan; the flags are those of seed document 000"))
    one = verbs.add_parser("execute", help="do one run of a study (called by the Snakefile)")
    one.add_argument("study")
    one.add_argument("name", help="folder name of the run, or 'prepare'")
    one.add_argument("overrides", nargs="*", metavar="parameter=value")
    one.add_argument("--threads", type=int, default=1)
    verb("report", "build the report of a study from the results on this machine")
    verb("publish", "make the finished runs of a study its published record, and write its report")
    verb("figures", "write the reports of published studies again, of one or of all", "optional", overrides=False)
    again = verb(
        "reproduce", "repeat a sample of a published study and say how far it is from the record", overrides=False
    )
    again.add_argument("--share", type=float, default=0.1, help="of the runs; one of each group at least (default .1)")
    golden = verbs.add_parser("golden", help="remember the smoke results of all templates, or of some")
    golden.add_argument("cases", nargs="*", help="for example evaluate_router, or 'train_router softk'")
    bench = verbs.add_parser("bench", help="measure the speed and quality claims, a ratio in one process each")
    bench.add_argument("names", nargs="*", help="templates nbs/runs/bench_<name>.ipynb (default: all)")
    verbs.add_parser("claims", help="judge every claim of the seed documents by the published findings")
    paper = verbs.add_parser("paper", help="write report, LaTeX paper and slides from the published findings")
    paper.add_argument("--style", default="article", help="article, icml2026 or neurips_2026")
    verbs.add_parser("readme", help="write README.md from docs/readme.md and the published findings")
    verbs.add_parser("status", help="what is done on this machine and what is published, by study")
    return top


def _add_week(week: argparse.ArgumentParser) -> None:
    "The flags of the seed document's script."
    week.add_argument("--config", help="the plan (default: seven_day, or seven_day_gpu where a checkpoint is given)")
    week.add_argument("--checkpoint", help="the model: a hub id, a folder, or tiny")
    week.add_argument("--output_dir", help="folder for the results")
    week.add_argument("--only", metavar="DAY", help="this day alone, for example day3_4")
    week.add_argument("--start_from", metavar="DAY", help="this day and all after it")
    week.add_argument("--dry_run", action="store_true", help="say what would be done")
    week.add_argument("--graph", metavar="FILE", help="draw what follows what, as .png or .svg, and run nothing")
    week.add_argument("--anyway", action="store_true", help="go on after a NO-GO of the first day")
    week.add_argument("--cores", type=int)
    for flag in WEEK_FLAGS:
        week.add_argument(f"--{flag}", action="store_true")
    week.add_argument("overrides", nargs="*", metavar="parameter=value")


def run_week(args) -> int:
    "The week, in the seed document's flags."
    from moe_routing.runs.study import draw_plan, parse_overrides, plan_study, run_study

    if args.output_dir:
        os.environ["MOE_ROUTING_RESULTS_DIR"] = os.path.abspath(args.output_dir)
    config = args.config or ("seven_day" if args.checkpoint in (None, "tiny") else "seven_day_gpu")
    flags = {flag: getattr(args, flag) or None for flag in (*WEEK_FLAGS, "anyway")}
    said = {"model": args.checkpoint, "only": args.only, "start_from": args.start_from, **flags}
    wanted = {**parse_overrides(args.overrides), **{k: v for k, v in said.items() if v is not None}}
    if args.graph:
        print("graph:", draw_plan(plan_study(config, wanted), args.graph))
        return 0
    return run_study(config, wanted, args.cores, ["--dry-run"] if args.dry_run else [])


def run_verb(args, more: list[str]) -> int:
    "What a verb does; 0 when all went well."
    from moe_routing.runs import study as runs

    if args.verb == "run":
        return runs.run_study(args.study, runs.parse_overrides(args.overrides), args.cores, more)
    if args.verb == "week":
        return run_week(args)
    if args.verb == "status":
        runs.print_status()
    elif args.verb == "execute":
        plan = runs.plan_study(args.study, runs.parse_overrides(args.overrides))
        runs.execute(plan, args.name, threads=args.threads)
    elif args.verb == "reproduce":
        return int(any(runs.reproduce(args.study, args.share).values()))
    elif args.verb == "golden":
        print("golden:", runs.write_golden(args.cases or None))
    elif args.verb == "readme":
        from moe_routing.studies.findings import write_readme

        print("page:", write_readme())
    else:
        return _render(args)
    return 0


def _render(args) -> int:
    "The verbs that write pages."
    from moe_routing.runs.study import parse_overrides, plan_study, publish
    from moe_routing.studies import report

    if args.verb == "report":
        print("report:", report.build_report(plan_study(args.study, parse_overrides(args.overrides))))
    elif args.verb == "publish":
        publish(plan_study(args.study, parse_overrides(args.overrides)))
        print("published:", report.publish_report(args.study))
    elif args.verb == "figures":
        for study in [args.study] if args.study else report.published_studies():
            print("report:", report.publish_report(study), flush=True)
    elif args.verb == "bench":
        from moe_routing.studies.benchmarks import measure_benchmarks

        print("report:", report.build_report(measure_benchmarks(args.names)))
    elif args.verb == "claims":
        from moe_routing.settings import find_root

        print("claims:", report.render("claims", find_root() / "papermill_runs" / "claims"))
    else:
        from moe_routing.studies.paper import write_paper

        print("paper:", write_paper(style=args.style))
    return 0


def main() -> int:
    "Read the command line and do what it says; 1 and one line for an error, 130 for Ctrl-C."
    top = parser()
    args, more = top.parse_known_args()
    if hasattr(args, "overrides"):  # argparse gives up on key=value behind an option
        args.overrides += [m for m in more if "=" in m and not m.startswith("-")]
        more = [m for m in more if m not in args.overrides]
    if more and args.verb != "run":
        top.error(f"unknown arguments: {' '.join(more)}")
    try:
        return run_verb(args, more)
    except (ValueError, RuntimeError, OSError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
