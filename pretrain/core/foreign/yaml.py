"""YAML that others have written: bounded in size, nodes, depth, the copies that aliases make, and digits.

Read are texts, numbers, `true`, `null`, lists and mappings. A date is a text, a tag of any other type an error. Numbers
are read as people write them: `1e6` is one, while `1:30` and `010` are texts (YAML 1.1 has 90 and 8 for them).
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import texts
from pretrain.core.foreign.json import JSON
from pretrain.core.foreign.reading import read_bytes

MOST = 1 << 20  # characters of a text, and of its values, those that aliases repeat counted each time
NODES = 20_000  # values, those that aliases repeat counted each time
DEPTH = 50  # lists and mappings in one another
DIGITS = 64  # of a whole number

Places = dict[tuple[str | int, ...], str]
_NAME = "tag:yaml.org,2002:"
_TYPES = {f"{_NAME}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class Loader(yaml.SafeLoader):
    """YAML within the bounds, with `1e6` read as a number."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes, self.letters, self.deep = 0, 0, 0
        self.sizes: dict[int, tuple[int, int]] = {}  # of nodes that are whole, by identity: what an alias repeats

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One value, of which the bounds are kept before the next is looked at."""
        repeated, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        before = self.nodes, self.letters
        self.nodes, self.deep = self.nodes + 1, self.deep + 1
        if self.deep > DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {DEPTH} lists or mappings in one another", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.deep -= 1
        if repeated:
            nodes, letters = self.sizes.get(id(node), (0, 0))
            self.nodes, self.letters = self.nodes + nodes, self.letters + letters
        elif isinstance(node, yaml.ScalarNode):
            self.letters += len(node.value)
        if self.letters > MOST:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST:,} characters, what aliases repeat counted each time", mark
            )
        if self.nodes > NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {NODES:,} values, what aliases repeat counted each time", mark
            )
        if not repeated:
            self.sizes[id(node)] = self.nodes - before[0], self.letters - before[1]
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
        elif node is not None and node.tag not in _TYPES:
            self._refuse(node, f"the tag {node.tag}, which is not read")
        return node

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        if node.tag not in _TYPES:
            self._refuse(node, f"the tag {node.tag}, which is not read")
        if node.tag == f"{_NAME}int" and len(node.value) > DIGITS:
            self._refuse(node, f"a number of {len(node.value)} digits, where at most {DIGITS} are read")
        if node.tag in (f"{_NAME}int", f"{_NAME}float") and ":" in node.value:
            self._refuse(node, f"a number in parts of 60 ({node.value[:DIGITS]}), which is not read")
        if texts.is_broken(node.value):
            self._refuse(node, "half of a character (a lone surrogate)")
        if "\0" in node.value:
            self._refuse(node, "a zero character in a text")

    def _refuse(self, node: yaml.Node, problem: str) -> None:
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)


_OTHERS = {f"{_NAME}{name}" for name in ("timestamp", "value", "int", "float")}  # read as below, or as texts
_INT = r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"  # 1:30 is no 90, and 010 no 8
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*"
    r"|[-+]?\.(?:inf|Inf|INF|nan|NaN|NAN)"
)
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _firsts in (("int", _INT, "-+0123456789"), ("float", _FLOAT, "-+0123456789.")):
    Loader.add_implicit_resolver(f"{_NAME}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_firsts))


class _Fast(Loader):
    """The same of the events of libyaml, which takes a text to pieces many times as fast as Python does."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        events = yaml.CSafeLoader(text)
        vars(self).update({name: getattr(events, name) for name in ("check_event", "peek_event", "get_event")})


# In what has one of these, libyaml takes for good some that PyYAML refuses, or reads it in another way.
_APART = re.compile(r"[\t?!\ufeff]|[|>][-+0-9]*#")


def read_text(path: Path) -> str:
    """The text of a YAML file; an error names the file."""
    try:
        return texts.decode(read_bytes(path, 4 * MOST))
    except UnicodeDecodeError as error:
        raise PretrainError(f"{path} cannot be read: {error}; accepted: YAML, as text in UTF-8") from error
    except OSError as error:
        raise PretrainError(f"{path} cannot be read: {error.strerror or error}") from error


def loads(text: str, where: str) -> tuple[JSON, Places]:
    """The value of a YAML text and where each part of it stands, as `WHERE:LINE`; an error of one line says where."""
    if len(text) > MOST:
        raise PretrainError(f"{where}: not valid YAML: {len(text):,} characters; accepted: at most {MOST:,}")
    try:
        value, places = _read(text, where)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:300]
        raise PretrainError(f"{at}: not valid YAML: {problem}") from error
    except (ValueError, TypeError, OverflowError, KeyError, AttributeError, IndexError) as error:  # of an odd scalar
        raise PretrainError(f"{where}: not valid YAML: {' '.join(str(error).split())[:300]}") from error
    return _unshared(value), places


def _read(text: str, where: str) -> tuple[JSON, Places]:
    """The value and its places; what libyaml refuses or reads apart is left to PyYAML."""
    if yaml.__with_libyaml__ and not _APART.search(text):
        try:
            return _read_by(_Fast(text), where)
        except (yaml.scanner.ScannerError, yaml.parser.ParserError, yaml.reader.ReaderError, UnicodeEncodeError):
            pass  # PyYAML says what it is, or takes it
    return _read_by(Loader(text), where)


def _read_by(loader: Loader, where: str) -> tuple[JSON, Places]:
    try:
        node = loader.get_single_node()
        places = {} if node is None else _locate(node, where)
        return (None if node is None else loader.construct_document(node)), places
    finally:
        loader.dispose()


def _unshared(value: JSON) -> JSON:
    """The value with a copy wherever YAML's aliases share one, so that changing one place changes no other."""
    if isinstance(value, dict):
        return {k: _unshared(v) for k, v in value.items()}
    return [_unshared(v) for v in value] if isinstance(value, list) else value


def _locate(node: yaml.Node, path: str) -> Places:
    places: Places = {}
    _note(node, (), path, (), places)
    return places


def _note(
    node: yaml.Node, place: tuple[str | int, ...], path: str, within: tuple[yaml.Node, ...], places: Places
) -> None:
    """Note where each place stands; a key given twice, or one that is no plain word, is an error."""
    where = f"{path}:{node.start_mark.line + 1}"
    if node in within:
        raise PretrainError(f"{where}: {'.'.join(map(str, place))} holds itself; accepted: no alias inside its anchor")
    places.setdefault(place, where)
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            line = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise PretrainError(f"{line}: a key that is a list or a mapping; accepted: a word")
            if key.value in names:
                raise PretrainError(f"{line}: {key.value!r} is given twice")
            names.add(key.value)
            places[(*place, key.value)] = line
            _note(value, (*place, key.value), path, (*within, node), places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note(value, (*place, index), path, (*within, node), places)
