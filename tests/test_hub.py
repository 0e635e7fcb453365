"""Rules on the Hub, against a server of our own that speaks the part of the protocol which is used."""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import odeopt
from odeopt.cli.main import main
from odeopt.hub import FILE, model_card

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub` is not installed")
errors = pytest.importorskip("huggingface_hub.errors")
ACCOUNT = {"horizon": 7, "task": "a toy", "note": "{braces} and ümlauts"}


class Server(ThreadingHTTPServer):
    """Keeps repositories as dictionaries of files, one for each commit; a commit is named by its number."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.private = {}, {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        found = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/(\w+)/(.+)", self.path)
        commits = self.server.commits.get(found[1]) if found else None
        if not commits:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        number = len(commits) if found[2] == "main" else int(found[2], 16)
        if not 1 <= number <= len(commits):
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        content = commits[number - 1][found[3]]
        tag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, X_Repo_Commit=f"{number:040x}", ETag=f'"{tag}"')

    def do_GET(self):
        if self.path.startswith("/api/models/"):  # what there is at a revision, which nobody here reads
            repo = "/".join(self.path.split("/")[3:5])
            return self.answer(200, {"id": repo, "sha": f"{len(self.server.commits[repo]):040x}", "siblings": []})
        return self.do_HEAD()

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            request = json.loads(text)
            repo = f"{request['organization']}/{request['name']}"
            if repo in self.server.commits:
                return self.answer(409, {"url": f"{self.server.url}/{repo}"})
            is_private = request.get("private") or request.get("visibility") == "private"
            self.server.commits[repo], self.server.private[repo] = [], is_private
            return self.answer(200, {"url": f"{self.server.url}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in json.loads(text)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in text.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            commits = self.server.commits[repo]
            commits.append({**(commits[-1] if commits else {}), **files})
            oid = f"{len(commits):040x}"
            return self.answer(
                200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}
            )
        return self.answer(404, {"error": f"unknown: {self.path}"})


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_anything")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield server
        server.shutdown()


def rule(seed=0):
    torch.manual_seed(seed)
    return odeopt.PortHamiltonianUpdate(hidden=(4,), modes=1)


def test_a_rule_comes_back_from_the_hub_as_it_went_there(server):
    address = rule().push_to_hub("me/my-rule", trained_for=ACCOUNT, private=True)
    assert address == "hf://me/my-rule@" + "1".zfill(40)
    assert server.private == {"me/my-rule": True}
    for path in (address, "hf://me/my-rule"):
        loaded = odeopt.load(path)
        assert loaded.config == rule().config
        assert loaded.trained_for == ACCOUNT
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), rule().parameters(), strict=True))


def test_revisions_are_kept_apart_and_a_loaded_rule_takes_its_account_along(server):
    first = rule(0).push_to_hub("me/my-rule", trained_for=ACCOUNT)
    second = rule(1).push_to_hub("me/my-rule", trained_for=ACCOUNT | {"horizon": 9})
    assert first != second
    assert [odeopt.load(address).trained_for["horizon"] for address in (first, second, "hf://me/my-rule")] == [7, 9, 9]
    third = odeopt.load(first).push_to_hub("me/other")
    assert odeopt.load(third).trained_for == ACCOUNT


def test_the_card_says_how_to_use_the_rule_and_what_it_was_trained_for(server):
    rule().push_to_hub("me/my-rule", trained_for=ACCOUNT)
    card = server.commits["me/my-rule"][0]["README.md"].decode()
    assert card == model_card(rule(), "me/my-rule", ACCOUNT)
    assert card == model_card(rule().requires_grad_(False), "me/my-rule", ACCOUNT)
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: odeopt" in front
    account, config = (json.loads(block.split("```")[0]) for block in body.split("```json\n")[1:])
    assert account == ACCOUNT
    assert config == json.loads(json.dumps(rule().config))
    assert 'odeopt.load("hf://me/my-rule")' in body


def test_a_file_that_was_changed_on_the_way_is_refused(server):
    rule().push_to_hub("me/my-rule", trained_for=ACCOUNT)
    content = server.commits["me/my-rule"][0][FILE]
    server.commits["me/my-rule"][0][FILE] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(ValueError, match="sha256"):
        odeopt.load("hf://me/my-rule")


def test_what_is_not_there_is_named(server, capsys, tmp_path):
    rule().push_to_hub("me/my-rule", trained_for=ACCOUNT)
    with pytest.raises(errors.RepositoryNotFoundError, match="me/none"):
        odeopt.load("hf://me/none")
    with pytest.raises(errors.RevisionNotFoundError):
        odeopt.load("hf://me/my-rule@5")
    assert main(["show", "hf://me/none", "--out", str(tmp_path)]) == 2
    assert "me/none" in capsys.readouterr().err
    assert main(["show", "hf://me/my-rule", "--out", str(tmp_path)]) == 0


def test_a_hub_that_cannot_be_reached_is_named(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    message = r"not uploaded to `me/my-rule`: the Hugging Face Hub, http://127.0.0.1:9, cannot be reached \(Connect"
    with pytest.raises(ConnectionError, match=message):
        rule().push_to_hub("me/my-rule", trained_for=ACCOUNT)


@pytest.mark.parametrize("path", ["hf://", "hf://me", "hf://me/a/b", "hf://me/a@", "hf://me/a b"])
def test_addresses_of_another_form_are_refused(path):
    with pytest.raises(
        ValueError, match=f"Parameter `path` should be `hf://user/name`.*Found `path = '{re.escape(path)}'"
    ):
        odeopt.load(path)


def test_nothing_is_sent_where_the_rule_cannot_be_saved(server):
    with pytest.raises(ValueError, match=r"Parameter `repo_id` should be `user/name`\. Found `repo_id = 'my-rule'`"):
        rule().push_to_hub("my-rule", trained_for=ACCOUNT)
    with pytest.raises(ValueError, match="Parameter `trained_for` should be a dictionary with `horizon` and `task`"):
        rule().push_to_hub("me/my-rule")
    assert not server.commits


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install -c constraints.txt -e "\.\[hub\]"'):
        odeopt.load("hf://me/my-rule")


def test_the_command_line_names_the_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["show", "hf://me/rule"]) == 2
    assert "Rules on the Hub need huggingface_hub: pip install" in capsys.readouterr().err
