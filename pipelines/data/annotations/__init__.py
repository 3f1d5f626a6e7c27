"""Annotations of videos, one file per format; `read` (in `own`: `from_folder`, `from_csv`) returns `Annotations`.

`shared` has what all formats share: an annotated video, and reading of files with errors that name file and line.
"""
