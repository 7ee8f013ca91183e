"""The reward model: it learns to rank, K completions cost K rows, and batch sizes and ranks change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.modules import RewardModule
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import (
    assert_same_weights,
    full_weights,
    largest_change,
    quiet_trainer,
    rankings,
    sgd,
    write_rows,
)


def test_it_learns_to_rank_by_a_known_property(llama, tmp_path):
    data = ComparisonDataModule(
        write_rows(tmp_path / "rows.jsonl", rankings(120)),
        validation_path=write_rows(tmp_path / "unseen.jsonl", rankings(60, seed=1)),
        micro_batch_size=8,
    )
    module = RewardModule(llama, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    trainer = quiet_trainer(tmp_path, max_epochs=5)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["validation/accuracy"] > 0.9
    assert trainer.callback_metrics["validation/loss"] < 0.4


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_a_ranking_of_k_costs_k_rows_and_its_prompt_is_computed_once(shared_prompt, llama, tmp_path):
    rows = rankings(6)
    K = [len(row["completions"]) for row in rows]
    passes: list[tuple[int, int]] = []  # rows and real tokens of each forward pass

    class Counting(RewardModule):
        def configure_model(self) -> None:
            super().configure_model()
            self.model.model.base_model.register_forward_pre_hook(self.record, with_kwargs=True)

        def record(self, module: Any, args: Any, inputs: Any) -> None:
            ids = inputs["input_ids"]
            passes.append((len(ids), int((ids != self.tokenizer.pad_token_id).sum())))

    data = ComparisonDataModule(write_rows(tmp_path / "rows.jsonl", rows), micro_batch_size=6)
    quiet_trainer(tmp_path, max_epochs=1).fit(Counting(llama, shared_prompt=shared_prompt), datamodule=data)
    prompts, completions = [len(row["prompt"].split()) for row in rows], 5 * sum(K)  # four words and the end token
    if shared_prompt:
        ((count, tokens),) = passes
        assert count <= 6 < sum(K), "packed: a row holds one ranking or more"
        assert tokens == sum(prompts) + completions
    else:
        assert passes == [(sum(K), sum(k * p for k, p in zip(K, prompts)) + completions)]


def train(model: str, path: str, folder: Path, micro_batch_size: int, **settings: Any) -> Any:
    data = ComparisonDataModule(path, micro_batch_size=micro_batch_size)
    module = RewardModule(model, sgd(0.3))
    quiet_trainer(folder, max_epochs=2, gradient_clip_val=1.0, **settings).fit(module, datamodule=data)
    return full_weights(module)


def test_micro_batches_and_ranks_change_no_weight(llama, tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rankings(24))
    expected = train(llama, path, tmp_path, 8)
    start = list(load_scalar_model(llama, tokenizer, ModelLoadingConfig()).parameters())
    assert largest_change(start, expected) > 1e-2
    for micro_batch_size, accumulate in ((4, 2), (1, 8)):
        assert_same_weights(
            train(llama, path, tmp_path, micro_batch_size, accumulate_grad_batches=accumulate), expected
        )
    ddp = {"accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    for weights in on_ranks(lambda: train(llama, path, tmp_path, 2, **ddp), tmp_path):
        assert_same_weights(weights, expected)


def validate(model: str, path: str, folder: Path, micro_batch_size: int, **settings: Any) -> dict[str, float]:
    data = ComparisonDataModule(path, validation_path=path, micro_batch_size=micro_batch_size)
    metrics = quiet_trainer(folder, **settings).validate(RewardModule(model), datamodule=data, verbose=False)[0]
    return {name.removeprefix("validation/"): value for name, value in metrics.items()}


def test_validation_metrics_are_those_of_the_full_set(llama, tokenizer, tmp_path):
    rows = rankings(9)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    model, losses, correct, sure = load_scalar_model(llama, tokenizer, ModelLoadingConfig()).eval(), [], [], []
    for row in rows:  # pair by pair, one row at a time
        scores = []
        for completion in row["completions"]:
            ids = torch.tensor([[*tokenizer.encode(row["prompt"]), *tokenizer.encode(completion), 1]])
            scores.append(float(model.score(ids, torch.ones_like(ids)).detach()))
        K = range(len(scores))
        margins = [scores[i] - scores[j] for i in K for j in K if row["ranks"][i] < row["ranks"][j]]
        probabilities = torch.sigmoid(torch.tensor(margins, dtype=torch.float64))
        losses.append(float(-probabilities.log().mean()))
        correct += [float(margin > 0) for margin in margins]
        sure += torch.maximum(probabilities, 1 - probabilities).tolist()
    bins: dict[int, list[tuple[float, float]]] = {}
    for probability, right in zip(sure, correct):
        bins.setdefault(int(probability * 20), []).append((probability, right))
    gaps = [abs(sum(p for p, _ in members) - sum(r for _, r in members)) for members in bins.values()]
    expected = {
        "loss": sum(losses) / len(losses),
        "accuracy": sum(correct) / len(correct),
        "ece": sum(gaps) / len(sure),
    }
    assert len(bins) > 1 and 0 < expected["accuracy"] < 1
    for micro_batch_size in (1, 2, 9):
        assert validate(llama, path, tmp_path, micro_batch_size) == pytest.approx(expected, rel=1e-4)
    ddp = {"devices": 2, "strategy": "ddp"}
    for metrics in on_ranks(lambda: validate(llama, path, tmp_path, 2, **ddp), tmp_path):
        assert metrics == pytest.approx(expected, rel=1e-4)


def test_an_uncentered_checkpoint_takes_the_centering_of_the_module_away(llama, tmp_path):
    module = RewardModule(llama, sgd(0.1), adapter=LoRA(rank=2))
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    data = ComparisonDataModule(rankings(4), validation_path=rankings(2), micro_batch_size=4)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "raw.ckpt")
    module.model.center(3.0, 2.0)
    trainer.validate(module, datamodule=data, ckpt_path=tmp_path / "raw.ckpt", verbose=False)
    assert not module.model.is_centered
    assert (float(module.model.shift), float(module.model.scale)) == (0.0, 1.0)
