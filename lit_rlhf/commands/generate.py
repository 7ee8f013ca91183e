"""`lit-rlhf generate`: one response of a model, or a chat at the terminal."""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError

CHAT_HELP = "/reset forgets the conversation, /system TEXT begins one under a system prompt, Ctrl+D ends."

if TYPE_CHECKING:
    from lit_rlhf.data.records import Message, Prompt


def run(command: str, args: list[str]) -> int:
    """Respond to `--prompt`, or to every line of stdin until it ends."""
    parser = Parser(prog="lit-rlhf generate", description="one response, or a chat without --prompt")
    parser.add_argument("--model", required=True, metavar="DIR", help="a transformers folder, or a hub name")
    parser.add_argument("--prompt", type=str, metavar="TEXT", help="respond to this and exit")
    parser.add_argument("--system", type=str, metavar="TEXT", help="the system prompt of a chat")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="[%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0: greedy [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed [%(default)s]")
    settings = parser.parse(args)
    if settings.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be 1 or more, got {settings.max_new_tokens}")
    if not 0 <= settings.temperature < math.inf:
        raise UserError(f"--temperature must be 0 or more, got {settings.temperature}")
    from lit_rlhf.data.prompt_template import PromptTemplate
    from lit_rlhf.data.sources import check_value

    for option in ("prompt", "system"):
        if vars(settings)[option] is not None:
            check_value(vars(settings)[option], f"--{option}")
    install_log_filters()
    model, tokenizer = load_model(settings.model)
    if settings.system is not None and not tokenizer.chat_template:
        raise UserError(f"--system: {settings.model} has no chat template that would place it; put it into the prompt")
    import torch

    torch.manual_seed(settings.seed)
    chat = Chat(model, PromptTemplate(tokenizer), settings)
    if settings.prompt is not None:
        chat.respond(settings.prompt, "--prompt")
    elif sys.stdin.isatty():
        chat.run()
    else:
        for text, origin in iter_input_lines():
            chat.respond(text, origin)
    return 0


class Chat:
    """A conversation with a model. Without a chat template there are no turns: every text is a prompt of its own.

    Args:
        model: a causal language model.
        template: the `PromptTemplate` of its tokenizer.
        settings: the command's.
    """

    def __init__(self, model: Any, template: Any, settings: Namespace) -> None:
        self.model, self.template, self.settings = model, template, settings
        self.system: str | None = settings.system
        self.messages: list[Message] = []

    def respond(self, text: str, origin: str) -> None:
        """Print a response to a text, and keep both; at a terminal, print it while it is generated.

        Raises:
            UserError: see `generate_response`.
        """
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt = [*system, *turns] if self.template.tokenizer.chat_template else text
        is_live = sys.stdout.isatty()
        streamer = make_streamer(self.template.tokenizer) if is_live else None
        response = generate_response(self.model, self.template, prompt, self.settings, origin, streamer)
        self.messages = [*turns, {"role": "assistant", "content": response}]
        if not is_live:
            print(response, flush=True)

    def run(self) -> None:
        """Respond to the lines of a terminal until they end; a line that is refused changes nothing."""
        turns = "" if self.template.tokenizer.chat_template else " There is no chat template: every line is a prompt."
        print(f"{CHAT_HELP}{turns}", file=sys.stderr)
        for text, origin in iter_input_lines():
            word, _, rest = text.strip().partition(" ")
            try:
                if word == "/reset":
                    self.messages = []
                elif word == "/system" and self.template.tokenizer.chat_template:
                    self.system, self.messages = rest.strip() or None, []
                elif word.startswith("/"):
                    print(CHAT_HELP, file=sys.stderr)
                else:
                    self.respond(text, origin)
            except UserError as problem:
                print(f"error: {problem} (/reset forgets the conversation)", file=sys.stderr)


def make_streamer(tokenizer: Any) -> Any:
    """Return a streamer of transformers that prints words as they are complete, without white space in front."""
    from transformers import TextStreamer

    class StrippedStreamer(TextStreamer):
        has_begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.has_begun else text.lstrip()
            self.has_begun = self.has_begun or bool(text)
            super().on_finalized_text(text, stream_end)

    return StrippedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def iter_input_lines() -> Iterator[tuple[str, str]]:
    """Yield the non-empty lines of stdin, each with its origin; at a terminal, print a prompt before each.

    Raises:
        UserError: A line is not UTF-8 text.
    """
    from lit_rlhf.data.sources import check_value, read_stdin

    lines = read_stdin()
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        text, origin = next(lines, ("", ""))
        if not origin:
            return
        if text.strip():
            check_value(text, origin)
            yield text, origin


def load_model(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Raises:
        UserError: there is no such model, it is of another kind, or its weights are not the model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lit_rlhf.models.loading import check_causal_lm, check_vocabulary, load_config, load_stored_tokenizer
    from lit_rlhf.models.loading_config import ModelLoadingConfig
    from lit_rlhf.models.pretrained import load_weights

    loading = ModelLoadingConfig()
    config = load_config(name, loading)
    check_causal_lm(config, name)
    tokenizer = load_stored_tokenizer(name, loading)
    check_vocabulary(tokenizer, config, name, loading)
    model, _ = load_weights(AutoModelForCausalLM, name, config, loading, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def generate_response(
    model: Any, template: Any, prompt: "Prompt", settings: Namespace, origin: str, streamer: Any = None
) -> str:
    """Return the model's response to a prompt, which has the ids that it has in training.

    Args:
        model: A causal language model.
        template: The `PromptTemplate` of its tokenizer.
        prompt: A text or a conversation.
        settings: The command's.
        origin: Where the prompt is from, for messages.
        streamer: prints the response while it is generated; see transformers' `generate`.

    Raises:
        UserError: the template refuses the prompt, it has no token, or it fills the model's context.
    """
    import torch

    from lit_rlhf.models.loading import max_positions

    tokenizer = template.tokenizer
    (ids,) = template.encode([template.render(prompt, {}, origin)])
    if ids == template.bos_ids:
        raise UserError(f"{origin}: the prompt has no token of this tokenizer")
    input_ids, width = torch.tensor([ids], device=model.device), len(ids)
    limit = max_positions(model.config)
    max_new_tokens = settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit - width)
    if max_new_tokens < 1:
        raise UserError(f"the prompt has {width} tokens and the model's context holds {limit}: shorten it")
    # disable top_k and top_p: sample the model's own distribution
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **(sampling if settings.temperature > 0 else {"do_sample": False}),
    )
    return str(tokenizer.decode(output[0, width:], skip_special_tokens=True)).strip()
