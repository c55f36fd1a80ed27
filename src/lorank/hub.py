"""Adapters to and from the Hugging Face hub, through its own library, which knows endpoint, token and cache."""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from .adapter_files import FOLDERS, PICKLED, README, choose, files_of
from .card import is_untouched, model_card, run_of
from .checkpoints import appearing_whole
from .errors import AdapterError, AdapterWarning, raise_problems
from .examining import Examination, examine
from .extras import require
from .formats.peft.config import hub_id
from .formats.safetensors_file import write_atomically
from .runs.loading import folder_of
from .runs.metrics import PLOT
from .version import __version__

Card = Literal["keep", "new"]


@dataclass(frozen=True)
class Package:
    """An adapter that was checked, and what of it goes to the hub."""

    repo: str
    files: dict[str, Path | bytes]  # by name in the repository
    card: str  # the text of its README.md
    users_card: bool  # somebody wrote or changed it
    examination: Examination
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class Pulled:
    """An adapter that came from the hub."""

    path: Path  # what `lorank.load` takes
    commit: str
    files: list[str]
    examination: Examination


def push(
    adapter: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    card: Card = "keep",
    endpoint: str | None = None,
) -> str:
    """Upload an adapter with a model card to the Hugging Face hub, as one commit, and return its address there.

    adapter: its folder or file, or the folder of the run that it is the result of.
    repo: "user/name", or "name" for your own; it is made if it is not there yet.
    private: only you see it; a repository that is public already is refused.
    revision: a branch, which is made if it is not there yet; by default the main one.
    license: as the hub names it, such as "apache-2.0", for the card.
    card: "keep" uploads a README.md that lies beside the adapter, and leaves one in the repository that somebody
        wrote or changed; "new" writes one in any case.
    endpoint: of another hub than the one that huggingface_hub knows.

    Uploaded are the adapter's own files, its card, and the plot of the loss of its run; never a pickle. Raises
    AdapterError, before anything is uploaded, for an adapter that cannot be read or that has problems, and when the
    hub refuses.
    """
    package = pack(adapter, repo, license=license, card=card)
    for note in package.notes:
        warnings.warn(f"{adapter}: {note}", AdapterWarning, stacklevel=2)
    return upload(package, private=private, revision=revision, message=message, card=card, endpoint=endpoint)


