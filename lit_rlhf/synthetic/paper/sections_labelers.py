"""Sections about labelers: how well reward models predict them, and whose preferences policies follow."""

from itertools import permutations

from lit_rlhf.synthetic.paper.estimates import PaperClaim
from lit_rlhf.synthetic.paper.measurements import SIZES
from lit_rlhf.synthetic.paper.preferences import (
    NAMED_POLICY_STAGE,
    NAMED_REWARD_STAGE,
    measure_preferences,
    name_policy_stage,
    name_reward_stage,
)
from lit_rlhf.synthetic.paper.rank_groups import GROUPS
from lit_rlhf.synthetic.paper.reward_models import (
    BEST_OF,
    FOLDS_STAGE,
    FREE_STAGE,
    ITERATIONS,
    RANKED_GROUPS,
    STAGES_BY_NUMBER,
    STAGES_BY_SIZE,
    measure_reward_models,
)
from lit_rlhf.synthetic.paper.section_types import Panel, Section, list_stages
from lit_rlhf.synthetic.paper.sweeps import SWEEP_SIZE, name_sweep_stage

_POINTS = {"best_of_n": BEST_OF, "ppo": (0, *ITERATIONS), "ppo_ptx": (0, *ITERATIONS)}


def _against_kl(metric: str, title: str, unit: str) -> Panel:
    """Return a panel of a metric over the KL to SFT."""
    names = {kind: [f"{{}}/{kind}/{point}" for point in points] for kind, points in _POINTS.items()}
    return Panel(
        title,
        unit,
        [f"{n} / {count}" for n, count in zip(BEST_OF, _POINTS["ppo"], strict=True)],
        {kind: [name.format(metric) for name in own] for kind, own in names.items()},
        positions={kind: [name.format("kl") for name in own] for kind, own in names.items()},
        axis="KL to SFT, nats per response",
    )


def _by_labelers(title: str, name: str, labels: list[str]) -> Panel:
    """Return a panel of accuracies on labelers whose rankings are trained on, and on others."""
    series = {kind: [f"{name}/{label}/{kind}" for label in labels] for kind in RANKED_GROUPS}
    return Panel(title, "share", labels, series)


REWARD_MODEL = Section(
    "reward-model",
    "Reward models: labelers, size, rankings, over-optimization",
    "Reward models were trained on four of five groups of labelers and tested on the fifth: they predicted "
    "72.4 ± 0.4 % of the comparisons of labelers in their training set and 69.6 ± 0.9 % of those of held-out ones. "
    "One reward model of 6B served all policies. The KL penalty is there to mitigate over-optimization of the reward "
    "model. In summarization (Stiennon et al., 2020), the paper's predecessor, twice the data gave 1.1 % of accuracy "
    "and twice the size 1.8 %, and the policies that were optimized furthest were preferred least.",
    "Five groups of two labelers with different tastes, one of which each fold holds out; the interval is that of the "
    "mean over folds. Size and number of rankings: accuracy on unseen prompts by the training group and by the "
    "held-out group of labelers, after one epoch. Over-optimization: mean score and win rate over SFT of the "
    f"{SWEEP_SIZE} models against the KL to SFT, for the best of n responses of SFT, for PPO without a KL penalty "
    "(β = 0, γ = 0; checkpoints of one run), and for PPO-ptx at β = 0.1 and γ = 1 (the runs of the sweep over "
    "episodes). Columns: n / iterations.",
    [
        FOLDS_STAGE,
        *dict.fromkeys((*STAGES_BY_SIZE.values(), *STAGES_BY_NUMBER.values())),
        *list_stages(("sft",), (SWEEP_SIZE,)),
        FREE_STAGE,
        *(name_sweep_stage("episodes", f"{256 * count:,}") for count in ITERATIONS),
    ],
    measure_reward_models,
    [
        Panel(
            "Accuracy over five folds",
            "share",
            ["accuracy"],
            {kind: [f"folds/{kind}"] for kind in RANKED_GROUPS},
            {"training_labelers": [0.724], "heldout_labelers": [0.696]},
        ),
        _by_labelers("Accuracy over the size of the reward model", "size", list(SIZES)),
        _by_labelers("Accuracy over the number of rankings", "rankings", list(STAGES_BY_NUMBER)),
        _against_kl("score", "Score of the reward model against KL", "score"),
        _against_kl("preference", "Win rate over SFT by labelers against KL", "share"),
    ],
    [
        PaperClaim(
            "Held-out labelers are predicted less well than those of the training set",
            [("folds/training_labelers", "folds/heldout_labelers")],
        ),
        PaperClaim(
            "The accuracy on held-out labelers is at most 5 points lower",
            [("folds/heldout_labelers", "folds/training_labelers")],
            "not below",
            0.05,
        ),
        PaperClaim(
            "Larger reward models are more accurate on the training group",
            [(f"size/{SIZES[i + 1]}/training_labelers", f"size/{SIZES[i]}/training_labelers") for i in range(2)],
        ),
        PaperClaim(
            "Four times the rankings give more accuracy on the training group",
            [
                (f"rankings/{more}/training_labelers", f"rankings/{fewer}/training_labelers")
                for fewer, more in zip(STAGES_BY_NUMBER, list(STAGES_BY_NUMBER)[1:], strict=False)
            ],
        ),
        PaperClaim(
            "The best of 32 has a higher score than one response, and is preferred more",
            [(f"{metric}/best_of_n/32", f"{metric}/best_of_n/1") for metric in ("score", "preference")],
        ),
        PaperClaim(
            "Without a KL penalty the score goes on rising: after 48 iterations above 12",
            [("score/ppo/48", "score/ppo/12")],
        ),
        PaperClaim(
            "Without a KL penalty the labelers' preference falls: after 12 iterations above 48",
            [("preference/ppo/12", "preference/ppo/48")],
        ),
    ],
)

