"""Federated private training: hospitals keep their data, a coordinator averages what they release.

The algorithms know no engine; Flower enters through the two thin apps alone.

    protocol      what coordinator and sites say to each other: closed, validated
    coordinator   rounds; what is written after each, when it ends
    enrolment     who takes part: query, prepare, who comes back
    progress      what is said of a round and of the whole run
    aggregation   replies in, next global weights out: fixed public weights, malformed replies named and left out
    site          one message in, one reply out: what a hospital does, under its own settings and its own ledger
    local         the local steps of one round: private ones, and those without a guarantee for comparison
    flower_*      the engine: processes on this machine, the two apps, the transport

Formal guarantee:
    In the private modes everything a site sends after the query phase is a function of public values and of releases
    that the site's own dataset ledger was charged for before they were drawn. The guarantee of each site is that of
    its ledger; sites hold different patients, so a run's epsilon is the largest of its sites'. A patient known to
    several sites pays the sum.
"""
