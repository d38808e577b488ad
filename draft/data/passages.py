"""Pieces of ordinary text and source code from the documentation and the programs of a machine.

Manual pages, HTML, plain text, dictionaries, message catalogues, descriptions of Python packages and source files
become pieces of some hundred words: clean, of a known language, and no paragraph twice.
"""

from __future__ import annotations

import ast
import gettext
import gzip
import html
import re
import struct
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from draft.data.records import records
from draft.errors import UserError

_LARGEST = 20_000_000  # bytes of a file; larger ones are data
_SHORTEST = 60  # words of a piece of prose
_LENGTHS = (200, 300, 450, 650, 900)  # words after which a piece ends, at its next paragraph
_CODE_LENGTHS = (1200, 2000, 3000, 4500)  # characters
_WIDEST = 200  # characters of a line of source code that people write

# the commonest words of a language tell it from others; texts in the last five are not kept
_COMMON = {
    "en": "the of and to a in is that it for be this with as are or not you can if on by an from which will have was",
    "de": "der die das und ist nicht den von zu mit ein eine im auf für sie des dem werden wird kann auch oder als es",
    "fr": "le la les de des et est un une du en à pour que dans sur pas par qui vous ne se au ce être il sont avec ou",
    "es": "el la los las de que y en un una del se por para con no es al lo su como más o está si puede esta ser",
    "it": "il la i le di che e un una del in per è con non si da al della dei sono nel come più o può questo gli",
    "pt": "o a os as de que e em um uma do da se por para com não é ao no na como mais ou são pode dos das ser você",
    "ca": "el la els les de que i en un una del per amb no és al més o està si pot aquest aquesta ser als dels hi ha",
    "gl": "o a os as de que e do da un unha para por con non é ao na no como máis ou son pode dos das ser vostede se",
    "nl": "de het een van en is dat niet in op te voor met zijn als aan er om ook door naar bij wordt kan deze of u",
    "ro": "de și în la cu o un din pe care este nu se pentru să sunt mai ca sau această prin fi dacă poate al ale",
    "da": "og i at det er en til på som af for med ikke den de der et kan du vil har om men eller skal fra som",
}
COMMON = {language: frozenset(words.split()) for language, words in _COMMON.items()}
LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
_CODE = {
    ".py": "python", ".go": "go", ".rb": "ruby", ".js": "javascript", ".mjs": "javascript", ".ts": "typescript",
    ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".hpp": "c++", ".pl": "perl", ".pm": "perl", ".rs": "rust",
    ".java": "java", ".el": "lisp", ".sh": "bash", ".sql": "sql", ".r": "r", ".m": "octave",
}  # fmt: skip
_SKIPPED = re.compile(
    r"^(changelog|changes|news|copyright|authors|todo|history|record|genindex|search|index-|all-|license\.dependencies)"
    r"|\.min\.|_pb2|/(tests?|testing|__pycache__|node_modules|locale_data|i18n|_sources)/|-changelog|whatsnew/changelog|/__init__\.pyi",
    re.IGNORECASE,
)
_NOTICE = re.compile(
    r"copyright \(c\)|©|all rights reserved|permission is hereby granted|warrant(y|ies)", re.IGNORECASE
)

_BROKEN = re.compile("[\ud800-\udfff\ufffd]")  # halves of characters, and what stands for unreadable ones


@dataclass(frozen=True)
class Piece:
    """Some paragraphs of prose, or a part of a source file."""

    text: str
    kind: str  # prose or code
    language: str  # a code such as en, or a programming language
    source: str  # the first folder below the one that was read, or the name of a file that lies in it


def read_passages(places: Sequence[str | Path]) -> list[Piece]:
    """Read pieces from folders, from files, and from .jsonl files that `draft-train text` wrote.

    Raises:
        UserError: for a path that is not there, and when nothing fit for use is found.
    """
    pieces: list[Piece] = []
    reader = _Reader()
    for place in places:
        path = Path(place).expanduser()
        if path.suffix == ".jsonl" and path.is_file():
            pieces += [_piece(where, record) for where, record in records(str(path))]
        elif path.exists():
            for file in [path] if path.is_file() else _files(path):
                below = file.relative_to(path).parts if path.is_dir() else (file.name,)
                # a name in another encoding than UTF-8 could not be written
                pieces += reader.read(file, below[0].encode(errors="replace").decode())
        else:
            raise UserError(f"{str(place)!r}: no such file or folder; give folders of documentation or source code.")
    if not pieces:
        given = ", ".join(map(str, places))
        raise UserError(
            f"{given}: no passages found; give folders that hold documentation, such as /usr/share/doc, "
            "/usr/share/man or unpacked Debian packages."
        )
    return pieces


