"""A model as a `Responder`: its response to a conversation, word by word."""

from __future__ import annotations

from collections.abc import Callable

from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Message
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.playground import Responder


def load_responder(model_name: str, max_new_tokens: int, temperature: float) -> Responder:
    """Load a model, and return what writes its responses.

    A model without a chat template has no turns: it reads the last message alone, as `lit-rlhf generate` does.

    Args:
        model_name: A folder or hub name.
        max_new_tokens: Of a response.
        temperature: 0 is greedy.

    Raises:
        UserError: There is no such model, or it is no language model.
    """
    import torch
    from transformers import TextStreamer

    from lit_rlhf.models.loading import load_causal_lm, load_tokenizer, max_positions
    from lit_rlhf.models.loading_config import ModelLoadingConfig

    loading = ModelLoadingConfig()
    tokenizer = load_tokenizer(model_name, loading)
    model = load_causal_lm(model_name, tokenizer, loading).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    template = PromptTemplate(tokenizer)
    limit = max_positions(model.config)

    class Streamer(TextStreamer):
        def __init__(self, add: Callable[[str], None]) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.add = add

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.add(text)

    @torch.no_grad()
    def respond(turns: list[Message], add: Callable[[str], None]) -> None:
        prompt = turns if tokenizer.chat_template else turns[-1]["content"]
        (ids,) = template.encode([template.render(prompt, {}, "the conversation")])
        if not ids:
            raise UserError("the message has no token of this model's tokenizer")
        space = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))
        if space < 1:
            raise UserError(f"the conversation has {len(ids)} tokens, and the model's context holds {limit}")
        input_ids = torch.tensor([ids], device=model.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=space,
            pad_token_id=tokenizer.pad_token_id,
            streamer=Streamer(add),
            **(sampling if temperature > 0 else {"do_sample": False}),
        )

    return respond
