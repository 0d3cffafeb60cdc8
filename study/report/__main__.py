"""Records -> the study's tables and plots.

    python -m study.report experiments/                             # every table
    python -m study.report experiments/ --published --output_dir results/
    python -m study.report experiments/ --trace "table 1, 10 %"     # the records and commands behind cells
    python -m study.report --compare RUN... --against RUN...        # two settings, by the runs of their seeds

A score is the mean over the seeds of a setting, with its 95 % interval in [brackets] and how many seeds in
(brackets). The interval allows for other seeds and other test examples; with one seed, (1), for other test
examples only; of two seeds, (2), both scores stand there. docs/statistics.md has the formulas.
"""

import argparse
import csv
import gc
import io
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from study.cli import Parser, run_script, underscored
from study.errors import UserError
from study.files import write_text
from study.records import cost, record, runs
from study.records.schema import part_of
from study.report.cells import Table
from study.report.classes import MOST
from study.report.collect import Run, comparable, find_runs, meant, say_left_out
from study.report.spent import spent_in_all
from study.report.sweeps import Sweep, find_sweeps
from study.report.tables import all_tables


def trace(tables: Sequence[Table], query: str) -> str:
    """The records, commands and commits behind each cell whose table, row and column have what was asked for:
    words between commas as they stand side by side."""
    lines, wanted = [], [words(part) for part in query.split(",")]
    for cell in [cell for table in tables for cell in table.cells()]:
        place = " | ".join([cell["table"], cell["title"], *cell["row"], cell["column"]])
        there = words(place)
        if cell["records"] and all(stand_in(part, there) for part in wanted):
            lines.append(f"{place} = {cell['text']}")
            for path in cell["records"]:
                content = record.read_whole(Path(path))
                commit = content.get("environment", {}).get("git_commit")
                lines.append(f"  {path}: {content['status']} {content.get('finished', '')}, commit {commit}")
                lines.append(f"    {runs.command(content)}")
    if not lines:
        raise UserError(
            f"--trace {query}: no cell with records has these words side by side; put commas between others"
        )
    return "\n".join(lines)


def stand_in(part: list[str], of: list[str]) -> bool:
    return any(of[i : i + len(part)] == part for i in range(len(of) - len(part) + 1))


def words(text: str) -> list[str]:
    return re.findall(r"[^\s,:|]+", text.lower())


def write(
    tables: Sequence[Table],
    groups: Sequence[tuple],
    sweeps: Sequence[Sweep],
    prices: Sequence[dict],
    args: argparse.Namespace,
    how: str,
) -> None:
    """report.md, which says `how` it was made, and beside it each table as CSV and each plot as PNG."""
    from study.report import plots, serving_plots

    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} can't be used: {error.strerror}") from None
    for number, table in enumerate(tables, 1):
        task, colon, _ = table.title.partition(":")
        place = f"{table.name} {task * bool(colon)} {'apart' * (', apart: ' in table.title)}"
        name = "-".join(re.findall(r"\w+", place.lower()))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table.csv_rows())
        write_text(args.output_dir / f"{number:02d}-{name}.csv", text.getvalue())
    drawn = plots.draw(plots.figures(groups, prices, args.published), args.output_dir)
    drawn += plots.draw(serving_plots.figures(sweeps, prices), args.output_dir)
    intervals = __doc__.rpartition("\n\n")[2]
    about = f"# Results\n\nMade by `python -m study.report {how}`.\n\n{intervals}"
    pictures = [f"## {title}\n\n![{title}]({name}.png)\n" for name, title in drawn]
    write_text(
        args.output_dir / "report.md", "\n".join([about, *(table.markdown() for table in tables), *pictures])
    )


