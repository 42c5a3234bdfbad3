"""Feed declarations: the dbt source YAML -> `FeedSpec`. Nothing about a feed is written anywhere else.

A table of a dbt source is a feed when its `config.meta.feed` says where it comes from. Its columns, their types and
their data tests are the contract the decoder enforces; dbt reads the very same lines. What cannot be understood
stops every command with the file, the line and the reason.
"""

import csv
import datetime as dt
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings

# Postgres cuts identifiers at 63 bytes; dbt adds suffixes to ours.
MAX_NAME = 50

TypeName = Literal["text", "uuid", "boolean", "integer", "bigint", "numeric", "date", "timestamptz", "jsonb"]
PLAIN_TYPES: frozenset[str] = frozenset(
    {"text", "uuid", "boolean", "integer", "bigint", "date", "timestamptz", "jsonb"}
)
NUMERIC_TYPE = re.compile(r"^numeric\((\d+),\s*(\d+)\)$")

# Data tests dbt runs that say nothing about one record by itself.
DBT_ONLY_TESTS = frozenset({"unique"})


@dataclass(frozen=True)
class ColumnType:
    """A declared type; `precision` and `scale` are set for numeric only."""

    name: TypeName
    precision: int = 0
    scale: int = 0

    @property
    def sql(self) -> str:
        return f"numeric({self.precision},{self.scale})" if self.name == "numeric" else self.name


@dataclass(frozen=True)
class AcceptedValues:
    """The value, as text, is one of these."""

    values: frozenset[str]


@dataclass(frozen=True)
class Range:
    """Both ends belong to the range; None leaves an end open. Numbers, dates or times by the column's type."""

    minimum: Decimal | dt.date | dt.datetime | None
    maximum: Decimal | dt.date | dt.datetime | None


@dataclass(frozen=True)
class Pattern:
    """A regular expression both Python and Postgres read alike; `$` means the very end."""

    pattern: str

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        # Python's `$` also matches before a trailing newline, Postgres' does not.
        return re.compile(re.sub(r"(?<!\\)\$$", r"\\Z", self.pattern))


@dataclass(frozen=True)
class ExactInCurrency:
    """The amount has no more decimals than the currency in `currency_column` (ISO 4217 exponents)."""

    currency_column: str
    exponents: Mapping[str, int]


Rule = AcceptedValues | Range | Pattern | ExactInCurrency


@dataclass(frozen=True)
class ColumnSpec:
    name: str
    type: ColumnType
    required: bool
    rules: tuple[Rule, ...]
    pii: bool
    subject_key: bool


@dataclass(frozen=True)
class KafkaOrigin:
    """A Kafka topic whose values are JSON objects in UTF-8."""

    topic: str
    format: Literal["json"]
    # Whether a partition may rest while the others flow: then the newest of them tells the age, and not the oldest.
    idle_partitions: Literal["late", "normal"] = "late"

    kind: Literal["kafka"] = "kafka"


@dataclass(frozen=True)
class WindowSpec:
    """Days a REST feed asks for: from `start`, `days` a request, `reread_days` behind the last one again."""

    start: dt.date
    days: int
    reread_days: int


@dataclass(frozen=True)
class RecordsSpec:
    """How a page becomes records.

    `path` leads to the records inside the page. With `keys` they are nested objects whose keys, level by level,
    become columns and whose leaf becomes `value`; without, a list of objects. `page_fields` copies fields of the
    page into each record (column -> field).
    """

    path: str
    keys: tuple[str, ...]
    value: str | None
    page_fields: Mapping[str, str]


@dataclass(frozen=True)
class RequestSpec:
    """How hard an API may be asked: requests at once, and in a minute (None: as many as it answers)."""

    concurrent: int = 1
    per_minute: int | None = None


@dataclass(frozen=True)
class RestOrigin:
    """A REST endpoint; `base_url` names the setting with the address."""

    base_url: str
    path: str
    params: Mapping[str, str]
    window: WindowSpec
    records: RecordsSpec
    key: tuple[str, ...]
    requests: RequestSpec = RequestSpec()

    kind: Literal["rest"] = "rest"


