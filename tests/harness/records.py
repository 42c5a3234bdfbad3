"""Records the tests send: a good payment, changed where a test wants it."""

import json
import uuid


def payment(**changes: object) -> bytes:
    """The JSON bytes of a payment that fits the contract, with these fields changed or added."""
    good = {
        "transaction_id": str(uuid.uuid4()),
        "amount": 12.5,
        "currency": "USD",
        "user_id": "usr_123456",
        "merchant_id": "mer_12345",
        "country": "US",
        "created_at": "2026-01-02T03:04:05Z",
        "status": "completed",
    }
    return json.dumps({**good, **changes}).encode()
