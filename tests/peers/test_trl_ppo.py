"""The PPO update against TRL 1.12.0's on the same four models, tokens and scores (differences: docs/ppo.md).

TRL's PPOTrainer runs in a separate process. `make peers` installs it into `.venv-peers/`; without it these tests are
skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lit_rlhf.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    k1,
    last_token_index,
    mean_and_variance,
    moments,
    pad_left,
    pad_right,
    whiten,
)
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.packing.packed_batch import pack_batch
from lit_rlhf.rollout.advantages import GAE, compute_rewards
from lit_rlhf.rollout.experience import Trajectories
from lit_rlhf.rollout.forward_passes import response_logprobs, response_values

ROOT = Path(__file__).resolve().parents[2]
TRL = ROOT / ".venv-peers" / "trl-1.12.0"
pytestmark = pytest.mark.skipif(not TRL.is_dir(), reason="TRL 1.12.0 is not in .venv-peers: make peers installs it")

ROWS, WIDTH, EOS = 8, 10, 1
BETA, LAMBDA, CLIP_RANGE, VALUE_WEIGHT, LEARNING_RATE, PENALTY = 0.3, 0.95, 0.2, 0.1, 0.5, 1.5
LENGTHS = {"full": [WIDTH] * ROWS, "ragged": [3, 10, 1, 7, 9, 10, 2, 5]}


class Update(NamedTuple):
    """The tokens of one update, and what TRL computed on them."""

    input_ids: Tensor  # (B, T)
    prompt_width: int
    recorded: dict[str, list[Any]]  # by TRL
    folder: Path


def write_models(folder: Path, tokenizer: Any) -> None:
    """Write four models with random weights; the reference is close to the policy."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        eos_token_id=EOS,
        bos_token_id=EOS,
        pad_token_id=0,
        num_labels=1,
    )
    for seed, name in enumerate(("policy", "critic", "reward")):
        torch.manual_seed(seed)
        kind = LlamaForCausalLM if name == "policy" else LlamaForSequenceClassification
        model = kind(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "policy":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.03 * torch.randn_like(parameter))
            model.save_pretrained(folder / "reference")
            tokenizer.save_pretrained(folder / "reference")


