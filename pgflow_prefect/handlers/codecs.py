"""The forms in which results are written to a storage."""

import base64
import lzma
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from pgflow_prefect.handlers.json_text import check_json
from pgflow_prefect.raw_json import RawJson


class Serializer(Protocol):
    """One of Prefect's serializers."""

    type: str

    def dumps(self, obj: Any) -> bytes:  # noqa: ANN401  any value
        """Return the bytes of a value."""

    def loads(self, blob: bytes) -> Any:  # noqa: ANN401  any value
        """Return the value of the bytes."""


@dataclass(frozen=True)
class JsonCodec:
    """Writes the JSON that a row would have. Annotations read it, as they read a row, so it names no class.

    Attributes:
        compressed: by lzma and base64, as Prefect's `compressed/json` does.
    """

    compressed: bool = False
    is_json: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Prefect's name for it."""
        return "compressed/json" if self.compressed else "json"

    def encode(self, text: str) -> bytes:
        """Return the bytes of a JSON text.

        Raises:
            UnicodeEncodeError: it has half a character.
        """
        data = text.encode()
        return base64.encodebytes(lzma.compress(data)) if self.compressed else data

    def decode(self, data: bytes) -> RawJson:
        """Return the JSON text of the bytes.

        Raises:
            ValueError: they are no such text.
            lzma.LZMAError: they are not compressed.
        """
        return RawJson(check_json(lzma.decompress(base64.decodebytes(data)) if self.compressed else data))


@dataclass(frozen=True)
class ObjectCodec:
    """Writes values by a serializer that the code names, such as pickle.

    Attributes:
        serializer: one of Prefect's.
    """

    serializer: Serializer
    is_json: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Prefect's name for it."""
        return self.serializer.type

    def encode(self, value: Any) -> bytes:  # noqa: ANN401  any value
        """Return the bytes of a value; the serializer raises what it likes."""
        return self.serializer.dumps(value)

    def decode(self, data: bytes) -> Any:  # noqa: ANN401  any value
        """Return the value of the bytes; the serializer raises what it likes."""
        return self.serializer.loads(data)


Codec: TypeAlias = JsonCodec | ObjectCodec

JSON_CODECS = {each.name: each for each in (JsonCodec(), JsonCodec(compressed=True))}
"""The forms that run no code when they are read."""
