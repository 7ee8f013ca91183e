"""Sections about instructions: who prefers which model, what is better about it, and what it generalizes to.

Numbers of the paper that it prints as figures only were read off them, to about 0.01.
"""

from lit_rlhf.synthetic.paper.estimates import PaperClaim
from lit_rlhf.synthetic.paper.measurements import (
    KINDS,
    LARGEST,
    MAX_CONSTRAINTS,
    METADATA,
    PROMPTED_KINDS,
    PUBLIC_KINDS,
    SIZES,
    measure_generality,
    measure_generalization,
    measure_metadata,
    measure_preference,
    measure_public_tasks,
)
from lit_rlhf.synthetic.paper.section_types import (
    SMALLEST,
    TUNED_KINDS,
    Panel,
    Section,
    at_sizes,
    by_size,
    chains,
    list_stages,
)

FIGURE_1 = Section(
    "fig1",
    "Figure 1: preference by model size",
    "Labelers compared the outputs of every model with those of the largest SFT model, on prompts of unseen customers. "
    "At each size the order was GPT-3, GPT-3 with a few-shot prompt, SFT, then PPO and PPO-ptx, and the outputs of the "
    "1.3B InstructGPT were preferred to those of the 175B GPT-3. The 175B InstructGPT won 85 ± 3 % of its comparisons "
    "with GPT-3 and 71 ± 4 % of those with few-shot GPT-3.",
    "Win rate over the largest SFT model by the labelers of the training group, on unseen instructions at "
    "temperature 1.",
    list_stages(KINDS),
    measure_preference,
    [
        by_size(
            "Win rate over the largest SFT model",
            "share",
            "{size}/{kind}",
            PROMPTED_KINDS,
            base=(0.14, 0.19, 0.24),
            few_shot=(0.23, 0.27, 0.41),
            sft=(0.35, 0.40, 0.50),
            ppo=(0.52, 0.58, 0.63),
            ppo_ptx=(0.53, 0.55, 0.66),
        )
    ],
    [
        PaperClaim("At each size: base below few-shot below SFT below PPO", chains(("base", "few_shot", "sft", "ppo"))),
        PaperClaim("At each size: PPO-ptx above SFT", chains(("sft", "ppo_ptx"))),
        PaperClaim(
            "The smallest PPO-ptx is above the largest base model", [(f"{SMALLEST}/ppo_ptx", f"{LARGEST}/base")]
        ),
        PaperClaim("The largest PPO-ptx is above the largest SFT model", [(f"{LARGEST}/ppo_ptx", f"{LARGEST}/sft")]),
    ],
)

_FIGURE_3_PAPER: dict[str, dict[str, tuple[float, float, float]]] = {
    "instructions/training": {
        "base": (0.14, 0.19, 0.24),
        "sft": (0.35, 0.40, 0.50),
        "ppo": (0.52, 0.58, 0.63),
        "ppo_ptx": (0.53, 0.55, 0.66),
    },
    "instructions/held_out": {
        "base": (0.19, 0.22, 0.25),
        "sft": (0.46, 0.51, 0.50),
        "ppo": (0.66, 0.69, 0.69),
        "ppo_ptx": (0.64, 0.69, 0.71),
    },
    "continuations/training": {
        "base": (0.14, 0.17, 0.22),
        "sft": (0.32, 0.39, 0.50),
        "ppo": (0.50, 0.61, 0.59),
        "ppo_ptx": (0.42, 0.51, 0.61),
    },
    "continuations/held_out": {
        "base": (0.23, 0.20, 0.28),
        "sft": (0.44, 0.41, 0.50),
        "ppo": (0.56, 0.61, 0.64),
        "ppo_ptx": (0.57, 0.55, 0.62),
    },
}
_PLACES = {"instructions": "instructions", "continuations": "prompts for base models"}

