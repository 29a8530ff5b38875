"""Sparse features: SAEs and crosscoders, and whether they say anything that heads and neurons do not."""