def several_prices(found: Sequence[Run], sweeps: Sequence[Sweep], prices: list[dict]) -> list[str]:
    """The cards in the records of which a price list says different prices, in words."""
    contents = [content for run in found for content in (run.content, run.train) if content]
    contents += [sweep.content for sweep in sweeps]
    names = {content["cost"]["gpu"] for content in contents if content.get("cost")}
    return [line for name in sorted(names) if (line := cost.ambiguity(name, prices))]


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="runs, or what holds them (experiments)")
    add("--output_dir", type=Path, metavar="DIR", help="write report.md, and each table and plot as a file")
    add("--published", action="store_true", help="the published study's figures beside ours")
    add(
        "--prices",
        type=Path,
        metavar="FILE",
        help="a price list like study/records/prices.json, before the records' prices",
    )
    add("--json", action="store_true", help="print every cell as JSON, for programs")
    add(
        "--trace",
        metavar="WORDS",
        help="print the records behind cells whose table, row and column have the words; commas part them",
    )
    add(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a paired test of two runs, or with --against of two settings: folders or eval.json files",
    )
    add(
        "--against", nargs="+", type=Path, metavar="RUN", help="the runs that --compare is to be held against"
    )
    add(
        "--reference", metavar="NAME", help="the row or column that tables show differences to (the cheapest)"
    )
    add(
        "--spread", action="store_true", help="also where the intervals come from, and what would narrow them"
    )
    add("--classes", action="store_true", help="every class and confusion, not the worst of each model only")
    add(
        "--best",
        action="store_true",
        help="print the folders of the LoRA cell that is best on the validation split, and nothing else; "
        "FOLDER may be a record of an evaluation, where others stand beside it",
    )
    add(
        "--rescore",
        action="store_true",
        help="make the scores of older records in FOLDER... anew from their predictions, and nothing else",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args([underscored(word) for word in sys.argv[1:]])
    if args.compare or args.against:
        from study.report.compare import compare

        sides = args.compare or [], args.against or []
        if not args.against and len(sides[0]) == 2:
            sides = sides[0][:1], sides[0][1:]
        if not all(sides):
            raise UserError("--compare: it takes two runs, or some runs and the others by --against")
        return print(compare(*sides))
    if args.rescore:
        from study.report.rescore import rescore

        lines, problems = rescore(args.folders or [Path("experiments")])
        print(*lines, sep="\n", end="\n" * bool(lines))
        return end(problems)
    prices = cost.read_prices(args.prices) if args.prices else []
    folders = args.folders or ([] if args.published else [Path("experiments")])
    records = {path for path in folders if args.best and part_of(path)}
    gc.disable()  # records are millions of objects in no circle, and to look through them takes its time
    found, problems = find_runs(path.parent if path in records else path for path in folders)
    sweeps, more = find_sweeps(() if args.best else folders)
    problems += more
    gc.freeze()
    gc.enable()
    for several in several_prices(found, sweeps, prices):
        print(f"--prices {args.prices}: {several}, so its price is unknown: leave one entry", file=sys.stderr)
    groups = comparable(found)
    if args.best:
        named = [run for run in found if run.path in records or not records]
        print(*folders_of_the_best(comparable(named)), sep="\n")
        return end(problems)
    spent, most = spent_in_all(folders, prices, found), None if args.classes else MOST
    spent = f"{spent} {say_left_out(found, groups)}".strip()
    tables = all_tables(groups, prices, args.reference, args.spread, spent, most, sweeps)
    columns = [column for table in tables for column in table.columns]
    if args.reference and not any(args.reference in column.partition(" - ")[2] for column in columns):
        raise UserError(f"--reference {args.reference}: no table has such a row or column with a score")
    if args.published:
        from study.report.published import with_published

        tables = with_published(tables)
    if args.trace:
        print(trace(tables, args.trace))
    elif args.json:
        print(json.dumps([cell for table in tables for cell in table.cells()], indent=1))
    else:
        print("\n".join(table.markdown() for table in tables))
    if args.output_dir:
        write(tables, groups, sweeps, prices, args, shlex.join(sys.argv[1:]))
    end(problems)


def folders_of_the_best(groups: Sequence[tuple]) -> list[Path]:
    """Raises UserError unless exactly one task has cells that were scored on a validation split."""
    from study.report.choice import best_runs

    groups = [(task, [run for run in group if run.scored]) for task, _, group in meant(groups)]
    of = [(task, runs) for task, runs in groups if runs and runs[0].config["split"] == "validation"]
    best = [best_runs(task, runs) for task, runs in of]
    if len(best) != 1 or not best[0]:
        raise UserError(
            f"--best: {len(of)} groups of runs are scored on a validation split: name those of one"
        )
    return sorted(run.path.parent for run in best[0])


def end(problems: Sequence[str]) -> None:
    """Say what went wrong, and exit 1 if anything did."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    run_script(lambda _: main())
