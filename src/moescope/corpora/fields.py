"""What a field of a row may hold."""

from collections.abc import Mapping

from moescope.corpora.documents import Chat
from moescope.errors import CorpusError, unknown


def content_of(row: Mapping[str, object], field: str, where: str) -> str | Chat:
    """Take a field of a row as text or as a conversation; null is empty text.

    Raises:
        CorpusError: There is no such field, or it is neither.
    """
    if field not in row:
        raise unknown(f"field of {where}:", field, row, CorpusError)
    value = row[field]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return Chat(value)
    raise CorpusError(
        f"{where}: {field!r} holds no text",
        got=type(value).__name__,
        expected="a string, or a list of {role, content} messages",
    )


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and {"role", "content"} <= item.keys()


def name_of(row: Mapping[str, object], otherwise: str) -> str:
    """The row's own `id`, or `otherwise`."""
    own = row.get("id")
    return otherwise if own is None or own == "" else str(own)
