"""Which services run embedded: those that no setting names.

Refuses nothing: an address that is set is believed, and tried by whoever connects to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ingestion.settings import Settings

POSTGRES = "postgres"
KAFKA = "kafka"
RATES = "rates"

# Service -> the setting that names a server of one's own.
SETTING_OF: Mapping[str, str] = {
    POSTGRES: "WAREHOUSE_DSN",
    KAFKA: "KAFKA_BOOTSTRAP_SERVERS",
    RATES: "FX_API_BASE",
}

# Of the sample rates; WAREHOUSE_SAMPLE_SEED overrides it.
DEFAULT_SEED = 1

PUBLIC_RATES = "https://api.frankfurter.dev"


@dataclass(frozen=True)
class Plan:
    """`embedded` services in the order they start; `defaults` are settings to add whatever is embedded."""

    embedded: tuple[str, ...]
    defaults: Mapping[str, str]


def plan_services(settings: Settings) -> Plan:
    """Decide from the settings alone; starts and opens nothing.

    Sample rates are served only where everything else is a sample too: a warehouse with a server of its own gets
    the public rates, never invented ones.
    """
    missing = [name for name in (POSTGRES, KAFKA) if settings.get(SETTING_OF[name]) is None]
    defaults: dict[str, str] = {}
    if settings.fx_api_base is None:
        if missing == [POSTGRES, KAFKA]:
            missing.append(RATES)
        else:
            defaults[SETTING_OF[RATES]] = PUBLIC_RATES
    return Plan(tuple(missing), defaults)