def installed_places() -> list[Path]:
    """Folders of text that every Python environment has: the standard library and the packages' descriptions."""
    return [Path(sysconfig.get_path("stdlib")), *sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info"))]


def _piece(where: str, record: object) -> Piece:
    names = ("text", "kind", "language", "source")
    if isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names):
        return Piece(*(record[name] for name in names))
    raise UserError(f"{where}: no row of text, kind, language and source; give a file that draft-train text wrote.")


def _files(folder: Path) -> Iterator[Path]:
    """All files below, in an order that depends on names only."""
    for path in sorted(folder.rglob("*")):
        nested = "site-packages" in path.relative_to(folder).parts  # of the standard library: not its own
        skipped = nested or _SKIPPED.search(path.name) or _SKIPPED.search(f"/{path.relative_to(folder)}")
        if not skipped and path.is_file() and not path.is_symlink() and path.stat().st_size < _LARGEST:
            yield path


@dataclass
class _Reader:
    """Reads files, and leaves out paragraphs that came before."""

    seen: set[int] = field(default_factory=set)

    def read(self, path: Path, source: str) -> Iterator[Piece]:
        suffix = Path(path.name.removesuffix(".gz").removesuffix(".dz")).suffix.lower()
        if suffix in _CODE:
            text = _content(path)
            if text and suffix == ".py":
                yield from self._prose(_docstrings(text), source)
            yield from self._code(text, _CODE[suffix], source)
            return
        if suffix == ".mo":
            read: Callable[[Path], Iterable[str]] = _catalogue
        elif suffix == ".dict":
            read = _dictionary
        elif suffix in (".html", ".htm", ".xhtml", ".page"):
            read = _html
        elif re.fullmatch(r"\.\d[a-z]*", suffix) and "man" in path.parent.name:
            read = _manual
        elif suffix in (".txt", ".md", ".rst", ".pod", ".text", ".faq") or _is_plain(path, suffix):
            read = _plain
        else:
            return
        yield from self._prose(read(path), source)

    def _new(self, text: str) -> bool:
        key = hash(" ".join(re.findall(r"\w+", text.lower())))
        if key in self.seen:
            return False
        self.seen.add(key)
        return True

    def _prose(self, paragraphs: Iterable[str], source: str) -> Iterator[Piece]:
        """Put paragraphs together to pieces; a heading is kept if a paragraph follows it."""
        parts: list[str] = []
        heading, words, limit = "", 0, _LENGTHS[0]
        for paragraph in paragraphs:
            if not _good(paragraph):
                heading = ""
                continue
            count = len(paragraph.split())
            if count < 8 and not paragraph.startswith("- "):
                heading = paragraph
                continue
            if not self._new(paragraph):
                heading = ""
                continue
            if not parts:
                limit = _LENGTHS[(len(paragraph) * 7 + count) % len(_LENGTHS)]
            parts += [heading, paragraph] if heading else [paragraph]
            heading, words = "", words + count
            if words >= limit:
                yield from _in_known_language(parts, source)
                parts, words = [], 0
        if words >= _SHORTEST:
            yield from _in_known_language(parts, source)

    def _code(self, text: str, language: str, source: str) -> Iterator[Piece]:
        blocks, size = list[str](), 0
        for block in re.split(r"\n{2,}(?=[^\s)}\]])", text.expandtabs(4).strip()):
            letters = sum(letter.isalpha() for letter in block)
            odd = max(map(len, block.split("\n"))) > _WIDEST or letters < 0.35 * len(block) or _NOTICE.search(block)
            if odd or len(block) > 2 * _CODE_LENGTHS[-1] or (len(block) > 60 and not self._new(block)):
                continue
            blocks.append(block)
            size += len(block)
            if size >= _CODE_LENGTHS[len(blocks[0]) % len(_CODE_LENGTHS)]:
                yield Piece("\n\n".join(blocks), "code", language, source)
                blocks, size = [], 0
        if size > _CODE_LENGTHS[0] // 2:
            yield Piece("\n\n".join(blocks), "code", language, source)


def _in_known_language(parts: list[str], source: str) -> Iterator[Piece]:
    """The piece, if the language of its paragraphs is known."""
    text = re.sub(r"\n(?=- )", "", "\n\n".join(parts))
    language = language_of(text)
    if language:
        yield Piece(text, "prose", language, source)


def language_of(text: str) -> str | None:
    """The language whose common words the text has most of; None: it has few of any."""
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    total = words.total() or 1
    shares = {
        language: sum(words[word] for word in common) / total * (26 / len(common)) ** 0.5
        for language, common in COMMON.items()
    }
    best = max(shares, key=lambda language: shares[language])
    return best if best in LANGUAGES and shares[best] > 0.14 else None


