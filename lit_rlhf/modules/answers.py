"""Responses of a policy to prompts, for `predict_step`."""

from contextlib import nullcontext
from typing import Any

import torch

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.own_batches import OwnRows, collate_own_prompts, tokenize_own_prompts
from lit_rlhf.generation import Generator, SamplingParams
from lit_rlhf.generation.sampling import sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.modules.base import LitModule
from lit_rlhf.rollout.experience import make_episodes
from lit_rlhf.strategies import unsharded_parameters


@torch.no_grad()
def answer_prompts(
    module: LitModule, generator: Generator, sampling: SamplingParams, batch: PromptBatch
) -> list[dict[str, Any]]:
    """Return the rows of prompts, each with the module's `response`.

    A response depends on the global seed and the prompt's index alone, not on the batch or the number of ranks.
    """
    index = batch.index.cpu().clamp(min=0)  # a rank without a prompt left repeats another rank's with index -1
    uniforms = sampling_uniforms(int(index.max()) + 1, sampling.max_new_tokens, torch.initial_seed(), 0, 2)[index]
    model, matcher = module.exported_model, stop_string_matcher(module.tokenizer, sampling)
    with unsharded_parameters(model) if generator.needs_full_weights else nullcontext():
        output = generator.generate(model, batch, sampling, uniforms, matcher)
    episodes = make_episodes(batch, output, module.tokenizer, training=False)
    answered = zip(episodes.rows, episodes.responses, batch.index.tolist())
    return [{**row, "response": response} for row, response, number in answered if number >= 0]


def collate_answerable(module: LitModule, rows: OwnRows, sampling: SamplingParams) -> PromptBatch:
    """Build a batch of prompts of a user's own loader.

    Raises:
        UserError: prompt and response would be longer than the model's positions.
    """
    prompts = tokenize_own_prompts(rows, module.template)
    length = max(len(each.input_ids) for each in prompts) + sampling.max_new_tokens
    module.check_max_positions(length, "the longest prompt of a batch with sampling.max_new_tokens", "one of them")
    return collate_own_prompts(prompts, module.tokenizer.pad_token_id)
