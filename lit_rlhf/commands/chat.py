"""`lit-rlhf chat`: talk to one or two models in a browser; a vote between two responses becomes a comparison."""

import math
from contextlib import closing

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Serve the page until interrupted."""
    parser = Parser(prog="lit-rlhf chat", description="talk to one or two models in a browser, side by side, and vote")
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="DIR", help="a model; repeat it for a second, or the same")
    add("--db", default="runs/labels.db", metavar="FILE", help="the database of votes [%(default)s]")
    add("--name", default="labeler", help="who votes [%(default)s]")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="of a response [%(default)s]")
    add("--temperature", type=float, default=0.7, metavar="T", help="0: greedy [%(default)s]")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling [%(default)s]")
    add("--port", type=int, default=0, metavar="N", help="0 takes a free one [%(default)s]")
    settings = parser.parse(args)
    if len(settings.model) > 2:
        raise UserError(f"--model: one or two models, got {len(settings.model)}")
    if settings.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be 1 or more, got {settings.max_new_tokens}")
    if not 0 <= settings.temperature < math.inf:
        raise UserError(f"--temperature must be 0 or more, got {settings.temperature}")
    if settings.temperature == 0 and len(set(settings.model)) < len(settings.model):
        raise UserError("--temperature 0: two greedy responses of the same model would be equal; name it once")
    install_log_filters()
    import torch

    from lit_rlhf.labeling.database import Database
    from lit_rlhf.labeling.playground import create_chat_app
    from lit_rlhf.labeling.responders import load_responder
    from lit_rlhf.labeling.serving import address_of, allowed_hosts, bind, serve
    from lit_rlhf.models.loading import load_config
    from lit_rlhf.models.loading_config import ModelLoadingConfig

    host = "127.0.0.1"
    with closing(bind(host, settings.port)) as listener:
        names = dict.fromkeys(settings.model)
        for name in names:  # before the database: a wrong --model leaves no file
            load_config(name, ModelLoadingConfig())
        database = Database(settings.db)
        labeler = database.add_labeler(settings.name)
        responders = {name: load_responder(name, settings.max_new_tokens, settings.temperature) for name in names}
        models = [(name, responders[name]) for name in settings.model]
        torch.manual_seed(settings.seed)
        app = create_chat_app(database, labeler, models, allowed_hosts(host), settings.seed)
        votes = f"votes are comparisons in {settings.db}"
        if len(models) == 1:
            votes = "no vote with one response: repeat --model for a second model, or for a second sample of this one"
        print(f"{address_of(listener, host)}/\n{votes}\nstop: Ctrl+C", flush=True)
        serve(app, listener)
    return 0
