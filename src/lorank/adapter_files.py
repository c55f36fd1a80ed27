"""Which files make up an adapter, among those of a folder and among those of a repository."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import AdapterError, did_you_mean, enumerate_names
from .formats import detect, lorank, mlx, peft, torchtune
from .formats.pickles import head

README = "README.md"
FOLDERS = ((peft.CONFIG, peft.TENSORS), (mlx.CONFIG, mlx.TENSORS), (lorank.TENSORS,))  # the better known first
PICKLED = ((peft.CONFIG, peft.PICKLE), (peft.CONFIG, torchtune.TENSORS))  # others do not say their scale
_WEIGHTS = (peft.TENSORS, mlx.TENSORS, lorank.TENSORS, peft.PICKLE, torchtune.TENSORS)
_SAFE = (".safetensors", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".lora", ".ckpt")  # .pth.lora is litgpt's
_OF_MODELS = ("config.json", "model.safetensors", "model.safetensors.index.json", "model_index.json")


@dataclass(frozen=True)
class Choice:
    """The files of an adapter in a repository."""

    names: list[str]  # with the folders in which they are
    file: str | None  # what is to be loaded, where that is no folder


def files_of(adapter: Path) -> dict[str, Path]:
    """Return the files of an adapter by name.

    Raises AdapterError for one that is a pickle, or of files of which it is not known what belongs together.
    """
    folder = adapter if adapter.is_dir() else adapter.parent
    for names in FOLDERS:
        if all((folder / name).is_file() for name in names) and (folder == adapter or adapter.name in names):
            return {name: folder / name for name in names}
    if adapter.is_file() and adapter.suffix in _SAFE and head(adapter) is None:
        _require_alone(adapter)
        return {adapter.name: adapter}
    if head(adapter) is not None or any((folder / names[-1]).is_file() for names in PICKLED):
        raise AdapterError(
            f"{adapter} is a pickle, which may run anything where it is opened: make safetensors of it first, with "
            "lorank convert --allow-pickle"
        )
    raise AdapterError(f"{adapter} has no {FOLDERS[0][0]} with {' or '.join(names[-1] for names in FOLDERS)}")


def _require_alone(adapter: Path) -> None:
    """Raise AdapterError for a file that cannot be read without the configuration beside it."""
    standard = {"peft": peft.TENSORS, "mlx": mlx.TENSORS}.get(detect(adapter) or "")
    if standard == adapter.name:
        raise AdapterError(f"{adapter.parent} has {adapter.name}, but no {peft.CONFIG} that says what it is")
    if standard is not None:
        raise AdapterError(
            f"{adapter} is one of two files: with {peft.CONFIG} it is found under its usual name alone; rename it to "
            f"{standard}"
        )


def choose(listed: Iterable[str], place: str | None, allow_pickle: bool) -> Choice:
    """Return the files of the adapter in a repository that has the files `listed`.

    place: a folder or a file of the repository, where the adapter is not at its top or not known by its name.

    Names that lead out of a folder are passed over. Raises AdapterError, which says what there is instead.
    """
    names = sorted(name for name in listed if _harmless(name))
    prefix, file = "", None
    if place is not None:
        place = place.strip("/")
        if place in names:
            prefix, _, file = place.rpartition("/")
        elif any(name.startswith(f"{place}/") for name in names):
            prefix = place
        else:
            folders = {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}
            raise AdapterError(f"it has no file or folder '{place}'; {did_you_mean(place, [*names, *folders])}")
        prefix = f"{prefix}/" if prefix else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    inside = [name for name in inside if "/" not in name]
    chosen, single = _choose(inside, file, allow_pickle)
    if not chosen:
        raise AdapterError(_instead(names, prefix, inside, file, allow_pickle))
    readme = [README] if README in inside and README not in chosen else []
    return Choice([prefix + name for name in [*chosen, *readme]], chosen[0] if single else None)


def _choose(inside: Sequence[str], file: str | None, allow_pickle: bool) -> tuple[list[str], bool]:
    """Return the files to take out of one folder, none where it is no adapter; and whether they are one alone."""
    for names in FOLDERS + (PICKLED if allow_pickle else ()):
        if set(names) <= set(inside) and file in (None, *names):
            return list(names), False
    if file is not None:
        return ([file], True) if file.endswith(_SAFE) else ([], False)
    found = [name for name in inside if name.endswith(_SAFE) and name not in _WEIGHTS and _sounds_like_one(name)]
    return (found, True) if len(found) == 1 else ([], False)


def _sounds_like_one(name: str) -> bool:
    return "lora" in name.lower() or "adapter" in name.lower()


def _instead(names: Sequence[str], prefix: str, inside: Sequence[str], file: str | None, allow_pickle: bool) -> str:
    """Return why there is no adapter in a folder of a repository, and what there is."""
    where = f"its folder {prefix[:-1]}" if prefix else "it"
    config = FOLDERS[0][0]
    pickles = [name for name in inside if name.endswith(_PICKLES)] if file is None else [file]
    if file is not None and not file.endswith(_PICKLES):
        return f"{file} is no adapter: these are files of {', '.join(_SAFE)}"
    if file is not None or any(map(_sounds_like_one, pickles)):
        if allow_pickle:
            wanted = config if config not in inside else " or ".join(names[-1] for names in PICKLED)
            return (
                f"{where} has {enumerate_names(pickles, 3)}, but no {wanted}: a pickle alone does not say its scale. "
                "Download it by hand, and say that where it is read (--alpha)"
            )
        return (
            f"{where} has the adapter as a pickle ({enumerate_names(pickles, 3)}), which may run anything where it is "
            "opened: give --allow-pickle (allow_pickle=True) if you trust its origin"
        )
    weights = [name for name in inside if name in _WEIGHTS]
    if weights:
        return f"{where} has {weights[0]}, but no {config} that says what it is"
    below = [str(PurePosixPath(name).parent) for name in names if name.startswith(prefix) and name.endswith(config)]
    below = [folder for folder in below if folder != (prefix[:-1] or ".")]
    if below:
        return f"{where} has adapters in {enumerate_names(below)}: say which with --path {below[-1]} (path=...)"
    if config in inside:
        return f"{where} has {config}, but no tensors ({', '.join(names[-1] for names in FOLDERS)})"
    if any(name in _OF_MODELS for name in inside):
        return f"{where} is a whole model and no adapter: give it as a base, --model"
    files = [prefix + name for name in inside if name.endswith(_SAFE)]
    if files:
        return f"{where} has {enumerate_names(files)}: say which is the adapter, with --path {files[0]} (path=...)"
    return f"{where} holds no adapter, only {enumerate_names(inside)}" if inside else f"{where} is empty"


def _harmless(name: str) -> bool:
    """Tell whether a file's name in a repository stays in its folder, on every system."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or set(part) & set('\\:\0*?"<>|') for part in parts)
