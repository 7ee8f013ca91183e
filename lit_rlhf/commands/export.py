"""`lit-rlhf export`: convert a Lightning checkpoint to a folder that plain transformers loads, and push it."""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from lit_rlhf.lineage.records import LineageRecord


def run(command: str, args: list[str]) -> int:
    """Export a checkpoint with its lineage and a model card, push it if asked to, and print the folder."""
    parser = Parser(prog="lit-rlhf export", description="Lightning checkpoint to a transformers folder")
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of lit-rlhf fit: a file, or a folder of shards")
    parser.add_argument("directory", type=Path, help="the folder to write")
    text = "after a run with EMA: the averaged weights (default) or the current ones"
    parser.add_argument("--weights", choices=("average", "current"), help=text)
    text = "report.json of lit-rlhf evaluate, whose metrics of this model go into its card"
    parser.add_argument("--report", type=Path, metavar="FILE", help=text)
    parser.add_argument("--push", metavar="OWNER/NAME", help="push the folder to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    text = "of an adapter: merged into full weights (default), or a folder of the adapter alone, which names its base"
    parser.add_argument("--format", choices=("merged", "peft"), default="merged", help=text)
    parsed = parser.parse(args)
    install_log_filters()
    if parsed.private and parsed.push is None:
        raise UserError("--private is of --push: name the repository with --push OWNER/NAME")
    from lit_rlhf.lineage.fingerprints import remember_hashes
    from lit_rlhf.lineage.hub import check_push, push_folder
    from lit_rlhf.lineage.writing import finish_export
    from lit_rlhf.models.export import export_checkpoint

    record = describe_checkpoint(parsed.checkpoint)
    if parsed.push is not None:
        check_push(parsed.push)
    written: list[LineageRecord] = []

    def finish(folder: Path) -> None:
        written.append(finish_export(record, folder, parsed.directory, parsed.report, parsed.push))

    export_checkpoint(parsed.checkpoint, parsed.directory, parsed.weights, finish, parsed.format)
    remember_hashes(parsed.directory, written[0].files)
    print(parsed.directory)
    if parsed.push is not None:
        print(push_folder(parsed.directory, parsed.push, parsed.private, "lit-rlhf export"))
    return 0


def describe_checkpoint(checkpoint: Path) -> "LineageRecord":
    """Return the record that a checkpoint holds of its run; of one without a record, what else it says."""
    from lit_rlhf.checkpoint_files import open_checkpoint
    from lit_rlhf.checkpoints import RUN_KEY
    from lit_rlhf.lineage.records import LINEAGE_KEY, Compute, LineageRecord, parse_record
    from lit_rlhf.models.export import CHECKPOINT_KEY

    content = open_checkpoint(checkpoint, device="meta")
    if LINEAGE_KEY in content:
        return parse_record(content[LINEAGE_KEY])
    module = (content.get(CHECKPOINT_KEY) or {}).get("module", "model")
    return LineageRecord(
        module.removesuffix("Module").lower(), Compute("", ""), recipe=(content.get(RUN_KEY) or {}).get("recipe", {})
    )
