"""Where shards lie: folders on this machine, on a web server or in a bucket, read through one small interface.

    storage = Storage(cache_root=None, cache_bytes=20 * 2**30)    # picklable, thread safe, fork and spawn safe
    folder = storage.folder("https://host/sets/toys")             # or a local path, file://, s3://, gs://, az://
    folder.location, folder.is_local                              # location: for messages, secrets blotted out
    folder.read("source.json") -> memoryview                      # a whole small file
    folder.span("shard-00000.tar", start, stop) -> memoryview     # a range; shorter where the file ends before `stop`
    folder.map("shard-00000.tar") -> memoryview                   # local folders only: the whole file, mapped
    folder.exists(name), folder.size(name), folder.version(name), folder.list()

Local files are mapped. Remote ranges are fetched whole and once into a bounded cache on disk, and come back as a map of
the cached file, which stays valid for its holder when the cache evicts it: ask for lots (consecutive samples), not for
samples. A name may have `/` inside but stays below its folder.

Errors: NotThereError where the store says that there is no such file; StorageError for everything else, and after
all retries. Neither ever means damaged data: an outage must stop the run. A file that ends early is no error here;
`span` returns what exists, `size` tells where it ends.

`names_tars`, `expand_braces` and `split_pattern` turn `https://host/set/part-{000..099}.tar` into a folder and names.
"""

from data_modules.storage.access import DEFAULT_CACHE_BYTES, Storage
from data_modules.storage.errors import NotThereError, StorageError
from data_modules.storage.folder import Folder
from data_modules.storage.urls import expand_braces, is_remote, names_tars, printable, split_pattern

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "Folder",
    "NotThereError",
    "Storage",
    "StorageError",
    "expand_braces",
    "is_remote",
    "names_tars",
    "printable",
    "split_pattern",
]
