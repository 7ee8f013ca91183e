"""The interface of generators: a class with `generate` alone works in PPO."""

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.generation import CachedGenerator, GenerationOutput, Generator, SamplingParams
from lit_rlhf.generation.sampling import sample_tokens
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rollout import KLController
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.small_runs import assert_same_weights, full_weights, quiet_trainer


class PlainGenerator(Generator):
    """Samples one row at a time, without padding or cache."""

    num_calls = 0

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        self.num_calls += 1
        stopping = StoppingCriteria(model, sampling, matches_stop_string)
        response_ids = torch.full(uniforms.shape, model.config.pad_token_id)
        logprobs, mask = torch.zeros(uniforms.shape), torch.zeros(uniforms.shape, dtype=torch.bool)
        finished = torch.zeros(len(uniforms), dtype=torch.bool)
        num_samples = len(uniforms) // len(prompts.input_ids)
        for row in range(len(uniforms)):
            prompt = prompts.input_ids[row // num_samples][prompts.attention_mask[row // num_samples].bool()]
            for step in range(sampling.max_new_tokens):
                logits = model(torch.cat([prompt, response_ids[row, :step]])[None]).logits[:, -1]
                response_ids[row, step], logprobs[row, step] = sample_tokens(
                    logits, uniforms[row : row + 1, step], sampling, step, stopping.stop_token_ids
                )
                mask[row, step] = True
                finished[row] = stopping.is_finished(response_ids[row : row + 1, : step + 1])
                if finished[row]:
                    break
        return GenerationOutput(response_ids, mask, logprobs, finished)


class ConstantKL(KLController):
    """A controller with `update` alone."""

    coefficient = 0.02

    def __init__(self) -> None:
        self.kls: list[float] = []

    def update(self, kl: float, num_episodes: int) -> None:
        self.kls.append(kl)


class KeepScores(L.Callback):
    """Keeps the mean score of every iteration."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.scores.append(float(trainer.callback_metrics["reward/score"]))


@pytest.mark.parametrize("samples_per_prompt", [1, 2])
def test_plug_ins_of_one_method_train_as_the_librarys_own(samples_per_prompt, llama, tmp_path):
    """A generator with `generate`, a reward with `score` and a KL controller with `update`."""
    results = []
    for generator, kl in ((PlainGenerator(), ConstantKL()), (CachedGenerator(), None)):
        ppo = PPOConfig(rollout_batch_size=8, micro_batch_size=4, samples_per_prompt=samples_per_prompt)
        watch = KeepScores()
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[watch])
        module = PPOModule(llama, WordShare(), SamplingParams(max_new_tokens=6), ppo, kl=kl, generator=generator)
        trainer.fit(module, datamodule=PromptData())
        results.append((watch.scores, full_weights(module)))
        if kl is not None:
            assert generator.num_calls == 2 and len(kl.kls) == 2
    (scores, weights), (expected_scores, expected_weights) = results
    assert scores == pytest.approx(expected_scores, abs=1e-6)
    assert_same_weights(weights, expected_weights)


def test_a_generator_needs_generate():
    with pytest.raises(TypeError, match="abstract method"):
        Generator()
