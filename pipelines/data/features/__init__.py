"""Cached features: the tokens of a frozen backbone, each frame encoded once. Read in this order:

cache     their layout on storage, and writing
encoding  encodes frames and stores their tokens
reader    reads the tokens of clips
batches   delivers them as a clip source, in threads
"""
