"""Benchmarks: what SpotServe claims, measured with the real daemon. Each module that is a command says so."""