FIGURE_3 = Section(
    "fig3",
    "Figure 3: by labelers and by prompts",
    "The same comparison by labelers who made no training data, and on prompts that customers had written for GPT-3 "
    "models rather than for InstructGPT. Held-out labelers had the same preferences at about the same rates, and the "
    "order of the models was the same on both kinds of prompts.",
    "Prompts for base models are continuations here: one prompt with a good reply, and then the instruction. "
    "The held-out "
    "labelers weigh truth and harmlessness more than those of the training group.",
    list_stages(KINDS),
    measure_generality,
    [
        by_size(
            f"{_PLACES[name.split('/')[0]].capitalize()}, {name.split('/')[1].replace('_', '-')} labelers",
            "share",
            f"{name}/{{size}}/{{kind}}",
            KINDS,
            **_FIGURE_3_PAPER[name],
        )
        for name in _FIGURE_3_PAPER
    ],
    [
        PaperClaim(
            "On instructions, held-out labelers are within 5 points of the training group (SFT, PPO and PPO-ptx)",
            [
                (f"instructions/held_out/{size}/{kind}", f"instructions/training/{size}/{kind}")
                for size in SIZES
                for kind in TUNED_KINDS
            ],
            "within",
            0.05,
        ),
        PaperClaim(
            "Held-out labelers prefer PPO-ptx to SFT at each size",
            chains(("sft", "ppo_ptx"), "instructions/held_out/{size}/{kind}"),
        ),
        PaperClaim(
            "On prompts for base models, both groups prefer PPO-ptx to SFT at each size",
            [
                pair
                for group in ("training", "held_out")
                for pair in chains(("sft", "ppo_ptx"), f"continuations/{group}/{{size}}/{{kind}}")
            ],
        ),
    ],
)

_METADATA_PAPER = {
    "attempts": (0.70, 0.79, 0.86, 0.92, 0.93),
    "constraints": (0.22, 0.28, 0.34, 0.44, 0.43),
    "invents": (0.45, 0.28, 0.08, 0.22, 0.16),
    "fit": (0.81, 0.85, 0.88, 0.90, 0.90),
}
_METADATA_TITLES = {
    "attempts": "Attempts the right instruction",
    "constraints": "Follows explicit constraints",
    "invents": "Invents facts in closed-domain tasks",
    "fit": "Language fit for an assistant",
}

FIGURE_4 = Section(
    "fig4",
    "Figure 4: what is better about the outputs",
    "Over all sizes, PPO models attempted the right instruction more often than GPT-3 (0.92 against 0.70), followed "
    "explicit constraints more often (0.44 against 0.22), invented facts less often in closed-domain tasks "
    "(0.22 against "
    "0.45; SFT 0.08), and used language more fit for a customer assistant (0.90 against 0.81).",
    "The exact judge in place of labelers. Attempts: some of the task is done. Constraints: all are met, of "
    "prompts with "
    "any. Invents: names a person, thing, place or animal that a closed-domain prompt does not contain. Fit: no rude "
    "word, and an end. First over all sizes, as in the paper's Figure 4; then by size, as in its Figure 30.",
    list_stages(KINDS),
    measure_metadata,
    [
        Panel(
            "All sizes together",
            "share",
            [_METADATA_TITLES[name] for name in METADATA],
            {kind: [f"{name}/{kind}" for name in METADATA] for kind in PROMPTED_KINDS},
            {kind: [_METADATA_PAPER[name][index] for name in METADATA] for index, kind in enumerate(PROMPTED_KINDS)},
        ),
        *(by_size(_METADATA_TITLES[name], "share", f"{name}/{{size}}/{{kind}}", PROMPTED_KINDS) for name in METADATA),
    ],
    [
        PaperClaim(
            "PPO and PPO-ptx attempt the right instruction more than the base model",
            [("attempts/ppo", "attempts/base"), ("attempts/ppo_ptx", "attempts/base")],
        ),
        PaperClaim(
            "PPO and PPO-ptx follow constraints more than SFT, and SFT more than the base model",
            [
                ("constraints/ppo", "constraints/sft"),
                ("constraints/ppo_ptx", "constraints/sft"),
                ("constraints/sft", "constraints/base"),
            ],
        ),
        PaperClaim(
            "PPO and PPO-ptx invent less than the base model",
            [("invents/base", "invents/ppo"), ("invents/base", "invents/ppo_ptx")],
        ),
        PaperClaim(
            "Their language is more fit than the base model's", [("fit/ppo", "fit/base"), ("fit/ppo_ptx", "fit/base")]
        ),
    ],
)

