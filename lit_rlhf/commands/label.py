"""`lit-rlhf label`: people write, rank, rate or compare in a browser; their answers are exported as training data."""

import hashlib
import json
import math
from argparse import Namespace
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError
from lit_rlhf.paths import expand_path

if TYPE_CHECKING:
    from lit_rlhf.labeling.database import Database, Kind
    from lit_rlhf.labeling.server import LabelSettings
    from lit_rlhf.labeling.tasks import TaskFile

KINDS = ("rank", "rate", "demonstrate", "compare")
EXPORTS = ("rankings", "demonstrations", "ratings", "comparisons", "pairs", "label-studio", "datasets")
IMPORTS = ("label-studio", "argilla", "potato", "rows")


def run(command: str, args: list[str]) -> int:
    """Run the server, or one of the actions export and import."""
    if args[:1] == ["export"]:
        return run_export(args[1:])
    if args[:1] == ["import"]:
        return run_import(args[1:])
    parser = Parser(
        prog="lit-rlhf label",
        description="people write, rank, rate or compare in a browser, into a database; see also: "
        "lit-rlhf label export --help, lit-rlhf label import --help",
    )
    add = parser.add_argument
    add("tasks", nargs="?", metavar="TASKS", help="prompts, or prompts with completions: any data file of the project")
    add("--db", default="runs/labels.db", metavar="FILE", help="the database of answers [%(default)s]")
    add("--kind", choices=KINDS, help="what to ask [what the columns suggest]")
    add("--format", default="auto", metavar="NAME", help="format of the rows [%(default)s]")
    add("--model", action="append", metavar="DIR", help="sample the outputs from this model; repeat it for several")
    add("--prompts", metavar="FILE", help="prompts for --model")
    add("--samples", type=int, default=4, metavar="K", help="outputs per prompt and model [%(default)s]")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of an output [%(default)s]")
    add("--temperature", type=float, default=1.0, metavar="T", help="of the sampling [%(default)s]")
    add("--template", metavar="NAME", help="prompt template of the models, as data.template")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling, and of which tasks overlap [%(default)s]")
    add("--labelers", metavar="NAMES", help="ann,bo,…: one secret link each [one person, without a link]")
    add("--new-links", action="store_true", help="replace the links of an earlier start")
    add("--labels-per-task", type=int, default=1, metavar="N", help="answers of different people [%(default)s]")
    add("--overlap", type=float, default=0.0, metavar="F", help="share of tasks with one more answer [%(default)s]")
    add("--gold", metavar="FILE", help="tasks with known answers, which every labeler gets, for screening")
    add("--instructions", metavar="FILE", help="Markdown to show [the paper's, in other words]")
    add("--host", default="127.0.0.1", help="where to listen; another one needs --labelers [%(default)s]")
    add("--port", type=int, default=0, metavar="N", help="0 takes a free one [%(default)s]")
    settings = parser.parse(args)
    check_settings(settings)
    install_log_filters()
    start_server(settings)
    return 0


def check_settings(settings: Namespace) -> None:
    """Refuse invalid settings before anything is read."""
    if settings.tasks and settings.model:
        raise UserError("TASKS and --model exclude each other: the tasks are from a file, or sampled from models")
    if bool(settings.model) != bool(settings.prompts):
        raise UserError("--model and --prompts belong together: outputs are sampled for the prompts of a file")
    for name in ("samples", "max_new_tokens", "labels_per_task"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(settings, name)}")
    if not 0 <= settings.temperature < math.inf:
        raise UserError(f"--temperature must be 0 or more, got {settings.temperature}")
    if not 0 <= settings.overlap <= 1:
        raise UserError(f"--overlap is a share of the tasks, from 0 to 1, got {settings.overlap}")
    names = split_names(settings.labelers) or []
    for name in names:
        if name in ("owner", "overview"):
            raise UserError(f"--labelers: nobody may be named {name!r}: that is the link of the overview")
        if not name.isprintable():
            raise UserError(f"--labelers: the name {name!r} holds a character that cannot be printed")
    most = settings.labels_per_task + (settings.overlap > 0)
    if most > max(len(names), 1):
        raise UserError(
            f"a task would need {most} labelers, and there are {max(len(names), 1)}: name more by --labelers"
        )
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not names:
        raise UserError(
            f"--host {settings.host} is open to others: name the people by --labelers ann,bo; each gets a link"
        )