_PAIRS = list(permutations(GROUPS, 2))

PREFERENCES = Section(
    "preferences",
    "Section 5.2: whose preferences",
    "The paper's models follow the preferences of its labelers, of the researchers who instructed them, and of the "
    "customers who wrote the prompts, and not those of all people. It names a way on: models that follow the "
    "preferences of certain groups, or that one can ask to represent one. It measures neither.",
    "Five groups of two labelers weigh helpfulness, truth, harmlessness and brevity differently, and some like a "
    "closing courtesy that others dislike. All rank the same responses. One reward model per group, and a short run of "
    f"PPO of the {SWEEP_SIZE} model with each; and one reward model and one policy whose prompts name the group to "
    "follow, as “for tom .” on the first line. Win rates are over the SFT model.",
    [
        *(name_reward_stage(group) for group in GROUPS),
        NAMED_REWARD_STAGE,
        *(name_policy_stage(group) for group in GROUPS),
        NAMED_POLICY_STAGE,
    ],
    measure_preferences,
    [
        Panel(
            "Accuracy of reward models on the rankings of each group",
            "share",
            GROUPS,
            {kind: [f"accuracy/{kind}/{group}" for group in GROUPS] for kind in (*GROUPS, "named")},
        ),
        *(
            Panel(
                title,
                "share",
                GROUPS,
                {followed: [f"{name}/{followed}/{group}" for group in GROUPS] for followed in GROUPS},
            )
            for name, title in (
                ("policy", "Who prefers which policy: win rate over SFT by each group"),
                ("named", "One policy, told whom to follow: win rate over SFT by each group"),
            )
        ),
    ],
    [
        PaperClaim(
            "A reward model predicts the group that it was trained on better than those of other groups do",
            [(f"accuracy/{group}/{group}", f"accuracy/{other}/{group}") for group, other in _PAIRS],
            "mostly",
        ),
        PaperClaim(
            "The one that is told the group does so too",
            [(f"accuracy/named/{group}", f"accuracy/{other}/{group}") for group, other in _PAIRS],
            "mostly",
        ),
        PaperClaim(
            "Each group prefers the policy that follows it to those that follow others",
            [(f"policy/{group}/{group}", f"policy/{other}/{group}") for group, other in _PAIRS],
            "mostly",
        ),
        PaperClaim(
            "On the mean over groups, a policy of one's own is preferred more than those of others",
            [("policy/own", "policy/other")],
        ),
        PaperClaim(
            "On the mean over groups, the one policy is preferred more if told to follow the judging group",
            [("named/own", "named/other")],
        ),
    ],
)
