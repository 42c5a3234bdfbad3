"""Sample events for `raw_payments.transaction_created`: seed -> the messages of topic `payments_transaction_created`.

Most transactions are one event. Some begin pending and are settled by a later event of the same transaction_id; of
these some arrive the wrong way round. Some events come twice, some hours or days late. Amounts are log-normal
(mu 3.5, sigma 1.2) rounded to the currency's exponent. The last bit of the C library's log, cos and exp may differ
between machines; rounding to the exponent takes it away.
"""

import math
from bisect import bisect
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from orchestration.sample import defects
from orchestration.sample.model import TRANSACTIONS, SampleMessage, SampleSpec
from orchestration.sample.stream import (
    Deliveries,
    Draw,
    delivery_times,
    render_time,
    skewed_index,
    to_uuid4,
)

AMOUNT_MU, AMOUNT_SIGMA = 3.5, 1.2

CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CAD")
_CURRENCY_BOUNDS = (0.60, 0.80, 0.90, 0.95)

COUNTRIES = {
    "USD": ("US", "US", "US", "US", "US", "US", "US", "US", "PR", "EC"),
    "EUR": ("DE", "DE", "DE", "FR", "FR", "ES", "IT", "NL", "IE", "AT"),
    "GBP": ("GB",),
    "JPY": ("JP",),
    "CAD": ("CA",),
}
ANYWHERE = ("US", "DE", "FR", "GB", "JP", "CA", "CH", "BR", "IN", "MX", "AU", "SE", "SG", "ZA")
ANYWHERE_SHARE = 0.05

# Shares of the transactions, one of these or none.
LATE_SHARE = 0.01
DUPLICATE_SHARE = 0.01
OUT_OF_ORDER_SHARE = 0.01
STATUS_CHANGE_SHARE = 0.05

# By its latest event a transaction is completed, failed or pending: 92, 5 and 3 %. One whose status changes ends
# completed or failed, so the others hold all that stay pending.
_SETTLED_AT_ONCE = 1 - OUT_OF_ORDER_SHARE - STATUS_CHANGE_SHARE
_PENDING_SHARE = 0.03 / _SETTLED_AT_ONCE
_COMPLETED_OF_SETTLED = 92 / 97

# How many messages later a second delivery comes.
MIN_DELAY, MAX_DELAY = 10, 3000

_SECOND = 1_000_000
_LATE_MIN, _LATE_MAX = 3600 * _SECOND, 5 * 86400 * _SECOND


class _Later(NamedTuple):
    """A second event of a transaction: either its bytes, or what is written when it is delivered."""

    key: bytes
    value: bytes | None
    head: str = ""
    status: str = ""
    after: int = 0


def generate_transactions(spec: SampleSpec) -> Iterator[SampleMessage]:
    """The stream of transaction events; see `SampleSpec`."""
    rng = Random(f"{spec.seed}:{TRANSACTIONS}")
    random = rng.random
    bad = defects.DefectPicker(TRANSACTIONS, spec)
    later: Deliveries[_Later] = Deliveries()

    def message(key: bytes, value: bytes, delivered: int) -> SampleMessage:
        return SampleMessage(TRANSACTIONS, key, value, delivered // 1000, [], None, "landed")

    for slot, delivered in enumerate(delivery_times(spec, random)):
        created = delivered - 1000 - int(random() * 400_000)
        if bad.strikes():
            identifier, tokens = _good_record(rng, spec, created)
            yield bad.message({"transaction_id": f'"{identifier}"', **tokens}, delivered // 1000)
            continue

        second = later.due(slot)
        if second is not None:
            value = second.value
            if value is None:
                stamp = render_time(max(created, second.after), random())
                value = f'{second.head}{stamp}", "status": "{second.status}"}}'.encode()
            yield message(second.key, value, delivered)
            continue

        identifier = to_uuid4(rng)
        key = identifier.encode()
        amount, currency, user, merchant, country = _facts(random, spec)
        head = (
            f'{{"transaction_id": "{identifier}", "amount": {amount}, "currency": "{currency}", '
            f'"user_id": "{user}", "merchant_id": "{merchant}", "country": "{country}", "created_at": "'
        )

        def event(at: int, status: str, head: str = head) -> bytes:
            return f'{head}{render_time(at, random())}", "status": "{status}"}}'.encode()

        due = slot + MIN_DELAY + int(random() * (MAX_DELAY - MIN_DELAY))
        kind = random() - STATUS_CHANGE_SHARE
        if kind < 0:
            later.add(due, _Later(key, None, head, _settled(random()), created + 1000))
            yield message(key, event(created, "pending"), delivered)
            continue
        kind -= OUT_OF_ORDER_SHARE
        if kind < 0:
            began = created - _SECOND - int(random() * 600 * _SECOND)
            later.add(due, _Later(key, event(began, "pending")))
            yield message(key, event(created, _settled(random())), delivered)
            continue
        kind -= LATE_SHARE
        if kind < 0:
            created -= _LATE_MIN + int(random() * (_LATE_MAX - _LATE_MIN))
        status = "pending" if random() < _PENDING_SHARE else _settled(random())
        value = event(created, status)
        if 0 <= kind < DUPLICATE_SHARE:
            later.add(due, _Later(key, value))
        yield message(key, value, delivered)


def _settled(draw: float) -> str:
    return "completed" if draw < _COMPLETED_OF_SETTLED else "failed"


def _good_record(rng: Random, spec: SampleSpec, created: int) -> tuple[str, dict[str, str]]:
    """An ordinary transaction as field -> JSON token, for a defect to spoil."""
    amount, currency, user, merchant, country = _facts(rng.random, spec)
    return to_uuid4(rng), {
        "amount": amount,
        "currency": f'"{currency}"',
        "user_id": f'"{user}"',
        "merchant_id": f'"{merchant}"',
        "country": f'"{country}"',
        "created_at": f'"{render_time(created, rng.random())}"',
        "status": f'"{_settled(rng.random())}"',
    }


def _facts(random: Draw, spec: SampleSpec) -> tuple[str, str, str, str, str]:
    """Amount, currency, user, merchant and country of one transaction."""
    # Box and Muller: one normal draw from two uniform ones.
    normal = math.sqrt(-2 * math.log(1 - random())) * math.cos(math.tau * random())
    major = math.exp(AMOUNT_MU + AMOUNT_SIGMA * normal)
    currency = CURRENCIES[bisect(_CURRENCY_BOUNDS, random())]
    if currency == "JPY":
        amount = str(int(major + 0.5))
    else:
        minor = int(major * 100 + 0.5)
        amount = f"{minor // 100}.{minor % 100:02d}"
    user = f"usr_{1 + skewed_index(random(), spec.users):06d}"
    merchant = f"mer_{1 + skewed_index(random(), spec.merchants):05d}"
    places = ANYWHERE if random() < ANYWHERE_SHARE else COUNTRIES[currency]
    return amount, currency, user, merchant, places[int(random() * len(places))]
