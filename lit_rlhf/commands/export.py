"""`lit-rlhf export`: a Lightning checkpoint becomes a folder that plain transformers loads."""

from pathlib import Path

from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.commands.support.suggestions import Parser
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Export and say where to."""
    parser = Parser(prog="lit-rlhf export", description="Lightning checkpoint to a transformers folder")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of lit-rlhf fit: a file, or a folder of shards")
    parser.add_argument("directory", type=Path, help="the folder to write")
    text = "of a run with EMA: the average (the default), or the weights as they were"
    parser.add_argument("--weights", choices=("average", "current"), help=text)
    parsed = parser.parse(args)
    if not parsed.checkpoint.exists():
        raise UserError(f"no checkpoint {parsed.checkpoint}")
    quiet()
    from lit_rlhf.models.export import export_checkpoint

    export_checkpoint(parsed.checkpoint, parsed.directory, parsed.weights)
    print(parsed.directory)
    return 0
