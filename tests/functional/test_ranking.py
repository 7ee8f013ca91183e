import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import ranking_loss, ranking_pairs

# (ranking, rank, score): few ranks and few scores, so that ties of both kinds are common
rows_of_batches = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([-1.5, 0.0, 0.25, 4.0])), min_size=1, max_size=12
)


def tensors(rows):
    ranking, ranks, scores = zip(*rows)
    return torch.tensor(scores), torch.tensor(ranking), torch.tensor(ranks)


def by_hand(rows, pair_normalizer="untied_pairs"):
    """Return loss, rankings, pairs, correct and margins, computed pair by pair in Python floats."""
    loss, rankings, pairs, correct, margins = 0.0, 0, 0, 0.0, 0.0
    for ranking in {row[0] for row in rows}:
        members = [row for row in rows if row[0] == ranking]
        losses = []
        for i, (_, rank, score) in enumerate(members):
            for _, other_rank, other_score in members[i + 1 :]:
                if rank == other_rank:
                    continue
                margin = score - other_score if rank < other_rank else other_score - score
                losses.append(math.log1p(math.exp(-margin)))
                correct += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
                margins += margin
        if losses:
            all_pairs = len(members) * (len(members) - 1) // 2
            loss += math.fsum(losses) / (len(losses) if pair_normalizer == "untied_pairs" else all_pairs)
            rankings += 1
            pairs += len(losses)
    return loss, rankings, pairs, correct, margins


@given(rows_of_batches, st.sampled_from(["untied_pairs", "all_pairs"]))
def test_loss_equals_a_loop_over_pairs(rows, pair_normalizer):
    result = ranking_loss(*tensors(rows), pair_normalizer)
    loss, rankings, pairs, correct, margins = by_hand(rows, pair_normalizer)
    assert_close(result.loss.item(), loss, rtol=2e-6, atol=1e-6)
    assert (result.rankings.item(), result.pairs.item()) == (rankings, pairs)
    assert (result.correct.item(), result.margin_sum.item()) == (correct, margins)
    assert all(x.shape == () for x in result) and result.loss.dtype == torch.float32


@given(rows_of_batches)
def test_pairs_are_all_and_only_the_ordered_ones_of_a_ranking(rows):
    _, ranking, ranks = tensors(rows)
    better, worse, weight = ranking_pairs(ranking, ranks)
    expected = {
        (i, j)
        for i, (a, rank, _) in enumerate(rows)
        for j, (b, other_rank, _) in enumerate(rows)
        if a == b and rank < other_rank
    }
    found = list(zip(better.tolist(), worse.tolist()))
    assert set(found) == expected and len(found) == len(expected)
    assert weight.dtype == torch.float32 and better.dtype == worse.dtype == torch.int64
    for ranking_id in set(ranking[better].tolist()):
        assert_close(weight[ranking[better] == ranking_id].sum().item(), 1.0, rtol=1e-6, atol=0)


@given(rows_of_batches, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    for expected, actual in zip(ranking_loss(*tensors(rows)), ranking_loss(*tensors(shuffled))):
        assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_k_completions_without_ties_make_all_pairs():
    ranks = torch.randperm(9)
    better, _, weight = ranking_pairs(torch.zeros(9, dtype=torch.long), ranks)
    assert len(better) == 36
    assert_close(weight, torch.full((36,), 1 / 36))


def test_rankings_have_equal_weight_whatever_their_number_of_completions():
    # equal scores: log 2 per pair, therefore log 2 per ranking
    ranking, ranks = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2, 2])
    result = ranking_loss(torch.zeros(6), ranking, ranks)
    assert_close(result.loss.item(), 2 * math.log(2), rtol=1e-6, atol=0)
    assert (result.rankings.item(), result.pairs.item(), result.correct.item()) == (2, 6, 3.0)


def test_all_pairs_weighs_a_ranking_by_its_fraction_of_untied_pairs():
    # K = 4 with one tie: 5 pairs of 6, log 2 each at equal scores
    ranking, ranks = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 2, 2])
    assert_close(
        ranking_loss(torch.zeros(4), ranking, ranks, "all_pairs").loss.item(), 5 / 6 * math.log(2), rtol=1e-6, atol=0
    )
    assert_close(
        ranking_loss(torch.zeros(4), ranking, ranks, "untied_pairs").loss.item(), math.log(2), rtol=1e-6, atol=0
    )
    with pytest.raises(AssertionError, match="some"):
        ranking_loss(torch.zeros(4), ranking, ranks, "some")


def test_micro_batches_of_rankings_add_up():
    ranking, ranks, scores = torch.arange(12) // 4, torch.randint(3, (12,)), torch.randn(12)
    full = ranking_loss(scores, ranking, ranks)
    parts = [ranking_loss(scores[i : i + 4], ranking[i : i + 4] * 0, ranks[i : i + 4]) for i in (0, 4, 8)]
    for field, expected in zip(zip(*parts), full):
        assert_close(torch.stack(field).sum(), expected, rtol=1e-6, atol=1e-6)


def test_gradient_equals_the_closed_form():
    # d/ds of -log sigmoid(m) is -(1 - sigmoid(m)) for the better and the opposite for the worse
    rows = [(0, 0, 0.5), (0, 1, 1.0), (0, 1, -2.0), (1, 1, 0.0), (1, 0, 3.0)]
    scores, ranking, ranks = tensors(rows)
    leaf = scores.clone().requires_grad_()
    ranking_loss(leaf, ranking, ranks).loss.backward()
    expected = [0.0] * len(rows)
    for i, j, weight in [(0, 1, 0.5), (0, 2, 0.5), (4, 3, 1.0)]:
        slope = weight / (1 + math.exp(rows[i][2] - rows[j][2]))
        expected[i] -= slope
        expected[j] += slope
    assert_close(leaf.grad, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_only_ties_give_zero_with_a_gradient():
    scores = torch.randn(3, requires_grad=True)
    result = ranking_loss(scores, torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]))
    result.loss.backward()
    assert [x.item() for x in result] == [0, 0, 0, 0, 0] and scores.grad.tolist() == [0, 0, 0]


def test_half_precision_scores_and_large_margins_stay_finite():
    scores = torch.tensor([-100.0, 100.0], dtype=torch.bfloat16, requires_grad=True)
    result = ranking_loss(scores, torch.tensor([0, 0]), torch.tensor([0, 1]))
    result.loss.backward()
    assert result.loss.item() == 200 and result.loss.dtype == torch.float32
    assert scores.grad.tolist() == [-1, 1]
    close = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    # bfloat16 would round this loss to 0.6953
    loss = ranking_loss(close, torch.tensor([0, 0]), torch.tensor([0, 1])).loss
    assert_close(loss.item(), math.log1p(math.exp(0.0078125)), rtol=1e-6, atol=0)


def test_metrics_carry_no_gradient():
    result = ranking_loss(torch.randn(4, requires_grad=True), torch.zeros(4, dtype=torch.long), torch.arange(4))
    assert [x.requires_grad for x in result] == [True, False, False, False, False]


def test_a_column_of_scores_is_refused():
    with pytest.raises(AssertionError):
        ranking_loss(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), torch.arange(4))
