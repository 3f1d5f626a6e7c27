"""Files, folders and checkpoints on local disks and object stores."""

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
