"""The lineage of an evaluation: its models, and the files that its suites read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_rlhf.commands.support.command_line import format_command, name_configs
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.run import Evaluation
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input
from lit_rlhf.lineage.settings import find_files, find_model_folders
from lit_rlhf.lineage.wandb_artifacts import describe_run, mirror_output
from lit_rlhf.lineage.writing import Start, make_record, write_output_record
from lit_rlhf.loggers import media_loggers

ROLE = "evaluation"


def write_evaluation_lineage(
    evaluation: Evaluation, report: dict[str, Any], recipe: dict[str, Any], args: list[str], start: Start
) -> None:
    """Write lineage.json to the folder of an evaluation, and record it in its run of Weights & Biases.

    Args:
        evaluation: the evaluation, whose report is written.
        report: its report.
        recipe: its settings, without credentials.
        args: its command line.
        start: when it started.
    """
    out = Path(evaluation.out)
    hash_file = Cache(out / "cache", progress=False).hash_file  # holds the hashes of the weights already
    models = [  # of a recipe, where no path is an object
        describe_model_input(f"model {name}", str(spec.path), spec.loading, hash_file)
        for name, spec in evaluation.models.items()
    ]
    named = [
        (f"{part}.{name}", path) for part in ("models", "suites") for name, path in find_model_folders(recipe[part])
    ]
    known = {each.path for each in models}
    models += [describe_model_input(name, path, hash_file=hash_file) for name, path in named if path not in known]
    files = [(f"{part}.{name}", path) for part in ("models", "suites") for name, path in find_files(recipe[part])]
    data = []
    for name, path in files:
        suite = name.removeprefix("suites.").removesuffix(".path")
        rows = report["suites"].get(suite, {}).get("rows")
        data.append(replace(describe_data_input(name, path, hash_file=hash_file), rows_kept=rows))
    named_args, configs = name_configs(args)
    command = format_command("evaluate", named_args)
    record = make_record(
        ROLE, start, models, data, recipe=recipe, command=command, configs=configs, seed=evaluation.seed
    )
    run = next((logger.experiment for logger in media_loggers(evaluation.loggers)), None)
    if run is not None:
        record = replace(record, wandb=describe_run(run, ROLE, out.resolve().parent.name))
    record = write_output_record(record, out, [out / "report.json"])
    if run is not None and record.wandb is not None:
        mirror_output(run, record, out)
