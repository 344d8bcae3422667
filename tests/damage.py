"""What happens to files: they are cut, spliced, re-encoded, and as JSON get any value in any place."""

from __future__ import annotations

import json

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, -1, 5e-324, 1e308, 2**70, float("inf"), float("nan")]) | st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The file, cut, spliced, with other bytes in a place, in another encoding, or with another value in its JSON."""
    how = draw(st.sampled_from(["cut", "splice", "bytes", "encoding", "value", "anything"]))
    place = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:place]
    if how == "splice":
        return content[:place] + content[draw(st.integers(0, len(content))) :]
    if how == "bytes":
        return content[:place] + draw(st.binary(min_size=1, max_size=6)) + content[place + draw(st.integers(0, 6)) :]
    if how == "encoding":
        return content.decode(errors="replace").encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
    if how == "value":
        return _with_another_value(draw, content)
    return draw(st.binary(max_size=60) | st.text(max_size=30).map(str.encode) | VALUES.map(json.dumps).map(str.encode))


def _with_another_value(draw: st.DrawFn, content: bytes) -> bytes:
    """Some value of some line of JSON replaced, removed or renamed; other files are left as they are."""
    lines = content.splitlines(keepends=True)
    number = draw(st.integers(0, len(lines) - 1))
    whole = len(lines) == 1 or not lines[0].rstrip().endswith(b"}")
    try:
        told = json.loads(content if whole else lines[number])
    except ValueError:
        return content
    where = told
    while isinstance(where, dict | list) and where:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = draw(st.sampled_from(keys))
        if not isinstance(where[key], dict | list) or not where[key] or draw(st.booleans()):
            change = draw(st.sampled_from(["value", "value", "remove", "add"]))
            if change == "remove":
                del where[key]
            elif change == "add" and isinstance(where, dict):
                where[draw(st.text(max_size=5))] = draw(VALUES)
            elif isinstance(where[key], int | float):
                where[key] = draw(NUMBERS | VALUES)
            else:
                where[key] = draw(VALUES)
            break
        where = where[key]
    mended = json.dumps(told).encode()
    return mended if whole else b"".join([*lines[:number], mended + b"\n", *lines[number + 1 :]])
