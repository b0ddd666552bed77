"""What every section of the configuration is: strict, without keys that nobody knows, and never changed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Some keys that belong together."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
