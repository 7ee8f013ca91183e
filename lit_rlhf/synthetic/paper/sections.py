"""The sections of the report: what the paper found, what is measured of it, and the claims to hold our numbers to."""

from lit_rlhf.synthetic.paper.sections_instructions import FIGURE_1, FIGURE_3, FIGURE_4, FIGURE_5, FIGURES_8_9
from lit_rlhf.synthetic.paper.sections_labelers import PREFERENCES, REWARD_MODEL
from lit_rlhf.synthetic.paper.sections_public import BIAS, FIGURE_6, FIGURE_7, TABLE_14
from lit_rlhf.synthetic.paper.sections_training import COMPUTE, FIGURES_33_36

LABELS = {
    "base": "base",
    "few_shot": "few-shot",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "flan": "FLAN-like",
    "t0": "T0-like",
    "training_labelers": "training labelers",
    "heldout_labelers": "held-out labelers",
    "best_of_n": "best of n",
    "helpful": "helpful",
    "truthful": "truthful",
    "harmless": "harmless",
    "brief": "brief",
    "balanced": "balanced",
    "named": "told the group",
}
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
        REWARD_MODEL,
        PREFERENCES,
        COMPUTE,
    )
}
