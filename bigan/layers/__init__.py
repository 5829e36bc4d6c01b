"""Layers whose forward passes never write a buffer; state changes are explicit functions."""
