"""The audit: attacks and canaries in, empirical lower bounds of epsilon out.

==============  ================================================================================================
statistics      rates with exact intervals, ROC, and what hits and false alarms say about epsilon at least
canaries        records with a known gradient, placed by coin flips in a real training; the noise really there
builds          the project's own training and learning, with or without a fault injected into the real code
checks          what a build is put through, without knowing which it is
self_test       blinded builds, corrected error level: broken ones must be caught, the correct one must pass
membership      membership inference on phantom-trained segmentation models: losses, boundaries, LiRA
reconstruction  gradient inversion of one step's release
phantom_audit   canaries, membership and inversion on phantoms, under one hashed protocol
report          JSON, HTML, plots
==============  ================================================================================================

An audit never proves privacy: it can only show that a claim is wrong. The guarantee rests on the proof and the ledger;
the audit looks for faults between the proof and the code that runs.
"""
