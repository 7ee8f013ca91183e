"""Judges: reward models and their independence, endpoints that fail, local models, humans; the preference suite."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_rlhf.data.comparisons import tokenize_rankings
from lit_rlhf.data.records import PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions
from lit_rlhf.evaluation.judges.human_labels import HumanLabels, read_rating
from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS, CompletionPair, RatedItem, Verdict
from lit_rlhf.evaluation.judges.pairwise import ComparisonResult, PairVerdict, compare_completions
from lit_rlhf.evaluation.judges.preference import (
    EndpointJudge,
    HuggingFaceJudge,
    RewardModelJudge,
    parse_rating,
    parse_verdict,
)
from lit_rlhf.evaluation.models import reward_scorer
from lit_rlhf.evaluation.models.evaluated_model import BestOf, EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer, collect_model_paths, render_scored_texts
from lit_rlhf.evaluation.run import Evaluation
from lit_rlhf.evaluation.suites.preference import PairwisePreference, build_agreement_table, labeler_agreement_by_judge
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from tests.helpers.services import Reply, chat_reply, serve

NO_CACHE = Cache(None)


def completion(text: str, finished: bool = True) -> Completion:
    return Completion(text, finished, len(text.split()) + finished)


PAIRS = [
    CompletionPair("w1 w2", {"use_case": "chat"}, completion("w3"), completion("w4 w5")),
    CompletionPair("w2", {"use_case": "qa"}, completion("w6 w7"), completion("w6 w7")),
    CompletionPair("w5 w1 w1", {"use_case": "qa"}, completion("w1", finished=False), completion("w2 w2")),
]


@pytest.fixture(scope="module")
def reward(llama, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = load_tokenizer(llama, ModelLoadingConfig())
    load_scalar_model(llama, tokenizer, ModelLoadingConfig(), seed=4).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_model_scores_prompt_answer_and_end(reward) -> None:
    found = compare_completions(RewardModelJudge(reward), PAIRS, NO_CACHE)
    tokenizer = load_tokenizer(reward, ModelLoadingConfig())
    model = load_scalar_model(reward, tokenizer, ModelLoadingConfig()).eval()

    def score(prompt: str, answer: Completion) -> float:
        ids = tokenizer.encode(prompt) + tokenizer.encode(answer.text) + [tokenizer.eos_token_id] * answer.finished
        with torch.no_grad():
            return float(model.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)))

    expected = [(score(pair.prompt, pair.first), score(pair.prompt, pair.second)) for pair in PAIRS]
    assert [verdict.preference for verdict in found.verdicts] == [0.5 if a == b else float(a > b) for a, b in expected]
    assert found.verdicts[1].preference == 0.5
    shown = [tuple(float(part) for part in verdict.reason.split(" against ")) for verdict in found.verdicts]
    assert shown == [pytest.approx(pair, abs=6e-4) for pair in expected]
    wide = compare_completions(RewardModelJudge(reward, tie_margin=1e9), PAIRS, NO_CACHE)
    assert {verdict.preference for verdict in wide.verdicts} == {0.5}


def test_a_reward_model_gets_prompts_in_its_own_template(reward) -> None:
    conversation = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    headed = "### Instruction:\nw1\n\n### Response:\nw2\n\n### Instruction:\nw3\n\n### Response:\n"
    pair = CompletionPair("w1\n\nw2\n\nw3", {"topic": "w9"}, completion("w3"), completion("w4 w5"), conversation)
    calls: list[list[str]] = []

    def render(template: str | None, pair: CompletionPair) -> str:
        judge = RewardModelJudge(reward, template=template)
        judge._scorer.score = lambda texts, cache: calls.append([each.prompt for each in texts]) or [1.0, 0.0]
        judge.compare([pair], NO_CACHE)
        assert calls[-1][0] == calls[-1][1]
        return calls[-1][0]

    assert render(None, pair) == headed
    assert render("plain", pair) == pair.prompt
    assert render("{{ topic }}: {{ prompt }}", pair) == "w9: " + pair.prompt
    assert render(None, pair._replace(raw_prompt=None)) == pair.prompt
    assert render("instruction", pair._replace(raw_prompt="w7")) == "### Instruction:\nw7\n\n### Response:\n"


@pytest.fixture
def trained(reward, llama, tmp_path) -> Path:
    """A policy's folder as a run leaves it, and a copy of its reward model elsewhere."""
    shutil.copytree(llama, tmp_path / "ppo" / "model")
    shutil.copytree(reward, tmp_path / "copy")
    rewards = [
        {"class_path": "my.Rule"},
        {"class_path": "lit_rlhf.rewards.RewardModelScorer", "init_args": {"model": reward}},
    ]
    recipe = {"model": {"init_args": {"reward": {"class_path": "x.WeightedSum", "init_args": {"rewards": rewards}}}}}
    (tmp_path / "ppo" / "config.yaml").write_text(json.dumps(recipe))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(6)))
    return tmp_path