FIGURE_5 = Section(
    "fig5",
    "Figure 5: against models tuned on public tasks",
    "A 175B GPT-3 fine-tuned on FLAN or on T0's mixture was rated about as few-shot GPT-3 and below SFT: "
    "Likert means of "
    "about 3.4 and 3.3, against 3.5, 4.1 (SFT) and 4.8 (InstructGPT). InstructGPT was preferred to them in 78 "
    "± 4 % and "
    "79 ± 4 % of the comparisons.",
    f"The {LARGEST} base model fine-tuned on six public-style tasks in one template each (FLAN-like), or on "
    f"four tasks in "
    "two templates each (T0-like), with the recipe of SFT. Ratings from 1 to 7 by the training group.",
    list_stages((*KINDS, "flan", "t0"), (LARGEST,)),
    measure_public_tasks,
    [
        Panel(
            f"Likert rating, {LARGEST} models",
            "points",
            ["rating"],
            {kind: [f"likert/{kind}"] for kind in PUBLIC_KINDS},
            {"base": [2.6], "few_shot": [3.5], "sft": [4.1], "ppo_ptx": [4.8], "flan": [3.4], "t0": [3.3]},
        ),
        Panel(
            "How often PPO-ptx is preferred to it",
            "share",
            ["share"],
            {kind: [f"preferred/{kind}"] for kind in PUBLIC_KINDS if kind != "ppo_ptx"},
            {"base": [0.85], "few_shot": [0.71], "flan": [0.78], "t0": [0.79]},
        ),
    ],
    [
        PaperClaim(
            "Both mixtures are rated below SFT, PPO and PPO-ptx",
            [(f"likert/{kind}", f"likert/{mix}") for mix in ("flan", "t0") for kind in ("sft", "ppo", "ppo_ptx")],
        ),
        PaperClaim(
            "The mixtures are rated above the base model", [(f"likert/{mix}", "likert/base") for mix in ("flan", "t0")]
        ),
    ],
)

FIGURES_8_9 = Section(
    "fig8",
    "Figures 8 and 9: generalization and simple mistakes",
    "InstructGPT followed instructions in other languages and about code, though its fine-tuning data hardly had them: "
    "over 96 % of it was English. It still made simple mistakes: it went along with false premises, hedged where the "
    "answer was plain, and failed when a prompt had several explicit constraints. The paper shows examples "
    "and no rates.",
    "A second language that is 4 % of the demonstrations and in no ranking and no PPO prompt; programs in a "
    "notation that "
    "only pretraining text contains; questions that presume a misconception; evasive answers to plain questions; and "
    "one to four constraints in a prompt, of which training prompts have two at most.",
    list_stages(KINDS),
    measure_generalization,
    [
        by_size("Success in the second language", "share", "second/{size}/{kind}", KINDS),
        by_size("Success on the same prompts in English", "share", "english/{size}/{kind}", KINDS),
        by_size("Answers in the second language", "share", "language/{size}/{kind}", KINDS),
        by_size("Questions about programs answered", "share", "program/{size}/{kind}", KINDS),
        by_size("False premises corrected", "share", "premise/{size}/{kind}", KINDS),
        by_size("Evasive answers to plain questions", "share", "hedge/{size}/{kind}", KINDS),
        Panel(
            f"All constraints met, {LARGEST} models, by their number",
            "share",
            [str(count) for count in range(1, MAX_CONSTRAINTS + 1)],
            {
                kind: [f"constraints{count}/{LARGEST}/{kind}" for count in range(1, MAX_CONSTRAINTS + 1)]
                for kind in KINDS
            },
        ),
    ],
    [
        PaperClaim(
            "PPO-ptx follows instructions in the second language more than the base model",
            at_sizes("second/{size}/ppo_ptx", "second/{size}/base"),
        ),
        PaperClaim(
            "PPO-ptx answers questions about programs more often than the base model",
            at_sizes("program/{size}/ppo_ptx", "program/{size}/base"),
        ),
        PaperClaim(
            "More constraints are met less often: the largest PPO-ptx at one above four",
            [(f"constraints1/{LARGEST}/ppo_ptx", f"constraints{MAX_CONSTRAINTS}/{LARGEST}/ppo_ptx")],
        ),
    ],
)
