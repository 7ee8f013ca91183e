"""One language: the field's terms in American spelling, in code, recipes and docs (tests apart from their names)."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# a private word, and what to write instead
PRIVATE_WORDS = {
    r"mend(?:s|ed|ing)?": "fix, hint",
    r"rooms?": "KV cache, space, limit",
    r"rid(?:es?|ing|den)": "attach, shared backbone",
    r"deal(?:s|t|ing)?": "partition, assign",
    r"(?:lays?|laid|laying)(?:[_ ](?:out|down))?": "pack",
    r"(?<!table-)(?<!constrained_)layouts?": "packing, packed batch",
    r"set aside": "allocate",
    r"put into words": "render, apply the template",
    r"behind each other": "concatenated",
    r"half turns?": "rotate_half",
    r"told apart": "distinguish",
    r"tall(?:y|ies)": "epoch means",
}
BRITISH = (
    r"\w*(?:centre|colour|behaviour|favour|honour|neighbour|labour|rumour|armour|flavour|humour|vapour|harbour|"
    r"grey|judgement|artefact|catalogue|analogue|programme|licence|defence|offence|sceptic|aluminium|"
    r"fulfil|enrol|instalment|manoeuvre|moult|plough|storey|tyre|whilst|amongst|learnt|spelt|burnt|dreamt|"
    r"modell(?:ed|ing|er)|labell(?:ed|ing)|cancell(?:ed|ing)|travell(?:ed|ing|er)|signall(?:ed|ing)|"
    r"totall(?:ed|ing)|channell(?:ed|ing)|levell(?:ed|ing)|counsell(?:ed|ing|or)|fuell(?:ed|ing))\w*"
)
BRITISH_ISE = (
    r"\w*(?:normal|standard|penal|token|initial|optim|general|special|util|organ|recogn|summar|serial|regular|"
    r"parallel|minim|maxim|synchron|memor|quant|vector|random|emphas|categor|character|visual|final|central|"
    r"apolog|critic|familiar|local|modern|priorit|real|symbol|author|capital|crystal|customis|digit|econom|item|"
    r"material|mobil|monopol|neutral|patron|popular|public|stabil|steril|sympath|terror|victim|custom)"
    r"is(?:e|es|ed|ing|er|ers|ation|ations)\b"
)
# identifiers and settings of earlier versions: nothing was released, so none has an alias
OLD_NAMES = """
AdapterCritic AdapterReward AdaptiveKL CentreScores ContinueRun CosineToFraction CriticStart
DemonstrationPreparation DirectRows DriftWatch EndpointTruth FixedKL FixedLayer FixedRows GradientApart
GroupRelative GrowingRows HuggingFaceTruth LOGITS_A_BATCH LastLogits LeaveOneOut LengthPolicy MissingEnd
ModelOptions NormalisedReward PPOSettings PackedFeedForward PlannedDataModule PlannedLoader Preparation
PreparationReport PreparedDataModule PromptTokens PythonReward RankedRows RankingRow ReferenceTruth
RewardModelReward RewardQuality RewardSource RewardStep RidingHead  SampleTable SelfCheck SharedTrunkCritic
SideBySide StandardiseScores StopOnNonFinite SubjectModel TOKENS_A_BATCH TRAIN_IT_SO TextEnds ValidationResponses
WarmupThenConstant WordList _AT_ONCE_ELSEWHERE _on_every_token  _require_sequences _takes_segments
_tokenise _unembedding_of beside_policy best_of_each block_length by_ids check_groups check_identities check_room
check_same_words choose_tokens compiled_last_logits count_as_saved critic_next critic_of critic_start critic_warmup
direct_of draw_head draw_noise drawn_logprobs dropout_off duplicate_prefix end_ids endless_places ends_and_padding
ensemble_lower_bound ensemble_minimum episodes_of every_reply  final_scores finite_scores free_name
fresh_baseline fresh_head from_rank_zero goes_back hand_over headed_text hidden_under hold_policy kept_for_backward
 last_hidden_in_one_row last_hidden_of_rows last_hidden_through_cache  last_logits