def draw_tokens(lengths: list[int]) -> tuple[Tensor, int]:
    """Draw prompts and responses; a response shorter than the full width ends with the end token."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda count: torch.randint(4, 32, (count,), generator=generator).tolist()  # noqa: E731
    prompts, _ = pad_left([draw(2 + row % 4) for row in range(len(lengths))], 0)
    responses, _ = pad_right([draw(n) if n == WIDTH else [*draw(n - 1), EOS] for n in lengths], 0)
    return torch.cat([prompts, responses], 1), prompts.shape[1]


def run_trl(folder: Path, tokenizer: Any, lengths: list[int], accumulate: int, **settings: Any) -> Update:
    """Run two epochs of one minibatch in TRL."""
    write_models(folder, tokenizer)
    input_ids, prompt_width = draw_tokens(lengths)
    torch.save({"input_ids": input_ids, "prompt_width": prompt_width}, folder / "input.pt")
    shared = {"kl_coef": BETA, "gamma": 1.0, "lam": LAMBDA, "cliprange": CLIP_RANGE, "cliprange_value": CLIP_RANGE}
    trl_only = {"vf_coef": VALUE_WEIGHT, "num_ppo_epochs": 2, "gradient_accumulation_steps": accumulate}
    more = {"kl_estimator": "k1", "sgd_rate": LEARNING_RATE}
    (folder / "settings.json").write_text(json.dumps({**shared, **trl_only, **more, **settings}))
    paths = os.pathsep.join([str(TRL), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("trl_update.py")), str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return Update(input_ids, prompt_width, torch.load(folder / "recorded.pt", weights_only=False), folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Update:
    """No response ends early, so both put the score on the last token."""
    return run_trl(tmp_path_factory.mktemp("full"), tokenizer, LENGTHS["full"], 1)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Update:
    """Responses of 1 to 10 tokens, in 4 micro-batches, with a penalty for those that do not end."""
    folder = tmp_path_factory.mktemp("ragged")
    return run_trl(folder, tokenizer, LENGTHS["ragged"], 4, missing_eos_penalty=PENALTY)


def extend_by_one(mask: Tensor) -> Tensor:
    """Extend the mask by one token after each response that is shorter than the full width."""
    return torch.arange(WIDTH) <= last_token_index(mask)[:, None] + 1


class LitUpdate:
    """The update by this library on the same models and tokens."""

    def __init__(self, update: Update) -> None:
        loading = ModelLoadingConfig()
        tokenizer = load_tokenizer(str(update.folder / "policy"), loading)
        self.ids, self.attention = update.input_ids, (update.input_ids != 0).long()
        self.mask = self.attention[:, update.prompt_width :].bool()  # (B, R)
        # TRL has a value one token after the end, where nothing is computed here otherwise
        self.extended = torch.cat([self.attention[:, : update.prompt_width], extend_by_one(self.mask).long()], 1)
        path = lambda name: str(update.folder / name)  # noqa: E731
        self.policy = load_causal_lm(path("policy"), tokenizer, loading)
        self.critic = load_scalar_model(path("critic"), tokenizer, loading)
        reward = load_scalar_model(path("reward"), tokenizer, loading).eval()
        with torch.no_grad():
            self.old_logprobs, self.old_values = self.logprobs(), self.values()
            reference = load_causal_lm(path("reference"), tokenizer, loading)
            self.ref_logprobs = response_logprobs(reference, self.ids, self.attention, WIDTH, SamplingParams(WIDTH))
            self.scores = reward.score(self.ids, self.attention)

    def logprobs(self) -> Tensor:
        return response_logprobs(self.policy, self.ids, self.attention, WIDTH, SamplingParams(WIDTH))

    def values(self) -> Tensor:
        return response_values(self.critic, pack_batch(self.ids, self.extended, WIDTH, self.critic.model))

    def advantages(self) -> tuple[Tensor, Tensor]:
        trajectories = Trajectories(
            self.ids,
            self.attention,
            self.mask,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            values=self.old_values,
            scores=self.scores,
            finished=torch.ones(ROWS, dtype=torch.bool),
            rollout_logprobs=self.old_logprobs,
            prompt_index=torch.arange(ROWS),
        )
        advantages, returns = GAE(1.0, LAMBDA).estimate(compute_rewards(trajectories, BETA), trajectories)
        assert returns is not None
        return advantages, returns

    def run_epochs(self, advantages: Tensor, returns: Tensor, value_mask: Tensor) -> list[tuple[float, float]]:
        """Return policy and value loss of two epochs, with a step of plain gradient descent between them."""
        parameters = [*self.policy.parameters(), *self.critic.parameters()]
        optimizer, losses = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=LEARNING_RATE), []
        for _ in range(2):
            policy = clipped_policy_loss(self.logprobs(), self.old_logprobs, advantages, self.mask, CLIP_RANGE)
            value = clipped_value_loss(self.values(), self.old_values, returns, value_mask, CLIP_RANGE)
            mean_policy, mean_value = policy.loss / policy.count, value.loss / value.count
            losses.append((float(mean_policy.detach()), float(mean_value.detach())))
            (mean_policy + VALUE_WEIGHT * mean_value).backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses


def trl_losses(update: Update, micro_batches: int) -> list[list[tuple[float, float]]]:
    """Return TRL's policy and value loss of each micro-batch, by epoch."""
    means = update.recorded["mean"]  # per micro-batch: squared error, its clip fraction, policy loss, its clip fraction
    pairs = [(policy, error / 2) for error, policy in zip(means[0::4], means[2::4])]
    return [pairs[start : start + micro_batches] for start in range(0, len(pairs), micro_batches)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=0)


def bessel(whitened: Tensor, count: int) -> Tensor:
    """Convert whitening by the variance over N to that over N - 1, as in TRL."""
    return whitened * ((count - 1) / count) ** 0.5


