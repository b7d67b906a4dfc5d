"""analysis.regions"""