lay_in_one_row  leading_ids log_means logits_at logits_of logprobs_of long_prompts matrices_decay
maximum_length  misconfiguration_is_the_users missing_end model_identity most_returns next_norm
of_all_ranks of_own_adapter of_setting one_backward_pass own_reference pass_cost penalised_rewards prepares_nothing
quantile_groups random_order ratio_one   read_opinion reason_against_direct
reason_against_segments reason_against_sequences reason_against_sharing repeated_share require_positions
require_sequences require_whole response_columns  rewards_of roll_out rollout_batch rollout_statistics
rotation_of rows_of score_laid_out score_on_last_action score_without_padding seen_mask segment_inputs segment_mask
segment_positions sequence_inputs set_aside settle_averages several_ranks smallest_group stack_of
starts_at_reference step_tally support_threshold text_ends through_first to_label token_pieces
tokenise_demonstrations tokenise_prompts tokenise_rankings tokens_a_batch uncentred using_adapter usual_limits
validation_micro_batch value_clip values_beside weights_of_their_own weights_on_rank_zero whole_state_dict
""".split()  # noqa: SIM905
ALLOWED = {
    "colour": ("lit_rlhf/synthetic/", "tests/synthetic/"),  # a word of the synthetic world's language
    "colours": ("lit_rlhf/synthetic/", "tests/synthetic/"),
    # a task's name in its data
    "summarise": ("lit_rlhf/synthetic/", "tests/synthetic/", "lit_rlhf/evaluation/reports/", "tests/evaluation/"),
    "grey": ("lit_rlhf/synthetic/", "tests/synthetic/"),
    "was_cancelled": ("lit_rlhf/labeling/formats/", "tests/labeling/"),  # a key of Label Studio's files
    "cancelled": ("lit_rlhf/labeling/formats/", "tests/labeling/"),
    "cancelled_annotations": ("lit_rlhf/labeling/formats/", "tests/labeling/"),
    "total_cancelled": ("lit_rlhf/labeling/formats/", "tests/labeling/"),
}


def tracked_files() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    kinds = {".py", ".yaml", ".md", ".jinja", ".toml"}
    files = [ROOT / name for name in names if Path(name).suffix in kinds]
    return [path for path in files if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve()]


def words(pattern: str, text: str) -> list[tuple[int, str]]:
    """Line and word of each match; a word ends at an underscore too, so that identifiers are searched as well."""
    found = re.finditer(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", text, re.IGNORECASE)
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in found]


@pytest.mark.parametrize("pattern", [BRITISH, BRITISH_ISE])
def test_american_spelling(pattern: str) -> None:
    wrong = []
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        for line, word in words(pattern, path.read_text()):
            if not name.startswith(ALLOWED.get(word.lower(), ("/",))):
                wrong.append(f"{name}:{line}: {word}")
    assert wrong == []


@pytest.mark.parametrize("pattern", PRIVATE_WORDS)
def test_no_private_word(pattern: str) -> None:
    wrong = []
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("tests/"):
            wrong += [f"{name}:{line}: {word}" for line, word in words(pattern, path.read_text())]
    assert wrong == [], f"write: {PRIVATE_WORDS[pattern]}"


def test_no_old_name() -> None:
    old, wrong = set(OLD_NAMES), []
    for path in tracked_files():
        for line, text in enumerate(path.read_text().split("\n"), 1):
            wrong += [f"{path}:{line}: {word}" for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text) if word in old]
    assert wrong == []


def test_no_variable_is_called_figures() -> None:
    """Metrics and values are called that; a figure is a picture."""
    wrong = []
    for path in tracked_files():
        if path.suffix == ".py":
            tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
            names = (token for token in tokens if token.type == tokenize.NAME)
            wrong += [f"{path}:{token.start[0]}" for token in names if "figures" in token.string]
    assert wrong == []


def test_no_class_has_two_homes() -> None:
    homes: dict[str, list[str]] = {}
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("lit_rlhf/", "callbacks/")) and path.suffix == ".py":
            for match in re.finditer(r"^class (\w+)", path.read_text(), re.M):
                homes.setdefault(match[1], []).append(name)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
