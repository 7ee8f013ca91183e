"""A stand-in for W&B's server on loopback: runs, and versions of artifacts with their files, edges and links.

It answers what wandb-core and the wandb package ask of a server for `wandb.init`, `use_artifact`, `log_artifact`,
`link_artifact` and a saved view, in the protocol of wandb 0.31; any other operation is an error, and kept in `refused`.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helpers.loopback import Call, serve_calls

KEY = "0123456789abcdef" * 2 + "feedc0de"  # in the form of a real one
ENTITY, ORGANIZATION = "lab", "org"
FEATURES = ("ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",)


@dataclass
class Version:
    """One version of an artifact."""

    id: str
    project: str
    collection: str
    kind: str
    number: int  # in its collection
    digest: str
    metadata: dict[str, Any]
    aliases: set[str]
    run: str | None  # that logged it
    committed: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)


class WandbServer:
    """A running stand-in.

    Attributes:
        runs: id -> the last variables of UpsertBucket that are not null.
        versions: id -> version.
        used: run and the id of a version that is one of its inputs.
        links: id of a version and the path of the collection that it is linked to.
        files: path of an upload -> bytes.
        views: saved views of projects.
        fails: name of an operation -> message of the error that it is answered with.
        refused: operations that are not known.
    """

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, Version] = {}
        self.used: set[tuple[str, str]] = set()
        self.links: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.views: list[dict[str, Any]] = []
        self.fails: dict[str, str] = {}
        self.refused: list[str] = []

    def answer(self, call: Call) -> tuple[int, Any]:
        """Return status and content of the answer to a request."""
        if call.path.startswith("/upload/"):
            self.files[call.path.removeprefix("/upload/")] = call.body
            return 200, {}
        if call.path != "/graphql":  # the file stream of a run
            return 200, {"exitcode": None, "limits": {}}
        request = json.loads(call.body)
        (name,) = re.findall(r"(?:query|mutation)\s+(\w+)", request["query"])[:1]
        if name in self.fails:
            return 200, {"data": None, "errors": [{"message": self.fails[name]}]}
        operation = getattr(self, f"answer_{name}", None)
        if operation is None:
            self.refused.append(name)
            return 400, {"errors": [{"message": f"the stand-in does not know {name}"}]}
        variables = request.get("variables") or {}
        return 200, {"data": operation(variables.get("input") or variables)}

    # ------------------------------------------------------------------------------------------------------------ runs

    def answer_ServerFeaturesQuery(self, _: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": [{"name": name, "isEnabled": True} for name in FEATURES]}}

    def answer_Viewer(self, _: dict[str, Any]) -> Any:
        user = {"id": "1", "entity": ENTITY, "username": "ada", "email": "ada@example.com", "flags": "{}"}
        return {"viewer": {**user, "teams": {"edges": []}}}

    def answer_GetDefaultEntity(self, _: dict[str, Any]) -> Any:
        return {"viewer": {"id": "1", "entity": ENTITY}}

    def answer_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> Any:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def answer_RunResumeStatus(self, given: dict[str, Any]) -> Any:
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": None}
        empty = {"summaryMetrics": "{}", "config": "{}", "historyTail": "[]", "eventsTail": "[]"}
        started = {"wandbConfig": '{"t": {}}'}
        lines = {"logLineCount": 0, "historyLineCount": 0, "eventsLineCount": 0}
        bucket = {"id": run["name"], "name": run["name"], "displayName": run["name"], "tags": [], "notes": ""}
        entity = {"id": ENTITY, "name": ENTITY}
        return {
            "model": {"id": "1", "name": given["project"], "entity": entity, "bucket": bucket | empty | started | lines}
        }

    def answer_UpsertBucket(self, given: dict[str, Any]) -> Any:
        name = given["name"] or given["id"]
        known = name in self.runs
        run = self.runs.setdefault(name, {})
        run |= {key: value for key, value in given.items() if value is not None}
        project = {"id": "1", "name": run["project"], "entity": {"id": ENTITY, "name": ENTITY}}
        about = {"description": None, "config": "{}", "sweepName": None, "historyLineCount": 0}
        bucket = {"id": name, "name": name, "displayName": run.get("displayName"), "project": project}
        return {"upsertBucket": {"bucket": bucket | about, "inserted": not known}}

    def answer_CreateRunFiles(self, given: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def answer_MarkRunFilesUploaded(self, _: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    # ------------------------------------------------------------------------------------------------------- artifacts

    def answer_CreateArtifact(self, given: dict[str, Any]) -> Any:
        (collection,) = given.get("artifactCollectionNames") or [given["artifactCollectionName"]]
        project, aliases = given["projectName"], {each["alias"] for each in given.get("aliases") or ()}
        before = [each for each in self.versions.values() if (each.project, each.collection) == (project, collection)]
        for each in before:
            each.aliases -= aliases  # an alias is of one version
        version = next((each for each in before if each.digest == given["digest"]), None)
        if version is None:
            metadata = json.loads(given.get("metadata") or "{}")
            about = (project, collection, given["artifactTypeName"], len(before), given["digest"], metadata)
            version = Version(f"version{len(self.versions)}", *about, set(), given.get("runName"))
            self.versions[version.id] = version
        version.aliases |= aliases
        latest = {"id": before[-1].id} if before else None
        state = "COMMITTED" if version.committed else "PENDING"
        return {"createArtifact": {"artifact": {"id": version.id, "state": state, "artifactSequence": {
            "latestArtifact": latest}}}}  # fmt: skip

    def answer_CreateArtifactManifest(self, given: dict[str, Any]) -> Any:
        return {"createArtifactManifest": {"artifactManifest": self.manifest_of(given["artifactID"])}}

    def answer_UpdateArtifactManifest(self, given: dict[str, Any]) -> Any:
        return {"updateArtifactManifest": {"artifactManifest": self.manifest_of(given["artifactManifestID"])}}

    def manifest_of(self, version: str) -> Any:
        file = {"id": version, "uploadUrl": f"{self.url}/upload/{version}/manifest", "uploadHeaders": []}
        return {"id": version, "file": file}

    def answer_CreateArtifactFiles(self, given: dict[str, Any]) -> Any:
        nodes = [
            {
                "storagePath": f"{each['artifactID']}/{each['name']}",
                "uploadUrl": f"{self.url}/upload/{each['artifactID']}/files/{each['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": each["artifactID"]},
            }
            for each in given["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def answer_CommitArtifact(self, given: dict[str, Any]) -> Any:
        version = self.versions[given["artifactID"]]
        version.committed, version.manifest = True, json.loads(self.files[f"{version.id}/manifest"])
        return {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}

    def answer_UseArtifact(self, given: dict[str, Any]) -> Any:
        self.used.add((given["runName"], given["artifactID"]))
        return {"useArtifact": {"artifact": self.describe(self.versions[given["artifactID"]])}}

    def answer_ArtifactByID(self, given: dict[str, Any]) -> Any:
        return {"artifact": self.describe(self.versions[given["id"]])}

    def answer_ArtifactType(self, given: dict[str, Any]) -> Any:
        version = self.find_by_name(given["project"], given["name"])
        return {"project": {"artifact": version and {"artifactType": {"name": version.kind}}}}

    def answer_ArtifactMembershipByName(self, given: dict[str, Any]) -> Any:
        version = self.find_by_name(given["project"], given["name"])
        membership = version and self.membership(version, version.collection, "ArtifactSequence")
        return {"project": {"artifactCollectionMembership": membership}}

    def find_by_name(self, project: str, name: str) -> Version | None:
        collection, _, alias = name.partition(":")
        for version in self.versions.values():
            found = alias in (*version.aliases, f"v{version.number}")
            if found and version.committed and (version.project, version.collection) == (project, collection):
                return version
        return None

    def answer_LinkArtifact(self, given: dict[str, Any]) -> Any:
        path = "/".join(given[f"{name}Name"] for name in ("entity", "project", "artifactPortfolio"))
        self.links.append((given["artifactID"], path))
        version = self.versions[given["artifactID"]]
        membership = self.membership(version, given["artifactPortfolioName"], "ArtifactPortfolio")
        return {"result": {"versionIndex": 0, "artifactMembership": membership}}

    def answer_FetchOrgInfoFromEntity(self, _: dict[str, Any]) -> Any:
        return {"entity": {"organization": {"name": ORGANIZATION, "orgEntity": {"name": ORGANIZATION}}, "user": None}}

    def membership(self, version: Version, collection: str, kind: str) -> dict[str, Any]:
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": version.id,
            "versionIndex": version.number,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [],
            "artifactCollection": self.collection(version.project, collection, kind),
            "artifact": self.describe(version),
        }

    def collection(self, project: str, name: str, kind: str) -> dict[str, Any]:
        owner = {"id": "1", "internalId": "1", "name": project, "entity": {"name": ENTITY}}
        return {"__typename": kind, "name": name, "project": owner}

    def describe(self, version: Version) -> dict[str, Any]:
        return {
            "__typename": "Artifact",
            "id": version.id,
            "artifactSequence": self.collection(version.project, version.collection, "ArtifactSequence"),
            "versionIndex": version.number,
            "artifactType": {"name": version.kind},
            "description": None,
            "metadata": json.dumps(version.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED" if version.committed else "PENDING",
            "size": 1,
            "digest": version.digest,
            "commitHash": None,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }

    def answer_UpsertView2(self, given: dict[str, Any]) -> Any:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "view0", "name": given["name"]}, "inserted": True}}

    # ----------------------------------------------------------------------------------------------------------- graph

    def edges(self) -> set[tuple[str, str]]:
        """Return which artifact was made from which: pairs of collections."""
        return {
            (self.versions[used].collection, made.collection)
            for run, used in self.used
            for made in self.versions.values()
            if made.run == run and made.kind in ("dataset", "model", "evaluation")  # tables are artifacts, too
        }

    def find(self, collection: str) -> Version:
        """Return the only version of a collection."""
        (version,) = (each for each in self.versions.values() if each.collection == collection)
        return version


@contextmanager
def serve_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Run a stand-in, with the environment of a user who is logged in to it."""
    import wandb

    server = WandbServer()
    with serve_calls(server.answer) as url:
        server.url = url
        for name, value in {"BASE_URL": url, "API_KEY": KEY, "SILENT": "true"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        wandb.teardown()  # it reads its variables once
        try:
            yield server
        finally:
            wandb.teardown()
