"""The lineage of a file that a command has sampled or scored."""

from argparse import Namespace
from pathlib import Path

from lit_rlhf.commands.support.command_line import format_command
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input
from lit_rlhf.lineage.writing import Start, make_record, write_output_record
from lit_rlhf.secrets import without_secrets


def write_sample_lineage(
    file: Path,
    start: Start,
    command: str,
    args: list[str],
    settings: Namespace,
    models: list[tuple[str, str]],
    data: list[tuple[str, str]],
) -> None:
    """Write FILE.lineage.json.

    Args:
        file: the file that was written.
        start: of the command.
        command: its name.
        args: its arguments.
        settings: they, parsed.
        models: role and folder or hub name of each model.
        data: role and path of each data file.
    """
    values = vars(settings)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    record = make_record(
        "samples",
        start,
        [describe_model_input(role, path) for role, path in models],
        [describe_data_input(role, path) for role, path in data],
        recipe=without_secrets(plain),
        command=format_command(command, args),
        seed=values.get("seed"),
    )
    write_output_record(record, file, [file])
