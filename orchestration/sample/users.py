"""Sample events for `raw_users.user_events`: seed -> the messages of topic `user_events`.

Users sign up in the order of their ids, the busy ones of the transactions first; what a user does comes after, and
nothing after `closed`. Names are Faker's, by country; addresses, phone numbers and networks are ones reserved for
examples, so no event can name a real person. Some events come twice, some late and so out of order.
"""

import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from orchestration.sample import defects
from orchestration.sample.model import USER_EVENTS, SampleMessage, SampleSpec
from orchestration.sample.stream import (
    Deliveries,
    delivery_times,
    render_time,
    skewed_index,
    to_uuid4,
)

# Country -> Faker locale, dialling code; a user's country follows from the user's number.
_PLACES = (
    ("US", "en_US", "+1"),
    ("US", "en_US", "+1"),
    ("US", "en_US", "+1"),
    ("US", "en_US", "+1"),
    ("DE", "de_DE", "+49"),
    ("FR", "fr_FR", "+33"),
    ("ES", "es_ES", "+34"),
    ("NL", "nl_NL", "+31"),
    ("GB", "en_GB", "+44"),
    ("GB", "en_GB", "+44"),
    ("JP", "ja_JP", "+81"),
    ("CA", "en_CA", "+1"),
)

# Faker makes a few thousand names a second: this many a locale, shared by the users.
_NAMES_PER_LOCALE = 300

_MAIL_HOSTS = ("example.com", "example.org", "example.net")
_NETWORKS = ("192.0.2", "198.51.100", "203.0.113")

SIGN_UP_SHARE = 0.5
# Shares of what a user who has signed up does; the rest is signed_in.
_PROFILE_UPDATED, _CLOSED = 0.25, 0.02

DUPLICATE_SHARE = 0.01
LATE_SHARE = 0.01
MIN_DELAY, MAX_DELAY = 10, 3000


@dataclass(frozen=True)
class _Profile:
    """What an event says about its user, as JSON tokens."""

    email: str
    full_name: str
    phone: str
    country: str


def generate_user_events(spec: SampleSpec) -> Iterator[SampleMessage]:
    """The stream of user events; see `SampleSpec`."""
    rng = Random(f"{spec.seed}:{USER_EVENTS}")
    random = rng.random
    bad = defects.DefectPicker(USER_EVENTS, spec)
    later: Deliveries[tuple[bytes, bytes]] = Deliveries()
    names = _names(spec.seed)
    # By user number - 1: microseconds of the sign-up, profile updates so far, whether closed.
    signed_up = array("q")
    updates = bytearray(spec.users)
    closed = bytearray(spec.users)
    closed_count = 0

    def tokens(event_type: str, number: int, at: int) -> dict[str, str]:
        profile = _profile(names, number, updates[number - 1])
        return {
            "event_id": f'"{to_uuid4(rng)}"',
            "event_type": f'"{event_type}"',
            "user_id": f'"usr_{number:06d}"',
            "email": profile.email,
            "full_name": profile.full_name,
            "phone": profile.phone,
            "ip_address": _ip_address(random(), random()),
            "country": profile.country,
            "occurred_at": f'"{render_time(at, random())}"',
        }

    for slot, delivered in enumerate(delivery_times(spec, random)):
        timestamp_ms = delivered // 1000
        at = delivered - 1000 - int(random() * 400_000)

        if signed_up and bad.strikes():
            number = 1 + skewed_index(random(), len(signed_up))
            yield bad.message(tokens("signed_in", number, at), timestamp_ms)
            continue

        second = later.due(slot)
        if second is not None:
            yield SampleMessage(USER_EVENTS, *second, timestamp_ms, [], None, "landed")
            continue

        number = 1 + skewed_index(random(), len(signed_up)) if signed_up else 0
        full = len(signed_up) == spec.users
        if not full and (number == 0 or closed[number - 1] or random() < SIGN_UP_SHARE):
            signed_up.append(at)
            number, event_type = len(signed_up), "signed_up"
        else:
            if closed[number - 1]:
                number = _open_user(closed, number)
            joined = signed_up[number - 1] + 1000
            at = max(at, joined)
            act = random()
            if act < _CLOSED and closed_count < len(signed_up) - 1:
                event_type = "closed"
                closed[number - 1] = 1
                closed_count += 1
            elif act < _CLOSED + _PROFILE_UPDATED:
                event_type = "profile_updated"
                updates[number - 1] = min(updates[number - 1] + 1, 255)
            else:
                event_type = "signed_in"
                if random() < LATE_SHARE:
                    at = joined + int(random() * (at - joined))

        key = b"usr_%06d" % number
        value = defects.render(tokens(event_type, number, at).items()).encode()
        if random() < DUPLICATE_SHARE:
            later.add(slot + MIN_DELAY + int(random() * (MAX_DELAY - MIN_DELAY)), (key, value))
        yield SampleMessage(USER_EVENTS, key, value, timestamp_ms, [], None, "landed")


def _open_user(closed: bytearray, number: int) -> int:
    """The next user after `number` whose account is open, from the first again after the last; one always is."""
    following = closed.find(0, number)
    return 1 + (following if following >= 0 else closed.find(0))


@lru_cache(maxsize=4)
def _names(seed: int) -> dict[str, tuple[str, ...]]:
    """Names by country, the same for the same seed (and Faker release)."""
    # Imported here: Faker takes half a second, and transactions need no names.
    from faker import Faker

    names: dict[str, tuple[str, ...]] = {}
    for country, locale, _ in _PLACES:
        if country not in names:
            faker = Faker(locale)
            faker.seed_instance(f"{seed}:{locale}")
            names[country] = tuple(faker.name() for _ in range(_NAMES_PER_LOCALE))
    return names


@lru_cache(maxsize=8192)
def _profile_of(name: str, number: int, version: int, country: str, dialling: str) -> _Profile:
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = ".".join("".join(filter(str.isalpha, word)) for word in letters.split()) or "user"
    suffix = f"+{version}" if version else ""
    return _Profile(
        email=f'"{slug.strip(".")}.{number}{suffix}@{_MAIL_HOSTS[number % len(_MAIL_HOSTS)]}"',
        full_name=f'"{name}"',
        phone=f'"{dialling}555{version:03d}{number:06d}"',
        country=f'"{country}"',
    )


def _profile(names: dict[str, tuple[str, ...]], number: int, version: int) -> _Profile:
    """The profile of a user after `version` updates: mail, phone and, every third time, the name change."""
    # A multiplier without common divisors spreads neighbouring numbers over the countries and names.
    spread = number * 7919
    country, _, dialling = _PLACES[spread % len(_PLACES)]
    name = names[country][(spread // len(_PLACES) + version // 3) % _NAMES_PER_LOCALE]
    return _profile_of(name, number, version, country, dialling)


def _ip_address(draw: float, host: float) -> str:
    if draw < 0.1:
        return f'"2001:db8::{int(host * 65535):x}"'
    return f'"{_NETWORKS[int(draw * 1000) % len(_NETWORKS)]}.{1 + int(host * 254)}"'
