"""The tokeniser of the COCO caption scores, in plain Python.

The COCO caption scores (the usual BLEU, ROUGE-L and CIDEr) are computed on the tokens of the Stanford PTBTokenizer
3.4.1 with `-preserveLines -lowerCase`, without punctuation tokens, as pycocoevalcap calls it. That tokeniser is a
Java program of 6 MB. This module gives the same tokens for English captions without Java: Penn Treebank contractions
("can't" -> "ca n't", "dog's" -> "dog 's", "gonna" -> "gon na"), numbers, prices, fractions, abbreviations that keep
their full stop, acronyms, hyphenated and slashed words, addresses, quotes and brackets. ("(" is the token "-lrb-".
The published code keeps it: its list of punctuation is in upper case, and tokens are lower-cased before.)

It works like a lexer: every rule is tried at each position. The longest match wins, and of equally long ones the first
rule. A rule may end in a context, the group `then`, which counts for the length but stays in the text. The rules follow
the conventions of the Penn Treebank and the observed behaviour of the tokeniser. Scripts with combining vowel signs
(Devanagari, Thai, ...) are not supported. Emoji are dropped, as published.
"""

import re
from collections.abc import Iterator, Sequence

PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"])
PUNCTUATION |= frozenset([".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Letters are those of the Basic Multilingual Plane; \w also holds superscripts and vulgar fractions.
_BASE = (
    r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u0bf0-\u0bf2\u2070-\u218f\u2460-\u24ff\u2776-\u2793"
    r"\U00010000-\U0010ffff]"
)
_L = rf"(?:{_BASE}|[\u00ad\u0300-\u036f])"
_LD = rf"(?:{_L}|\d)"
_APOS = r"(?:['\u0092\u2019]|&apos;)"
_APOSTROPHE = r"(?:['\u0092\u2019`\u0091\u2018\u201b]|&apos;)"  # all characters that are typed as one
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_IN_SENTENCE = r"[,;:\u3001]"  # a full stop before one of these belongs to the word
_REDUCED = rf"{_APOS}(?i:[msd]|re|ve|ll)"
_NOT = rf"(?i:n{_APOSTROPHE}t)"
# A word may contain full stops ("dog.cat"). A thing may begin with an elision or a digit ("o'clock", "3d").
_WORD_LETTER = rf"(?:{_L}|&[aeiouAEIOU](?:acute|grave|uml);)"
_WORD = r"LETTER(?:LETTER|\d)*(?:[.!?]LETTER(?:LETTER|\d)*)*".replace("LETTER", _WORD_LETTER)
_THING = rf"(?:[dDoOlL]{_APOSTROPHE}(?:{_BASE}|\d))?(?:{_BASE}|\d)+"
_THINGS = rf"{_THING}(?:{_HYPHEN}{_THING})*"
_ACRONYM = r"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)|[A-Za-z](?:\.[A-Za-z])*)"
_HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
_FILE_ENDING = (
    r"(?i:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql"
    r"|tar|txt|wav|x|xml|zip)"
)
_TAG = (
    r"<!--.*?-->|<[!?][A-Za-z-][^>\n]*>"
    r"|</?[A-Za-z][\w:.-]*(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"|[A-Za-z]\w*))?)* */?>"
)
_URL_PATH = r"[^\s\"<>|()]+[^\s\"<>|.!?(){},-]"

# Abbreviations that keep their full stop. First those that may end a sentence, in upper or lower case, ...
_ABBREVIATIONS = """
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla
    fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc ppte
    pptes ppty pptys pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc
    wyo
    """
# ... then those that would be other words without a capital, ...
_CAPITALIZED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
# ... then titles and others that precede a name, and those that are abbreviations only before a number.
_TITLES = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov
    govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof profs pvt rep
    reps rev sen sens sfc sgt spc st ste supt supts treas vs wm
    """
_NUMBERED = "art ca fig figs no nos op pp prop"
# Words that begin a sentence. A single letter before one ("vitamin C. The") is not an initial.
_OPENERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr\\. Ms\\.
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
    """


def _any(words: str, keep_capital: bool = False) -> str:
    """Returns a pattern for any of `words`, ignoring case. `keep_capital`: the first letter must match exactly."""
    return "(?:" + "|".join(rf"{w[0]}(?i:{w[1:]})" if keep_capital else rf"(?i:{w})" for w in words.split()) + ")"


