"""A push to a stand-in for the hub: file by file, refused before it is begun, and without the token anywhere."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.lineage.hub import check_push, push_folder
from tests.helpers.hub_server import TOKEN, USER, HubServer, serve_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "README.md").write_text("---\nlibrary_name: transformers\n---\n# ä\n", encoding="utf-8")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (model / "additional_chat_templates" / "a.jinja").write_text("{{ a }}")
    return model


@pytest.mark.parametrize("private", [True, False])
def test_every_file_arrives_as_it_is(private: bool, hub: HubServer, folder: Path) -> None:
    url = push_folder(folder, "lab/model", private, "message")
    assert url == f"{hub.url}/lab/model"
    sent = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == {"lab/model": sent}
    assert hub.created[0].get("visibility") == ("private" if private else "public")
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in sent.values())


@pytest.mark.parametrize("repo", ["ada/model", "lab/model", "Lab/model.v2"])
def test_what_the_hub_would_take_is_not_refused(repo: str, hub: HubServer) -> None:
    check_push(repo)
    assert hub.created == [] and hub.files == {}, "a check writes nothing"


@pytest.mark.parametrize("repo", ["model", "a/b/c", "lab/a b", "lab/..", "-lab/x", "", "https://huggingface.co/lab/x"])
def test_a_name_that_is_none_is_refused_without_a_request(repo: str, hub: HubServer) -> None:
    with pytest.raises(UserError, match=r"^push: "):
        check_push(repo)
    assert hub.tokens == []


Arrange = Callable[[HubServer, pytest.MonkeyPatch], object]
REFUSED: dict[str, tuple[Arrange, str]] = {
    "no token": (lambda hub, patch: patch.delenv("HF_TOKEN"), "no token of the Hugging Face hub"),
    "offline": (
        lambda hub, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        "HF_HUB_OFFLINE=1; unset it",
    ),
    "refused token": (lambda hub, patch: setattr(hub, "user", None), "refuses the token"),
    "another's organization": (
        lambda hub, patch: setattr(hub, "user", {**USER, "orgs": []}),
        "the token is of ada, who is not in lab; it may push to ada",
    ),
    "a token that reads": (
        lambda hub, patch: setattr(hub, "user", {**USER, "auth": {"accessToken": {"role": "read"}}}),
        "the token of ada may only read",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_hub_would_refuse_is_one_line(kind: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    arrange, message = REFUSED[kind]
    arrange(hub, monkeypatch)
    with pytest.raises(UserError, match=message) as raised:
        check_push("lab/model")
    assert TOKEN not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["/api/repos/create", "/api/models/lab/model/commit/main"])
def test_a_push_that_fails_says_that_the_model_is_complete(path: str, hub: HubServer, folder: Path) -> None:
    hub.fails[path] = 403
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=f"the model is complete in {folder}: push it with `hf upload lab/model"
    ) as raised:
        push_folder(folder, "lab/model", False, "message")
    assert TOKEN not in str(raised.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