@dataclass(frozen=True)
class DeadLetterBudget:
    """How many records of a run may be set aside before the run counts as failed; None bounds nothing.

    `share` is of the records offered, and says nothing of fewer than `minimum_records`.
    """

    share: float | None = None
    count: int | None = None
    minimum_records: int = 100

    def find_excess(self, offered: int, dead: int) -> str | None:
        """What is over the budget, in words; None within it."""
        if self.count is not None and dead > self.count:
            return f"set {dead:,} records aside, its budget is {self.count:,} a run"
        if self.share is not None and offered >= self.minimum_records and dead > self.share * offered:
            return f"set {dead:,} of {offered:,} records aside ({dead / offered:.1%}), its budget is {self.share:.1%}"
        return None


@dataclass(frozen=True)
class IngestWhen:
    """When what waits at the broker is read without being asked: so many messages, or any for so many seconds."""

    messages: int = 1_000
    seconds: int = 60


@dataclass(frozen=True)
class FeedSpec:
    """One feed as declared. `name` is `<source>.<table>`, which is also its raw table."""

    source: str
    table: str
    origin: KafkaOrigin | RestOrigin
    columns: tuple[ColumnSpec, ...]
    owner: str
    file: str
    line: int
    dead_letter_budget: DeadLetterBudget = DeadLetterBudget()
    ingest_when: IngestWhen = IngestWhen()

    @property
    def name(self) -> str:
        return f"{self.source}.{self.table}"

    @property
    def pipeline_name(self) -> str:
        return f"{self.source}__{self.table}"

    @cached_property
    def contract_version(self) -> str:
        """Changes when a column, a type or a rule changes; descriptions do not count."""
        contract = [
            [c.name, c.type.sql, c.required, sorted(_canonical(rule) for rule in c.rules)] for c in self.columns
        ]
        return hashlib.sha256(json.dumps(contract).encode()).hexdigest()[:12]


def _canonical(rule: Rule) -> str:
    match rule:
        case AcceptedValues(values):
            return f"accepted {sorted(values)}"
        case Range(minimum, maximum):
            return f"range {minimum} {maximum}"
        case Pattern(pattern):
            return f"pattern {pattern}"
        case ExactInCurrency(column, exponents):
            return f"exact {column} {sorted(exponents.items())}"


class _Located(dict[str, Any]):
    """A YAML mapping that knows the line it starts on and those of its keys."""

    line: int
    key_lines: dict[str, int]


class _LocatingLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's parser where PyYAML was built with it."""


def _construct_located(loader: _LocatingLoader, node: yaml.MappingNode) -> Iterator[_Located]:
    mapping = _Located()
    mapping.line = node.start_mark.line + 1
    mapping.key_lines = {}
    yield mapping
    for key_node, _ in node.value:
        if key_node.value in mapping.key_lines:
            raise yaml.constructor.ConstructorError(None, None, f"'{key_node.value}' stands twice", key_node.start_mark)
        mapping.key_lines[key_node.value] = key_node.start_mark.line + 1
    mapping.update({str(key): value for key, value in loader.construct_mapping(node, deep=True).items()})


_LocatingLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_located)


