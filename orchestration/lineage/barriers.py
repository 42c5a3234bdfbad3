"""Barriers that end personal data, as they stand in SQL: what a function does to the value given to it.

A model's column declares its barrier (`config.meta.barrier`); what is found here on the way of a value is what the
declaration is held against. Only what cannot give the value back counts: `left(email, 40)` is no mask, and a hash of
which the value is beside it does not help, because every way of the value is looked at.
"""

from sqlglot import exp

HASH = "hash"
MASK = "mask"
TOKENISE = "tokenise"
KINDS = (HASH, MASK, TOKENISE, "aggregate")

HASHES = frozenset({"md5", "sha224", "sha256", "sha384", "sha512", "sha", "sha1", "sha2", "digest"})
# As many characters of a value a mask may leave.
MASK_LEAVES = 4
# Where `ensure_schema` keeps the key of the tokens: macros/token.sql.
TOKEN_KEY = ("ops", "token_key")
# Parts of a moment that many people share.
COARSE = frozenset({"month", "quarter", "year", "decade", "century"})
SUMMING = (exp.Sum, exp.Avg, exp.Count, exp.Stddev, exp.StddevPop, exp.StddevSamp, exp.Variance, exp.VariancePop)


def crossed(node: exp.Expr) -> frozenset[str]:
    """The barriers a function is for what is given to it."""
    found = set()
    if _is_hash(node):
        found.add(HASH)
        if _is_token(node):
            found.add(TOKENISE)
    if _is_mask(node):
        found.add(MASK)
    if isinstance(node, SUMMING):
        select = node.parent_select
        having = select.args.get("having") if select is not None else None
        if having is not None:
            found |= crossed_by_condition(having.this)
    return frozenset(found)


def crossed_by_condition(condition: exp.Expr) -> frozenset[str]:
    """`aggregate:<k>` of a condition that at least k rows are there; it must hold whatever else does."""
    for one in condition.flatten() if isinstance(condition, exp.And) else [condition]:
        bare = one.unnest()
        if isinstance(bare, exp.GTE | exp.GT) and isinstance(bare.this, exp.Count):
            least = _whole_number(bare.expression)
            if least is not None:
                return frozenset({f"aggregate:{least + isinstance(bare, exp.GT)}"})
    return frozenset()


def holds(declared: str, found: frozenset[str] | tuple[str, ...]) -> bool:
    """Whether what was found on one way of a value is the declared barrier."""
    if declared.startswith("aggregate:"):
        least = int(declared.partition(":")[2])
        return any(one.startswith("aggregate:") and int(one.partition(":")[2]) >= least for one in found)
    return declared in found


def _is_hash(node: exp.Expr) -> bool:
    return isinstance(node, exp.MD5 | exp.SHA | exp.SHA2 | exp.MD5Digest | exp.SHA1Digest | exp.SHA2Digest) or (
        isinstance(node, exp.Anonymous) and node.name.lower() in HASHES
    )


def _is_token(node: exp.Expr) -> bool:
    """HMAC: sha256(key || sha256(key || value)), the keys from the table only the warehouse writes."""
    outer = _keyed(node)
    return outer is not None and any(_keyed(one) is not None for one in outer if _is_hash(one))


def _keyed(node: exp.Expr) -> list[exp.Expr] | None:
    """What stands behind the key in sha256(key || ...); None where there is no key."""
    if not _is_hash(node) or isinstance(node, exp.MD5):
        return None
    argument = node.this if isinstance(node, exp.SHA2 | exp.SHA2Digest) else next(iter(node.expressions), node.this)
    if not isinstance(argument, exp.Expr):
        return None
    parts = list(argument.unnest().flatten()) if isinstance(argument.unnest(), exp.DPipe) else [argument.unnest()]
    if len(parts) < 2:
        return None
    table = parts[0].find(exp.Table)
    if table is None or (table.db, table.name) != TOKEN_KEY:
        return None
    return [part.unnest() for part in parts[1:]]


def _is_mask(node: exp.Expr) -> bool:
    if isinstance(node, exp.Left | exp.Right):
        return _at_most(node.expression, MASK_LEAVES)
    if isinstance(node, exp.Substring):
        return _at_most(node.args.get("length"), MASK_LEAVES)
    if isinstance(node, exp.SplitPart):
        # The domain of an address, not who has it.
        delimiter, part = node.args.get("delimiter"), node.args.get("part_index")
        return isinstance(delimiter, exp.Literal) and delimiter.this == "@" and _whole_number(part) == 2
    if isinstance(node, exp.TimestampTrunc | exp.DateTrunc):
        unit = node.args.get("unit")
        return unit is not None and unit.name.lower() in COARSE
    return False


def _at_most(node: object, most: int) -> bool:
    number = _whole_number(node)
    return number is not None and 0 <= number <= most


def _whole_number(node: object) -> int | None:
    return int(node.this) if isinstance(node, exp.Literal) and not node.is_string and node.this.isdigit() else None
