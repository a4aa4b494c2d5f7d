"""What all parts of a result share: how they are read and written."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict


class Strict:
    """Base of the records: reading refuses a field that is not one of theirs; NaN and infinity are written as such."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