def test_a_policy_was_trained_against_its_adapter_and_not_against_what_was_only_watched() -> None:
    def part(run: str) -> dict[str, object]:
        return {"class_path": "x.LoRARewardModel", "init_args": {"checkpoint": f"runs/{run}/checkpoints/last.ckpt"}}

    parts = [part("proxy"), part("gold"), {"class_path": "x.R", "init_args": {"model": "runs/other/model"}}]
    weighted = {"class_path": "x.WeightedSum", "init_args": {"rewards": parts, "weights": [1.0, 0.0, -0.5]}}
    assert collect_model_paths(parts[0]) == ["runs/proxy/model"]
    assert collect_model_paths(weighted) == ["runs/proxy/model", "runs/other/model"]


@pytest.mark.parametrize("where", ["same folder", "same weights"])
def test_the_reward_model_a_policy_was_trained_against_is_no_judge(trained, reward, llama, where, monkeypatch) -> None:
    judge = reward if where == "same folder" else str(trained / "copy")
    evaluated_model = EvaluatedModel("ppo", ModelSpec(str(trained / "ppo" / "model")), NO_CACHE)
    baseline = EvaluatedModel("sft", ModelSpec(llama), NO_CACHE)
    path = str(trained / "prompts.jsonl")
    with pytest.raises(UserError, match=r"is the reward model that 'ppo' was trained against .*force: true"):
        PairwisePreference(path, {"rm": RewardModelJudge(judge)}, 4).run(evaluated_model, baseline)
    suites = {"p": PairwisePreference(path, {"rm": RewardModelJudge(judge)}, 4)}
    models = {"sft": baseline.spec, "ppo": evaluated_model.spec}
    monkeypatch.setattr(
        "lit_rlhf.evaluation.models.evaluated_model.load_causal_lm", lambda *_: pytest.fail("a model was loaded")
    )
    with pytest.raises(UserError, match="is the reward model that 'ppo' was trained against"):
        Evaluation(models, "sft", suites, str(trained / "out")).run()
    monkeypatch.undo()
    assert (
        PairwisePreference(path, {"rm": RewardModelJudge(judge, force=True)}, 4).run(evaluated_model, baseline).num_rows
        == 6
    )
    assert PairwisePreference(path, {"rm": RewardModelJudge(judge)}, 4).run(baseline, baseline).num_rows == 6


def test_an_endpoint_judge_and_its_failures(tmp_path) -> None:
    def reply(request, before):
        question = request.payload["messages"][0]["content"]
        if "w1 w2\n" in question:
            return chat_reply('```json\n{"better": "a", "reason": "short"}\n```')
        return chat_reply("hard to say") if "Answer A:\nw1\n" in question else Reply(status=500)

    cache = Cache(tmp_path, progress=False)
    with serve(reply) as service:
        judge = EndpointJudge(ChatCompletions(service.url, "judge-1", api_key_env=None, timeout=1, retries=1))
        judge.endpoint.retries = 0
        found = compare_completions(judge, PAIRS, cache)
        assert found.num_missing == 1
        assert [(v.pair_index, v.preference) for v in found.verdicts] == [(0, 1), (0, 0), (1, 0.5), (1, 0.5)]
        assert found.verdicts[0].reason == "short"
        assert found.first_position_preferences == [1, 1] and found.order_consistency == [0]
        num_requests = len(service.requests)
        compare_completions(judge, PAIRS, cache)
        assert len(service.requests) == num_requests + 2  # only failed requests are repeated


