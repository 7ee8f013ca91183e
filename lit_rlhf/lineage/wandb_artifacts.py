"""The lineage in Weights & Biases: inputs and outputs of a run as artifacts, with names that do not change.

An output is a version of the collection GROUP-ROLE, with its fingerprint as an alias, so that the run of a later stage
finds it without having asked this one. What W&B does not hold, such as a data set or a model of the hub, becomes an
artifact of a name and a content of its own, by reference: no data is uploaded.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.lineage.records import DataInput, LineageRecord, ModelInput, RunReference, read_record
from lit_rlhf.lineage.tree import read_parent, resolve_input
from lit_rlhf.models.fingerprint import LINEAGE_FILE

MAX_UPLOAD_GB = 2.0
TYPES = {"evaluation": "evaluation", "samples": "dataset"}  # of an output by its role; others are models
MAX_NAME = 100  # W&B allows 128 characters


def describe_run(run: Any, role: str, default_group: str) -> RunReference | None:
    """Return what identifies a run, and the collection of its output; None of a disabled run.

    Args:
        run: a `wandb.Run`.
        role: of the output.
        default_group: name of the experiment if the run has no group.
    """
    if run.disabled:
        return None
    group = run.group or default_group
    url = "" if run.offline else run.url or ""  # W&B prints a warning when it is asked for that of an offline run
    collection = make_name(f"{group}-{role}" if group else role)
    return RunReference(run.project, run.id, run.entity, url, group, collection)


def make_name(text: str) -> str:
    """Return a name that W&B takes: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.")[-MAX_NAME:] or "unnamed"


def make_alias(fingerprint: str) -> str:
    """Return the alias of a version by its content: "sha256-0123456789ab"."""
    return make_name(fingerprint)[:19]


def mirror_output(run: Any, record: LineageRecord, output: Path, max_upload_gb: float = MAX_UPLOAD_GB) -> None:
    """Record inputs and output in a run as far as it can be done now; say so where W&B refuses.

    Offline no input can be declared (`use_artifact` raises), and the version is kept until `wandb sync`; then
    `push_lineage` adds the inputs.

    Args:
        run: a `wandb.Run`.
        record: of the output.
        output: see `log_output`.
        max_upload_gb: see `log_output`.
    """
    import wandb

    try:
        if not run.offline:
            use_inputs(run, record, output if output.is_dir() else output.parent)
        log_output(run, record, output, max_upload_gb)
    # no network, or a name that has another type there: the record on the disk is enough for a later push
    except (wandb.Error, ValueError) as problem:
        reason = " ".join(str(problem).split())
        print(f"wandb: the artifacts are not recorded ({reason}): lit-rlhf lineage push {output}", file=sys.stderr)


def use_inputs(run: Any, record: LineageRecord, folder: Path) -> None:
    """Declare the models and the data of a record as inputs of an online run.

    Args:
        run: a `wandb.Run`.
        record: of the output.
        folder: that locations of the record are relative to.
    """
    import wandb

    inputs = {each.path: each for each in record.inputs}  # one model may have several roles
    for each in inputs.values():
        parent = read_parent(each, folder)
        if parent is not None and parent[1].wandb is not None:
            source, own = parent
            name = f"{parent[1].wandb.project}/{parent[1].wandb.collection}:{make_alias(own.fingerprint)}"
            try:
                run.use_artifact("/".join(filter(None, (parent[1].wandb.entity, name))))
                continue
            except (wandb.Error, ValueError):  # recorded offline, and not pushed yet
                print(f"wandb: there is no version {name} yet: lit-rlhf lineage push {source}")
        run.use_artifact(make_input_artifact(each, resolve_input(each, folder)))


