"""`make prove`: the promise "every record is accounted for" put to the test by destruction.

    producer with a tally of its own -> Apache Kafka -> loader under test, killed and restarted -> Postgres
                                   tally  ==  database ?

Each scenario breaks something (a process, a server, a disk, a lock, a log), lets the loader come back, and compares
the database with the producer's tally alone. Twins take one guarantee away and must be caught.
"""
