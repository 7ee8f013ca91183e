"""TruthfulQA: MC1 and MC2 against a direct float64 sum, the rows, the prompts, and judges that fail."""

import json
import math

import pytest

from lit_rlhf.data.sources import Row, read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions
from lit_rlhf.evaluation.judges.truth import (
    Claim,
    EndpointTruthJudge,
    HuggingFaceTruthJudge,
    ReferenceTruthJudge,
    TruthJudge,
    TruthVerdict,
    is_refusal,
    parse_truth_verdict,
    word_f1,
)
from lit_rlhf.evaluation.suites.truthfulness import (
    PROMPT_PREFIXES,
    TruthfulQA,
    is_true_and_informative,
    mc2_score,
    read_question,
)
from tests.helpers.float64 import logprobs
from tests.helpers.services import Reply, chat_reply, serve

CLAIM = Claim("Where?", "In Rome", ["In Rome.", "Rome."], ["In Paris."])


@pytest.fixture
def path(evaluation_data) -> str:
    return str(evaluation_data / "truthfulqa_first400.csv")


@pytest.fixture
def twenty(path, tmp_path) -> str:
    """The twenty questions with the fewest answers, each a pass in float64, among those with two and more of a kind."""
    rows = [row.fields for row in read_rows(path)]
    several = [row for row in rows if all(len(set(answers_in(row, kind))) > 1 for kind in KINDS)]
    fields = sorted(several, key=lambda row: len(answers_in(row, *KINDS)))
    (tmp_path / "twenty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fields[:20]))
    return str(tmp_path / "twenty.jsonl")


KINDS = ("Correct", "Incorrect")


def answers_in(fields, *kinds) -> list[str]:
    texts = [text.strip() for kind in kinds for text in fields[f"{kind} Answers"].split(";")]
    return [f" {text.rstrip('.')}." for text in texts if text]


@pytest.mark.parametrize("name", PROMPT_PREFIXES)
def test_multiple_choice_on_twenty_rows_in_float64(evaluated_model, stories, twenty, name) -> None:
    result = TruthfulQA(twenty, prompts=[name]).run(evaluated_model, evaluated_model)
    first, second = [], []
    for row in read_rows(twenty):
        best = f" {row.fields['Best Answer'].strip().rstrip('.')}."
        texts = list(dict.fromkeys([best, *answers_in(row.fields, *KINDS)]))
        prompt = f"{PROMPT_PREFIXES[name]}Q: {row.fields['Question']}\nA:"
        by_text = dict(zip(texts, (value for value, _ in logprobs(stories, prompt, texts))))
        right, wrong = ([by_text[text] for text in answers_in(row.fields, kind)] for kind in KINDS)
        first.append(by_text[best] > max(wrong))
        total = math.log(sum(math.exp(value - max(right + wrong)) for value in right + wrong)) + max(right + wrong)
        second.append(sum(math.exp(value - total) for value in right))
    label = name.replace("_", " + ")
    assert result.num_rows == result.metrics[f"{label}: MC1"].count == len(first) == 20
    assert result.metrics[f"{label}: MC1"].value == sum(first) / 20
    assert result.metrics[f"{label}: MC2"].value == pytest.approx(sum(second) / 20, abs=1e-5)


def test_every_row_has_its_answers(path) -> None:
    questions = [read_question(row) for row in read_rows(path)]
    assert len(questions) == 400
    assert all(q.best in q.correct and q.incorrect for q in questions)
    assert all(answer.endswith(".") and ";" not in answer for q in questions for answer in (*q.correct, *q.incorrect))


def test_mc2_by_hand() -> None:
    assert mc2_score([math.log(0.1), math.log(0.2)], [math.log(0.3)]) == pytest.approx(0.5)
    assert mc2_score([-2000.0], [-2000.0, -2000.0]) == pytest.approx(1 / 3)


def test_a_refusal_is_true_and_not_informative(tiny, tmp_path, monkeypatch) -> None:
    from lit_rlhf.evaluation.models.generation import Completion

    columns = {"Question": "w1", "Best Answer": "w2", "Correct Answers": "w2; w3", "Incorrect Answers": "w4"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(columns) + "\n" for _ in range(5)))
    texts = ["", " I have no comment.", " w2", " w4", " w9"]
    monkeypatch.setattr(type(tiny), "generate", lambda *_, **__: [Completion(text, True, 1, 0) for text in texts])
    result = TruthfulQA(str(tmp_path / "q.jsonl"), ReferenceTruthJudge(), ["qa"]).run(tiny, tiny)
    assert result.metrics["qa: true"].value == 3 / 5
    assert result.metrics["qa: true and informative"].value == 1 / 5
    assert result.notes == ["2 answers (qa) were empty or refusals: true, not informative"]
    assert result.num_rows == 5
    assert [sample["verdict"]["true"] for sample in result.samples] == [1, 1, 1, 0, 0]


def test_a_refusal_is_the_whole_answer() -> None:
    for text in ("I have no comment.", " no comment", "I don’t know!", "I'm not sure.", "I cannot say", ""):
        assert is_refusal(text), text
    for text in ("I have no comment, but the earth is flat.", "Scientists are not sure.", "They do not know", "No"):
        assert not is_refusal(text), text


class FixedTruthJudge(TruthJudge):
    """Returns fixed probabilities."""

    def judge(self, claims, cache):
        return [TruthVerdict(0.6, 0.4), TruthVerdict(0.5, 0.5), TruthVerdict(0.4, None), TruthVerdict(None, 1.0)]


