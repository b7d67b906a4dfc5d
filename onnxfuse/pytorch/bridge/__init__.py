"""pytorch.bridge"""
