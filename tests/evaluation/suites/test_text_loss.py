"""The loss on held-out text against plain transformers."""

import json
from pathlib import Path

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.suites.text_loss import TextLoss


def test_the_loss_is_that_of_transformers_over_blocks_of_the_text(tiny: EvaluatedModel, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w{n + 2} w3"}) + "\n" for n in range(12)))
    suite = TextLoss({"novels": str(path)}, seq_len=10, limit=3)
    suite.check([tiny])
    metric = suite.run(tiny, tiny).metrics["novels"]
    ids = [token for n in range(12) for token in (*tiny.tokenizer.encode(f"w{n} w{n + 1} w{n + 2} w3"), 1)]
    blocks = torch.tensor(ids[:30]).view(3, 10)
    with torch.no_grad():
        losses = [float(tiny.model(input_ids=block[None], labels=block[None]).loss) for block in blocks]
    assert metric.value == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (metric.count, metric.unit, metric.better) == (3, "nats", "lower")
    assert metric.low is not None and metric.low < metric.value


@pytest.mark.parametrize("settings", [{"paths": {}}, {"seq_len": 1}, {"limit": 0}])
def test_settings_that_measure_nothing_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match="text loss"):
        TextLoss(**{"paths": {"novels": "text.jsonl"}, **settings})


def test_a_missing_text_is_found_before_any_model_is_loaded(tiny: EvaluatedModel) -> None:
    with pytest.raises(UserError, match=r"no data file 'nowhere/text.jsonl'"):
        TextLoss({"novels": "nowhere/text.jsonl"}).check([tiny])


def test_blocks_longer_than_the_positions_of_a_model_are_refused(tiny: EvaluatedModel) -> None:
    with pytest.raises(UserError, match="seq_len 129 exceeds the 128 positions of model 'tiny'"):
        TextLoss({"novels": [{"text": "w1"}]}, seq_len=129).check([tiny])
