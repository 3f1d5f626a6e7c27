"""Narration: what is said in videos, compared with written steps. Read in this order:

captions  what is said when, from jsonl or HowTo100M's json
steps     the written steps of tasks, from csv or json
segments  captions as stretches of a manifest's videos, or why they are none
encoders  sentences as vectors: TF-IDF, or a sentence transformer
labels    soft labels of segments: the likeliest steps, and their table on storage
reading   labels read back for training
"""
