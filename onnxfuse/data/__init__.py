"""Samples: where they come from, and which of them are fitted and which held out.

Import `Calibration` and its batches from `calibration`; `rows` cuts a few rows off a batch, `batch_rows` says
how many fit into memory. Behind it are the kinds of sources (`sources`, `row_source`, `feed_source`,
`opening`), files read row by row (`npz`), functions in a user's script (`userscript`) and made-up samples
(`synthetic`).

Stands above `analysis` and below `verification`.
"""