class _Declaration:
    """One source file being read: knows how to say where something is wrong."""

    def __init__(self, path: Path, project_dir: Path) -> None:
        self.path = path
        self.label = str(path.relative_to(project_dir))

    def error(self, where: Any, reason: str) -> ConfigurationError:
        line = where if isinstance(where, int) else getattr(where, "line", 1)
        return ConfigurationError(
            f"{self.label}:{line}: {reason}",
            hint="Correct the declaration; README, 'Declare a feed', has the form.",
        )

    def read(self) -> _Located:
        try:
            text = self.path.read_text(encoding="utf-8")
            document = yaml.load(text, Loader=_LocatingLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(1, f"cannot be read: {error}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or "not valid YAML"
            raise self.error(mark.line + 1 if mark else 1, f"not valid YAML: {reason}") from None
        if document is None:
            document = _Located()
            document.line, document.key_lines = 1, {}
        return self.mapping(document, 1, "the file")

    def mapping(self, value: Any, where: Any, what: str) -> _Located:
        if not isinstance(value, _Located):
            raise self.error(where, f"{what} must be a mapping, not {_kind(value)}")
        return value

    def sequence(self, value: Any, where: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(where, f"{what} must be a list, not {_kind(value)}")
        return value

    def take(self, mapping: _Located, key: str, kind: type, what: str, default: Any = ...) -> Any:
        """The value of a key, checked for its type; a default makes it optional."""
        if key not in mapping:
            if default is ...:
                raise self.error(mapping, f"{what} needs `{key}`")
            return default
        value = mapping[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(mapping.key_lines[key], f"`{key}` of {what} must be {_names[kind]}, not {_kind(value)}")
        return value

    def only(self, mapping: _Located, known: Sequence[str], what: str) -> None:
        for key in mapping:
            if key not in known:
                raise self.error(
                    mapping.key_lines.get(key, mapping.line),
                    f"{what} has no setting `{key}`; there are {', '.join(known)}",
                )


_names: dict[type, str] = {
    str: "text",
    int: "a whole number",
    dict: "a mapping",
    list: "a list",
    dt.date: "a date",
}


def _kind(value: Any) -> str:
    return "nothing" if value is None else _names.get(type(value), type(value).__name__)


def load_feeds(settings: Settings) -> list[FeedSpec]:
    """All declared feeds, by name.

    Raises:
        ConfigurationError: a declaration cannot be understood; the message has file, line and reason.
    """
    feeds: dict[str, FeedSpec] = {}
    root = settings.project_dir
    for path in sorted((root / "models").rglob("*.y*ml")):
        if path.name.startswith("."):  # an editor's lock file
            continue
        if "sources:" not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        declaration = _Declaration(path, root)
        for feed in _parse_file(declaration, root):
            if feed.name in feeds:
                first = feeds[feed.name]
                raise declaration.error(feed.line, f"{feed.name} is already declared in {first.file}:{first.line}")
            feeds[feed.name] = feed
    return [feeds[name] for name in sorted(feeds)]


def select_feeds(feeds: Sequence[FeedSpec], names: Sequence[str]) -> list[FeedSpec]:
    """The feeds named in full or by table alone; all of them for no names."""
    if not names:
        return list(feeds)
    chosen = []
    for name in names:
        matches = [feed for feed in feeds if name in (feed.name, feed.table)]
        if len(matches) != 1:
            what = "is ambiguous" if matches else "is not declared"
            raise ConfigurationError(
                f"Feed {name} {what}.", hint="Declared feeds: " + ", ".join(feed.name for feed in feeds)
            )
        chosen.append(matches[0])
    return chosen


def _parse_file(declaration: _Declaration, root: Path) -> Iterator[FeedSpec]:
    document = declaration.read()
    for source in declaration.sequence(document.get("sources", []), document, "`sources`"):
        source = declaration.mapping(source, document, "a source")
        source_name = declaration.take(source, "name", str, "a source")
        config = declaration.mapping(source.get("config", _empty(source)), source, "`config`")
        meta = declaration.mapping(config.get("meta", _empty(source)), config, "`meta`")
        owner = declaration.take(meta, "owner", str, f"source {source_name}", default="")
        for table in declaration.sequence(source.get("tables", []), source, "`tables`"):
            table = declaration.mapping(table, source, "a table")
            feed = _parse_table(declaration, root, source, source_name, table, owner)
            if feed is not None:
                yield feed


def _empty(near: _Located) -> _Located:
    empty = _Located()
    empty.line, empty.key_lines = near.line, {}
    return empty


def _parse_table(
    declaration: _Declaration, root: Path, source: _Located, source_name: str, table: _Located, owner: str
) -> FeedSpec | None:
    name = declaration.take(table, "name", str, f"a table of {source_name}")
    config = declaration.mapping(table.get("config", _empty(table)), table, "`config`")
    meta = declaration.mapping(config.get("meta", _empty(config)), config, "`meta`")
    if "feed" not in meta:
        return None
    label = f"feed {source_name}.{name}"
    for part in (source_name, name):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", part) or len(part) > MAX_NAME:
            raise declaration.error(
                table, f"{label}: `{part}` must be lower-case snake case of at most {MAX_NAME} characters"
            )
    if source.get("schema", source_name) != source_name:
        raise declaration.error(source.key_lines["schema"], f"{label}: the schema is the source's name; leave it out")
    columns: list[ColumnSpec] = []
    lines: list[_Located] = []
    for column in declaration.sequence(table.get("columns", []), table, f"`columns` of {label}"):
        located = declaration.mapping(column, table, "a column")
        spec = _parse_column(declaration, root, located, label)
        if any(spec.name == other.name for other in columns):
            raise declaration.error(located, f"{label}: column {spec.name} stands twice")
        columns.append(spec)
        lines.append(located)
    if not columns:
        raise declaration.error(table, f"{label} declares no columns")
    names = {column.name for column in columns}
    for spec, located in zip(columns, lines, strict=True):
        for rule in spec.rules:
            if isinstance(rule, ExactInCurrency) and rule.currency_column not in names:
                raise declaration.error(located, f"{label}: {rule.currency_column} is not a column")
    feed_meta = declaration.mapping(meta["feed"], meta, "`feed`")
    return FeedSpec(
        source=source_name,
        table=name,
        origin=_parse_origin(declaration, feed_meta, label, names),
        columns=tuple(columns),
        owner=declaration.take(meta, "owner", str, label, default=owner),
        file=declaration.label,
        line=table.line,
        dead_letter_budget=_parse_budget(declaration, feed_meta, label),
        ingest_when=_parse_ingest_when(declaration, feed_meta, label),
    )


def _parse_ingest_when(declaration: _Declaration, feed: _Located, label: str) -> IngestWhen:
    if "ingest_when" not in feed:
        return IngestWhen()
    what = f"`ingest_when` of {label}"
    declared = declaration.mapping(feed["ingest_when"], feed.key_lines["ingest_when"], what)
    declaration.only(declared, ("messages", "seconds"), what)
    spec = IngestWhen(
        messages=declaration.take(declared, "messages", int, what, default=IngestWhen.messages),
        seconds=declaration.take(declared, "seconds", int, what, default=IngestWhen.seconds),
    )
    if spec.messages < 1:
        raise declaration.error(declared.key_lines["messages"], f"`messages` of {what} must be 1 or more")
    if spec.seconds < 0:
        raise declaration.error(declared.key_lines["seconds"], f"`seconds` of {what} must be 0 or more")
    return spec


def _parse_budget(declaration: _Declaration, feed: _Located, label: str) -> DeadLetterBudget:
    if "dead_letter_budget" not in feed:
        return DeadLetterBudget()
    what = f"`dead_letter_budget` of {label}"
    budget = declaration.mapping(feed["dead_letter_budget"], feed.key_lines["dead_letter_budget"], what)
    declaration.only(budget, ("share", "count", "minimum_records"), what)
    if "share" not in budget and "count" not in budget:
        raise declaration.error(budget, f"{what} needs `share`, `count` or both")
    share = budget.get("share")
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1):
        raise declaration.error(budget.key_lines["share"], f"`share` of {what} must be a number from 0 to 1")
    count = declaration.take(budget, "count", int, what, default=None)
    minimum = declaration.take(budget, "minimum_records", int, what, default=DeadLetterBudget.minimum_records)
    for name, number in (("count", count), ("minimum_records", minimum)):
        if number is not None and number < 0:
            raise declaration.error(budget.key_lines[name], f"`{name}` of {what} must be 0 or more")
    return DeadLetterBudget(share, count, minimum)


def _parse_origin(declaration: _Declaration, feed: _Located, label: str, columns: set[str]) -> KafkaOrigin | RestOrigin:
    kind = declaration.take(feed, "kind", str, label)
    if kind == "kafka":
        known = ("kind", "topic", "format", "idle_partitions", "dead_letter_budget", "ingest_when")
        declaration.only(feed, known, label)
        format_ = declaration.take(feed, "format", str, label, default="json")
        if format_ != "json":
            raise declaration.error(
                feed.key_lines["format"], f"{label}: format `{format_}` is not known; there is json"
            )
        idle = declaration.take(feed, "idle_partitions", str, label, default="late")
        if idle not in ("late", "normal"):
            raise declaration.error(
                feed.key_lines["idle_partitions"], f"{label}: `idle_partitions` is late or normal, not `{idle}`"
            )
        return KafkaOrigin(
            topic=declaration.take(feed, "topic", str, label),
            format="json",
            idle_partitions="normal" if idle == "normal" else "late",
        )
    if kind == "rest":
        declaration.only(
            feed,
            ("kind", "base_url", "path", "params", "window", "records", "key", "requests", "dead_letter_budget"),
            label,
        )
        origin = RestOrigin(
            base_url=declaration.take(feed, "base_url", str, label),
            path=declaration.take(feed, "path", str, label),
            params={k: str(v) for k, v in declaration.take(feed, "params", dict, label, default={}).items()},
            window=_parse_window(declaration, feed, label),
            records=_parse_records(declaration, feed, label),
            key=tuple(declaration.take(feed, "key", list, label)),
            requests=_parse_requests(declaration, feed, label),
        )
        for placeholder in ("{from}", "{to}"):
            if placeholder not in origin.path and placeholder not in origin.params.values():
                raise declaration.error(feed, f"{label}: neither path nor params use {placeholder}")
        for column in origin.key:
            if column not in columns:
                raise declaration.error(feed.key_lines["key"], f"{label}: key column {column} is not declared")
        return origin
    raise declaration.error(feed.key_lines["kind"], f"{label}: kind `{kind}` is not known; there are kafka and rest")


def _parse_window(declaration: _Declaration, feed: _Located, label: str) -> WindowSpec:
    window = declaration.mapping(feed.get("window"), feed, f"`window` of {label}")
    declaration.only(window, ("start", "days", "reread_days"), f"`window` of {label}")
    spec = WindowSpec(
        start=declaration.take(window, "start", dt.date, f"`window` of {label}"),
        days=declaration.take(window, "days", int, f"`window` of {label}"),
        reread_days=declaration.take(window, "reread_days", int, f"`window` of {label}", default=0),
    )
    if spec.days < 1 or spec.reread_days < 0:
        raise declaration.error(window, f"`window` of {label}: days must be 1 or more, reread_days 0 or more")
    return spec


def _parse_requests(declaration: _Declaration, feed: _Located, label: str) -> RequestSpec:
    what = f"`requests` of {label}"
    if "requests" not in feed:
        return RequestSpec()
    requests = declaration.mapping(feed["requests"], feed, what)
    declaration.only(requests, ("concurrent", "per_minute"), what)
    spec = RequestSpec(
        concurrent=declaration.take(requests, "concurrent", int, what, default=1),
        per_minute=declaration.take(requests, "per_minute", int, what, default=None),
    )
    if spec.concurrent < 1 or (spec.per_minute is not None and spec.per_minute < 1):
        raise declaration.error(requests, f"{what}: concurrent and per_minute must be 1 or more")
    return spec


def _parse_records(declaration: _Declaration, feed: _Located, label: str) -> RecordsSpec:
    what = f"`records` of {label}"
    records = declaration.mapping(feed.get("records"), feed, what)
    declaration.only(records, ("path", "keys", "value", "page_fields"), what)
    keys = tuple(declaration.take(records, "keys", list, what, default=[]))
    value = declaration.take(records, "value", str, what, default=None)
    if bool(keys) != (value is not None):
        raise declaration.error(records, f"{what}: `keys` and `value` go together")
    return RecordsSpec(
        path=declaration.take(records, "path", str, what),
        keys=keys,
        value=value,
        page_fields=dict(declaration.take(records, "page_fields", dict, what, default={})),
    )


def _parse_column(declaration: _Declaration, root: Path, column: _Located, label: str) -> ColumnSpec:
    name = declaration.take(column, "name", str, f"a column of {label}")
    where = f"{label}, column {name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > MAX_NAME:
        raise declaration.error(
            column, f"{where}: a name must be lower-case snake case of at most {MAX_NAME} characters"
        )
    type_ = _parse_type(declaration, column, where)
    required = False
    rules: list[Rule] = []
    for test in declaration.sequence(column.get("data_tests", []), column, f"`data_tests` of {where}"):
        test_name, body = _test_parts(declaration, test, column, where)
        if test_name == "not_null":
            required = True
        elif test_name not in DBT_ONLY_TESTS:
            rules.append(_parse_rule(declaration, root, column, test_name, body, type_, where))
    meta = declaration.mapping(column.get("config", _empty(column)), column, "`config`").get("meta") or {}
    return ColumnSpec(
        name=name,
        type=type_,
        required=required,
        rules=tuple(rules),
        pii=bool(meta.get("pii", False)),
        subject_key=bool(meta.get("subject_key", False)),
    )


def _parse_type(declaration: _Declaration, column: _Located, where: str) -> ColumnType:
    text = declaration.take(column, "data_type", str, where)
    if text in PLAIN_TYPES:
        return ColumnType(name=text)
    numeric = NUMERIC_TYPE.match(text)
    if numeric:
        precision, scale = int(numeric[1]), int(numeric[2])
        if not (1 <= precision <= 1000 and scale <= precision):
            raise declaration.error(column.key_lines["data_type"], f"{where}: {text} is not a valid numeric type")
        return ColumnType(name="numeric", precision=precision, scale=scale)
    known = ", ".join(sorted(PLAIN_TYPES))
    raise declaration.error(
        column.key_lines["data_type"], f"{where}: type `{text}` is not known; there are {known}, numeric(p,s)"
    )


def _test_parts(declaration: _Declaration, test: Any, column: _Located, where: str) -> tuple[str, _Located]:
    if isinstance(test, str):
        return test, _empty(column)
    if isinstance(test, _Located) and len(test) == 1:
        name, body = next(iter(test.items()))
        body = body if body is not None else _empty(test)
        body = declaration.mapping(body, test, f"test {name} of {where}")
        if "where" in (body.get("config") or {}):
            raise declaration.error(body, f"{where}: a rule with `where` cannot be enforced on one record")
        return name, declaration.mapping(body.get("arguments", _empty(body)), body, f"arguments of {name}")
    raise declaration.error(column, f"{where}: a test is a name or a mapping of one name")


def _parse_rule(
    declaration: _Declaration,
    root: Path,
    column: _Located,
    name: str,
    arguments: _Located,
    type_: ColumnType,
    where: str,
) -> Rule:
    what = f"{name} of {where}"
    match name:
        case "accepted_values":
            values = declaration.take(arguments, "values", list, what)
            if not values or not all(isinstance(value, str) for value in values) or type_.name != "text":
                raise declaration.error(arguments, f"{what}: needs a list of texts and a text column")
            return AcceptedValues(frozenset(values))
        case "relationships":
            seed = re.fullmatch(r"ref\(['\"](\w+)['\"]\)", declaration.take(arguments, "to", str, what))
            field = declaration.take(arguments, "field", str, what)
            if seed is None or type_.name != "text":
                raise declaration.error(arguments, f"{what}: the door can check a text column against a seed only")
            return AcceptedValues(frozenset(row[field] for row in _seed(declaration, root, seed[1], field, arguments)))
        case "within_range":
            ends = [_range_end(declaration, arguments, key, type_, what) for key in ("min_value", "max_value")]
            if ends == [None, None]:
                raise declaration.error(arguments, f"{what}: needs min_value, max_value or both")
            return Range(*ends)
        case "matches_pattern":
            pattern = Pattern(declaration.take(arguments, "pattern", str, what))
            try:
                pattern.compiled  # noqa: B018 -- compiling is the check
            except re.error as error:
                raise declaration.error(arguments, f"{what}: not a regular expression: {error}") from None
            if type_.name != "text":
                raise declaration.error(arguments, f"{what}: only text has a pattern")
            return pattern
        case "exact_in_currency":
            if type_.name != "numeric":
                raise declaration.error(arguments, f"{what}: only numeric columns hold amounts")
            rows = _seed(declaration, root, "currencies", "minor_unit_exponent", arguments)
            return ExactInCurrency(
                declaration.take(arguments, "currency_column", str, what),
                {row["currency_code"]: int(row["minor_unit_exponent"]) for row in rows},
            )
    raise declaration.error(
        column.key_lines["data_tests"],
        f"{where}: rule `{name}` is not known; there are not_null, accepted_values, relationships, within_range, "
        "matches_pattern, exact_in_currency",
    )


def _range_end(
    declaration: _Declaration, arguments: _Located, key: str, type_: ColumnType, what: str
) -> Decimal | dt.date | dt.datetime | None:
    value = arguments.get(key)
    if value is None:
        return None
    try:
        if type_.name in ("integer", "bigint", "numeric"):
            return Decimal(str(value))
        if type_.name == "date":
            return value if isinstance(value, dt.date) else dt.date.fromisoformat(value)
        if type_.name == "timestamptz":
            time = value if isinstance(value, dt.datetime) else dt.datetime.fromisoformat(value)
            if time.tzinfo is None:
                raise ValueError("a time needs its zone")
            return time
    except (ValueError, InvalidOperation, TypeError) as error:
        raise declaration.error(arguments.key_lines[key], f"{what}: {key} is not a {type_.name}: {error}") from None
    raise declaration.error(arguments, f"{what}: {type_.name} has no range")


def _seed(declaration: _Declaration, root: Path, seed: str, field: str, where: _Located) -> list[dict[str, str]]:
    """Rows of a seed; seeds are small reference lists."""
    found = sorted((root / "seeds").rglob(f"{seed}.csv"))
    if not found:
        raise declaration.error(where, f"no seed {seed}.csv under seeds/")
    with found[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or field not in rows[0]:
        raise declaration.error(where, f"seed {seed} has no rows or no column {field}")
    return rows
