"""What one compiled function says: a digest of what it does and the names it uses.

A digest is of instructions and constants, not of lines, comments, docstrings or the names of local variables.
"""

from __future__ import annotations

import dis
import hashlib
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any, NamedTuple

_SILENT = {"CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL"}
_IMPORTING = ("import_module", "__import__")
_FLAGS = 0x3AC  # variable arguments, and generators and coroutines of all kinds
_CHAINED = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "STORE_ATTR", "DELETE_ATTR", "COPY", "DUP_TOP")


class Reading(NamedTuple):
    """What a function's code says, that of the functions inside it included.

    names: of attributes; globals: names of its module; imports: (module, level) of imports inside; hands_on: whether
    its first argument goes anywhere as a whole, so that all its attributes may be read; computes_names: whether a name
    of one of these is computed.
    """

    digest: str
    names: frozenset[str]
    globals: frozenset[str]
    imports: frozenset[tuple[str, int]]
    hands_on: bool
    computes_names: bool


@lru_cache(4096)
def read_code(code: CodeType, me: str | None = None) -> Reading:
    """Read a function's code; me: the name of the first argument of the method around it."""
    me = me or (code.co_varnames[0] if code.co_argcount else None)
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _SILENT]
    inner = [read_code(part, me) for part in code.co_consts if isinstance(part, CodeType)]
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _FLAGS)
    tokens = [*map(repr, shape), repr(getattr(code, "co_exceptiontable", b"")), *_spelled(code, instructions)]
    pairs = list(zip(instructions, [*instructions[1:], None], strict=True))
    by_name = _by_name(instructions, me)
    places = [place for place, (one, after) in enumerate(pairs) if place not in by_name and _hands_on(one, after, me)]
    return Reading(
        hashlib.sha256("\n".join(tokens).encode()).hexdigest()[:16],
        _union({*_attributes(instructions), *by_name.values()}, inner, "names"),
        _union({str(one.argval) for one in instructions if _reads_global(one.opname)}, inner, "globals"),
        _union(_imports(instructions), inner, "imports"),
        bool(places) or any(part.hands_on for part in inner),
        any(_asks(instructions[place - 1]) for place in places if place) or any(part.computes_names for part in inner),
    )


def _union(own: set[Any], inner: list[Reading], field: str) -> frozenset[Any]:
    return frozenset(own).union(*(getattr(part, field) for part in inner))


def _attributes(instructions: list[dis.Instruction]) -> set[str]:
    return {str(one.argval) for one in instructions if _reads_attribute(one.opname)}


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
    found = {(instructions[p].argval, level if isinstance(level, int) else 0) for p, level in levels.items()}
    asking = [after for one, after in pairwise(instructions) if one.argval in _IMPORTING and _is_text(after)]
    return found | {(one.argval, 0) for one in asking}


def _is_text(one: dis.Instruction | None) -> bool:
    """Whether an instruction loads a text that the code spells out."""
    return one is not None and one.opcode in dis.hasconst and isinstance(one.argval, str)


def _asks(one: dis.Instruction | None) -> bool:
    """Whether an instruction loads `getattr`, or `hasattr`."""
    return one is not None and _reads_global(one.opname) and one.argval in ("getattr", "hasattr")


def _by_name(instructions: list[dis.Instruction], me: str | None) -> dict[int, str]:
    """Where the first argument is loaded to be asked for an attribute by a name that the code spells out; the names."""
    found = {}
    for place in range(1, len(instructions) - 2):
        asks, mine, text, *rest = instructions[place - 1 : place + 4]
        calls = [one.opname in ("PRECALL", "CALL", "CALL_FUNCTION") for one in rest]
        simple = bool(calls) and (calls[0] or (calls[-1] and rest[0].opname.startswith("LOAD_")))
        if _asks(asks) and _is_local(mine) and mine.argval == me and _is_text(text) and simple:
            found[place] = text.argval
    return found


def _hands_on(one: dis.Instruction, after: dis.Instruction | None, me: str | None) -> bool:
    """Whether an instruction loads the first argument for anything but one of its attributes."""
    loads = one.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) or "_LOAD_FAST" in one.opname
    names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
    if not loads or me is None or me not in names:
        return False
    return me in names[:-1] or after is None or not after.opname.startswith(_CHAINED)


def _is_local(one: dis.Instruction) -> bool:
    return one.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
