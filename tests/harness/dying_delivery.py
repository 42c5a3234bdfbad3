"""A process that delivers alerts and is killed on its way: python -m tests.harness.dying_delivery before|after [twin]

`before` the request leaves, or `after` the receiver has answered and before the delivery is marked. The twin marks a
delivery and commits before it sends: what it dies with is lost.
"""

import os
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ingestion.database import connect
from ingestion.settings import load_settings
from orchestration import alerts
from orchestration.alerts import Clock
from orchestration.receivers import Outcome, Receiver, find_receivers, send


def main(when: str, is_twin: bool) -> None:
    settings = load_settings()
    connection = connect(settings)
    receivers, _ = find_receivers(settings)

    def post(receiver: Receiver, document: Mapping[str, Any], now: datetime, within_s: float) -> Outcome:
        if is_twin:
            with connection.cursor() as cursor:
                cursor.execute(
                    "update ops.alert_deliveries set delivered_at = now() where receiver = %s", (receiver.name,)
                )
                connection.commit()
        if when == "after":
            send(receiver, document, now, within_s)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    alerts.deliver(connection, receivers, Clock(datetime.now(UTC)), within_s=60.0, post=post)


if __name__ == "__main__":
    main(sys.argv[1], "twin" in sys.argv[2:])
