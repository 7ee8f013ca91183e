"""`lit-rlhf export`: convert a Lightning checkpoint to a folder that plain transformers loads."""

from pathlib import Path

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters


def run(command: str, args: list[str]) -> int:
    """Export a checkpoint and print the folder."""
    parser = Parser(prog="lit-rlhf export", description="Lightning checkpoint to a transformers folder")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of lit-rlhf fit: a file, or a folder of shards")
    parser.add_argument("directory", type=Path, help="the folder to write")
    text = "after a run with EMA: the averaged weights (default) or the current ones"
    parser.add_argument("--weights", choices=("average", "current"), help=text)
    parsed = parser.parse(args)
    install_log_filters()
    from lit_rlhf.models.export import export_checkpoint

    export_checkpoint(parsed.checkpoint, parsed.directory, parsed.weights)
    print(parsed.directory)
    return 0
