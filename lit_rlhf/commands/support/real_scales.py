"""How much data, training and evaluation `lit-rlhf real` takes: a handful of steps, two CPU cores, or everything."""

from typing import NamedTuple

from lit_rlhf.commands.support.real_data import COMPARISONS, POLITENESS, RealDataSizes

# stage -> the sources of comparisons that it is measured on
REWARD_MODELS = {"reward": COMPARISONS | POLITENESS, "gold": COMPARISONS | POLITENESS, "politeness": POLITENESS}


class EvaluationSizes(NamedTuple):
    """Rows of each suite."""

    prompts: int
    toxicity: int
    questions: int  # of TruthfulQA
    endings: int  # of HellaSwag
    blocks: int  # of each text
    max_new_tokens: int


class RealScale(NamedTuple):
    """How much data, training and evaluation a run takes."""

    name: str
    about: str  # one line for the report
    sizes: RealDataSizes
    has_adapters: bool  # LoRA on one shared base, or all weights
    arguments: dict[str, tuple[str, ...]]  # training stage -> further arguments of `fit`
    evaluation: EvaluationSizes
    best_of: int
    seconds: dict[str, float]  # stage -> as measured, for the time that is left


def _ppo(iterations: int, episodes: int, micro_batch_size: int, tokens: int, *more: str) -> tuple[str, ...]:
    return (
        f"--trainer.max_epochs={iterations}",
        f"--model.ppo.rollout_batch_size={episodes}",
        f"--model.ppo.micro_batch_size={micro_batch_size}",
        f"--model.sampling.max_new_tokens={tokens}",
        *more,
    )


_LORA_RATES = {"sft": "--model.optimizer.lr=3.0e-4", "reward": "--model.optimizer.lr=5.0e-4"}
_FEW_PROBES = "--trainer.callbacks.RewardModelReport.probes=8"  # each is six more answers to score
_SMALL_STEPS = ("--data.micro_batch_size=4", "--trainer.accumulate_grad_batches=1")  # few rankings, many steps
# few episodes: several of each prompt, which is computed once for them; many steps, and a KL of some nats within them
_SMALL_MINIBATCHES = (
    "--model.ppo.samples_per_prompt=4",
    "--trainer.accumulate_grad_batches=1",
    "--model.optimizer.lr=5.0e-4",
    "--model.scheduler.init_args.warmup_iterations=1",
    "--model.kl.coefficient=0.05",
)
CPU = RealScale(
    "cpu",
    "subsets of the data that fit into 100 minutes on two CPU cores; adapters (LoRA) on one shared base",
    RealDataSizes(
        demonstrations=360,
        rankings=240,
        easy_pairs=460,
        validation_rankings=150,
        prompts=2000,
        evaluation_prompts=96,
        max_prompt_tokens=128,
        max_completion_tokens=96,
        max_ranked_tokens=128,
    ),
    has_adapters=True,
    arguments={
        "sft": ("--trainer.max_epochs=1", _LORA_RATES["sft"]),
        **dict.fromkeys(REWARD_MODELS, (*_SMALL_STEPS, _LORA_RATES["reward"], _FEW_PROBES)),
        "ppo": _ppo(8, 64, 8, 64, *_SMALL_MINIBATCHES),
        "ppo-ptx": _ppo(8, 64, 8, 64, *_SMALL_MINIBATCHES),
    },
    evaluation=EvaluationSizes(40, 48, 16, 40, 8, 64),
    best_of=4,
    seconds={
        "model": 25,
        "data": 3,
        "precision": 15,
        "sft": 170,
        "reward": 340,
        "gold": 350,
        "politeness": 240,
        "accuracy": 145,
        "ppo": 860,
        "ppo-ptx": 900,
        "evaluation": 715,
    },
)
_FEW_STEPS = (
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--data.micro_batch_size=2",
)
TINY = RealScale(
    "tiny",
    "a handful of steps: the procedure at work, and no results",
    RealDataSizes(
        demonstrations=32,
        rankings=24,
        easy_pairs=24,
        validation_rankings=12,
        prompts=64,
        evaluation_prompts=4,
        max_prompt_tokens=64,
        max_completion_tokens=32,
        max_ranked_tokens=32,
    ),
    has_adapters=True,
    arguments={
        "sft": (*_FEW_STEPS, _LORA_RATES["sft"]),
        **dict.fromkeys(REWARD_MODELS, (*_FEW_STEPS, _LORA_RATES["reward"])),
        "ppo": _ppo(2, 4, 2, 8),
        "ppo-ptx": _ppo(2, 4, 2, 8),
    },
    evaluation=EvaluationSizes(4, 4, 2, 2, 1, 8),
    best_of=2,
    seconds={},
)
FULL = RealScale(
    "full",
    "all the data, all weights, and the proportions of the paper: hours on a CPU, for a GPU",
    RealDataSizes(None, None, None, 300, None, 256, 256, 256, 512),
    has_adapters=False,
    arguments={},
    evaluation=EvaluationSizes(256, 1000, 400, 1000, 100, 128),
    best_of=8,
    seconds={},
)
SCALES = {scale.name: scale for scale in (TINY, CPU, FULL)}
