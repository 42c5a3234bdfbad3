"""The key of the tokens that stand in marts for personal values: WAREHOUSE_TOKEN_SECRET -> `ops.token_key`.

macros/token.sql computes HMAC-SHA-256 from what is kept here: the key, padded to a block and combined with the two
constants of RFC 2104. Without the setting a random key is made once. Another key than the one in use is refused: the
same person would have two tokens.
"""

import hashlib
import hmac
import secrets
import uuid

import psycopg2.extensions

from ingestion.errors import ConfigurationError

_BLOCK = 64


def pads_of(secret: bytes) -> tuple[bytes, bytes]:
    """The inner and the outer key block of HMAC-SHA-256."""
    block = (hashlib.sha256(secret).digest() if len(secret) > _BLOCK else secret).ljust(_BLOCK, b"\0")
    return bytes(byte ^ 0x36 for byte in block), bytes(byte ^ 0x5C for byte in block)


def token_of(secret: bytes, value: str) -> uuid.UUID:
    """The token the models make of a value."""
    return uuid.UUID(bytes=hmac.digest(secret, value.encode(), "sha256")[:16])


def ensure_token_key(cursor: psycopg2.extensions.cursor, secret: str | None) -> None:
    """The key in place: the setting's, or a random one where there is neither.

    Raises:
        ConfigurationError: tokens were made with another key.
    """
    cursor.execute("select inner_pad, outer_pad from ops.token_key")
    row = cursor.fetchone()
    wanted = pads_of(secret.encode() if secret else secrets.token_bytes(_BLOCK))
    if row is None:
        cursor.execute(
            "insert into ops.token_key (inner_pad, outer_pad) values (%s, %s) on conflict do nothing",
            tuple(map(psycopg2.Binary, wanted)),
        )
    elif secret and not hmac.compare_digest(bytes(row[0]), wanted[0]):
        raise ConfigurationError(
            "WAREHOUSE_TOKEN_SECRET is not the key the tokens in this warehouse were made with.",
            hint="Set the former one, or `delete from ops.token_key` and then `dbt build --full-refresh`.",
        )
