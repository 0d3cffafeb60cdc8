"""A text -> the words that ROUGE counts, in any script.

rouge_score's own tokenizer knows the letters a to z alone: it finds no word in Chinese or Russian, and two in
"Müller". For text in ASCII this one gives the same words.
"""

import unicodedata
from functools import lru_cache

import regex
from nltk.stem.porter import PorterStemmer

# Written without spaces between words, so that each letter, with the marks on it, counts as one.
UNSPACED = (
    "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham Tai_Viet Balinese "
    "Javanese Tangut Nushu Khitan_Small_Script"
)
LETTER, MARK = r"[\p{L}\p{N}]", r"[\p{Mn}\p{Mc}]"
ALONE = f"[{LETTER}&&[" + "".join(rf"\p{{{script}}}" for script in UNSPACED.split()) + "]]"
WORD = regex.compile(rf"{ALONE}{MARK}*|[{LETTER}--{ALONE}](?:{MARK}|[{LETTER}--{ALONE}])*", regex.VERSION1)
# Format characters and variation selectors are no part of the word they stand in; a zero-width space ends it.
WITHIN = regex.compile(r"[[\p{Cf}\uFE00-\uFE0F\U000E0100-\U000E01EF]--[\u200B]]", regex.VERSION1)
stem = lru_cache(maxsize=None)(PorterStemmer().stem)


def words(text: str) -> list[str]:
    """The words of `text` in order, in lower case and Unicode's NFC. As in rouge_score, those of more than
    three letters are cut to their English stem (Porter, 1980).
    """
    text = WITHIN.sub("", unicodedata.normalize("NFC", text.lower()))
    return [stem(word) if len(word) > 3 else word for word in WORD.findall(text)]


class Tokenizer:
    """`words`, as RougeScorer takes it."""

    tokenize = staticmethod(words)
