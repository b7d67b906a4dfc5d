"""analysis.intervals"""
