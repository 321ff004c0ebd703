"""The command line: `python -m moe_routing run STUDY [parameter=value ...]`, and what the Snakefile calls."""

import argparse
import os
import sys


WEEK_FLAGS = ("continue_on_error", "skip_baselines", "skip_ablation", "skip_wandb")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_routing", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run a study with Snakemake and build its report")
    run.add_argument("study", help="a file of papermill_runs/studies, without .yaml")
    run.add_argument(
        "overrides",
        nargs="*",
        metavar="parameter=value",
        help="replaces a parameter in every run, e.g. model=allenai/OLMoE-1B-7B-0924",
    )
    run.add_argument("--cores", type=int, help="processes at once (default: all cores)")
    run.add_argument("--fresh", action="store_true", help="do runs again that were made by other code")
    week = verbs.add_parser("week", help="the seven-day plan; the flags are those of seed 000")
    week.add_argument(
        "--config",
        help="the plan: a study, or a YAML file of one (default: seven_day, or seven_day_gpu where a checkpoint is given)",
    )
    week.add_argument("--checkpoint", help="the model: a hub id, a folder, or tiny")
    week.add_argument("--output_dir", help="folder for the results instead of papermill_runs")
    week.add_argument("--only", metavar="DAY", help="this day alone, for example day3_4")
    week.add_argument("--start_from", metavar="DAY", help="this day and all after it")
    week.add_argument("--dry_run", action="store_true", help="say what would be done")
    week.add_argument("--graph", metavar="FILE", help="draw what follows what, as .png or .svg, and run nothing")
    week.add_argument("--anyway", action="store_true", help="go on after a NO-GO of the first day")
    week.add_argument("--cores", type=int)
    for flag in WEEK_FLAGS:
        week.add_argument(f"--{flag}", action="store_true")
    week.add_argument("overrides", nargs="*", metavar="parameter=value")
    one = verbs.add_parser("execute", help="do one run of a study (called by the Snakefile)")
    one.add_argument("study")
    one.add_argument("name", help="folder name of the run, or 'prepare'")
    one.add_argument("overrides", nargs="*", metavar="parameter=value")
    one.add_argument("--threads", type=int, default=1)
    report = verbs.add_parser(
        "report", help="build the report of a study from its finished runs; of every study without a name"
    )
    report.add_argument("study", nargs="?")
    report.add_argument("overrides", nargs="*", metavar="parameter=value")
    bench = verbs.add_parser("bench", help="measure the speed and quality claims, a ratio in one process each")
    bench.add_argument("names", nargs="*", help="templates nbs/runs/bench_<name>.ipynb (default: all)")
    numbers = verbs.add_parser("numbers", help="is every published number what a committed run recorded?")
    numbers.add_argument("--quick", action="store_true", help="do not make the files again")
    verbs.add_parser("readme", help="write README.md from nbs/index.ipynb")
    confirm = verbs.add_parser(
        "confirm",
        help="repeat a sample of a study's stale runs by today's code; where every bit agrees, the study counts again",
    )
    confirm.add_argument("study")
    confirm.add_argument(
        "--share",
        type=float,
        default=0.1,
        help="of the stale runs to repeat; one of each group and router at least (default .1)",
    )
    confirm.add_argument("--cores", type=int, default=1)
    verbs.add_parser("claims", help="judge every claim of the seeds by the finished runs: papermill_runs/claims")
    verbs.add_parser("book", help="build the book as pages in _book")
    paper = verbs.add_parser("paper", help="write report, LaTeX paper and slides: papermill_runs/report")
    paper.add_argument(
        "--style",
        default="article",
        help="article, icml2026 or neurips_2026; a style file is taken where it lies in papermill_runs/report",
    )
    paper.add_argument("--stale", action="store_true", help="also use runs that were made by other code (for a draft)")
    verbs.add_parser("status", help="runs finished, failed, stale and running, by study")
    args, more = parser.parse_known_args()
    if hasattr(args, "overrides"):  # argparse gives up on key=value behind an option
        args.overrides += [m for m in more if "=" in m and not m.startswith("-")]
        more = [m for m in more if m not in args.overrides]
    if more and args.verb != "run":
        parser.error(f"unknown arguments: {' '.join(more)}")

    from moe_routing.runs import study as runs

    try:
        if args.verb == "run":
            return runs.run_study(args.study, runs.parse_overrides(args.overrides), args.cores, args.fresh, more)
        if args.verb == "week":
            if args.output_dir:
                os.environ["MOE_ROUTING_RESULTS_DIR"] = os.path.abspath(args.output_dir)
            config = args.config or ("seven_day" if args.checkpoint in (None, "tiny") else "seven_day_gpu")
            said = {
                "model": args.checkpoint,
                "only": args.only,
                "start_from": args.start_from,
                **{flag: getattr(args, flag) or None for flag in (*WEEK_FLAGS, "anyway")},
            }
            wanted = {**runs.parse_overrides(args.overrides), **{k: v for k, v in said.items() if v is not None}}
            if args.graph:
                print("graph:", runs.draw_plan(runs.plan_study(config, wanted), args.graph))
                return 0
            return runs.run_study(
                config, wanted, args.cores, more=["--dry-run", "--quiet", "rules"] if args.dry_run else []
            )
        if args.verb == "confirm":
            found = runs.confirm_study(args.study, args.share, args.cores)
            different = {n: where for f in found.values() for n, where in f["different"].items()}
            print(
                f"{args.study}: {sum(len(f['repeated']) for f in found.values())} runs repeated, {len(different)} differ"
                + (": FRESH=1 does the study again" if different else "")
            )
            return int(bool(different))
        if args.verb == "status":
            runs.print_status()
        elif args.verb == "readme":
            from moe_routing._readme import write_readme

            print(write_readme(runs.find_root()))
        elif args.verb == "claims":
            from moe_routing.studies.claims import publish_claims

            print("claims:", publish_claims())
        elif args.verb == "book":
            from moe_routing.book import build_book

            print("book:", build_book())
        elif args.verb == "paper":
            from moe_routing.paper import fetch_reveal, write_paper

            print("report:", made := write_paper(stale=args.stale, style=args.style))
            if not fetch_reveal(made.parent):
                print("slides.html shows its slides one below the other: reveal.js could not be fetched with npm")
        elif args.verb == "bench":
            from moe_routing.studies.benchmarks import run_benchmarks

            print(run_benchmarks(args.names))
        elif args.verb == "numbers":
            from moe_routing.published import check

            found = check(again=not args.quick)
            print("\n".join(found) or "every published number is what its run recorded")
            return int(bool(found))
        elif args.verb == "report" and not args.study:
            from moe_routing.published import build_all

            return int(bool(build_all()))
        elif args.verb == "execute":
            runs.execute(
                runs.plan_study(args.study, runs.parse_overrides(args.overrides)), args.name, threads=args.threads
            )
        else:
            from moe_routing.studies.bh import build_report

            print("report:", build_report(runs.plan_study(args.study, runs.parse_overrides(args.overrides))))
    except (ValueError, RuntimeError, OSError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
