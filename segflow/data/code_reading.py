"""What one compiled function says: a digest of what it does, the names it uses, and what it changes.

A digest is of instructions and constants, not of lines, comments, docstrings or the names of local variables.
"""

from __future__ import annotations

import dis
import hashlib
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

_SILENT = {"CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL"}
_FLAGS = 0x3AC  # variable arguments, and generators and coroutines of all kinds
_CHAINED = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP")
_FILLING = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove"}
_FILLING |= {"setdefault", "update"}


class Reading(NamedTuple):
    """What a function's code says, that of the functions inside it included.

    names: of attributes; globals: names of its module; imports: (module, level) of imports inside; changed: attributes
    and globals that it gives another value; filled: those that hold a container to which it adds or from which it
    takes; hands_on: whether its first argument goes anywhere as a whole, so that all its attributes may be read.
    """

    digest: str
    names: frozenset[str]
    globals: frozenset[str]
    imports: frozenset[tuple[str, int]]
    changed: frozenset[str]
    filled: frozenset[str]
    hands_on: bool


@lru_cache(4096)
def read_code(code: CodeType, me: str | None = None) -> Reading:
    """Read a function's code; me: the name of the first argument of the method around it."""
    me = me or (code.co_varnames[0] if code.co_argcount else None)
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _SILENT]
    inner = [read_code(part, me) for part in code.co_consts if isinstance(part, CodeType)]
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAGS)
    tokens = [*map(repr, shape), repr(getattr(code, "co_exceptiontable", b"")), *_spelled(code, instructions)]
    pairs = list(zip(instructions, [*instructions[1:], None], strict=True))
    changed, filled = _changes(instructions, me)
    return Reading(
        hashlib.sha256("\n".join(tokens).encode()).hexdigest()[:16],
        _union({str(one.argval) for one in instructions if _reads_attribute(one.opname)}, inner, "names"),
        _union({str(one.argval) for one in instructions if _reads_global(one.opname)}, inner, "globals"),
        _union(_imports(instructions), inner, "imports"),
        _union(changed, inner, "changed"),
        _union(filled, inner, "filled"),
        any(_hands_on(one, after, me) for one, after in pairs) or any(part.hands_on for part in inner),
    )


def _union(own: set[Any], inner: list[Reading], field: str) -> frozenset[Any]:
    return frozenset(own).union(*(getattr(part, field) for part in inner))


def _reads_attribute(operation: str) -> bool:
    return operation in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") or operation.startswith("LOAD_SUPER")


def _reads_global(operation: str) -> bool:
    return operation in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def _spelled(code: CodeType, instructions: list[dis.Instruction]) -> list[str]:
    """Each instruction with what it is about: local variables by their number, jumps by the instruction they reach."""
    places, number = {}, 0
    kept = {one.offset for one in instructions}
    for one in dis.get_instructions(code):
        places[one.offset] = number
        number += one.offset in kept
    return [f"{one.opname} {_subject(one, places)}" for one in instructions]


def _subject(one: dis.Instruction, places: dict[int, int]) -> str:
    if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs:
        return f"to {places.get(one.argval)}"
    if one.opcode in dis.hasconst:
        return _constant(one.argval)
    return str(one.argval) if one.opcode in dis.hasname else str(one.arg)


def _constant(value: Any) -> str:
    """A constant in words that are the same in every process."""
    if isinstance(value, CodeType):
        return f"code {read_code(value).digest}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    return f"{type(value).__name__} {value!r}"


def _imports(instructions: list[dis.Instruction]) -> set[tuple[str, int]]:
    """The modules that are imported inside, with the number of dots before them."""
    places = [place for place, one in enumerate(instructions) if one.opname == "IMPORT_NAME"]
    levels = {place: instructions[place - 2].argval if place > 1 else 0 for place in places}
    return {(instructions[p].argval, level if isinstance(level, int) else 0) for p, level in levels.items()}


def _hands_on(one: dis.Instruction, after: dis.Instruction | None, me: str | None) -> bool:
    """Whether an instruction loads the first argument for anything but one of its attributes."""
    loads = one.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) or "_LOAD_FAST" in one.opname
    names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
    if not loads or me is None or me not in names:
        return False
    return me in names[:-1] or after is None or not after.opname.startswith(_CHAINED)


def _changes(instructions: list[dis.Instruction], me: str | None) -> tuple[set[str], set[str]]:
    """Attributes and globals that get another value, and those that hold a container that is filled or emptied."""
    changed: set[str] = set()
    filled: set[str] = set()
    for place, one in enumerate(instructions):
        before = instructions[place - 1] if place else one
        of_another = one.opname == "STORE_ATTR" and _is_local(before) and before.argval != me
        if one.opname in ("STORE_ATTR", "STORE_GLOBAL") and not of_another:
            changed.add(one.argval)
        elif one.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            filled |= _named(instructions, _before_operand(instructions, place - 1))
        elif one.opname in ("LOAD_METHOD", "LOAD_ATTR") and one.argval in _FILLING:
            filled |= _named(instructions, place - 1)
        elif one.opname in ("LOAD_METHOD", "LOAD_ATTR") and _in_place(one.argval):
            changed |= _named(instructions, place - 1)
    return changed, filled


def _is_local(one: dis.Instruction) -> bool:
    return one.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))


def _in_place(method: str) -> bool:
    """Whether a name is that of a tensor's method that works in place."""
    return method.endswith("_") and not method.startswith("_") and not method.endswith("__")


def _before_operand(instructions: list[dis.Instruction], place: int) -> int:
    """The place before the instructions that compute the operand whose last instruction is at `place`."""
    wanted = 1
    while place >= 0 and wanted > 0:
        one = instructions[place]
        wanted -= dis.stack_effect(one.opcode, one.arg if one.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        place -= 1
    return place


def _named(instructions: list[dis.Instruction], place: int) -> set[str]:
    """The attribute or global that the instruction at `place` loads."""
    if place < 0:
        return set()
    one = instructions[place]
    return {one.argval} if _reads_attribute(one.opname) or _reads_global(one.opname) else set()
