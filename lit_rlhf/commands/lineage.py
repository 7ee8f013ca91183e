"""`lit-rlhf lineage`: where a model comes from, whether that is still so, and what it took to make."""

from pathlib import Path

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters

MISMATCH = 2


def run(command: str, args: list[str]) -> int:
    """Print the tree, or push it to Weights & Biases; 2 if something no longer matches the records."""
    if args[:1] == ["push"]:
        return push(args[1:])
    parser = Parser(
        prog="lit-rlhf lineage",
        description="print what a model, an evaluation or a sampled file was made from, back to base model and data; "
        "lineage push DIR: record it in Weights & Biases after wandb sync",
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="a folder with lineage.json, or a sampled file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw it as a page, too")
    parsed = parser.parse(args)
    install_log_filters()
    from lit_rlhf.lineage.text import format_compute, format_tree
    from lit_rlhf.lineage.tree import build_tree

    tree = build_tree(parsed.output)
    problems = list(dict.fromkeys(problem for node in tree.walk() for problem in node.problems))
    if parsed.html is not None:
        from lit_rlhf.commands.support.preflight import write_output
        from lit_rlhf.lineage.page import render_page

        write_output(render_page(tree), parsed.html, "--html")
    summary = "\n".join(["no longer as recorded:", *problems]) if problems else "all files are as recorded"
    print(f"{format_tree(tree)}\n\n{format_compute(tree)}\n\n{summary}")
    return MISMATCH if problems else 0


def push(args: list[str]) -> int:
    """Push the records of an output and of its inputs to Weights & Biases."""
    parser = Parser(
        prog="lit-rlhf lineage push",
        description="log artifacts and edges of runs that were recorded offline; wandb sync the runs before",
    )
    parser.add_argument("output", type=Path, metavar="DIR", help="a folder with lineage.json, or a sampled file")
    parsed = parser.parse(args)
    install_log_filters()
    from lit_rlhf.lineage.wandb_artifacts import push_lineage

    for name in push_lineage(parsed.output):
        print(f"pushed: {name}")
    return 0
