"""Sample exchange rates: seed -> daily reference rates as the European Central Bank publishes them.

A random walk of each currency against the euro, a step a day the bank publishes on: not on weekends and not on the
closing days of TARGET. The walk starts at a fixed day, so a day's rates are the same whoever asks for which period.
Arithmetic is `Decimal` throughout: the same digits on every machine.
"""

from bisect import bisect_right
from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal, localcontext
from functools import lru_cache
from random import Random

from ingestion.errors import ConfigurationError

# The day the walk starts on; no rates before it.
FIRST_DAY = date(2020, 1, 2)

# Currency -> name, and units for one euro around which the rate walks.
CURRENCIES: dict[str, tuple[str, str]] = {
    "AUD": ("Australian Dollar", "1.6500"),
    "BRL": ("Brazilian Real", "6.0500"),
    "CAD": ("Canadian Dollar", "1.4800"),
    "CHF": ("Swiss Franc", "0.9550"),
    "CNY": ("Chinese Renminbi Yuan", "7.8000"),
    "CZK": ("Czech Koruna", "24.900"),
    "DKK": ("Danish Krone", "7.4590"),
    "EUR": ("Euro", "1"),
    "GBP": ("British Pound", "0.8600"),
    "HKD": ("Hong Kong Dollar", "8.4500"),
    "HUF": ("Hungarian Forint", "395.00"),
    "IDR": ("Indonesian Rupiah", "17600"),
    "INR": ("Indian Rupee", "91.000"),
    "JPY": ("Japanese Yen", "161.00"),
    "KRW": ("South Korean Won", "1480.0"),
    "MXN": ("Mexican Peso", "20.100"),
    "NOK": ("Norwegian Krone", "11.600"),
    "NZD": ("New Zealand Dollar", "1.8000"),
    "PLN": ("Polish Złoty", "4.3000"),
    "SEK": ("Swedish Krona", "11.300"),
    "SGD": ("Singapore Dollar", "1.4500"),
    "USD": ("United States Dollar", "1.0850"),
    "ZAR": ("South African Rand", "20.000"),
}

# Rate in millionths a day: a uniform step of up to 0.7 %, drawn back to the currency's level by 0.5 % of the distance.
_STEP = 7000
_PULL = Decimal("0.005")

# Rates above the bound are given with this many decimals.
_DECIMALS = ((Decimal(5000), 0), (Decimal(80), 2), (Decimal(20), 3), (Decimal(1), 4), (Decimal("0.0001"), 5))


class RateBook:
    """The rates of one seed. Rates of the last day are there from its first moment (UTC).

    `between` and `latest` take the last day that may be shown, so the book itself knows no clock.
    """

    def __init__(self, seed: int) -> None:
        self._rng = Random(f"{seed}:rates")
        self._days: list[date] = []
        self._per_euro: list[dict[str, Decimal]] = []
        self._levels = {code: Decimal(level) for code, (_, level) in CURRENCIES.items() if code != "EUR"}
        self._walk = dict(self._levels)
        self._corrections: dict[date, dict[str, Decimal]] = {}

    def correct(self, day: date, currency: str, per_euro: str) -> None:
        """Publish another rate for a past day, in units of the currency for one euro.

        `ConfigurationError` for a day without rates or a currency that is not quoted.
        """
        if not is_publishing_day(day) or currency not in self._levels:
            raise ConfigurationError(f"Sample rates: {currency} has no rate on {day} to correct.")
        self._corrections.setdefault(day, {})[currency] = Decimal(per_euro)

    def between(
        self, first: date, last: date, base: str = "EUR", symbols: Iterable[str] | None = None, amount: str = "1"
    ) -> dict[str, dict[str, str]]:
        """Day -> currency -> rate, as decimal text: units of the currency for `amount` units of the base.

        As the real API does, the period begins with the last publishing day on or before `first`. Days without
        rates are absent; an unknown base, or no known symbol beside it, leaves nothing.
        """
        self._extend(last)
        begin = max(bisect_right(self._days, first) - 1, 0)
        end = bisect_right(self._days, last)
        wanted = None if symbols is None else frozenset(symbols)
        result: dict[str, dict[str, str]] = {}
        for index in range(begin, end):
            rates = self._rebased(index, base, wanted, Decimal(amount))
            if rates:
                result[self._days[index].isoformat()] = rates
        return result

    def latest(
        self, day: date, base: str = "EUR", symbols: Iterable[str] | None = None, amount: str = "1"
    ) -> dict[str, dict[str, str]]:
        """The rates of the last publishing day on or before `day`, in the form of `between`."""
        return self.between(day, day, base, symbols, amount)

    def _rebased(self, index: int, base: str, wanted: frozenset[str] | None, amount: Decimal) -> dict[str, str]:
        per_euro = {"EUR": Decimal(1), **self._per_euro[index], **self._corrections.get(self._days[index], {})}
        if base not in per_euro:
            return {}
        with localcontext(prec=28):
            return {
                code: render_rate(amount * per_euro[code] / per_euro[base])
                for code in sorted(per_euro)
                if code != base and (wanted is None or code in wanted)
            }

    def _extend(self, last: date) -> None:
        day = self._days[-1] + timedelta(days=1) if self._days else FIRST_DAY
        while day <= last:
            if is_publishing_day(day):
                self._days.append(day)
                self._per_euro.append(self._step())
            day += timedelta(days=1)

    def _step(self) -> dict[str, Decimal]:
        with localcontext(prec=28):
            for code, level in self._levels.items():
                rate = self._walk[code]
                millionths = int(self._rng.random() * (2 * _STEP + 1)) - _STEP
                if code == "DKK":  # held to the euro
                    millionths //= 50
                rate += rate * millionths / 1_000_000 + (level - rate) * _PULL
                self._walk[code] = rate.quantize(Decimal("1e-10"))
            return {code: Decimal(render_rate(rate)) for code, rate in self._walk.items()}


def render_rate(rate: Decimal) -> str:
    """A rate with the decimals Frankfurter gives it, fewer the larger it is, and no zeros at the end."""
    steps = ((5000, "1"), (80, "0.01"), (20, "0.001"), (1, "0.0001"))
    quantum = next(
        (step for bound, step in steps if rate > bound), "0.00001" if rate > Decimal("0.0001") else "0.000001"
    )
    text = format(rate.quantize(Decimal(quantum)), "f")
    if "." not in text:
        return text
    text = text.rstrip("0")
    return text + "0" if text.endswith(".") else text


@lru_cache(maxsize=4096)
def is_publishing_day(day: date) -> bool:
    """Whether the bank publishes rates on that day: Monday to Friday, save TARGET's closing days."""
    if day.weekday() >= 5 or day < FIRST_DAY:
        return False
    if (day.month, day.day) in {(1, 1), (5, 1), (12, 25), (12, 26)}:
        return False
    easter = easter_sunday(day.year)
    return day not in (easter - timedelta(days=2), easter + timedelta(days=1))


@lru_cache(maxsize=512)
def easter_sunday(year: int) -> date:
    """Easter Sunday of the Gregorian calendar, by the Meeus, Jones and Butcher algorithm."""
    golden = year % 19
    century, rest = divmod(year, 100)
    leap, skipped = divmod(century, 4)
    moon = (19 * golden + century - leap - (century - (century + 8) // 25 + 1) // 3 + 15) % 30
    weekday = (32 + 2 * skipped + 2 * (rest // 4) - moon - rest % 4) % 7
    late = (golden + 11 * moon + 22 * weekday) // 451
    month, day = divmod(moon + weekday - 7 * late + 114, 31)
    return date(year, month, day + 1)
