"""Tags that some model reads as a picture, a name or a place, and that stop its training where they are none.

Source: reference/monkey.md, sections 1.5, 3.2 and 6.
"""

from __future__ import annotations

import re

from bestiary.schema import IMAGE_TAG

PICTURE_TAGS = (IMAGE_TAG, "<img>", "</img>", "<imgpad>")
"""Words of a sample that mean a picture."""
_POINT = r"\((?:[0-9]{1,3}|1000),(?:[0-9]{1,3}|1000)\)"  # thousandths of the picture's sides
_PLACE_TAG = re.compile(r"</?(?:ref|box|quad)>")
_WHOLE = re.compile(
    rf"<ref>(?:(?!{_PLACE_TAG.pattern}).)*</ref>"
    rf"|<box>{_POINT},{_POINT}</box>"
    rf"|<quad>{_POINT}(?:,{_POINT}){{3}}</quad>",
    re.DOTALL,
)


def unusable_tag(text: str, *, may_have_picture: bool = False) -> str | None:
    """The first tag of a picture, or else of a name or a place that is not whole; None where there is none.

    may_have_picture: one `<image>` may stand there.
    """
    plain = text.replace(IMAGE_TAG, " ", 1) if may_have_picture else text
    for tag in PICTURE_TAGS:
        if tag in plain:
            return tag
    stray = _PLACE_TAG.search(_WHOLE.sub(" ", plain))
    return stray[0] if stray else None
