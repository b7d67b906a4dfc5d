"""pytorch.training"""