def split_names(text: str | None) -> list[str] | None:
    """Return the names in "ann,bo"; None if none are given.

    Raises:
        UserError: A name is empty, or is given twice.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"--labelers takes names such as ann,bo; the name at place {names.index('') + 1} is empty")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"--labelers: the name {repeated!r} is given twice")
    return names


def start_server(settings: Namespace) -> None:
    """Fill the database, print the addresses, and serve until interrupted."""
    from lit_rlhf.labeling.database import Database
    from lit_rlhf.labeling.pages import read_instructions
    from lit_rlhf.labeling.server import LabelSettings, create_label_app
    from lit_rlhf.labeling.serving import address_of, allowed_hosts, bind, serve
    from lit_rlhf.labeling.tasks import read_tasks

    own_instructions = read_own_instructions(settings)
    tasks = read_tasks(settings.tasks, settings.kind, settings.format) if settings.tasks else None
    gold = read_tasks(settings.gold, settings.kind, settings.format, gold=True) if settings.gold else None
    if not (tasks or gold or settings.model or expand_path(settings.db).exists()):
        raise UserError(f"no database {settings.db} yet: name a file TASKS, or --model DIR --prompts FILE")
    with closing(bind(settings.host, settings.port)) as listener:  # before outputs are sampled, which takes long
        database = Database(settings.db)
        kind = fill_database(database, settings, tasks, gold)
        names = split_names(settings.labelers) or []
        only = None if names else database.add_labeler("labeler")
        page = LabelSettings(kind, own_instructions or read_instructions(kind), only, allowed_hosts(settings.host))
        app = create_label_app(database, page)
        print_links(database, page, names, address_of(listener, settings.host), settings.new_links)
        print("stop: Ctrl+C; start again with the same --db to go on", flush=True)
        serve(app, listener)
    progress = database.progress(kind)
    print(f"\n{progress.labels:,} of {progress.labels_wanted:,} labels are in {settings.db}")
    print(f"export: lit-rlhf label export {settings.db} --to FILE")


def read_own_instructions(settings: Namespace) -> str | None:
    """Return the user's instructions; None if there are none.

    Raises:
        UserError: The file cannot be read, or is empty.
    """
    from lit_rlhf.data.sources import read_text

    if settings.instructions is None:
        return None
    text = read_text(settings.instructions)
    if not text.strip():
        raise UserError(f"--instructions: {settings.instructions!r} is empty; leave the option out for the paper's")
    return text


def print_links(database: "Database", page: "LabelSettings", names: list[str], address: str, renew: bool) -> None:
    """Print the address, or one secret link per person."""
    if not names:
        print(f"{address}/\noverview: {address}/overview", flush=True)
        return
    kept = []
    for name, role in [*((name, "labeler") for name in names), ("owner", "owner")]:
        labeler = database.add_labeler(name, role)
        if database.has_secret(labeler) and not renew:
            kept.append(name)
            continue
        what = "overview" if role == "owner" else name
        print(f"{what}: {address}/login/{database.make_secret(labeler)}", flush=True)
    if kept:
        print(f"the links of {', '.join(kept)} are those of an earlier start, at {address}; --new-links makes new ones")


def fill_database(
    database: "Database", settings: Namespace, tasks: "TaskFile | None", gold: "TaskFile | None"
) -> "Kind":
    """Add the tasks that are not in the database yet; return what is asked.

    Args:
        database: Takes them.
        settings: Of the command.
        tasks: Of the file TASKS.
        gold: Tasks with known answers.

    Raises:
        UserError: There is no task, a choice is missing, or the source no longer holds a task that is in the database
            from an earlier start. Nothing is added then.
    """
    known: dict[str, dict[str, list[str]]] = json.loads(database.read_setting("sources") or "{}")
    source = describe_source(settings)
    earlier = known.get(source, {})
    if settings.model and (settings.kind in earlier if settings.kind else earlier):
        kind: Kind = settings.kind or next(each for each in database.kinds() if each in earlier)
        print(f"{len(earlier[kind]):,} tasks to {kind}, sampled at an earlier start")
    else:
        tasks = sample_outputs(settings, gold) if settings.model else tasks
        kind = tasks.kind if tasks is not None else choose_kind(database, settings, gold)
    if gold is not None and gold.kind != kind:
        raise UserError(f"--gold: {settings.gold} holds tasks to {gold.kind}, and the others are to {kind}")
    if tasks is not None:
        missing = sorted(set(earlier.get(kind, ())) - {task.key for task in tasks.tasks})
        if missing:
            raise UserError(
                f"{settings.tasks} no longer holds {len(missing):,} of the {len(earlier[kind]):,} tasks that are in "
                f"{settings.db} from it (such as {missing[0]!r}): start without the file to go on with those, or name "
                "another file by --db for the new ones"
            )
        known[source] = {**earlier, kind: [task.key for task in tasks.tasks]}
    if tasks is not None and gold is not None:
        check_apart(tasks, gold)
    stored = set(database.task_keys(kind))
    wanted = [*(spread_labels(tasks, settings) if tasks else ()), *([0] * len(gold.tasks) if gold else ())]
    both = [task for file in (tasks, gold) if file is not None for task in file.tasks]
    database.add_tasks(kind, both, wanted, {"sources": json.dumps(known)})
    for file, what in ((tasks, f"tasks to {kind}"), (gold, "tasks with known answers")):
        if file is not None:
            added = sum(task.key not in stored for task in file.tasks)
            print_notes(file, f"{len(file.tasks):,} {what}, {added:,} of them new in {settings.db}")
    return kind


def check_apart(tasks: "TaskFile", gold: "TaskFile") -> None:
    """Refuse a task that is asked about, and whose answer is known.

    Raises:
        UserError: Names both rows.
    """
    asked = {task.key: task.origin for task in tasks.tasks}
    shared = [task for task in gold.tasks if task.key in asked]
    if shared:
        raise UserError(
            f"{shared[0].origin}: the task {shared[0].key!r} has a known answer, and is also that at "
            f"{asked[shared[0].key]}; leave one of them out ({len(shared):,} such)"
        )


def choose_kind(database: "Database", settings: Namespace, gold: "TaskFile | None") -> "Kind":
    """Return what is asked where no new tasks say so.

    Raises:
        UserError: There is no task, or there are tasks of several kinds.
    """
    kinds = database.kinds()
    if settings.kind is not None and kinds and settings.kind not in kinds:
        raise UserError(f"--kind {settings.kind}: {settings.db} holds tasks to {', '.join(kinds)}")
    if len(kinds) > 1 and settings.kind is None:
        raise UserError(f"{settings.db} holds tasks to {', '.join(kinds)}: choose by --kind")
    if not kinds and gold is None:
        raise UserError(f"{settings.db} holds no task yet: name a file TASKS, or --model DIR --prompts FILE")
    kind: Kind = settings.kind or (kinds[0] if kinds or gold is None else gold.kind)
    return kind


def sample_outputs(settings: Namespace, gold: "TaskFile | None") -> "TaskFile":
    """Sample the outputs to ask about; known answers say what to ask where `--kind` does not."""
    from lit_rlhf.labeling.model_samples import SampleSettings, sample_tasks

    sampling = SampleSettings(
        settings.samples, settings.max_new_tokens, settings.temperature, settings.template, settings.seed
    )
    kind = settings.kind or (gold.kind if gold is not None else None)
    return sample_tasks(settings.model, settings.prompts, kind, sampling)


def describe_source(settings: Namespace) -> str:
    """Return what tells one source of tasks from another; empty if the command names none."""
    if not settings.tasks and not settings.model:
        return ""
    if settings.tasks:
        path = expand_path(settings.tasks)
        return str(path.resolve()) if path.exists() else str(settings.tasks)
    prompts = expand_path(settings.prompts)
    content = hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts.is_file() else settings.prompts
    names = ("model", "samples", "max_new_tokens", "temperature", "template", "seed")
    return json.dumps([content, *(getattr(settings, name) for name in names)])


def spread_labels(file: "TaskFile", settings: Namespace) -> list[int]:
    """Return the number of labels of each task: a random share `overlap` of them gets one more."""
    from random import Random

    count = len(file.tasks)
    shared = set(Random(settings.seed).sample(range(count), round(settings.overlap * count)))
    return [settings.labels_per_task + (number in shared) for number in range(count)]


def print_notes(file: "TaskFile", head: str) -> None:
    """Print what was read, and what of it is not used."""
    print("\n  ".join([head, *file.notes]))


def run_export(args: list[str]) -> int:
    """Write the answers in a database as training data."""
    parser = Parser(prog="lit-rlhf label export", description="write the answers in a database as training data")
    add = parser.add_argument
    add("db", metavar="FILE", help="the database")
    add("--to", required=True, type=Path, metavar="PATH", help="the file to write; must not exist yet")
    add("--as", dest="form", choices=EXPORTS, help="what to write [the rows of the kind of tasks]")
    add("--kind", choices=KINDS, help="which tasks, where the database has several kinds")
    add("--labelers", metavar="NAMES", help="only the answers of ann,bo,… [all]")
    add("--with-gold", action="store_true", help="also the answers to tasks with known answers")
    settings = parser.parse(args)
    install_log_filters()
    from lit_rlhf.labeling.database import Database
    from lit_rlhf.labeling.exports import export_answers

    names = split_names(settings.labelers)
    database = Database(settings.db, create=False)
    print("\n  ".join(export_answers(database, settings.to, settings.form, settings.kind, names, settings.with_gold)))
    return 0


def run_import(args: list[str]) -> int:
    """Add answers that were given in another tool to a database."""
    parser = Parser(prog="lit-rlhf label import", description="add answers given in another tool to a database")
    add = parser.add_argument
    add("file", metavar="FILE", help="the other tool's export: JSON, JSON lines, CSV, Parquet")
    add("--db", default="runs/labels.db", metavar="FILE", help="the database [%(default)s]")
    add("--from", dest="form", choices=IMPORTS, help="the tool [what the file's first row suggests]")
    settings = parser.parse(args)
    install_log_filters()
    from lit_rlhf.labeling.database import Database
    from lit_rlhf.labeling.imports import read_import

    imported = read_import(settings.file, settings.form)
    database = Database(settings.db)
    added = database.import_answers(imported.kind, imported.tasks, imported.answers)
    total = sum(map(len, imported.answers))
    head = (
        f"{total:,} answers to {len(imported.tasks):,} tasks to {imported.kind}, {added:,} of them new in {settings.db}"
    )
    print("\n  ".join([head, *imported.notes]))
    return 0
