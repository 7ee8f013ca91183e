"""The PPO update beside TRL 1.12.0's: the same four models, tokens and scores (docs/ppo.md says what differs and why).

TRL's PPOTrainer runs in a process of its own. `make peers` installs it into `.venv-peers/`; without it these are
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

ROWS, WIDTH, END = 8, 10, 1
BETA, LAMBDA, CLIP, VALUE_WEIGHT, RATE, PENALTY = 0.3, 0.95, 0.2, 0.1, 0.5, 1.5
LENGTHS = {"full": [WIDTH] * ROWS, "ragged": [3, 10, 1, 7, 9, 10, 2, 5]}


class Update(NamedTuple):
    """What both computed for one kind of responses."""

    given: Tensor  # (B, T)
    prompt_width: int
    kept: dict[str, list[Any]]  # TRL's
    folder: Path


def write_models(folder: Path, tokenizer: Any) -> None:
    """Four models of random weights; the reference is near the policy."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        eos_token_id=END,
        bos_token_id=END,
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


def tokens(lengths: list[int]) -> tuple[Tensor, int]:
    """Random prompts and responses; a response shorter than the width ends with the end token."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda count: torch.randint(4, 32, (count,), generator=generator).tolist()  # noqa: E731
    prompts, _ = pad_left([draw(2 + row % 4) for row in range(len(lengths))], 0)
    responses, _ = pad_right([draw(n) if n == WIDTH else [*draw(n - 1), END] for n in lengths], 0)
    return torch.cat([prompts, responses], 1), prompts.shape[1]


def run_trl(folder: Path, tokenizer: Any, lengths: list[int], accumulate: int, **settings: Any) -> Update:
    """Let TRL make two epochs of one minibatch."""
    write_models(folder, tokenizer)
    given, prompt_width = tokens(lengths)
    torch.save({"input_ids": given, "prompt_width": prompt_width}, folder / "given.pt")
    both = {"kl_coef": BETA, "gamma": 1.0, "lam": LAMBDA, "cliprange": CLIP, "cliprange_value": CLIP}
    own = {"vf_coef": VALUE_WEIGHT, "num_ppo_epochs": 2, "gradient_accumulation_steps": accumulate, "sgd_rate": RATE}
    (folder / "settings.json").write_text(json.dumps({**both, **own, "kl_estimator": "k1", **settings}))
    paths = os.pathsep.join([str(TRL), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("trl_update.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Update(given, prompt_width, torch.load(folder / "kept.pt", weights_only=False), folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Update:
    """No response ends: the score has only one place to go."""
    return run_trl(tmp_path_factory.mktemp("full"), tokenizer, LENGTHS["full"], 1)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Update:
    """Responses of 1 to 10 tokens, in 4 micro-batches, with a penalty for those that do not end."""
    folder = tmp_path_factory.mktemp("ragged")
    return run_trl(folder, tokenizer, LENGTHS["ragged"], 4, missing_eos_penalty=PENALTY)


def one_further(mask: Tensor) -> Tensor:
    """A mask with one more place behind each response that leaves room for it."""
    return torch.arange(WIDTH) <= last_token_index(mask)[:, None] + 1


class Ours:
    """The update by this library, on the same models and tokens."""

    def __init__(self, update: Update) -> None:
        loading = ModelLoadingConfig()
        tokenizer = load_tokenizer(str(update.folder / "policy"), loading)
        self.ids, self.attention = update.given, (update.given != 0).long()
        self.mask = self.attention[:, update.prompt_width :].bool()  # (B, R)
        # one token further: TRL has a value behind the end, and here nothing is computed there otherwise
        self.wide = torch.cat([self.attention[:, : update.prompt_width], one_further(self.mask).long()], 1)
        load = lambda name: str(update.folder / name)  # noqa: E731
        self.policy = load_causal_lm(load("policy"), tokenizer, loading)
        self.critic = load_scalar_model(load("critic"), tokenizer, loading)
        reward = load_scalar_model(load("reward"), tokenizer, loading).eval()
        with torch.no_grad():
            self.old, self.old_values = self.logprobs(), self.values()
            reference = load_causal_lm(load("reference"), tokenizer, loading)
            self.reference = response_logprobs(reference, self.ids, self.attention, WIDTH, SamplingParams(WIDTH))
            self.scores = reward.score(self.ids, self.attention)

    def logprobs(self) -> Tensor:
        return response_logprobs(self.policy, self.ids, self.attention, WIDTH, SamplingParams(WIDTH))

    def values(self) -> Tensor:
        return response_values(self.critic, pack_batch(self.ids, self.wide, WIDTH, self.critic.model))

    def advantages(self) -> tuple[Tensor, Tensor]:
        ended = torch.ones(ROWS, dtype=torch.bool)
        parts = (self.old, self.reference, self.old_values, self.scores, ended, self.old, torch.arange(ROWS))
        trajectories = Trajectories(self.ids, self.attention, self.mask, *parts)
        advantages, returns = GAE(1.0, LAMBDA).estimate(compute_rewards(trajectories, BETA), trajectories)
        assert returns is not None
        return advantages, returns

    def epochs(self, advantages: Tensor, returns: Tensor, value_mask: Tensor) -> list[tuple[float, float]]:
        """Policy and value loss of two epochs, with a step of plain gradient descent between them."""
        parameters = [*self.policy.parameters(), *self.critic.parameters()]
        optimizer, losses = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=RATE), []
        for _ in range(2):
            policy = clipped_policy_loss(self.logprobs(), self.old, advantages, self.mask, CLIP)
            value = clipped_value_loss(self.values(), self.old_values, returns, value_mask, CLIP)
            mean_policy, mean_value = policy.loss / policy.count, value.loss / value.count
            losses.append((float(mean_policy.detach()), float(mean_value.detach())))
            (mean_policy + VALUE_WEIGHT * mean_value).backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses


def trl_losses(update: Update, micro_batches: int) -> list[list[tuple[float, float]]]:
    """TRL's policy and value loss of each micro-batch, epoch by epoch."""
    means = update.kept["mean"]  # of a micro-batch: squared error, its clip share, policy loss, its clip share
    pairs = [(policy, error / 2) for error, policy in zip(means[0::4], means[2::4])]
    return [pairs[start : start + micro_batches] for start in range(0, len(pairs), micro_batches)]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one.float(), other.float(), atol=tolerance, rtol=0)


