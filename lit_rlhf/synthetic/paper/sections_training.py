"""Sections about training: sweeps and what it costs.

Numbers of the paper that it prints as figures only were read off them, to about 0.01.
"""

from lit_rlhf.synthetic.paper.estimates import PaperClaim
from lit_rlhf.synthetic.paper.measurements import KINDS, SIZES, measure_compute
from lit_rlhf.synthetic.paper.section_types import TUNED_KINDS, Panel, Section, by_size, chains, list_stages
from lit_rlhf.synthetic.paper.sweeps import SWEEP_BENCHMARKS, SWEEP_SIZE, SWEEPS, measure_sweeps, name_sweep_stage


def _sweep_panel(sweep: str, metric: str, title: str, unit: str) -> Panel:
    """Return a panel over the values of a sweep, with SFT and the base model beside them."""
    labels = list(SWEEPS[sweep])
    kind = "ppo" if sweep == "beta" else "ppo_ptx"
    series = {kind: [f"{metric}/{sweep}/{label}" for label in labels]}
    return Panel(title, unit, labels, series | {each: [f"{metric}/{each}"] * len(labels) for each in ("sft", "base")})


_BENCHMARKS_RECOVER = [(f"{task}/gamma/10", f"{task}/gamma/0") for task in SWEEP_BENCHMARKS]

FIGURES_33_36 = Section(
    "sweeps",
    "Figures 33 to 36: pretraining coefficient, KL coefficient, episodes",
    "For 1.3B models. A pretraining coefficient γ of 20 or more brought SQuADv2 and DROP back to the level of "
    "GPT-3, at a "
    "small cost of reward (−0.61 at γ = 0.46, −0.85 at 27.8, −1.55 at 129), while no KL coefficient β did "
    "without γ: up "
    "to 100 times the default, which took the reward from 2.6 to −2.8, SQuADv2 reached 53.6 (GPT-3: 59). With "
    "γ, ratings "
    "were best at a β of 0.01 to 0.02 (4.12; 2.1 at 0, 3.12 at 2). More than 256,000 episodes did not help.",
    f"Short runs of the {SWEEP_SIZE} models: γ at β = 0.1; β at γ = 0 with the KL to the base model, as in the "
    f"paper; β at "
    "γ = 1; and the number of episodes at β = 0.1 and γ = 1. Score: of the reward model. Reading and "
    "discrete: F1 with four "
    "solved examples.",
    [f"pretraining-{SWEEP_SIZE}", f"sft-{SWEEP_SIZE}", "reward"]
    + [name_sweep_stage(sweep, label) for sweep, runs in SWEEPS.items() for label in runs],
    measure_sweeps,
    [
        _sweep_panel("gamma", "score", "Score over γ", "score"),
        _sweep_panel("gamma", "reading", "Reading over γ", "share"),
        _sweep_panel("gamma", "discrete", "Discrete over γ", "share"),
        _sweep_panel("gamma", "likert", "Likert rating over γ", "points"),
        _sweep_panel("beta", "score", "Score over β, γ = 0", "score"),
        _sweep_panel("beta", "reading", "Reading over β, γ = 0", "share"),
        _sweep_panel("beta", "discrete", "Discrete over β, γ = 0", "share"),
        _sweep_panel("both", "likert", "Likert rating over β, γ = 1", "points"),
        _sweep_panel("episodes", "likert", "Likert rating over episodes", "points"),
        _sweep_panel("episodes", "reading", "Reading over episodes", "share"),
    ],
    [
        PaperClaim("γ brings the benchmarks back: at 10 above 0", _BENCHMARKS_RECOVER),
        PaperClaim("γ costs score: at 0 above 30", [("score/gamma/0", "score/gamma/30")]),
        PaperClaim("β costs score: at 0.01 above 3", [("score/beta/0.01", "score/beta/3")]),
        PaperClaim(
            "No β brings the benchmarks back: the base model above each",
            [(f"{task}/base", f"{task}/beta/{label}") for task in SWEEP_BENCHMARKS for label in SWEEPS["beta"]],
        ),
        PaperClaim(
            "With γ, the best β is inside the sweep: ratings at 0.1 above those at 0 and at 3",
            [("likert/both/0.1", "likert/both/0"), ("likert/both/0.1", "likert/both/3")],
        ),
        PaperClaim(
            "The best γ is inside the sweep: ratings at 1 above those at 0 and at 30",
            [("likert/gamma/1", "likert/gamma/0"), ("likert/gamma/1", "likert/gamma/30")],
        ),
        PaperClaim(
            "More episodes do not help beyond some number: the rating at the most within 0.1 of that at half as many",
            [(f"likert/episodes/{most}", f"likert/episodes/{half}") for half, most in [list(SWEEPS["episodes"])[-2:]]],
            "within",
            0.1,
        ),
    ],
)

COMPUTE = Section(
    "compute",
    "Section 5.1: what alignment costs",
    "Training the 175B SFT model took 4.9 petaflop/s-days and PPO-ptx 60, against 3,640 for the pretraining of GPT-3: "
    "0.13 % and 1.6 %.",
    "Operations that the runs counted (6 per trained weight and token, 2 of a forward pass), from their lineage. This "
    "world's pretraining is short, so the shares are larger; the order is the point.",
    list_stages(KINDS),
    measure_compute,
    [
        by_size("Petaflop/s-days", "days", "days/{size}/{kind}", KINDS),
        by_size("Per cent of pretraining", "percent", "percent/{size}/{kind}", TUNED_KINDS),
    ],
    [
        PaperClaim(
            "SFT costs less than PPO, and PPO less than PPO-ptx",
            chains(("sft", "ppo", "ppo_ptx"), "percent/{size}/{kind}"),
        ),
        PaperClaim(
            "Every stage costs less than pretraining",
            [(f"days/{size}/base", f"days/{size}/{kind}") for size in SIZES for kind in TUNED_KINDS],
        ),
    ],
)
