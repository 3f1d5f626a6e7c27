"""Files, folders and checkpoints on local disks and object stores, under one kind of name: a path or a URI.

The rest of the program says `storage.read_json(path)` and never asks where `path` is. Read in this order:

    names               what a name is: absolute, joined, redacted
    filesystems, web    what is behind it: pyarrow's file systems, or a web server, which can only be read
    files               reading and atomic writing, from bytes to tables and videos
    checkpoint_backend  where a run stores its checkpoints: `s5.checkpoints` calls it
    weights             weights read back from a checkpoint of any place
    provenance          versions and commit that made a result

The last three are imported by name, since not every reader of a file needs them.
"""

from pipelines.storage.files import (
    atomic_write,
    check_writable,
    create_bytes,
    download,
    entries,
    exists,
    files_below,
    is_folder,
    open_video,
    read_bytes,
    read_json,
    read_table,
    remove,
    remove_folder,
    size,
    table_writer,
    write_bytes,
    write_json,
    write_table,
)
from pipelines.storage.filesystems import filesystem, make_folder
from pipelines.storage.names import absolute, check_no_credentials, is_uri, join, redacted

__all__ = [
    "absolute",
    "atomic_write",
    "check_no_credentials",
    "check_writable",
    "create_bytes",
    "download",
    "entries",
    "exists",
    "files_below",
    "filesystem",
    "is_folder",
    "is_uri",
    "join",
    "make_folder",
    "open_video",
    "read_bytes",
    "read_json",
    "read_table",
    "redacted",
    "remove",
    "remove_folder",
    "size",
    "table_writer",
    "write_bytes",
    "write_json",
    "write_table",
]
