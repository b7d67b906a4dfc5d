"""Training in PyTorch: records, samples, objectives, the loop, and retraining as a whole.

`retraining` is what commands use, `autoencoder` what a pass trains, and `records` is pure: results and
reports read it without torch. It stands above `bridge`.
"""