def test_ratings_of_an_endpoint_carry_the_papers_fields() -> None:
    flags = dict.fromkeys(METADATA_FIELDS, False) | {"hallucination": True}
    with serve(lambda *_: chat_reply(json.dumps({"overall": 3, **flags}))) as service:
        judge = EndpointJudge(ChatCompletions(service.url, "m", api_key_env=None))
        ((rating,),) = judge.rate([RatedItem("p", {}, completion("a"))], NO_CACHE)
    assert (rating.overall, rating.flags) == (3, flags)
    assert len(METADATA_FIELDS) == 11  # and the overall quality is the twelfth
    for text in ('{"overall": 8}', '{"overall": "3"}', '{"overall": true}', "none"):
        with pytest.raises(ValueError):
            parse_rating(text)
    for text in ('{"better": "C"}', "A", "{"):
        with pytest.raises(ValueError):
            parse_verdict(text)


def test_a_local_model_compares_both_orders(llama) -> None:
    found = compare_completions(HuggingFaceJudge(llama), PAIRS, NO_CACHE)
    assert len(found.verdicts) == 6 and found.num_missing == 0
    # its template leaves two words of its vocabulary: unknown ones are equally likely, so all are ties
    assert compare_completions(HuggingFaceJudge(llama, tie_margin=1e9), PAIRS, NO_CACHE).compute_win_rate().rate == 0.5


def test_truncation_by_a_judging_model_is_reported(llama, reward, capsys) -> None:
    pair = CompletionPair("w1 " * 130, {}, completion("w3"), completion("w4"))
    compare_completions(HuggingFaceJudge(llama), [pair], NO_CACHE)
    compare_completions(RewardModelJudge(reward), [pair], NO_CACHE)
    output = capsys.readouterr().out
    assert (
        output.count(f"judge {llama}: 1 of 1 prompts exceed its context and are left-truncated\n") == 2
    )  # both orders
    assert output.count(f"{reward}: 2 of 2 texts exceed its context and are left-truncated\n") == 1


