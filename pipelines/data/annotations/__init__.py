"""Annotations of videos: own csv files and the benchmarks' own formats, one file each; `read` gives a `Annotations`."""
