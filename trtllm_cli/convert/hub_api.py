"""What the hub says: which commit a revision is, which files it has, and why it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from trtllm_cli.convert.retry import Patience, TryAgain, asked_wait, describe_failure
from trtllm_cli.convert.transfer import INCOMPLETE, RECORD, Progress, RemoteFile
from trtllm_cli.errors import DownloadError, UsageError
from trtllm_cli.snapshot import COMMIT, MANIFEST, is_safe_name
from trtllm_cli.version import __version__

T = TypeVar("T")
DEFAULT_ENDPOINT = "https://huggingface.co"
TRIES_TO_REACH = 3  # of the first request: without a network there is no use in waiting longer
TOKEN_FIX = "pass --token or set HF_TOKEN (make one at https://huggingface.co/settings/tokens)"  # noqa: S105


class HubApi:
    """The hub at one endpoint, asked with one token."""

    def __init__(self, endpoint: str | None, token: str | None, patience: Patience, progress: Progress) -> None:
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.token = check_token(token)
        self.patience = patience
        self.progress = progress

    def headers(self) -> dict[str, str]:
        """The headers of a request for a file. The client drops the token where the hub redirects to a CDN."""
        return build_hf_headers(token=self.token, library_name="trtllm", library_version=__version__)

    def file_url(self, repo_id: str, commit: str, name: str) -> str:
        """Where the hub serves the file."""
        return f"{self.endpoint}/{repo_id}/resolve/{commit}/{quote(name)}"

    def list_files(self, repo_id: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """The commit that the revision is now, and its files by name: one request, so that the two agree.

        Raises DownloadError if the hub refuses, cannot be reached, or lists what cannot be fetched safely.
        """
        api = HfApi(self.endpoint, token=self.token, library_name="trtllm", library_version=__version__)

        def ask() -> tuple[str, list[RepoSibling]]:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=self.patience.timeout)
            return info.sha or "", info.siblings or []

        with self.refusals(repo_id, revision):
            commit, siblings = self._patiently(ask)
        if not COMMIT.fullmatch(commit):
            raise DownloadError(f"{self.endpoint} names no commit for {repo_id}", fix="check HF_ENDPOINT")
        files = (self._remote_file(repo_id, sibling) for sibling in siblings)
        return commit, {f.name: f for f in files if not _is_ours(f.name)}

    def _remote_file(self, repo_id: str, sibling: RepoSibling) -> RemoteFile:
        name, size = sibling.rfilename, sibling.size
        if not is_safe_name(name):
            raise DownloadError(
                f"{repo_id} lists a file name that leads out of the snapshot: {name!r}",
                fix="do not use this repository, and report it to the hub",
            )
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if size is None or size < 0 or not (sha256 or sibling.blob_id):
            raise DownloadError(
                f"{self.endpoint} gives no size and hash for {name}, so it cannot be verified",
                fix="use a hub that does (unset HF_ENDPOINT for huggingface.co)",
            )
        return RemoteFile(name, size, sha256, sibling.blob_id)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """The answer to a request to the API, tried again for what may pass."""
        failures = 0
        while True:
            try:
                return self._ask(ask)
            except TryAgain as e:
                failures += 1
                if self.patience.ends(failures, e.wait) or (not e.answered and failures >= TRIES_TO_REACH):
                    raise DownloadError(
                        f"{self.endpoint} cannot be reached: {e}",
                        fix="check the network and HF_ENDPOINT, or use --offline for what is on this machine",
                    ) from None
                seconds = self.patience.wait(failures, e.wait)
                self.progress.note(f"{self.endpoint}: {e}; trying again in {seconds:.0f} s")
                time.sleep(seconds)

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except HfHubHTTPError as e:
            if e.response.status_code in (408, 425, 429) or e.response.status_code >= 500:
                reason = f"it answered HTTP {e.response.status_code}"
                raise TryAgain(reason, asked_wait(e.response.headers)) from None
            raise
        except HTTPError as e:
            raise TryAgain(describe_failure(e), answered=False) from None
        except HFValidationError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DownloadError(
                f"{self.endpoint} did not answer as the Hugging Face hub does ({type(e).__name__}: {e})",
                fix="check HF_ENDPOINT, and whether a proxy or login page is in between",
            ) from None

    @contextlib.contextmanager
    def refusals(self, repo_id: str, revision: str) -> Iterator[None]:
        """Turns the hub's refusals into DownloadErrors that say what to do."""
        try:
            yield
        except (HfHubHTTPError, OfflineModeIsEnabled) as e:
            raise self._refusal(e, repo_id, revision) from e

    def _refusal(self, e: Exception, repo_id: str, revision: str) -> DownloadError:
        page = f"{self.endpoint}/{repo_id}"
        has_token = bool(self.token or get_token())
        if isinstance(e, GatedRepoError):
            fix = f"accept its licence at {page}, " + (
                "with the account that the token is of, and check that the token may read gated repositories"
                if has_token
                else f"then {TOKEN_FIX}"
            )
            return DownloadError(f"{repo_id} is gated: its authors ask you to accept a licence", fix=fix)
        if isinstance(e, RepositoryNotFoundError):
            fix = "check the name" + ("" if has_token else f"; if it is private, {TOKEN_FIX}")
            return DownloadError(f"{self.endpoint} has no model {repo_id}, or it is private", where=page, fix=fix)
        if isinstance(e, RevisionNotFoundError):
            fix = f"give a branch, a tag or a full commit; they are listed at {page}/tree/main"
            return DownloadError(f"{repo_id} has no revision {revision!r}", where="--revision", fix=fix)
        if isinstance(e, EntryNotFoundError):
            return DownloadError(f"{repo_id} lists a file that the hub does not have", fix="run the same command again")
        if isinstance(e, DisabledRepoError):
            return DownloadError(f"{repo_id} was disabled by the hub", where=page, fix="use another model")
        if isinstance(e, HfHubHTTPError) and e.response.status_code in (401, 403):
            what = "the token" if has_token else "a request without a token"
            return DownloadError(f"the hub refused {what} (HTTP {e.response.status_code})", where=page, fix=TOKEN_FIX)
        if isinstance(e, HfHubHTTPError):
            return DownloadError(f"the hub refused: HTTP {e.response.status_code}", where=str(e.response.url))
        return DownloadError("the network is not to be used: HF_HUB_OFFLINE is set", fix="unset it, or pass --offline")


def _is_ours(name: str) -> bool:
    """Whether a repository's file has a name that our own bookkeeping uses; it is left out then."""
    return name == MANIFEST or name.endswith((INCOMPLETE, RECORD))


def check_repo_id(text: str) -> str:
    """The repository's id, from itself or from its page's address. Raises UsageError."""
    repo_id = re.sub(r"^https?://[^/]+/", "", text).rstrip("/")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        why = str(e)
    else:
        return repo_id
    raise UsageError(f"{text!r} is no repository id: {why}", where="REPO_ID", fix="give it as ORGANIZATION/NAME")


def check_token(token: str | None) -> str | None:
    """The token without white space around it. Raises UsageError for one that cannot be sent."""
    token = (token or os.environ.get("HF_TOKEN") or "").strip() or None
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError("the token has characters that no token has", where="--token", fix="copy it again: hf_...")
    return token


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that the network is not to be used."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