def test_human_labels_are_found_by_text_in_either_order(tmp_path) -> None:
    rows = [
        {"prompt": "w1 w2", "first": "w4 w5", "second": "w3", "preference": "first", "labeler": "ann"},
        {"prompt": "w1 w2", "first": "w3", "second": "w4 w5", "preference": "tie", "labeler": "bob"},
        {"prompt": "w5 w1 w1", "first": "w1", "second": "w2 w2", "preference": None, "labeler": None},
        {"prompt": "w1 w2", "answer": "w3", "overall": 6, "hallucination": "yes", "labeler": "ann"},
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    humans = HumanLabels(str(path))
    assert humans.compare(PAIRS, NO_CACHE)[0] == [Verdict("ann", 0.0), Verdict("bob", 0.5)]
    found = compare_completions(humans, PAIRS, NO_CACHE)
    assert (found.num_missing, found.compute_win_rate().rate) == (1, pytest.approx((0 + 0.5 + 0.5) / 3))
    ((rating,), *others) = humans.rate([RatedItem(pair.prompt, {}, pair.first) for pair in PAIRS], NO_CACHE)
    assert (rating.overall, rating.flags, others) == (6, {"hallucination": True}, [[], []])


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "p", "first": "a", "second": "b", "preference": "A"},
            "preference is 'A'; it is first, second or tie",
        ),
        ({"prompt": "p", "answer": "a", "overall": 9}, "an overall quality of 9 is not from 1 to 7"),
        ({"prompt": "p", "answer": "a", "overall": "good"}, "overall must be a whole number"),
        ({"prompt": "p", "answer": "a", "overall": 1, "hallucination": "maybe"}, "hallucination must be true or false"),
        ({"prompt": 3, "first": "a", "second": "b", "preference": "tie"}, "prompt must be text, got 3"),
    ],
)
def test_malformed_labels_are_refused(row, message, tmp_path) -> None:
    (tmp_path / "labels.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        HumanLabels(str(tmp_path / "labels.jsonl")).compare(PAIRS, NO_CACHE)


def test_the_suite_against_itself_is_one_half_and_writes_annotation_files(trained, reward, llama) -> None:
    path = str(trained / "prompts.jsonl")
    baseline = EvaluatedModel("sft", ModelSpec(llama), NO_CACHE)
    other = EvaluatedModel("best", ModelSpec(llama, best_of=BestOf(reward, n=24)), NO_CACHE)
    judges = {"rm": RewardModelJudge(reward), "local": HuggingFaceJudge(llama)}
    suite = PairwisePreference(path, judges, 5, temperatures=[1.0, 0.0], annotation_dir=str(trained / "label"))
    same = suite.run(baseline, baseline).metrics
    for label in ("T = 1, rm", "greedy, rm", "T = 1, local", "greedy, local"):
        assert same[f"{label}: win rate"][:4] == (0.5, 6 if label.endswith("rm") else 12, 0.5, 0.5)
    found = suite.run(other, baseline)
    assert found.metrics["T = 1, rm: win rate"].value > 0.5  # the best of 24 by the same reward model
    assert set(found.tables["agreement"]["T = 1"]) == {"rm", "local"}
    written = [json.loads(line) for line in (trained / "label" / "best-T = 1.jsonl").read_text().splitlines()]
    assert len(written) == 6 and written[0]["preference"] is None
    for row in written:
        row["preference"] = "first"
    (trained / "filled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    people = PairwisePreference(path, {"people": HumanLabels(str(trained / "filled.jsonl"))}, 5).run(other, baseline)
    ties = sum(row["first"] == row["second"] for row in written)
    assert people.metrics["T = 1: win rate"].count == 6
    assert people.metrics["T = 1: win rate"].value == pytest.approx(1.0) or ties


def test_best_of_n_loads_its_reward_model_once_until_it_is_released(reward, llama, monkeypatch) -> None:
    loaded = []

    def load(folder: str, *settings):
        loaded.append(folder)
        return load_scalar_model(folder, *settings)

    monkeypatch.setattr(reward_scorer, "load_scalar_model", load)
    model = EvaluatedModel("best", ModelSpec(llama, best_of=BestOf(reward, n=2)), NO_CACHE)
    for prompt in ("w1", "w2 w3", "w4"):
        model.generate([prompt], SamplingParams(2))
    assert loaded == [reward]
    model.release()
    model.generate(["w1"], SamplingParams(2))
    assert loaded == [reward, reward]


def test_agreement_is_between_judges_by_majority_and_within_a_group_of_labelers() -> None:
    def make_result(*rows: tuple[int, str, float]) -> ComparisonResult:
        return ComparisonResult([PairVerdict(pair, who, value, "") for pair, who, value in rows], 0, [], [], [])

    people = make_result(
        (0, "ann", 1), (0, "bob", 1), (0, "cem", 0), (1, "ann", 0), (1, "bob", 0), (2, "ann", 1), (2, "bob", 0)
    )
    model = make_result((0, "reward model", 1), (1, "reward model", 1), (2, "reward model", 1))
    other = make_result((0, "reward model", 0))  # another judge of the same name, not a second labeler
    table = build_agreement_table({"people": people, "model": model, "other": other})
    assert (table["people"]["model"]["share"], table["people"]["model"]["count"], table["people"]["model"]["ties"]) == (
        0.5,
        2,
        1,
    )
    assert table["people"]["model"] == table["model"]["people"]
    # pairs of labelers that both decided: 0 by ann, bob (same), ann, cem and bob, cem (not); 1 same; 2 not
    assert labeler_agreement_by_judge({"people": people, "model": model, "other": other}) == {
        "people": pytest.approx(2 / 5)
    }


def test_rows_without_a_prompt_are_counted(llama, tmp_path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n{"prompt": ""}\n{"prompt": "w2"}\n')
    evaluated_model = EvaluatedModel("m", ModelSpec(llama), NO_CACHE)
    found = PairwisePreference(str(tmp_path / "prompts.jsonl"), {"local": HuggingFaceJudge(llama)}, 3).run(
        evaluated_model, evaluated_model
    )
    assert (found.num_rows, found.notes) == (2, ["1 rows skipped: empty prompt"])
    with pytest.raises(UserError, match="limit: it must be 1 or more, or none, got 0"):
        PairwisePreference(str(tmp_path / "prompts.jsonl"), {"local": HuggingFaceJudge(llama)}, limit=0).check(
            [evaluated_model]
        )


def test_labels_that_cannot_be_read_are_an_error_each_time() -> None:
    rows = [{"prompt": "w1 w2", "first": "w3", "second": "w4 w5", "preference": each} for each in ("first", "A")]
    humans = HumanLabels(rows)
    for _ in range(2):
        with pytest.raises(UserError, match="preference is 'A'"):
            humans.compare(PAIRS, NO_CACHE)
    rows[1]["preference"] = "tie"
    assert HumanLabels(rows).compare(PAIRS, NO_CACHE)[0] == [Verdict("human", 1.0), Verdict("human", 0.5)]


def test_numbers_of_a_table_with_missing_cells_are_ratings() -> None:
    row = {"prompt": "p", "answer": "a", "overall": 5.0, "hallucination": 1.0, "harmful_advice": 0.0}
    rating = read_rating(Row({**row, "sexual_content": float("nan")}, "row 1"), "ann")
    assert (rating.overall, rating.flags) == (5, {"hallucination": True, "harmful_advice": False})
    with pytest.raises(UserError, match="overall must be a whole number"):
        read_rating(Row({**row, "overall": 5.5}, "row 1"), "ann")


CHATML = "{% for m in messages %}{{ m.content }} w27 {% endfor %}{% if add_generation_prompt %}w26{% endif %}"


def test_a_finished_reply_to_a_conversation_is_scored_with_the_end_of_turn_of_training(
    reward, tokenizer, tmp_path, monkeypatch
) -> None:
    """The end of turn, w27, is not the end token."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    shutil.copytree(reward, tmp_path / "chat")
    own.save_pretrained(tmp_path / "chat")
    scored: list[list[int]] = []

    def score_rows(model: object, rows: list[list[int]], *_: object) -> torch.Tensor:
        scored.extend(rows)
        return torch.zeros(len(rows))

    monkeypatch.setattr(reward_scorer, "score_rows", score_rows)
    scorer = RewardScorer(str(tmp_path / "chat"))
    question, replies = [{"role": "user", "content": "w1"}], ["w3", "w4 w5"]
    report, lengths = DatasetReport("rows"), TruncationPolicy(99, 99)
    (ranking,) = tokenize_rankings([Ranking(question, replies, [0, 1])], scorer.template, lengths, report)
    completions = [completion("w3"), completion("w4 w5"), completion("w4 w5 w27"), completion("w3", finished=False)]
    records = [PromptRow(question)] * 4
    scorer.score(render_scored_texts(scorer.template, records, completions), NO_CACHE)
    expected = [[*ranking.prompt, *each] for each in ranking.completions]
    assert scored == sorted([expected[0], expected[1], expected[1], expected[0][:-2]], key=len)
    scored.clear()
    scorer.score(render_scored_texts(scorer.template, [PromptRow("w1")], completions), NO_CACHE)
    assert scored == [own.encode("w1 w3 <eos>")]