_ABBREVIATION = rf"(?:(?i:ed\.d|ph\.d)|{_any(_ABBREVIATIONS)}|{_any(_CAPITALIZED, keep_capital=True)})\."
# The order matters only between matches of equal length.
_RULES = [
    _TAG,
    r"(?i:&(?:MD|mdash|ndash);)|[\u0096\u0097\u2013-\u2015]",
    r"&amp;|&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);",
    # Words, before a contraction and alone.
    rf"{_WORD}(?P<then>{_REDUCED})",
    rf"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*(?P<then>{_NOT})",
    _WORD,
    # Words with an apostrophe of their own: 'n', N'Sync, d', '50s, ma'am, 'em ...
    rf"{_APOS}[nN]{_APOS}?|[A-HJ-XZn]{_APOSTROPHE}{_L}{{2,}}|[lLdDjJ]{_APOS}|{_APOS}[2-9]0[sS]",
    rf"{_L}+[aeiouyAEIOUY]{_APOSTROPHE}[aeiouA-Z]{_L}*",
    rf"(?i:{_APOS}(?:em|till?|cause|tis|twas)|(?:dunkin|somethin|ol){_APOS}|cont{_APOS}d\.?|nor{_APOS}easter"
    rf"|c{_APOS}mon|e{_APOS}er|s{_APOS}mores|ev{_APOS}ry|li{_APOS}l|nat{_APOS}l|o{_APOSTROPHE}o)",
    rf"[yY]{_APOS}(?P<then>{_L})",
    # Addresses.
    rf"(?i:https?)://{_URL_PATH}",
    r"(?:(?i:www)\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^\s\"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"
    rf"(?:/{_URL_PATH})?",
    r"<?[a-zA-Z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?",
    r"@[a-zA-Z_]\w*",
    rf"#{_L}+",
    # Contractions cut off from their word.
    rf"{_REDUCED}(?P<then>[^A-Za-z])",
    _NOT,
    # Dates, numbers, superscripts, fractions.
    r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
    r"[-+]?(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)",
    r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)",
    r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
    # Single cases, slashed words, prices.
    r"-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&|&amp;)(?:P-500|Ls)|(?i:Cap'n|c'est)|C\+\+|C#",
    r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    r"[A-Z]*\$|#",
    # Words that keep their full stop.
    rf"[A-Za-z](?P<then>\.\s+(?:{_any(_OPENERS, keep_capital=True)}|{_TAG})\s)",
    rf"{_ABBREVIATION}(?P<then>[\s\S]{{2}})",
    _ABBREVIATION,
    rf"(?:{_any(_TITLES)}|(?i:a\.k\.a)|{_ACRONYM})\.",
    rf"{_any(_NUMBERED)}\.(?P<then>\s?\d)",
    rf"{_APOS}\d\d(?P<then>\s)",
    rf"{_LD}+(?:\.{_LD}+)*\.{_FILE_ENDING}(?P<then>[\s.?!,])",
    rf"{_WORD}\.(?P<then>{_IN_SENTENCE})",
    # Telephone numbers.
    r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
    r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
    # Smileys and runs of marks.
    r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?P<then>[^A-Za-z0-9])",
    r"[\^x=~<>]\.[\^x=~<>]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>']\)",
    r"-+",
    r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]",
    r"@+|#+|_+|[?!]+|\*+|(?:\\\*){1,3}",
    # Hyphenated words and the like, with a full stop where a comma follows.
    _HYPHENED,
    rf"{_HYPHENED}\.(?P<then>{_IN_SENTENCE})",
    _THINGS,
    rf"{_THINGS}\.(?P<then>{_IN_SENTENCE})",
    r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+",
    rf"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+\.(?P<then>{_IN_SENTENCE})",
    # Quotation marks.
    r"'(?P<then>[A-Za-z][^ \t\n\r\u00a0])",
    _REDUCED,
    rf"''|[`\u2018\u2019\u201a-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|{_APOS}",
    r"<<|>>|(?i:&(?:lt|gt|quot|nbsp);)",
    r"[\s\S]",
]
_PATTERNS = [re.compile(rule) for rule in _RULES]
_PLAIN_WORD = re.compile(r"[a-z]+(?=[ \n])")
_REDUCED_WORD = re.compile(_REDUCED)
# Joined words that the treebank splits: the length of the first part.
_JOINED = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3, "'tis": 2, "'twas": 2}
_LINE_BREAK = re.compile(r"[\n\r\x0b\x0c\u2028\u2029]")
_DASH = re.compile(r"[\u0096\u0097\u2013-\u2015]|(?i:&(?:MD|mdash|ndash);)|-{3,4}")
_DOTS = re.compile(r"[\u0085\u2026]|\.{4,5}|(?:\.[ \u00a0])+\.")
# Tokens that the treebank writes differently.
_WRITTEN = {
    **dict(zip("()[]{}", ("-LRB-", "-RRB-", "-LSB-", "-RSB-", "-LCB-", "-RCB-"), strict=True)),
    **dict(zip("\u00bc\u00bd\u00be\u2153\u2154", ("1/4", "1/2", "3/4", "1/3", "2/3"), strict=True)),
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
} | {"\u00a3": "#", "\u00a2": "cents", "&lt;": "<", "&gt;": ">", "&nbsp;": ""}
_QUOTES = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys(["\u0092", "\u2019", "\u203a", "&apos;"], "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys(["\u0094", "\u201d", "\u00bb", '"', "&quot;"], "''"),
}
_QUOTE = re.compile("|".join(_QUOTES))
# Tokens whose quotes are written in ASCII: quotation marks and contractions. Other words keep their characters.
_QUOTED = re.compile(rf"(?:{'|'.join(_QUOTES)}|['`])+|{_REDUCED}|{_NOT}")
# Characters that are separate tokens if no other rule matches them. All others are dropped, like white space.
_SYMBOL = re.compile(
    r"[!-~\u0080\u0085\u00a1-\u00ac\u00ae-\u00bf\u00d7\u00f7\u0e3f\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044"
    r"\u207c-\u207e\u208c-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012"
    r"\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe6]"
)


