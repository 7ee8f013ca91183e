"""The sections of the report: what the paper found, what is measured of it, and the claims to hold our numbers to.

Numbers of the paper that it prints as figures only were read off them, to about 0.01.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from lit_rlhf.synthetic.paper.benchmarks import BENCHMARKS
from lit_rlhf.synthetic.paper.estimates import PaperClaim
from lit_rlhf.synthetic.paper.measurements import (
    KINDS,
    LARGEST,
    MAX_CONSTRAINTS,
    METADATA,
    NUM_SHOTS,
    PROMPTED_KINDS,
    SIZES,
    Context,
    Measured,
    get_stage,
    measure_benchmarks,
    measure_bias,
    measure_compute,
    measure_generality,
    measure_generalization,
    measure_metadata,
    measure_preference,
    measure_public_tasks,
    measure_toxicity,
    measure_truth,
)
from lit_rlhf.synthetic.paper.prompts import TONES
from lit_rlhf.synthetic.paper.sweeps import SWEEP_BENCHMARKS, SWEEP_SIZE, SWEEPS, measure_sweeps, name_sweep_stage

LABELS = {
    "base": "base",
    "few_shot": "few-shot",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "flan": "FLAN-like",
    "t0": "T0-like",
}
PAPER_SIZES = ("1.3B", "6B", "175B")


class Panel(NamedTuple):
    """A chart and the table below it: one line per series, over a common axis.

    Attributes:
        title: of both.
        unit: of the values.
        x: labels of the axis.
        series: key of a kind of model -> names of its values, one per label of `x`.
        paper: the paper's values in the same places, where it has them.
    """

    title: str
    unit: str
    x: Sequence[str]
    series: Mapping[str, Sequence[str]]
    paper: Mapping[str, Sequence[float]] = {}


class Section(NamedTuple):
    """A figure or table of the paper and its measurement.

    Attributes:
        key: its name in `--only`.
        title: on the page.
        paper: what the paper shows, in our words.
        world: what is measured here.
        stages: whose models the measurement needs.
        measure: measures one seed.
        panels: charts with tables.
        claims: what the paper says about the numbers.
    """

    key: str
    title: str
    paper: str
    world: str
    stages: Sequence[str]
    measure: Callable[[Context], Measured]
    panels: Sequence[Panel]
    claims: Sequence[PaperClaim]


def _by_size(title: str, unit: str, name: str, kinds: Sequence[str], **paper: Sequence[float]) -> Panel:
    """Return a panel over model size; `name` has {size} and {kind}."""
    series = {kind: [name.format(size=size, kind=kind) for size in SIZES] for kind in kinds}
    return Panel(title, unit, SIZES, series, paper)


def _chains(kinds: Sequence[str], name: str = "{size}/{kind}") -> list[tuple[str, str]]:
    """Return pairs (better, worse) of neighbors in an order of kinds, worst first, at every size."""
    return [
        (name.format(size=size, kind=better), name.format(size=size, kind=worse))
        for size in SIZES
        for worse, better in pairwise(kinds)
    ]


def _at_sizes(first: str, second: str) -> list[tuple[str, str]]:
    """Return pairs of values at every size; both names have {size}."""
    return [(first.format(size=size), second.format(size=size)) for size in SIZES]


def _stages(kinds: Sequence[str], sizes: Sequence[str] = SIZES) -> list[str]:
    return list(dict.fromkeys(get_stage(kind, size) for size in sizes for kind in kinds))


_SMALLEST = SIZES[0]
_EXTRA = tuple(kind for kind in KINDS if kind != "base")

FIGURE_1 = Section(
    "fig1",
    "Figure 1: preference by model size",
    "Labelers compared the outputs of every model with those of the largest SFT model, on prompts of unseen customers. "
    "At each size the order was GPT-3, GPT-3 with a few-shot prompt, SFT, then PPO and PPO-ptx, and the outputs of the "
    "1.3B InstructGPT were preferred to those of the 175B GPT-3. The 175B InstructGPT won 85 ± 3 % of its comparisons "
    "with GPT-3 and 71 ± 4 % of those with few-shot GPT-3.",
    "Win rate over the largest SFT model by the labelers of the training group, on unseen instructions at "
    "temperature 1.",
    _stages(KINDS),
    measure_preference,
    [
        _by_size(
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
        PaperClaim(
            "At each size: base below few-shot below SFT below PPO", _chains(("base", "few_shot", "sft", "ppo"))
        ),
        PaperClaim("At each size: PPO-ptx above SFT", _chains(("sft", "ppo_ptx"))),
        PaperClaim(
            "The smallest PPO-ptx is above the largest base model", [(f"{_SMALLEST}/ppo_ptx", f"{LARGEST}/base")]
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
    _stages(KINDS),
    measure_generality,
    [
        _by_size(
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
                for kind in _EXTRA
            ],
            "within",
            0.05,
        ),
        PaperClaim(
            "Held-out labelers prefer PPO-ptx to SFT at each size",
            _chains(("sft", "ppo_ptx"), "instructions/held_out/{size}/{kind}"),
        ),
        PaperClaim(
            "On prompts for base models, both groups prefer PPO-ptx to SFT at each size",
            [
                pair
                for group in ("training", "held_out")
                for pair in _chains(("sft", "ppo_ptx"), f"continuations/{group}/{{size}}/{{kind}}")
            ],
        ),
    ],
)

FIGURE_7 = Section(
    "fig7",
    "Figure 7: toxicity by prompt",
    "On RealToxicityPrompts with a prefix that asks to be respectful, the outputs of InstructGPT were less toxic than "
    "those of GPT-3, by about a quarter. Without a prefix there was no such difference, and with one that asks for "
    "biased text InstructGPT was much more toxic: 0.40 against 0.29 at 175B by the Perspective API.",
    "Greedy continuations of forum pages on which none, one or two of two replies are insults, with no prefix, with "
    "“be polite .” or with “be rude .” above: fraction of continuations with a rude word.",
    _stages(KINDS),
    measure_toxicity,
    [
        _by_size(
            "No prefix",
            "share",
            "basic/{size}/{kind}",
            KINDS,
            base=(0.228, 0.229, 0.231),
            sft=(0.198, 0.211, 0.211),
            ppo=(0.213, 0.214, 0.228),
            ppo_ptx=(0.228, 0.227, 0.234),
        ),
        _by_size(
            "Respectful prefix",
            "share",
            "respectful/{size}/{kind}",
            KINDS,
            base=(0.211, 0.232, 0.233),
            sft=(0.196, 0.196, 0.199),
            ppo=(0.198, 0.176, 0.205),
            ppo_ptx=(0.179, 0.204, 0.196),
        ),
        _by_size(
            "Biased prefix",
            "share",
            "biased/{size}/{kind}",
            KINDS,
            base=(0.250, 0.261, 0.285),
            sft=(0.236, 0.250, 0.256),
            ppo=(0.254, 0.382, 0.427),
            ppo_ptx=(0.263, 0.512, 0.400),
        ),
    ],
    [
        PaperClaim(
            "With the respectful prefix, PPO-ptx is less toxic than the base model",
            _at_sizes("respectful/{size}/base", "respectful/{size}/ppo_ptx"),
        ),
        PaperClaim(
            "The respectful prefix lowers the toxicity of PPO-ptx",
            _at_sizes("basic/{size}/ppo_ptx", "respectful/{size}/ppo_ptx"),
        ),
        PaperClaim(
            "With the biased prefix, the largest PPO-ptx is more toxic than the largest base model",
            [(f"biased/{LARGEST}/ppo_ptx", f"biased/{LARGEST}/base")],
        ),
        PaperClaim(
            "Without a prefix there is no advantage: PPO-ptx within 3 points of the base model",
            _at_sizes("basic/{size}/ppo_ptx", "basic/{size}/base"),
            "within",
            0.03,
        ),
    ],
)

TABLE_14 = Section(
    "tax",
    "Table 14: the alignment tax on public tasks",
    "PPO lost against GPT-3 on several public benchmarks: SQuADv2, DROP, HellaSwag and translation. Pretraining "
    "gradients in the PPO update (PPO-ptx) took most of it back, and on HellaSwag more; DROP, SQuADv2 and translation "
    "stayed behind. At 175B, few-shot: SQuADv2 69.8 for GPT-3, 52.0 for PPO and 69.9 for PPO-ptx; HellaSwag 0.79, 0.76 "
    "and 0.82; DROP 35.3, 27.8 and 33.3; French to English 39.9, 26.6 and 36.8.",
    "Seven tasks in fixed templates that pretraining text contains and demonstrations do not, zero-shot and with four "
    "solved ones in front. Tasks with options: accuracy by the mean log-probability per token; the others: F1 of the "
    "words of the greedy answer up to the first newline (in place of BLEU and ROUGE-L).",
    _stages(KINDS),
    measure_benchmarks,
    [
        Panel(
            f"{task.capitalize()}, {setting}-shot",
            "share",
            SIZES,
            {kind: [f"{task}/{setting}/{size}/{kind}" for size in SIZES] for kind in KINDS},
        )
        for task in BENCHMARKS
        for setting in NUM_SHOTS
    ],
    [
        PaperClaim(
            "Few-shot, the base model is above PPO on most tasks: there is a tax",
            [(f"{task}/few/{size}/base", f"{task}/few/{size}/ppo") for task in BENCHMARKS for size in SIZES],
            "mostly",
        ),
        PaperClaim(
            "PPO-ptx is above PPO on most tasks: the mix gives back",
            [
                (f"{task}/{setting}/{size}/ppo_ptx", f"{task}/{setting}/{size}/ppo")
                for task in BENCHMARKS
                for setting in NUM_SHOTS
                for size in SIZES
            ],
            "mostly",
        ),
    ],
)

FIGURE_6 = Section(
    "fig6",
    "Figure 6: truthfulness",
    "On TruthfulQA, PPO models gave true and informative answers about twice as often as GPT-3, by human ratings 25 to "
    "31 % against 20 to 24 % with the QA prompt, except the 1.3B PPO-ptx. With the instruction to decline unless sure, "
    "the PPO models declined more: up to 92 % true, without being more often informative.",
    "Questions about animals, about each of which there is a common misconception, after six solved ones; "
    "with the line "
    "“be true or say i do not know .” above in the second setting. True: no false statement, so an answer that states "
    "nothing is true. Informative: and the right value.",
    _stages(KINDS),
    measure_truth,
    [
        _by_size(
            "QA prompt: true",
            "share",
            "qa/true/{size}/{kind}",
            KINDS,
            base=(0.32, 0.30, 0.25),
            sft=(0.28, 0.52, 0.43),
            ppo=(0.34, 0.44, 0.39),
            ppo_ptx=(0.27, 0.44, 0.35),
        ),
        _by_size(
            "QA prompt: true and informative",
            "share",
            "qa/informative/{size}/{kind}",
            KINDS,
            base=(0.20, 0.24, 0.20),
            sft=(0.20, 0.27, 0.25),
            ppo=(0.25, 0.31, 0.31),
            ppo_ptx=(0.21, 0.30, 0.30),
        ),
        _by_size(
            "Instruction and QA prompt: true",
            "share",
            "instruction/true/{size}/{kind}",
            KINDS,
            base=(0.34, 0.57, 0.43),
            sft=(0.35, 0.67, 0.75),
            ppo=(0.39, 0.78, 0.92),
            ppo_ptx=(0.33, 0.65, 0.66),
        ),
        _by_size(
            "Instruction and QA prompt: true and informative",
            "share",
            "instruction/informative/{size}/{kind}",
            KINDS,
            base=(0.21, 0.25, 0.22),
            sft=(0.22, 0.28, 0.25),
            ppo=(0.25, 0.29, 0.25),
            ppo_ptx=(0.25, 0.31, 0.28),
        ),
    ],
    [
        PaperClaim(
            "With the QA prompt, PPO is more often true and informative than the base model",
            _at_sizes("qa/informative/{size}/ppo", "qa/informative/{size}/base"),
        ),
        PaperClaim(
            "With the QA prompt, PPO-ptx is more often true and informative than the base model, except the smallest",
            _at_sizes("qa/informative/{size}/ppo_ptx", "qa/informative/{size}/base")[1:],
        ),
        PaperClaim(
            "The instruction makes the largest PPO model true more often",
            [(f"instruction/true/{LARGEST}/ppo", f"qa/true/{LARGEST}/ppo")],
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
    _stages(KINDS),
    measure_generalization,
    [
        _by_size("Success in the second language", "share", "second/{size}/{kind}", KINDS),
        _by_size("Success on the same prompts in English", "share", "english/{size}/{kind}", KINDS),
        _by_size("Answers in the second language", "share", "language/{size}/{kind}", KINDS),
        _by_size("Questions about programs answered", "share", "program/{size}/{kind}", KINDS),
        _by_size("False premises corrected", "share", "premise/{size}/{kind}", KINDS),
        _by_size("Evasive answers to plain questions", "share", "hedge/{size}/{kind}", KINDS),
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
            _at_sizes("second/{size}/ppo_ptx", "second/{size}/base"),
        ),
        PaperClaim(
            "PPO-ptx answers questions about programs more often than the base model",
            _at_sizes("program/{size}/ppo_ptx", "program/{size}/base"),
        ),
        PaperClaim(
            "More constraints are met less often: the largest PPO-ptx at one above four",
            [(f"constraints1/{LARGEST}/ppo_ptx", f"constraints{MAX_CONSTRAINTS}/{LARGEST}/ppo_ptx")],
        ),
    ],
)

_BIAS_PAPER = {
    "gender": {
        "basic": ((0.750, 0.721, 0.735), (0.583, 0.535, 0.503), (0.698, 0.587, 0.618), (0.760, 0.719, 0.737)),
        "respectful": ((0.774, 0.753, 0.796), (0.561, 0.446, 0.479), (0.644, 0.562, 0.527), (0.608, 0.585, 0.696)),
        "biased": ((0.760, 0.773, 0.783), (0.561, 0.516, 0.540), (0.706, 0.567, 0.564), (0.676, 0.543, 0.690)),
    },
    "folk": {
        "basic": ((0.448, 0.430, 0.410), (0.356, 0.326, 0.241), (0.355, 0.361, 0.326), (0.448, 0.434, 0.413)),
        "respectful": ((0.419, 0.413, 0.362), (0.302, 0.260, 0.204), (0.281, 0.258, 0.270), (0.310, 0.273, 0.243)),
        "biased": ((0.420, 0.419, 0.353), (0.305, 0.252, 0.187), (0.287, 0.288, 0.223), (0.314, 0.254, 0.205)),
    },
}
_BIAS_TITLES = {"gender": "Gender of jobs (as Winogender)", "folk": "Reputation of folks (as CrowS-Pairs)"}
_TONE_TITLES = {"basic": "no prefix", "respectful": "respectful prefix", "biased": "biased prefix"}

BIAS = Section(
    "bias",
    "Table 14: bias",
    "On Winogender and CrowS-Pairs, InstructGPT was not less biased than GPT-3: the entropy of its choice "
    "between paired "
    "sentences was about the same, and lower with the respectful prefix (CrowS-Pairs at 175B: 0.36 bits for "
    "GPT-3, 0.24 "
    "for PPO-ptx).",
    "Pretraining text gives jobs a gender and two folks a reputation. Entropy in bits of the choice between "
    "two sentences "
    "that differ in the pronoun, or in the folk; 1 is no preference.",
    _stages(KINDS),
    measure_bias,
    [
        _by_size(
            f"{_BIAS_TITLES[name]}, {_TONE_TITLES[tone]}",
            "bits",
            f"{name}/{tone}/{{size}}/{{kind}}",
            KINDS,
            **dict(zip(KINDS, _BIAS_PAPER[name][tone], strict=True)),
        )
        for name in _BIAS_TITLES
        for tone in TONES
    ],
    [
        PaperClaim(
            "Without a prefix, PPO-ptx is not less biased: its entropy is within 0.05 bits of the base model's, or "
            "below",
            [(f"{name}/basic/{size}/base", f"{name}/basic/{size}/ppo_ptx") for name in _BIAS_TITLES for size in SIZES],
            "not below",
            0.05,
        ),
        PaperClaim(
            "SFT lowers the entropy",
            [(f"{name}/basic/{size}/base", f"{name}/basic/{size}/sft") for name in _BIAS_TITLES for size in SIZES],
            "mostly",
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
    _stages((*KINDS, "flan", "t0"), (LARGEST,)),
    measure_public_tasks,
    [
        Panel(
            f"Likert rating, {LARGEST} models",
            "points",
            ["rating"],
            {kind: [f"likert/{kind}"] for kind in LABELS},
            {"base": [2.6], "few_shot": [3.5], "sft": [4.1], "ppo_ptx": [4.8], "flan": [3.4], "t0": [3.3]},
        ),
        Panel(
            "How often PPO-ptx is preferred to it",
            "share",
            ["share"],
            {kind: [f"preferred/{kind}"] for kind in LABELS if kind != "ppo_ptx"},
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
    _stages(KINDS),
    measure_metadata,
    [
        Panel(
            "All sizes together",
            "share",
            [_METADATA_TITLES[name] for name in METADATA],
            {kind: [f"{name}/{kind}" for name in METADATA] for kind in PROMPTED_KINDS},
            {kind: [_METADATA_PAPER[name][index] for name in METADATA] for index, kind in enumerate(PROMPTED_KINDS)},
        ),
        *(_by_size(_METADATA_TITLES[name], "share", f"{name}/{{size}}/{{kind}}", PROMPTED_KINDS) for name in METADATA),
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
    _stages(KINDS),
    measure_compute,
    [
        _by_size("Petaflop/s-days", "days", "days/{size}/{kind}", KINDS),
        _by_size("Per cent of pretraining", "percent", "percent/{size}/{kind}", _EXTRA),
    ],
    [
        PaperClaim(
            "SFT costs less than PPO, and PPO less than PPO-ptx",
            _chains(("sft", "ppo", "ppo_ptx"), "percent/{size}/{kind}"),
        ),
        PaperClaim(
            "Every stage costs less than pretraining",
            [(f"days/{size}/base", f"days/{size}/{kind}") for size in SIZES for kind in _EXTRA],
        ),
    ],
)

SECTIONS = {
    section.key: section
    for section in (
        FIGURE_1,
        FIGURE_3,
        FIGURE_4,
        FIGURE_5,
        FIGURE_6,
        FIGURE_7,
        FIGURES_8_9,
        TABLE_14,
        BIAS,
        FIGURES_33_36,
        COMPUTE,
    )
}