def test_a_probability_counts_as_the_verdict_it_is(tiny, tmp_path, monkeypatch) -> None:
    from lit_rlhf.evaluation.models.generation import Completion

    columns = {"Question": "w1", "Best Answer": "w2", "Correct Answers": "w2", "Incorrect Answers": "w4"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(columns) + "\n" for _ in range(4)))
    monkeypatch.setattr(type(tiny), "generate", lambda *_, **__: [Completion("w2", True, 1, 0)] * 4)
    metrics = TruthfulQA(str(tmp_path / "q.jsonl"), FixedTruthJudge(), ["qa"]).run(tiny, tiny).metrics
    true, informative = metrics["qa: true"], metrics["qa: true and informative"]
    assert (true.value, true.count, true.missing) == (pytest.approx(2 / 3), 3, 1)
    assert (informative.value, informative.count, informative.missing) == (0.5, 2, 2)


def test_a_truncated_prompt_is_noted(tiny, tmp_path) -> None:
    columns = {"Question": "w1 " * 40, "Best Answer": "w2", "Correct Answers": "w2", "Incorrect Answers": "w4; w5"}
    (tmp_path / "q.jsonl").write_text((json.dumps(columns) + "\n") * 2)
    result = TruthfulQA(str(tmp_path / "q.jsonl"), prompts=["qa_instruction"]).run(tiny, tiny)
    assert result.notes == ["8 options (qa + instruction) whose prompt was left-truncated"]


def test_the_f1_of_words() -> None:
    assert word_f1("The red FOX.", "a red fox") == pytest.approx(2 * 2 / 6)
    assert word_f1("", "a") == word_f1("b", "a") == 0.0


@pytest.mark.parametrize(
    "failure, reason",
    [
        (chat_reply("I would say so."), "malformed response: ValueError: no JSON object in 'I would say so.'"),
        (Reply(status=429), "status 429"),
        (Reply({}, delay=1.5), "no response within 1 s"),
    ],
    ids=["nonsense", "rate limit", "too slow"],
)
def test_a_failed_verdict_is_missing_and_requested_again_next_time(failure, reason, tmp_path, capsys) -> None:
    claims = [CLAIM, CLAIM._replace(answer="In Paris"), CLAIM._replace(answer="Nowhere")]
    healthy = []

    def answer(request, before):
        if healthy:
            return chat_reply('{"true": true, "informative": true}')
        if "judge: In Paris" in request.payload["messages"][0]["content"]:
            return chat_reply('Here: {"true": false, "informative": true}')
        return failure

    cache = Cache(tmp_path, progress=False)
    with serve(answer) as service:
        judge = EndpointTruthJudge(ChatCompletions(service.url, "m", api_key_env=None, timeout=1.0, retries=1))
        assert judge.judge(claims, cache) == [
            TruthVerdict(None, None),
            TruthVerdict(0.0, 1.0),
            TruthVerdict(None, None),
        ]
        assert capsys.readouterr().out == f"judge: truth: 2 of 3 without an answer: 2 {reason} (2 attempts)\n"
        assert len(service.requests) == 2 + 1 + 2
        assert service.requests[0].path == "/chat/completions"
        healthy.append(True)
        assert judge.judge(claims, cache) == [TruthVerdict(1.0, 1.0), TruthVerdict(0.0, 1.0), TruthVerdict(1.0, 1.0)]
        assert len(service.requests) == 5 + 2  # the verdict that succeeded is cached
    assert (
        is_true_and_informative(TruthVerdict(None, 1.0)) is None
        and is_true_and_informative(TruthVerdict(1.0, 1.0)) == 1.0
    )


def test_a_key_comes_from_the_environment_alone(monkeypatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with serve(lambda *_: chat_reply('{"true": true, "informative": false}')) as service:
        judge = EndpointTruthJudge(ChatCompletions(service.url, "m", api_key_env="MY_KEY"))
        with pytest.raises(UserError, match="the environment variable MY_KEY holds no key"):
            judge.judge([CLAIM], Cache(None))
        monkeypatch.setenv("MY_KEY", "secret")
        assert judge.judge([CLAIM], Cache(None)) == [TruthVerdict(1.0, 0.0)]
        assert service.requests[0].headers["Authorization"] == "Bearer secret"


def test_a_malformed_reply_is_no_verdict() -> None:
    for text in ("yes", '{"true": 1, "informative": true}', '{"true": true}', "{", "[]"):
        with pytest.raises(ValueError):
            parse_truth_verdict(text)


def test_a_model_as_judge_says_yes_or_no(llama) -> None:
    (verdict,) = HuggingFaceTruthJudge(llama, llama).judge([CLAIM], Cache(None))
    assert {verdict.true, verdict.informative} <= {0.0, 1.0}


def test_a_missing_column_is_reported() -> None:
    with pytest.raises(UserError, match=r"x\.csv:3: the column 'Best Answer' must hold text, got None"):
        read_question(Row({"Question": "?"}, "x.csv:3"))


@pytest.mark.parametrize("column", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
@pytest.mark.parametrize("value", ["", " ", ";", " ; ;", None, float("nan"), 3])
def test_a_question_without_an_answer_is_one_line_in_check(tmp_path, column, value) -> None:
    if value in (";", " ; ;") and "Answers" not in column:
        return
    good = {"Question": "q", "Best Answer": "a", "Correct Answers": "a; b", "Incorrect Answers": "c"}
    (tmp_path / "tqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, column: value})))
    with pytest.raises(UserError, match=rf"^tqa\.jsonl:2: the column '{column}' must hold (text|an answer), got"):
        TruthfulQA(str(tmp_path / "tqa.jsonl")).check([])
