"""What lorank raises and warns: one exception, one warning, and how their texts are put together."""

from collections.abc import Iterable, Sequence


class AdapterError(Exception):
    """What was asked for cannot be done. The text names every problem; nothing has been changed."""


class AdapterWarning(UserWarning):
    """What was asked for was done, but a result of it deserves a look."""


def raise_problems(action: str, problems: Sequence[str]) -> None:
    """Raise one `AdapterError` that lists all `problems`; do nothing when there are none."""
    if not problems:
        return
    if len(problems) == 1 and "\n" not in problems[0]:
        raise AdapterError(f"{action}: {problems[0]}")
    raise AdapterError(f"{action}:\n  " + "\n  ".join(problem.replace("\n", "\n  ") for problem in problems))


class DivergedError(AdapterError):
    """A loss or a gradient is not finite: the learning rate is too high, or a number in model or data is wrong."""


def dtype_name(dtype: object) -> str:
    """Return a torch.dtype as texts and files call it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def enumerate_names(names: Iterable[str], limit: int = 6) -> str:
    """Return names as `a, b, c and 4 more`."""
    listed = list(names)
    if len(listed) <= limit:
        return ", ".join(listed)
    return f"{', '.join(listed[:limit])} and {len(listed) - limit} more"


def nearest(name: str, known: Iterable[str], limit: int = 4) -> list[str]:
    """Return the names in `known` that are most like `name`, best first; `[]` when none is near."""
    from difflib import get_close_matches  # imported when something has gone wrong, not with the package

    originals = {other.lower(): other for other in sorted(set(known))}
    return [originals[near] for near in get_close_matches(name.lower(), originals, n=limit, cutoff=0.5)]


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "known are") -> str:
    """Return the end of a message about an unknown name: the nearest known ones, or all of them."""
    known = sorted({other for other in known if other})
    near = nearest(name, known)
    if near:
        return f"nearest: {', '.join(near)}"
    return f"{otherwise} {enumerate_names(known)}" if known else "there are none"
