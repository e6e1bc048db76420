"""The beginning of a text from which all tokens come that truncation leaves.

A tokenizer takes the whole text before it cuts. Where it looks at no character beyond a space, as BERT's does, the
tokens of a beginning that ends with a space are the first tokens of the text: the normaliser goes character by
character (accents that it takes apart never pass a space), words end at a space, and WordPiece sees one word at a time.
"""

from __future__ import annotations

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

# A word and its space, as far as it goes without splitting a text that is short anyway.
_CHARACTERS = 6


def most_words(backend: tokenizers.Tokenizer, max_length: int, direction: str) -> int:
    """So many words have all the tokens that truncation leaves of a text, if each has one; 0 if nobody can say."""
    known = (
        type(backend.normalizer) is normalizers.BertNormalizer
        and type(backend.pre_tokenizer) is pre_tokenizers.BertPreTokenizer
        and type(backend.model) is models.WordPiece
        and all(_in_one_word(token.content) for token in backend.get_added_tokens_decoder().values())
    )
    if not known or direction != "right":
        return 0
    return max(0, max_length - backend.num_special_tokens_to_add(is_pair=False))


def _in_one_word(added: str) -> bool:
    """A token that is looked for in the text itself cannot lie on both sides of a space."""
    return added.isascii() and added.isprintable() and " " not in added


def long(text: object, max_length: int) -> bool:
    """Whether the text is so long that its beginning may have all the tokens that truncation leaves."""
    return isinstance(text, str) and len(text) > _CHARACTERS * max_length


def beginning(text: str, words: int) -> str:
    """The first `words` words of the text and the space behind them; the text itself if it has no more."""
    rest = text.split(" ", words)
    if len(rest) <= words or not _encodable(rest[words]):
        return text
    return text[: len(text) - len(rest[words])]


def _encodable(rest: str) -> bool:
    """Half of a surrogate pair is an error, wherever it stands."""
    if rest.isascii():
        return True
    try:
        rest.encode()
    except UnicodeEncodeError:
        return False
    return True
