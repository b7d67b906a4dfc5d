"""Larger networks that compute the same: wider, deeper, with larger kernels.

`plan` says where a network can grow. `widening` and `skips` add channels, `depth` and `deepening` layers and
blocks (`block_copies`), `kernels` borders of zeros.

Stands above `fitting` and below `pytorch`.
"""