@pytest.mark.parametrize("kind", ["full", "ragged"])
def test_logprobs_values_and_scores_are_the_same(kind, request):
    update = request.getfixturevalue(kind)
    ours, width = LitUpdate(update), update.prompt_width
    mask = ours.mask
    assert_near(ours.old_logprobs[mask], update.recorded["logprobs"][0][mask])
    assert_near(ours.ref_logprobs[mask], update.recorded["logprobs"][1][mask])
    (values, _), (_, scores) = update.recorded["reward"][:2]
    assert_near(ours.old_values[mask], values[:, width - 1 : -1].squeeze(-1)[mask])
    assert_near(ours.scores, scores)


def test_updates_are_equal_where_no_response_ends_early(full):
    ours = LitUpdate(full)
    advantages, returns = ours.advantages()
    raw, mask, whitened = full.recorded["whiten"][0]
    assert mask.all() and ours.mask.all()
    assert_near(returns - ours.old_values, raw)
    assert_near(bessel(advantages, mask.numel()), whitened)
    assert (advantages - whitened).abs().max() > 1e-3  # the one intended difference is visible with 80 tokens
    (trl,) = zip(*trl_losses(full, 1))
    losses = ours.run_epochs(advantages, returns, ours.mask)
    assert losses[0] == pytest.approx(trl[0], abs=1e-4)
    losses_bessel = LitUpdate(full).run_epochs(bessel(advantages, mask.numel()), returns, ours.mask)
    for actual, expected in zip(losses_bessel, trl):
        assert actual == pytest.approx(expected, abs=1e-5)
    print("\nfull: TRL", trl, "ours", losses, "ours with N - 1", losses_bessel)
    assert abs(trl[1][0] - trl[0][0]) > 1e-2 and abs(trl[1][1] - trl[0][1]) > 1e-3  # the step changed the losses


def rewards_like_trl(ours: LitUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and mask like TRL's: the score one token after the end, and that token an action.

    The score of a response of full width stays on its last token.
    """
    last = last_token_index(ours.mask)
    score_index = (last + 1).clamp(max=WIDTH - 1)
    columns = torch.arange(WIDTH)
    has_eos = (ours.ids[:, -WIDTH:] == EOS).any(1)
    penalized = ours.scores - torch.where(has_eos, 0.0, PENALTY)  # here missing_eos.penalty
    rewards = torch.where(ours.mask, -BETA * k1(ours.old_logprobs, ours.ref_logprobs), 0.0)
    rewards = rewards + torch.where(columns == score_index[:, None], penalized[:, None], 0.0)
    return rewards, ours.old_values, extend_by_one(ours.mask)


def test_updates_differ_only_in_the_token_of_the_score_where_responses_end_early(ragged):
    ours = LitUpdate(ragged)
    raw, mask, whitened = ragged.recorded["whiten"][0]
    assert torch.equal(mask, ours.mask)
    _, returns = ours.advantages()
    assert (returns - ours.old_values - raw)[mask].abs().max() > 1e-2  # without the change they differ
    rewards, values, extended = rewards_like_trl(ours)
    advantages, returns = gae(rewards, values, extended, 1.0, LAMBDA)
    assert_near(advantages[extended], raw[extended])
    mean, variance = mean_and_variance(moments(advantages, ours.mask))
    advantages = bessel(whiten(advantages, ours.mask, mean, variance), int(ours.mask.sum()))
    assert_near(advantages, torch.where(mask, whitened, 0.0))
    # the first epoch, before any step: TRL's means of micro-batches, weighted by their tokens, are the mean over tokens
    (losses, *_) = ours.run_epochs(advantages, returns, extended)
    micro_losses = trl_losses(ragged, 4)[0]
    rows = [slice(2 * number, 2 * number + 2) for number in range(4)]
    for index, mask in ((0, ours.mask), (1, extended)):
        counts = [int(mask[each].sum()) for each in rows]
        weighted = sum(loss[index] * count for loss, count in zip(micro_losses, counts)) / sum(counts)
        assert losses[index] == pytest.approx(weighted, abs=1e-5)
    mean_of_means = sum(loss[1] for loss in micro_losses) / 4
    assert abs(mean_of_means - losses[1]) > 1e-3
