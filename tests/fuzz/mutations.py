"""JSON that is nearly right: a value of it removed, or replaced by another."""

import copy
from typing import Any

from hypothesis import strategies as st

ODD = st.sampled_from([None, True, -1, 0, 1, 10**30, 1e308, "", "x", "../../x", "\0", [], {}, [[]], [-1], {"a": 1}])
ODD |= st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in [(*path, key), *places(part, (*path, key))]]


@st.composite
def mutated(draw, original: Any) -> Any:
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(places(value) or [None]) if places(value) else st.just(("new",)))
        holder = value
        for key in parents:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = copy.deepcopy(draw(ODD))  # the next change may reach into it
        else:
            holder.pop(last, None) if isinstance(holder, dict) else holder.pop(last)
    return value
