"""`lit-rlhf model`: get a small instruction model, or convert a GGUF file, as a folder to train from."""

from pathlib import Path

from lit_rlhf.commands.support.argument_parser import Parser, read_action
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Write a model folder, and print where the model came from."""
    actions = {
        "ls": "list the models that get knows",
        "get": "write one as a transformers folder: get NAME DIR, or get --gguf FILE DIR",
    }
    action, rest = read_action("lit-rlhf model", "ls | get NAME DIR | get --gguf FILE DIR", actions, args), args[1:]
    if action is None:
        return 0
    parser = Parser(prog=f"lit-rlhf model {action}", description=actions[action])
    if action == "get":
        parser.add_argument("name", nargs="?", help="as lit-rlhf model ls prints it")
        parser.add_argument("directory", type=Path, metavar="DIR", help="the folder to write")
        text = "a GGUF file (llama.cpp) of a causal language model, in place of a name"
        parser.add_argument("--gguf", type=Path, metavar="FILE", help=text)
    parsed = parser.parse(rest)
    if action == "get" and (parsed.name is None) == (parsed.gguf is None):
        raise UserError("lit-rlhf model get takes either a NAME or --gguf FILE, and the folder to write: DIR")
    install_log_filters()
    from lit_rlhf.models.catalog import CATALOG, fetch_model
    from lit_rlhf.models.gguf import convert_gguf

    if action == "ls":
        print("\n".join(f"{name}  {model.about}" for name, model in CATALOG.items()))
        return 0
    if parsed.gguf is not None:
        convert_gguf(parsed.gguf, parsed.directory)
        print(f"{parsed.directory}: from {parsed.gguf}, dequantized to float32")
    else:
        print(f"{parsed.directory}: from {fetch_model(parsed.name, parsed.directory)}")
    return 0