def pull(
    repo: str,
    output: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    path: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Download an adapter from the Hugging Face hub into a folder, and return what `lorank.load` takes.

    repo: "user/name".
    output: the folder, which appears when it is whole; by default the name of the repository, in the working
        directory. It may have the same files already.
    revision: a branch, a tag or a commit.
    path: a folder or a file of the repository, where the adapter is not at its top or not known by its name.
    force: replace an adapter in the folder; other files there stay.
    allow_pickle: take a pickle where there is nothing else.
    endpoint: of another hub than the one that huggingface_hub knows.

    Warns of what looks wrong with the adapter. Raises AdapterError, with nothing left behind, for a repository without
    an adapter, and for files that cannot be read.
    """
    pulled = fetch(
        repo, output, revision=revision, path=path, force=force, allow_pickle=allow_pickle, endpoint=endpoint
    )
    for problem in pulled.examination.problems:
        warnings.warn(f"{pulled.path}: {problem}", AdapterWarning, stacklevel=2)
    return pulled.path


def pack(adapter: str | os.PathLike[str], repo: str, *, license: str | None = None, card: Card = "keep") -> Package:
    """Check an adapter and return what `upload` would send; nothing is asked of the hub."""
    place = folder_of(str(adapter))
    action = f"cannot push {adapter}"
    if not place.exists():
        raise AdapterError(f"{action}: there is no such file or folder")
    try:
        require("huggingface_hub.utils", "pushing to the hub").validate_repo_id(repo)
    except ValueError as error:
        raise AdapterError(f"{action}: {error}") from None
    if card not in ("keep", "new"):
        raise AdapterError(f"{action}: card is {card!r}; it must be keep or new")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise AdapterError(f"{action}: license is {license!r}; the hub has names such as apache-2.0, mit or other")
    try:
        own = files_of(place)
    except AdapterError as error:
        raise AdapterError(f"{action}: {error}") from None
    found = examine(place)
    raise_problems(action, found.problems)
    files: dict[str, Path | bytes] = dict(own)
    readme = (place if place.is_dir() else place.parent) / README
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    users_card = card == "keep" and readme.is_file() and not is_untouched(text)
    if not users_card:
        text = model_card(place, repo, license=license, found=found)
    run = run_of(place)
    if run and (run / PLOT).is_file():
        files[PLOT] = run / PLOT
    files[README] = readme if users_card else text.encode()
    notes = list(found.remarks)
    if found.base_model and hub_id(found.base_model) is None:
        notes.append(f"the adapter's file names a base that is not on the hub: {found.base_model}")
    if users_card and license:
        notes.append(f"{readme} is kept, and says by itself what its license is")
    return Package(repo, files, text, users_card, found, notes)


def upload(
    package: Package,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    card: Card = "keep",
    endpoint: str | None = None,
) -> str:
    """Send a package to the hub as one commit, and return its address there."""
    hub = require("huggingface_hub", "pushing to the hub")
    api = hub.HfApi(endpoint=endpoint, library_name="lorank", library_version=__version__)
    files = dict(package.files)
    with _asking(hub, api, f"cannot push to {package.repo}"):
        # None leaves the choice to the hub: some organisations make everything private.
        repo = api.create_repo(package.repo, private=private or None, exist_ok=True).repo_id
        info = api.model_info(repo)
        if private and not info.private:
            raise AdapterError(f"{repo} is there already, and public; make it private in its settings first")
        if revision is not None:
            info = _branch(hub, api, repo, revision)
        if card == "keep" and not package.users_card and README in _names(info):
            there = Path(api.hf_hub_download(repo, README, revision=info.sha))
            if not is_untouched(there.read_text(encoding="utf-8", errors="replace")):
                del files[README]
                what = f"{repo} has a {README} that somebody wrote or changed, which is kept (card='new' replaces it)"
                warnings.warn(what, AdapterWarning, stacklevel=2)
        operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        title = message or "Upload an adapter with lorank"
        api.create_commit(repo, operations, commit_message=title, revision=revision)
    return f"{api.endpoint}/{repo}" + (f"/tree/{quote(revision, safe='')}" if revision and revision != "main" else "")


def _branch(hub: Any, api: Any, repo: str, revision: str) -> Any:
    """Return what the hub says of a branch, which is made where there is none."""
    try:
        return api.model_info(repo, revision=revision)
    except hub.errors.RevisionNotFoundError:
        api.create_branch(repo, branch=revision, exist_ok=True)
        return api.model_info(repo, revision=revision)


def fetch(
    repo: str,
    output: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    path: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    endpoint: str | None = None,
) -> Pulled:
    """Download an adapter as `pull` does, and return what is in it too."""
    hub = require("huggingface_hub", "pulling from the hub")
    api = hub.HfApi(endpoint=endpoint, library_name="lorank", library_version=__version__)
    action = f"cannot pull {repo}"
    with _asking(hub, api, action):
        require("huggingface_hub.utils", "pulling from the hub").validate_repo_id(repo)
        listed, commit = _listing(hub, api, repo, revision, path)
        choice = choose(listed, path, allow_pickle)
        target = Path(output if output is not None else repo.rpartition("/")[2]).expanduser()
        names = [name.rpartition("/")[2] for name in choice.names]
        _require_free(target, names, force)
        cached = [Path(api.hf_hub_download(repo, name, revision=revision)) for name in choice.names]
        if len({file.parent for file in cached}) > 1:
            raise AdapterError("somebody changed it in the meantime; pull it again")
    with tempfile.TemporaryDirectory(prefix="lorank-") as folder:
        try:
            for name, file in zip(names, cached, strict=True):
                shutil.copyfile(file, Path(folder) / name)
            found = examine(Path(folder) / (choice.file or ""), allow_pickle=allow_pickle)
            _place(Path(folder), names, target, force)
        except (AdapterError, OSError) as error:
            raise AdapterError(f"{action}: {str(error).replace(folder, repo)}") from None
    return Pulled(target / (choice.file or ""), commit, names, found)


def _names(info: Any) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or ()]


def _listing(hub: Any, api: Any, repo: str, revision: str | None, path: str | None) -> tuple[list[str], str]:
    """Return the names of a repository's files and its commit: as the hub says, or offline, as the cache has it."""
    try:
        info = api.model_info(repo, revision=revision)
        return _names(info), info.sha
    except hub.errors.OfflineModeIsEnabled:
        known = [f"{path}/{name}" if path else name for names in FOLDERS + PICKLED for name in names]
        for name in [*known, *([path] if path else [])]:
            file = hub.try_to_load_from_cache(repo, name, revision=revision)
            if isinstance(file, str):
                root = Path(file).parents[name.count("/")]
                return [other.relative_to(root).as_posix() for other in root.rglob("*") if other.is_file()], root.name
        raise


def _require_free(target: Path, names: list[str], force: bool) -> None:
    """Raise unless a folder is empty or may be written to; one that has all the files may be the same adapter."""
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file; an adapter comes in a folder: name another (--output)")
    if force or not target.exists() or not any(target.iterdir()):
        return
    if not all((target / name).is_file() for name in names):
        raise AdapterError(_taken(target))


def _taken(target: Path) -> str:
    return f"{target} exists and is not empty; choose another folder (--output), or --force (force=True)"


def _place(folder: Path, names: list[str], target: Path, force: bool) -> None:
    """Put downloaded files into their folder, all or none."""
    contents = {target / name: (folder / name).read_bytes() for name in names}
    if all(path.is_file() and path.read_bytes() == content for path, content in contents.items()):
        return
    if not target.exists() or not any(target.iterdir()):
        with appearing_whole(target) as made:
            for path, content in contents.items():
                (made / path.name).write_bytes(content)
        return
    if not force:
        raise AdapterError(_taken(target))
    write_atomically(contents)
    for other in {name for layout in FOLDERS + PICKLED for name in layout} - set(names):
        (target / other).unlink(missing_ok=True)  # of the adapter that was there: it would be read for this one


@contextmanager
def _asking(hub: Any, api: Any, action: str) -> Iterator[None]:
    """Say in one line what went wrong between here and the hub."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{action}: {error}") from None
    # The upload wraps what goes wrong into a RuntimeError, and checks answers with a ValueError.
    except (hub.errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{action}: {_reason(hub, api.endpoint, error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("huggingface_hub", "hf_xet", "httpx", "httpx2"):
            raise
        raise AdapterError(f"{action}: {_reason(hub, api.endpoint, error)}") from error


def _reason(hub: Any, endpoint: str, error: Any) -> str:
    """Return what an exception of the hub's library means for the user."""
    errors = hub.errors
    cause = error.__cause__
    if cause is not None and isinstance(error, errors.LocalEntryNotFoundError | RuntimeError):
        return _reason(hub, endpoint, cause)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    unknown = "" if hub.get_token() else "no token is set (hf auth login, or HF_TOKEN)"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub's library is offline (HF_HUB_OFFLINE is set), and this is not in its cache"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner decides who may download it: ask at {endpoint}{unknown and '; ' + unknown}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or first
        if unknown and status in (401, 403):
            return f"{endpoint} does not know who asks, and {unknown}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{endpoint} has no such repository, or shows it to others than the owner of the token only"
        if status == 401:
            return f"{endpoint} does not accept the token: {said}"
        if status == 403:
            return f"the token does not permit this: {said}"
        return f"{endpoint} answers {status}: {said}"
    if isinstance(error, errors.HTTPError):
        return f"no connection to {endpoint}: {first}"
    return first