def bessel(whitened: Tensor, count: int) -> Tensor:
    """Whitened by the variance over N - 1, as TRL does, instead of over N."""
    return whitened * ((count - 1) / count) ** 0.5


@pytest.mark.parametrize("kind", ["full", "ragged"])
def test_logprobs_values_and_scores_are_the_same(kind, request):
    update = request.getfixturevalue(kind)
    ours, width = Ours(update), update.prompt_width
    mask = ours.mask
    close(ours.old[mask], update.kept["logprobs"][0][mask])
    close(ours.reference[mask], update.kept["logprobs"][1][mask])
    (values, _), (_, scores) = update.kept["reward"][:2]
    close(ours.old_values[mask], values[:, width - 1 : -1].squeeze(-1)[mask])
    close(ours.scores, scores)


def test_where_no_response_ends_early_the_update_is_the_same(full):
    ours = Ours(full)
    advantages, returns = ours.advantages()
    raw, mask, whitened = full.kept["whiten"][0]
    assert mask.all() and ours.mask.all()
    close(returns - ours.old_values, raw)
    close(bessel(advantages, mask.numel()), whitened)
    assert (advantages - whitened).abs().max() > 1e-3  # 80 tokens: the one intended difference shows
    (trl,) = zip(*trl_losses(full, 1))
    mine = ours.epochs(advantages, returns, ours.mask)
    assert mine[0] == pytest.approx(trl[0], abs=1e-4)
    again = Ours(full).epochs(bessel(advantages, mask.numel()), returns, ours.mask)
    for same, theirs in zip(again, trl):
        assert same == pytest.approx(theirs, abs=1e-5)
    print("\nfull: TRL", trl, "ours", mine, "ours with N - 1", again)
    assert abs(trl[1][0] - trl[0][0]) > 1e-2 and abs(trl[1][1] - trl[0][1]) > 1e-3  # the step did something


def behind_the_end(ours: Ours) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask as TRL has them: the score one place behind the end, and that place a step of its own.

    A response of the full width has no such place; its score stays on the last token.
    """
    last = last_token_index(ours.mask)
    place = (last + 1).clamp(max=WIDTH - 1)
    columns = torch.arange(WIDTH)
    ended = (ours.ids[:, -WIDTH:] == END).any(1)
    punished = ours.scores - torch.where(ended, 0.0, PENALTY)  # TRL subtracts; here missing_eos may do either
    rewards = torch.where(ours.mask, -BETA * k1(ours.old, ours.reference), 0.0)
    rewards = rewards + torch.where(columns == place[:, None], punished[:, None], 0.0)
    return rewards, ours.old_values, one_further(ours.mask)


def test_a_response_that_ends_differs_by_the_place_of_the_score_and_by_nothing_else(ragged):
    ours = Ours(ragged)
    raw, mask, whitened = ragged.kept["whiten"][0]
    assert torch.equal(mask, ours.mask)
    _, returns = ours.advantages()
    assert (returns - ours.old_values - raw)[mask].abs().max() > 1e-2  # as they are, they are not the same
    rewards, values, wider = behind_the_end(ours)
    moved, moved_returns = gae(rewards, values, wider, 1.0, LAMBDA)
    close(moved[wider], raw[wider])
    mean, variance = mean_and_variance(moments(moved, ours.mask))
    moved_whitened = bessel(whiten(moved, ours.mask, mean, variance), int(ours.mask.sum()))
    close(moved_whitened, torch.where(mask, whitened, 0.0))
    # the first epoch, before any step: TRL's means of micro-batches, weighted by their tokens, are the mean over tokens
    (mine, *_) = ours.epochs(moved_whitened, moved_returns, wider)
    micro = trl_losses(ragged, 4)[0]
    rows = [slice(2 * number, 2 * number + 2) for number in range(4)]
    for which, tokens_of in ((0, ours.mask), (1, wider)):
        counts = [int(tokens_of[each].sum()) for each in rows]
        weighted = sum(loss[which] * count for loss, count in zip(micro, counts)) / sum(counts)
        assert mine[which] == pytest.approx(weighted, abs=1e-5)
    plain = sum(loss[1] for loss in micro) / 4
    assert abs(plain - mine[1]) > 1e-3  # a mean of means is another number
