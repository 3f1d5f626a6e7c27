"""Files, folders and checkpoints on local disks and object stores, under one kind of name: a path or a URI.

The rest of the program says `storage.read_json(path)` and never asks where `path` is. Read in this order:

    files               names, reading and atomic writing, from bytes to tables and videos
    checkpoint_backend  where a run stores its checkpoints: `s5.checkpoints` calls it
    weights             weights read back from a checkpoint of any place
    provenance          versions and commit that made a result
"""

from pipelines.storage.files import absolute as absolute
from pipelines.storage.files import check_plain as check_plain
from pipelines.storage.files import check_writable as check_writable
from pipelines.storage.files import download as download
from pipelines.storage.files import exists as exists
from pipelines.storage.files import filesystem as filesystem
from pipelines.storage.files import is_folder as is_folder
from pipelines.storage.files import is_uri as is_uri
from pipelines.storage.files import join as join
from pipelines.storage.files import make_folder as make_folder
from pipelines.storage.files import opened as opened
from pipelines.storage.files import read_bytes as read_bytes
from pipelines.storage.files import read_json as read_json
from pipelines.storage.files import read_table as read_table
from pipelines.storage.files import redacted as redacted
from pipelines.storage.files import remove as remove
from pipelines.storage.files import size as size
from pipelines.storage.files import write_bytes as write_bytes
from pipelines.storage.files import write_json as write_json
from pipelines.storage.files import write_table as write_table
from pipelines.storage.files import written as written
