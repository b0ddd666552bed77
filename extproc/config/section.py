"""What every section of the configuration is: strict, without keys that nobody knows, and never changed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):  # noqa: PLW1641 - pydantic gives each a hash of its values
    """Some keys that belong together."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def __eq__(self, other: object) -> bool:
        """Compare what holds; to pydantic a key is another one where its default is written out."""
        return type(self) is type(other) and self.__dict__ == other.__dict__