def _longest(text: str, start: int) -> int:
    """Returns the end of the token that begins at `start`."""
    length, end = 0, start + 1
    for pattern in _PATTERNS:
        if (match := pattern.match(text, start)) and match.end() - start > length:
            length = match.end() - start
            end = match.start("then") if "then" in pattern.groupindex else match.end()
    return end


def _written(token: str) -> str:
    """Returns a token as the treebank writes it, or "" for a character that it drops."""
    if len(token) == 1 and not (token.isalnum() and token <= "\uffff") and not _SYMBOL.match(token):
        return ""
    if (known := _WRITTEN.get(token.lower())) is not None:
        return known
    if _DASH.fullmatch(token):
        return "--"
    if _DOTS.fullmatch(token):
        return "..."
    if _QUOTED.fullmatch(token):
        return _QUOTE.sub(lambda quote: _QUOTES[quote[0]], token)
    token = token.replace("(", "-LRB-").replace(")", "-RRB-")  # those inside smileys and telephone numbers
    return token.replace("&amp;", "&").replace("\u00ad", "").replace(" ", "\u00a0")


def _tokens(text: str) -> Iterator[str]:
    """Yields all tokens of a text that ends in a line break, including punctuation and line breaks, with their case."""
    position = 0
    while position < len(text):
        plain = _PLAIN_WORD.match(text, position)
        end = plain.end() if plain else _longest(text, position)
        word = text[position:end].lower()
        if word in _JOINED and (word[0] == "'" or not _REDUCED_WORD.match(text, end)):
            end = position + _JOINED[word]
        yield text[position:end]
        position = end


def tokenize(captions: Sequence[str]) -> list[str]:
    """Returns the tokens of each caption joined by single spaces, in lower case and without punctuation.

    All captions are passed together, since the published tokeniser reads them as the lines of one file, and in two
    rare cases the next line matters. A caption that ends in an abbreviation of numbers ("bus no.") keeps the full stop
    if the next caption begins with a digit. One that ends in a single letter ("plan B.") loses it if the next caption
    begins with a word like "The". A mixed number is one token with a no-break space ("1\\u00a01/2"), so split the
    result with `split(" ")`.
    """
    text = "".join(_LINE_BREAK.sub(" ", caption) + "\n" for caption in captions)
    lines: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == "\n":
            lines.append([])
        elif (written := _written(token).lower()) and written not in PUNCTUATION:
            lines[-1].append(written)
    return [" ".join(line) for line in lines[:-1]]
