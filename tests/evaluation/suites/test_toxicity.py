"""RealToxicityPrompts: null scores, empty continuations, scorers that fail; the Perspective API on loopback."""

import copy
import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.toxicity import KeywordToxicity, Perspective, ToxicityClassifier, ToxicityScorer
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.suites.bias import PREFIXES
from lit_rlhf.evaluation.suites.toxicity import RealToxicityPrompts, balance_by_toxicity, read_text_and_toxicity
from tests.helpers.services import Reply, serve

NO_CACHE = Cache(None)


def scored(value: float) -> Reply:
    return Reply({"attributeScores": {"TOXICITY": {"summaryScore": {"value": value, "type": "PROBABILITY"}}}})


@pytest.fixture
def prompts(tmp_path) -> str:
    toxicity = [0.1, 0.3, 0.6, 0.9, None, 0.2]
    rows = [{"prompt": {"text": f"w{i} w{i + 1}", "toxicity": value}} for i, value in enumerate(toxicity)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


class FixedScorer(ToxicityScorer):
    """Returns a fixed score per text, None for any other text."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores, self.texts = scores, []

    def score(self, texts, cache):
        self.texts += texts
        return [self.scores.get(text) for text in texts]


def test_empty_continuations_and_those_without_a_score_are_missing_not_zero(tiny, prompts, monkeypatch) -> None:
    texts = [" calm", "", " rude", "unknown", " calm", "  "]
    prompts_by_prefix = []
    monkeypatch.setattr(
        type(tiny),
        "generate",
        lambda self, p, *_, **__: prompts_by_prefix.append(p) or [Completion(t, True, 1) for t in texts],
    )
    scorer = FixedScorer({"calm": 0.1, "rude": 0.7})
    result = RealToxicityPrompts(prompts, scorer, prefixes=["basic", "respectful"]).run(tiny, tiny)
    metric = result.metrics["basic"]
    assert (metric.value, metric.count, metric.missing) == (pytest.approx(0.3), 3, 3)
    assert result.metrics["basic, toxic"].value == pytest.approx(1 / 3)
    assert result.metrics["basic: prompt 0 to 0.25"][:2] == (pytest.approx(0.1), 1)  # the other one is empty
    assert result.metrics["basic: prompt 0.75 to 1"].value is None
    assert result.notes == [
        "1 prompts have no toxicity of their own: in no bin",
        "2 continuations (basic) are empty: no score",
        "1 continuations (basic) got no score",
        "2 continuations (respectful) are empty: no score",
        "1 continuations (respectful) got no score",
    ]
    assert "" not in scorer.texts
    assert prompts_by_prefix[1] == [PREFIXES["respectful"] + prompt for prompt in prompts_by_prefix[0]]


def test_a_score_off_the_scale_stops(tiny, prompts, monkeypatch) -> None:
    monkeypatch.setattr(type(tiny), "generate", lambda self, p, *_, **__: [Completion("calm", True, 1) for _ in p])
    with pytest.raises(UserError, match=r"FixedScorer gave a toxicity of 1\.5"):
        RealToxicityPrompts(prompts, FixedScorer({"calm": 1.5})).run(tiny, tiny)


def test_balancing_takes_equally_many_of_each_bin(evaluation_data) -> None:
    rows = list(read_rows(str(evaluation_data / "realtoxicityprompts.jsonl.gz")))
    assert len(rows) == 5000
    assert sum(read_text_and_toxicity(row, "prompt")[1] is None for row in rows) == 19
    assert sum(read_text_and_toxicity(row, "continuation")[1] is None for row in rows) == 32
    balanced = [read_text_and_toxicity(row, "prompt")[1] for row in balance_by_toxicity(rows)]
    assert [sum(low <= value < low + 0.25 for value in balanced) for low in (0, 0.25, 0.5)] == [612] * 3
    assert len(balanced) == 4 * 612
    few = [read_text_and_toxicity(row, "prompt")[1] for row in balance_by_toxicity(rows, 43)]
    assert [sum(int(value * 4) == quarter for value in few) for quarter in range(4)] == [10] * 4
    with pytest.raises(UserError, match=r"no prompts of every quarter of toxicity .* limit 3"):
        balance_by_toxicity(rows, 3)


def test_a_keyword_list(tmp_path) -> None:
    assert KeywordToxicity().score(["You STUPID fox!", "stupidity aside", "a fox"], NO_CACHE) == [1.0, 0.0, 0.0]
    (tmp_path / "words.txt").write_text("Fox\n\n")
    assert KeywordToxicity(str(tmp_path / "words.txt")).score(["You stupid fox!", "a dog"], NO_CACHE) == [1.0, 0.0]


def test_the_perspective_api(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", "secret")
    scores = {"kind": 0.02, "rude": 0.93}

    def answer(request, before):
        text = request.payload["comment"]["text"]
        if text == "strange":
            return Reply({"error": {"message": "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"}}, status=400)
        if text == "rude" and before == 0:
            return Reply(status=429)
        return scored(7.0) if text == "nonsense" else scored(scores[text])

    cache = Cache(tmp_path, progress=False)
    with serve(answer) as service:
        scorer = Perspective(rate=200.0, timeout=2.0, retries=1, url=f"{service.url}/analyze")
        texts = ["kind", "rude", "strange", "nonsense"]
        assert scorer.score(texts, cache) == [0.02, 0.93, None, None]
        assert len(service.requests) == 1 + 2 + 1 + 2
        first = service.requests[0]
        assert first.path == "/analyze" and "secret" in first.headers.values()
        assert first.payload["requestedAttributes"] == {"TOXICITY": {}} and first.payload["doNotStore"] is True
        scorer.score(texts, cache)
        assert [r.payload["comment"]["text"] for r in service.requests[6:]].count("kind") == 0  # cached


def test_perspective_without_a_key_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    with pytest.raises(UserError, match="PERSPECTIVE_API_KEY holds no key"):
        Perspective().score(["text"], NO_CACHE)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        id2label={0: "insult", 1: "toxicity", 2: "threat"},
        label2id={"insult": 0, "toxicity": 1, "threat": 2},
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_classifier(classifier, tokenizer, tmp_path) -> None:
    texts = ["w1 w2 w3", "w4", "w1 w2 w3 w4 w5 w6"]
    model = LlamaForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer.encode(text)])).logits[0] for text in texts]
    found = ToxicityClassifier(classifier, "Toxicity", batch_size=2).score(texts, NO_CACHE)
    assert found == pytest.approx([float(row[1].sigmoid()) for row in logits], abs=1e-5)
    exclusive = ToxicityClassifier(classifier, "2", multi_label=False).score(texts, NO_CACHE)
    assert exclusive == pytest.approx([float(row.softmax(-1)[2]) for row in logits], abs=1e-5)
    with pytest.raises(UserError, match="has no label 'rude'; it has insult, toxicity, threat"):
        ToxicityClassifier(classifier, "rude").score(texts, NO_CACHE)


@pytest.mark.parametrize("toxicity", ["n/a", "0.3", 1.7, -0.1, True, [0.1], {"score": 1}, float("inf"), 10**400])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_toxicity_that_is_no_share_is_one_line_in_check(tmp_path, toxicity, balanced) -> None:
    rows = [{"prompt": {"text": "a", "toxicity": value}} for value in (0.1, None, float("nan"), toxicity)]
    (tmp_path / "rtp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"^rtp\.jsonl:4: toxicity must be a number from 0 to 1, got") as caught:
        RealToxicityPrompts(str(tmp_path / "rtp.jsonl"), KeywordToxicity(), balanced=balanced).check([])
    assert "\n" not in str(caught.value)


def test_a_toxicity_of_nan_is_missing_as_null_is(tmp_path) -> None:
    (tmp_path / "rtp.jsonl").write_text('{"prompt": {"text": "a", "toxicity": NaN}}\n{"prompt": {"text": "b"}}\n')
    suite = RealToxicityPrompts(str(tmp_path / "rtp.jsonl"), KeywordToxicity())
    assert suite._read_prompts() == [("a", None), ("b", None)]


def test_a_classifier_without_a_padding_token_and_texts_over_its_positions(classifier, tokenizer, tmp_path, capsys):
    shutil.copytree(classifier, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"max_position_embeddings": 8, "pad_token_id": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    own.save_pretrained(tmp_path / "model")
    texts = ["w1 w2 w3", "w4", " ".join(f"w{n}" for n in range(12))]
    found = ToxicityClassifier(str(tmp_path / "model")).score(texts, NO_CACHE)
    cut = [*texts[:2], " ".join(texts[2].split()[:8])]
    assert found == pytest.approx(ToxicityClassifier(classifier).score(cut, NO_CACHE), abs=1e-5)
    assert "1 of 3 texts exceed its context and lose their end" in capsys.readouterr().out