def make_input_artifact(each: ModelInput | DataInput, source: Path | None) -> Any:
    """Return an artifact that stands for an input: what it is and where, without its bytes.

    Args:
        each: the input.
        source: where it is on this disk; None of what is on the hub, or gone.
    """
    import wandb

    about: dict[str, Any] = {"role": each.role, "path": each.path, "fingerprint": each.fingerprint}
    kind, prefix = "model", ""
    if isinstance(each, DataInput):
        kind, prefix = "dataset", "datasets/"
        about |= {"rows_read": each.rows_read, "rows_kept": each.rows_kept}
    artifact = wandb.Artifact(make_name("-".join(Path(each.path).parts[-2:])), type=kind, metadata=about)
    with artifact.new_file("input.json") as file:  # its content makes a changed file a new version
        json.dump({"path": each.path, "fingerprint": each.fingerprint}, file)
    uri = f"https://huggingface.co/{prefix}{each.path}"
    if source is not None or not each.location:
        artifact.add_reference(uri if source is None else source.resolve().as_uri(), name="content", checksum=False)
    return artifact


def log_output(run: Any, record: LineageRecord, output: Path, max_upload_gb: float = MAX_UPLOAD_GB) -> None:
    """Log a folder or file as the output of a run.

    Args:
        run: a `wandb.Run`.
        record: of the output, with `wandb`.
        output: an exported folder, the folder of an evaluation, or a sampled file.
        max_upload_gb: a larger folder is logged by reference.
    """
    import wandb

    assert record.wandb is not None
    about = {**record.metrics, "fingerprint": record.fingerprint, "flops": record.compute.flops}
    kind = TYPES.get(record.role, "model")
    artifact = wandb.Artifact(record.wandb.collection, type=kind, metadata=about)
    files = [output / name for name in (*record.files, LINEAGE_FILE)]
    if kind == "model":
        files = [path for path in sorted(output.iterdir()) if path.is_file()]
    elif output.is_file():
        files = [output, output.with_name(f"{output.name}.{LINEAGE_FILE}")]
    by_reference = sum(path.stat().st_size for path in files) > max_upload_gb * 1e9
    for path in files:
        if by_reference and not path.name.endswith(LINEAGE_FILE):
            artifact.add_reference(path.resolve().as_uri(), checksum=False)
        else:
            artifact.add_file(str(path), policy="immutable")  # else W&B copies it first
    logged = run.log_artifact(artifact, aliases=[*record.wandb.aliases, make_alias(record.fingerprint)])
    if record.wandb.registry and not run.offline:
        run.link_artifact(logged, record.wandb.registry)


def push_lineage(output: Path) -> list[str]:
    """Record in W&B what a run could not, parents first; return the names of the versions.

    Args:
        output: folder or file with a record.

    Raises:
        UserError: the record is missing, no run of W&B recorded it, or W&B is offline.
    """
    import wandb

    if not output.exists():
        raise UserError(f"lineage push: there is no folder or file {output}")
    record = read_record(output)
    if record is None:
        raise UserError(f"lineage push: {output} has no {LINEAGE_FILE}")
    if record.wandb is None:
        raise UserError(
            f"lineage push: {output} was made without Weights & Biases: its lineage.json names no run; add "
            "-c logger/wandb to the run"
        )
    mode = wandb.setup().settings.mode
    if mode not in ("online", "shared"):
        raise UserError(f"lineage push needs a login and a network, and W&B is {mode}: unset WANDB_MODE, wandb online")
    names = []
    for own, source in order_pushes(record, output).items():
        assert source.wandb is not None
        reference = source.wandb
        entity = reference.entity or None
        with wandb.init(entity=entity, project=reference.project, id=reference.id, resume="must") as run:
            use_inputs(run, source, own if own.is_dir() else own.parent)
            log_output(run, source, own)
        names.append(f"{reference.collection}:{make_alias(source.fingerprint)}")
    return names


def order_pushes(record: LineageRecord, output: Path) -> dict[Path, LineageRecord]:
    """Return an output and those that it was made from which a run of W&B recorded, each once and parents first."""
    ordered: dict[Path, LineageRecord] = {}
    for each in record.inputs:
        parent = read_parent(each, output if output.is_dir() else output.parent)
        if parent is not None and parent[1].wandb is not None:
            ordered |= {path: own for path, own in order_pushes(parent[1], parent[0]).items() if path not in ordered}
    return ordered | {output.resolve(): record}