def _good(paragraph: str) -> bool:
    """True for words in sentences, and short examples."""
    dense = "".join(paragraph.split())
    if len(dense) < 3 or len(dense) > 12_000 or _BROKEN.search(paragraph) or _NOTICE.search(paragraph):
        return False
    letters = sum(letter.isalpha() for letter in dense)
    if letters < 0.7 * len(dense) or len(re.findall(r"[^\W\d\u0000-\u024f]", dense)) > 0.05 * letters:
        return False  # symbols, or other alphabets
    if re.search(r"(.)\1{7}|\b[0-9a-f]{24}|>>>|#\d{3}", dense):
        return False
    return not re.search(r"\.{4}|(?:^| )\|.*\|", paragraph) and sum(map(str.isupper, dense)) < 0.4 * letters + 4


# Kinds of files -> paragraphs.


def _content(path: Path) -> str:
    """The text of a file, also a compressed one; empty for what is no text."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    except (OSError, EOFError, zlib.error):
        return ""
    if b"\0" in data[:4096]:
        return ""
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return data.decode("latin-1").replace("\r\n", "\n")


def _is_plain(path: Path, suffix: str) -> bool:
    """True for files of text whose names do not say so: README, METADATA, and cookies of fortune."""
    name = path.name.lower()
    cookies = "fortunes" in path.parts and suffix in ("", ".fortunes")
    return cookies or name.startswith(("readme", "metadata", "faq"))


def _plain(path: Path) -> Iterator[str]:
    text = _content(path)
    if path.name == "METADATA":  # its description follows the fields
        text = text.partition("\n\n")[2]
    if text.count("`") > 0.2 * text.count("\n") > 20 and text.count("\t") > text.count("\n"):  # dialogues of games
        text = "\n\n".join(re.findall(r"`([^`\n]+)`", text))
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    # links, names in back quotes, emphasis, and marks of quoted lines
    text = re.sub(r"!?\[([^\]\n]*)\]\([^)\n]*\)|(?::[\w:+-]+:)?`([^`]{1,200})`_?", r"\1\2", text)
    text = re.sub(r"(?<!\w)([_*]{1,2})([\w\"][^_*]*)\1(?!\w)|^> ?", r"\2", text, flags=re.MULTILINE)
    if path.name.endswith((".pod", ".pod.gz")):
        text = re.sub(r"^=\w+.*|\bX<[^>]*>", "", text, flags=re.MULTILINE)
        text = re.sub(r"\b[A-Z]<+ ?([^<>]*) ?>+", r"\1", text)
    text = re.sub(r"\*\*|``|^\s*(#+|\.\. .*|:\w+:.*|=+|-{3,}|~{3,})\s*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(#+ )", "\n\n", text, flags=re.MULTILINE)
    yield from _reflowed(text.replace("\n%\n", "\n\n"))


def _reflowed(text: str) -> Iterator[str]:
    """Paragraphs as single lines; what is set off by spaces line by line is no prose."""
    for block in re.split(r"\n\s*\n", text.expandtabs(4)):
        lines = block.strip("\n").split("\n")
        items = re.split(r"\n\s*[-*•+] +", "\n" + "\n".join(lines)) if re.search(r"^\s*[-*•+] ", block, re.M) else None
        if items:
            yield from (" ".join(items[0].split()), *("- " + " ".join(item.split()) for item in items[1:]))
        elif len(lines) < 3 or sum(map(len, lines[:-1])) / (len(lines) - 1) > 36:
            yield " ".join(block.split())


_TAGS = re.compile(r"<[^>]*>")
_SET_APART = re.compile(
    r"<(script|style|nav|head|info|header|footer|form|table|svg|select)\b.*?</\1\s*>|<!--.*?-->"
    r"|<div[^>]*class=\"(?:nav|toc|sphinxsidebar|related|footer)[^>]*>.*?</div>",
    re.DOTALL | re.IGNORECASE,
)
_BLOCKS = re.compile(
    r"</?(?:p|div|h\d|ul|ol|dl|dt|dd|section|blockquote|article|br ?/?|title|item)\b[^>]*>", re.IGNORECASE
)


def _html(path: Path) -> Iterator[str]:
    text = _SET_APART.sub("\n\n", _content(path))
    text = re.sub(r"<pre\b.*?</pre\s*>", "\0", text, flags=re.DOTALL | re.IGNORECASE)  # examples are no prose
    text = re.sub(r"<li\b[^>]*>\s*(?:<p[^>]*>)?", "\0- ", " ".join(text.split()), flags=re.IGNORECASE)
    text = html.unescape(_TAGS.sub("", _BLOCKS.sub("\0", text)))
    for paragraph in text.split("\0"):
        line = re.sub(r" ([.,;:)])", r"\1", " ".join(paragraph.replace("¶", "").split()))
        if line.strip("- "):
            yield line


_REQUEST = re.compile(r"^[.'](\S+)\s*(.*)$")
_ESCAPE = re.compile(r"\\(f(\(..|\[\w*\]|.)|s[+-]?\d|\*(\(..|\[[^\]]*\]|.)|[&|^/,%])")
_GLYPHS = {
    r"\-": "-", r"\(aq": "'", r"\(em": " - ", r"\(en": "-", r"\(lq": '"', r"\(rq": '"', r"\e": "\\", r"\ ": " ",
    r"\(co": "©", r"\(cq": "'", r"\(oq": "'", r"\(bu": "-", r"\~": " ", r"\(dq": '"', r"\(rs": "\\", r"\:": "",
}  # fmt: skip


def _manual(path: Path) -> Iterator[str]:
    """Paragraphs of a manual page: the requests of man and mdoc that set words are read as words, others end one."""
    lines: list[str] = []
    example = False
    for line in [*_content(path).split("\n"), ".PP"]:
        request = _REQUEST.match(line)
        name, rest = request.groups() if request else ("", line)
        if line.startswith((r".\"", r"'\"")):
            continue
        if name in ("nf", "EX", "TS", "SY", "Bd"):
            example = True
        elif name in ("fi", "EE", "TE", "YS", "Ed"):
            example = False
        elif (
            name in ("", "B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "Nm", "Fl", "Ar", "Pa", "Xr", "Em", "Sy")
            and rest
        ):
            if not example:
                if name:  # alternating fonts stand side by side
                    words = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|((?:\\ |[^ ])+)', rest)]
                    rest = ("" if len(name) == 2 and name.isupper() and name != "SM" else " ").join(words)
                lines.append(("-" if name == "Fl" else "") + rest)
        else:
            yield _typeset(lines)
            lines = [rest.strip('" ')] if name in ("SH", "SS") and not rest.isupper() else []
            if lines:
                yield _typeset(lines)
                lines = []


def _typeset(lines: list[str]) -> str:
    text = _ESCAPE.sub("", " ".join(lines))
    for escape, glyph in _GLYPHS.items():
        text = text.replace(escape, glyph)
    return " ".join(re.sub(r"\\\(..|\\\[[^\]]*\]|\\[\"#].*|\\", "", text).split())


def _dictionary(path: Path) -> Iterator[str]:
    """The entries of a dictd dictionary, each as one paragraph."""
    for entry in re.split(r"\n(?=\S)", _content(path)):
        text = " ".join(re.sub(r"\[[^\]]*\]|\{|\}|\\|\([^a-z ]*\)", "", entry).split())
        yield re.sub(r"^(.*?) \S*[\"*`]\S*(?<!,),?", r"\1,", text, count=1)  # the syllables of the word


def _catalogue(path: Path) -> Iterator[str]:
    """Messages of a gettext catalogue that are whole sentences: the originals, then the translations."""
    try:
        with path.open("rb") as file:
            messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, LookupError, struct.error):  # damaged, or in an unknown encoding
        return
    # the original follows its context
    pairs = [(key.rpartition("\x04")[2], value) for key, value in messages.items() if isinstance(key, str) and key]
    for side in (0, 1):
        for pair in pairs:
            text = " ".join(_TAGS.sub("", pair[side]).split())
            if len(text.split()) >= 6 and text[-1] in '.!?”"' and not re.search(r"%\w|\$|\\", text):
                yield text


def _docstrings(text: str) -> Iterator[str]:
    """Paragraphs of the docstrings of a Python file, and of pydoc's topics."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Dict):
            found = "\n\n".join(
                each.value for each in node.values if isinstance(each, ast.Constant) and isinstance(each.value, str)
            )
        else:
            continue
        if len(found) > 400:
            yield from _reflowed(found)


# draft-train text.

_SHARES = {"english": 60, "code": 20, "other": 20}  # per cent
_OF_ONE_SOURCE = 0.15  # of a group, so that no dictionary and no manual is most of it


def share_out(pieces: Sequence[Piece], size: int) -> list[Piece]:
    """The first pieces of each group, whose characters together are at most its share of `size`.

    The share of a group without any piece goes to the others, in proportion to theirs.
    """
    present = {group(piece) for piece in pieces}
    total = sum(share for name, share in _SHARES.items() if name in present)
    shares = {name: share / total for name, share in _SHARES.items() if name in present}
    room = {name: share * size for name, share in shares.items()}
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    for piece in pieces:
        name, length = group(piece), len(piece.text)
        of_source = taken[name, piece.source] + length
        if length <= room[name] and of_source <= _OF_ONE_SOURCE * shares[name] * size:
            room[name] -= length
            taken[name, piece.source] = of_source
            chosen.append(piece)
    return chosen


def group(piece: Piece) -> str:
    """The group whose share a piece counts to: english, code or other."""
    return "code" if piece.kind == "code" else "english" if piece.language == "en" else "other"
