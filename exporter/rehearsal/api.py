"""The HTTP interface of the rehearsal Hub: routes and the shapes of their answers."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, unquote, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from exporter.rehearsal.access import Token, authenticate
from exporter.rehearsal.answers import commit_row, discussion_row, sibling, tree_entries
from exporter.rehearsal.changes import INITIAL_PATTERNS, changed_tree, lfs_attributes, lfs_patterns, upload_mode
from exporter.rehearsal.front_matter import check_front_matter
from exporter.rehearsal.repository import Blob, Discussion, Refusal, Repository, timestamp
from exporter.rehearsal.storage import PART_SIZE, Storage
from exporter.rehearsal.xet import XetStore, expiration

PAGE_SIZE = 1000
"""Entries of one page of a listing."""


class Api:
    """The state that all requests share, and one method per route."""

    def __init__(
        self,
        endpoint: str,
        storage: Storage,
        repositories: dict[str, Repository],
        tokens: dict[str, Token],
        organizations: set[str],
    ) -> None:
        self.endpoint = endpoint
        # Another origin than the endpoint's, as on the real Hub: the client follows same-origin redirects by itself
        # and would look for X-Repo-Commit in the answer of the storage.
        self.storage_endpoint = endpoint.replace("127.0.0.1", "localhost")
        self.storage = storage
        self.repositories = repositories
        self.tokens = tokens
        self.organizations = organizations

    def application(self) -> ASGIApp:
        repo, model = "/{namespace}/{name}", "/api/models/{namespace}/{name}"
        routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self.create_repo, methods=["POST"]),
            Route(model, self.info),
            Route(f"{model}/revision/{{revision}}", self.info),
            Route(f"{model}/preupload/{{revision}}", self.preupload, methods=["POST"]),
            Route(f"{model}/commit/{{revision}}", self.commit, methods=["POST"]),
            Route(f"{model}/tree/{{revision}}", self.tree),
            Route(f"{model}/tree/{{revision}}/{{path:path}}", self.tree),
            Route(f"{model}/paths-info/{{revision}}", self.paths_info, methods=["POST"]),
            Route(f"{model}/commits/{{revision}}", self.commits),
            Route(f"{model}/refs", self.refs),
            Route(f"{model}/branch/{{branch}}", self.branch, methods=["POST", "DELETE"]),
            Route(f"{model}/tag/{{revision}}", self.tag, methods=["POST", "DELETE"]),
            Route(f"{model}/discussions", self.discussions, methods=["GET", "POST"]),
            Route(f"{model}/discussions/{{num:int}}", self.discussion),
            Route(f"{model}/discussions/{{num:int}}/merge", self.merge, methods=["POST"]),
            Route(f"{model}/discussions/{{num:int}}/status", self.change_status, methods=["POST"]),
            Route(f"{repo}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
            Route(f"{repo}.git/info/lfs/objects/verify", self.lfs_verify, methods=["POST"]),
            Route(f"{model}/xet-write-token/{{revision}}", self.xet_write_token),
            Route(f"{model}/xet-read-token/{{revision}}", self.xet_read_token),
            Route(f"{repo}/resolve/{{revision}}/{{path:path}}", self.resolve),
            Route("/storage/uploads/{upload}", self.complete, methods=["POST"]),
            Route("/storage/uploads/{upload}/{part:int}", self.upload_part, methods=["PUT"]),
            Route("/storage/{sha256}", self.download),
        ]
        return RawPath(Starlette(routes=routes, exception_handlers={Refusal: refused}))

    # Accounts and repositories

    async def whoami(self, request: Request) -> Response:
        token = self._token(request)
        namespaces = self.organizations.union(name.split("/")[0] for name in self.repositories)
        return JSONResponse(token.description(sorted(namespaces - {token.user})))

    async def validate_yaml(self, request: Request) -> Response:
        errors, warnings = check_front_matter((await request.json())["content"])
        report = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return JSONResponse(report, 400 if errors else 200)

    async def create_repo(self, request: Request) -> Response:
        token, body = self._token(request), await request.json()
        name = f"{body.get('organization') or token.user}/{body['name']}"
        url = f"{self.endpoint}/{name}"
        token.require_write(name)
        if name in self.repositories:
            raise Refusal(409, f"You already created this model repo: {name}", fields={"url": url})
        private = "private" in (body.get("visibility"), body.get("private") and "private")
        attributes = self.storage.add(lfs_attributes(INITIAL_PATTERNS.split()).encode())
        self.repositories[name] = Repository(name, private, token.user, {".gitattributes": attributes})
        return JSONResponse({"url": url, "name": name})

    async def info(self, request: Request) -> Response:
        repository = self._readable(request)
        commit = repository.resolve(revision(request))
        return JSONResponse(
            {
                "id": repository.repo_id,
                "modelId": repository.repo_id,
                "author": repository.repo_id.split("/")[0],
                "sha": commit.oid,
                "lastModified": timestamp(commit.date),
                "createdAt": timestamp(repository.created),
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [sibling(path, commit.tree[path]) for path in sorted(commit.tree)],
                "usedStorage": sum(blob.size for blob in commit.tree.values()),
            }
        )

    # Files

    async def tree(self, request: Request) -> Response:
        repository, folder = self._readable(request), unquote(request.path_params.get("path", ""))
        tree = repository.resolve(revision(request)).tree
        entries = tree_entries(tree, folder, recursive=flag(request, "recursive"))
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return page(request, entries, self.endpoint)

    async def paths_info(self, request: Request) -> Response:
        tree = self._readable(request).resolve(revision(request)).tree
        paths = parse_qs((await request.body()).decode()).get("paths", [])
        return JSONResponse([entry for entry in tree_entries(tree, "", recursive=True) if entry["path"] in paths])

    async def resolve(self, request: Request) -> Response:
        repository, path = self._readable(request), unquote(request.path_params["path"])
        commit = repository.resolve(revision(request))
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.tree.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        if blob.sha256 is None:
            return FileResponse(self.storage.path(blob), headers={**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        headers |= {"Location": f"{self.storage_endpoint}/storage/{blob.sha256}"}
        if blob.xet_hash:
            token_url = f"{self.endpoint}/api/models/{repository.repo_id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
        return Response(status_code=302, headers=headers)

    async def download(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        path = await run_in_threadpool(self.storage.path, Blob.large(sha256, 0))
        return FileResponse(path, headers={"ETag": f'"{sha256}"'})

    # Refs

    async def commits(self, request: Request) -> Response:
        history = self._readable(request).history(revision(request))
        return page(request, [commit_row(commit) for commit in history], self.endpoint)

    async def refs(self, request: Request) -> Response:
        refs = self._readable(request).refs
        rows: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
        for ref, oid in refs.items():
            _, kind, name = ref.split("/", 2)
            rows[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        pull_requests = {"pullRequests": rows["pr"]} if flag(request, "include_prs") else {}
        return JSONResponse({"branches": rows["heads"], "converts": [], "tags": rows["tags"], **pull_requests})

    async def branch(self, request: Request) -> Response:
        repository, ref = self._writable(request), f"refs/heads/{unquote(request.path_params['branch'])}"
        if request.method == "DELETE":
            repository.delete_ref(ref)
            return Response()
        body = json.loads(await request.body() or "{}")
        repository.create_ref(ref, repository.resolve(body.get("startingPoint", "main")))
        return Response(status_code=201)

    async def tag(self, request: Request) -> Response:
        repository = self._writable(request)
        if request.method == "DELETE":
            repository.delete_ref(f"refs/tags/{revision(request)}")
            return Response()
        repository.create_ref(f"refs/tags/{(await request.json())['tag']}", repository.resolve(revision(request)))
        return Response(status_code=201)

    # Discussions

    async def discussions(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._open_discussion(request)
        repository, query = self._readable(request), request.query_params
        wanted = (query.get("type"), query.get("status"), query.get("author"))
        found = [discussion for discussion in reversed(repository.discussions) if selected(discussion, *wanted)]
        start = int(query.get("p", 0)) * PAGE_SIZE
        rows = [discussion_row(repository.repo_id, discussion) for discussion in found[start : start + PAGE_SIZE]]
        return JSONResponse({"discussions": rows, "count": len(found), "start": start})

    async def discussion(self, request: Request) -> Response:
        repository = self._readable(request)
        discussion = repository.discussion(request.path_params["num"])
        details: dict[str, object] = {**discussion_row(repository.repo_id, discussion), "events": discussion.events}
        if discussion.base:
            changes = {"base": discussion.base, "mergeCommitId": discussion.merged}
            details |= {"changes": changes, "filesWithConflicts": [], "diff": ""}
        return JSONResponse(details)

    async def merge(self, request: Request) -> Response:
        self._writable(request).merge(request.path_params["num"], self._token(request).user)
        return JSONResponse({"success": True})

    async def change_status(self, request: Request) -> Response:
        discussion = self._writable(request).discussion(request.path_params["num"])
        discussion.status = (await request.json())["status"]
        discussion.add_event("status-change", self._token(request).user, status=discussion.status)
        return JSONResponse({"newStatus": discussion.events[-1]})

    async def _open_discussion(self, request: Request) -> Response:
        repository, body = self._writable(request), await request.json()
        title, text, author = body["title"], body["description"], self._token(request).user
        if body["pullRequest"]:
            opened = repository.open_pull_request(title, text, author, "main", status="draft")
        else:
            opened = repository.open_discussion(title, text, author)
        return JSONResponse({"num": opened.num})

    # Commits

    async def preupload(self, request: Request) -> Response:
        tree = self._writable(request).resolve(revision(request)).tree
        body = await request.json()
        patterns = lfs_patterns(self.storage.text(tree, ".gitattributes"))
        ignored = (body.get("gitIgnore") or self.storage.text(tree, ".gitignore")).split()
        return JSONResponse({"files": [upload_mode(file, tree, patterns, ignored) for file in body["files"]]})

    async def commit(self, request: Request) -> Response:
        repository, token = self._writable(request), self._token(request)
        header, *operations = [json.loads(line) for line in (await request.body()).splitlines() if line]
        title, message = header["value"]["summary"], header["value"]["description"]
        head = repository.resolve(revision(request))
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = changed_tree(head.tree, operations, self.storage)
        ref, answer, url = repository.ref(revision(request)), {}, f"{self.endpoint}/{repository.repo_id}"
        if flag(request, "create_pr"):
            num = repository.open_pull_request(title, message, token.user, revision(request)).num
            ref, answer = f"refs/pr/{num}", {"pullRequestUrl": f"{url}/discussions/{num}"}
        if ref is None or ref.startswith("refs/tags/"):
            raise Refusal(400, "Only a branch or a pull request can be committed to")
        oid = repository.commit(ref, tree, title, message, token.user).oid
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", **answer})

    # Large files

    async def lfs_batch(self, request: Request) -> Response:
        self._writable(request)
        verify = f"{self.endpoint}{request.scope['path'].removesuffix('batch')}verify"
        objects = [self._lfs_object(row["oid"], row["size"], verify) for row in (await request.json())["objects"]]
        return JSONResponse({"transfer": "multipart", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def lfs_verify(self, request: Request) -> Response:
        self._writable(request)
        body = await request.json()
        blob = self.storage.large(body["oid"])
        if blob is None or blob.size != body["size"]:
            raise Refusal(404, f"There is no object {body['oid']} of {body['size']} bytes")
        return Response()

    async def upload_part(self, request: Request) -> Response:
        upload = self.storage.upload(request.path_params["upload"])
        etag = await self.storage.receive(upload, request.path_params["part"], request.stream())
        if upload.size <= PART_SIZE:
            await run_in_threadpool(self.storage.finish, upload)
        return Response(headers={"ETag": etag})

    async def complete(self, request: Request) -> Response:
        upload, body = self.storage.upload(request.path_params["upload"]), await request.json()
        if {part["partNumber"]: part["etag"] for part in body["parts"]} != upload.etags:
            raise Refusal(400, "The parts are not those that were uploaded")
        await run_in_threadpool(self.storage.finish, upload)
        return JSONResponse({})

    async def xet_write_token(self, request: Request) -> Response:
        self._writable(request)
        return xet_connection(self._xet().write_url)

    async def xet_read_token(self, request: Request) -> Response:
        self._readable(request)
        return xet_connection(self._xet().read_url())

    def _xet(self) -> XetStore:
        if self.storage.xet is None:
            raise Refusal(404, "This Hub has no Xet storage")
        return self.storage.xet

    def _lfs_object(self, oid: str, size: int, verify: str) -> dict[str, object]:
        """One object of a batch answer: without actions if it is here, else where to put it, whole or in parts."""
        if self.storage.large(oid) is not None:
            return {"oid": oid, "size": size}
        url = f"{self.storage_endpoint}/storage/uploads/{self.storage.begin(oid, size)}"
        upload: dict[str, object] = {"href": f"{url}/1"}
        if size > PART_SIZE:
            parts = {str(number): f"{url}/{number}" for number in range(1, -(-size // PART_SIZE) + 1)}
            upload = {"href": url, "header": {"chunk_size": str(PART_SIZE), **parts}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": verify}}}

    # What a request may see and change

    def _token(self, request: Request) -> Token:
        token = authenticate(self.tokens, request.headers.get("Authorization"))
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        return token

    def _readable(self, request: Request) -> Repository:
        token = authenticate(self.tokens, request.headers.get("Authorization"), code="RepoNotFound")
        repository = self.repositories.get(repo_id(request))
        if token is None and (repository is None or repository.private):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, request: Request) -> Repository:
        repository = self._readable(request)
        self._token(request).require_write(repository.repo_id)
        return repository


class RawPath:
    """Routes on the path as it was sent: a revision is one segment, ``refs%2Fpr%2F1``."""

    def __init__(self, application: ASGIApp) -> None:
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.application({**scope, "path": scope["raw_path"].decode()}, receive, send)


def repo_id(request: Request) -> str:
    return f"{request.path_params['namespace']}/{request.path_params['name']}"


def revision(request: Request) -> str:
    return unquote(request.path_params.get("revision", "main"))


def flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true")


def selected(discussion: Discussion, kind: str | None, status: str | None, author: str | None) -> bool:
    """Whether a listing with these filters (None: any) shows a discussion; a draft counts as open."""
    return (
        kind in (None, "all", "pull_request" if discussion.base else "discussion")
        and status in (None, "all", "open" if discussion.status in ("open", "draft") else "closed")
        and author in (None, discussion.author)
    )


def refused(request: Request, refusal: Exception) -> Response:
    """The Hub's way to say no: an ``error`` in the body, code and message also in headers."""
    assert isinstance(refusal, Refusal)
    line = " ".join(refusal.message.split()).encode("ascii", "backslashreplace").decode()
    headers = {"X-Error-Message": line, **refusal.headers}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return JSONResponse({"error": refusal.message, **refusal.fields}, refusal.status, headers)


def xet_connection(url: str) -> Response:
    """How to reach a Xet store, in the two spellings that clients read."""
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "rehearsal", "X-Xet-Token-Expiration": str(expiration())}
    return JSONResponse({"casUrl": url, "accessToken": "rehearsal", "exp": expiration()}, headers=headers)


def page(request: Request, rows: list[dict[str, object]], endpoint: str) -> Response:
    """One page of a listing; a ``Link`` header leads to the next."""
    start = int(request.query_params.get("cursor", 0))
    end = start + PAGE_SIZE
    headers = {}
    if end < len(rows):
        query = urlencode({**request.query_params, "cursor": end})
        headers["Link"] = f'<{endpoint}{request.scope["path"]}?{query}>; rel="next"'
    return JSONResponse(rows[start:end], headers=headers)
